-- Leases: each step that takes, frees or ends one is one statement, and tells who waits.

-- A channel's name has less than 64 bytes, as a schema's has.
CREATE FUNCTION channel() RETURNS text LANGUAGE sql STABLE AS $$
    SELECT 'agentpool.' || md5(current_schema())
$$;

-- Tell who waits for the session. Only called where somebody does: NOTIFY makes commits queue.
CREATE FUNCTION wake(p_owner bytea, p_session_id bytea) RETURNS void LANGUAGE sql AS $$
    SELECT pg_notify(channel(), encode(p_owner, 'hex') || '/' || encode(p_session_id, 'hex'))
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

-- Let the leases of a process run out now.
CREATE FUNCTION end_leases(p_boot_id text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    woken bigint;
BEGIN
    WITH ended AS (
        UPDATE leases SET until = clock_timestamp() WHERE boot_id = p_boot_id AND until > clock_timestamp()
            RETURNING owner, session_id, is_awaited
    ) SELECT count(wake(owner, session_id)) FROM ended WHERE is_awaited INTO woken;
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
