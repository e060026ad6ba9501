#!lua name=laps
--[[
Every write to a pool. Runs inside Redis (>= 7.0) or Valkey, so each function is atomic.

  Key, after laps:{POOL}:  Type        Members or fields
  meta                     hash        schema, timeline, commit_seq, commit_digest, digest_before, committed_ms, journal_seq, journal_from, resumed_seq, policy, level_thresholds_s, levels, backlog_us
  leader                   hash        epoch, holder, address, expires_ms, ttl_ms
  epochs                   hash        by epoch, of the last EPOCHS_KEPT: the commit_seq at which it began, and its term's random name
  stopped                  hash        only while the pool is stopped: by, reason, at_ms, what was seen and what was stored
  queue:LEVEL              sorted set  request_id of the waiting, in run order (see queue_score)
  live                     sorted set  request_id of all that are not finished, by arrival_seq
  leases                   sorted set  request_id of those that hold a slot, by expiry in ms
  finished                 sorted set  request_id of the ended that are still kept, by finish in ms
  workers                  sorted set  worker_id, by expiry of the session in ms
  worker:WORKER            hash        the worker
  request:REQUEST          hash        the request and what is believed about it
  prompt:REQUEST           string      prompt token ids, decimal
  params:REQUEST           string      sampling and stopping parameters, JSON
  tokens:REQUEST           stream      the token log: id ENTRY-0 from 1, fields offset, tokens, logprobs
  journal                  stream      output that is in no token log yet: id SEQ-0 of its commit, field rows
  events                   stream      kind, request_id, worker_id, detail; the last EVENTS_KEPT or so
  learnt                   hash        what the policy has learnt, by name

Every function takes the meta key as its only key and finds the others by its prefix. A write
checks the epoch first, then everything else, and only then changes anything: a refusal leaves
no trace. Refusals are error replies that begin with a code (errors.py).
]]

local SCHEMA = '3'
local EVENTS_KEPT = '10000'
local EPOCHS_KEPT = 1000
local PRIORITY_STEP = 1e10      -- distance in score between two priorities
local RANK_LIMIT = 4.9e9        -- ranks beyond it count as it, so that priorities cannot overlap
local WORKER_KEPT_MS = 3600000  -- a worker's record outlives its session for an hour
local BATCH = 1000              -- arguments per call; Lua's stack holds 8000

local function refuse(code, text)
  error({ laps = code .. ' ' .. text })
end

