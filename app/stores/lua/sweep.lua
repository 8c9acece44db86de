-- Brings phases up to now: ARGV 2 now, 3 idle after ms, 4 how many sessions at most; never back before the last
-- sweep. Returns how many have expired since that, and whether it is over.
local idle_ms, limit = tonumber(ARGV[3]), tonumber(ARGV[4])
local since = tonumber(call('HGET', G('n'), 'swept_ms') or 0)
local now = math.max(tonumber(ARGV[2]), since)
local until_now = string.format('%.0f', now)
local expired = call('ZRANGEBYSCORE', G('due'), '-inf', until_now, 'WITHSCORES', 'LIMIT', 0, limit)
for at = 1, #expired, 2 do
  local member = expired[at]
  call('ZREM', G('due'), member)
  call('ZADD', G('x'), expired[at + 1], member)
  call('ZREM', G('z:act'), member)
  call('ZREM', G('idle'), member)
  set_phase(member, 'expired')
end
-- Were idle by time and are not, since that takes longer now, or is never said any more.
local line = idle_ms > 0 and '(' .. string.format('%.0f', now - idle_ms) or '-inf'
local active = call('ZRANGEBYSCORE', G('idle'), line, '+inf', 'WITHSCORES', 'LIMIT', 0, limit)
for at = 1, #active, 2 do
  local member = active[at]
  call('ZREM', G('idle'), member)
  call('ZADD', G('z:act'), active[at + 1], member)
  set_phase(member, 'active')
end
local idle = {}
if idle_ms > 0 then
  local latest = string.format('%.0f', now - idle_ms)
  idle = call('ZRANGEBYSCORE', G('z:act'), '-inf', latest, 'WITHSCORES', 'LIMIT', 0, limit)
  for at = 1, #idle, 2 do
    local member = idle[at]
    call('ZREM', G('z:act'), member)
    call('ZADD', G('idle'), idle[at + 1], member)
    set_phase(member, 'idle')
  end
end
if math.max(#expired, #active, #idle) >= 2 * limit then return {0, 0} end
if now > since then call('HSET', G('n'), 'swept_ms', until_now) end
return {call('ZCOUNT', G('x'), '(' .. string.format('%.0f', since), until_now), 1}
