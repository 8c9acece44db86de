-- Returns a page of an index as (member, score, record, JSON or ''), and how many it has.
-- ARGV 2 index, 3 score or '', 4 member, 5 how many, 6 whether upwards.
local key = G('z:' .. ARGV[2])
local found = page(key, ARGV[3], ARGV[4], ARGV[5], ARGV[6] == '1')
local shown = {}
for at = 1, #found, 2 do
  local read = call('HMGET', K(string.sub(found[at], 17), 's'), 'r', 'j', 'm')
  local record = read[3] == found[at] and read[1] or ''
  shown[#shown + 1] = {found[at], found[at + 1], record, record ~= '' and read[2] or ''}
end
return {call('ZCARD', key), shown}
