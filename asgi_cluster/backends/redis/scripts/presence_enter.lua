-- KEYS[1] presence; ARGV: client, entry, ttl. One call, so that no entry is left without an expiry.
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
