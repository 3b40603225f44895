-- KEYS: log, meta; ARGV: since offset ('' from the oldest), since epoch, limit ('' all), reverse, epoch if none, run id, ttl of meta
-- Reply: {top offset, epoch, complete, {{id, {p, previous, d, message}}…}}
local meta = redis.call('HMGET', KEYS[2], 'epoch', 'offset')
if not meta[1] then
  -- Name the numbering now, so that the position that this reader takes away means something later.
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[2], 'epoch', ARGV[5], 'offset', 0, 'run', ARGV[6])
  redis.call('PEXPIRE', KEYS[2], ARGV[7])
  meta = {ARGV[5], '0'}
end
local top, since, complete = tonumber(meta[2]), tonumber(ARGV[1]), 1
if since then
  complete = 0
  if ARGV[2] == meta[1] then
    if since == top then
      complete = 1
    else
      local next = redis.call('XRANGE', KEYS[1], string.format('(%.0f-0', since), '+', 'COUNT', 1)[1]
      if next and tonumber(next[2][2]) == since then complete = 1 end
    end
  end
end
local limit = tonumber(ARGV[3])
if limit == 0 or (since and ARGV[2] ~= meta[1]) then return {top, meta[1], complete, {}} end
local args
if ARGV[4] == '1' then
  args = {'XREVRANGE', KEYS[1], since and string.format('(%.0f-0', since) or '+', '-'}
else
  args = {'XRANGE', KEYS[1], since and string.format('(%.0f-0', since) or '-', '+'}
end
if limit then
  args[#args + 1] = 'COUNT'
  args[#args + 1] = limit
end
return {top, meta[1], complete, redis.call(unpack(args))}
