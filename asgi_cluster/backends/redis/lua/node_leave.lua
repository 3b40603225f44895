-- KEYS[1] registry, KEYS[2] beat; ARGV[1] node
redis.call('DEL', KEYS[2])
return redis.call('HDEL', KEYS[1], ARGV[1])
