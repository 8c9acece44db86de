"""The PostgreSQL store: several processes share one database, and a turn costs two statements.

Importing it needs asyncpg, the extra ``postgres``.
"""

from app.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
