-- In front of the scripts for a room's history. KEYS[1] is its log, KEYS[2] its meta.

-- Which line of history this server writes. It changes with a restart and with a promotion, which is when
-- last writes can have been lost; the run id would not when an old primary takes over again. Asked here and
-- not sent by the caller, which may not have noticed yet that this is another server.
local function lineage()
  return string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or 'unknown'
end

-- The room's numbering: its epoch, its last offset and the lineage that gave it out. `epoch` is for a room
-- that has none: a log whose numbering is lost is worth nothing. No lineage has given out its next number, as
-- there may have been a numbering of the same epoch before.
local function numbering(epoch)
  local meta = redis.pcall('HMGET', KEYS[2], 'epoch', 'offset', 'run')
  local offset = not meta.err and meta[2] and string.match(meta[2], '^%d+$') and tonumber(meta[2])
  -- What was tampered with counts as lost. The epoch travels between spaces.
  if offset and offset <= 2 ^ 53 and meta[1] and string.match(meta[1], '^[%w_-]+$') then
    return meta[1], offset, meta[3] or ''
  end
  redis.call('DEL', KEYS[1], KEYS[2])
  return epoch, 0, ''
end

local function keep(epoch, offset, run, ttl)
  redis.call('HSET', KEYS[2], 'epoch', epoch, 'offset', string.format('%.0f', offset), 'run', run)
  redis.call('PEXPIRE', KEYS[2], ttl)
end
