--! session
-- KEYS: epoch, index; ARGV: prefix, user, kept token ('' none), publish command, channel, message, new epoch,
-- registry key ('' elsewhere), kept handle ('' none), how long the logout is to be found. Reply: {tokens that
-- were ended, nodes}.
local now = milliseconds()
local kept_key, kept = ARGV[1] .. 's:' .. ARGV[3], nil
if ARGV[3] ~= '' then kept = living(kept_key, ARGV[1], now) end
if kept and kept.user ~= ARGV[2] then kept = nil end
-- An end that was published has happened, as in session_end: a server that refuses writes is to say so now, with
-- one that changes nothing; and a slot that is moving, when the records are looked at.
redis.call('ZREM', KEYS[2], '')
local keys, ended = {}, {}
for _, token in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  if not (kept and token == ARGV[3]) then
    local key = ARGV[1] .. 's:' .. token
    keys[#keys + 1] = key
    if living(key, ARGV[1], now) then ended[#ended + 1] = token end
  end
end
-- A message that ends in an empty list (0x90 in msgpack) lists for all nodes what was ended, and so what to
-- remember: those that would have lived longest, if they are very many.
local message = ARGV[6]
if string.byte(message, -1) == 0x90 then
  local told = #ended > 1000 and {unpack(ended, #ended - 999)} or ended
  message = string.sub(message, 1, -2) .. cmsgpack.pack(told)
end
-- The new epoch says that a logout made it, when, and whom it spared: user_logouts reads that. A session of the
-- user needs no mention, and of any other one the last logout that did not spare it counts: that of the epoch
-- before, unless it spared the same one.
local spared = kept and '' or ARGV[9]
local epoch, before = ARGV[7] .. ' ' .. string.format('%.0f', now) .. ' ' .. spared .. ' ', ''
if spared ~= '' then
  local old = redis.pcall('GET', KEYS[1])
  local at, last, earlier = string.match(type(old) == 'string' and old or '', ' (%d+) (%S*) (%d*)$')
  before = at and (last == spared and earlier or at) or ''
end
epoch = epoch .. before
redis.call(ARGV[4], ARGV[5], message)
for _, key in ipairs(keys) do elsewhere(redis.pcall('DEL', key)) end
-- First what passes when memory is full. A session that the index has lost is dead as well.
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('SET', KEYS[1], epoch, 'PX', math.max(tonumber(ARGV[10]), kept and kept.absolute - now or 0))
if kept then
  redis.call('HSET', kept_key, '@epoch', epoch)
  redis.call('ZADD', KEYS[2], now + kept.left, ARGV[3])
  redis.call('PEXPIRE', KEYS[2], kept.absolute - now)
end
return {ended, ARGV[8] ~= '' and redis.call('HKEYS', ARGV[8]) or {}}
