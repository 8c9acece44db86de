-- Ends up to ARGV 2 leases that have run out; returns how many there were and how many turns that ended.
local lapsed = call('ZRANGEBYSCORE', G('leases'), '-inf', string.format('%.0f', clock()), 'LIMIT', 0, ARGV[2])
local ended = 0
for _, tag in ipairs(lapsed) do
  local lease = lease_of(tag)
  if lease and end_abandoned(tag, lease) then ended = ended + 1 end
  drop_lease(tag)
end
return {#lapsed, ended}
