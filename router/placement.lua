-- Which runner takes a sequence: the part of registry.lua that places.

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

-- Nil if a runner could serve a request's adapter, else the fleet's largest rank and size. Asked of
-- newcomers alone: what was admitted before waits for a runner that may come back.
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
  local largest = asked == '' and beyond(fleet, r)
  if largest then return {'unservable', entry, largest[1], largest[2]} end
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