-- Registers a function whose refusals become error replies.
local function register(name, body)
  redis.register_function(name, function(keys, args)
    local prefix = string.sub(keys[1], 1, -5) -- without 'meta'
    -- While a cluster moves keys one by one, a function ends where it wants one that is not here (any more). This one is
    -- nowhere, and ends it before anything is written.
    redis.call('EXISTS', prefix .. 'nowhere')
    local ok, result = pcall(body, prefix, args)
    if ok then return result end
    if type(result) == 'table' and result.laps then return redis.error_reply(result.laps) end
    error(result)
  end)
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function call_batched(command, key, list)
  for first = 1, #list, BATCH do
    redis.call(command, key, unpack(list, first, math.min(first + BATCH - 1, #list)))
  end
end

-- Priority first (higher is earlier), then rank (lower is earlier), then arrival. Arrival counts
-- in units of the last place of the number, so it decides only between ranks that are equal.
local function queue_score(priority, rank, arrival_seq)
  rank = math.max(-RANK_LIMIT, math.min(RANK_LIMIT, rank))
  local base = rank - priority * PRIORITY_STEP
  local _, exponent = math.frexp(math.max(math.abs(base), 1))
  return base + math.ldexp(arrival_seq, exponent - 53)
end

-- Whole microseconds, so that the sum over all requests does not drift.
local function microseconds(seconds)
  if not seconds or seconds ~= seconds or seconds <= 0 then return 0 end
  return math.floor(math.min(seconds, 1e9) * 1e6 + 0.5)
end

-- Leadership ---------------------------------------------------------------------------------

local function fence(prefix, epoch, holder)
  local leader = redis.call('HMGET', prefix .. 'leader', 'epoch', 'holder')
  local stored = tonumber(leader[1] or 0)
  if stored < epoch then
    refuse('HISTORY_WENT_BACK', 'epoch ' .. stored .. ' is stored, this leader has epoch ' .. epoch)
  end
  if stored > epoch or leader[2] ~= holder then
    refuse('STALE_EPOCH', 'epoch ' .. stored .. ' of ' .. tostring(leader[2]) .. ' leads, not epoch ' .. epoch .. ' of ' .. holder)
  end
end

-- How far the pool's history is stored: timeline, epoch, commit_seq.
local function history(prefix)
  local meta = redis.call('HMGET', prefix .. 'meta', 'timeline', 'commit_seq')
  local epoch = redis.call('HGET', prefix .. 'leader', 'epoch')
  return tonumber(meta[1] or 1), tonumber(epoch or 0), tonumber(meta[2] or 0)
end

-- Where an epoch began and the name of its term; nils where that is not known (any more).
local function term_of(prefix, epoch)
  local stored = redis.call('HGET', prefix .. 'epochs', epoch)
  if not stored then return nil, nil end
  local began, term = string.match(stored, '^(%d+) ?(.*)$')
  return tonumber(began), term
end

-- `first` and the three after it in args: the furthest timeline, epoch and commit_seq that the caller knows of, and that
-- epoch's term ('': not known). A store has lost something if it has not come so far, and also if it has since: when a
-- later epoch began before that commit, or when the epoch is another term's, so that its number was given out a
-- second time. What was seen in an earlier timeline does not count.
local function check_history(prefix, args, first)
  local timeline, epoch, commit_seq = history(prefix)
  local seen_timeline, seen_epoch, seen_seq = tonumber(args[first]), tonumber(args[first + 1]), tonumber(args[first + 2])
  local seen_term = args[first + 3]
  local lost = timeline < seen_timeline
  if timeline == seen_timeline then
    local stored_seq = commit_seq
    if seen_epoch < epoch then
      stored_seq = term_of(prefix, seen_epoch + 1) or commit_seq
    end
    local _, term = term_of(prefix, seen_epoch)
    local another = term and term ~= '' and seen_term ~= '' and term ~= seen_term
    lost = epoch < seen_epoch or stored_seq < seen_seq or another
  end
  if lost then
    refuse('HISTORY_WENT_BACK', 'timeline ' .. timeline .. ', epoch ' .. epoch .. ', commit ' .. commit_seq .. ' are stored; timeline ' ..
      seen_timeline .. ', epoch ' .. seen_epoch .. ', commit ' .. seen_seq .. ' were seen')
  end
  return timeline, epoch, commit_seq
end

local function event(prefix, kind, detail)
  redis.call('XADD', prefix .. 'events', 'MAXLEN', '~', EVENTS_KEPT, '*', 'kind', kind, 'request_id', '', 'worker_id', '', 'detail', detail)
end

-- args: holder, address, ttl_ms, the furthest timeline, epoch, commit_seq and term that the caller knows of, and a
-- random name for the term that it asks for. Returns {1, epoch, expires_ms, commit_seq, timeline, term}, or the same
-- of the one who leads with 0 in front.
register('laps_lead', function(prefix, args)
  local holder, address, ttl_ms = args[1], args[2], tonumber(args[3])
  local leader = redis.call('HMGET', prefix .. 'leader', 'holder', 'expires_ms', 'ttl_ms')
  local schema = redis.call('HGET', prefix .. 'meta', 'schema')
  if schema and schema ~= SCHEMA then
    refuse('SCHEMA', 'the store has schema ' .. schema .. ', this version needs ' .. SCHEMA)
  end
  local stopped = redis.call('HMGET', prefix .. 'stopped', 'by', 'reason')
  if stopped[1] then refuse('STOPPED', 'by ' .. stopped[1] .. ': ' .. stopped[2]) end
  local timeline, epoch, commit_seq = check_history(prefix, args, 4)
  local now = now_ms()
  local expires = tonumber(leader[2] or 0)
  if leader[1] and leader[1] ~= '' and leader[1] ~= holder and expires > now then
    -- No renewal lasts longer than that from now on. One that does was made before the server's clock was set back: it counts
    -- as made now. A holder that lives renews it in time, and after a dead one somebody leads soon.
    local latest = now + tonumber(leader[3] or 2 * ttl_ms)
    if expires > latest then
      expires = latest
      redis.call('HSET', prefix .. 'leader', 'expires_ms', expires)
    end
    local _, term = term_of(prefix, epoch)
    return { 0, epoch, expires, commit_seq, timeline, term or '' }
  end
  epoch, expires = epoch + 1, now + ttl_ms
  redis.call('HSET', prefix .. 'leader', 'epoch', epoch, 'holder', holder, 'address', address, 'expires_ms', expires,
    'ttl_ms', ttl_ms)
  redis.call('HSETNX', prefix .. 'meta', 'schema', SCHEMA)
  redis.call('HSETNX', prefix .. 'meta', 'timeline', timeline)
  redis.call('HSETNX', prefix .. 'meta', 'commit_seq', 0)
  redis.call('HSET', prefix .. 'epochs', epoch, commit_seq .. ' ' .. args[8])
  redis.call('HDEL', prefix .. 'epochs', epoch - EPOCHS_KEPT)
  -- Leases carry the epoch that granted them: those of an earlier one are void.
  redis.call('DEL', prefix .. 'leases')
  return { 1, epoch, expires, commit_seq, timeline, args[8] }
end)

-- args: epoch, holder, ttl_ms, and the furthest timeline, epoch, commit_seq and term that the caller knows of. An expired
-- leadership that nobody took is good again.
register('laps_renew', function(prefix, args)
  fence(prefix, tonumber(args[1]), args[2])
  check_history(prefix, args, 4)
  local expires = now_ms() + tonumber(args[3])
  redis.call('HSET', prefix .. 'leader', 'expires_ms', expires)
  return expires
end)

-- args: epoch, holder. The next one need not wait for the expiry. Returns 0 if it was not ours.
register('laps_resign', function(prefix, args)
  local leader = redis.call('HMGET', prefix .. 'leader', 'epoch', 'holder')
  if leader[1] ~= args[1] or leader[2] ~= args[2] then return 0 end
  redis.call('HSET', prefix .. 'leader', 'holder', '', 'address', '', 'expires_ms', 0)
  return 1
end)

-- args: epoch, holder, name of the policy, its level thresholds as JSON. For people only.
register('laps_describe', function(prefix, args)
  fence(prefix, tonumber(args[1]), args[2])
  redis.call('HSET', prefix .. 'meta', 'policy', args[3], 'level_thresholds_s', args[4])
  return 'OK'
end)

-- Stopping -----------------------------------------------------------------------------------

-- args: who stops the pool, why, and the furthest timeline, epoch and commit_seq that it knows of. Nobody leads
-- from here on, whoever did before, until laps_resume. Returns 0 if it was stopped already; the first reason stays.
register('laps_stop', function(prefix, args)
  local key = prefix .. 'stopped'
  local timeline, epoch, commit_seq = history(prefix)
  local before = redis.call('HMGET', key, 'seen_timeline', 'seen_epoch', 'seen_commit_seq')
  local seen_timeline, seen_epoch, seen_seq = tonumber(args[3]), tonumber(args[4]), tonumber(args[5])
  if before[1] then
    local timeline_before, epoch_before, seq_before = tonumber(before[1]), tonumber(before[2]), tonumber(before[3])
    if timeline_before > seen_timeline or (timeline_before == seen_timeline and
      (epoch_before > seen_epoch or (epoch_before == seen_epoch and seq_before > seen_seq))) then
      seen_timeline, seen_epoch, seen_seq = timeline_before, epoch_before, seq_before
    end
  end
  redis.call('HSET', key, 'seen_timeline', seen_timeline, 'seen_epoch', seen_epoch, 'seen_commit_seq', seen_seq)
  if before[1] then return 0 end
  redis.call('HSET', key, 'by', args[1], 'reason', args[2], 'at_ms', now_ms(), 'stored_timeline', timeline,
    'stored_epoch', epoch, 'stored_commit_seq', commit_seq)
  -- Whoever leads is fenced off, and a leader of what was lost no less.
  redis.call('HSET', prefix .. 'leader', 'epoch', math.max(epoch, seen_epoch) + 1, 'holder', '', 'address', '', 'expires_ms', 0)
  event(prefix, 'pool_stopped', args[2])
  return 1
end)

-- args: who lets it go on. The store is accepted as it is: a new timeline begins, to which nothing counts that was
-- seen of the one before. Returns it, or 0 if the pool was not stopped.
register('laps_resume', function(prefix, args)
  local stopped = redis.call('HMGET', prefix .. 'stopped', 'seen_timeline', 'seen_epoch')
  if not stopped[1] then return 0 end
  local timeline, epoch, commit_seq = history(prefix)
  timeline = math.max(timeline, tonumber(stopped[1])) + 1
  redis.call('HSET', prefix .. 'meta', 'timeline', timeline, 'resumed_seq', commit_seq)
  redis.call('HSET', prefix .. 'leader', 'epoch', math.max(epoch, tonumber(stopped[2])))
  redis.call('DEL', prefix .. 'stopped', prefix .. 'epochs')
  event(prefix, 'pool_resumed', 'timeline ' .. timeline .. ' by ' .. args[1])
  return timeline
end)

-- Commit -------------------------------------------------------------------------------------

-- What is stored about the requests of a commit, and what the commit makes of them.
local function records(prefix)
  local all, order = {}, {}
  local self = { all = all, order = order }
  function self.add(id, record)
    record.id = id
    record.key = prefix .. 'request:' .. id
    all[id] = record
    order[#order + 1] = record
    return record
  end
  function self.known(id)
    local record = all[id]
    if record == nil then
      local stored = redis.call('HMGET', prefix .. 'request:' .. id,
        'state', 'log_entries', 'output_tokens', 'queue', 'priority', 'arrival_seq', 'perceived_s')
      if not stored[1] then refuse('UNKNOWN_REQUEST', id) end
      record = self.add(id, {
        finished = stored[1] == 'finished', entries = tonumber(stored[2]), tokens = tonumber(stored[3]),
        queue = stored[4], priority = tonumber(stored[5]), arrival_seq = tonumber(stored[6]),
        perceived_s = tonumber(stored[7]),
      })
    end
    return record
  end
  function self.unfinished(id)
    local record = self.known(id)
    if record.finished then refuse('ALREADY_FINISHED', id) end
    return record
  end
  return self
end

local function set_fields(record, fields)
  if record.fields then -- submitted and ended in one tick
    for _, text in ipairs(fields) do table.insert(record.fields, text) end
  else
    record.fields = fields
  end
end

-- Checks log entries: each is the next one. `appended` is id, number, offset, how many tokens, tokens, logprobs, ...
local function check_log(appended, requests)
  for i = 1, #appended, 6 do
    local record, number, offset = requests.unfinished(appended[i]), appended[i + 1], appended[i + 2]
    if number > record.entries + 1 then
      refuse('LOG_GAP', 'entry ' .. number .. ' after ' .. record.entries .. ' of ' .. record.id)
    elseif number ~= record.entries + 1 or offset ~= record.tokens then
      refuse('LOG_CONFLICT', 'entry ' .. number .. ' at ' .. offset .. ' of ' .. record.id .. ', whose log is stored to ' ..
        record.entries .. ' ' .. record.tokens)
    end
    record.entries, record.tokens, record.grown = number, offset + appended[i + 3], true
  end
end

-- Whoever writes a request's record knows how far its log goes.
local function check_end(record, entries, tokens)
  if record.entries ~= entries or record.tokens ~= tokens then
    refuse('LOG_CONFLICT', 'the log of ' .. record.id .. ' is stored to ' .. record.entries .. ' ' .. record.tokens ..
      ', it was written to ' .. entries .. ' ' .. tokens)
  end
end

-- args: epoch, holder, seq, the greatest seq that this leader knows to be stored, digest, the commit packed by
-- packing.py, and the journal's entry, '' for none. Returns {seq, 1}, or {seq, 0} if this very commit was stored already.
register('laps_commit', function(prefix, args)
  local seq, acknowledged, digest = tonumber(args[3]), tonumber(args[4]), args[5]
  fence(prefix, tonumber(args[1]), args[2])
  local meta = redis.call('HMGET', prefix .. 'meta', 'commit_seq', 'commit_digest', 'backlog_us', 'levels', 'digest_before')
  local stored_seq = tonumber(meta[1] or 0)
  if stored_seq < acknowledged then
    refuse('HISTORY_WENT_BACK', 'commit ' .. stored_seq .. ' is the last one stored, ' .. acknowledged .. ' was acknowledged')
  end
  -- Two commits may be under way at once: both may have been stored without their leader knowing.
  if seq == stored_seq and digest == meta[2] or seq == stored_seq - 1 and digest == meta[5] then return { seq, 0 } end
  if seq <= stored_seq then refuse('SEQ_CONFLICT', 'commit ' .. seq .. ' when ' .. stored_seq .. ' is stored, with other content') end
  if seq > stored_seq + 1 then refuse('SEQ_GAP', 'commit ' .. seq .. ' after ' .. stored_seq) end
  local now, submitted, appended, changed, moves, leased, unleased, finished, forgotten, workers, workers_gone, events, learnt, journal_from =
    unpack(cmsgpack.unpack(args[6]), 1, 14)

  -- Check. Nothing is written here.
  local requests = records(prefix)
  local known, unfinished = requests.known, requests.unfinished
  for _, new in ipairs(submitted) do -- id, arrival_seq, priority, perceived_s, prompt, params, fields
    local id = new[1]
    if requests.all[id] or redis.call('EXISTS', prefix .. 'request:' .. id) == 1 then refuse('REQUEST_EXISTS', id) end
    requests.add(id, { entries = 0, tokens = 0, queue = '', arrival_seq = new[2], priority = new[3], perceived_s = 0,
      perceives_s = new[4], fields = new[7] })
  end
  check_log(appended, requests)
  for _, change in ipairs(changed) do -- id, perceived_s, fields, entries and tokens of its log
    local record = unfinished(change[1])
    check_end(record, change[4], change[5])
    record.perceives_s = change[2]
    set_fields(record, change[3])
  end
  local levels = tonumber(meta[4] or 0)
  for _, move in ipairs(moves) do -- id, level or false, rank, rank as text
    local record = known(move[1])
    record.move = move
    if move[2] then
      if record.finished then refuse('ALREADY_FINISHED', record.id) end
      levels = math.max(levels, move[2] + 1)
    end
  end
  local elsewhere = {} -- leases of requests that nothing else in this commit is about: mostly renewals
  for i = 2, #leased, 2 do -- expiry_ms, id, ...
    if not requests.all[leased[i]] then elsewhere[#elsewhere + 1] = leased[i] end
  end
  for first = 1, #elsewhere, BATCH do
    local last = math.min(first + BATCH - 1, #elsewhere)
    for i, arrival_seq in ipairs(redis.call('ZMSCORE', prefix .. 'live', unpack(elsewhere, first, last))) do
      if not arrival_seq then unfinished(elsewhere[first + i - 1]) end
    end
  end
  for _, ending in ipairs(finished) do -- id, finished_ms, fields, entries and tokens of its log
    local record = unfinished(ending[1])
    check_end(record, ending[4], ending[5])
    record.finished, record.finishes, record.perceives_s = true, ending[2], 0
    set_fields(record, ending[3])
  end
  for _, id in ipairs(forgotten) do
    if not known(id).finished then refuse('NOT_FINISHED', id) end
    requests.all[id].forgotten = true
  end

  -- Write.
  for _, new in ipairs(submitted) do
    redis.call('SET', prefix .. 'prompt:' .. new[1], new[5])
    redis.call('SET', prefix .. 'params:' .. new[1], new[6])
    redis.call('ZADD', prefix .. 'live', new[2], new[1])
  end
  for i = 1, #appended, 6 do
    local key, entry_id = prefix .. 'tokens:' .. appended[i], appended[i + 1] .. '-0'
    if appended[i + 5] == '' then
      redis.call('XADD', key, entry_id, 'offset', appended[i + 2], 'tokens', appended[i + 4])
    else
      redis.call('XADD', key, entry_id, 'offset', appended[i + 2], 'tokens', appended[i + 4], 'logprobs', appended[i + 5])
    end
  end
  if args[7] ~= '' then
    redis.call('XADD', prefix .. 'journal', seq .. '-0', 'rows', args[7])
    redis.call('HSET', prefix .. 'meta', 'journal_seq', seq)
  end
  if journal_from then
    redis.call('XTRIM', prefix .. 'journal', 'MINID', journal_from)
    redis.call('HSET', prefix .. 'meta', 'journal_from', journal_from)
  end
  call_batched('ZADD', prefix .. 'leases', leased)
  call_batched('ZREM', prefix .. 'leases', unleased)
  local backlog_us = tonumber(meta[3] or 0)
  for _, record in ipairs(requests.order) do
    local id, fields, level, move = record.id, record.fields or {}, nil, record.move
    if record.finishes then level = '' elseif move then level = move[2] and tostring(move[2]) or '' end
    if level then
      if record.queue ~= '' and record.queue ~= level then redis.call('ZREM', prefix .. 'queue:' .. record.queue, id) end
      fields[#fields + 1], fields[#fields + 2] = 'queue', level
      if level ~= '' then
        redis.call('ZADD', prefix .. 'queue:' .. level, queue_score(record.priority, move[3], record.arrival_seq), id)
        local n = #fields
        fields[n + 1], fields[n + 2], fields[n + 3], fields[n + 4] = 'level', level, 'rank', move[4]
      end
    end
    if record.perceives_s then
      backlog_us = backlog_us + microseconds(record.perceives_s) - microseconds(record.perceived_s)
    end
    if record.grown then
      local n = #fields
      fields[n + 1], fields[n + 2], fields[n + 3], fields[n + 4] = 'log_entries', record.entries, 'output_tokens', record.tokens
    end
    if #fields > 0 then redis.call('HSET', record.key, unpack(fields)) end
    if record.finishes then
      redis.call('ZREM', prefix .. 'live', id)
      redis.call('ZREM', prefix .. 'leases', id)
      redis.call('ZADD', prefix .. 'finished', record.finishes, id)
    end
    if record.forgotten then
      redis.call('UNLINK', record.key, prefix .. 'tokens:' .. id, prefix .. 'prompt:' .. id, prefix .. 'params:' .. id)
      redis.call('ZREM', prefix .. 'finished', id)
    end
  end
  for _, worker in ipairs(workers) do -- id, expires_ms, fields
    redis.call('ZADD', prefix .. 'workers', worker[2], worker[1])
    redis.call('HSET', prefix .. 'worker:' .. worker[1], unpack(worker[3]))
  end
  if #workers > 0 then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'workers', '-inf', now - WORKER_KEPT_MS, 'LIMIT', 0, 16)) do
      workers_gone[#workers_gone + 1] = id
    end
  end
  for _, id in ipairs(workers_gone) do
    redis.call('ZREM', prefix .. 'workers', id)
    redis.call('UNLINK', prefix .. 'worker:' .. id)
  end
  for _, event in ipairs(events) do -- field, value, ...
    redis.call('XADD', prefix .. 'events', 'MAXLEN', '~', EVENTS_KEPT, '*', unpack(event))
  end
  call_batched('HSET', prefix .. 'learnt', learnt) -- name, value, ...
  -- Last: were a write above to fail, the same commit could be tried again.
  redis.call('HSET', prefix .. 'meta', 'commit_seq', seq, 'commit_digest', digest, 'digest_before', meta[2] or '',
    'committed_ms', now, 'backlog_us', backlog_us, 'levels', levels)
  return { seq, 1 }
end)
