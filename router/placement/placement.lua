-- Which runner takes a sequence: the part of registry.lua that places.

-- What placement needs of a runner's record; nil if the record is not whole.
local function candidate(id)
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

local function candidates()
  local list = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', RUNNERS, '(' .. now, '+inf')) do
    table.insert(list, candidate(id))
  end
  return list
end

-- Whether a runner could ever serve a request's adapter. A limit of 0: the runner did not say.
local function serves(f, r)
  return (f.max_rank == 0 or r.rank <= f.max_rank)
    and (f.max_elements == 0 or r.elements <= f.max_elements)
end

-- Nil if a runner could serve a request's adapter, else the fleet's largest rank and size. Only new
-- sequences are refused. A sequence that was placed before waits for a runner to come back.
local function beyond(fleet, r)
  local rank, elements, any = 0, 0, false
  for _, f in ipairs(fleet) do
    if serves(f, r) then return nil end
    rank, elements, any = math.max(rank, f.max_rank), math.max(elements, f.max_elements), true
  end
  return any and {rank, elements} or nil
end

-- Sets f.size and f.pages. Returns whether f can take `tokens` now. A runner without sequences has
-- all pages free or reclaimable, whatever it said last.
local function has_room(f, tokens)
  if f.draining then return false end
  f.size = holding(key('reserved', f.id))
  f.pages = math.ceil(math.min(tokens, f.max_context) / f.page_tokens)
  return f.size < f.max_batch and (f.size == 0 or f.available >= f.pages)
end

-- Runners that just sent the sequence back come last. Before them come, if the sequence needs an
-- adapter, runners that cannot load adapters.
local function reluctance(f, r, avoid)
  return (avoid[f.id] and 2 or 0) + (r.adapter and f.trouble and 1 or 0)
end

local function better(f, rival)
  if not rival then return true end
  if f.reluctance ~= rival.reluctance then return f.reluctance < rival.reluctance end
  if f.size ~= rival.size then return f.size > rival.size end
  return f.id > rival.id
end

-- The best runner with room: the largest working set, ties to the highest id. If none serves, the
-- reason: 'unreachable', 'limits', or nil: no runner has room.
local function best(fleet, r)
  local avoid, unreachable = set_of(r.avoid), set_of(r.unreachable)
  local chosen, unusable
  for _, f in ipairs(fleet) do
    if has_room(f, r.tokens) then
      if not serves(f, r) then
        unusable = unusable or 'limits'
      elseif unreachable[f.id] then
        unusable = 'unreachable'
      else
        f.reluctance = reluctance(f, r, avoid)
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

-- The same call may come again, because its answer was lost. It gets the same answer while the
-- reservation holds.
local function again(r, asked, runner, asked_before, entry, pages)
  if not runner or asked_before ~= asked then return nil end
  local ends = tonumber(redis.call('ZSCORE', key('reserved', runner), r.id) or '0')
  local address = redis.call('HGET', key('runner', runner), 'address')
  if ends <= now or not address then return nil end
  reserve(runner, r.id, r.tenant, r.lease_ms)
  return {'placed', entry, runner, address, tonumber(pages)}
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

-- Which bound keeps a newcomer out of the queue, or nil. A full queue still takes one entry of each
-- tenant that has none, up to twice its bound. So a tenant that fills it keeps nobody else out.
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

-- Place the entry if it is its turn. Else return why free room does not suit it, if there is any.
local function try(r, asked, entry, fleet)
  if capped(r) then return nil, 'running' end
  local first = redis.call('ZRANGE', QUEUE, 0, 0)[1]
  if first and entry > first then return nil end
  local runner, unusable = best(fleet or candidates(), r)
  if not runner then return nil, unusable end
  return take(runner, r, asked, entry)
end

function commands.place(request)
  local r = cjson.decode(request)
  local asked = r.entry ~= cjson.null and r.entry or ''
  local s = redis.call('HMGET', key('sequence', r.id), 'gone', 'runner', 'asked', 'entry', 'pages')
  if s[1] then return {'gone'} end
  local before = again(r, asked, s[2], s[3], s[4], s[5])
  if before then return before end
  lapse_entries()
  local entry, fleet = asked, nil
  if asked == '' then
    entry, fleet = s[4] or new_entry(r), candidates()
    local largest = not r.admitted and beyond(fleet, r)
    if largest then return {'unservable', entry, largest[1], largest[2]} end
  end
  local placed, aside = try(r, asked, entry, fleet)
  if placed then return placed end
  local newcomer = asked == '' and not r.admitted and not redis.call('ZSCORE', WAITING, entry)
  local refused = newcomer and bound(r)
  if refused then return {refused, entry} end
  wait(entry, r.entry_ms, aside)
  note(r, asked, entry)
  return {aside or 'queued', entry, live()}
end
