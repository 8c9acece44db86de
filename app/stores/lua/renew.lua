-- Renews leases for ARGV 2 ms; from 3 on tag and nonce of each. Says of each whether it holds.
local held = {}
local ends = string.format('%.0f', clock() + ARGV[2])
for at = 3, #ARGV, 2 do
  local tag = ARGV[at]
  local is_ours = call('HGET', K(tag, 'l'), 'n') == ARGV[at + 1]
  if is_ours then
    call('HSET', K(tag, 'l'), 'x', ends)
    call('ZADD', G('leases'), ends, tag)
  end
  held[#held + 1] = is_ours and 1 or 0
end
return held
