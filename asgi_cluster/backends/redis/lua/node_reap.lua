-- KEYS[1] registry, KEYS[2] beat; ARGV: node, expiry that was seen, tolerance. Only if it has not moved since.
local pttl = redis.call('PTTL', KEYS[2])
if pttl >= 0 then
  local time = redis.call('TIME')
  local expiry = time[1] * 1000 + math.floor(time[2] / 1000) + pttl
  if math.abs(expiry - tonumber(ARGV[2])) > tonumber(ARGV[3]) then return 0 end
elseif ARGV[2] ~= '0' then
  return 0
end
redis.call('DEL', KEYS[2])
return redis.call('HDEL', KEYS[1], ARGV[1])
