-- Turn rows are found by (session, turn_id), never by turn_id alone: a forked
-- session keeps the ids of the path that it shares with its origin.
-- Bodies live in rowid tables: in a WITHOUT ROWID table a row over 1,002 bytes
-- would take an overflow page of its own.

-- Strings that would otherwise be repeated in every turn: agents, providers, models, boots.
CREATE TABLE names (
    id INTEGER PRIMARY KEY,
    text TEXT NOT NULL UNIQUE,
    seal INTEGER NOT NULL
);

CREATE TABLE boots (
    boot INTEGER PRIMARY KEY,  -- names.id
    started_at INTEGER NOT NULL
);

CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;

-- The columns of JSON are last: what is before them is read without them.
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    session_id TEXT NOT NULL,
    uid BLOB NOT NULL,
    app_name TEXT NOT NULL,
    user_id TEXT,
    window_id TEXT,
    agent_id TEXT NOT NULL,
    title TEXT,
    title_folded TEXT,  -- for searching, where folding changes the title
    provider TEXT,
    model TEXT,
    ttl_s INTEGER,
    archived INTEGER NOT NULL,
    marked_idle INTEGER NOT NULL,
    phase INTEGER NOT NULL,  -- for counting: the status when it was last written or swept
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    last_accessed INTEGER NOT NULL,
    expires_at INTEGER,
    head BLOB,
    note BLOB,  -- notes.note_id of the newest on the path to the head
    depth INTEGER NOT NULL,
    rev INTEGER NOT NULL,
    state_rev INTEGER NOT NULL,
    state_number INTEGER,  -- states.number of the present state; NULL: not kept yet, or empty
    root_state INTEGER,  -- states.number of the state that it was created with; NULL: empty
    seal INTEGER NOT NULL,
    params TEXT,
    metadata TEXT,
    template TEXT,
    state TEXT,  -- NULL: empty
    UNIQUE (owner, session_id)
);
-- Each turn moves a session in every index that has last_accessed or expires_at, so these are few.
CREATE INDEX sessions_by_time ON sessions (last_accessed);
CREATE INDEX sessions_by_owner ON sessions (owner, last_accessed);
CREATE INDEX sessions_by_user ON sessions (user_id, last_accessed) WHERE user_id IS NOT NULL;
CREATE INDEX sessions_by_expiry ON sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX sessions_by_agent ON sessions (agent_id, owner);

-- How many sessions an owner has (kind ''), each user of his ('u') and each agent ('a'): what lists
-- say as their total without counting rows.
CREATE TABLE session_counts (
    owner TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (owner, kind, name)
) WITHOUT ROWID;

CREATE TRIGGER count_new_session AFTER INSERT ON sessions BEGIN
    INSERT INTO session_counts (owner, kind, name, count)
        SELECT new.owner, '', '', 1
        UNION ALL SELECT new.owner, 'a', new.agent_id, 1
        UNION ALL SELECT new.owner, 'u', new.user_id, 1 WHERE new.user_id IS NOT NULL
        ON CONFLICT DO UPDATE SET count = count + 1;
END;
CREATE TRIGGER count_gone_session AFTER DELETE ON sessions BEGIN
    UPDATE session_counts SET count = count - 1 WHERE owner = old.owner
        AND (kind, name) IN (VALUES ('', ''), ('a', old.agent_id), ('u', old.user_id));
    DELETE FROM session_counts WHERE count = 0 AND owner = old.owner
        AND (kind, name) IN (VALUES ('', ''), ('a', old.agent_id), ('u', old.user_id));
END;
CREATE TRIGGER count_moved_session AFTER UPDATE OF agent_id ON sessions WHEN old.agent_id != new.agent_id BEGIN
    UPDATE session_counts SET count = count - 1
        WHERE owner = old.owner AND kind = 'a' AND name = old.agent_id;
    INSERT INTO session_counts (owner, kind, name, count) VALUES (new.owner, 'a', new.agent_id, 1)
        ON CONFLICT DO UPDATE SET count = count + 1;
    DELETE FROM session_counts WHERE owner = old.owner AND kind = 'a' AND name = old.agent_id AND count = 0;
END;

CREATE TABLE turns (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL,  -- sessions.id
    turn_id BLOB NOT NULL,
    parent BLOB,
    depth INTEGER NOT NULL,
    status INTEGER NOT NULL,  -- 0 running, 1 finished, 2 failed, 3 cancelled
    kept INTEGER NOT NULL,
    agent INTEGER NOT NULL,  -- names.id, as the next three
    provider INTEGER NOT NULL,
    model INTEGER NOT NULL,
    boot INTEGER NOT NULL,
    started_at INTEGER NOT NULL,
    finished_at INTEGER,
    state INTEGER,  -- states.number of the session's state at the commit; NULL: it was empty
    body BLOB NOT NULL,
    UNIQUE (session, turn_id)
);
CREATE INDEX turns_by_start ON turns (session, started_at, turn_id);
CREATE INDEX turns_running ON turns (session, boot) WHERE status = 0;

-- States that turns, checkpoints and roots refer to. None is ever changed.
CREATE TABLE states (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL,
    number INTEGER NOT NULL,  -- counts those of a session from 1
    body BLOB NOT NULL,
    UNIQUE (session, number)
);

CREATE TABLE notes (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL,
    note_id BLOB NOT NULL,
    turn_id BLOB NOT NULL,  -- the last turn that the summary stands for
    depth INTEGER NOT NULL,  -- that of the turn
    tokens_before INTEGER NOT NULL,
    tokens_after INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    body BLOB NOT NULL,
    UNIQUE (session, note_id)
);

CREATE TABLE checkpoints (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL,
    checkpoint_id BLOB NOT NULL,
    turn_id BLOB,  -- NULL: before the first turn
    state INTEGER,  -- states.number; NULL: it was empty
    automatic INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    body BLOB NOT NULL,
    UNIQUE (session, checkpoint_id)
);
CREATE INDEX checkpoints_by_time ON checkpoints (session, created_at, checkpoint_id);
CREATE INDEX checkpoints_by_kind ON checkpoints (session, automatic, created_at, checkpoint_id);

-- What happens to a session outside its turns: changes of its state and of its head.
CREATE TABLE session_events (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL,
    number INTEGER NOT NULL,  -- counts those of a session from 1
    created_at INTEGER NOT NULL,
    body BLOB NOT NULL,
    UNIQUE (session, number)
);
CREATE INDEX session_events_by_time ON session_events (session, created_at, number);

CREATE TABLE idempotency_keys (
    id INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    session INTEGER NOT NULL,
    turn_id BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    seal INTEGER NOT NULL,
    UNIQUE (owner, key)
);
CREATE INDEX idempotency_keys_by_turn ON idempotency_keys (session, turn_id);

CREATE TABLE shared_state (
    id INTEGER PRIMARY KEY,
    app_name TEXT NOT NULL,
    owner TEXT NOT NULL,
    user_id TEXT NOT NULL,  -- '': the application's
    rev INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    body BLOB NOT NULL,
    UNIQUE (app_name, owner, user_id)
);

CREATE TABLE usage_days (
    owner TEXT NOT NULL,
    user_id TEXT NOT NULL,
    day INTEGER NOT NULL,  -- days since the epoch, UTC; -1: all of them
    turns INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (owner, user_id, day)
) WITHOUT ROWID;
