--! session
-- ARGV: prefix, token, publish command, channel, message, registry key ('' elsewhere), expected write id ('' any).
-- Reply: {ended, nodes}; {0, {}, write id, lengths, contents} of its fields when another one was written and
-- nothing was done; or {-3, user} unsure.
local record, why = living(KEYS[1], ARGV[1], milliseconds())
if type(why) == 'table' then return why end
if record and ARGV[7] ~= '' and ARGV[7] ~= record.write then return {0, {}, record.write or '', packed(KEYS[1])} end
-- An end that was published has happened: nodes remember it, and act on it after a failover. So a server that
-- refuses writes (a replica, too few replicas) is to say so now; memory that is full is no reason.
redis.call('PEXPIRE', KEYS[1], record and record.left or 1000)
-- Published even when there is none: a node may still have it cached, or sockets of it open.
redis.call(ARGV[3], ARGV[4], ARGV[5])
-- Also what is not alive: a corrupt record, or one that a lost epoch has revoked, is not left lying about.
redis.call('DEL', KEYS[1])
-- As above: an entry that stays behind is pruned when its time is over, and nothing is listed without a
-- record.
if record and record.user then redis.pcall('ZREM', ARGV[1] .. 'i:' .. record.user, ARGV[2]) end
-- Read at the moment of the commit: a node that registers later starts with an empty cache.
return {record and 1 or 0, ARGV[6] ~= '' and redis.call('HKEYS', ARGV[6]) or {}}
