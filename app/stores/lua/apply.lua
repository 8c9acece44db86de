-- Writes to a session if nobody has since its token was read: ARGV 2 tag, 3 uid, 4 token that must be its,
-- 5 its new token, 6 turn that must not have ended ('' none), 7 nonce to give back ('' none),
-- 8 head, 9 record, 10 last activity, 11 end or '', 12 archived, 13 marked idle, 14 now, 15 idle after ms,
-- 16 span to keep it for, 17 slack, 18 change of lifetime, from 19 commands.
-- Repeated with the same new token it does nothing and says the same.
local tag, uid, token, renewed, turn, nonce = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local found = call('HMGET', K(tag, 's'), 'u', 'w', 'm')
if found[1] ~= uid then return {'gone'} end
if found[2] == renewed then return {'ok', 0} end
if found[2] ~= token then return {'moved'} end
if turn ~= '' then
  local row = call('HGET', K(tag, 't'), turn)
  if row and status_of(row) ~= RUNNING then return {'ended'} end
end
call('HSET', K(tag, 's'), 'w', renewed, 'h', ARGV[8], 'r', ARGV[9])
local is_taken = carry_out(tag, 19, #ARGV)
place(found[3], ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14], ARGV[15])
count('lifetime_ms', ARGV[18])
keep(tag, ARGV[16], tonumber(ARGV[17]))
if nonce ~= '' then give_back(tag, nonce) end
return {'ok', is_taken and 1 or 0}
