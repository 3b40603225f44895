-- KEYS[1] presence; ARGV[1] what the entries of the dead incarnation start with. Reply: {client, entry, …}
-- that this call removed.
local removed, all = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  if string.sub(all[i + 1], 1, #ARGV[1]) == ARGV[1] and redis.call('HDEL', KEYS[1], all[i]) == 1 then
    removed[#removed + 1] = all[i]
    removed[#removed + 1] = all[i + 1]
  end
end
return removed
