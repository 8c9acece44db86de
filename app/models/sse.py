"""Bytes of an event stream to the data of its events: no I/O, cut anywhere."""

from app.models.failure import malformed


class EventSplitter:
    """Collects bytes and gives out the data of every event that is complete.

    Follows the WHATWG rules for what carries data: lines end with LF, CR LF or CR; the
    ``data`` lines of one event are joined with LF; comments and other fields are passed
    over; what the end of the stream leaves incomplete is dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest: list[bytes] = []  # the beginning of a line, as it came
        self._rest_size = 0
        self._data: list[bytes] = []  # data lines of the event that is not complete
        self._data_size = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that ``received`` completes.

        Raises:
            ModelError: a line or an event is longer than ``max_bytes``.
        """
        if b"\n" not in received and b"\r" not in received and not self._ends_with_cr():
            self._keep(received)
            return []
        lines = self._lines(b"".join((*self._rest, received)))
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data, self._data_size = [], 0
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                self._data_size += len(line)
        self._check_size()
        return events

    def _lines(self, text: bytes) -> list[bytes]:
        """Split complete lines off ``text`` and keep the rest."""
        if b"\r" not in text:
            *lines, rest = text.split(b"\n")
        else:
            # A CR at the very end may be half of a CR LF: its line waits for the next byte.
            parts = text.splitlines(keepends=True)
            rest = parts.pop() if parts[-1].endswith(b"\r") or not parts[-1].endswith(b"\n") else b""
            lines = [part.rstrip(b"\r\n") for part in parts]
        self._rest, self._rest_size = [], 0
        if rest:
            self._keep(rest)
        return lines

    def _keep(self, part: bytes) -> None:
        self._rest.append(part)
        self._rest_size += len(part)
        self._check_size()

    def _check_size(self) -> None:
        if self._rest_size + self._data_size > self._max_bytes:
            raise malformed()

    def _ends_with_cr(self) -> bool:
        return bool(self._rest) and self._rest[-1].endswith(b"\r")
