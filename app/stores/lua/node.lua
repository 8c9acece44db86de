-- With ARGV 2 (boot, url) and 3 (ms) announces a node; returns those that have announced themselves in time.
local now = clock()
if ARGV[2] then call('ZADD', G('nodes'), string.format('%.0f', now + ARGV[3]), ARGV[2]) end
call('ZREMRANGEBYSCORE', G('nodes'), '-inf', string.format('%.0f', now))
return call('ZRANGE', G('nodes'), 0, -1)
