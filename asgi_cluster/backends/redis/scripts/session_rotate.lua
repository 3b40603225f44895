-- KEYS[1] session; ARGV: bucket prefix, publish command, channel, message, write id, new secret, current secret, grace
-- Reply: 1 rotated, 0 gone, -1 somebody else has rotated it.
local meta = redis.call('HMGET', KEYS[1], '@secret', '@user', '@epoch')
if not meta[1] then return 0 end
if meta[2] and redis.call('GET', ARGV[1] .. 'e:' .. meta[2]) ~= meta[3] then return 0 end
if meta[1] ~= ARGV[7] then return -1 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call(ARGV[2], ARGV[3], ARGV[4])
redis.call('HSET', KEYS[1], '@secret', ARGV[6], '@prev', ARGV[7], '@prev_until', now + tonumber(ARGV[8]), '@write', ARGV[5])
redis.call('HINCRBY', KEYS[1], '@ver', 1)
return 1
