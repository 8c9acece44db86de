"""Which pages may have browsers change something here.

A page of any site can have a browser send a POST without a body, or with one of plain text, to any
address that the browser reaches, this server on the same machine too. The latter is refused by its type.
"""

from collections.abc import Iterable
from typing import Final

from starlette.types import Scope

from app.domain.errors import Forbidden

_CHANGES_NOTHING: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Origins:
    """The origins that pages of other sites may be of; ``*``: any.

    Browsers say where a request comes from, seen from the address that they know (Fetch Metadata), so
    that no proxy's renaming counts. To http:// on another machine, and old ones, they say only what page
    it is of: that must have the name that is asked. What is no browser says nothing, and is let in.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(origin.encode() for origin in allowed)

    def check(self, scope: Scope) -> None:
        """Refuse a change that a page of another site asks for.

        Raises:
            Forbidden
        """
        if scope["method"] in _CHANGES_NOTHING or b"*" in self._allowed:
            return
        headers = dict(scope["headers"])
        site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        if site is None:
            is_foreign = (
                origin is not None and origin.partition(b"://")[2] != headers.get(b"host", b"").lower()
            )
        else:
            is_foreign = site == b"cross-site"
        if is_foreign and origin not in self._allowed:
            raise Forbidden("Pages of other sites may not do this.")
