-- The registry's keys and its read-modify-writes; registry.py calls it as
--
--     EVALSHA sha 1 prefix number command argument...
--
-- and gets the number back before the result, so that it knows an answer that is another call's.
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
--   queue              zset   those in the order of turns, score 0; others stand aside, so that they
--                             block nobody: no room that is free now is for them
--   queued:TENANT      zset   the tenant's entries in `waiting`, score 0
--   virtual:LEVEL      string the start tag of the entry placed last, of one priority
--   served:LEVEL       zset   tenant -> the finish tag of its entry placed last, if above `virtual`
--   clock              string the last arrival's number
--   claim:NAME         string who holds it
--   room               channel: there may be room for whoever waits
--
-- An entry is LEVEL:TAG:ARRIVAL:TENANT/ID. LEVEL falls with priority; the numbers have a fixed width,
-- so that entries sort as strings. TAG is that of start-time fair queuing (Goyal et al. 1996): it
-- begins where the tenant's last entry finishes, 1 / weight after that one's tag, and never before
-- the tag placed last. So of two tenants, one with 500 entries and one with a single new one, the
-- new one is next after at most one placement for each tenant that has entries waiting.

local prefix, number, command = KEYS[1], ARGV[1], ARGV[2]
local time = redis.call('TIME')
local micros = time[1] * 1000000 + time[2]
local now = math.floor(micros / 1000)

local DRAIN_MS = 3600 * 1000 -- outlives a runner's restart, not its removal

local FAIR_MS = 3600 * 1000 -- longer than anyone waits in the queue
local COST = 1000 -- tags per placement of weight 1. Tags begin at the server's microseconds, so that
-- those of a restarted server come after those it forgot.

local function key(...) return prefix .. ':' .. table.concat({...}, ':') end
local RUNNERS, QUEUE, WAITING = key('runners'), key('queue'), key('waiting')

local function tenant_of(entry) return string.match(entry, '^%d+:%d+:%d+:([^/]*)/') or '' end
local function level_of(entry) return string.sub(entry, 1, 10) end
local function tag_of(entry) return tonumber(string.sub(entry, 12, 28)) or 0 end

local function leave(entry)
  redis.call('ZREM', key('queued', tenant_of(entry)), entry)
  redis.call('ZREM', WAITING, entry)
  return redis.call('ZREM', QUEUE, entry)
end

local function announce()
  if redis.call('ZCARD', WAITING) > 0 then redis.call('PUBLISH', key('room'), '') end
end

-- Keep an entry waiting for another lease. Whoever steps aside lets others try.
local function wait(entry, lease_ms, aside)
  local queued = key('queued', tenant_of(entry))
  redis.call('ZADD', WAITING, now + lease_ms, entry)
  redis.call('ZADD', queued, 0, entry)
  redis.call('PEXPIRE', queued, 2 * lease_ms)
  if not aside then
    redis.call('ZADD', QUEUE, 0, entry)
  elseif redis.call('ZREM', QUEUE, entry) == 1 then
    announce()
  end
end

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

-- The figures of a runner that placement needs; nil if its record is not whole.
local function figures(id)
  local f = redis.call('HMGET', key('runner', id), 'max_batch', 'available_pages', 'pages_since',
    'page_tokens', 'max_context', 'max_rank', 'max_elements', 'draining', 'trouble')
  for i = 1, 7 do
    f[i] = tonumber(f[i])
    if not f[i] then return nil end
  end
  return {id = id, max_batch = f[1], available = f[2] - f[3], page_tokens = f[4], max_context = f[5],
    max_rank = f[6], max_elements = f[7], trouble = f[9] == '1',
    draining = f[8] == '1' or redis.call('EXISTS', key('drain', id)) == 1}
end

