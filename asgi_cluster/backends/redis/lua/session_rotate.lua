--! session
-- ARGV: prefix, publish command, channel, message, write id, new secret, current secret, grace.
-- Reply: 1 rotated, 0 gone, -1 another request has rotated it, -2 corrupt, {-3, user} unsure.
local now = milliseconds()
local record, why = living(KEYS[1], ARGV[1], now)
if not record then return why end
if record.secret ~= ARGV[7] then return CONFLICT end
redis.call(ARGV[2], ARGV[3], ARGV[4])
redis.call(
  'HSET', KEYS[1], '@secret', ARGV[6], '@prev', ARGV[7], '@prev_until', now + tonumber(ARGV[8]), '@write', ARGV[5]
)
redis.call('HINCRBY', KEYS[1], '@ver', 1)
return 1
