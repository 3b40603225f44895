--! session
-- ARGV: prefix, token, publish command, channel, message, message when nothing is left ('' keep it), write id,
-- expected write id ('' any), number of removed fields, removed…, then name, value… Reply: 1 written, 2 as it
-- was, 3 nothing was left and it is ended, 0 gone, -1 conflict, -2 corrupt, {-3, user} unsure.
local now = milliseconds()
local record, why = living(KEYS[1], ARGV[1], now)
if not record then return why end
if ARGV[8] ~= '' and ARGV[8] ~= record.write then return CONFLICT end
-- Compared with what is stored, and not with what the caller has read.
local last_removed = 9 + tonumber(ARGV[9])
local removed, changed, kept, is_removed = {}, {}, {}, {}
for i = last_removed + 1, #ARGV, 2 do
  kept[ARGV[i]] = true
  if redis.call('HGET', KEYS[1], ARGV[i]) ~= ARGV[i + 1] then
    changed[#changed + 1], changed[#changed + 2] = ARGV[i], ARGV[i + 1]
  end
end
for i = 10, last_removed do
  if not kept[ARGV[i]] and redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then
    removed[#removed + 1], is_removed[ARGV[i]] = ARGV[i], true
  end
end
if #removed + #changed == 0 then
  extend(KEYS[1], ARGV[1], ARGV[2], record, now)
  return 2
end
if ARGV[6] ~= '' and not record.user and last_removed == #ARGV then
  local left = false
  for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
    left = left or string.sub(name, 1, 1) == '.' and not is_removed[name]
  end
  if not left then
    -- As in session_end: a server that refuses writes is to say so before the end is published.
    redis.call('PEXPIRE', KEYS[1], record.left)
    redis.call(ARGV[3], ARGV[4], ARGV[6])
    redis.call('DEL', KEYS[1])
    return 3
  end
end
-- Publish first: if the channel is refused, nothing has been changed without a message.
redis.call(ARGV[3], ARGV[4], ARGV[5])
-- The first write is one that is refused when memory is full: then nothing was written.
redis.call('HSET', KEYS[1], '@write', ARGV[7])
redis.call('HINCRBY', KEYS[1], '@ver', 1)
in_parts('HDEL', KEYS[1], removed, 1)
in_parts('HSET', KEYS[1], changed, 1)
extend(KEYS[1], ARGV[1], ARGV[2], record, now)
return 1
