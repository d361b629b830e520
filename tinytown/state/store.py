"""The town's state in Redis: its keys, its scripts, and a method of `Store` for every command.

Start with `Store`. Each of its verbs (the methods from `ping` on) returns a `Command`. `Store.call` runs one at once;
the event loop of `http.server` runs them in batches. The functions of `core` are `Step`s: generators that yield
commands and receive the replies.

All keys begin with `tt:{<town>}:`. They share this hash tag so that scripts also run on a Redis Cluster.

    town                 hash    id, born: the town that owns this name
    names                hash    agent id by lower-case name; this makes names unique
    ids                  zset    agent ids, all with score 0, to look an agent up by a prefix of its id
    agents               zset    agent ids by birth
    live                 zset    ids of the agents in a live state, by birth
    agent:<id>           hash    j m name state instance starter host boot pid start beat beats idle task last
                                 max_rounds rounds done restarts crashes born. j is the immutable part of the agent's
                                 JSON, without the closing brace; m is the rest of it, rendered at each change
    agent:<id>:running   set     tasks that the agent's process has taken
    agent:<id>:tasks     zset    the agent's tasks by birth; agent:<id>:tasks:<state> has the ones in that state
    inbox:<id>:u n       stream  urgent and normal messages: j (JSON as listed), k (kind)
    inbox:<id>:t         stream  queued tasks: t (task id); the entry stays until the task is finished
    inbox:<id>:tries     hash    number of deliveries of a message, by lane and entry
    inbox:<id>:c         stream  control lane: an entry wakes the worker after its state has changed
    task:<id>            hash    j brief tags m from state agent name entry queued attempt max tries result error dead
                                 born started ended; log:<attempt> is the attempt's range in its agent's log
    task:<id>:log        list    the task's history, one JSON object per change
    tasks                zset    all tasks by birth; tasks:<state> has the ones in that state, tasks:pending is the
                                 backlog
    leases               zset    running tasks; the score counts the heartbeats for the task
    delayed              zset    tasks in the pause between two attempts; the score is the pause in seconds
    ended                zset    ended tasks by the time of their end, ms
    dead                 zset    dead letters by the time of their death, ms: tasks, and messages, which have a
    dead:<id>            hash    j (JSON as listed), agent, lane, message, k
    revive               set     ids of crashed agents that the supervisor will start again
    caretaker            hash    token, count: the townhall whose supervisor is active, and a count that it increments;
                                 caretaker:<host> is the same for the processes of one host
    hosts                zset    hosts by the time of the last heartbeat of one of their townhalls, ms
    host:<name>          hash    the host's townhalls by token: heard (ms), place, url
    host:<name>:orders   stream  orders to the host's townhalls: verb agent instance by; also within, or why grace to
    host:<name>:answer:* stream  the outcome of an order
    events               stream  j: one JSON object per event, without its braces
    totals               hash    the number of events by type; also histograms of how long tasks waited (wait) and
                                 ran (run:<outcome>): <name>:<index in model.TASK_BOUNDS>, and <name>:ms for the sum
    idem:<p> <op> <key>  hash    f r: fingerprint and reply of a principal's request with an idempotency key

Times come from the clock of Redis, in ms; births are in µs.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Generator, Iterable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from ..errors import TownError, refusal
from ..model import lua_sets
from .client import NOT_PRIMARY, TIMEOUT, ErrorReply, Part, RedisConnection, as_town_error, pack
from .endpoints import Endpoint

T = TypeVar('T')

IDEMPOTENCY_SECS: Final = 86400
# The host where an agent starts: unknown. Otherwise (host,), and for an order also its two times in ms.
NOWHERE: Final[tuple[Part, ...]] = ('',)
NO_RUN: Final[tuple[Part, ...]] = ('', '', '')  # a round without a task; else task, attempt, and the end of its log


class Page(bytes, Generic[T]):
    """JSON text of shape T, joined from stored pieces. It goes to the client without being parsed."""


# ----------------------------------------------------------------------------------------------------------- scripts

_WRAP = """
local function body()
%s
end
local seen_key = P .. 'idem:' .. ARGV[1]
if ARGV[1] ~= '' then
  local seen = redis.call('HMGET', seen_key, 'f', 'r')
  if seen[1] then
    if seen[1] ~= ARGV[2] then
      return refuse('idempotency-mismatch', string.match(ARGV[1], '[^ ]*$'))
    end
    return cjson.decode(seen[2])
  end
