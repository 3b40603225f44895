-- In front of every session script. KEYS[1] is the session if nothing else is said, ARGV[1] what every key of
-- its bucket starts with. KEYS[2], its user's epoch, is there when a first try was UNSURE.
local GONE, CONFLICT, CORRUPT, UNSURE = 0, -1, -2, -3

local function milliseconds()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- What another command says of a key whose slot is moving away: not here any more. The caller tries again, as
-- it would have been asked to if the key had been in KEYS.
local function elsewhere(reply)
  if type(reply) == 'table' and reply.err and string.find(reply.err, 'non local', 1, true) then
    error({err = 'TRYAGAIN the slot of this session is moving'})
  end
  return reply
end

-- A record: its meta fields as they are, `left` milliseconds to live from `now`. Nil and GONE when there is
-- none, or its user was logged out everywhere: the epoch it was made under is not the user's any more. Nil
-- and CORRUPT when it cannot be understood. A missing epoch means revoked, unless it is only missing here,
-- because the slot is moving and the epoch has not moved yet. A script cannot decide that, the server can if the
-- epoch is in KEYS: nil and {UNSURE, user} asks the caller to come again with it.
local function living(key, prefix, now)
  local found = elsewhere(redis.pcall('HMGET', key, '@secret', '@abs', '@idle', '@user', '@epoch', '@write'))
  if found.err then
    if string.find(found.err, 'WRONGTYPE', 1, true) then return nil, CORRUPT end
    error(found)
  end
  local absolute, idle, user = tonumber(found[2]), tonumber(found[3]), found[4]
  if not (found[1] and absolute and idle) then
    return nil, redis.call('EXISTS', key) == 1 and CORRUPT or GONE
  end
  if user then
    local epoch = elsewhere(redis.pcall('GET', prefix .. 'e:' .. user))
    if not epoch and #KEYS == 1 then return nil, {UNSURE, user} end
    if epoch ~= found[5] then return nil, GONE end
  end
  local left = math.min(idle, absolute - now)
  if left <= 0 then return nil, GONE end
  return {secret = found[1], absolute = absolute, user = user, write = found[6], left = left}
end

-- The index follows as far as it is here: while the slot moves it may not be, and by then the record has been
-- written. It is never made anew, which would be in the way of the one that is coming. Its scores are for
-- pruning and may be behind.
local function index(prefix, token, record, now)
  redis.pcall('ZADD', prefix .. 'i:' .. record.user, 'XX', now + record.left, token)
end

-- PEXPIRE passes when memory is full, and after a first write so does what follows: a session need not die of
-- it.
local function extend(key, prefix, token, record, now)
  redis.call('PEXPIRE', key, record.left)
  redis.call('HSET', key, '@seen', now)
  if record.user then index(prefix, token, record, now) end
end

-- Lua's stack holds some thousand values, and a session may have more fields.
local function in_parts(command, key, items, first)
  for from = first, #items, 1000 do
    redis.call(command, key, unpack(items, from, math.min(from + 999, #items)))
  end
end

-- All fields of a record in two strings: their lengths, and what they hold.
local function packed(key)
  local fields, lengths = redis.call('HGETALL', key), {}
  for i = 1, #fields do lengths[i] = #fields[i] end
  return table.concat(lengths, ' '), table.concat(fields)
end
