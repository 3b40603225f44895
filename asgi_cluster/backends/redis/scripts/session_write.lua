--! session
-- ARGV: prefix, token, publish command, channel, message, write id, expected write id ('' any), number of
-- removed fields, removed…, then name, value… Reply: 1 written, 0 gone, -1 conflict, -2 corrupt, {-3, user}
-- unsure.
local now = milliseconds()
local record, why = living(KEYS[1], ARGV[1], now)
if not record then return why end
if ARGV[7] ~= '' and ARGV[7] ~= record.write then return CONFLICT end
-- Publish first: if the channel is refused, nothing has been changed that nobody will hear of.
redis.call(ARGV[3], ARGV[4], ARGV[5])
-- The first write is one that is refused when memory is full: then nothing was written.
redis.call('HSET', KEYS[1], '@write', ARGV[6])
redis.call('HINCRBY', KEYS[1], '@ver', 1)
local last_removed = 8 + tonumber(ARGV[8])
in_parts('HDEL', KEYS[1], 9, last_removed)
in_parts('HSET', KEYS[1], last_removed + 1, #ARGV)
extend(KEYS[1], ARGV[1], ARGV[2], record, now)
return 1
