-- Who waits, and in which order: the part of registry.lua that knows entries.

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

local function set_virtual(level, tag)
  redis.call('SET', key('virtual', level), string.format('%.0f', tag), 'PX', FAIR_MS)
end

-- Tags begin at the server's microseconds, so that the tags of a restarted server come after those
-- that it forgot.
local function virtual(level)
  local tag = tonumber(redis.call('GET', key('virtual', level)))
  if not tag then
    tag = micros
    set_virtual(level, tag)
  end
  return tag
end

-- The start tag of a tenant's next entry. An entry that left without a placement does not count.
local function next_tag(level, r)
  local served = tonumber(redis.call('ZSCORE', key('served', level), r.tenant) or '0')
  local tag = math.max(virtual(level), served)
  local last = redis.call('ZREVRANGEBYLEX', key('queued', r.tenant), '(' .. level .. ';',
    '[' .. level .. ':', 'LIMIT', 0, 1)[1]
  return last and math.max(tag, tag_of(last) + 1) or tag
end

-- Account for a placement. An entry that was placed before has an old tag and changes nothing.
local function serve(entry, r)
  local level, tag = level_of(entry), tag_of(entry)
  local served, from = key('served', level), math.max(virtual(level), tag)
  set_virtual(level, from)
  local before = tonumber(redis.call('ZSCORE', served, r.tenant) or '0')
  redis.call('ZADD', served, math.max(before, tag + 1), r.tenant)
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
