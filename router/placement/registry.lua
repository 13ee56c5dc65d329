-- The registry's keys, and what all parts of its script share; registry.py calls it as
--
--     EVALSHA sha 1 prefix number command argument...
--
-- It returns the number first, so that registry.py recognises another call's answer.
-- Time is the server's. Everything ends with a lease, so that nothing outlives its owner:
--
--   runners            zset   runner id -> its lease's end
--   runner:ID          hash   the last heartbeat; pages_since: pages reserved, less given back, since
--   drain:ID           string an operator asked the runner to drain
--   reserved:ID        zset   sequence -> its reservation's end; its size is the working set
--   running:TENANT     zset   the tenant's sequences with a reservation -> their ends
--   sequence:ID        hash   what `place` did for it: entry, asked (the entry it came with), runner,
--                             pages, tenant; or gone: its router let go of it before it answered
--   waiting            zset   entries of all who wait -> their leases' ends
--   queue              zset   the entries of `waiting` that take turns, in order, score 0; others
--                             stand aside, because no room that is free now is for them
--   queued:TENANT      zset   the tenant's entries in `waiting`, score 0
--   virtual:LEVEL      string the start tag of the entry placed last, of one priority
--   served:LEVEL       zset   tenant -> the finish tag of its entry placed last, if above `virtual`
--   clock              string the last arrival's number
--   claim:NAME         string who holds it
--   room               channel: there may be room for whoever waits
--
-- An entry is LEVEL:TAG:ARRIVAL:TENANT/ID. LEVEL falls with priority; the numbers have a fixed width,
-- so that entries sort as strings. TAG is that of start-time fair queuing (Goyal et al. 1996): a
-- tenant's next tag is its last tag + 1, and at least the tag placed last. So if one tenant has 500
-- entries and another has a single new one, the new one is next after at most one placement for
-- each tenant that has entries waiting.

local prefix, number, command = KEYS[1], ARGV[1], ARGV[2]
local time = redis.call('TIME')
local micros = time[1] * 1000000 + time[2]
local now = math.floor(micros / 1000)

local DRAIN_MS = 3600 * 1000 -- survives a runner's crash, not its deregistration

local FAIR_MS = 3600 * 1000 -- longer than anyone waits in the queue

local function key(...) return prefix .. ':' .. table.concat({...}, ':') end
local RUNNERS, QUEUE, WAITING = key('runners'), key('queue'), key('waiting')

local commands = {}

local function live() return redis.call('ZCOUNT', RUNNERS, '(' .. now, '+inf') end

local function set_of(list)
  local set = {}
  for _, item in ipairs(list) do set[item] = true end
  return set
end

-- How many of a set of leases hold: of reservations on a runner, its working set.
local function holding(leases)
  redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)
  return redis.call('ZCARD', leases)
end
