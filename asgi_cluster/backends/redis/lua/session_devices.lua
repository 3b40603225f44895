--! session
-- KEYS: epoch, index; ARGV: prefix. Reply: {{token, milliseconds to live, created, seen, agent, address}…}
-- Only time takes a token out of the index: a record that is not found may be on its way here.
local now = milliseconds()
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local devices = {}
for _, token in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local key = ARGV[1] .. 's:' .. token
  local record = living(key, ARGV[1], now)
  if record then
    local told = redis.call('HMGET', key, '@created', '@seen', '@agent', '@addr')
    local ttl = redis.call('PTTL', key)
    devices[#devices + 1] = {
      token, ttl < 0 and record.left or ttl, tonumber(told[1]) or now, tonumber(told[2]) or now, told[3] or '', told[4] or '',
    }
  end
end
return devices
