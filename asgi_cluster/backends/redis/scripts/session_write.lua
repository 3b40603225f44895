-- KEYS[1] session; ARGV: bucket prefix, token, publish command, channel, message, write id, expected write id ('' any),
-- number of removed fields, removed…, then name, value…
-- Reply: 1 written, 0 gone, -1 conflict.
local meta = redis.call('HMGET', KEYS[1], '@abs', '@idle', '@user', '@epoch', '@write')
if not meta[1] then return 0 end
local user = meta[3]
if user and redis.call('GET', ARGV[1] .. 'e:' .. user) ~= meta[4] then return 0 end
if ARGV[7] ~= '' and ARGV[7] ~= meta[5] then return -1 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl = math.min(tonumber(meta[2]), tonumber(meta[1]) - now)
if ttl <= 0 then return 0 end
-- Publish first: if the channel is refused, nothing has been changed that nobody will hear of.
redis.call(ARGV[3], ARGV[4], ARGV[5])
local removed = tonumber(ARGV[8])
if removed > 0 then redis.call('HDEL', KEYS[1], unpack(ARGV, 9, 8 + removed)) end
if #ARGV > 8 + removed then redis.call('HSET', KEYS[1], unpack(ARGV, 9 + removed)) end
redis.call('HSET', KEYS[1], '@write', ARGV[6], '@seen', now)
redis.call('HINCRBY', KEYS[1], '@ver', 1)
redis.call('PEXPIRE', KEYS[1], ttl)
if user then redis.call('ZADD', ARGV[1] .. 'i:' .. user, 'XX', now + ttl, ARGV[2]) end
return 1
