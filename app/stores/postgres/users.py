"""What belongs to a user and to no session of theirs, in PostgreSQL."""

from app.domain.erasure import Erased
from app.domain.state import StateScope
from app.stores.postgres.unit import Unit, View

_SCOPES = "SELECT app_name FROM shared_state WHERE owner = $1 AND user_id = $2 ORDER BY app_name"
_FORGET_STATES = (
    "WITH gone AS (DELETE FROM shared_state WHERE owner = $1 AND user_id = $2 RETURNING 1)"
    " SELECT count(*) FROM gone"
)
_FORGET_USAGE = (
    "WITH gone AS (DELETE FROM usage_days WHERE owner = $1 AND user_id = $2 RETURNING day)"
    " SELECT count(DISTINCT day) FILTER (WHERE day >= 0) FROM gone"
)
# A user without sessions keeps rows as long as their sum is made of several shards'.
_FORGET_COUNTS = (
    "WITH gone AS (DELETE FROM session_counts WHERE owner = $1 AND (owner = $2 OR (kind = 'u' AND name = $2))"
    " RETURNING owner, kind, name, count)"
    " SELECT owner, kind, name, sum(count)::bigint FROM gone"
    " GROUP BY owner, kind, name HAVING sum(count) <> 0"
)
_ADD_COUNT = (
    "INSERT INTO session_counts AS kept (owner, kind, name, shard, count) VALUES ($1, $2, $3, shard(), $4)"
    " ON CONFLICT (owner, kind, name, shard) DO UPDATE SET count = kept.count + excluded.count"
)


async def list_scopes(view: View, owner: str, user_id: str) -> tuple[StateScope, ...]:
    rows = await view.connection.fetch(_SCOPES, owner.encode(), user_id.encode())
    return tuple(StateScope(row[0].decode(), owner, user_id) for row in rows)


async def forget_user(unit: Unit, owner: str, user_id: str) -> Erased:
    user, connection = (owner.encode(), user_id.encode()), unit.connection
    states = await connection.fetchval(_FORGET_STATES, *user)
    days = await connection.fetchval(_FORGET_USAGE, *user)
    for left in await connection.fetch(_FORGET_COUNTS, *user):
        await connection.execute(_ADD_COUNT, *left)
    return Erased(states=states, usage_days=days)
