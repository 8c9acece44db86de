-- Takes the session's lease for a turn and notes that it runs, if the session is what the caller knows.
-- ARGV 2 tag, 3 uid, 4 token, 5 new token, 6 turn id, 7 nonce, 8 boot, 9 url, 10 lease ms,
-- 11 record, 12 last activity, 13 end or '', 14 archived, 15 marked idle, 16 now, 17 idle after ms, 18 span,
-- 19 slack, 20 change of lifetime, 21 row, 22 row if the lease runs out, 23 started at, 24 user or '',
-- 25 day, 26 idempotency key or '', 27 its seal.
local tag, turn, nonce = ARGV[2], ARGV[6], ARGV[7]
local found = call('HMGET', K(tag, 's'), 'u', 'w', 'm', 'r', 'j')
if found[1] ~= ARGV[3] then return {'gone'} end
if ARGV[26] ~= '' then
  local bound = call('HMGET', G('k:' .. ARGV[26]), 's', 't')
  local owner, other = bound[1], bound[2]
  if owner and (owner ~= tag or other ~= turn) then
    local row = call('HGET', K(owner, 't'), other)
    if row and is_committed(row) then
      give_back(tag, nonce) -- which an earlier call that noted nothing may have taken
      return {'key', owner, other}
    end
    local lease = lease_of(owner)
    if lease and lease.turn == other then
      if is_held(lease) then
        give_back(tag, nonce)
        return {'key', owner, other, holder_of(lease)}
      end
      end_abandoned(owner, lease)
      drop_lease(owner)
    end
  end
end
local other = take(tag, nonce, ARGV[8], ARGV[9], '1', turn, tonumber(ARGV[10]))
if other then return {'taken', holder_of(other)} end
local row = call('HGET', K(tag, 't'), turn)
if row then
  if status_of(row) == RUNNING then return {'ok', found[2]} end
  drop_lease(tag)
  return {'ended'}
end
if found[2] ~= ARGV[4] then return {'moved', found[2], found[4], found[5]} end
call('HSET', K(tag, 's'), 'w', ARGV[5], 'r', ARGV[11])
call('HSET', K(tag, 't'), turn, ARGV[21])
call('ZADD', K(tag, 'i'), ARGV[23], turn)
touched['t'], touched['i'] = true, true
call('HSET', K(tag, 'l'), 'f', ARGV[22], 'g', ARGV[24], 'd', ARGV[25])
if ARGV[26] ~= '' then bind(tag, turn, ARGV[26], ARGV[27], false) end
place(found[3], ARGV[12], ARGV[13], ARGV[14], ARGV[15], ARGV[16], ARGV[17])
count('lifetime_ms', ARGV[20])
keep(tag, ARGV[18], tonumber(ARGV[19]))
return {'ok', ARGV[5]}
