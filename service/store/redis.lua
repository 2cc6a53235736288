-- The store's script: group commits with compare-and-set, and the search in a log.
-- ARGV is flat: binary values need no packing, and integers beyond 2^53 stay strings.

local LOG, SNAPSHOTS, LINE = 'recurra:log:', 'recurra:snapshots:', 'recurra:line:'
local UPTO, SINCE = 'recurra:upto:', 'recurra:since:'
local HEADER = '<I6c12I4B'

local at = 0
local function take()
    at = at + 1
    return ARGV[at]
end

-- So many values, or an empty one in their place.
local function takes(count)
    local found = {take()}
    if found[1] ~= '' then
        for i = 2, count do found[i] = take() end
    end
    return unpack(found)
end

-- ---------------------------------------------------------------- the log: a list of segments in order of position

-- The index of the first segment that ends after a position.
local function find(log, position)
    local low, high = 0, redis.call('LLEN', log)
    while low < high do
        local middle = math.floor((low + high) / 2)
        if struct.unpack('<I6', redis.call('LINDEX', log, middle)) > position then
            high = middle
        else
            low = middle + 1
        end
    end
    return low
end

local function read(branch, after, to, most)
    local log = LOG .. branch
    local first = find(log, after)
    return redis.call('LRANGE', log, first, math.min(first + most - 1, find(log, to - 1)))
end

