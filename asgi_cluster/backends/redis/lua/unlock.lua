-- KEYS[1] lock; ARGV[1] token. Only the holder gives it back.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
