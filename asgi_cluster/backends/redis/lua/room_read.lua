--! room
-- ARGV: since offset ('' none), since epoch, limit ('' all), reverse, epoch if none, ttl of meta
-- Reply: {top offset, epoch, complete, 'offset previous length …', messages in one string}
local epoch, top = numbering(ARGV[5])
-- Kept from now on, so that the position that this reader takes away means something later. Where nothing has
-- been published nothing is stored: a client may ask for rooms that do not exist.
redis.call('PEXPIRE', KEYS[2], ARGV[6])
local since, limit, backwards = tonumber(ARGV[1]), tonumber(ARGV[3]), ARGV[4] == '1'
local complete = 1
if since then
  if ARGV[2] ~= epoch then return {top, epoch, 0, '', ''} end
  if since ~= top then
    local next = redis.call('XRANGE', KEYS[1], string.format('%.0f-0', since + 1), '+', 'COUNT', 1)[1]
    complete = next and tonumber(next[2][2]) == since and 1 or 0
  end
end
if limit == 0 then return {top, epoch, complete, '', ''} end
local read
if backwards then
  if since and since <= 1 then return {top, epoch, complete, '', ''} end
  read = {'XREVRANGE', KEYS[1], since and string.format('%.0f-0', since - 1) or '+', '-'}
else
  read = {'XRANGE', KEYS[1], since and string.format('%.0f-0', since + 1) or '-', '+'}
end
if limit then
  read[5] = 'COUNT'
  read[6] = limit
end
local heads, bodies = {}, {}
for _, entry in ipairs(redis.call(unpack(read))) do
  local previous, body = entry[2][2], entry[2][4]
  -- An entry that was tampered with is left out, and breaks the chain.
  if body and string.match(previous, '^%d+$') and #previous < 17 then
    bodies[#bodies + 1] = body
    heads[#heads + 1] = string.match(entry[1], '^%d+') .. ' ' .. previous .. ' ' .. #body
  end
end
return {top, epoch, complete, table.concat(heads, ' '), table.concat(bodies)}