end
local reply = body()
if ARGV[1] ~= '' and reply[1] == 1 then
  redis.call('HSET', seen_key, 'f', ARGV[2], 'r', cjson.encode(reply))
  redis.call('EXPIRE', seen_key, %d)
end
return reply
"""


class Script:
    """A Lua script and its SHA-1 digest, for EVALSHA. `make` composes the text at first use: `tt` runs only a few."""

    def __init__(self, name: str, make: Callable[[], str]) -> None:
        self.name = name
        self._make = make

    @cached_property
    def text(self) -> bytes:
        return self._make().encode()

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


_COMMENT: Final = re.compile(r'^ *--.*\n| +-- .*', re.M)
_WORD: Final = re.compile(r'[A-Za-z_]\w*')
_LOCAL: Final = re.compile(r'^(local (?:function )?(\w+).*\n(?:(?!local ).*\n)*)', re.M)


@lru_cache(maxsize=1)
def scripts() -> dict[str, Script]:
    """The scripts of scripts.lua by name, each with the parts of the prelude that it uses."""
    source = Path(__file__).with_name('scripts.lua').read_text('utf-8')
    sections = re.split(r'^-- @(?:script )?(\w+)( oom)?\n', source, flags=re.M)
    prelude = [
        (name, text, set(_WORD.findall(text)))
        for text, name in _LOCAL.findall(lua_sets() + _COMMENT.sub('', sections[3]))
    ]
    found = {}
    for name, oom, body in zip(sections[4::3], sections[5::3], sections[6::3], strict=True):
        flags = '#!lua flags=allow-oom\n' if oom else '#!lua\n'
        found[name] = Script(name, partial(_composed, flags, prelude, body))
    return found


def _composed(flags: str, prelude: list[tuple[str, str, set[str]]], body: str) -> str:
    """The text of a script: the locals of the prelude that it uses, then its body.

    Unused locals are left out, because Redis would create them anew at every call. `prelude` has a name, a text and
    the words in that text for each local. A local may use earlier ones, so this starts from the end.
    """
    wrapped = _WRAP % (_COMMENT.sub('', body), IDEMPOTENCY_SECS)
    words, parts = set(_WORD.findall(wrapped)), [wrapped]
    for name, text, its_words in reversed(prelude):
        if name in words:
            words |= its_words
            parts.append(text)
    return flags + ''.join(reversed(parts))


class Command:
    """One round trip: a script with its arguments, or a plain Redis command.

    `by` is the principal, for the records. `key` is the idempotency key, and `fingerprint` identifies the request that
    it belongs to. `block` is the time in seconds that a blocking command may take in addition to TIMEOUT.
    """

    __slots__ = ('args', 'block', 'by', 'fingerprint', 'key', 'script')

    def __init__(
        self,
        script: Script | None,
        args: tuple[Part, ...],
        block: float = 0,
        by: str = '',
        key: str = '',
        fingerprint: str = '',
    ) -> None:
        self.script = script
        self.args = args
        self.block = block
        self.by = by
        self.key = key
        self.fingerprint = fingerprint

    def pack(self, store: Store, whole: bool = False) -> bytes:
        """The bytes for Redis; with `whole`, they contain the script's text instead of its digest."""
        script = self.script
        if script is None:
            return pack(self.args)
        call = (b'EVAL', script.text) if whole else (b'EVALSHA', script.digest)
        return pack((*call, 1, store.prefix, self.key, self.fingerprint, self.by, store.events, *self.args))

    def result(self, reply: Any) -> Any:
        """Converts a reply to the value that the step receives. Raises TownError for a refusal or an error reply."""
        if isinstance(reply, ErrorReply):
            raise as_town_error(reply)
        if isinstance(reply, TownError):
            raise reply
        if self.script is not None:
            if reply[0] == 0:
                raise refusal(*(text(each) for each in reply[1:]))
            return reply[1:]
        return reply


Step = Generator[Command, Any, T]


