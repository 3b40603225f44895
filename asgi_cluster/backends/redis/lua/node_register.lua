-- KEYS[1] registry, KEYS[2] beat; ARGV: node, info, ttl in milliseconds
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('SET', KEYS[2], '', 'PX', ARGV[3])
return 1
