-- KEYS[1] presence; ARGV: client, entry, ttl, limit ('' none), and what the entries begin with that do not count
-- for the limit. One call, so that no presence is left without an end, and none enters above the limit.
-- Reply: 1, or 0 when the limit is reached.
if ARGV[4] ~= '' and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  local count, limit = redis.call('HLEN', KEYS[1]), tonumber(ARGV[4])
  if count >= limit and #ARGV > 4 then
    for _, entry in ipairs(redis.call('HVALS', KEYS[1])) do
      for i = 5, #ARGV do
        if string.sub(entry, 1, #ARGV[i]) == ARGV[i] then
          count = count - 1
          break
        end
      end
    end
  end
  if count >= limit then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
