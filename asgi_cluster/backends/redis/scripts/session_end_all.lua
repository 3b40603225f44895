-- KEYS[1] epoch, KEYS[2] index; ARGV: bucket prefix, kept token ('' none), publish command, channel, message, new epoch,
-- registry key ('' elsewhere). Reply: {ended, nodes…}
local old = redis.call('GET', KEYS[1])
redis.call(ARGV[3], ARGV[4], ARGV[5])
local keep, ended, kept = ARGV[2], 0, 0
for _, token in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local key = ARGV[1] .. 's:' .. token
  local epoch = redis.call('HGET', key, '@epoch')
  if token == keep and epoch and epoch == old then
    redis.call('HSET', key, '@epoch', ARGV[6])
    kept = redis.call('HGET', key, '@abs')
  else
    if epoch and epoch == old then ended = ended + 1 end
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[2], token)
  end
end
if kept ~= 0 then
  local time = redis.call('TIME')
  local left = tonumber(kept) - (time[1] * 1000 + math.floor(time[2] / 1000))
  redis.call('SET', KEYS[1], ARGV[6], 'PX', math.max(left, 1))
else
  -- No session left, no nonce needed: missing means revoked.
  redis.call('DEL', KEYS[1], KEYS[2])
end
local nodes = {}
if ARGV[7] ~= '' then nodes = redis.call('HKEYS', ARGV[7]) end
return {ended, nodes}
