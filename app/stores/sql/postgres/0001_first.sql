-- Text that people write is bytea in UTF-8: PostgreSQL's text refuses U+0000, and bytes sort by code point
-- whatever the database's collation. To read it: convert_from(title, 'UTF8'). With keys, bodies and what people
-- write into sessions are encrypted; of the latter such a value begins with FF, which is in no UTF-8.
-- Turn rows are found by (session, turn_id), never by turn_id alone: a forked session keeps the ids of the
-- path that it shares with its origin.
--
-- Rows are locked in this order, everywhere, so that no two transactions wait for each other: users (advisory,
-- for caps), sessions (by id), leases, turns, keys; then the counters of one's own shard, and after those what
-- else has a shard. Each connection of a process counts in a shard of its own, so commits do not wait for
-- each other's counters.

CREATE FUNCTION shard() RETURNS smallint LANGUAGE sql STABLE AS $$
    SELECT (coalesce(nullif(current_setting('agentpool.shard', true), '')::integer, pg_backend_pid()) % 64)::smallint
$$;

-- What processes agree on: a secret between them, whatever else is made once.
CREATE TABLE settings (
    name text PRIMARY KEY,
    value text NOT NULL
);

-- Up to when phases were swept, and from which idleness on a session counts as idle (ms, 0: never).
CREATE TABLE sweeps (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    swept_ms bigint NOT NULL,
    idle_after_ms bigint NOT NULL
);
INSERT INTO sweeps (swept_ms, idle_after_ms) VALUES (0, 0);

CREATE TABLE counters (
    shard smallint PRIMARY KEY,
    sessions bigint NOT NULL DEFAULT 0,
    active bigint NOT NULL DEFAULT 0,
    idle bigint NOT NULL DEFAULT 0,
    archived bigint NOT NULL DEFAULT 0,
    expired bigint NOT NULL DEFAULT 0,
    created bigint NOT NULL DEFAULT 0,
    lifetime_ms bigint NOT NULL DEFAULT 0,
    turns bigint NOT NULL DEFAULT 0,
    turns_failed bigint NOT NULL DEFAULT 0,
    turns_finished bigint NOT NULL DEFAULT 0,
    response_ms bigint NOT NULL DEFAULT 0,
    prompt_tokens bigint NOT NULL DEFAULT 0,
    completion_tokens bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20);
-- All of them now: then counting is an UPDATE, which leaves the index alone.
INSERT INTO counters (shard) SELECT generate_series(0, 63);

-- How many finished turns took how long; buckets are those of app.stores.buckets.
CREATE TABLE response_times (
    shard smallint NOT NULL,
    bucket smallint NOT NULL,
    count bigint NOT NULL,
    PRIMARY KEY (shard, bucket)
) WITH (fillfactor = 50);

-- The columns of JSON are last: what is before them is read without them.
CREATE TABLE sessions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owner bytea NOT NULL,
    session_id bytea NOT NULL,
    uid bytea NOT NULL,
    app_name bytea NOT NULL,
    user_id bytea,
    window_id bytea,
    agent_id bytea NOT NULL,
    title bytea,
    title_folded bytea,  -- for searching, where folding changes the title; not of an encrypted one
    provider bytea,
    model bytea,
    ttl_s bigint,
    archived boolean NOT NULL,
    marked_idle boolean NOT NULL,
    phase smallint NOT NULL DEFAULT 0,  -- for counting: the status when it was last written or swept
    created_at bigint NOT NULL,
    updated_at bigint NOT NULL,
    last_accessed bigint NOT NULL,
    expires_at bigint,
    head bytea,
    note bytea,  -- notes.note_id of the newest on the path to the head
    depth bigint NOT NULL,
    rev bigint NOT NULL,
    state_rev bigint NOT NULL,
    state_number bigint,  -- states.number of the present state; NULL: not kept yet, or empty
    root_state bigint,  -- states.number of the state that it was created with; NULL: empty
    last_state bigint NOT NULL,  -- the highest states.number so far, 0: none
    stamp bigint NOT NULL,  -- another one, by chance, with each write of the row but a sweep's
    seal bigint NOT NULL,
    params bytea,
    metadata bytea,
    template bytea,
    state bytea,  -- NULL: empty
    UNIQUE (owner, session_id)
) WITH (fillfactor = 70);
-- Each turn moves a session in every index that has last_accessed or expires_at, so these are few.
CREATE INDEX sessions_by_time ON sessions (last_accessed, id);
CREATE INDEX sessions_by_owner ON sessions (owner, last_accessed, id);
CREATE INDEX sessions_by_user ON sessions (user_id, last_accessed, id) WHERE user_id IS NOT NULL;
CREATE INDEX sessions_by_expiry ON sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX sessions_by_agent ON sessions (agent_id, owner);

