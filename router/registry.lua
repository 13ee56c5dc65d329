-- The registry's keys and its read-modify-writes; registry.py calls it as
--
--     EVALSHA sha 1 prefix command argument...
--
-- Time is the server's. Everything ends with a lease, so that nothing outlives its owner:
--
--   runners            zset   runner id -> its lease's end
--   runner:ID          hash   the last heartbeat; pages_since: pages reserved, less given back, since
--   drain:ID           string an operator asked the runner to drain
--   reserved:ID        zset   sequence -> its reservation's end; its size is the working set
--   queue              zset   entries, score 0: ordered by priority, then arrival
--   waiting            zset   the same entries -> their leases' ends
--   clock              string the last arrival's number
--   claim:NAME         string who holds it
--   room               channel: there may be room for whoever waits

local prefix, command = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local micros = time[1] * 1000000 + time[2]
local now = math.floor(micros / 1000)

local DRAIN_MS = 3600 * 1000 -- outlives a runner's restart, not its removal

local function key(...) return prefix .. ':' .. table.concat({...}, ':') end
local RUNNERS, QUEUE, WAITING = key('runners'), key('queue'), key('waiting')

local function leave(entry)
  redis.call('ZREM', WAITING, entry)
  return redis.call('ZREM', QUEUE, entry)
end

local function announce()
  if redis.call('ZCARD', QUEUE) > 0 then redis.call('PUBLISH', key('room'), '') end
end

local function live() return redis.call('ZCOUNT', RUNNERS, '(' .. now, '+inf') end

local function set_of(list)
  local set = {}
  for _, item in ipairs(list) do set[item] = true end
  return set
end

-- The working set of a runner: its unexpired reservations.
local function working_set(id)
  local reserved = key('reserved', id)
  redis.call('ZREMRANGEBYSCORE', reserved, '-inf', now)
  return redis.call('ZCARD', reserved)
end

-- The runner's id, size and pages needed if it can take a sequence of `tokens`, else nil. Pages of
-- a runner without sequences are all free or reclaimable, whatever it said last.
local function room(id, tokens)
  local f = redis.call('HMGET', key('runner', id), 'max_batch', 'available_pages', 'pages_since',
    'page_tokens', 'max_context', 'draining')
  if not f[1] or f[6] == '1' or redis.call('EXISTS', key('drain', id)) == 1 then return nil end
  local size = working_set(id)
  local pages = math.ceil(math.min(tokens, tonumber(f[5])) / tonumber(f[4]))
  local fits = size == 0 or tonumber(f[2]) - tonumber(f[3]) >= pages
  if size < tonumber(f[1]) and fits then return {id = id, size = size, pages = pages} end
  return nil
end

