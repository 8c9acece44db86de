-- Returns turns as (id, row, whether on the branch), and how many there are; false if the incarnation is gone.
-- ARGV 2 tag, 3 uid, 4 'of' and from 5 ids, or 4 'after': 5 start or '', 6 id, 7 how many, 8 whether upwards.
local tag = ARGV[2]
if call('HGET', K(tag, 's'), 'u') ~= ARGV[3] then return false end
local ids, scores = {}, {}
if ARGV[4] == 'of' then
  ids = {unpack(ARGV, 5, #ARGV)}
else
  local found = page(K(tag, 'i'), ARGV[5], ARGV[6], ARGV[7], ARGV[8] == '1')
  for at = 1, #found, 2 do
    ids[#ids + 1] = found[at]
    scores[#ids] = found[at + 1]
  end
end
local rows, least = {}, nil
for number, id in ipairs(ids) do
  local row = call('HGET', K(tag, 't'), id)
  rows[number] = row
  if row and #row >= 22 then least = math.min(least or depth_of(row), depth_of(row)) end
end
local on_branch = least and branch(tag, least) or {}
local shown = {}
for number, id in ipairs(ids) do
  if rows[number] or ARGV[4] ~= 'of' then
    shown[#shown + 1] = {id, rows[number] or '', on_branch[id] and 1 or 0, scores[number] or ''}
  end
end
return {call('ZCARD', K(tag, 'i')), shown}
