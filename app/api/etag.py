"""ETags of sessions, ``"<head or 0>.<rev>"``, as clients send them back."""

from app.domain.errors import InvalidInput
from app.domain.session import UNSET, Unset


def parse_if_match(header: str | None) -> str | None:
    """Return the one ETag that ``If-Match`` names, without its quotes; ``None`` for ``*``.

    A weak tag is returned as it is, and so matches nothing, as RFC 9110 wants it.

    Raises:
        InvalidInput: it names several.
    """
    if header is None or header.strip() == "*":
        return None
    if "," in header:
        raise InvalidInput("If-Match", "must be one ETag")
    return header.strip().strip('"')


def parse_expected_head(header: str | None) -> str | Unset | None:
    """Return the head that ``If-Match`` expects, whatever the record's revision.

    Raises:
        InvalidInput: it names several.
    """
    tag = parse_if_match(header)
    if tag is None:
        return UNSET
    head = tag.partition(".")[0]
    return None if head == "0" else head