-- The largest working set with room, ties to the highest id; those to exclude only for want of
-- others. The second result: whether a runner to avoid has room.
local function best(tokens, exclude, avoid)
  local chosen, fallback, avoided
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', RUNNERS, '(' .. now, '+inf')) do
    local r = room(id, tokens)
    if r and avoid[id] then
      avoided = true
    elseif r then
      local rival = exclude[id] and fallback or not exclude[id] and chosen
      if not rival or r.size > rival.size or (r.size == rival.size and r.id > rival.id) then
        if exclude[id] then fallback = r else chosen = r end
      end
    end
  end
  return chosen or fallback, avoided
end

local function reserve(runner, member, lease_ms)
  local reserved = key('reserved', runner)
  redis.call('ZADD', reserved, now + lease_ms, member)
  redis.call('PEXPIRE', reserved, 2 * lease_ms)
end

local function new_entry(priority, id)
  local clock = key('clock')
  local arrival = math.max(micros, tonumber(redis.call('GET', clock) or '0') + 1)
  redis.call('SET', clock, string.format('%.0f', arrival))
  return string.format('%010.0f:%017.0f:%s', 2147483647 - priority, arrival, id)
end

local function lapse_entries()
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', WAITING, '-inf', now)) do leave(entry) end
end

local commands = {}

function commands.place(request)
  local r = cjson.decode(request)
  lapse_entries()
  local entry = r.entry ~= cjson.null and r.entry or new_entry(r.priority, r.id)
  local first = redis.call('ZRANGE', QUEUE, 0, 0)[1]
  if not first or entry <= first then
    local runner, avoided = best(r.tokens, set_of(r.exclude), set_of(r.avoid))
    if runner then
      leave(entry)
      reserve(runner.id, r.id, r.lease_ms)
      redis.call('HINCRBY', key('runner', runner.id), 'pages_since', runner.pages)
      announce()
      local address = redis.call('HGET', key('runner', runner.id), 'address')
      return {'placed', entry, runner.id, address, runner.pages}
    end
    if avoided then
      leave(entry)
      announce()
      return {'unreachable', entry, live()}
    end
  end
  if r.entry == cjson.null and redis.call('ZCARD', QUEUE) >= r.max_queue then
    return {'full', entry, live()}
  end
  redis.call('ZADD', QUEUE, 0, entry)
  redis.call('ZADD', WAITING, now + r.lease_ms, entry)
  return {'queued', entry, live()}
end

local function claim(name, owner, lease_ms)
  local claimed = redis.call('GET', key('claim', name))
  if claimed and claimed ~= owner then return 0 end
  redis.call('SET', key('claim', name), owner, 'PX', lease_ms)
  return 1
end

commands.claim = claim

local renewals = {
  reservation = function(l, lease_ms) reserve(l.name, l.member, lease_ms) end,
  claim = function(l, lease_ms) claim(l.name, l.member, lease_ms) end,
  entry = function(l, lease_ms)
    redis.call('ZADD', QUEUE, 0, l.member)
    redis.call('ZADD', WAITING, now + lease_ms, l.member)
  end,
}

-- Also re-creates what a restarted, empty server has lost.
function commands.renew(lease_ms, leases)
  for _, l in ipairs(cjson.decode(leases)) do renewals[l.kind](l, tonumber(lease_ms)) end
end

local releases = {
  reservation = function(l)
    if redis.call('ZREM', key('reserved', l.name), l.member) == 0 then return end
    if redis.call('EXISTS', key('runner', l.name)) == 1 then
      redis.call('HINCRBY', key('runner', l.name), 'pages_since', -l.pages)
    end
  end,
  claim = function(l)
    if redis.call('GET', key('claim', l.name)) == l.member then
      redis.call('DEL', key('claim', l.name))
    end
  end,
  entry = function(l) leave(l.member) end,
}

function commands.release(leases)
  for _, l in ipairs(cjson.decode(leases)) do releases[l.kind](l) end
  announce()
end

-- A draining runner that nobody knows was drained before the server lost its memory.
function commands.heartbeat(lease_ms, figures, record)
  local f = cjson.decode(figures)
  local known = tonumber(redis.call('ZSCORE', RUNNERS, f.id) or '0') > now
  local drain = key('drain', f.id)
  if f.draining and not known then redis.call('SET', drain, '1') end
  redis.call('HSET', key('runner', f.id), 'record', record, 'address', f.address, 'beat', now,
    'max_batch', f.max_batch, 'available_pages', f.available_pages, 'pages_since', 0,
    'page_tokens', f.page_tokens, 'max_context', f.max_context,
    'draining', f.draining and '1' or '0')
  redis.call('PEXPIRE', key('runner', f.id), lease_ms)
  redis.call('ZREMRANGEBYSCORE', RUNNERS, '-inf', now)
  redis.call('ZADD', RUNNERS, now + lease_ms, f.id)
  announce()
  return redis.call('PEXPIRE', drain, DRAIN_MS)
end

function commands.deregister(id)
  redis.call('DEL', key('runner', id), key('drain', id))
  redis.call('ZREM', RUNNERS, id)
end

local function alive(id)
  return tonumber(redis.call('ZSCORE', RUNNERS, id) or '0') > now
end

function commands.alive(id) return alive(id) and 1 or 0 end

function commands.drain(id)
  if not alive(id) then return 0 end
  redis.call('SET', key('drain', id), '1', 'PX', DRAIN_MS)
  return 1
end

function commands.resume(id)
  redis.call('DEL', key('drain', id))
  announce()
  return alive(id) and 1 or 0
end

function commands.runners()
  local list = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', RUNNERS, '(' .. now, '+inf')) do
    local f = redis.call('HMGET', key('runner', id), 'record', 'beat')
    if f[1] then
      local drain = redis.call('EXISTS', key('drain', id))
      table.insert(list, {f[1], working_set(id), now - tonumber(f[2]), drain})
    end
  end
  return list
end

return commands[command](unpack(ARGV, 2))
