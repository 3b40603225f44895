-- KEYS: log, meta, then the result of an idempotency key if there is one
-- ARGV: message, size, ttl, epoch if none, run id, publish command, channel, ttl of meta, ttl of the result
-- Reply: {offset, epoch, fresh}
if KEYS[3] then
  local result = redis.call('HMGET', KEYS[3], 'offset', 'epoch')
  if result[1] then return {tonumber(result[1]), result[2], 0} end
end
local meta = redis.call('HMGET', KEYS[2], 'epoch', 'offset', 'run')
local epoch, offset, run = meta[1], tonumber(meta[2] or 0), meta[3]
if not epoch then
  -- A log whose numbering is unknown is worth nothing.
  redis.call('DEL', KEYS[1])
  epoch, offset, run = ARGV[4], 0, ARGV[5]
end
local previous = offset
-- Another server, or the same one restarted: it may lack the last writes of the one before, and must not hand out their numbers
-- again. The chain of previous offsets stays whole for those who have seen no more than this server has.
if run ~= ARGV[5] then offset = offset + 1048576 end
offset = offset + 1
local envelope = string.format('%.0f %.0f ', offset, previous) .. epoch .. '\n' .. ARGV[1]
redis.call(ARGV[6], ARGV[7], envelope)
redis.call('XADD', KEYS[1], 'MAXLEN', '=', ARGV[2], string.format('%.0f-0', offset), 'p', string.format('%.0f', previous), 'd', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('HSET', KEYS[2], 'epoch', epoch, 'offset', string.format('%.0f', offset), 'run', ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[8])
if KEYS[3] then
  redis.call('HSET', KEYS[3], 'offset', string.format('%.0f', offset), 'epoch', epoch)
  redis.call('PEXPIRE', KEYS[3], ARGV[9])
end
return {offset, epoch, 1}
