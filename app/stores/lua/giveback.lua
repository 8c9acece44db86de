-- Gives a lease back, ARGV 2 tag, 3 nonce; a start record under it that has not ended goes with its key.
local tag = ARGV[2]
local lease = lease_of(tag)
if not lease or lease.nonce ~= ARGV[3] then return 0 end
if lease.turn ~= '' then
  local row = call('HGET', K(tag, 't'), lease.turn)
  if row and status_of(row) == RUNNING then
    release(tag, lease.turn)
    call('HDEL', K(tag, 't'), lease.turn)
    call('ZREM', K(tag, 'i'), lease.turn)
  end
end
drop_lease(tag)
return 1
