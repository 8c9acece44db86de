-- Takes a lease that is no turn's: ARGV 2 tag, 3 nonce, 4 boot, 5 url, 6 lease ms. Returns who else has it.
local other = take(ARGV[2], ARGV[3], ARGV[4], ARGV[5], '0', '', tonumber(ARGV[6]))
if other then return holder_of(other) end
return false