def text(value: Any) -> str:
    """A reply's bytes (or number) as text."""
    return value.decode() if isinstance(value, bytes) else str(value)


# ------------------------------------------------------------------------------------------------------------- store


class Store:
    """The state of one town. Threads may share a store: each thread has its own connection."""

    def __init__(self, endpoint: Endpoint, town: str, events: int = 100_000) -> None:
        self.endpoint = endpoint
        self.prefix = f'tt:{{{town}}}:'.encode()
        self.events = events
        self._by = self._key = self._fingerprint = ''
        self._local = threading.local()

    def acting_as(self, by: str, key: str = '', fingerprint: str = '') -> Store:
        """A store on the same connections, whose commands carry this principal, idempotency key and fingerprint."""
        view = Store.__new__(Store)
        view.__dict__.update(self.__dict__, _by=by, _key=key, _fingerprint=fingerprint)
        return view

    def run(self, step: Step[T]) -> T:
        """Runs a step to its end, one round trip at a time. Raises what the step raises, or Unavailable."""
        try:
            command = next(step)
            while True:
                try:
                    reply = self.call(command)
                except TownError as e:
                    command = step.throw(e)
                else:
                    command = step.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result

    def call(self, command: Command) -> Any:
        """Runs a command on this thread's connection and returns its result. Raises TownError."""
        reply = self._exchange(command)
        if isinstance(reply, ErrorReply) and reply.kind in NOT_PRIMARY:
            self.close()  # the next connection goes to the server that accepts writes
            if reply.kind == 'MOVED':  # Redis did not execute it
                reply = self._exchange(command)
        if isinstance(reply, ErrorReply):
            connection: RedisConnection | None = getattr(self._local, 'connection', None)
            raise as_town_error(reply, connection.peer if connection else '', self.prefix.decode())
        return command.result(reply)

    def _exchange(self, command: Command) -> Any:
        connection = self._connection()
        timeout = TIMEOUT + command.block
        reply = connection.request(command.pack(self), timeout)
        if isinstance(reply, ErrorReply) and reply.kind == 'NOSCRIPT':
            reply = connection.request(command.pack(self, whole=True), timeout)
        return reply

    def _connection(self) -> RedisConnection:
        connection: RedisConnection | None = getattr(self._local, 'connection', None)
        if connection is None or connection.is_stale():
            if connection is not None:
                connection.close()
            self._local.connection = connection = self.endpoint.open()
        return connection

    def close(self) -> None:
        """Closes this thread's connection."""
        connection: RedisConnection | None = getattr(self._local, 'connection', None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    # ----------------------------------------------------------------------------------------------------- verbs
    # One line each. The comment above a script in scripts.lua explains its arguments and its reply.

    def _script(self, name: str, *args: Part) -> Command:
        return Command(scripts()[name], args, 0, self._by, self._key, self._fingerprint)

    def ping(self) -> Command:
        return Command(None, ('PING',))

    def info(self, section: str) -> Command:
        return Command(None, ('INFO', section))

    def setting(self, name: str) -> Command:
        return Command(None, ('CONFIG', 'GET', name))

    def open(self, town_id: str) -> Command:
        return self._script('open', town_id)

    # agents

    def register(
        self,
        agent: str,
        name: str,
        head: str,
        max_live: int,
        rounds: int,
        instance: str,
        starter: str = '',
        where: tuple[Part, ...] = NOWHERE,
    ) -> Command:
        return self._script('register', agent, name, head, max_live, rounds, instance, starter, *where)

    def restarting(
        self, ref: str, max_live: int, instance: str, starter: str = '', where: tuple[Part, ...] = NOWHERE
    ) -> Command:
        return self._script('restarting', ref, max_live, instance, starter, *where)

    def revive_later(self, agent: str) -> Command:
        """Asks the supervisor to start an agent that does not run."""
        return Command(None, ('SADD', self.prefix + b'revive', agent))

    def steer(self, ref: str, verb: str, to: str, legal: Iterable[str]) -> Command:
        return self._script('steer', ref, verb, to, *legal)

    def depart(self, agent: str, instance: str, state: str, why: str, to: str) -> Command:
        return self._script('depart', agent, instance, state, why, to)

    def pause_agent(
        self, agent: str, instance: str, why: str, seconds: int, counts: bool, entries: Iterable[str]
    ) -> Command:
        return self._script('pause_agent', agent, instance, why, seconds, int(counts), *entries)

    def remove(self, agent: str, host: str = '') -> Command:
        return self._script('remove', agent, host)

    def agent(self, ref: str) -> Command:
        return self._script('agent', ref)

    def agents(self, limit: int, cursor: str) -> Command:
        return self._script('agents', limit, cursor)

    def agents_open(self, limit: int, cursor: str) -> Command:
        return self._script('agents_open', limit, cursor)

    def agent_result(self, ref: str) -> Command:
        return self._script('agent_result', ref)

    def evidence(self, states: Iterable[str]) -> Command:
        return self._script('evidence', *states)

    def stats(self, rest_ms: int, silence_ms: int) -> Command:
        return self._script('stats', rest_ms, silence_ms)

    def status(self, limit: int, cursor: str, events: int) -> Command:
        return self._script('status', limit, cursor, events)

    # workers

    def hello(self, agent: str, instance: str, host: str, boot: str, pid: int, start: str) -> Command:
        return self._script('hello', agent, instance, host, boot, pid, start)

    def pickup(self, agent: str, instance: str, max_messages: int, max_deliveries: int, log: Part = '') -> Command:
        return self._script('pickup', agent, instance, max_messages, max_deliveries, log)

    def doorbell(self, agent: str, after: dict[str, str], block_ms: int) -> Command:
        """Blocks until one of the lanes has an entry after the given id, for `block_ms` at most."""
        keys = [self.prefix + f'inbox:{agent}:{lane}'.encode() for lane in after]
        parts: tuple[Part, ...] = ('XREAD', 'COUNT', 1, 'BLOCK', block_ms, 'STREAMS', *keys, *after.values())
        return Command(None, parts, block=block_ms / 1000)

    def beat(self, agent: str, instance: str, held: Iterable[Part]) -> Command:
        return self._script('beat', agent, instance, *held)

    def round_done(self, agent: str, instance: str, entries: Iterable[str], run: tuple[Part, ...] = NO_RUN) -> Command:
        return self._script('round_done', agent, instance, *run, *entries)

    # tasks

    def assign(self, ref: str, task: tuple[Part, ...]) -> Command:
        return self._script('assign', ref, *task)

    def tasks(self, limit: int, cursor: str, state: str, ref: str) -> Command:
        return self._script('tasks', limit, cursor, state, ref)

    def task(self, task: str) -> Command:
        return self._script('task', task)

    def pending(self, limit: int, cursor: str) -> Command:
        return self._script('pending', limit, cursor)

    def finish(self, task: str, attempt: str, outcome: str, result: str, error: str, holder: str = '') -> Command:
        return self._script('finish', task, attempt, outcome, result, error, holder)

    def cancel(self, task: str) -> Command:
        return self._script('cancel', task)

    def release(self, task: str, attempt: str, holder: str = '') -> Command:
        return self._script('release', task, attempt, holder)

    def history(self, task: str) -> Command:
        return self._script('history', task)

    def retry(self, task: str) -> Command:
        return self._script('retry', task)

    # backlog

    def backlog(self, limit: int, cursor: str) -> Command:
        return self._script('backlog', limit, cursor)

    def backlog_add(self, task: tuple[Part, ...]) -> Command:
        return self._script('backlog_add', *task)

    def backlog_remove(self, task: str) -> Command:
        return self._script('backlog_remove', task)

    def claim(self, task: str, ref: str) -> Command:
        return self._script('claim', task, ref)

    def assign_all(self, ref: str, limit: int) -> Command:
        return self._script('assign_all', ref, limit)

    # messages

    def send(self, ref: str, sender: str, lane: str, message: str, rest: str, kind: str) -> Command:
        return self._script('send', ref, sender, lane, message, rest, kind)

    def inbox(self, ref: str, limit: int, cursor: str) -> Command:
        return self._script('inbox', ref, limit, cursor)

    def ack(self, ref: str, messages: Iterable[str]) -> Command:
        return self._script('ack', ref, *messages)

    # events

    def last_event(self) -> Command:
        return Command(None, ('XREVRANGE', self.prefix + b'events', '+', '-', 'COUNT', 1))

    def events_after(self, after: str, limit: int, agent: str = '') -> Command:
        return self._script('events', after, limit, agent)

    def latest_events(self, limit: int, agent: str) -> Command:
        return self._script('latest_events', limit, agent)

    def next_event(self, after: str, block_ms: int) -> Command:
        """Blocks until there is an event after the given id, for `block_ms` at most."""
        return self.entries('events', after, block_ms)

    def entries(self, stream: str, after: str, block_ms: int, limit: int = 1) -> Command:
        """The entries of a stream after an id, [[key, [[id, fields], …]]]; None if none comes within `block_ms`."""
        key = self.prefix + stream.encode()
        parts: tuple[Part, ...] = ('XREAD', 'COUNT', limit, 'BLOCK', block_ms, 'STREAMS', key, after)
        return Command(None, parts, block=block_ms / 1000)

    # recovery

    def reclaim(self, agent: str, to: str, limit: int) -> Command:
        return self._script('reclaim', agent, to, limit)

    def orphans(self, action: str, limit: int) -> Command:
        return self._script('orphans', action, limit)

    def purge_tasks(self, limit: int) -> Command:
        return self._script('purge_tasks', limit)

    def purge_rest(self) -> Command:
        return self._script('purge_rest')

    # the supervisor

    def elect_supervisor(self, token: str, host: str, rival: str, count: str) -> Command:
        return self._script('elect_supervisor', token, host, rival, count)

    def resign_supervisor(self, token: str, host: str) -> Command:
        return self._script('resign_supervisor', token, host)

    def liveness(self) -> Command:
        return self._script('liveness')

    def died(self, agent: str, instance: str, why: str, pauses: Iterable[int], again: int) -> Command:
        return self._script('died', agent, instance, why, _joined(pauses), again)

    def expire(self, task: str, attempt: str, beats: str, to: str, pauses: Iterable[int]) -> Command:
        return self._script('expire', task, attempt, beats, to, _joined(pauses))

    def due(self, task: str) -> Command:
        return self._script('due', task)

    def forget(self, age_ms: int, limit: int) -> Command:
        return self._script('forget', age_ms, limit)

    # hosts

    def host_here(self, host: str, token: str, place: str, url: str, silence_ms: int) -> Command:
        return self._script('host_here', host, token, place, url, silence_ms)

    def host_name(self, host: str, place: str, silence_ms: int) -> Command:
        return self._script('host_name', host, place, silence_ms)

    def host_gone(self, host: str, token: str) -> Command:
        return self._script('host_gone', host, token)

    def hosts(self, silence_ms: int, host: str = '') -> Command:
        return self._script('hosts', silence_ms, host)

    def stop_there(
        self, agent: str, instance: str, host: str, why: str, grace: float, to: str, silence_ms: int
    ) -> Command:
        return self._script('stop_there', agent, instance, host, why, str(grace), to, silence_ms)

    def withdraw(self, host: str, order: str) -> Command:
        """Withdraws an order. The reply is 1 if nobody had taken it, else 0."""
        return Command(None, ('XDEL', self.prefix + f'host:{host}:orders'.encode(), order))

    def order_take(self, host: str, token: str, order: str, starter: str) -> Command:
        return self._script('order_take', host, token, order, starter)

    def order_done(self, host: str, order: str, code: str, status: int, detail: str) -> Command:
        return self._script('order_done', host, order, code, status, detail)

    # dead letters

    def deadletter(self, limit: int, cursor: str) -> Command:
        return self._script('deadletter', limit, cursor)

    def deadletter_retry(self, letter: str) -> Command:
        return self._script('deadletter_retry', letter)

    def deadletter_drop(self, letter: str) -> Command:
        return self._script('deadletter_drop', letter)

    # idempotency of operations that need several commands

    def begin(self, key: str, fingerprint: str, seconds: int) -> Command:
        return self._script('begin', key, fingerprint, seconds)

    def settle(self, key: str, answer: bytes) -> Command:
        return self._script('settle', key, answer, IDEMPOTENCY_SECS)


def _joined(seconds: Iterable[int]) -> str:
    return ','.join(map(str, seconds))
