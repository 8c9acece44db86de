"""A file whose contents count as they are now, though it is read only when it has changed."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from app.ports import Clock

LOOK_EVERY_S = 1.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


class FollowedFile(Generic[T]):
    """The value of a file, which is looked at once a second at most, and only when asked.

    ``setting`` is what messages call it. A change that ``parse`` refuses, and a file that cannot be
    read any more, are logged as errors, once each; the last good value stays, and the file is read at
    each look until that is mended.

    Raises:
        ValueError: it cannot be read at first; names the setting.
    """

    def __init__(self, setting: str, path: str, parse: Callable[[bytes], T], clock: Clock) -> None:
        self._setting = setting
        self._path = Path(path)
        self._parse = parse
        self._clock = clock
        self._look_at = clock.monotonic() + LOOK_EVERY_S
        self._stamp = self._find_stamp()
        self._complaint = ""
        try:
            self._value = parse(self._path.read_bytes())
        except OSError as error:
            raise ValueError(f"{setting}: {path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"{setting}: {path}: {error}") from None

    def get(self) -> T:
        """Return the value as it was in the file at some time within the last second."""
        now = self._clock.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._look()
        return self._value

    def _look(self) -> None:
        stamp = self._find_stamp()
        if stamp == self._stamp:
            return
        try:
            self._value = self._parse(self._path.read_bytes())
        except (OSError, ValueError) as error:
            # Tried again though nothing changes that a stamp tells of: access to a folder above, say.
            self._stamp = None
            self._complain(str(error))
        else:
            self._stamp = stamp  # of before it was read: what changed meanwhile is seen the next time
            self._complaint = ""
            _log.info("%s: read %s again", self._setting, self._path)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            _log.error("%s: %s: %s; what it said before still counts", self._setting, self._path, complaint)

    def _find_stamp(self) -> tuple[int, int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