-- How many sessions an owner has (kind ''), each user of his ('u') and each agent ('a'): what lists say as
-- their total without counting rows. A sum over the shards is exact; one of them may be below 0.
CREATE TABLE session_counts (
    owner bytea NOT NULL,
    kind text NOT NULL,
    name bytea NOT NULL,
    shard smallint NOT NULL,
    count bigint NOT NULL,
    PRIMARY KEY (owner, kind, name, shard)
);

CREATE TABLE turns (
    session bigint NOT NULL,  -- sessions.id
    turn_id bytea NOT NULL,
    parent bytea,
    depth bigint NOT NULL,
    status smallint NOT NULL,  -- 0 running, 1 finished, 2 failed, 3 cancelled, 4 ran when its lease ran out
    kept boolean NOT NULL,
    agent_id bytea NOT NULL,
    provider bytea NOT NULL,
    model bytea NOT NULL,
    boot_id bytea NOT NULL,
    started_at bigint NOT NULL,
    finished_at bigint,
    state bigint,  -- states.number of the session's state at the commit; NULL: it was empty
    body bytea NOT NULL,
    PRIMARY KEY (session, turn_id)
) WITH (fillfactor = 90);
CREATE INDEX turns_by_start ON turns (session, started_at, turn_id);

-- States that turns, checkpoints and roots refer to. None is ever changed.
CREATE TABLE states (
    session bigint NOT NULL,
    number bigint NOT NULL,  -- counts those of a session from 1
    body bytea NOT NULL,
    PRIMARY KEY (session, number)
);

CREATE TABLE notes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session bigint NOT NULL,
    note_id bytea NOT NULL,
    turn_id bytea NOT NULL,  -- the last turn that the summary stands for
    depth bigint NOT NULL,  -- that of the turn
    tokens_before bigint NOT NULL,
    tokens_after bigint NOT NULL,
    created_at bigint NOT NULL,
    body bytea NOT NULL,
    UNIQUE (session, note_id)
);

CREATE TABLE checkpoints (
    session bigint NOT NULL,
    checkpoint_id bytea NOT NULL,
    turn_id bytea,  -- NULL: before the first turn
    state bigint,  -- states.number; NULL: it was empty
    automatic boolean NOT NULL,
    created_at bigint NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (session, checkpoint_id)
);
CREATE INDEX checkpoints_by_time ON checkpoints (session, created_at, checkpoint_id);
CREATE INDEX checkpoints_by_kind ON checkpoints (session, automatic, created_at, checkpoint_id);

-- What happens to a session outside its turns: changes of its state and of its head.
CREATE TABLE session_events (
    session bigint NOT NULL,
    number bigint NOT NULL,  -- counts those of a session from 1
    created_at bigint NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (session, number)
);
CREATE INDEX session_events_by_time ON session_events (session, created_at, number);

CREATE TABLE idempotency_keys (
    owner bytea NOT NULL,
    key bytea NOT NULL,
    fingerprint bytea NOT NULL,
    session bigint NOT NULL,
    turn_id bytea NOT NULL,
    created_at bigint NOT NULL,
    seal bigint NOT NULL,
    PRIMARY KEY (owner, key)
);
CREATE INDEX idempotency_keys_by_turn ON idempotency_keys (session, turn_id);

