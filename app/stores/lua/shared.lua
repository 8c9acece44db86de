-- Writes a shared state if nobody has since its token was read: ARGV 2 its name, 3 token or '', 4 new token,
-- 5 value. Repeated with the same new token it does nothing and says the same.
local key = G('h:' .. ARGV[2])
local token = call('HGET', key, 'w') or ''
if token == ARGV[4] then return 1 end
if token ~= ARGV[3] then return 0 end
call('HSET', key, 'w', ARGV[4], 'v', ARGV[5])
return 1
