-- Put before every script. ARGV[1] is the prefix of all keys; a session is named by its tag, the
-- encoded (owner, id). Keys are made here, not handed in: there is one primary and no cluster.
--
-- Of a session, by room:
--   s  its record: r and j sealed by the client, w the token of its last write, u its uid, h its head,
--      m its member in the indexes (uid and tag), e until when its keys are kept
--   t  turns: id -> parent 16, status 1, kept 1, depth 4, ... as rows.py packs them     i  turns by start
--   k  states by number    n  notes by id    o  where the notes hang    f  facts by time
--   c  checkpoints by id    d  checkpoints by time    a  the automatic of them    b  turn -> idempotency key
--   l  the lease, which also knows how its turn is to be stored if it runs out
-- Of all: n counters, of member -> indexes, ph member -> phase, z:* indexes by last activity (z:act those
-- in phase active), idle those idle by time alone, due those that will expire and x those that have, order
-- by key, leases by their end.
local P = ARGV[1]
local call = redis.call
local ROOMS = {'s', 't', 'i', 'k', 'n', 'o', 'f', 'c', 'd', 'a', 'b'}
local NEVER = 'never'
local RUNNING = 0
local touched = {} -- rooms of the session that this step may have made

local function K(tag, room) return P .. ':{' .. tag .. '}:' .. room end
local function G(name) return P .. ':' .. name end

local function clock()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function count(name, change)
  if tonumber(change) ~= 0 then call('HINCRBY', G('n'), name, change) end
end

