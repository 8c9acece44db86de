-- What is done in one step, and so in one statement: the begin and the end of a turn, sweeps.

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
-- ``p_session`` and the ids before it are those of the turn that wants it. A turn whose lease has run out is
-- ended, and its lease with it: it cannot be renewed.
CREATE FUNCTION check_key(
    p_owner bytea, p_key bytea, s_owner bytea, s_session_id bytea, p_session bigint, p_turn_id bytea,
    OUT taken smallint, OUT by_turn bytea, OUT by_session bytea,
    OUT holder_boot text, OUT holder_url text, OUT holder_nonce text
) LANGUAGE plpgsql AS $$
DECLARE
    bound record;
BEGIN
    SELECT s.owner, s.session_id INTO bound
        FROM idempotency_keys AS k JOIN sessions AS s ON s.id = k.session
        WHERE k.owner = p_owner AND k.key = p_key AND NOT (k.session = p_session AND k.turn_id = p_turn_id);
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- Leases before turns, and both in order: what else ends turns, or takes these two, waits for nobody then.
    PERFORM 1 FROM leases
        WHERE (owner, session_id) IN ((bound.owner, bound.session_id), (s_owner, s_session_id))
        ORDER BY owner, session_id FOR UPDATE;
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
        PERFORM free_lease(bound.owner, bound.session_id, bound.nonce);
        PERFORM abandon_turn(bound.owner, bound.session_id, bound.turn_id);
    END IF;
END $$;

-- Begin a turn: key, lease, comparison with the record that the caller has made the rest of, start record,
-- activity, in one step. Outcomes: 0 noted, 1 the lease is taken but the record is not that of ``p_stamp``,
-- 2 no such session, 3 it runs already, 4 it has ended, 5 leased elsewhere, 6 the key is a committed turn's,
-- 7 the key is that of a turn that runs.
CREATE FUNCTION start_turn(
    p_owner bytea, p_session_id bytea, p_uid bytea, p_stamp bigint, p_new_stamp bigint,
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
    SELECT id, stamp INTO here FROM sessions
        WHERE owner = p_owner AND session_id = p_session_id AND uid = p_uid FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 2;
        RETURN;
    END IF;
    IF k_key IS NOT NULL THEN
        SELECT * INTO key_state FROM check_key(k_owner, k_key, p_owner, p_session_id, here.id, t_turn_id);
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
    IF here.stamp <> p_stamp THEN
        outcome := 1;
        RETURN;
    END IF;
    IF k_key IS NULL THEN
        -- What a crash of the server loses of this is the trace of a turn, which then commits as any other.
        -- With a key it is durable: a repeat must find that there was an attempt before it.
        PERFORM set_config('synchronous_commit', 'off', true);
    END IF;
    INSERT INTO turns VALUES (here.id, t_turn_id, t_parent, t_depth, t_status, t_kept, t_agent_id, t_provider,
        t_model, t_boot_id, t_started_at, t_finished_at, t_state, t_body);
    IF k_key IS NOT NULL THEN
        -- Fails if another transaction has just taken it: the caller tries again and finds whose it is.
        INSERT INTO idempotency_keys VALUES (k_owner, k_key, k_fingerprint, here.id, t_turn_id, t_started_at, k_seal);
    END IF;
    UPDATE sessions SET last_accessed = p_last_accessed, expires_at = p_expires_at,
        marked_idle = p_marked_idle, seal = p_seal, stamp = p_new_stamp WHERE id = here.id;
    outcome := 0;
END $$;

-- End a turn: on the head (``p_commits``) or beside the tree. Outcomes: 0 done, 1 the record is not that of
-- ``p_stamp`` (nothing is done), 2 no such session, 3 it has been committed before, 4 it was ended otherwise
-- before, 5 the head is not ``p_head``, 6 done, but its key belongs to another committed turn.
CREATE FUNCTION end_turn(
    p_owner bytea, p_session_id bytea, p_uid bytea, p_stamp bigint, p_new_stamp bigint,
    p_nonce text, p_commits boolean, p_head bytea,
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
    SELECT id, stamp, head, user_id INTO here FROM sessions
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
    IF here.stamp <> p_stamp THEN
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
        state = s_state, stamp = p_new_stamp WHERE id = here.id;
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
    -- Counted once for all: each of many changes of one row in one transaction is slower than the one before.
    PERFORM set_config('agentpool.counts_later', 'on', true);
    WITH due AS (
        SELECT id, phase AS was, phase_at(archived, marked_idle, last_accessed, expires_at, swept, p_idle_ms) AS will
            FROM sessions
            WHERE phase <> phase_at(archived, marked_idle, last_accessed, expires_at, swept, p_idle_ms)
            FOR NO KEY UPDATE
    ), moved AS (
        UPDATE sessions AS s SET phase = due.will FROM due WHERE s.id = due.id RETURNING due.was, due.will
    ), change AS (
        SELECT sum((will = 0)::int - (was = 0)::int) AS active, sum((will = 1)::int - (was = 1)::int) AS idle,
            sum((will = 2)::int - (was = 2)::int) AS archived, sum((will = 3)::int - (was = 3)::int) AS expired
            FROM moved HAVING count(*) > 0
    ) UPDATE counters AS c SET active = c.active + change.active, idle = c.idle + change.idle,
        archived = c.archived + change.archived, expired = c.expired + change.expired
        FROM change WHERE c.shard = shard();
    PERFORM set_config('agentpool.counts_later', 'off', true);
END $$;
