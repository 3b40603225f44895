--! session
-- KEYS: session, and with a user epoch and index. ARGV: prefix, token, user ('' none), epoch nonce, idle,
-- absolute, secret, write id, persistent, agent, address, then name, value, name, value… Reply: when.
local now = milliseconds()
local idle, absolute = tonumber(ARGV[5]), tonumber(ARGV[6])
local left = math.min(idle, absolute)
local user = ARGV[3]
-- Not DEL at once: the first write has to be one that is refused when memory is full.
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('DEL', KEYS[1]) end
redis.call(
  'HSET', KEYS[1], '@secret', ARGV[7], '@write', ARGV[8], '@persistent', ARGV[9], '@ver', 1, '@created', now,
  '@idle', idle, '@abs', now + absolute, '@seen', now
)
redis.call('PEXPIRE', KEYS[1], left)
in_parts('HSET', KEYS[1], ARGV, 12)
if user ~= '' then
  local epoch = redis.call('GET', KEYS[2])
  if not epoch then
    epoch = ARGV[4]
    redis.call('SET', KEYS[2], epoch, 'PX', absolute)
  elseif redis.call('PTTL', KEYS[2]) < absolute then
    -- The nonce must outlive every session made under it: a missing one means revoked.
    redis.call('PEXPIRE', KEYS[2], absolute)
  end
  redis.call('HSET', KEYS[1], '@user', user, '@epoch', epoch, '@agent', ARGV[10], '@addr', ARGV[11])
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
  redis.call('ZADD', KEYS[3], now + left, ARGV[2])
  if redis.call('PTTL', KEYS[3]) < absolute then redis.call('PEXPIRE', KEYS[3], absolute) end
end
return now
