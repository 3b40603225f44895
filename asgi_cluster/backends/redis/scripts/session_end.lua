-- KEYS[1] session; ARGV: bucket prefix, token, publish command, channel, message, registry key ('' elsewhere)
-- Reply: {existed, nodes…}
local user = redis.call('HGET', KEYS[1], '@user')
local epoch = user and redis.call('HGET', KEYS[1], '@epoch')
local alive = redis.call('EXISTS', KEYS[1])
if user and redis.call('GET', ARGV[1] .. 'e:' .. user) ~= epoch then alive = 0 end
-- Published even when there is none: a node may still have it cached, or sockets of it open.
redis.call(ARGV[3], ARGV[4], ARGV[5])
redis.call('DEL', KEYS[1])
if user then redis.call('ZREM', ARGV[1] .. 'i:' .. user, ARGV[2]) end
local nodes = {}
-- Read at the moment of the commit: a node that registers later starts with an empty cache.
if ARGV[6] ~= '' then nodes = redis.call('HKEYS', ARGV[6]) end
return {alive, nodes}