CREATE TABLE shared_state (
    app_name bytea NOT NULL,
    owner bytea NOT NULL,
    user_id bytea NOT NULL,  -- '': the application's
    rev bigint NOT NULL,
    updated_at bigint NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (app_name, owner, user_id)
);

CREATE TABLE usage_days (
    owner bytea NOT NULL,
    user_id bytea NOT NULL,
    day bigint NOT NULL,  -- days since the epoch, UTC; -1: all of them
    shard smallint NOT NULL,
    turns bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    PRIMARY KEY (owner, user_id, day, shard)
) WITH (fillfactor = 70);

-- Who has which session. There are as many as turns run now.
CREATE TABLE leases (
    owner bytea NOT NULL,
    session_id bytea NOT NULL,
    nonce text NOT NULL,
    turn_id bytea,  -- the turn that it is for; NULL: for none
    boot_id text NOT NULL,
    url text,
    until timestamptz NOT NULL,
    is_awaited boolean NOT NULL DEFAULT false,  -- somebody listens for its end
    PRIMARY KEY (owner, session_id)
) WITH (fillfactor = 50);

CREATE TABLE nodes (
    boot_id text PRIMARY KEY,
    url text,
    until timestamptz NOT NULL
);

-- ``Session.status_at`` in numbers: 0 active, 1 idle, 2 archived, 3 expired.
CREATE FUNCTION phase_at(
    archived boolean, marked_idle boolean, last_accessed bigint, expires_at bigint, now_ms bigint, idle_ms bigint
) RETURNS smallint LANGUAGE sql IMMUTABLE AS $$
    SELECT (CASE
        WHEN archived THEN 2
        WHEN expires_at <= now_ms THEN 3
        WHEN marked_idle OR (idle_ms > 0 AND now_ms >= last_accessed + idle_ms) THEN 1
        ELSE 0 END)::smallint
$$;

-- The phase is right at every write, and never from before the last sweep.
CREATE FUNCTION set_phase() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.stamp = OLD.stamp THEN
        RETURN NEW;  -- the sweep's, which knows
    END IF;
    SELECT phase_at(
        NEW.archived, NEW.marked_idle, NEW.last_accessed, NEW.expires_at,
        greatest(swept_ms, NEW.updated_at, NEW.last_accessed), idle_after_ms
    ) INTO STRICT NEW.phase FROM sweeps;
    RETURN NEW;
END $$;
CREATE TRIGGER set_phase BEFORE INSERT OR UPDATE ON sessions FOR EACH ROW EXECUTE FUNCTION set_phase();

CREATE FUNCTION count_for(p_owner bytea, p_user_id bytea, p_agent_id bytea, p_change integer) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO session_counts (owner, kind, name, shard, count)
        SELECT p_owner, kind, name, shard(), p_change
        FROM (VALUES ('', ''::bytea), ('a', p_agent_id), ('u', p_user_id)) AS counted (kind, name)
        WHERE name IS NOT NULL
        ON CONFLICT (owner, kind, name, shard) DO UPDATE SET count = session_counts.count + excluded.count;
    IF p_change < 0 THEN
        DELETE FROM session_counts WHERE owner = p_owner AND shard = shard() AND count = 0
            AND ((kind = '' AND name = '') OR (kind = 'a' AND name = p_agent_id)
                OR (kind = 'u' AND name = p_user_id));
    END IF;
END $$;

CREATE FUNCTION count_session() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    gone smallint := CASE WHEN TG_OP = 'INSERT' THEN -1 ELSE OLD.phase END;
    come smallint := CASE WHEN TG_OP = 'DELETE' THEN -1 ELSE NEW.phase END;
    lived bigint := CASE TG_OP
        WHEN 'INSERT' THEN NEW.last_accessed - NEW.created_at
        WHEN 'UPDATE' THEN NEW.last_accessed - OLD.last_accessed
        ELSE 0 END;  -- the lifetime of what is gone still counts
