-- KEYS[1] session; ARGV: bucket prefix, token. Reply: 1 touched, 0 gone.
local meta = redis.call('HMGET', KEYS[1], '@abs', '@idle', '@user', '@epoch')
if not meta[1] then return 0 end
local user = meta[3]
if user and redis.call('GET', ARGV[1] .. 'e:' .. user) ~= meta[4] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl = math.min(tonumber(meta[2]), tonumber(meta[1]) - now)
if ttl <= 0 then return 0 end
redis.call('HSET', KEYS[1], '@seen', now)
redis.call('PEXPIRE', KEYS[1], ttl)
if user then redis.call('ZADD', ARGV[1] .. 'i:' .. user, 'XX', now + ttl, ARGV[2]) end
return 1
