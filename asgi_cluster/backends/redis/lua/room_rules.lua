-- KEYS: declarations, view, epoch. ARGV: digest of the caller's rules ('' declares none), the rules, node, epoch
-- if there is none, its ttl, ttl of the declarations, for how long the reply is relied on. Milliseconds.
-- Reply: {epoch, for how long the caller has to wait, {node, rules, …} of others}.
local SEEN_EVERY, GONE_AFTER, SPARE = 10000, 60000, 10000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A declaration is '<when it was last made> <when all readers have it> <node>\n<rules>'.
local function parse(value)
  local line = value and string.find(value, '\n', 1, true)
  if not line then return nil end
  local seen, known, node = string.match(string.sub(value, 1, line - 1), '^(%d+) (%d+) (.*)$')
  return tonumber(seen), node, string.sub(value, line + 1), tonumber(known)
end

local epoch = redis.call('GET', KEYS[3])
if not epoch then
  epoch = ARGV[4]
  redis.pcall('SET', KEYS[3], epoch, 'PX', ARGV[5]) -- refused when memory is full: then each has its own
end
local declarations, view = KEYS[1], KEYS[2]
-- The value of `view` is the longest time for which a reader relies on a reply, and the key lives at least that
-- long after every reading. So every reading is too old when either the key's time or its value has passed.
local wanted, longest = tonumber(ARGV[7]), tonumber(redis.call('GET', view) or '') or 0
local relied = math.max(0, redis.call('PTTL', view))
local wait, steady = 0, false
local function declare(command, known)
  local line = string.format('%.0f %.0f ', now, known) .. ARGV[3]
  command('HSET', declarations, ARGV[1], line .. '\n' .. ARGV[2])
  redis.call('PEXPIRE', declarations, ARGV[6])
end
if ARGV[1] ~= '' then
  local seen, _, _, known = parse(redis.call('HGET', declarations, ARGV[1]))
  if not seen then
    wait = math.min(relied, longest)
    declare(redis.call, now + wait)
  else
    -- Another node with the same rules may have declared them a moment ago.
    wait = math.max(0, known - now)
    if now - seen > SEEN_EVERY then declare(redis.pcall, known) end -- when memory is full, the old one stays
  end
  -- After a stall of the server all declarations look old, those of running nodes too.
  steady = seen and now - seen <= 2 * SEEN_EVERY
end
local others, all = {}, redis.call('HGETALL', declarations)
for i = 1, #all, 2 do
  if all[i] ~= ARGV[1] then
    local seen, node, rules = parse(all[i + 1])
    if not seen or (steady and now - seen > GONE_AFTER) then
      redis.call('HDEL', declarations, all[i])
    else
      others[#others + 1] = node
      others[#others + 1] = rules
    end
  end
end
-- SPARE longer than needed, so that one of many readings writes. Refused when memory is full, as a declaration
-- would be.
if relied < wanted or longest < wanted then
  redis.pcall('SET', view, ARGV[7], 'PX', wanted + SPARE)
end
return {epoch, wait, others}
