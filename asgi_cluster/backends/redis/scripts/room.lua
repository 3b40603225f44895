-- In front of the scripts for a room's history. KEYS[1] is its log, KEYS[2] its meta.

-- Which line of history this server writes. It changes with a restart and with a promotion, which is when
-- last writes can have been lost; the run id would not when an old primary takes over again. Asked here and
-- not told by the caller, who may not yet know that it talks to another server.
local function lineage()
  return string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or 'unknown'
end

-- The room's numbering: its epoch, its last offset and the lineage that gave it out. `epoch` is for a room
-- that has none: a log whose numbering is lost is worth nothing.
local function numbering(epoch)
  local meta = redis.pcall('HMGET', KEYS[2], 'epoch', 'offset', 'run')
  local offset = not meta.err and tonumber(meta[2])
  if offset and meta[1] then return meta[1], offset, meta[3] end
  redis.call('DEL', KEYS[1], KEYS[2])
  return epoch, 0, lineage()
end

local function keep(epoch, offset, run, ttl)
  redis.call('HSET', KEYS[2], 'epoch', epoch, 'offset', string.format('%.0f', offset), 'run', run)
  redis.call('PEXPIRE', KEYS[2], ttl)
end
