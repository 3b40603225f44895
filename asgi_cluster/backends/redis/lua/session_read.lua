--! session
-- ARGV: prefix. Reply: nil, -2 when it is corrupt, {-3, user} when unsure, or {now, milliseconds to live,
-- fields…}.
local now = milliseconds()
local record, why = living(KEYS[1], ARGV[1], now)
if not record then return why ~= GONE and why end
local ttl = redis.call('PTTL', KEYS[1])
-- A record without TTL has been tampered with: its own timeouts still hold.
if ttl < 0 then ttl = record.left end
return {now, math.min(ttl, record.absolute - now), packed(KEYS[1])}
