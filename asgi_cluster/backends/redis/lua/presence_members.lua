-- KEYS[1] presence; ARGV[1] ttl: a room that is read is in use. Reply: {client, entry, …}
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return redis.call('HGETALL', KEYS[1])
