-- Text that people write is bytea in UTF-8: PostgreSQL's text refuses U+0000, and bytes sort by code point
-- whatever the database's collation. To read it: convert_from(title, 'UTF8').
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
    title_folded bytea,  -- for searching, where folding changes the title
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
    writes bigint NOT NULL DEFAULT 1,  -- grows with each write of the row but a sweep's
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
    IF TG_OP = 'UPDATE' AND NEW.writes = OLD.writes THEN
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
) RETURNS void LANGUAGE sql AS $$
    INSERT INTO usage_days AS kept (owner, user_id, day, shard, turns, prompt_tokens, completion_tokens)
        SELECT p_owner, p_user_id, day, shard(), p_turns, p_prompt, p_completion
        FROM (VALUES (-1), (p_day)) AS days (day) WHERE p_user_id IS NOT NULL
        ON CONFLICT (owner, user_id, day, shard) DO UPDATE SET turns = kept.turns + excluded.turns,
            prompt_tokens = kept.prompt_tokens + excluded.prompt_tokens,
            completion_tokens = kept.completion_tokens + excluded.completion_tokens
$$;

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

-- Tell who waits for the session. Only called where somebody does: NOTIFY makes commits queue.
CREATE FUNCTION wake(p_owner bytea, p_session_id bytea) RETURNS void LANGUAGE sql AS $$
    SELECT pg_notify('agentpool.' || current_schema(), encode(p_owner, 'hex') || '/' || encode(p_session_id, 'hex'))
$$;

-- Fail the turn of a lease that has run out, if it is still said to run. Its row says only that: what it
-- looks like then is app.stores.rules.interrupted.
CREATE FUNCTION abandon_turn(p_owner bytea, p_session_id bytea, p_turn_id bytea) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    found_session record;
    began bigint;
BEGIN
    SELECT id, user_id INTO found_session FROM sessions WHERE owner = p_owner AND session_id = p_session_id;
    UPDATE turns SET status = 4 WHERE session = found_session.id AND turn_id = p_turn_id AND status = 0
        RETURNING started_at INTO began;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM idempotency_keys WHERE session = found_session.id AND turn_id = p_turn_id;
    PERFORM count_turn(p_owner, found_session.user_id, began / 86400000, 1, 0, 0, NULL, NULL);
    RETURN true;
END $$;

-- Take the session's lease. Not taken: the other columns say who has it.
CREATE FUNCTION take_lease(
    p_owner bytea, p_session_id bytea, p_nonce text, p_turn_id bytea, p_boot_id text, p_url text, p_lease_s float8,
    OUT is_taken boolean, OUT holder_boot text, OUT holder_url text, OUT holder_nonce text, OUT for_turn boolean
) LANGUAGE plpgsql AS $$
DECLARE
    had leases;
    ends timestamptz := clock_timestamp() + make_interval(secs => p_lease_s);
BEGIN
    LOOP
        INSERT INTO leases VALUES (p_owner, p_session_id, p_nonce, p_turn_id, p_boot_id, p_url, ends)
            ON CONFLICT (owner, session_id) DO NOTHING;
        IF FOUND THEN
            is_taken := true;
            RETURN;
        END IF;
        SELECT * INTO had FROM leases WHERE owner = p_owner AND session_id = p_session_id FOR UPDATE;
        CONTINUE WHEN NOT FOUND;  -- it was given back in between
        IF had.nonce <> p_nonce AND had.until > clock_timestamp() THEN
            SELECT false, had.boot_id, had.url, had.nonce, had.turn_id IS NOT NULL
                INTO is_taken, holder_boot, holder_url, holder_nonce, for_turn;
            RETURN;
        END IF;
        UPDATE leases SET nonce = p_nonce, turn_id = p_turn_id, boot_id = p_boot_id, url = p_url, until = ends,
            is_awaited = had.is_awaited AND had.nonce = p_nonce
            WHERE owner = p_owner AND session_id = p_session_id;
        IF had.nonce <> p_nonce THEN
            IF had.is_awaited THEN
                PERFORM wake(p_owner, p_session_id);
            END IF;
            PERFORM abandon_turn(p_owner, p_session_id, had.turn_id);
        END IF;
        is_taken := true;
        RETURN;
    END LOOP;
