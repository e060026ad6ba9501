#!lua name=laps_recovery
--[[
What a new leader reads. Nothing here writes, and replicas would answer. The keys are listed in functions.lua. Answers are packed with cmsgpack.

Nobody is served while a long queue is read, so it is read sparingly. Most requests of a long queue have never run, and
most fields of their records are as in every new one: they are not read. Their prompts and parameters come by one command
for all of a call, and parameters that requests have in common are sent once.
]]

local BATCH = 1000 -- arguments per call; Lua's stack holds 8000

-- The first argument of each is the epoch of who asks. Replication is in order: a server that has heard of this epoch has all
-- that was stored before it, and one that has not may lack some of it.
local function register(name, body)
  redis.register_function {
    function_name = name,
    callback = function(keys, args)
      local prefix = string.sub(keys[1], 1, -5) -- without 'meta'
      local epoch, stored = tonumber(table.remove(args, 1)), tonumber(redis.call('HGET', prefix .. 'leader', 'epoch') or 0)
      if stored < epoch then
        return redis.error_reply('BEHIND epoch ' .. stored .. ' is stored here, the one that leads is ' .. epoch)
      end
      if stored > epoch then
        return redis.error_reply('STALE_EPOCH epoch ' .. stored .. ' leads, not epoch ' .. epoch)
      end
      return cmsgpack.pack(body(prefix, args))
    end,
    flags = { 'no-writes' },
  }
end

-- The strings at the ids with `prefix` before each.
local function get_each(prefix, ids)
  local strings = {}
  for first = 1, #ids, BATCH do
    local names = {}
    for i = first, math.min(first + BATCH - 1, #ids) do names[#names + 1] = prefix .. ids[i] end
    for i, found in ipairs(redis.call('MGET', unpack(names))) do strings[first + i - 1] = found end
  end
  return strings
end

-- args: position of the first one among the live requests; how many of these to look at; names of fields.
-- Returns {rows, places, params, others} of those that are queued and have no output: rows as {id, field, ..., prompt, ...},
-- for each the place of its parameters among `params`, from 0. Others as {id, ...}: live, but not of that kind.
register('laps_load_waiting', function(prefix, args)
  local first, count = tonumber(args[1]), tonumber(args[2])
  local names = { unpack(args, 3) }
  local width = #names
  names[width + 1], names[width + 2] = 'state', 'log_entries'
  local waiting, fields, others = {}, {}, {}
  local ids = redis.call('ZRANGE', prefix .. 'live', first, first + count - 1)
  for _, id in ipairs(ids) do
    local values = redis.call('HMGET', prefix .. 'request:' .. id, unpack(names))
    if values[width + 1] == 'queued' and values[width + 2] == '0' then
      waiting[#waiting + 1] = id
      fields[#waiting] = values
    else
      others[#others + 1] = id
    end
  end
  local prompts = get_each(prefix .. 'prompt:', waiting)
  local params = get_each(prefix .. 'params:', waiting)
  local rows, places, texts, place_of = {}, {}, {}, {}
  local n = 0
  for i, id in ipairs(waiting) do
    local values, text = fields[i], params[i] or '{}'
    rows[n + 1] = id
    for k = 1, width do rows[n + 1 + k] = values[k] end
    n = n + width + 2
    rows[n] = prompts[i]
    if not place_of[text] then
      place_of[text] = #texts
      texts[#texts + 1] = text
    end
    places[i] = place_of[text]
  end
  return { rows, places, texts, others }
end)

-- args: how many names of fields follow; these; ids of live requests.
-- Returns {id, {value, ...}, prompt, params, {tokens, ...}, ...}.
register('laps_load_requests', function(prefix, args)
  local names, at, all = {}, {}, {}
  for i = 1, tonumber(args[1]) do
    names[i] = args[i + 1]
    at[names[i]] = i
  end
  for i = #names + 2, #args do
    local id = args[i]
    local values, log = redis.call('HMGET', prefix .. 'request:' .. id, unpack(names)), {}
    if values[at.log_entries] ~= '0' then
      for k, item in ipairs(redis.call('XRANGE', prefix .. 'tokens:' .. id, '-', '+')) do log[k] = item[2][4] end
    end
    local n = #all
    all[n + 1], all[n + 2] = id, values
    all[n + 3] = redis.call('GET', prefix .. 'prompt:' .. id) or ''
    all[n + 4] = redis.call('GET', prefix .. 'params:' .. id) or '{}'
    all[n + 5] = log
  end
  return all
end)

-- Returns what the policy has learnt: {name, value, ...}.
register('laps_learnt', function(prefix)
  return redis.call('HGETALL', prefix .. 'learnt')
end)

-- args: position of the first one among the finished requests; how many; names of fields.
-- Returns {id, {value, ...}, ...}.
register('laps_load_finished', function(prefix, args)
  local first, count, all = tonumber(args[1]), tonumber(args[2]), {}
  for _, id in ipairs(redis.call('ZRANGE', prefix .. 'finished', first, first + count - 1)) do
    all[#all + 1] = id
    all[#all + 1] = redis.call('HMGET', prefix .. 'request:' .. id, unpack(args, 3))
  end
  return all
end)

-- args: id of the journal's entry after which to begin ('-': the first), how many. Returns {meta's journal_seq, journal_from
-- and resumed_seq, {commit, rows, ...}}.
register('laps_journal', function(prefix, args)
  local meta, entries = redis.call('HMGET', prefix .. 'meta', 'journal_seq', 'journal_from', 'resumed_seq'), {}
  for i, entry in ipairs(redis.call('XRANGE', prefix .. 'journal', args[1], '+', 'COUNT', args[2])) do
    entries[2 * i - 1], entries[2 * i] = tonumber(string.match(entry[1], '^%d+')), entry[2][2]
  end
  return { tonumber(meta[1] or 0), tonumber(meta[2] or 0), tonumber(meta[3] or 0), entries }
end)
