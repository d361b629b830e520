-- The state changes of a town. Every section below becomes one Redis script: the parts of the prelude that it uses,
-- followed by its body. store.py composes the scripts, and explains the keys.
-- A body takes its arguments from A. It returns {1, ...} on success, or refuse(code, ...) if it has changed nothing.
-- All its writes (record, indexes, event, history, idempotency record) are atomic.
-- KEYS[1] is the town's prefix. All other keys begin with it, and a Redis Cluster accepts that because of the hash tag.
-- No key is named exactly like the prefix. So while the slot moves, a Cluster answers every script with ASK, and none
-- sees half a town.
-- The first line of a section is "@script NAME [oom]". With "oom", the script also runs when Redis is out of memory.
-- Inserted above the prelude, from model.py: LIVE and ACCEPTING (sets of agent states), CONDUCTOR (an agent id), and
-- BOUNDS (of the histograms, in ms).

-- @prelude
local P = KEYS[1]
local BY = ARGV[3]
local A = {unpack(ARGV, 5)}
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local NOW = string.format('%.0f', now)
local BIRTH = string.format('%.0f', clock[1] * 1000000 + clock[2]) -- in microseconds, so that births have an order

local function refuse(code, ...) return {0, code, ...} end

-- Milliseconds since the epoch as RFC 3339 in UTC (days-to-civil after Hinnant's public-domain algorithm).
local function iso(ms)
  local floor = math.floor
  local seconds = floor(ms / 1000)
  local days = floor(seconds / 86400)
  local rest = seconds - days * 86400
  local z = days + 719468
  local era = floor(z / 146097)
  local doe = z - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))
  local mp = floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, doy - floor((153 * mp + 2) / 5) + 1,
    floor(rest / 3600), floor(rest / 60) % 60, rest % 60, ms % 1000)
end

local said
local function iso_now()
  said = said or iso(now)
  return said
end

local function json_time(ms) return (ms and ms ~= '') and '"' .. iso(tonumber(ms)) .. '"' or 'null' end
local function json_string(s) return (s and s ~= '') and cjson.encode(s) or 'null' end

