#!lua name=laps_inspection
--[[
Consistent readings of a pool: what redis-cli shows, in one call. Nothing here writes. The keys
are listed in functions.lua. Answers are packed with cmsgpack; hashes come as {field, value, ...}.
]]

local function register(name, body)
  redis.register_function {
    function_name = name,
    callback = function(keys, args)
      local prefix = string.sub(keys[1], 1, -5) -- without 'meta'
      return cmsgpack.pack(body(prefix, args))
    end,
    flags = { 'no-writes' },
  }
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function request(prefix, id)
  return redis.call('HGETALL', prefix .. 'request:' .. id)
end

-- args: requests to return per level, and of the running ones; requests to pass over at the front of
-- each level; the only level whose requests are told, or ''.
-- Returns {now_ms, meta, leader, live, levels, running, slots, workers}: levels as
-- {count, {id, request, id, request, ...}}; running as {id, expires_ms, request, ...}; slots as
-- {id, expires_ms, worker_id, slot, releasing, ...} of every lease; workers as {id, expires_ms, worker, ...}.
register('laps_snapshot', function(prefix, args)
  local head_limit, running_limit, head_offset = tonumber(args[1]), tonumber(args[2]), tonumber(args[3])
  local meta = redis.call('HGETALL', prefix .. 'meta')
  local levels = {}
  for level = 0, tonumber(redis.call('HGET', prefix .. 'meta', 'levels') or 0) - 1 do
    local key, head = prefix .. 'queue:' .. level, {}
    if head_limit > 0 and (args[4] == '' or args[4] == tostring(level)) then
      for _, id in ipairs(redis.call('ZRANGE', key, head_offset, head_offset + head_limit - 1)) do
        head[#head + 1] = id
        head[#head + 1] = request(prefix, id)
      end
    end
    levels[#levels + 1] = { redis.call('ZCARD', key), head }
  end
  local leases = redis.call('ZRANGE', prefix .. 'leases', 0, -1, 'WITHSCORES')
  local running, slots = {}, {}
  for i = 1, #leases, 2 do
    local id, expires_ms = leases[i], leases[i + 1]
    local place = redis.call('HMGET', prefix .. 'request:' .. id, 'worker_id', 'slot', 'releasing')
    for _, value in ipairs { id, expires_ms, place[1], place[2], place[3] } do slots[#slots + 1] = value end
    -- One that has been preempted and not let go yet shares its slot with the next one.
    if place[3] ~= '1' and #running < 3 * running_limit then
      for _, value in ipairs { id, expires_ms, request(prefix, id) } do running[#running + 1] = value end
    end
  end
  local sessions, workers = redis.call('ZRANGE', prefix .. 'workers', 0, -1, 'WITHSCORES'), {}
  for i = 1, #sessions, 2 do
    local worker = redis.call('HGETALL', prefix .. 'worker:' .. sessions[i])
    for _, value in ipairs { sessions[i], sessions[i + 1], worker } do workers[#workers + 1] = value end
  end
  local leader = redis.call('HGETALL', prefix .. 'leader')
  return { now_ms(), meta, leader, redis.call('ZCARD', prefix .. 'live'), levels, running, slots, workers }
end)

-- The next `limit` members of a sorted set after the one given, as {id, score, ...}, and whether there are more.
-- Without an id: from the score on.
local function members_after(key, score, last_id, limit)
  local first = 0
  if score ~= '' then
    local place = redis.call('ZRANK', key, last_id)
    -- Gone since: everything before its score has been returned.
    first = place and place + 1 or redis.call('ZCOUNT', key, '-inf', '(' .. score)
  end
  local members = redis.call('ZRANGE', key, first, first + limit - 1, 'WITHSCORES')
  return members, first + #members / 2 < redis.call('ZCARD', key)
end

-- The same for leases, in the order of their ids: renewals change their scores all the time.
local function leases_after(key, last_id, limit)
  local ids, members = redis.call('ZRANGE', key, 0, -1), {}
  table.sort(ids)
  for _, id in ipairs(ids) do
    if id > last_id then
      if #members == 2 * limit then return members, true end
      members[#members + 1] = id
      members[#members + 1] = '0'
    end
  end
  return members, false
end

-- args: 'live', 'leases' or 'finished'; score and id of the last one of the page before, or '' and '';
-- requests to return; requests to look at; the states that are asked for, each between commas (',queued,').
-- Returns {requests as {id, request, ...}, whether there are more, score and id of the last one looked at}.
register('laps_list', function(prefix, args)
  local key, score, last_id = prefix .. args[1], args[2], args[3]
  local limit, look_limit, states = tonumber(args[4]), tonumber(args[5]), args[6]
  local members, more
  if args[1] == 'leases' then
    members, more = leases_after(key, last_id, look_limit)
  else
    members, more = members_after(key, score, last_id, look_limit)
  end
  local found = {}
  for i = 1, #members, 2 do
    if #found == 2 * limit then
      more = true
      break
    end
    last_id, score = members[i], members[i + 1]
    local state = redis.call('HGET', prefix .. 'request:' .. last_id, 'state')
    if state and string.find(states, ',' .. state .. ',', 1, true) then
      found[#found + 1] = last_id
      found[#found + 1] = request(prefix, last_id)
    end
  end
  return { found, more, score, last_id }
end)

-- args: id; the first entry of its token log that is wanted, entries at most; where to begin among the
-- events ('': at its arrival), events to look at, seconds by which the clocks of events and arrivals may differ.
-- Returns {now_ms, request, position in its queue or -1, offsets of the entries, its events as
-- {id, kind, worker_id, detail, ...}, how many events were looked at, id of the last of them or ''}.
register('laps_timeline', function(prefix, args)
  local id, offsets, found, last, after = args[1], {}, {}, '', args[4]
  local place = redis.call('HMGET', prefix .. 'request:' .. id, 'queue', 'arrival_s')
  if not place[2] then return { now_ms(), {}, -1, {}, {}, 0, '' } end
  local log = redis.call('XRANGE', prefix .. 'tokens:' .. id, args[2] .. '-0', '+', 'COUNT', args[3])
  for i, entry in ipairs(log) do offsets[i] = tonumber(entry[2][2]) end
  if after == '' then
    after = string.format('%.0f-0', math.max(0, math.floor((tonumber(place[2]) - tonumber(args[6])) * 1000)))
  end
  local events = redis.call('XRANGE', prefix .. 'events', after, '+', 'COUNT', args[5])
  for _, event in ipairs(events) do
    last = event[1]
    local fields = {}
    for i = 1, #event[2], 2 do fields[event[2][i]] = event[2][i + 1] end
    if fields.request_id == id then
      for _, value in ipairs { last, fields.kind, fields.worker_id or '', fields.detail or '' } do
        found[#found + 1] = value
      end
    end
  end
  local position = place[1] ~= '' and redis.call('ZRANK', prefix .. 'queue:' .. place[1], id)
  return { now_ms(), request(prefix, id), position or -1, offsets, found, #events, last }
end)

-- args: id; the output offset in tokens from which the log is wanted; entries to return at most; 1 for prompt and parameters.
-- Returns {request, log as {entry, offset, tokens, logprobs, ...}, prompt, params}. The log begins with the
-- whole entry that holds the offset.
register('laps_read', function(prefix, args)
  local id, offset, limit = args[1], tonumber(args[2]), args[3]
  local key, prompt, params = prefix .. 'tokens:' .. id, '', ''
  local function entry(number)
    local entry_id = string.format('%.0f-0', number)
    return redis.call('XRANGE', key, entry_id, entry_id)[1]
  end
  -- An entry holds at least one token, so the one that holds the offset is at most number offset + 1.
  local first, after = 1, math.min(redis.call('XLEN', key), offset + 1) + 1
  while after - first > 1 do
    local middle = math.floor((first + after) / 2)
    if tonumber(entry(middle)[2][2]) <= offset then first = middle else after = middle end
  end
  local log = {}
  for _, item in ipairs(redis.call('XRANGE', key, string.format('%.0f-0', first), '+', 'COUNT', limit)) do
    local fields = item[2] -- offset, its value, tokens, their value, logprobs, their value
    for _, value in ipairs { tonumber(string.match(item[1], '^%d+')), tonumber(fields[2]), fields[4], fields[6] or '' } do
      log[#log + 1] = value
    end
  end
  if args[4] == '1' then
    prompt = redis.call('GET', prefix .. 'prompt:' .. id) or ''
    params = redis.call('GET', prefix .. 'params:' .. id) or '{}'
  end
  return { request(prefix, id), log, prompt, params }
end)
