-- What all scripts share. A bucket is kept as the text "level at": what it held at a time, in
-- seconds. A full one has no key. A slot is a sorted set of leases by the time when they lapse.
-- Numbers are written with 17 digits, or Lua would round them to 14.

-- Seconds by which a bucket's key outlives its debt: after a failover, keys expire by another
-- machine's clock.
local SPARE = 10

-- Redis' own time, one clock for all who count here, unless the caller brought a time.
local function clock(given)
  if given ~= '' then
    return tonumber(given)
  end
  local time = redis.call('TIME')
  return time[1] + time[2] / 1e6
end

local function precise(number)
  return string.format('%.17g', number)
end

local function level_of(key, size, refill, now)
  local kept = redis.call('GET', key)
  if not kept then
    return size
  end
  local level, at = kept:match('^(%S+) (%S+)$')
  -- The clock may have been set back: then nothing is refilled until it is where it was.
  return math.min(size, level + math.max(0, now - at) * refill)
end

local function keep(key, level, size, refill, now)
  if level >= size then
    redis.call('DEL', key)
  else
    local milliseconds = math.ceil(((size - level) / refill + SPARE) * 1000)
    redis.call('SET', key, precise(level) .. ' ' .. precise(now), 'PX', precise(milliseconds))
  end
end
