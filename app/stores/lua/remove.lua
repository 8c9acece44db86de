-- Removes sessions; ARGV from 2: their tags. Returns how many sessions there are then, and how many sessions,
-- turns, checkpoints and facts went.
local gone = {0, 0, 0, 0}
for at = 2, #ARGV do
  local tag = ARGV[at]
  local had = {1, call('HLEN', K(tag, 't')), call('HLEN', K(tag, 'c')), call('ZCARD', K(tag, 'f'))}
  if remove(tag) == 1 then
    for kind, count in ipairs(had) do gone[kind] = gone[kind] + count end
  end
end
return {call('ZCARD', G('z:all')), unpack(gone)}
