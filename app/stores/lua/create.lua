-- Stores new sessions, one after the other; says of each 0 stored, 1 its key is taken, 2 no room.
-- ARGV 2 whether to replace what is there: 0, 1 or the token that it must have, 3 count, 4 most a user may have, 5 number of victims, then tag,
-- member and last activity of each; then of each session its number of words, index of its user if that is to
-- be counted or '', tag, uid, token, member, indexes, head, record, JSON or '', last activity, end or '',
-- archived, marked idle, now, idle after ms, span, slack, lifetime, commands.
local replaces, sessions, most, victims = ARGV[2] ~= '0', tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local at_victims = 5 + 3 * victims
local at = at_victims + 1

local function make_room(user)
  local excess = call('ZCARD', G('z:' .. user)) + 1 - most
  if excess <= 0 then return true end
  local gone = {}
  for first = 6, at_victims, 3 do
    local tag, member, active_at = ARGV[first], ARGV[first + 1], tonumber(ARGV[first + 2])
    local is_same = call('HGET', K(tag, 's'), 'm') == member
      and tonumber(call('ZSCORE', G('z:' .. user), member) or -1) == active_at
    local lease = lease_of(tag)
    if is_same and not (is_held(lease) and lease.is_turn == '1') then gone[#gone + 1] = tag end
  end
  if #gone < excess then return false end
  for number = 1, excess do remove(gone[number]) end
  return true
end

local outcomes = {}
for number = 1, sessions do
  local last, user = at + tonumber(ARGV[at]), ARGV[at + 1]
  at = at + 1
  local tag, uid = ARGV[at + 1], ARGV[at + 2]
  local s, outcome = K(tag, 's'), 0
  local is_again = replaces and call('HGET', s, 'u') == uid -- it was created before
  local is_other = call('HGET', s, 'w') ~= ARGV[at + 3]
  if replaces and is_other and (ARGV[2] == '1' or call('HGET', s, 'w') == ARGV[2]) then remove(tag, true) end
  local known = call('HMGET', s, 'u', 'w')
  if known[2] == ARGV[at + 3] then outcome = 0 -- repeated
  elseif known[1] or #ARGV[2] > 1 and is_other and not is_again then outcome = 1
  elseif user ~= '' and not make_room(user) then outcome = 2
  else
    local member = ARGV[at + 4]
    -- What went by itself may have left something: of this key nothing may be seen any more.
    for _, room in ipairs(ROOMS) do call('UNLINK', K(tag, room)) end
    call('HSET', s, 'u', uid, 'w', ARGV[at + 3], 'm', member, 'h', ARGV[at + 6], 'r', ARGV[at + 7])
    if ARGV[at + 8] ~= '' then call('HSET', s, 'j', ARGV[at + 8]) end
    call('ZADD', G('order'), 0, order_of(tag))
    call('HSET', G('of'), member, ARGV[at + 5])
    carry_out(tag, at + 18, last)
    place(member, ARGV[at + 9], ARGV[at + 10], ARGV[at + 11], ARGV[at + 12], ARGV[at + 13], ARGV[at + 14])
    keep(tag, ARGV[at + 15], tonumber(ARGV[at + 16]))
    if not is_again then
      count('created', 1)
      count('lifetime_ms', ARGV[at + 17])
    end
  end
  outcomes[number] = outcome
  at = last + 1
end
return {call('ZCARD', G('z:all')), outcomes}
