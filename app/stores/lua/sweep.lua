-- Brings phases up to now: ARGV 2 now, 3 idle after ms, 4 how many sessions at most.
-- Returns how many have expired since the last sweep, and whether it is over.
local now, idle_ms, limit = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local since = tonumber(call('HGET', G('n'), 'swept_ms') or 0)
if now <= since then return {0, 1} end
local expired = call('ZRANGEBYSCORE', G('due'), '-inf', ARGV[2], 'WITHSCORES', 'LIMIT', 0, limit)
for at = 1, #expired, 2 do
  local member = expired[at]
  call('ZREM', G('due'), member)
  call('ZADD', G('x'), expired[at + 1], member)
  call('ZREM', G('z:act'), member)
  set_phase(member, 'expired')
end
local idle = {}
if idle_ms > 0 then
  idle = call('ZRANGEBYSCORE', G('z:act'), '-inf', string.format('%.0f', now - idle_ms), 'LIMIT', 0, limit)
  for _, member in ipairs(idle) do
    call('ZREM', G('z:act'), member)
    set_phase(member, 'idle')
  end
end
if #expired >= 2 * limit or #idle >= limit then return {0, 0} end
call('HSET', G('n'), 'swept_ms', ARGV[2])
return {call('ZCOUNT', G('x'), '(' .. string.format('%.0f', since), ARGV[2]), 1}
