-- Removes sessions that expired up to ARGV 2, at most ARGV 3, the first expired first, none whose turn runs.
-- Such a one as has gone by itself goes from the indexes. Returns how many sessions are left, how many went.
local limit, offset, gone = tonumber(ARGV[3]), 0, 0
while gone < limit do
  local due = call('ZRANGEBYSCORE', G('x'), '-inf', ARGV[2], 'LIMIT', offset, limit - gone)
  if #due == 0 then break end
  for _, member in ipairs(due) do
    local tag = string.sub(member, 17)
    local lease = lease_of(tag)
    if call('HGET', K(tag, 's'), 'm') ~= member then
      forget(member)
      if call('EXISTS', K(tag, 's')) == 0 then
        call('ZREM', G('order'), order_of(tag))
      end
      gone = gone + 1
    elseif is_held(lease) and lease.is_turn == '1' then
      offset = offset + 1
    else
      gone = gone + remove(tag)
    end
  end
end
return {call('ZCARD', G('z:all')), gone}
