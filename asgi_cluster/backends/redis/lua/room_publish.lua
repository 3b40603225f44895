--! room
-- KEYS: log, meta, then the result of an idempotency key if there is one
-- ARGV: message, size, ttl, ttl of meta, epoch if none, publish command, channel, ttl of the result, jump
-- Reply: {offset, epoch}
if KEYS[3] then
  local result = redis.call('HMGET', KEYS[3], 'offset', 'epoch')
  if result[1] and tonumber(result[1]) and result[2] then return {tonumber(result[1]), result[2]} end
end
local epoch, previous, run = numbering(ARGV[5])
local here = lineage()
local offset = previous + 1
-- This server may lack the last writes of the one before, and must not hand out their numbers again, nor
-- those that it may itself have lost after such a jump: hence a random one. The chain of previous offsets
-- stays whole for those who have seen no more than this server has. Numbers are exact up to 2^53, here and in
-- browsers; a room that comes near it starts anew.
if run ~= here then
  offset = offset + tonumber(ARGV[9])
  if offset > 2 ^ 52 then
    epoch, previous, offset = ARGV[5], 0, 1
    redis.call('DEL', KEYS[1])
  end
end
-- A write that changes nothing, because it is refused when memory is full: then nothing is published either.
-- Once it has passed, so do the ones below.
keep(epoch, previous, run, ARGV[4])
redis.call(ARGV[6], ARGV[7], string.format('%.0f %.0f ', offset, previous) .. epoch .. '\n' .. ARGV[1])
keep(epoch, offset, here, ARGV[4])
local id, chained = string.format('%.0f-0', offset), string.format('%.0f', previous)
local added = redis.pcall('XADD', KEYS[1], 'MAXLEN', '=', ARGV[2], id, 'p', chained, 'd', ARGV[1])
if type(added) == 'table' and added.err then
  -- The log is none, or ahead of its numbering: what is published has to be in it, what was is not to be
  -- trusted.
  redis.call('DEL', KEYS[1])
  redis.call('XADD', KEYS[1], 'MAXLEN', '=', ARGV[2], id, 'p', chained, 'd', ARGV[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
if KEYS[3] then
  redis.call('HSET', KEYS[3], 'offset', string.format('%.0f', offset), 'epoch', epoch)
  redis.call('PEXPIRE', KEYS[3], ARGV[8])
end
return {offset, epoch}
