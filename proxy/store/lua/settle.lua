-- Gives the buckets' costs back, or takes more where one is negative, and ends the slot's lease.
-- KEYS: the buckets, then the slot if there is one.
-- ARGV: time or ''; size, refill, cost of each bucket; the slot's lease.

local now = clock(ARGV[1])
local count = math.floor((#ARGV - 1) / 3)
for i = 1, count do
  local size, refill, cost = tonumber(ARGV[3 * i - 1]), tonumber(ARGV[3 * i]), tonumber(ARGV[3 * i + 1])
  keep(KEYS[i], level_of(KEYS[i], size, refill, now) + cost, size, refill, now)
end
if KEYS[count + 1] then
  redis.call('ZREM', KEYS[count + 1], ARGV[#ARGV])
end
