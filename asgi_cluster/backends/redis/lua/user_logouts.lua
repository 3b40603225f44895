--! session
-- KEYS: epochs of users. Reply: {now, epoch…}, nil for a user who has none.
local found = {milliseconds()}
for i, key in ipairs(KEYS) do
  local epoch = redis.pcall('GET', key)
  found[i + 1] = type(epoch) == 'string' and epoch
end
return found