-- Bytes, not the locale's letters.
local function less(a, b)
  local size = math.min(#a, #b)
  for at = 1, size do
    local x, y = string.byte(a, at), string.byte(b, at)
    if x ~= y then return x < y end
  end
  return #a < #b
end

-- Returns the rank of the first entry of a sorted set that is not before (score, member).
local function seek(key, score, member)
  local low = call('ZCOUNT', key, '-inf', '(' .. score)
  local high = low + call('ZCOUNT', key, score, score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if less(call('ZRANGE', key, middle, middle)[1], member) then low = middle + 1 else high = middle end
  end
  return low
end

-- Returns up to limit entries with scores: from (score, member) upwards, or those before it downwards.
local function page(key, score, member, limit, upwards)
  limit = tonumber(limit)
  if upwards then
    local first = score == '' and 0 or seek(key, score, member)
    return call('ZRANGE', key, first, first + limit - 1, 'WITHSCORES')
  end
  local first = 0
  if score ~= '' then first = call('ZCARD', key) - seek(key, score, member) end
  return call('ZREVRANGE', key, first, first + limit - 1, 'WITHSCORES')
end

local function status_of(row) return string.byte(row, 17) end
local function is_committed(row)
  return status_of(row) == 1 or (status_of(row) == 3 and string.byte(row, 18) == 1)
end
local function parent_of(row)
  local parent = string.sub(row, 1, 16)
  if parent == string.rep('\0', 16) then return nil end
  return parent
end
local function depth_of(row) return struct.unpack('>I4', string.sub(row, 19, 22)) end

-- Returns the set of ids on the path from the head up to this depth.
local function branch(tag, least)
  local ids, at = {}, call('HGET', K(tag, 's'), 'h')
  while at and at ~= '' and not ids[at] do
    ids[at] = true
    local row = call('HGET', K(tag, 't'), at)
    if not row or #row < 22 or depth_of(row) <= least then break end
    at = parent_of(row)
  end
  return ids
end

-- Returns what sorts sessions by (owner, id): both as they were before they were encoded.
local function order_of(tag)
  local text = string.gsub(tag, '/', '%%00')
  return (string.gsub(text, '%%(%x%x)', function(code) return string.char(tonumber(code, 16)) end))
end

-- Idempotency keys.
local function release(tag, turn)
  local name = call('HGET', K(tag, 'b'), turn)
  if not name then return end
  call('HDEL', K(tag, 'b'), turn)
  local bound = call('HMGET', name, 's', 't')
  if bound[1] == tag and bound[2] == turn then call('DEL', name) end
end

-- Says whether the key is another committed turn's, which is not done with seizes.
local function bind(tag, turn, name, sealed, seizes)
  name = G('k:' .. name)
  local bound = call('HMGET', name, 's', 't')
  if bound[1] and (bound[1] ~= tag or bound[2] ~= turn) then
    local row = call('HGET', K(bound[1], 't'), bound[2])
    if row and is_committed(row) and not seizes then return true end
    release(bound[1], bound[2])
  end
  call('DEL', name)
  call('HSET', name, 's', tag, 't', turn, 'f', sealed)
  call('HSET', K(tag, 'b'), turn, name)
  touched['b'] = true
  local kept = call('HGET', K(tag, 's'), 'e')
  if kept and kept ~= NEVER then call('PEXPIREAT', name, kept) end
  return false
end

-- How long keys are kept: span ms from now ('' for ever). Within slack of it nothing is renewed but what
-- is new in this step, so that a turn does not cost as much as the session has keys.
local function keep(tag, span, slack)
  local s = K(tag, 's')
  local kept = call('HGET', s, 'e')
  local until_ms = NEVER
  if span ~= '' then
    local wanted, known = clock() + span, tonumber(kept or '')
    until_ms = string.format('%.0f', wanted)
    if known and known >= wanted - slack and known <= wanted + slack then until_ms = kept end
  end
  local names = {}
  if until_ms == kept then
    for room in pairs(touched) do names[#names + 1] = K(tag, room) end
  else
    call('HSET', s, 'e', until_ms)
    names = call('HVALS', K(tag, 'b'))
    for _, room in ipairs(ROOMS) do names[#names + 1] = K(tag, room) end
  end
  touched = {}
  for _, name in ipairs(names) do
    if until_ms ~= NEVER then call('PEXPIREAT', name, until_ms)
    elseif kept and kept ~= NEVER then call('PERSIST', name) end
  end
end

-- What is counted by phase, and where a session stands in the indexes.
local function set_phase(member, phase)
  local was = call('HGET', G('ph'), member)
  if was == phase then return end
  if was then count(was, -1) end
  count(phase, 1)
  call('HSET', G('ph'), member, phase)
end

local function place(member, active_at, expires_at, archived, marked, now, idle_ms)
  now = math.max(tonumber(now), tonumber(call('HGET', G('n'), 'swept_ms') or 0))
  local phase, is_by_time = 'active', false
  if archived == '1' then phase = 'archived'
  elseif expires_at ~= '' and now >= tonumber(expires_at) then phase = 'expired'
  elseif marked == '1' then phase = 'idle'
  elseif tonumber(idle_ms) > 0 and now >= active_at + idle_ms then phase, is_by_time = 'idle', true end
  for name in string.gmatch(call('HGET', G('of'), member) or '', '[^\n]+') do
    call('ZADD', G('z:' .. name), active_at, member)
  end
  if phase == 'active' then call('ZADD', G('z:act'), active_at, member) else call('ZREM', G('z:act'), member) end
  if is_by_time then call('ZADD', G('idle'), active_at, member) else call('ZREM', G('idle'), member) end
  local open, shut = G('due'), G('x')
  if phase == 'expired' then open, shut = shut, open end
  if expires_at == '' then call('ZREM', open, member) else call('ZADD', open, expires_at, member) end
  call('ZREM', shut, member)
  set_phase(member, phase)
end

local function forget(member)
  for name in string.gmatch(call('HGET', G('of'), member) or '', '[^\n]+') do
    call('ZREM', G('z:' .. name), member)
  end
  call('ZREM', G('z:act'), member)
  call('ZREM', G('idle'), member)
  call('ZREM', G('due'), member)
  call('ZREM', G('x'), member)
  local phase = call('HGET', G('ph'), member)
  if phase then count(phase, -1) end
  call('HDEL', G('ph'), member)
  call('HDEL', G('of'), member)
end

-- Leases. One that has run out is as good as none, but its turn has to be ended by whoever drops it.
local function lease_of(tag)
  local l = call('HMGET', K(tag, 'l'), 'n', 'b', 'a', 't', 'x', 'q', 'f', 'g', 'd')
  if not l[1] then return nil end
  return {nonce = l[1], boot = l[2], url = l[3], is_turn = l[4], ends = tonumber(l[5]),
          turn = l[6], epitaph = l[7], user = l[8], day = l[9]}
end

local function holder_of(lease) return {lease.nonce, lease.boot, lease.url, lease.is_turn} end

local function is_held(lease) return lease and lease.ends > clock() end

local function drop_lease(tag)
  call('DEL', K(tag, 'l'))
  call('ZREM', G('leases'), tag)
  call('PUBLISH', G('free:' .. tag), '')
end

local function count_usage(user, day, turns, read, written)
  if user == '' then return end
  local key = G('g:' .. user)
  for _, when in ipairs({'all', day}) do
    call('HINCRBY', key, when .. ':t', turns)
    call('HINCRBY', key, when .. ':p', read)
    call('HINCRBY', key, when .. ':c', written)
  end
end

-- Fails the turn of a lease that has run out, if it is still said to run; says whether it was.
local function end_abandoned(tag, lease)
  if not lease.turn or lease.turn == '' or not lease.epitaph or lease.epitaph == '' then return false end
  local row = call('HGET', K(tag, 't'), lease.turn)
  if not row or status_of(row) ~= RUNNING then return false end
  call('HSET', K(tag, 't'), lease.turn, lease.epitaph)
  release(tag, lease.turn)
  count('turns', 1)
  count('turns_failed', 1)
  count_usage(lease.user, lease.day, 1, 0, 0)
  return true
end

-- Takes the lease; returns who has it if that is somebody else.
local function take(tag, nonce, boot, url, is_turn, turn, lease_ms)
  local lease = lease_of(tag)
  if lease and lease.nonce ~= nonce then
    if is_held(lease) then return lease end
    end_abandoned(tag, lease)
    drop_lease(tag)
  end
  local ends = clock() + lease_ms
  call('HSET', K(tag, 'l'), 'n', nonce, 'b', boot, 'a', url, 't', is_turn, 'x', string.format('%.0f', ends),
       'q', turn)
  call('ZADD', G('leases'), string.format('%.0f', ends), tag)
  return nil
end

local function give_back(tag, nonce)
  if call('HGET', K(tag, 'l'), 'n') ~= nonce then return false end
  drop_lease(tag)
  return true
end

-- Removes a session and all that belongs to it, but for the lease if somebody keeps that.
local function remove(tag, keeps_lease)
  local member = call('HGET', K(tag, 's'), 'm')
  if not member then return 0 end
  local bound = call('HGETALL', K(tag, 'b'))
  for at = 1, #bound, 2 do release(tag, bound[at]) end
  forget(member)
  call('ZREM', G('order'), order_of(tag))
  for _, room in ipairs(ROOMS) do call('UNLINK', K(tag, room)) end
  if not keeps_lease and call('EXISTS', K(tag, 'l')) == 1 then drop_lease(tag) end
  return 1
end

-- Carries out commands from ARGV[at]: how many words follow, the command, its room (or @name), its
-- arguments. Says whether an idempotency key was another's.
local function carry_out(tag, at, last)
  local is_taken = false
  while at <= last do
    local size = tonumber(ARGV[at])
    local name, room = ARGV[at + 1], ARGV[at + 2]
    if name == 'bind' then
      is_taken = bind(tag, room, ARGV[at + 3], ARGV[at + 4], false)
    elseif name == 'seize' then
      bind(tag, room, ARGV[at + 3], ARGV[at + 4], true)
    elseif name == 'release' then
      release(tag, room)
    elseif name == 'usage' then
      count_usage(room, ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6])
    elseif name == 'count' then
      for word = at + 2, at + size, 2 do count(ARGV[word], ARGV[word + 1]) end
    elseif name == 'reindex' then
      local member = call('HGET', K(tag, 's'), 'm')
      for index in string.gmatch(call('HGET', G('of'), member) or '', '[^\n]+') do
        call('ZREM', G('z:' .. index), member)
      end
      call('HSET', G('of'), member, room) -- place() adds it to these
    elseif name == 'trim' then
      while call('ZCARD', K(tag, 'a')) > tonumber(room) do
        local oldest = call('ZPOPMIN', K(tag, 'a'))[1]
        call('ZREM', K(tag, 'd'), oldest)
        call('HDEL', K(tag, 'c'), oldest)
      end
    else
      touched[room] = true
      call(name, K(tag, room), unpack(ARGV, at + 3, at + size))
    end
    at = at + size + 1
  end
  return is_taken
end
