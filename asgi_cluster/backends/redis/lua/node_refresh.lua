-- KEYS[1] registry; ARGV: node, info. Only while it is registered: a node that was removed has to register again.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
