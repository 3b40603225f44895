-- Apply one change to a board, atomically. Every change gets the next version of the whole board. By these numbers a browser finds
-- out whether it missed a change, and which of two changes is the later.
-- KEYS[1] the board: a hash of note id -> note as JSON, and "@version"
-- ARGV: action (add, edit, delete), note id, fields as JSON, most notes
local action, id, fields, most = ARGV[1], ARGV[2], cjson.decode(ARGV[3]), tonumber(ARGV[4])
local stored = redis.call('HGET', KEYS[1], id)
if action == 'add' then
  if stored then return {'exists'} end
  if redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], '@version') >= most then return {'full'} end
elseif not stored then
  return {'gone'}
end
local version = redis.call('HINCRBY', KEYS[1], '@version', 1)
if action == 'delete' then
  redis.call('HDEL', KEYS[1], id)
  return {'ok', cjson.encode({id = id, version = version})}
end
local note = stored and cjson.decode(stored) or {id = id}
for name, value in pairs(fields) do note[name] = value end
note.version = version
local encoded = cjson.encode(note)
redis.call('HSET', KEYS[1], id, encoded)
return {'ok', encoded}
