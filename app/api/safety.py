"""What every response tells browsers that they must not do with it.

A route that knows better for its own answers says so, and is heard.
"""

from typing import Final

Headers = list[tuple[bytes, bytes]]

DEFAULTS: Final = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # Not loaded as an image or script by pages of other origins; fetch() is CORS's matter.
    (b"cross-origin-resource-policy", b"same-origin"),
    # Of what is no page, nothing is shown as one, nor inside of one.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


def with_safety(headers: Headers) -> Headers:
    """Return ``headers``, whose names are in lower case, with those of the defaults that they lack."""
    names = {name for name, _ in headers}
    return headers + [header for header in DEFAULTS if header[0] not in names]
