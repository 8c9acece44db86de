-- Lets the leases of a boot, ARGV 2, hold for ARGV 3 ms from now: 0, and its node, ARGV 4, goes, when it leaves.
local boot, lease_ms = ARGV[2], tonumber(ARGV[3])
local ends = lease_ms == 0 and '0' or string.format('%.0f', clock() + lease_ms)
for _, tag in ipairs(call('ZRANGE', G('leases'), 0, -1)) do
  if call('HGET', K(tag, 'l'), 'b') == boot then
    call('HSET', K(tag, 'l'), 'x', ends)
    call('ZADD', G('leases'), ends, tag)
    if lease_ms == 0 then call('PUBLISH', G('free:' .. tag), '') end
  end
end
if lease_ms == 0 then call('ZREM', G('nodes'), ARGV[4]) end
return 1
