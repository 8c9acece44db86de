"""A connection to the file that knows how its rows are sealed."""

import apsw

from app.stores.sealing import NO_KEYS, Sealer


class Connection(apsw.Connection):
    """Whoever opens it sets ``sealer``: what it writes is sealed by that, and what it reads opened."""

    sealer: Sealer = NO_KEYS
