-- Takes every bucket's cost and the slot, or nothing.
-- KEYS: the buckets, then the slot if there is one.
-- ARGV: time or '', lapse, slack; size, refill, cost of each bucket; the slot's limit, its lease.
-- Gives {1 if admitted else 0, leases in use, the level of each bucket}.

local now, lapse, slack = clock(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local count = math.floor((#ARGV - 3) / 3)
local slot = KEYS[count + 1]

local admitted, in_use, buckets = true, 0, {}
for i = 1, count do
  local size, refill, cost = tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2]), tonumber(ARGV[3 * i + 3])
  local level = level_of(KEYS[i], size, refill, now)
  buckets[i] = {size = size, refill = refill, cost = cost, level = level}
  admitted = admitted and level + slack >= cost
end
if slot then
  in_use = redis.call('ZCOUNT', slot, '(' .. precise(now), '+inf')
  admitted = admitted and in_use < tonumber(ARGV[#ARGV - 1])
end

-- A refusal writes nothing: whoever keeps asking costs a replica or an append-only file nothing.
if admitted then
  for i, bucket in ipairs(buckets) do
    bucket.level = bucket.level - bucket.cost
    keep(KEYS[i], bucket.level, bucket.size, bucket.refill, now)
  end
  if slot then
    redis.call('ZREMRANGEBYSCORE', slot, '-inf', precise(now))
    in_use = in_use + redis.call('ZADD', slot, precise(now + lapse), ARGV[#ARGV])
    redis.call('PEXPIRE', slot, precise(lapse * 1000))
  end
end

local reply = {admitted and 1 or 0, in_use}
for _, bucket in ipairs(buckets) do
  reply[#reply + 1] = precise(bucket.level)
end
return reply
