"""ETags as clients send them back: of sessions ``"<head or 0>.<rev>"``, of states ``"<rev>"``."""

import re

from app.domain.errors import InvalidInput
from app.domain.session import UNSET, Unset

ETAG_PATTERN = r"^[^,]*$"
"""What ``If-Match`` must be to name no more than one."""
NO_REV = -1
"""A revision that nothing ever has."""

_REV = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)


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


def parse_expected_rev(header: str | None) -> int | None:
    """Return the revision of a state that ``If-Match`` expects, ``NO_REV`` if it is no state's ETag.

    Raises:
        InvalidInput: it names several.
    """
    tag = parse_if_match(header)
    if tag is None:
        return None
    return int(tag) if _REV.fullmatch(tag) else NO_REV
