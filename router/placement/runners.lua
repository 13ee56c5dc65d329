-- Which runners there are: the part of registry.lua that hears them.

local function alive(id)
  return tonumber(redis.call('ZSCORE', RUNNERS, id) or '0') > now
end

-- The address of another live process with this id. A process that came back to its own address is
-- no rival: two cannot listen there.
local function rival(f)
  if f.instance == '' or not alive(f.id) then return nil end
  local s = redis.call('HMGET', key('runner', f.id), 'instance', 'address')
  if not s[1] or s[1] == '' or s[1] == f.instance or s[2] == f.address then return nil end
  return s[2]
end

-- If an unknown runner says that it drains, the server lost the mark: mark the runner again.
function commands.heartbeat(lease_ms, figures, record)
  local f = cjson.decode(figures)
  local other = rival(f)
  if other then return {'duplicate', other} end
  local known = alive(f.id)
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

-- Whether a runner was taken out. Only the process that registered may do so, if both give an
-- instance.
function commands.deregister(id, instance)
  local registered = redis.call('HGET', key('runner', id), 'instance') or ''
  if instance ~= '' and registered ~= '' and instance ~= registered then return 0 end
  redis.call('DEL', key('runner', id), key('drain', id))
  return redis.call('ZREM', RUNNERS, id)
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