local function live_figures()
  local list = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', RUNNERS, '(' .. now, '+inf')) do
    table.insert(list, figures(id))
  end
  return list
end

-- Whether a runner could ever serve a request's adapter; a limit of 0 is not known.
local function serves(f, r)
  return (f.max_rank == 0 or r.rank <= f.max_rank)
    and (f.max_elements == 0 or r.elements <= f.max_elements)
end

-- Nil if a runner could serve a request's adapter, else the fleet's largest rank and size.
local function beyond(fleet, r)
  local rank, elements, any = 0, 0, false
  for _, f in ipairs(fleet) do
    if serves(f, r) then return nil end
    rank, elements, any = math.max(rank, f.max_rank), math.max(elements, f.max_elements), true
  end
  return any and {rank, elements} or nil
end

-- Sets size and pages of a runner that can take `tokens` now. Pages of a runner without sequences
-- are all free or reclaimable, whatever it said last.
local function has_room(f, tokens)
  if f.draining then return false end
  f.size = holding(key('reserved', f.id))
  f.pages = math.ceil(math.min(tokens, f.max_context) / f.page_tokens)
  return f.size < f.max_batch and (f.size == 0 or f.available >= f.pages)
end

-- Those that just sent the sequence back come last, those that cannot load adapters before them.
local function reluctance(f, r, exclude)
  return (exclude[f.id] and 2 or 0) + (r.adapter and f.trouble and 1 or 0)
end

local function better(f, rival)
  if not rival then return true end
  if f.reluctance ~= rival.reluctance then return f.reluctance < rival.reluctance end
  if f.size ~= rival.size then return f.size > rival.size end
  return f.id > rival.id
end

-- The largest working set with room, ties to the highest id. Without one, why the room that there is
-- does not serve: 'unreachable' by this router, beyond the runners' 'limits', or nil: there is none.
local function best(fleet, r)
  local exclude, avoid = set_of(r.exclude), set_of(r.avoid)
  local chosen, unusable
  for _, f in ipairs(fleet) do
    if has_room(f, r.tokens) then
      if not serves(f, r) then
        unusable = unusable or 'limits'
      elseif avoid[f.id] then
        unusable = 'unreachable'
      else
        f.reluctance = reluctance(f, r, exclude)
        if better(f, chosen) then chosen = f end
      end
    end
  end
  return chosen, unusable
end

local function reserve(runner, member, tenant, lease_ms)
  for _, leases in ipairs({key('reserved', runner), key('running', tenant)}) do
    redis.call('ZADD', leases, now + lease_ms, member)
    redis.call('PEXPIRE', leases, 2 * lease_ms)
  end
end

local function virtual(level)
  redis.call('SET', key('virtual', level), string.format('%.0f', micros), 'NX')
  redis.call('PEXPIRE', key('virtual', level), FAIR_MS)
  return tonumber(redis.call('GET', key('virtual', level)))
end

local function cost(r) return math.max(1, math.floor(COST / r.weight)) end

-- The start tag of a tenant's next entry. What left the queue unplaced has cost nothing.
local function next_tag(level, r)
  local served = tonumber(redis.call('ZSCORE', key('served', level), r.tenant) or '0')
  local tag = math.max(virtual(level), served)
  local last = redis.call('ZREVRANGEBYLEX', key('queued', r.tenant), '(' .. level .. ';',
    '[' .. level .. ':', 'LIMIT', 0, 1)[1]
  return last and math.max(tag, tag_of(last) + cost(r)) or tag
end

-- Account for a placement. An entry that was placed before has an old tag and changes nothing.
local function serve(entry, r)
  local level, tag = level_of(entry), tag_of(entry)
  local served, from = key('served', level), math.max(virtual(level), tag)
  redis.call('SET', key('virtual', level), string.format('%.0f', from), 'PX', FAIR_MS)
  local before = tonumber(redis.call('ZSCORE', served, r.tenant) or '0')
  redis.call('ZADD', served, math.max(before, tag + cost(r)), r.tenant)
  redis.call('ZREMRANGEBYSCORE', served, '-inf', string.format('%.0f', from))
  redis.call('PEXPIRE', served, FAIR_MS)
end

local function new_entry(r)
  local clock = key('clock')
  local arrival = math.max(micros, tonumber(redis.call('GET', clock) or '0') + 1)
  redis.call('SET', clock, string.format('%.0f', arrival))
  local level = string.format('%010.0f', 2147483647 - r.priority)
  return string.format('%s:%017.0f:%017.0f:%s/%s', level, next_tag(level, r), arrival, r.tenant, r.id)
end

local function lapse_entries()
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', WAITING, '-inf', now)) do leave(entry) end
end

local commands = {}

-- The same call again, whose answer was lost, gets the same answer while its reservation holds.
local function placed_before(r, asked)
  local s = redis.call('HMGET', key('sequence', r.id), 'runner', 'asked', 'entry', 'pages')
  if not s[1] or s[2] ~= asked then return nil end
  local ends = tonumber(redis.call('ZSCORE', key('reserved', s[1]), r.id) or '0')
  local address = redis.call('HGET', key('runner', s[1]), 'address')
  if ends <= now or not address then return nil end
  reserve(s[1], r.id, r.tenant, r.lease_ms)
  return {'placed', s[3], s[1], address, tonumber(s[4])}
end

local function note(r, asked, entry, ...)
  local record = key('sequence', r.id)
  redis.call('HSET', record, 'asked', asked, 'entry', entry, 'tenant', r.tenant, ...)
  redis.call('PEXPIRE', record, r.lease_ms)
end

local function take(f, r, asked, entry)
  leave(entry)
  serve(entry, r)
  reserve(f.id, r.id, r.tenant, r.lease_ms)
  redis.call('HINCRBY', key('runner', f.id), 'pages_since', f.pages)
  note(r, asked, entry, 'runner', f.id, 'pages', f.pages)
  announce()
  return {'placed', entry, f.id, redis.call('HGET', key('runner', f.id), 'address'), f.pages}
end

-- Which bound keeps a newcomer out of the queue, or nil. A full queue still takes a first entry of
-- a tenant that has none, up to twice its bound: who filled it keeps nobody else out.
local function bound(r)
  local own = redis.call('ZCARD', key('queued', r.tenant))
  if own >= r.max_queued then return 'tenant_full' end
  local all = redis.call('ZCARD', WAITING)
  if all >= r.max_queue and (own > 0 or all >= 2 * r.max_queue) then return 'full' end
  return nil
end

local function capped(r)
  return r.max_running > 0 and holding(key('running', r.tenant)) >= r.max_running
end

function commands.place(request)
  local r = cjson.decode(request)
  if redis.call('HEXISTS', key('sequence', r.id), 'gone') == 1 then return {'gone'} end
  local asked = r.entry ~= cjson.null and r.entry or ''
  local before = placed_before(r, asked)
  if before then return before end
  lapse_entries()
  local entry = asked ~= '' and asked or redis.call('HGET', key('sequence', r.id), 'entry')
    or new_entry(r)
  local fleet = live_figures()
  local largest = beyond(fleet, r)
  if largest then
    leave(entry)
    return {'unservable', entry, largest[1], largest[2]}
  end
  local first, aside = redis.call('ZRANGE', QUEUE, 0, 0)[1], nil
  if capped(r) then
    aside = 'running'
  elseif not first or entry <= first then
    local runner, unusable = best(fleet, r)
    if runner then return take(runner, r, asked, entry) end
    aside = unusable
  end
  local newcomer = asked == '' and not redis.call('ZSCORE', WAITING, entry)
  local refused = newcomer and bound(r)
  if refused then return {refused, entry, live()} end
  wait(entry, r.entry_ms, aside)
  note(r, asked, entry)
  return {aside or 'queued', entry, live()}
end

local function claim(name, owner, lease_ms)
  local claimed = redis.call('GET', key('claim', name))
  if claimed and claimed ~= owner then return 0 end
  redis.call('SET', key('claim', name), owner, 'PX', lease_ms)
  return 1
end

commands.claim = claim

local renewals = {
  reservation = function(l, lease_ms) reserve(l.name, l.member, l.tenant, lease_ms) end,
  claim = function(l, lease_ms) claim(l.name, l.member, lease_ms) end,
  entry = function(l, _, entry_ms)
    local known = redis.call('ZSCORE', WAITING, l.member)
    wait(l.member, entry_ms, known and not redis.call('ZSCORE', QUEUE, l.member))
  end,
}

-- Also re-creates what a restarted, empty server has lost.
function commands.renew(lease_ms, entry_ms, leases)
  for _, l in ipairs(cjson.decode(leases)) do
    renewals[l.kind](l, tonumber(lease_ms), tonumber(entry_ms))
  end
end

local releases = {
  reservation = function(l)
    redis.call('ZREM', key('running', l.tenant), l.member)
    redis.call('DEL', key('sequence', l.member))
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

-- Whatever a `place` did whose answer nobody has; one that is still on its way will do nothing.
function releases.sequence(l, lease_ms)
  local record = key('sequence', l.member)
  local s = redis.call('HMGET', record, 'runner', 'pages', 'tenant', 'entry')
  if s[1] then
    releases.reservation({name = s[1], member = l.member, pages = tonumber(s[2]), tenant = s[3]})
  end
  if s[4] then leave(s[4]) end
  if l.name ~= '' then leave(l.name) end
  redis.call('DEL', record)
  redis.call('HSET', record, 'gone', '1')
  redis.call('PEXPIRE', record, lease_ms)
end

function commands.release(lease_ms, leases)
  for _, l in ipairs(cjson.decode(leases)) do releases[l.kind](l, tonumber(lease_ms)) end
  announce()
end

-- Where another process with this id lives. One that came back to its own address is no rival: two
-- cannot listen there.
local function rival(f)
  if (tonumber(redis.call('ZSCORE', RUNNERS, f.id) or '0')) <= now or f.instance == '' then
    return nil
  end
  local s = redis.call('HMGET', key('runner', f.id), 'instance', 'address')
  if not s[1] or s[1] == '' or s[1] == f.instance or s[2] == f.address then return nil end
  return s[2]
end

-- A draining runner that nobody knows was drained before the server lost its memory.
function commands.heartbeat(lease_ms, figures, record)
  local f = cjson.decode(figures)
  local other = rival(f)
  if other then return {'duplicate', other} end
  local known = tonumber(redis.call('ZSCORE', RUNNERS, f.id) or '0') > now
  local drain = key('drain', f.id)
  if f.draining and not known then redis.call('SET', drain, '1') end
  redis.call('HSET', key('runner', f.id), 'record', record, 'address', f.address, 'beat', now,
    'max_batch', f.max_batch, 'available_pages', f.available_pages, 'pages_since', 0,
    'page_tokens', f.page_tokens, 'max_context', f.max_context,
    'max_rank', f.max_rank, 'max_elements', f.max_elements, 'instance', f.instance,
    'draining', f.draining and '1' or '0', 'trouble', f.trouble and '1' or '0')
  redis.call('PEXPIRE', key('runner', f.id), lease_ms)
  redis.call('ZREMRANGEBYSCORE', RUNNERS, '-inf', now)
  redis.call('ZADD', RUNNERS, now + lease_ms, f.id)
  announce()
  return {'registered', redis.call('PEXPIRE', drain, DRAIN_MS)}
end

-- Only by the process that registered, where both say which one they are.
function commands.deregister(id, instance)
  local registered = redis.call('HGET', key('runner', id), 'instance') or ''
  if instance ~= '' and registered ~= '' and instance ~= registered then return end
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
      table.insert(list, {f[1], holding(key('reserved', id)), now - (tonumber(f[2]) or now), drain})
    end
  end
  return list
end

return {number, commands[command](unpack(ARGV, 3))}
