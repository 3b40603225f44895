--! session
-- ARGV: prefix, token. Reply: 1 touched, 0 gone, -2 corrupt, {-3, user} unsure.
local now = milliseconds()
local record, why = living(KEYS[1], ARGV[1], now)
if not record then return why end
extend(KEYS[1], ARGV[1], ARGV[2], record, now)
return 1
