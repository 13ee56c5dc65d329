-- What routers hold until they let go: the part of registry.lua that renews and releases.

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

-- Undo a `place` with a lost answer. If that `place` has not run yet, it will do nothing.
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
