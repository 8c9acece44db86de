"""What a store has that only one process at a time can have open."""

from app.domain.ids import SessionKey


class Alone:
    """Nobody to share with: no leases, and nothing that could be older than what is stored."""

    @property
    def leases(self) -> None:
        return None

    def recall_session(self, key: SessionKey) -> None:
        return None
