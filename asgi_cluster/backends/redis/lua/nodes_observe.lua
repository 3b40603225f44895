-- KEYS[1] registry; ARGV[1] what beat keys start with. Reply: {now, {node, info, pttl}…}
local time = redis.call('TIME')
local found, all = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  found[#found + 1] = {all[i], all[i + 1], redis.call('PTTL', ARGV[1] .. all[i])}
end
return {time[1] * 1000 + math.floor(time[2] / 1000), found}
