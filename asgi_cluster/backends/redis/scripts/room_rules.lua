-- KEYS: declarations, view, epoch. ARGV: digest of the caller's rules ('' declares none), the rules, node, epoch
-- if there is none, its ttl, ttl of the declarations, for how long the reply is relied on. Milliseconds.
-- Reply: {epoch, for how long the caller has to wait, {node, rules, …} of others}.
local SEEN_EVERY, GONE_AFTER = 10000, 60000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A declaration is '<time> <node>\n<rules>'.
local function parse(value)
  local line = value and string.find(value, '\n', 1, true)
  if not line then return nil end
  local seen, node = string.match(string.sub(value, 1, line - 1), '^(%d+) (.*)$')
  return tonumber(seen), node, string.sub(value, line + 1)
end

local epoch = redis.call('GET', KEYS[3])
if not epoch then
  epoch = ARGV[4]
  redis.pcall('SET', KEYS[3], epoch, 'PX', ARGV[5]) -- refused when memory is full: then each has its own
end
local wait, steady = 0, false
if ARGV[1] ~= '' then
  local seen = parse(redis.call('HGET', KEYS[1], ARGV[1]))
  local declaration = string.format('%.0f', now) .. ' ' .. ARGV[3] .. '\n' .. ARGV[2]
  if not seen then
    redis.call('HSET', KEYS[1], ARGV[1], declaration)
    wait = math.max(0, redis.call('PTTL', KEYS[2]))
  elseif now - seen > SEEN_EVERY then
    redis.pcall('HSET', KEYS[1], ARGV[1], declaration) -- when memory is full, the old one stays
  end
  redis.call('PEXPIRE', KEYS[1], ARGV[6])
  -- After a stall of the server all look old, and nobody may be taken for gone.
  steady = seen and now - seen <= 2 * SEEN_EVERY
end
local others, all = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  if all[i] ~= ARGV[1] then
    local seen, node, rules = parse(all[i + 1])
    if not seen or (steady and now - seen > GONE_AFTER) then
      redis.call('HDEL', KEYS[1], all[i])
    else
      others[#others + 1] = node
      others[#others + 1] = rules
    end
  end
end
-- When memory is full, nobody can declare anything either.
if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[7]) then redis.pcall('SET', KEYS[2], '', 'PX', ARGV[7]) end
return {epoch, wait, others}
