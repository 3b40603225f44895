-- KEYS[1] epoch, KEYS[2] index; ARGV: bucket prefix. Reply: {now, {token, pttl, created, seen, agent, addr}…}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local epoch, found = redis.call('GET', KEYS[1]), {}
for _, token in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local key = ARGV[1] .. 's:' .. token
  local meta = redis.call('HMGET', key, '@epoch', '@created', '@seen', '@agent', '@addr')
  if epoch and meta[1] == epoch then
    found[#found + 1] = {token, redis.call('PTTL', key), meta[2], meta[3], meta[4] or '', meta[5] or ''}
  else
    redis.call('ZREM', KEYS[2], token)
  end
end
return {now, found}
