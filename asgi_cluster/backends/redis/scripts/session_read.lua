-- KEYS[1] session; ARGV[1] what every key of the bucket starts with
-- Reply: nil, or {now, pttl, fields…}, times in milliseconds of this server.
local fields = redis.call('HGETALL', KEYS[1])
if #fields == 0 then return false end
local meta = redis.call('HMGET', KEYS[1], '@user', '@epoch')
if meta[1] and redis.call('GET', ARGV[1] .. 'e:' .. meta[1]) ~= meta[2] then return false end
local time = redis.call('TIME')
return {time[1] * 1000 + math.floor(time[2] / 1000), redis.call('PTTL', KEYS[1]), fields}