-- A segment's first entries: those up to a position.
local function cut(segment, to)
    local last, times, count, flags = struct.unpack(HEADER, segment)
    local kept, body = count - (last - to), string.sub(segment, 24)
    local logprobs = flags >= 2 and 4 * count or 0
    local size = (#body - logprobs) / count
    return struct.pack(HEADER, to, times, kept, flags) .. string.sub(body, 1, kept * size)
        .. (logprobs > 0 and string.sub(body, count * size + 1, count * size + 4 * kept) or '')
end

local function trim_beyond(log, position)
    local index = find(log, position)
    local over = redis.call('LINDEX', log, index)
    if not over then return end
    local last, _, count = struct.unpack(HEADER, over)
    if last - count < position then
        redis.call('LSET', log, index, cut(over, position))
        index = index + 1
    end
    if index == 0 then redis.call('UNLINK', log) else redis.call('LTRIM', log, 0, index - 1) end
end

-- ---------------------------------------------------------------- snapshots: a hash of '<position> <graph>'

local function trim_snapshots(branch, low, high)
    for _, field in ipairs(redis.call('HKEYS', SNAPSHOTS .. branch)) do
        local position = tonumber(string.match(field, '^%d+'))
        if position < low or position > high then redis.call('HDEL', SNAPSHOTS .. branch, field) end
    end
end

local function origins(branch)
    local found = {}
    local rows = redis.call('ZRANGEBYSCORE', SINCE .. branch, '(0', '+inf', 'WITHSCORES')
    for i = 2, #rows, 2 do found[tonumber(rows[i])] = true end
    return found
end

local function by_graph(branch)
    local graphs = {}
    for _, field in ipairs(redis.call('HKEYS', SNAPSHOTS .. branch)) do
        local position, graph = string.match(field, '^(%d+) (.*)$')
        graphs[graph] = graphs[graph] or {}
        table.insert(graphs[graph], tonumber(position))
    end
    return graphs
end

local newest, spacing = 0, 0

-- Drop the snapshots of a branch that need not be kept: see surplus in base.py.
local function thin(branch)
    if redis.call('HLEN', SNAPSHOTS .. branch) <= newest then return end
    local protected = origins(branch)
    for graph, positions in pairs(by_graph(branch)) do
        table.sort(positions)
        local range = nil
        for i, position in ipairs(positions) do
            local first = range ~= math.floor(position / spacing)
            range = math.floor(position / spacing)
            if not first and not protected[position] and i <= #positions - newest then
                redis.call('HDEL', SNAPSHOTS .. branch, string.format('%.0f %s', position, graph))
            end
        end
    end
end

-- ---------------------------------------------------------------- which sessions reach a branch, where more than one may

-- Drop what no session reaches.
local function collect(branch)
    local top = redis.call('ZREVRANGE', UPTO .. branch, 0, 0, 'WITHSCORES')
    if #top == 0 then
        redis.call('UNLINK', LOG .. branch, SNAPSHOTS .. branch, LINE .. branch)
        return
    end
    local low = tonumber(redis.call('ZRANGE', SINCE .. branch, 0, 0, 'WITHSCORES')[2])
    local high = top[2] == 'inf' and math.huge or tonumber(top[2])
    redis.call('LTRIM', LOG .. branch, find(LOG .. branch, low), -1)
    if high < math.huge then trim_beyond(LOG .. branch, high) end
    trim_snapshots(branch, low, high)
end

local function reach(session, branch, upto, since)
    redis.call('ZADD', UPTO .. branch, upto, session)
    redis.call('ZADD', SINCE .. branch, since, session)
end

local function unreach(session, branch)
    redis.call('ZREM', UPTO .. branch, session)
    redis.call('ZREM', SINCE .. branch, session)
end

-- ---------------------------------------------------------------- what a commit is made of, beside plain commands

local own = {}
local loose = {}

function own.snapshot(branch, field, value)
    redis.call('HSET', SNAPSHOTS .. branch, field, value)
    thin(branch)
end

-- A snapshot without a commit: not where no session reaches.
function own.loose(branch, field, value)
    local top = redis.call('ZREVRANGE', UPTO .. branch, 0, 0, 'WITHSCORES')
    local beyond = #top > 0 and top[2] ~= 'inf' and tonumber(string.match(field, '^%d+')) > tonumber(top[2])
    if not beyond and redis.call('EXISTS', LOG .. branch, SNAPSHOTS .. branch, LINE .. branch) > 0 then
        own.snapshot(branch, field, value)
    end
end

-- The session leaves a branch and its past.
function own.leave(session, branch)
    local line = redis.call('ZRANGE', LINE .. branch, 0, -1)
    table.insert(line, branch)
    for _, one in ipairs(line) do
        unreach(session, one)
        loose[one] = true
    end
end

-- The session is on a branch, and gives up what lies before its origin. Where it has neither past nor origin, nothing
-- needs to be known of it: then the branch is its own alone.
function own.reach(session, branch, origin)
    local line = redis.call('ZRANGE', LINE .. branch, 0, -1, 'WITHSCORES')
    for i = 1, #line, 2 do
        unreach(session, line[i])
        if tonumber(origin) <= tonumber(line[i + 1]) then reach(session, line[i], line[i + 1], origin) end
        loose[line[i]] = true
    end
    if tonumber(origin) > 0 or redis.call('EXISTS', UPTO .. branch) == 1 then
        reach(session, branch, 'inf', origin)
        loose[branch] = true
    end
end

local function reply_time(key, field)
    local value = field and redis.call('HGET', key, field)
    return value and tonumber(string.match(value, '^%d+')) or 0
end

-- Keep an answer, and drop at most two that are too old or too many.
function own.reply(key, order, field, value, most, ttl_s, oldest)
    if redis.call('HSET', key, field, value) == 0 then redis.call('LREM', order, -1, field) end
    redis.call('RPUSH', order, field)
    for _ = 1, 2 do
        local first = redis.call('LINDEX', order, 0)
        if redis.call('LLEN', order) <= tonumber(most) and reply_time(key, first) > tonumber(oldest) then break end
        redis.call('HDEL', key, first)
        redis.call('LPOP', order)
    end
    redis.call('EXPIRE', key, ttl_s)
    redis.call('EXPIRE', order, ttl_s)
end

-- ---------------------------------------------------------------- committing

local function run(count)
    for _ = 1, count do
        local command = {}
        for i = 1, tonumber(take()) do command[i] = take() end
        local name = table.remove(command, 1)
        if own[name] then own[name](unpack(command)) else redis.call(name, unpack(command)) end
    end
end

-- Whether the session that a fork leaves still lives in that epoch and holds all that the fork needs.
local function holds_source(key, epoch, session, branch, origin)
    local value = redis.call('GET', key)
    if not value then return false end
    local found, status, since = string.match(value, '^(%d+) %d+ %x* (%a) (%d+) ')
    if found ~= epoch or status ~= 'l' or tonumber(since) > tonumber(origin) then return false end
    return true, since
end

local function taken(key, field, life, mine, oldest)
    local value = redis.call('HGET', key, field)
    if not value then return false end
    local time, of_life, pending = string.match(value, '^(%d+) (%d+) (%d) ')
    return tonumber(time) > oldest and of_life == life and not (pending == '1' and mine == '1')
end

-- One session's part; answers 1 (applied), 0 (refused), or the value that its head has, in a table.
local function part(oldest)
    local key, seen = take(), take()
    local source, epoch, session, branch, origin = takes(5)
    local reply, field, life, mine = takes(4)
    local width, count = tonumber(take()), tonumber(take())
    local after = at + width
    local value = key ~= '' and redis.call('GET', key)
    if key ~= '' and ((value and string.match(value, '^[^\n]*\n') or '') ~= seen) then
        at = after
        return {value or ''}
    end
    local live, since = true, nil
    if source ~= '' then live, since = holds_source(source, epoch, session, branch, origin) end
    if not live or (reply ~= '' and taken(reply, field, life, mine, oldest)) then
        at = after
        return 0
    end
    loose = {}
    run(count)
    if source ~= '' and branch ~= '' and not redis.call('ZSCORE', UPTO .. branch, session) then
        reach(session, branch, 'inf', since)
    end
    for one in pairs(loose) do collect(one) end
    return 1
end

local function commit()
    if redis.call('EXISTS', take()) == 1 then return redis.error_reply('VOID this commit was given up') end
    local oldest, answers = tonumber(take()), {}
    newest, spacing = tonumber(take()), tonumber(take())
    for i = 1, tonumber(take()) do answers[i] = part(oldest) end
    run(tonumber(take()))
    return answers
end

if take() == 'log' then return read(take(), tonumber(take()), tonumber(take()), tonumber(take())) end
return commit()
