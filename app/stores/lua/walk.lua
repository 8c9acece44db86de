-- Returns the rows from a turn towards the root, each after its id; false if the incarnation is gone.
-- ARGV 2 tag, 3 uid, 4 first turn ('' head), 5 turn to stop before ('' root), 6 how many, 7 how many bytes,
-- 8 least depth, 9 whether ids alone do.
local tag = ARGV[2]
local found = call('HMGET', K(tag, 's'), 'u', 'h')
if found[1] ~= ARGV[3] then return false end
local at = ARGV[4] == '' and found[2] or ARGV[4]
local rows, left, bytes, turns = {}, tonumber(ARGV[6]), tonumber(ARGV[7]), K(tag, 't')
while at and at ~= '' and at ~= ARGV[5] and left > 0 and bytes > 0 do
  local row = call('HGET', turns, at)
  if not row then break end
  rows[#rows + 1] = at
  rows[#rows + 1] = ARGV[9] == '1' and '' or row
  left = left - 1
  if #rows > 2 then bytes = bytes - #row end
  at = #row >= 22 and depth_of(row) > tonumber(ARGV[8]) and parent_of(row) or nil
end
return rows
