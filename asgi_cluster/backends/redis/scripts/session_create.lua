-- KEYS[1] session; ARGV: bucket prefix, token, user ('' none), epoch nonce, idle, absolute, secret, write id, persistent,
-- agent, address, then name, value, name, value…
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local idle, absolute = tonumber(ARGV[5]), tonumber(ARGV[6])
local ttl = math.min(idle, absolute)
local record = {
  '@secret', ARGV[7], '@write', ARGV[8], '@persistent', ARGV[9], '@ver', 1, '@created', now, '@idle', idle,
  '@abs', now + absolute, '@seen', now,
}
for i = 12, #ARGV do record[#record + 1] = ARGV[i] end
local user = ARGV[3]
if user ~= '' then
  local epoch_key, index_key = ARGV[1] .. 'e:' .. user, ARGV[1] .. 'i:' .. user
  local epoch = redis.call('GET', epoch_key)
  if not epoch then
    epoch = ARGV[4]
    redis.call('SET', epoch_key, epoch, 'PX', absolute)
  elseif redis.call('PTTL', epoch_key) < absolute then
    -- The nonce must outlive every session made under it: a missing one means revoked.
    redis.call('PEXPIRE', epoch_key, absolute)
  end
  for _, item in ipairs({'@user', user, '@epoch', epoch, '@agent', ARGV[10], '@addr', ARGV[11]}) do
    record[#record + 1] = item
  end
  redis.call('ZREMRANGEBYSCORE', index_key, '-inf', now)
  redis.call('ZADD', index_key, now + ttl, ARGV[2])
  if redis.call('PTTL', index_key) < absolute then redis.call('PEXPIRE', index_key, absolute) end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(record))
redis.call('PEXPIRE', KEYS[1], ttl)
return 1
