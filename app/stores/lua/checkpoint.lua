-- Removes a checkpoint, ARGV 4, or with '' all; returns how many there were. ARGV 2 tag, 3 uid.
local tag, id = ARGV[2], ARGV[4]
if call('HGET', K(tag, 's'), 'u') ~= ARGV[3] then return 0 end
if id == '' then return call('HLEN', K(tag, 'c')), call('UNLINK', K(tag, 'c'), K(tag, 'd'), K(tag, 'a')) end
call('ZREM', K(tag, 'd'), id)
call('ZREM', K(tag, 'a'), id)
return call('HDEL', K(tag, 'c'), id)