BEGIN
    IF current_setting('agentpool.counts_later', true) = 'on' THEN
        RETURN NULL;  -- whoever set it for this transaction adds up himself
    END IF;
    IF gone = come AND lived = 0 AND (TG_OP <> 'UPDATE' OR NEW.agent_id = OLD.agent_id) THEN
        RETURN NULL;
    END IF;
    UPDATE counters SET
        sessions = sessions + (TG_OP = 'INSERT')::int - (TG_OP = 'DELETE')::int,
        created = created + (TG_OP = 'INSERT')::int,
        lifetime_ms = lifetime_ms + lived,
        active = active + (come = 0)::int - (gone = 0)::int,
        idle = idle + (come = 1)::int - (gone = 1)::int,
        archived = archived + (come = 2)::int - (gone = 2)::int,
        expired = expired + (come = 3)::int - (gone = 3)::int
        WHERE shard = shard();
    IF TG_OP = 'INSERT' THEN
        PERFORM count_for(NEW.owner, NEW.user_id, NEW.agent_id, 1);
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM count_for(OLD.owner, OLD.user_id, OLD.agent_id, -1);
    ELSIF NEW.agent_id <> OLD.agent_id THEN
        UPDATE session_counts SET count = count - 1
            WHERE owner = OLD.owner AND kind = 'a' AND name = OLD.agent_id AND shard = shard();
        IF NOT FOUND THEN
            INSERT INTO session_counts VALUES (OLD.owner, 'a', OLD.agent_id, shard(), -1);
        END IF;
        INSERT INTO session_counts AS c VALUES (NEW.owner, 'a', NEW.agent_id, shard(), 1)
            ON CONFLICT (owner, kind, name, shard) DO UPDATE SET count = c.count + 1;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER count_session AFTER INSERT OR UPDATE OR DELETE ON sessions
    FOR EACH ROW EXECUTE FUNCTION count_session();

CREATE FUNCTION count_usage(
    p_owner bytea, p_user_id bytea, p_day bigint, p_turns integer, p_prompt bigint, p_completion bigint
) RETURNS void LANGUAGE plpgsql AS $$  -- in plpgsql a plan is kept
BEGIN
    INSERT INTO usage_days AS kept (owner, user_id, day, shard, turns, prompt_tokens, completion_tokens)
        SELECT p_owner, p_user_id, day, shard(), p_turns, p_prompt, p_completion
        FROM (VALUES (-1), (p_day)) AS days (day) WHERE p_user_id IS NOT NULL
        ON CONFLICT (owner, user_id, day, shard) DO UPDATE SET turns = kept.turns + excluded.turns,
            prompt_tokens = kept.prompt_tokens + excluded.prompt_tokens,
            completion_tokens = kept.completion_tokens + excluded.completion_tokens;
END $$;

-- Count a turn that has ended; ``p_bucket`` is NULL unless it has finished.
CREATE FUNCTION count_turn(
    p_owner bytea, p_user_id bytea, p_day bigint, p_failed integer,
    p_prompt bigint, p_completion bigint, p_response_ms bigint, p_bucket smallint
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE counters SET
        turns = turns + 1,
        turns_failed = turns_failed + p_failed,
        turns_finished = turns_finished + (p_bucket IS NOT NULL)::int,
        response_ms = response_ms + coalesce(p_response_ms, 0),
        prompt_tokens = prompt_tokens + p_prompt,
        completion_tokens = completion_tokens + p_completion
        WHERE shard = shard();
    IF p_bucket IS NOT NULL THEN
        INSERT INTO response_times AS kept (shard, bucket, count) VALUES (shard(), p_bucket, 1)
            ON CONFLICT (shard, bucket) DO UPDATE SET count = kept.count + 1;
    END IF;
    IF p_user_id IS NOT NULL THEN
        PERFORM count_usage(p_owner, p_user_id, p_day, 1, p_prompt, p_completion);
    END IF;
END $$;

CREATE FUNCTION is_committed(status smallint, kept boolean) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT status = 1 OR (status = 3 AND kept)
$$;
