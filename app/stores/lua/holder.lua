-- Returns who has a session, ARGV 2, and for how many ms; false if nobody.
local lease = lease_of(ARGV[2])
if not is_held(lease) then return false end
return {holder_of(lease), string.format('%.0f', lease.ends - clock())}
