-- In front of every session script. KEYS[1] is the session, ARGV[1] what every key of its bucket starts with.
local GONE, CONFLICT, CORRUPT = 0, -1, -2

local function milliseconds()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- A record: its meta fields as they are, `left` milliseconds to live from `now`. Nil and GONE when there is none, or its user was
-- logged out everywhere: the epoch it was made under is not the user's any more. Nil and CORRUPT when it cannot be understood.
local function living(key, prefix, now)
  local found = redis.pcall('HMGET', key, '@secret', '@abs', '@idle', '@user', '@epoch', '@write')
  if found.err then
    if string.find(found.err, 'WRONGTYPE', 1, true) then return nil, CORRUPT end
    error(found.err)
  end
  local absolute, idle, user = tonumber(found[2]), tonumber(found[3]), found[4]
  if not (found[1] and absolute and idle) then
    return nil, redis.call('EXISTS', key) == 1 and CORRUPT or GONE
  end
  if user and redis.call('GET', prefix .. 'e:' .. user) ~= found[5] then return nil, GONE end
  local left = math.min(idle, absolute - now)
  if left <= 0 then return nil, GONE end
  return {secret = found[1], absolute = absolute, user = user, write = found[6], left = left}
end

-- PEXPIRE passes when memory is full, and after a first write so does what follows: a session need not die of it.
local function extend(key, prefix, token, record, now)
  redis.call('PEXPIRE', key, record.left)
  redis.call('HSET', key, '@seen', now)
  if record.user then redis.call('ZADD', prefix .. 'i:' .. record.user, 'XX', now + record.left, token) end
end

-- Lua's stack holds some thousand values, and a session may have more fields.
local function in_parts(command, key, first, last)
  for from = first, last, 1000 do
    redis.call(command, key, unpack(ARGV, from, math.min(from + 999, last)))
  end
end
