-- Returns the turn that an idempotency key, ARGV 2, is bound to: tag, uid, turn, seal, row, whether on the branch,
-- and who has its session for it.
local bound = call('HMGET', G('k:' .. ARGV[2]), 's', 't', 'f')
if not bound[1] then return false end
local row = call('HGET', K(bound[1], 't'), bound[2])
local uid = call('HGET', K(bound[1], 's'), 'u') or ''
if not row then return {bound[1], uid, bound[2], bound[3] or '', '', 0, false} end
local on_branch = #row >= 22 and branch(bound[1], depth_of(row))[bound[2]]
local lease = lease_of(bound[1])
local holder = lease and lease.turn == bound[2] and is_held(lease) and holder_of(lease) or false
return {bound[1], uid, bound[2], bound[3] or '', row, on_branch and 1 or 0, holder}
