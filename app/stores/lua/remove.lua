-- Removes sessions; ARGV from 2: their tags. Returns how many sessions there are then, and how many were there.
local gone = 0
for at = 2, #ARGV do gone = gone + remove(ARGV[at]) end
return {call('ZCARD', G('z:all')), gone}
