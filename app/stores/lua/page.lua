-- Returns how many one of a session's sorted sets has, a page of it as (member, score), and the body of each
-- if asked for; false if the incarnation is gone.
-- ARGV 2 tag, 3 uid, 4 room, 5 score or '', 6 member, 7 how many, 8 whether upwards, 9 room of bodies or ''.
local tag = ARGV[2]
if call('HGET', K(tag, 's'), 'u') ~= ARGV[3] then return false end
local key = K(tag, ARGV[4])
local found = page(key, ARGV[5], ARGV[6], ARGV[7], ARGV[8] == '1')
local bodies = {}
if ARGV[9] ~= '' then
  for at = 1, #found, 2 do bodies[#bodies + 1] = call('HGET', K(tag, ARGV[9]), found[at]) or '' end
end
return {call('ZCARD', key), found, bodies}
