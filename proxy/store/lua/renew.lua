-- Makes leases last for another lapse, those that are gone included.
-- KEYS: slots. ARGV: time or '', lapse, for each slot its leases with spaces between.

local now, lapse = clock(ARGV[1]), tonumber(ARGV[2])
for i, slot in ipairs(KEYS) do
  for lease in ARGV[i + 2]:gmatch('%S+') do
    redis.call('ZADD', slot, precise(now + lapse), lease)
  end
  redis.call('PEXPIRE', slot, precise(lapse * 1000))
end