END $$;

CREATE FUNCTION free_lease(p_owner bytea, p_session_id bytea, p_nonce text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    was_awaited boolean;
BEGIN
    DELETE FROM leases WHERE owner = p_owner AND session_id = p_session_id AND nonce = p_nonce
        RETURNING is_awaited INTO was_awaited;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF was_awaited THEN
        PERFORM wake(p_owner, p_session_id);
    END IF;
    RETURN true;
END $$;

-- Give a lease back whose turn, if it is for one, has not ended: its start record goes.
CREATE FUNCTION give_back(p_owner bytea, p_session_id bytea, p_nonce text, p_turn_id bytea) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    number bigint;
BEGIN
    IF NOT free_lease(p_owner, p_session_id, p_nonce) OR p_turn_id IS NULL THEN
        RETURN;
    END IF;
    SELECT id INTO number FROM sessions WHERE owner = p_owner AND session_id = p_session_id;
    DELETE FROM turns WHERE session = number AND turn_id = p_turn_id AND status = 0;
    IF FOUND THEN
        DELETE FROM idempotency_keys WHERE session = number AND turn_id = p_turn_id;
    END IF;
END $$;

-- End turns whose leases have run out.
CREATE FUNCTION reap_leases(p_limit integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    had leases;
    ended integer := 0;
BEGIN
    FOR had IN
        SELECT * FROM leases WHERE until <= clock_timestamp() ORDER BY owner, session_id LIMIT p_limit
            FOR UPDATE SKIP LOCKED
    LOOP
        PERFORM free_lease(had.owner, had.session_id, had.nonce);
        IF abandon_turn(had.owner, had.session_id, had.turn_id) THEN
            ended := ended + 1;
        END IF;
    END LOOP;
    RETURN ended;
END $$;

-- Remove sessions, whose rows the caller has locked, with all that belongs to them.
CREATE FUNCTION remove_sessions(p_ids bigint[]) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    gone bigint;
BEGIN
    WITH freed AS (
        DELETE FROM leases AS l USING sessions AS s
            WHERE s.id = ANY (p_ids) AND l.owner = s.owner AND l.session_id = s.session_id
            RETURNING l.owner, l.session_id, l.is_awaited
    ) SELECT count(wake(owner, session_id)) FROM freed WHERE is_awaited INTO gone;
    DELETE FROM turns WHERE session = ANY (p_ids);
    DELETE FROM idempotency_keys WHERE session = ANY (p_ids);
    DELETE FROM states WHERE session = ANY (p_ids);
    DELETE FROM notes WHERE session = ANY (p_ids);
    DELETE FROM checkpoints WHERE session = ANY (p_ids);
    DELETE FROM session_events WHERE session = ANY (p_ids);
    DELETE FROM sessions WHERE id = ANY (p_ids);
    GET DIAGNOSTICS gone = ROW_COUNT;
    RETURN gone;
END $$;

-- Say who uses a key: NULL nobody (any more), 0 a committed turn, 1 one that runs under the lease returned.
CREATE FUNCTION check_key(
    p_owner bytea, p_key bytea, p_session bigint, p_turn_id bytea,
    OUT taken smallint, OUT by_turn bytea, OUT by_session bytea,
    OUT holder_boot text, OUT holder_url text, OUT holder_nonce text
) LANGUAGE plpgsql AS $$
DECLARE
    bound record;
BEGIN
    SELECT s.owner, s.session_id, t.turn_id, t.status, t.kept, l.boot_id, l.url, l.nonce, l.until
        INTO bound
        FROM idempotency_keys AS k
        JOIN turns AS t ON t.session = k.session AND t.turn_id = k.turn_id
        JOIN sessions AS s ON s.id = k.session
        LEFT JOIN leases AS l ON l.owner = s.owner AND l.session_id = s.session_id AND l.turn_id = k.turn_id
        WHERE k.owner = p_owner AND k.key = p_key AND NOT (k.session = p_session AND k.turn_id = p_turn_id);
    IF NOT FOUND THEN
        RETURN;
    END IF;
    by_turn := bound.turn_id;
    by_session := bound.session_id;
    IF is_committed(bound.status, bound.kept) THEN
        taken := 0;
    ELSIF bound.until > clock_timestamp() THEN
        SELECT 1, bound.boot_id, bound.url, bound.nonce INTO taken, holder_boot, holder_url, holder_nonce;
    ELSE
        PERFORM abandon_turn(bound.owner, bound.session_id, bound.turn_id);
    END IF;
END $$;

-- Begin a turn: key, lease, comparison with the record that the caller has made the rest of, start record,
-- activity, in one step. Outcomes: 0 noted, 1 the lease is taken but the record is not that of ``p_writes``,
-- 2 no such session, 3 it runs already, 4 it has ended, 5 leased elsewhere, 6 the key is a committed turn's,
-- 7 the key is that of a turn that runs.
CREATE FUNCTION start_turn(
    p_owner bytea, p_session_id bytea, p_uid bytea, p_writes bigint,
    p_last_accessed bigint, p_expires_at bigint, p_marked_idle boolean, p_seal bigint,
    p_nonce text, p_boot_id text, p_url text, p_lease_s float8,
    k_owner bytea, k_key bytea, k_fingerprint bytea, k_seal bigint,
    t_turn_id bytea, t_parent bytea, t_depth bigint, t_status smallint, t_kept boolean, t_agent_id bytea,
    t_provider bytea, t_model bytea, t_boot_id bytea, t_started_at bigint, t_finished_at bigint, t_state bigint,
    t_body bytea,
    OUT outcome smallint, OUT by_turn bytea, OUT by_session bytea,
    OUT holder_boot text, OUT holder_url text, OUT holder_nonce text, OUT for_turn boolean
) LANGUAGE plpgsql AS $$
DECLARE
    here record;
    known smallint;
    key_state record;
    lease record;
BEGIN
    SELECT id, writes INTO here FROM sessions
        WHERE owner = p_owner AND session_id = p_session_id AND uid = p_uid FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 2;
        RETURN;
    END IF;
    IF k_key IS NOT NULL THEN
        SELECT * INTO key_state FROM check_key(k_owner, k_key, here.id, t_turn_id);
        IF key_state.taken IS NOT NULL THEN
            SELECT 6 + key_state.taken, key_state.by_turn, key_state.by_session, key_state.holder_boot,
                key_state.holder_url, key_state.holder_nonce, true
                INTO outcome, by_turn, by_session, holder_boot, holder_url, holder_nonce, for_turn;
            RETURN;
        END IF;
    END IF;
    SELECT * INTO lease
        FROM take_lease(p_owner, p_session_id, p_nonce, t_turn_id, p_boot_id, p_url, p_lease_s);
    IF NOT lease.is_taken THEN
        SELECT 5, lease.holder_boot, lease.holder_url, lease.holder_nonce, lease.for_turn
            INTO outcome, holder_boot, holder_url, holder_nonce, for_turn;
        RETURN;
    END IF;
    SELECT status INTO known FROM turns WHERE session = here.id AND turn_id = t_turn_id;
    IF FOUND THEN
        outcome := CASE WHEN known = 0 THEN 3 ELSE 4 END;
        IF known <> 0 THEN
            PERFORM free_lease(p_owner, p_session_id, p_nonce);
        END IF;
        RETURN;
    END IF;
    IF here.writes <> p_writes THEN
        outcome := 1;
        RETURN;
    END IF;
    -- What a crash of the server loses of this is the trace of a turn, which then commits as any other.
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO turns VALUES (here.id, t_turn_id, t_parent, t_depth, t_status, t_kept, t_agent_id, t_provider,
        t_model, t_boot_id, t_started_at, t_finished_at, t_state, t_body);
    IF k_key IS NOT NULL THEN
        -- Fails if another transaction has just taken it: the caller tries again and finds whose it is.
        INSERT INTO idempotency_keys VALUES (k_owner, k_key, k_fingerprint, here.id, t_turn_id, t_started_at, k_seal);
    END IF;
    UPDATE sessions SET last_accessed = p_last_accessed, expires_at = p_expires_at,
        marked_idle = p_marked_idle, seal = p_seal, writes = writes + 1 WHERE id = here.id;
    outcome := 0;
END $$;

-- End a turn: on the head (``p_commits``) or beside the tree. Outcomes: 0 done, 1 the record is not that of
-- ``p_writes`` (nothing is done), 2 no such session, 3 it has been committed before, 4 it was ended otherwise
-- before, 5 the head is not ``p_head``, 6 done, but its key belongs to another committed turn.
CREATE FUNCTION end_turn(
    p_owner bytea, p_session_id bytea, p_uid bytea, p_writes bigint, p_nonce text, p_commits boolean, p_head bytea,
    s_head bytea, s_note bytea, s_depth bigint, s_updated_at bigint, s_last_accessed bigint, s_expires_at bigint,
    s_marked_idle boolean, s_rev bigint, s_state_rev bigint, s_state_number bigint, s_last_state bigint,
    s_seal bigint, s_state bytea, kept_state bytea,
    k_owner bytea, k_key bytea, k_fingerprint bytea, k_seal bigint,
    c_day bigint, c_prompt bigint, c_completion bigint, c_response_ms bigint, c_bucket smallint,
    t_turn_id bytea, t_parent bytea, t_depth bigint, t_status smallint, t_kept boolean, t_agent_id bytea,
    t_provider bytea, t_model bytea, t_boot_id bytea, t_started_at bigint, t_finished_at bigint, t_state bigint,
    t_body bytea,
    OUT outcome smallint
) LANGUAGE plpgsql AS $$
DECLARE
    here record;
    known record;
BEGIN
    SELECT id, writes, head, user_id INTO here FROM sessions
        WHERE owner = p_owner AND session_id = p_session_id AND uid = p_uid FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 2;
        RETURN;
    END IF;
    SELECT status, kept INTO known FROM turns WHERE session = here.id AND turn_id = t_turn_id;
    IF FOUND AND known.status <> 0 THEN
        PERFORM free_lease(p_owner, p_session_id, p_nonce);
        outcome := CASE WHEN is_committed(known.status, known.kept) THEN 3 ELSE 4 END;
        RETURN;
    END IF;
    IF p_commits AND here.head IS DISTINCT FROM p_head THEN
        outcome := 5;
        RETURN;
    END IF;
    IF here.writes <> p_writes THEN
        outcome := 1;
        RETURN;
    END IF;
    PERFORM free_lease(p_owner, p_session_id, p_nonce);
    UPDATE turns SET parent = t_parent, depth = t_depth, status = t_status, kept = t_kept,
        agent_id = t_agent_id, provider = t_provider, model = t_model, boot_id = t_boot_id,
        started_at = t_started_at, finished_at = t_finished_at, state = t_state, body = t_body
        WHERE session = here.id AND turn_id = t_turn_id AND status = 0;
    IF NOT FOUND AND known.status = 0 THEN
        outcome := 4;  -- its lease ran out, and somebody ended it a moment ago
        RETURN;
    ELSIF NOT FOUND THEN
        INSERT INTO turns VALUES (here.id, t_turn_id, t_parent, t_depth, t_status, t_kept, t_agent_id, t_provider,
            t_model, t_boot_id, t_started_at, t_finished_at, t_state, t_body);
    END IF;
    outcome := 0;
    IF NOT p_commits THEN
        DELETE FROM idempotency_keys WHERE session = here.id AND turn_id = t_turn_id;
    ELSIF k_key IS NOT NULL THEN
        -- Unless a committed turn has it: the commit counts, not the key.
        INSERT INTO idempotency_keys AS k
            VALUES (k_owner, k_key, k_fingerprint, here.id, t_turn_id, t_started_at, k_seal)
            ON CONFLICT (owner, key) DO UPDATE SET fingerprint = excluded.fingerprint,
                session = excluded.session, turn_id = excluded.turn_id, created_at = excluded.created_at,
                seal = excluded.seal
            WHERE NOT EXISTS (SELECT 1 FROM turns AS t
                WHERE t.session = k.session AND t.turn_id = k.turn_id AND is_committed(t.status, t.kept)
                AND NOT (k.session = excluded.session AND k.turn_id = excluded.turn_id));
        IF NOT FOUND THEN
            outcome := 6;
        END IF;
    END IF;
    IF kept_state IS NOT NULL THEN
        INSERT INTO states VALUES (here.id, s_state_number, kept_state);
    END IF;
    UPDATE sessions SET head = s_head, note = s_note, depth = s_depth, updated_at = s_updated_at,
        last_accessed = s_last_accessed, expires_at = s_expires_at, marked_idle = s_marked_idle, rev = s_rev,
        state_rev = s_state_rev, state_number = s_state_number, last_state = s_last_state, seal = s_seal,
        state = s_state, writes = writes + 1 WHERE id = here.id;
    PERFORM count_turn(p_owner, here.user_id, c_day, (t_status = 2)::int, c_prompt, c_completion,
        c_response_ms, c_bucket);
END $$;

-- One step of a sweep: phases brought up to ``p_now`` as far as ``p_limit`` rows go. ``is_last``: nothing is
-- left; then ``expired`` is how many have expired since the last sweep.
CREATE FUNCTION sweep(p_now bigint, p_limit integer, OUT expired bigint, OUT is_last boolean)
LANGUAGE plpgsql AS $$
DECLARE
    since bigint;
    idle_ms bigint;
    moved bigint;
    moved_too bigint;
    -- A write that was not committed when the last sweep looked, or of a process whose clock is late.
    slack CONSTANT bigint := 600000;
BEGIN
    SELECT swept_ms, idle_after_ms INTO since, idle_ms FROM sweeps FOR UPDATE;
    expired := 0;
    is_last := true;
    IF p_now <= since THEN
        RETURN;
    END IF;
    UPDATE sessions SET phase = 1 WHERE id IN (SELECT id FROM sessions
        WHERE idle_ms > 0 AND phase = 0 AND last_accessed > since - idle_ms - slack
        AND last_accessed <= p_now - idle_ms ORDER BY last_accessed LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED);
    GET DIAGNOSTICS moved = ROW_COUNT;
    UPDATE sessions SET phase = 3 WHERE id IN (SELECT id FROM sessions
        WHERE phase <> 3 AND expires_at > since - slack AND expires_at <= p_now
        ORDER BY expires_at LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED);
    GET DIAGNOSTICS moved_too = ROW_COUNT;
    is_last := moved < p_limit AND moved_too < p_limit;
    IF is_last THEN
        SELECT count(*) INTO expired FROM sessions WHERE expires_at > since AND expires_at <= p_now;
        UPDATE sweeps SET swept_ms = p_now;
    END IF;
END $$;

-- Remove up to ``p_limit`` sessions that expired up to ``p_line`` and whose turns do not run.
CREATE FUNCTION purge(p_line bigint, p_limit integer) RETURNS bytea[] LANGUAGE plpgsql AS $$
DECLARE
    due bigint[];
    keys bytea[];
BEGIN
    WITH found AS (
        SELECT s.id, s.owner, s.session_id FROM sessions AS s
            WHERE s.expires_at <= p_line AND NOT EXISTS (SELECT 1 FROM leases AS l
                WHERE l.owner = s.owner AND l.session_id = s.session_id AND l.turn_id IS NOT NULL
                AND l.until > clock_timestamp())
            ORDER BY s.expires_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ) SELECT array_agg(id), array_agg(array[owner, session_id]) INTO due, keys FROM found;
    PERFORM remove_sessions(due);
    RETURN keys;
END $$;

-- Make the phases right where sessions go idle after another time than before.
CREATE FUNCTION set_idle_after(p_idle_ms bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    swept bigint;
BEGIN
    PERFORM 1 FROM sweeps WHERE idle_after_ms <> p_idle_ms;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    UPDATE sweeps SET idle_after_ms = p_idle_ms RETURNING swept_ms INTO swept;
    UPDATE sessions SET phase = phase_at(archived, marked_idle, last_accessed, expires_at, swept, p_idle_ms)
        WHERE phase <> phase_at(archived, marked_idle, last_accessed, expires_at, swept, p_idle_ms);
END $$;