-- Records an event: in the event stream, in the totals, and in the history of the task if there is one.
-- fields: name, value, name, value …, in the order in which they are written.
-- `by` is the principal that dispatch names. A worker does not use dispatch: its events are by its agent.
local function event(kind, task, ...)
  local parts = {'"type":"' .. kind .. '","at":"' .. iso_now() .. '"'}
  if task then parts[#parts + 1] = '"task_id":"' .. task .. '"' end
  local fields, by = {...}, BY
  for i = 1, #fields, 2 do
    local value = fields[i + 1]
    if value and value ~= '' then
      parts[#parts + 1] = '"' .. fields[i] .. '":' .. cjson.encode(value)
      if by == '' and fields[i] == 'agent_name' then by = value end
    end
  end
  if by ~= '' then parts[#parts + 1] = '"by":' .. cjson.encode(by) end
  local text = table.concat(parts, ',')
  redis.call('XADD', P .. 'events', 'MAXLEN', '~', ARGV[4], '*', 'j', text)
  redis.call('HINCRBY', P .. 'totals', kind, 1)
  if task then
    local log = P .. 'task:' .. task .. ':log'
    if redis.call('RPUSH', log, '{' .. text .. '}') > 200 then redis.call('LTRIM', log, -200, -1) end
  end
end

-- Adds the time since a moment (in ms) to a histogram in the totals. Without a moment it does nothing.
local function observe(name, since)
  if not since or since == '' then return end
  local ms, i = math.max(now - tonumber(since), 0), 1
  while BOUNDS[i] and ms > BOUNDS[i] do i = i + 1 end
  redis.call('HINCRBY', P .. 'totals', name .. ':' .. i, 1)
  redis.call('HINCRBY', P .. 'totals', name .. ':ms', ms)
end

-- Returns id, name and state of an agent, or nil and a refusal. ref: its name in any case, its id, or a unique prefix
-- of its id.
local function resolve(ref)
  local id = redis.call('HGET', P .. 'names', string.lower(ref))
  if not id and #ref >= 4 then
    local found = redis.call('ZRANGEBYLEX', P .. 'ids', '[' .. ref, '[' .. ref .. '\255', 'LIMIT', 0, 2)
    if #found > 1 then return nil, refuse('ambiguous-agent', ref) end
    id = found[1]
  end
  if not id then return nil, refuse('agent-not-found', ref) end
  return id, unpack(redis.call('HMGET', P .. 'agent:' .. id, 'name', 'state'))
end

-- As resolve, but refuses an agent that does not accept tasks now.
local function resolve_accepting(ref)
  local id, name, state = resolve(ref)
  if not id then return nil, name end
  if not ACCEPTING[state] then return nil, refuse('agent-not-accepting', name, state) end
  return id, name
end

-- As resolve, but finds the conductor too, which also has a mailbox.
local function resolve_mailbox(ref)
  local known = string.lower(ref)
  if known == 'conductor' or known == 'supervisor' or known == CONDUCTOR then return CONDUCTOR, 'conductor' end
  return resolve(ref)
end

-- The id by which a caller recognises the events of one agent (or the conductor); '' if ref is '' or there is no such
-- agent.
local function sought(ref)
  if ref == '' then return '' end
  local id, why = resolve_mailbox(ref)
  if not id and why[2] ~= 'agent-not-found' then return nil, why end
  return id or ''
end

-- Renders the changeable part of an agent's JSON anew.
local function render_agent(id)
  local key = P .. 'agent:' .. id
  local v = redis.call('HMGET', key, 'state', 'rounds', 'done', 'task', 'host', 'pid', 'beat', 'restarts', 'trouble',
    'until')
  local scope = v[4] ~= '' and redis.call('HGET', P .. 'task:' .. v[4], 'brief') or 'null'
  redis.call('HSET', key, 'm', table.concat({
    ',"state":"', v[1], '","rounds_completed":', v[2], ',"tasks_completed":', v[3],
    ',"current_scope":', scope, ',"current_task":', json_string(v[4]),
    ',"host":', json_string(v[5]), ',"pid":', (v[6] and v[6] ~= '') and v[6] or 'null',
    ',"last_heartbeat":', json_time(v[7]), ',"restarts":', v[8],
    (v[9] and v[9] ~= '') and ',"trouble":' .. json_string(v[9]) or '',
    (v[10] and v[10] ~= '') and ',"resumes_at":' .. json_time(v[10]) or ''}))
end

-- Sets fields of an agent, and updates the set of live agents and the rendered JSON.
local function set_agent(id, ...)
  redis.call('HSET', P .. 'agent:' .. id, ...)
  local v = redis.call('HMGET', P .. 'agent:' .. id, 'state', 'born')
  if LIVE[v[1]] then redis.call('ZADD', P .. 'live', v[2], id) else redis.call('ZREM', P .. 'live', id) end
  render_agent(id)
end

local function agent_json(id)
  local v = redis.call('HMGET', P .. 'agent:' .. id, 'j', 'm')
  local inbox = P .. 'inbox:' .. id
  return v[1] .. v[2]
    .. ',"inbox_len":' .. redis.call('XLEN', inbox .. ':n') + redis.call('XLEN', inbox .. ':t')
    .. ',"urgent_len":' .. redis.call('XLEN', inbox .. ':u') .. '}'
end

-- The changeable part of a task's JSON. v: state, agent, name, attempt, result, error, dead, started, ended.
local function task_tail(v, created)
  return table.concat({
    ',"state":"', v[1], '","agent_id":', json_string(v[2]), ',"agent_name":', json_string(v[3]),
    ',"attempt":', v[4], ',"result":', v[5], ',"error":', v[6], ',"dead_letter":', v[7] == '1' and 'true' or 'false',
    ',"created_at":"', created, '","started_at":', json_time(v[8]), ',"ended_at":', json_time(v[9]), '}'})
end

-- Renders the changeable part of a task's JSON anew. Returns the task's state, its agent, and its end ('': not yet).
local function render_task(id)
  local key = P .. 'task:' .. id
  local v = redis.call('HMGET', key, 'state', 'agent', 'name', 'attempt', 'result', 'error', 'dead', 'started', 'ended', 'born')
  redis.call('HSET', key, 'm', task_tail(v, iso(math.floor(v[10] / 1000))))
  return v[1], v[2], v[9]
end

local function task_json(id)
  local v = redis.call('HMGET', P .. 'task:' .. id, 'j', 'tags', 'm')
  return v[1] .. ',"tags":' .. v[2] .. v[3]
end

-- Sets fields of a task, and updates every index (all, by state, by agent, by agent and state) and the rendered JSON.
local function set_task(id, ...)
  local key = P .. 'task:' .. id
  local was = redis.call('HMGET', key, 'state', 'agent', 'born', 'ended')
  redis.call('HSET', key, ...)
  local state, agent, ended = render_task(id)
  if was[1] ~= state then
    redis.call('ZREM', P .. 'tasks:' .. was[1], id)
    redis.call('ZADD', P .. 'tasks:' .. state, was[3], id)
  end
  if was[2] ~= '' and (was[1] ~= state or was[2] ~= agent) then
    redis.call('ZREM', P .. 'agent:' .. was[2] .. ':tasks:' .. was[1], id)
    if was[2] ~= agent then redis.call('ZREM', P .. 'agent:' .. was[2] .. ':tasks', id) end
  end
  if agent ~= '' and (was[1] ~= state or was[2] ~= agent) then
    if was[2] ~= agent then redis.call('ZADD', P .. 'agent:' .. agent .. ':tasks', was[3], id) end
    redis.call('ZADD', P .. 'agent:' .. agent .. ':tasks:' .. state, was[3], id)
  end
  if was[4] == ended then return end
  if ended ~= '' then redis.call('ZADD', P .. 'ended', ended, id) else redis.call('ZREM', P .. 'ended', id) end
end

-- Creates a task: in the inbox of an agent, or without an agent in the backlog. head: JSON object of task_id and
-- description, without its closing brace; brief: the start of the description as a JSON string; from: the creator's id.
local function new_task(id, head, brief, tags, from, max, agent, name)
  local state, entry, queued, tasks = 'pending', '', '', P .. 'tasks'
  if agent then
    state, entry, queued = 'assigned', redis.call('XADD', P .. 'inbox:' .. agent .. ':t', '*', 't', id), NOW
  end
  agent, name = agent or '', name or ''
  redis.call('HSET', P .. 'task:' .. id, 'j', head, 'brief', brief, 'tags', tags, 'from', from, 'state', state,
    'agent', agent, 'name', name, 'entry', entry, 'queued', queued, 'attempt', '0', 'max', max, 'tries', max,
    'result', 'null', 'error', 'null', 'dead', '0', 'born', BIRTH, 'started', '', 'ended', '',
    'm', task_tail({state, agent, name, '0', 'null', 'null', '0', '', ''}, iso_now()))
  redis.call('ZADD', tasks, BIRTH, id)
  redis.call('ZADD', tasks .. ':' .. state, BIRTH, id)
  event('task.created', id)
  if agent == '' then return end
  tasks = P .. 'agent:' .. agent .. ':tasks'
  redis.call('ZADD', tasks, BIRTH, id)
  redis.call('ZADD', tasks .. ':' .. state, BIRTH, id)
  event('task.assigned', id, 'agent_id', agent, 'agent_name', name)
end

-- Queues a task in an agent's inbox.
local function queue_task(id, agent, name)
  local entry = redis.call('XADD', P .. 'inbox:' .. agent .. ':t', '*', 't', id)
  set_task(id, 'state', 'assigned', 'agent', agent, 'name', name, 'entry', entry, 'queued', NOW)
  event('task.assigned', id, 'agent_id', agent, 'agent_name', name)
end

-- Takes a task away from its agent: removes its inbox entry, its lease, its pause, and its place among the running
-- tasks. Returns the agent's id.
local function detach_task(id)
  local v = redis.call('HMGET', P .. 'task:' .. id, 'agent', 'entry')
  if v[2] ~= '' then redis.call('XDEL', P .. 'inbox:' .. v[1] .. ':t', v[2]) end
  redis.call('ZREM', P .. 'leases', id)
  redis.call('ZREM', P .. 'delayed', id)
  if v[1] ~= '' then
    redis.call('SREM', P .. 'agent:' .. v[1] .. ':running', id)
    if redis.call('HGET', P .. 'agent:' .. v[1], 'task') == id then set_agent(v[1], 'task', '') end
  end
  return v[1]
end

local function task_to_backlog(id, why)
  local v = redis.call('HMGET', P .. 'task:' .. id, 'name', 'attempt')
  local agent = detach_task(id)
  set_task(id, 'state', 'pending', 'agent', '', 'name', '', 'entry', '', 'started', '')
  event('task.requeued', id, 'agent_id', agent, 'agent_name', v[1], 'attempt', tonumber(v[2]), 'why', why)
end

-- Turns a message whose deliveries are used up into a dead letter.
local function bury_message(agent, name, lane, entry, tries)
  local record = entry[2][2]
  local id = string.match(record, '^{"id":"([^"]*)"')
  redis.call('XDEL', P .. 'inbox:' .. agent .. ':' .. lane, entry[1])
  redis.call('HDEL', P .. 'inbox:' .. agent .. ':tries', lane .. entry[1])
  redis.call('ZADD', P .. 'dead', NOW, id)
  redis.call('HSET', P .. 'dead:' .. id, 'agent', agent, 'lane', lane, 'message', record, 'k', entry[2][4], 'j',
    table.concat({'{"id":"', id, '","kind":"message","agent_name":', cjson.encode(name),
      ',"text":', cjson.encode(cjson.decode(record).summary), ',"attempts":', tries,
      ',"why":"it was delivered so often and never acknowledged","died_at":"', iso(now), '"}'}))
  event('message.dead_lettered', nil, 'agent_id', agent, 'agent_name', name, 'message_id', id)
end

-- Ends an attempt whose holder died or fell silent. The task is queued again: for the same agent after a pause
-- (to = 'inbox'), or in the backlog. After its last attempt it becomes a dead letter.
-- If the agent is Draining, the task always returns to the backlog: that somebody stopped an agent says nothing about
-- the task.
-- pauses: seconds, comma-separated, by attempt; the last one holds for all further attempts.
local function fail_attempt(id, why, to, pauses)
  local v = redis.call('HMGET', P .. 'task:' .. id, 'attempt', 'max', 'agent', 'name')
  local attempt = tonumber(v[1])
  if redis.call('HGET', P .. 'agent:' .. v[3], 'state') == 'Draining' then return task_to_backlog(id, why) end
  if attempt >= tonumber(v[2]) then
    detach_task(id)
    redis.call('ZADD', P .. 'dead', NOW, id)
    set_task(id, 'state', 'failed', 'dead', '1', 'ended', NOW, 'entry', '',
      'error', cjson.encode('given up after attempt ' .. v[1] .. ': ' .. why))
    event('task.dead_lettered', id, 'agent_id', v[3], 'agent_name', v[4], 'attempt', attempt, 'why', why)
    return
  end
  if to == 'backlog' then return task_to_backlog(id, why) end
  local pause, n = '0', 0
  for each in string.gmatch(pauses, '[^,]+') do
    n = n + 1
    if n <= attempt then pause = each end
  end
  detach_task(id)
  redis.call('ZADD', P .. 'delayed', pause, id)
  set_task(id, 'state', 'assigned', 'started', '', 'entry', '')
  event('task.requeued', id, 'agent_id', v[3], 'agent_name', v[4], 'attempt', attempt, 'why', why, 'pause', tonumber(pause))
end

-- Gives a failed or cancelled task its full number of attempts again. The attempt number keeps rising, so a report of
-- an old attempt stays stale.
local function retry_task(id)
  local v = redis.call('HMGET', P .. 'task:' .. id, 'attempt', 'tries')
  redis.call('ZREM', P .. 'dead', id)
  set_task(id, 'state', 'pending', 'agent', '', 'name', '', 'entry', '', 'started', '', 'ended', '', 'result', 'null',
    'error', 'null', 'dead', '0', 'max', string.format('%.0f', tonumber(v[1]) + tonumber(v[2])))
  event('task.retried', id, 'attempt', tonumber(v[1]))
end

-- Queues the running tasks of an agent again, in their old places in its inbox. Unless `counts`, the attempt is not held
-- against the task: it gets one more.
local function keep_running(agent, name, why, counts)
  local tasks = redis.call('SMEMBERS', P .. 'agent:' .. agent .. ':running')
  for _, id in ipairs(tasks) do
    if not counts then redis.call('HINCRBY', P .. 'task:' .. id, 'max', 1) end
    redis.call('SREM', P .. 'agent:' .. agent .. ':running', id)
    redis.call('ZREM', P .. 'leases', id)
    set_task(id, 'state', 'assigned', 'started', '', 'queued', NOW)
    event('task.requeued', id, 'agent_id', agent, 'agent_name', name,
      'attempt', tonumber(redis.call('HGET', P .. 'task:' .. id, 'attempt')), 'why', why)
  end
  return tasks
end

local function delete_task(id)
  detach_task(id)
  set_task(id, 'agent', '')
  redis.call('ZREM', P .. 'tasks:' .. redis.call('HGET', P .. 'task:' .. id, 'state'), id)
  redis.call('ZREM', P .. 'tasks', id)
  redis.call('ZREM', P .. 'ended', id)
  redis.call('ZREM', P .. 'dead', id)
  redis.call('DEL', P .. 'task:' .. id, P .. 'task:' .. id .. ':log')
end

-- The tasks that wait in an agent's inbox, oldest first. Drops entries that match no such task.
local function queued_tasks(agent, limit)
  local stream, tasks = P .. 'inbox:' .. agent .. ':t', {}
  for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+', 'COUNT', limit)) do
    local id = entry[2][2]
    local v = redis.call('HMGET', P .. 'task:' .. id, 'agent', 'entry')
    if v[1] == agent and v[2] == entry[1] then tasks[#tasks + 1] = id else redis.call('XDEL', stream, entry[1]) end
  end
  return tasks
end

-- Moves the oldest messages of one lane of an inbox to another mailbox. Returns how many.
local function move_messages(from, to, lane, limit)
  local moved = redis.call('XRANGE', P .. 'inbox:' .. from .. ':' .. lane, '-', '+', 'COUNT', limit)
  for _, entry in ipairs(moved) do
    redis.call('XADD', P .. 'inbox:' .. to .. ':' .. lane, '*', unpack(entry[2]))
    redis.call('XDEL', P .. 'inbox:' .. from .. ':' .. lane, entry[1])
  end
  return #moved
end

-- A page of a sorted set, after the cursor "<score>_<member>". render(member) returns JSON. The page has at most limit
-- items or about a mebibyte. Returns {1, members in the set, next cursor or '', items joined by commas}.
local function page(key, cursor, limit, backwards, render)
  limit = tonumber(limit)
  local count = redis.call('ZCARD', key)
  local start = 0
  local score, member = string.match(cursor, '^(%d+)_(.+)$')
  if score then
    local rank = redis.call(backwards and 'ZREVRANK' or 'ZRANK', key, member)
    if rank then start = rank + 1
    elseif backwards then
      start = redis.call('ZCOUNT', key, '(' .. score, '+inf')
      for _, other in ipairs(redis.call('ZRANGEBYSCORE', key, score, score)) do
        if other > member then start = start + 1 end
      end
    else
      start = redis.call('ZCOUNT', key, '-inf', '(' .. score)
      for _, other in ipairs(redis.call('ZRANGEBYSCORE', key, score, score)) do
        if other < member then start = start + 1 end
      end
    end
  end
  local bytes, out, last = 0, {}, nil
  local found = redis.call(backwards and 'ZREVRANGE' or 'ZRANGE', key, start, start + limit - 1, 'WITHSCORES')
  for i = 1, #found, 2 do
    if bytes > 1048576 then break end
    local item = render(found[i])
    out[#out + 1] = item
    bytes = bytes + #item
    last = i
  end
  local following = ''
  if last and start + (last + 1) / 2 < count then
    following = string.format('%.0f', tonumber(found[last + 1])) .. '_' .. found[last]
  end
  return {1, count, following, table.concat(out, ',')}
end

-- Refuses an order for a host that no townhall serves. ms: time without a heartbeat after which a townhall is silent.
local function refuse_host(host, ms)
  local heard = redis.call('ZSCORE', P .. 'hosts', host)
  if not heard then
    local known = table.concat(redis.call('ZREVRANGE', P .. 'hosts', 0, 9), ', ')
    return refuse('host-unknown', host, known)
  end
  if now - tonumber(heard) > tonumber(ms) or redis.call('EXISTS', P .. 'host:' .. host) == 0 then
    local since = iso(tonumber(heard))
    return refuse('host-silent', host, since)
  end
end

-- Refuses a host name that a townhall in another place uses. Forgets townhalls that were silent for ms.
local function refuse_name(host, place, ms)
  local key = P .. 'host:' .. host
  local halls = redis.call('HGETALL', key)
  for i = 1, #halls, 2 do
    local other = cjson.decode(halls[i + 1])
    if now - tonumber(other.heard) > tonumber(ms) then redis.call('HDEL', key, halls[i])
    elseif other.place ~= place then return refuse('host-name-taken', host, other.place) end
  end
end

-- Adds an order for the townhalls of a host: the verb (spawn, restart, stop, forget), the instance of an agent, and
-- further fields by name. Returns the order's id.
local function order(host, verb, agent, instance, ...)
  return redis.call('XADD', P .. 'host:' .. host .. ':orders', 'MAXLEN', '~', 10000, '*',
    'verb', verb, 'agent', agent, 'instance', instance, 'by', BY, ...)
end

-- @script open oom
-- Binds a town's name to one town. A: town id, or '' for the town that owns the name. Refuses town-name-taken, with the
-- owner's id, and no-such-town if '' finds none. Returns {1, town id}.
local owner = redis.call('HGET', P .. 'town', 'id')
local name = string.match(P, '{(.*)}')
if A[1] == '' then return owner and {1, owner} or refuse('no-such-town', name) end
if not owner then
  redis.call('HSET', P .. 'town', 'id', A[1], 'born', NOW)
  owner = A[1]
end
if owner ~= A[1] then return refuse('town-name-taken', owner) end
return {1, owner}

-- @script register
-- Creates an agent in state Starting. A: id, name, JSON head, limit of live agents, limit of rounds, the instance that
-- will run it, the process that starts it, its host. If a townhall on that host must start it, two more: the ms within
-- which, and the ms after which a townhall is silent. Returns {1, id, id of the order or ''}.
-- Atomic, so that two agents never share a name, and concurrent spawns never exceed the limit of live agents.
local id, name, head, max, rounds, instance, starter, host, within, silence = unpack(A)
local why = within and refuse_host(host, silence)
if why then return why end
if redis.call('HEXISTS', P .. 'names', string.lower(name)) == 1 then return refuse('name-taken', name) end
if redis.call('ZCARD', P .. 'live') >= tonumber(max) then return refuse('max-agents', max) end
redis.call('HSET', P .. 'names', string.lower(name), id)
redis.call('ZADD', P .. 'ids', 0, id)
redis.call('ZADD', P .. 'agents', BIRTH, id)
redis.call('HSET', P .. 'agent:' .. id, 'j', head, 'name', name, 'max_rounds', rounds, 'rounds', '0',
  'done', '0', 'restarts', '0', 'crashes', '0', 'beats', '0', 'instance', instance, 'starter', starter, 'beat', '', 'pid', '', 'host', host, 'task', '', 'born', BIRTH)
set_agent(id, 'state', 'Starting')
event('agent.registered', nil, 'agent_id', id, 'agent_name', name)
return {1, id, within and order(host, 'spawn', id, instance, 'within', within) or ''}

-- @script restarting
-- Puts a stopped agent into state Starting. A: agent, limit of live agents, the instance that will run it, the process
-- that starts it, then the host as in register. Refuses a live agent. Returns {1, id, name, id of the order or ''}.
local id, name, state = resolve(A[1])
if not id then return name end
if LIVE[state] then return refuse('agent-live', name, state) end
if redis.call('ZCARD', P .. 'live') >= tonumber(A[2]) then return refuse('max-agents', A[2]) end
local why = A[6] and refuse_host(A[5], A[7])
if why then return why end
redis.call('HINCRBY', P .. 'agent:' .. id, 'restarts', 1)
redis.call('SREM', P .. 'revive', id)
set_agent(id, 'state', 'Starting', 'instance', A[3], 'starter', A[4], 'host', A[5], 'pid', '')
event('agent.restarting', nil, 'agent_id', id, 'agent_name', name)
return {1, id, name, A[6] and order(A[5], 'restart', id, A[3], 'within', A[6]) or ''}

-- @script hello oom
-- The worker process of the registered instance takes an agent over; any other instance is fenced off.
-- A task that an earlier process was running is queued again in the same inbox, and its attempt stays counted.
-- A: agent id, instance, host, boot id, pid, process start. Returns {1, max rounds}.
local id, instance, host, boot, pid, start = unpack(A)
local key = P .. 'agent:' .. id
if redis.call('EXISTS', key) == 0 then return refuse('agent-not-found', id) end
local v = redis.call('HMGET', key, 'name', 'max_rounds', 'state', 'instance')
if not LIVE[v[3]] or v[4] ~= instance then return refuse('stale-instance', v[1], instance) end
keep_running(id, v[1], 'a new worker process took over', true)
local state = v[3] == 'Paused' and 'Paused' or v[3] == 'Draining' and 'Draining' or 'Idle'
if state ~= 'Paused' then redis.call('HSET', key, 'trouble', '', 'until', '') end
set_agent(id, 'host', host, 'boot', boot, 'pid', pid, 'start', start, 'beat', NOW, 'task', '',
  'idle', NOW, 'state', state)
event('agent.started', nil, 'agent_id', id, 'agent_name', v[1])
return {1, v[2]}

-- @script pickup oom
-- Picks an agent's next work. A: agent id, instance, limit of messages, limit of deliveries of one message, the end of
-- its log ('': unknown).
-- A message that reached its limit of deliveries without an acknowledgement becomes a dead letter.
-- Taking a task counts an attempt and starts a lease. If this instance already holds a task, it gets the same attempt
-- again: the reply may have been lost. Every inbox entry that the script looks at is started or dropped, so the caller
-- always makes progress. Messages of the kinds info and ack alone start no round. They wait for the next one, unless
-- there are so many that they would hide the messages behind them.
-- Returns {1, 'rest', state, last urgent entry seen, last normal entry seen}, or {1, 'work', task or false, messages,
-- backlog}. A task is {id, attempt, head, tags}; a message is {lane, entry, kind, JSON}; the backlog is a JSON array of
-- its 50 oldest tasks, in brief.
local id, instance, most, tries, log = unpack(A)
local key = P .. 'agent:' .. id
local v = redis.call('HMGET', key, 'instance', 'state', 'name', 'until')
if v[1] ~= instance or not LIVE[v[2]] then return refuse('stale-instance', v[3] or id, instance) end
redis.call('DEL', P .. 'inbox:' .. id .. ':c')
if v[2] == 'Paused' and v[4] and v[4] ~= '' and tonumber(v[4]) <= now then
  v[2] = 'Idle'
  set_agent(id, 'state', 'Idle', 'idle', NOW, 'trouble', '', 'until', '')
  event('agent.idle', nil, 'agent_id', id, 'agent_name', v[3], 'why', 'its pause is over')
end
local running = redis.call('SMEMBERS', key .. ':running')[1]
if not running and (v[2] == 'Paused' or v[2] == 'Draining') then return {1, 'rest', v[2], '0-0', '0-0'} end
local task = false
if running then
  local t = redis.call('HMGET', P .. 'task:' .. running, 'attempt', 'j', 'tags')
  task = {running, tonumber(t[1]), t[2], t[3]}
else
  for _ = 1, 200 do
    local entry = redis.call('XRANGE', P .. 'inbox:' .. id .. ':t', '-', '+', 'COUNT', 1)[1]
    if not entry then break end
    local tid = entry[2][2]
    local t = redis.call('HMGET', P .. 'task:' .. tid, 'state', 'agent', 'entry', 'j', 'tags', 'queued')
    if t[1] == 'assigned' and t[2] == id and t[3] == entry[1] then
      local attempt = redis.call('HINCRBY', P .. 'task:' .. tid, 'attempt', 1)
      redis.call('SADD', key .. ':running', tid)
      redis.call('ZADD', P .. 'leases', 0, tid)
      set_task(tid, 'state', 'running', 'started', NOW)
      observe('wait', t[6])
      if log ~= '' then redis.call('HSET', P .. 'task:' .. tid, 'log:' .. attempt, log) end
      event('task.started', tid, 'agent_id', id, 'agent_name', v[3], 'attempt', attempt)
      task = {tid, attempt, t[4], t[5]}
      break
    end
    redis.call('XDEL', P .. 'inbox:' .. id .. ':t', entry[1])
  end
end
local messages, actionable = {}, task
local seen = {u = '0-0', n = '0-0'}
for _, lane in ipairs({'u', 'n'}) do
  for _, entry in ipairs(redis.call('XRANGE', P .. 'inbox:' .. id .. ':' .. lane, '-', '+', 'COUNT', most - #messages) or {}) do
    local kind = entry[2][4]
    if tonumber(redis.call('HGET', P .. 'inbox:' .. id .. ':tries', lane .. entry[1]) or 0) >= tonumber(tries) then
      bury_message(id, v[3], lane, entry, tries)
    else
      messages[#messages + 1] = {lane, entry[1], kind, entry[2][2]}
      seen[lane] = entry[1]
      actionable = actionable or kind == 'task' or kind == 'query'
    end
  end
end
if not actionable and #messages < tonumber(most) then
  if v[2] ~= 'Idle' then set_agent(id, 'state', 'Idle', 'idle', NOW) end
  return {1, 'rest', 'Idle', seen.u, seen.n}
end
for _, each in ipairs(messages) do redis.call('HINCRBY', P .. 'inbox:' .. id .. ':tries', each[1] .. each[2], 1) end
local state = v[2] == 'Idle' and 'Working' or v[2]
set_agent(id, 'state', state, 'task', task and task[1] or '', 'beat', NOW)
local backlog = {}
for _, tid in ipairs(redis.call('ZRANGE', P .. 'tasks:pending', 0, 49)) do
  local t = redis.call('HMGET', P .. 'task:' .. tid, 'brief', 'tags')
  backlog[#backlog + 1] = '{"task_id":"' .. tid .. '","description":' .. t[1] .. ',"tags":' .. t[2] .. '}'
end
return {1, 'work', task, messages, '[' .. table.concat(backlog, ',') .. ']'}

-- @script beat oom
-- A worker's heartbeat. A: agent id, instance, then task, attempt, … for the tasks that it holds.
-- Counts a heartbeat for the agent, and for each task that it still holds. Returns {1, state, lost tasks}. A task is
-- lost if it was cancelled or taken away, but not if it was finished under the same attempt.
local id, instance = A[1], A[2]
local key = P .. 'agent:' .. id
local v = redis.call('HMGET', key, 'instance', 'state', 'name')
if v[1] ~= instance then return refuse('stale-instance', v[3] or id, instance) end
redis.call('HINCRBY', key, 'beats', 1)
set_agent(id, 'beat', NOW)
local lost = {}
for i = 3, #A, 2 do
  local t = redis.call('HMGET', P .. 'task:' .. A[i], 'state', 'attempt', 'agent')
  if t[2] ~= A[i + 1] or t[3] ~= id or t[1] == 'cancelled' or t[1] == 'assigned' or t[1] == 'pending' then
    lost[#lost + 1] = A[i]
  elseif t[1] == 'running' then
    redis.call('ZINCRBY', P .. 'leases', 1, A[i])
  end
end
return {1, v[2], lost}

-- @script finish oom
-- Ends a task. A: task, attempt ('' for an operator's override), 'completed' or 'failed', result JSON, error JSON, the
-- agent that must hold it ('' for any).
-- A report of another attempt is refused (stale-attempt). The same attempt and outcome again is 'already'.
-- Returns {1, 'done' or 'already', state}.
local id, attempt, outcome, result, err, holder = unpack(A)
local key = P .. 'task:' .. id
local v = redis.call('HMGET', key, 'state', 'attempt', 'agent', 'name', 'started')
if not v[1] then return refuse('task-not-found', id) end
if holder ~= '' and holder ~= v[3] then return refuse('not-your-task', id) end
if attempt ~= '' and attempt ~= v[2] then return refuse('stale-attempt', id, attempt, v[2]) end
if v[1] == 'completed' or v[1] == 'failed' or v[1] == 'cancelled' then
  if attempt ~= '' and v[1] == outcome then return {1, 'already', outcome} end
  return refuse('task-finished', id, v[1])
end
if attempt ~= '' and v[1] ~= 'running' then return refuse('stale-attempt', id, attempt, v[2]) end
detach_task(id)
observe('run:' .. outcome, v[5])
set_task(id, 'state', outcome, 'result', result, 'error', err, 'ended', NOW, 'entry', '')
if redis.call('EXISTS', P .. 'agent:' .. v[3]) == 1 then
  redis.call('HSET', P .. 'agent:' .. v[3], 'last', id)
  if outcome == 'completed' then
    redis.call('HINCRBY', P .. 'agent:' .. v[3], 'done', 1)
    redis.call('HSET', P .. 'agent:' .. v[3], 'crashes', '0')
    render_agent(v[3])
  end
end
event('task.' .. outcome, id, 'agent_id', v[3], 'agent_name', v[4], 'attempt', tonumber(v[2]),
  'why', attempt == '' and 'operator override' or nil)
return {1, 'done', outcome}

-- @script round_done oom
-- Ends a worker's round and acknowledges its messages. A: agent id, instance; then task, attempt and the end of that
-- run's log ('' three times for a round without a task); then lane, entry, …
-- Returns {1, state, rounds completed}.
local id, instance = A[1], A[2]
local key = P .. 'agent:' .. id
local v = redis.call('HMGET', key, 'instance', 'state', 'name')
if v[1] ~= instance then return refuse('stale-instance', v[3] or id, instance) end
local begin = A[3] ~= '' and redis.call('HGET', P .. 'task:' .. A[3], 'log:' .. A[4])
if begin and not string.find(begin, '-', 1, true) then
  redis.call('HSET', P .. 'task:' .. A[3], 'log:' .. A[4], begin .. '-' .. A[5])
end
for i = 6, #A, 2 do
  redis.call('XDEL', P .. 'inbox:' .. id .. ':' .. A[i], A[i + 1])
  redis.call('HDEL', P .. 'inbox:' .. id .. ':tries', A[i] .. A[i + 1])
end
local rounds = redis.call('HINCRBY', key, 'rounds', 1)
local state = v[2] == 'Working' and 'Idle' or v[2]
set_agent(id, 'state', state, 'task', '', 'idle', NOW)
return {1, state, rounds}

-- @script depart oom
-- An agent's process has ended for good. A: agent id, instance ('' for any), the agent's new state, why, and where its
-- unfinished task goes: 'backlog' (the attempt stays counted), or 'inbox' to queue it again for the same agent (its CLI
-- could not work, so the attempt is not held against the task). An agent in Error shows why.
-- Returns {1, requeued task ids}.
local id, instance, state, why, to = unpack(A)
local key = P .. 'agent:' .. id
local v = redis.call('HMGET', key, 'instance', 'name', 'state')
if not v[2] then return refuse('agent-not-found', id) end
if instance ~= '' and v[1] ~= instance then return refuse('stale-instance', v[2], instance) end
local tasks
redis.call('SREM', P .. 'revive', id)
if to == 'inbox' then tasks = keep_running(id, v[2], why)
else
  tasks = redis.call('SMEMBERS', key .. ':running')
  for _, task in ipairs(tasks) do task_to_backlog(task, why) end
end
redis.call('DEL', P .. 'inbox:' .. id .. ':c')
set_agent(id, 'instance', '', 'pid', '', 'task', '', 'state', state, 'trouble', state == 'Error' and why or '', 'until', '')
if v[3] ~= state then event('agent.' .. string.lower(state), nil, 'agent_id', id, 'agent_name', v[2], 'why', why) end
return {1, tasks}

-- @script pause_agent oom
-- Pauses an agent for a time, because its CLI can't work now: a usage limit, an overloaded service, failures in a row.
-- A: agent id, instance, why, seconds, 1 if the attempt counts, then lane, entry, … of the round's messages.
-- A task that the agent runs waits in its old place in the inbox. If the attempt counts and was the last, the task
-- becomes a dead letter; if it does not count, neither the task nor the messages lose one. If somebody has paused the
-- agent or is stopping it, that holds. Returns {1, state}.
local id, instance, why, seconds, counts = unpack(A)
local key = P .. 'agent:' .. id
local v = redis.call('HMGET', key, 'instance', 'name', 'state')
if v[1] ~= instance or not LIVE[v[3]] then return refuse('stale-instance', v[2] or id, instance) end
for _, task in ipairs(counts == '1' and redis.call('SMEMBERS', key .. ':running') or {}) do
  local t = redis.call('HMGET', P .. 'task:' .. task, 'attempt', 'max')
  if tonumber(t[1]) >= tonumber(t[2]) then fail_attempt(task, why, 'inbox', '0') end
end
keep_running(id, v[2], why, counts == '1')
for i = 6, counts == '1' and 0 or #A, 2 do redis.call('HINCRBY', P .. 'inbox:' .. id .. ':tries', A[i] .. A[i + 1], -1) end
if v[3] ~= 'Working' and v[3] ~= 'Idle' then return {1, v[3]} end
set_agent(id, 'state', 'Paused', 'task', '', 'idle', NOW, 'trouble', why, 'until', string.format('%.0f', now + 1000 * seconds))
event('agent.paused', nil, 'agent_id', id, 'agent_name', v[2], 'why', why, 'pause', tonumber(seconds))
return {1, 'Paused'}

-- @script steer
-- Pauses, resumes or closes an agent, and wakes its worker. A: agent, verb, target state, then the states from which
-- this is legal. Resuming an agent that holds a task makes it Working. Returns {1, name, state}.
local id, name, state = resolve(A[1])
if not id then return name end
local key, target, legal = P .. 'agent:' .. id, A[3], false
if state == target then return {1, name, state} end
for i = 4, #A do legal = legal or A[i] == state end
if not legal then return refuse('bad-transition', name, state, A[2]) end
if target == 'Idle' and redis.call('SCARD', key .. ':running') > 0 then target = 'Working' end
if target == 'Stopped' then redis.call('SREM', P .. 'revive', id) end
set_agent(id, 'state', target, 'trouble', '', 'until', '')
redis.call('XADD', P .. 'inbox:' .. id .. ':c', 'MAXLEN', 1, '*', 'v', A[2])
event('agent.' .. string.lower(target), nil, 'agent_id', id, 'agent_name', name)
return {1, name, target}

-- @script remove
-- Deletes an agent that has no process. A: agent id, the caller's host ('': none). Nothing in its inbox is lost: tasks
-- return to the backlog, messages go to the conductor's mailbox. If the agent ran on another host, that host gets an
-- order to forget it. Returns {1, name}.
local id = A[1]
local key = P .. 'agent:' .. id
local v = redis.call('HMGET', key, 'name', 'state', 'host')
if not v[1] then return refuse('agent-not-found', id) end
if LIVE[v[2]] then return refuse('agent-live', v[1], v[2]) end
for _, task in ipairs(redis.call('SMEMBERS', key .. ':running')) do task_to_backlog(task, 'its agent was removed') end
local inbox = P .. 'inbox:' .. id
for _, task in ipairs(queued_tasks(id, redis.call('XLEN', inbox .. ':t') + 1)) do
  task_to_backlog(task, 'its agent was removed')
end
for _, lane in ipairs({'u', 'n'}) do
  while move_messages(id, CONDUCTOR, lane, 100) > 0 do end
end
redis.call('DEL', key, key .. ':running', inbox .. ':u', inbox .. ':n', inbox .. ':t', inbox .. ':c', inbox .. ':tries')
redis.call('HDEL', P .. 'names', string.lower(v[1]))
redis.call('ZREM', P .. 'ids', id)
redis.call('SREM', P .. 'revive', id)
redis.call('ZREM', P .. 'agents', id)
event('agent.removed', nil, 'agent_id', id, 'agent_name', v[1])
if A[2] ~= '' and v[3] and v[3] ~= '' and v[3] ~= A[2] and redis.call('ZSCORE', P .. 'hosts', v[3]) then
  order(v[3], 'forget', id, '')
end
return {1, v[1]}

-- @script assign
-- Creates a task in an agent's inbox. A: agent, then the first six arguments of new_task.
-- Returns {1, task id, agent id, agent name}.
local agent, name = resolve_accepting(A[1])
if not agent then return name end
new_task(A[2], A[3], A[4], A[5], A[6], A[7], agent, name)
return {1, A[2], agent, name}

-- @script backlog_add
-- Creates a task in the backlog. A: the first six arguments of new_task. Returns {1, task id}.
new_task(unpack(A))
return {1, A[1]}

-- @script claim
-- Gives a task of the backlog to an agent. A: task, agent. Both are checked before the task moves: a claim by an
-- unknown agent leaves it in the backlog, and exactly one of many claimers wins. Returns {1, task, agent id, name}.
local agent, name = resolve_accepting(A[2])
if not agent then return name end
local state = redis.call('HGET', P .. 'task:' .. A[1], 'state')
if not state then return refuse('task-not-found', A[1]) end
if state ~= 'pending' then return refuse('task-not-pending', A[1], state) end
queue_task(A[1], agent, name)
return {1, A[1], agent, name}

-- @script assign_all
-- Gives the oldest tasks of the backlog to one agent. A: agent, limit of tasks (because a script blocks the server).
-- Returns {1, task ids}.
local agent, name = resolve_accepting(A[1])
if not agent then return name end
local tasks = redis.call('ZRANGE', P .. 'tasks:pending', 0, tonumber(A[2]) - 1)
for _, task in ipairs(tasks) do queue_task(task, agent, name) end
return {1, tasks}

-- @script backlog_remove
-- Deletes a task of the backlog. A: task. Returns {1, task}.
local state = redis.call('HGET', P .. 'task:' .. A[1], 'state')
if not state then return refuse('task-not-found', A[1]) end
if state ~= 'pending' then return refuse('task-not-pending', A[1], state) end
delete_task(A[1])
event('backlog.removed', nil, 'task_id', A[1])
return {1, A[1]}

-- @script cancel oom
-- Cancels an unfinished task. A worker that runs it learns this from its next heartbeat. A: task. Returns {1, task}.
local v = redis.call('HMGET', P .. 'task:' .. A[1], 'state', 'agent', 'name', 'attempt')
if not v[1] then return refuse('task-not-found', A[1]) end
if v[1] == 'completed' or v[1] == 'failed' or v[1] == 'cancelled' then return refuse('task-finished', A[1], v[1]) end
detach_task(A[1])
set_task(A[1], 'state', 'cancelled', 'ended', NOW, 'entry', '')
event('task.cancelled', A[1], 'agent_id', v[2], 'agent_name', v[3], 'attempt', tonumber(v[4]))
return {1, A[1]}

-- @script retry
-- Puts a failed or cancelled task back into the backlog. A: task. Returns {1, task}.
local state = redis.call('HGET', P .. 'task:' .. A[1], 'state')
if not state then return refuse('task-not-found', A[1]) end
if state ~= 'failed' and state ~= 'cancelled' then return refuse('task-not-failed', A[1], state) end
retry_task(A[1])
return {1, A[1]}

-- @script send
-- Sends a message. A: agent, sender ('' for the conductor), lane (u or n), message id, the rest of its JSON, kind.
-- Returns {1, message id, agent name}.
local id, name = resolve_mailbox(A[1])
if not id then return name end
local from, why = CONDUCTOR, nil
if A[2] ~= '' then
  from, why = resolve_mailbox(A[2])
  if not from then return why end
end
redis.call('XADD', P .. 'inbox:' .. id .. ':' .. A[3], '*', 'j', '{"id":"' .. A[4] .. '","from":"' .. from .. A[5], 'k', A[6])
event('message.sent', nil, 'agent_id', id, 'agent_name', name, 'message_id', A[4])
return {1, A[4], name}

-- @script ack
-- Deletes messages from a mailbox. A: agent, then message ids; without ids all messages. Queued tasks stay.
-- Returns {1, agent name, number of deleted messages}.
local id, name = resolve_mailbox(A[1])
if not id then return name end
local lanes = {P .. 'inbox:' .. id .. ':u', P .. 'inbox:' .. id .. ':n'}
if #A == 1 then
  return {1, name, redis.call('XTRIM', lanes[1], 'MAXLEN', 0) + redis.call('XTRIM', lanes[2], 'MAXLEN', 0)}
end
local wanted, left, removed = {}, 0, 0
for i = 2, #A do
  if not wanted[A[i]] then left = left + 1 end
  wanted[A[i]] = true
end
for _, stream in ipairs(lanes) do
  local from = '-'
  while from and left > 0 do
    local found = redis.call('XRANGE', stream, from, '+', 'COUNT', 50)
    for _, entry in ipairs(found) do
      if wanted[string.match(entry[2][2], '^{"id":"([^"]*)"')] then
        removed = removed + redis.call('XDEL', stream, entry[1])
        left = left - 1
      end
    end
    from = found[50] and '(' .. found[50][1]
  end
end
return {1, name, removed}

-- @script inbox oom
-- A page of an agent's inbox: urgent messages, then normal ones, then queued tasks. A: agent, limit, cursor
-- ("<lane>-<stream id>", exclusive, or ''). Returns {1, agent name, number of normal messages and tasks, number of
-- urgent messages, next cursor or '', items joined by commas}.
local id, name = resolve_mailbox(A[1])
if not id then return name end
local inbox = P .. 'inbox:' .. id .. ':'
local limit = tonumber(A[2])
local lane, after = string.match(A[3], '^([unt])%-(%d+%-%d+)$')
local out, bytes, following, last = {}, 0, '', A[3]
local function show(each, entry)
  if #out >= limit or bytes > 1048576 then
    following = last
    return
  end
  local item = entry[2][2]
  if each == 't' then
    local t = redis.call('HMGET', P .. 'task:' .. item, 'from', 'brief')
    if not t[1] then return end
    item = '{"id":"' .. item .. '","from":"' .. t[1] .. '","type":"task_assign","summary":' .. t[2] .. '}'
  end
  out[#out + 1] = item
  bytes = bytes + #item
  last = each .. '-' .. entry[1]
end
local lengths = {}
for _, each in ipairs({'u', 'n', 't'}) do
  lengths[each] = redis.call('XLEN', inbox .. each)
  if not lane or each == lane then
    local from = lane and '(' .. after or '-'
    lane = nil
    while lengths[each] > 0 and from and following == '' do
      local found = redis.call('XRANGE', inbox .. each, from, '+', 'COUNT', 50)
      for _, entry in ipairs(found) do
        if following == '' then show(each, entry) end
      end
      from = found[50] and '(' .. found[50][1]
    end
  end
end
return {1, name, lengths.n + lengths.t, lengths.u, following, table.concat(out, ',')}

-- @script agents oom
-- A page of agents, by birth. A: limit, cursor.
return page(P .. 'agents', A[2], A[1], false, agent_json)

-- @script agents_open oom
-- A page of the live agents, by birth. A: limit, cursor.
return page(P .. 'live', A[2], A[1], false, agent_json)

-- @script agent oom
-- One agent. A: agent. Returns {1, id, name, JSON, state, instance, host, boot id, pid, process start}.
local id, name = resolve(A[1])
if not id then return name end
local v = redis.call('HMGET', P .. 'agent:' .. id, 'state', 'instance', 'host', 'boot', 'pid', 'start')
return {1, id, name, agent_json(id), v[1], v[2], v[3], v[4], v[5], v[6]}

-- @script agent_result oom
-- The last task that an agent finished. A: agent. Returns {1, name, the task's JSON or ''}.
local id, name = resolve(A[1])
if not id then return name end
local last = redis.call('HGET', P .. 'agent:' .. id, 'last')
if not last or redis.call('EXISTS', P .. 'task:' .. last) == 0 then return {1, name, ''} end
return {1, name, task_json(last)}

-- @script stats oom
-- The statistics of a town, for metrics and scaling. A: ms after which an idle agent is at rest, ms without a heartbeat
-- after which a worker is silent.
-- Returns {1, time, {tasks in the backlog, assigned tasks, running tasks, dead letters, urgent messages in agents'
-- inboxes, live agents at rest, live agents that are not silent}, {state, agents in it, …}, {total, count, …}}.
local states, urgent, resting, heard = {}, 0, 0, 0
for _, id in ipairs(redis.call('ZRANGE', P .. 'agents', 0, -1)) do
  local v = redis.call('HMGET', P .. 'agent:' .. id, 'state', 'idle', 'beat')
  states[v[1]] = (states[v[1]] or 0) + 1
  urgent = urgent + redis.call('XLEN', P .. 'inbox:' .. id .. ':u')
  if LIVE[v[1]] then
    if v[1] == 'Idle' and now - tonumber(v[2]) >= tonumber(A[1]) then resting = resting + 1 end
    if v[1] == 'Starting' or (v[3] ~= '' and now - tonumber(v[3]) < tonumber(A[2])) then heard = heard + 1 end
  end
end
local counts = {}
for i, set in ipairs({'tasks:pending', 'tasks:assigned', 'tasks:running', 'dead'}) do
  counts[i] = redis.call('ZCARD', P .. set)
end
local agents = {}
for state, count in pairs(states) do
  agents[#agents + 1] = state
  agents[#agents + 1] = count
end
return {1, iso(now), {counts[1], counts[2], counts[3], counts[4], urgent, resting, heard}, agents,
  redis.call('HGETALL', P .. 'totals')}

-- @script evidence oom
-- What is recorded about the processes of the agents in some states. A: states. Returns {1, number of all agents,
-- {{id, name, state, instance, host, boot id, pid, process start, heartbeat age in ms}, …}}.
local wanted, out = {}, {}
for i = 1, #A do wanted[A[i]] = true end
local all = redis.call('ZRANGE', P .. 'agents', 0, -1)
for _, id in ipairs(all) do
  local v = redis.call('HMGET', P .. 'agent:' .. id, 'name', 'state', 'instance', 'host', 'boot', 'pid', 'start', 'beat')
  if wanted[v[2]] then
    local age = (v[8] and v[8] ~= '') and string.format('%.0f', now - tonumber(v[8])) or ''
    out[#out + 1] = {id, v[1], v[2], v[3], v[4], v[5] or '', v[6], v[7] or '', age}
  end
end
return {1, #all, out}

-- @script status oom
-- A page of agents and a summary of the town. A: limit, cursor, limit of events. Returns the reply of page, then the
-- number of tasks by state as a JSON object, and the latest events, newest first, joined by commas.
local found = page(P .. 'agents', A[2], A[1], false, agent_json)
local counts = {}
for _, state in ipairs({'pending', 'assigned', 'running', 'completed', 'failed', 'cancelled'}) do
  counts[#counts + 1] = '"' .. state .. '":' .. redis.call('ZCARD', P .. 'tasks:' .. state)
end
local recent = {}
for i, entry in ipairs(redis.call('XREVRANGE', P .. 'events', '+', '-', 'COUNT', A[3])) do
  recent[i] = '{"id":"' .. entry[1] .. '",' .. entry[2][2] .. '}'
end
found[5] = '{' .. table.concat(counts, ',') .. '}'
found[6] = table.concat(recent, ',')
return found

-- @script tasks oom
-- A page of tasks, newest first. A: limit, cursor, state or '', agent or ''.
local key = P .. 'tasks'
if A[4] ~= '' then
  local id, name = resolve(A[4])
  if not id then return name end
  key = P .. 'agent:' .. id .. ':tasks'
end
if A[3] ~= '' then key = key .. ':' .. A[3] end
return page(key, A[2], A[1], true, task_json)

-- @script task oom
-- One task. A: task. Returns {1, JSON}.
if redis.call('EXISTS', P .. 'task:' .. A[1]) == 0 then return refuse('task-not-found', A[1]) end
return {1, task_json(A[1])}

-- @script pending oom
-- A page of the tasks that wait in inboxes, oldest first. A: limit, cursor.
return page(P .. 'tasks:assigned', A[2], A[1], false, function(id)
  local v = redis.call('HMGET', P .. 'task:' .. id, 'j', 'agent', 'name')
  return v[1] .. ',"agent_id":"' .. v[2] .. '","agent_name":"' .. v[3] .. '"}'
end)

-- @script backlog oom
-- A page of the backlog, oldest first. A: limit, cursor.
return page(P .. 'tasks:pending', A[2], A[1], false, function(id)
  local v = redis.call('HMGET', P .. 'task:' .. id, 'j', 'tags')
  return v[1] .. ',"tags":' .. v[2] .. '}'
end)

-- @script reclaim
-- Moves the inbox of an agent that does not run. A: agent id, the agent that receives it ('' for the backlog), limit of
-- tasks and of messages per lane. To an agent it moves tasks and messages, to the backlog only tasks.
-- Returns {1, number of moved tasks, number of moved messages}.
local v = redis.call('HMGET', P .. 'agent:' .. A[1], 'name', 'state')
if not v[1] then return refuse('agent-not-found', A[1]) end
if LIVE[v[2]] then return refuse('agent-live', v[1], v[2]) end
local to, name
if A[2] ~= '' then
  to, name = resolve_accepting(A[2])
  if not to then return name end
end
local tasks = queued_tasks(A[1], A[3])
for _, task in ipairs(tasks) do
  task_to_backlog(task, 'reclaimed from ' .. v[1] .. ', which is ' .. v[2])
  if to then queue_task(task, to, name) end
end
local messages = 0
if to then
  for _, lane in ipairs({'u', 'n'}) do messages = messages + move_messages(A[1], to, lane, A[3]) end
end
return {1, #tasks, messages}

-- @script orphans
-- Unfinished tasks whose agent is deleted or does not run. A: action (list, to_backlog, cancel, delete), limit.
-- Returns {1, {{task, agent id, state, reason}, …}}.
local action, most, out, states = A[1], tonumber(A[2]), {}, {}
for _, state in ipairs({'assigned', 'running'}) do
  for _, id in ipairs(redis.call('ZRANGE', P .. 'tasks:' .. state, 0, -1)) do
    if #out >= most then break end
    local agent = redis.call('HGET', P .. 'task:' .. id, 'agent')
    if states[agent] == nil then states[agent] = redis.call('HGET', P .. 'agent:' .. agent, 'state') end
    local its = states[agent]
    if not LIVE[its] then
      out[#out + 1] = {id, agent, state, its and 'agent_terminal' or 'agent_missing'}
    end
  end
end
for _, found in ipairs(out) do
  if action == 'to_backlog' then task_to_backlog(found[1], 'orphaned: ' .. found[4])
  elseif action == 'delete' then
    delete_task(found[1])
    event('task.deleted', nil, 'task_id', found[1], 'why', found[4])
  elseif action == 'cancel' then
    detach_task(found[1])
    set_task(found[1], 'state', 'cancelled', 'ended', NOW, 'entry', '')
    event('task.cancelled', found[1], 'why', found[4])
  end
end
return {1, out}

-- @script purge_tasks oom
-- Deletes tasks in any state. A: limit. Returns {1, number of deleted tasks, number of tasks left}.
local ids = redis.call('ZRANGE', P .. 'tasks', 0, tonumber(A[1]) - 1)
for _, id in ipairs(ids) do delete_task(id) end
return {1, #ids, redis.call('ZCARD', P .. 'tasks')}

-- @script purge_rest oom
-- Deletes what remains in a town without agents and tasks: the conductor's mailbox, dead letters, events,
-- totals. Returns {1}.
local inbox = P .. 'inbox:' .. CONDUCTOR
for _, id in ipairs(redis.call('ZRANGE', P .. 'dead', 0, -1)) do redis.call('DEL', P .. 'dead:' .. id) end
redis.call('DEL', inbox .. ':u', inbox .. ':n', P .. 'dead')
redis.call('XTRIM', P .. 'events', 'MAXLEN', 0) -- not deleted: its ids must keep rising
event('town.reset', nil)
redis.call('DEL', P .. 'totals')
return {1}

-- @script events oom
-- The events after an event. A: its id ('$': from now on), limit, an agent that the caller is interested in or ''.
-- Returns {1, gap, last id, that agent's id ('' if it does not exist), id, event, id, event, …}.
-- gap is 1 if events after that id are missing (trimmed, or the stream began anew). The page then begins with the
-- oldest event.
local key = P .. 'events'
local agent, why = sought(A[3])
if not agent then return why end
local info = redis.pcall('XINFO', 'STREAM', key)
if info.err then return {1, (A[1] == '$' or A[1] == '0-0') and 0 or 1, '0-0', agent} end
local fields = {}
for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
local newest, first = fields['last-generated-id'], fields['first-entry']
local function before(a, b)
  local ams, aseq, bms, bseq = string.match(a .. ' ' .. b, '^(%d+)-(%d+) (%d+)-(%d+)$')
  return tonumber(ams) < tonumber(bms) or (ams == bms and tonumber(aseq) < tonumber(bseq))
end
if A[1] == '$' then return {1, 0, newest, agent} end
local trimmed = fields['entries-added'] > fields['length']
local gap = before(newest, A[1]) or (trimmed and before(A[1], first and first[1] or newest))
local out = {1, gap and 1 or 0, newest, agent}
for _, entry in ipairs(redis.call('XRANGE', key, gap and '-' or '(' .. A[1], '+', 'COUNT', A[2])) do
  out[#out + 1] = entry[1]
  out[#out + 1] = entry[2][2]
end
return out

-- @script latest_events oom
-- The latest events, newest first. A: limit, an agent or ''.
-- Returns {1, that agent's id or '', id, event, id, event, …}.
local agent, why = sought(A[2])
if not agent then return why end
local out = {1, agent}
for _, entry in ipairs(redis.call('XREVRANGE', P .. 'events', '+', '-', 'COUNT', A[1])) do
  out[#out + 1] = entry[1]
  out[#out + 1] = entry[2][2]
end
return out

-- @script begin oom
-- Reserves the idempotency key of an operation that needs several commands. A: key, fingerprint, seconds it may take.
-- Returns {1, 'new'} for the first request, and {1, 'done', answer JSON} for a repetition after the end of the first.
-- Refuses in-progress before that.
local key = P .. 'idem:' .. A[1]
local seen = redis.call('HMGET', key, 'f', 'r')
if not seen[1] then
  redis.call('HSET', key, 'f', A[2])
  redis.call('EXPIRE', key, A[3])
  return {1, 'new'}
end
if seen[1] ~= A[2] then return refuse('idempotency-mismatch', string.match(A[1], '[^ ]*$')) end
if not seen[2] then return refuse('in-progress', string.match(A[1], '[^ ]*$')) end
return {1, 'done', seen[2]}

-- @script settle oom
-- Ends an operation whose key `begin` reserved. A: key, answer JSON ('' if it failed, which frees the key), seconds to
-- keep the answer. Returns {1}.
local key = P .. 'idem:' .. A[1]
if A[2] == '' then redis.call('DEL', key)
else
  redis.call('HSET', key, 'r', A[2])
  redis.call('EXPIRE', key, A[3])
end
return {1}

-- @script elect_supervisor oom
-- Elects the townhall whose supervisor is active for the town or for a host, and counts its heartbeat. A: token, host
-- ('' for the town); then token and count of a rival whose count has not moved for too long, or ''. Comparing counts
-- instead of times makes the election independent of clocks.
-- Returns {1, token, count} of the active supervisor: it is the caller if the token is the caller's.
local key = P .. 'caretaker' .. (A[2] == '' and '' or ':' .. A[2])
local v = redis.call('HMGET', key, 'token', 'count')
if not v[1] or v[1] == A[1] or (v[1] == A[3] and v[2] == A[4]) then
  redis.call('HSET', key, 'token', A[1])
  return {1, A[1], redis.call('HINCRBY', key, 'count', 1)}
end
return {1, v[1], v[2]}

-- @script resign_supervisor oom
-- A supervisor ends, so that another can become active at once. A: token, host ('' for the town). Returns {1}.
local key = P .. 'caretaker' .. (A[2] == '' and '' or ':' .. A[2])
if redis.call('HGET', key, 'token') == A[1] then redis.call('HDEL', key, 'token') end
return {1}

-- @script host_here oom
-- The heartbeat of a townhall that serves a host. A: host, token, place, URL, ms after which a townhall is silent.
-- Refuses a host name that a townhall in another place uses now. Forgets hosts without a heartbeat for a week.
-- Returns {1}.
local host, token, place, url, silence = unpack(A)
local taken = refuse_name(host, place, silence)
if taken then return taken end
redis.call('HSET', P .. 'host:' .. host, token, cjson.encode({heard = NOW, place = place, url = url}))
redis.call('ZADD', P .. 'hosts', NOW, host)
for _, old in ipairs(redis.call('ZRANGEBYSCORE', P .. 'hosts', '-inf', string.format('%.0f', now - 604800000))) do
  redis.call('ZREM', P .. 'hosts', old)
  redis.call('DEL', P .. 'host:' .. old, P .. 'host:' .. old .. ':orders', P .. 'caretaker:' .. old)
end
return {1}

-- @script host_name oom
-- Checks whether a place may use a host name. A: host, place, ms after which a townhall is silent. Refuses like
-- host_here. Returns {1}.
return refuse_name(A[1], A[2], A[3]) or {1}

-- @script host_gone oom
-- A townhall ends: removes it from its host. A: host, token. Returns {1}.
redis.call('HDEL', P .. 'host:' .. A[1], A[2])
return {1}

-- @script hosts oom
-- The hosts with a townhall or with live agents, by name. A: ms after which a townhall is silent, a host or '' for all.
-- Returns {1, {{host, time of its last heartbeat or '', live agents, URL of each townhall that is not silent, …}, …}}.
local agents, names, out = {}, {}, {}
for _, name in ipairs(redis.call('ZRANGE', P .. 'hosts', 0, -1)) do agents[name] = 0 end
for _, id in ipairs(A[2] == '' and redis.call('ZRANGE', P .. 'live', 0, -1) or {}) do
  local host = redis.call('HGET', P .. 'agent:' .. id, 'host')
  if host and host ~= '' then agents[host] = (agents[host] or 0) + 1 end
end
for name in pairs(agents) do
  if A[2] == '' or A[2] == name then names[#names + 1] = name end
end
table.sort(names)
for i, name in ipairs(names) do
  local heard = redis.call('ZSCORE', P .. 'hosts', name)
  out[i] = {name, heard and iso(tonumber(heard)) or '', agents[name]}
  for _, hall in ipairs(redis.call('HVALS', P .. 'host:' .. name)) do
    hall = cjson.decode(hall)
    if now - tonumber(hall.heard) <= tonumber(A[1]) then out[i][#out[i] + 1] = hall.url end
  end
end
return {1, out}

-- @script stop_there oom
-- Orders a townhall of another host to stop an agent, which takes no new work from now on. A: agent id, instance, host,
-- why, grace period in seconds, where its unfinished task goes, ms after which a townhall is silent. The order stays
-- for a townhall that comes later. Returns {1, order, since}: since is '', or the time of a silent host's
-- last heartbeat ('never' for an unknown host).
local id, instance, host, why, grace, to, silence = unpack(A)
local v = redis.call('HMGET', P .. 'agent:' .. id, 'instance', 'name', 'state')
if not v[2] then return refuse('agent-not-found', id) end
if v[1] ~= instance or not LIVE[v[3]] then return refuse('stale-instance', v[2]) end
if v[3] ~= 'Draining' then
  set_agent(id, 'state', 'Draining')
  redis.call('XADD', P .. 'inbox:' .. id .. ':c', 'MAXLEN', 1, '*', 'v', 'stop')
  event('agent.draining', nil, 'agent_id', id, 'agent_name', v[2])
end
local missing = refuse_host(host, silence)
local since = not missing and '' or missing[2] == 'host-silent' and missing[4] or 'never'
return {1, order(host, 'stop', id, instance, 'why', why, 'grace', grace, 'to', to), since}

-- @script order_take oom
-- A townhall takes an order of its host; exactly one of several gets it. A: host, the townhall's token, order, and its
-- process, which the agent's record then names as its starter. Returns {1, answer}: 'mine'; 'gone' (another townhall
-- has it); 'void' (that instance is no longer wanted); 'late' (the caller no longer waits for the start).
local host, token, id, starter = unpack(A)
local stream = P .. 'host:' .. host .. ':orders'
local found = redis.call('XRANGE', stream, id, id)[1]
if not found or redis.call('HEXISTS', P .. 'host:' .. host, token) == 0 then return {1, 'gone'} end
redis.call('XDEL', stream, id)
local it = {}
for i = 1, #found[2], 2 do it[found[2][i]] = found[2][i + 1] end
local key = P .. 'agent:' .. it.agent
local v = redis.call('HMGET', key, 'instance', 'state', 'pid')
if v[1] ~= it.instance or not LIVE[v[2]] then return {1, 'void'} end
if it.verb ~= 'stop' then
  if v[3] ~= '' or v[2] == 'Draining' then return {1, 'void'} end
  if now - tonumber(string.match(id, '^%d+')) > tonumber(it.within) then return {1, 'late'} end
  redis.call('HSET', key, 'starter', starter)
end
return {1, 'mine'}

-- @script order_done oom
-- Reports the outcome of an order to the caller that waits for it. A: host, order, error code ('' on success), status,
-- detail. Returns {1}.
local key = P .. 'host:' .. A[1] .. ':answer:' .. A[2]
redis.call('XADD', key, '*', 'code', A[3], 'status', A[4], 'detail', A[5])
redis.call('EXPIRE', key, 60)
return {1}

-- @script liveness oom
-- What the supervisor checks. Returns {1, workers, leases, delayed, crashed}:
-- workers: live agents {id, name, state, instance, host, boot id, pid, process start, heartbeats, starter};
-- leases: running tasks {task, attempt, heartbeats for it, agent};
-- delayed: tasks in the pause between two attempts {task, seconds};
-- crashed: agents to start again {id, name, crashes, host}.
local workers, leases, delayed, crashed = {}, {}, {}, {}
for i, id in ipairs(redis.call('ZRANGE', P .. 'live', 0, -1)) do
  local v = redis.call('HMGET', P .. 'agent:' .. id, 'name', 'state', 'instance', 'host', 'boot', 'pid', 'start', 'beats',
    'starter')
  workers[i] = {id, v[1], v[2], v[3], v[4] or '', v[5] or '', v[6] or '', v[7] or '', v[8] or '0', v[9] or ''}
end
local held = redis.call('ZRANGE', P .. 'leases', 0, -1, 'WITHSCORES')
for i = 1, #held, 2 do
  local v = redis.call('HMGET', P .. 'task:' .. held[i], 'attempt', 'agent')
  leases[#leases + 1] = {held[i], v[1], held[i + 1], v[2]}
end
local waiting = redis.call('ZRANGE', P .. 'delayed', 0, 999, 'WITHSCORES')
for i = 1, #waiting, 2 do delayed[#delayed + 1] = {waiting[i], waiting[i + 1]} end
for i, id in ipairs(redis.call('SMEMBERS', P .. 'revive')) do
  local v = redis.call('HMGET', P .. 'agent:' .. id, 'name', 'crashes', 'host')
  crashed[i] = {id, v[1], v[2], v[3] or ''}
end
return {1, workers, leases, delayed, crashed}

-- @script died oom
-- An agent's process is proven dead. A: agent id, instance, why, pauses between attempts in seconds (comma-separated),
-- limit of restarts in a row (0: none). A Draining agent is never restarted.
-- A task that it was running becomes a dead letter after its last attempt. Otherwise it returns to the agent's inbox if
-- the agent is restarted, else to the backlog. Without a restart, tasks in its inbox that have had an attempt go to the
-- backlog, too. Returns {1, number of tasks that it was running}.
local id, instance, why, pauses, cap = unpack(A)
local key = P .. 'agent:' .. id
local v = redis.call('HMGET', key, 'instance', 'name', 'state')
if not v[2] then return refuse('agent-not-found', id) end
if v[1] ~= instance or not LIVE[v[3]] then return refuse('stale-instance', v[2], instance) end
local state = v[3] == 'Draining' and 'Stopped' or 'Error'
local again = state == 'Error' and redis.call('HINCRBY', key, 'crashes', 1) <= tonumber(cap)
local tasks = redis.call('SMEMBERS', key .. ':running')
for _, task in ipairs(tasks) do fail_attempt(task, why, again and 'inbox' or 'backlog', pauses) end
for _, task in ipairs(again and {} or queued_tasks(id, 200)) do
  if redis.call('HGET', P .. 'task:' .. task, 'attempt') ~= '0' then task_to_backlog(task, why) end
end
redis.call('DEL', P .. 'inbox:' .. id .. ':c')
set_agent(id, 'instance', '', 'pid', '', 'task', '', 'state', state)
redis.call(again and 'SADD' or 'SREM', P .. 'revive', id)
event('agent.' .. string.lower(state), nil, 'agent_id', id, 'agent_name', v[2], 'why', why)
return {1, #tasks}

-- @script expire oom
-- Takes a task from a holder that sent no heartbeat during a whole lease. A: task, attempt, number of heartbeats when
-- the caller last looked, where the task goes (inbox, backlog), pauses. Does nothing if there was a heartbeat since.
-- Returns {1, 1 if the task moved, else 0}.
if redis.call('ZSCORE', P .. 'leases', A[1]) ~= A[3] then return {1, 0} end
if redis.call('HGET', P .. 'task:' .. A[1], 'attempt') ~= A[2] then return {1, 0} end
fail_attempt(A[1], 'its holder was not heard of for a lease', A[4], A[5])
return {1, 1}

-- @script due oom
-- The pause between two attempts of a task is over: queues it again, or returns it to the backlog if its agent accepts
-- no tasks and will not be restarted. A: task. Returns {1}.
local id = A[1]
if redis.call('ZREM', P .. 'delayed', id) == 0 then return {1} end
local v = redis.call('HMGET', P .. 'task:' .. id, 'agent', 'name')
local state = redis.call('HGET', P .. 'agent:' .. v[1], 'state')
if ACCEPTING[state] or redis.call('SISMEMBER', P .. 'revive', v[1]) == 1 then queue_task(id, v[1], v[2])
else task_to_backlog(id, 'its agent does not run') end
return {1}

-- @script forget oom
-- Deletes old ended tasks and old dead letters of messages. A: age in ms, limit of each. Returns {1, number of tasks}.
local before = string.format('%.0f', now - tonumber(A[1]))
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'dead', '-inf', before, 'LIMIT', 0, A[2])) do
  if redis.call('DEL', P .. 'dead:' .. id) == 1 then redis.call('ZREM', P .. 'dead', id) end
end
local old = redis.call('ZRANGEBYSCORE', P .. 'ended', '-inf', before, 'LIMIT', 0, A[2])
for _, id in ipairs(old) do delete_task(id) end
return {1, #old}

-- @script history oom
-- The history of a task, oldest first. A: task. Returns {1, entries joined by commas, attempt, its range in the log
-- ("from-to" or "from"), attempt, …}.
local attempts = tonumber(redis.call('HGET', P .. 'task:' .. A[1], 'attempt'))
if not attempts then return refuse('task-not-found', A[1]) end
local out = {1, table.concat(redis.call('LRANGE', P .. 'task:' .. A[1] .. ':log', 0, -1), ',')}
for i = math.max(1, attempts - 99), attempts do
  local log = redis.call('HGET', P .. 'task:' .. A[1], 'log:' .. i)
  if log then
    out[#out + 1] = i
    out[#out + 1] = log
  end
end
return out

-- @script release
-- Returns a running task to the backlog; the attempt stays counted. A: task, attempt ('' for an operator's override),
-- the agent that must hold it ('' for any). Returns {1, task}.
local v = redis.call('HMGET', P .. 'task:' .. A[1], 'state', 'attempt', 'agent')
if not v[1] then return refuse('task-not-found', A[1]) end
if A[3] ~= '' and A[3] ~= v[3] then return refuse('not-your-task', A[1]) end
if A[2] ~= '' and (A[2] ~= v[2] or v[1] ~= 'running') then return refuse('stale-attempt', A[1], A[2], v[2]) end
if v[1] ~= 'running' then return refuse('task-not-running', A[1], v[1]) end
task_to_backlog(A[1], A[2] == '' and 'released by an operator' or 'released')
return {1, A[1]}

-- @script deadletter oom
-- A page of the dead letters, oldest first. A: limit, cursor.
return page(P .. 'dead', A[2], A[1], false, function(id)
  local letter = redis.call('HGET', P .. 'dead:' .. id, 'j')
  if letter then return letter end
  local v = redis.call('HMGET', P .. 'task:' .. id, 'name', 'brief', 'attempt', 'error', 'ended')
  return table.concat({'{"id":"', id, '","kind":"task","agent_name":', json_string(v[1]), ',"text":', v[2],
    ',"attempts":', v[3], ',"why":', v[4], ',"died_at":', json_time(v[5]), '}'})
end)

-- @script deadletter_retry
-- Retries a dead letter: a task returns to the backlog, a message to the inbox it came from (or to the conductor's, if
-- that agent is deleted). A: id. Returns {1, kind}.
local id = A[1]
if not redis.call('ZSCORE', P .. 'dead', id) then return refuse('no-dead-letter', id) end
local v = redis.call('HMGET', P .. 'dead:' .. id, 'agent', 'lane', 'message', 'k')
if v[1] then
  local to = redis.call('EXISTS', P .. 'agent:' .. v[1]) == 1 and v[1] or CONDUCTOR
  redis.call('XADD', P .. 'inbox:' .. to .. ':' .. v[2], '*', 'j', v[3], 'k', v[4])
  redis.call('DEL', P .. 'dead:' .. id)
  redis.call('ZREM', P .. 'dead', id)
  event('message.retried', nil, 'message_id', id)
  return {1, 'message'}
end
retry_task(id)
return {1, 'task'}

-- @script deadletter_drop
-- Drops a dead letter: a task stays failed, a message is deleted. A: id. Returns {1, kind}.
local id = A[1]
if redis.call('ZREM', P .. 'dead', id) == 0 then return refuse('no-dead-letter', id) end
if redis.call('DEL', P .. 'dead:' .. id) == 1 then
  event('message.dropped', nil, 'message_id', id)
  return {1, 'message'}
end
set_task(id, 'dead', '0')
event('task.dropped', id)
return {1, 'task'}
