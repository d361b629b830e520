"""Agents: records with worker processes behind them."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, NotRequired, TypedDict

from .. import config as configuration
from ..clis import registry
from ..errors import Conflict, HostSilent, Internal, Invalid, NotFound, TownError, Unavailable
from ..host import report_spool, spawner
from ..host.processes import (
    GRACE_SECS,
    INSTANCE_VARIABLE,
    Identity,
    identify,
    is_in_other_namespace,
    python,
    python_path,
    stop_tree,
    this_host,
)
from ..host.town_dir import TownDir
from ..model import (
    AT_REST,
    CONDUCTOR_NAMES,
    LIVE,
    STEERING,
    Agent,
    AgentPage,
    AgentRef,
    AgentState,
    CliName,
    Cursor,
    Everything,
    Field,
    Force,
    HostName,
    Limit,
    NewAgentName,
    Nickname,
    RoleId,
    Rounds,
    Task,
    WaitSeconds,
    is_uuid,
    new_id,
)
from ..state.store import Page, Step, text
from . import holders, hosts
from .tasks import listing
from .town import Call, Town

MAX_MOVED: Final = 200  # of what one script moves: a script blocks the server
OnlyLive = Annotated[bool, Field('Only agents that are live')]
NOT_STARTED: Final = 'its worker did not start'
_GOODBYE_SECS: Final = 1.0  # for a worker that has nothing to do to end by itself, where nobody can end it
WORKER_START_SECS: Final = 10.0  # how long a worker may take to come up


class Spawned(TypedDict):
    agent_id: str
    name: str
    cli: str
    role_id: str | None
    nickname: str | None
    parent_agent_id: str | None


class Acted(TypedDict):
    status: str
    agent: str


class Pruned(TypedDict):
    """`left` are live agents on hosts that are silent, of which nothing was touched."""

    removed: int
    agents: list[str]
    left: NotRequired[list[str]]


class Waited(TypedDict):
    agent: str
    state: AgentState
    done: bool


class LastResult(TypedDict):
    agent: str
    task: Task | None


@dataclass(frozen=True, slots=True)
class Known:
    """What the store knows of one agent and its process."""

    id: str
    name: str
    json: bytes
    state: str
    instance: str
    process: Identity


def look_up(call: Call, ref: str) -> Step[Known]:
    """The agent that `ref` means. Raises NotFound, and Conflict for the conductor, who has no process."""
    if ref.lower() in CONDUCTOR_NAMES:
        raise Conflict(f"'{ref}' is a mailbox for people and not an agent with a process", code='not-a-worker')
    reply = yield call.store.agent(ref)
    agent_id, name, record, state, instance, host, boot, pid, start = reply
    process = Identity(text(host or b''), text(boot or b''), int(pid or 0), text(start or b''))
    return Known(text(agent_id), text(name), record, text(state), text(instance or b''), process)


def of_this_directory(call: Call) -> Step[list[Known]]:
    """The live agents whose workers were started in the town's directory here, whatever this host was called then."""
    root = call.town.root
    running, known = report_spool.workers(root), []
    for row in (yield call.store.evidence(LIVE))[1]:
        agent_id, instance = text(row[0]), text(row[3] or b'')
        if instance in running or (instance and report_spool.noted(root, agent_id)[0] == instance):
            with suppress(NotFound):
                found = yield from look_up(call, agent_id)
                known.append(replace(found, process=replace(found.process, host=this_host())))
    return known


# ---------------------------------------------------------------------------------------------------------- reading


def list_agents(
    call: Call, *, open: OnlyLive = False, limit: Limit = 500, cursor: Cursor = ''
) -> Step[Page[AgentPage]]:
    """List the agents with their state, current task and inbox; with open, only those that are live."""
    reply = yield call.store.agents_open(limit, cursor) if open else call.store.agents(limit, cursor)
    return Page(listing('agents', reply))


def show(call: Call, *, agent: AgentRef) -> Step[Page[Agent]]:
    """Show one agent: state, process, current task, what waits in its inbox."""
    found = yield from look_up(call, agent)
    return Page(found.json)


def result(call: Call, *, agent: AgentRef) -> Step[Page[LastResult]]:
    """Show the last task that an agent finished, with its result or error."""
    reply = yield call.store.agent_result(agent)
    return Page(b'{"agent":"%b","task":%b}' % (reply[0], reply[1] or b'null'))


def wait(call: Call, *, agent: AgentRef, timeout: WaitSeconds = 25) -> Step[Waited]:
    """Wait until an agent has stopped (Stopped, Cold or Error), or for timeout seconds; say in which state it is."""
    found = yield from _await_rest(call, agent, min(timeout, call.config.townhall.request_timeout_ms / 1000 - 1))
    return {'agent': found.name, 'state': _state(found.state), 'done': found.state in AT_REST}


def _await_rest(call: Call, agent: str, seconds: float) -> Step[Known]:
    """Waits until an agent has stopped, so long at most. What is known of it then."""
    deadline = time.monotonic() + seconds
    while True:
        last = yield call.store.last_event()
        found = yield from look_up(call, agent)
        left = deadline - time.monotonic()
        if found.state in AT_REST or left <= 0:
            return found
        after = text(last[0][0]) if last else '0-0'
        yield call.store.next_event(after, max(int(left * 1000), 1))


def _state(state: str) -> AgentState:
    return state  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------- life cycle


def spawn(
    call: Call,
    *,
    name: NewAgentName,
    cli: CliName | None = None,
    role_id: RoleId | None = None,
    nickname: Nickname | None = None,
    parent_agent_id: AgentRef | None = None,
    max_rounds: Rounds | None = None,
    host: HostName | None = None,
) -> Step[Spawned]:
    """Start a new agent: a worker process that runs a coding CLI once a round. It runs when this answers.

    With host it runs there, started by that host's townhall; else on the host of the townhall that is asked.
    """
    there = host or ''
    return (yield from enlist(call, name, cli, role_id, nickname, parent_agent_id, max_rounds, start_worker, there))


def enlist(
    call: Call,
    name: str,
    cli: str | None,
    role_id: str | None,
    nickname: str | None,
    parent: str | None,
    max_rounds: int | None,
    start: Any,
    host: str = '',
) -> Step[Spawned]:
    """Registers an agent and starts its process with `start(town, agent id, name, instance)`; undone if that fails.

    On another `host` its townhall is what starts it, and knows the coding CLIs that are there.
    """
    if name.lower() in CONDUCTOR_NAMES or is_uuid(name):
        detail = f"'{name}' can't name an agent: it is reserved for the conductor's mailbox or reads as an id"
        raise Invalid(detail, errors=[{'pointer': '/name', 'detail': detail}])
    there = hosts.is_other_host(host)
    chosen = cli or call.config.default_cli if there else registry.find_cli(call.config, cli).name
    parent_id = (yield from look_up(call, parent)).id if parent else None
    agent_id, instance = new_id(), new_id()
    spawned: Spawned = {
        'agent_id': agent_id,
        'name': name,
        'cli': chosen,
        'role_id': role_id,
        'nickname': nickname,
        'parent_agent_id': parent_id,
    }
    record = {'id': agent_id, 'name': name, 'nickname': nickname, 'role_id': role_id, 'parent_agent_id': parent_id}
    record |= {'spawn_mode': 'fresh', 'cli': chosen}
    head = json.dumps(record, ensure_ascii=False, separators=(',', ':'))[:-1]
    rounds = call.config.agent.max_rounds if max_rounds is None else max_rounds
    us = identify(os.getpid()).line
    where = hosts.where(call, host)
    reply = yield call.store.register(agent_id, name, head, call.config.max_agents, rounds, instance, us, where)
    yield from _bring_up(call, host, text(reply[1]), agent_id, name, instance, start, unmake)
    return spawned


def _bring_up(
    call: Call, host: str, order: str, agent_id: str, name: str, instance: str, start: Any, undo: Any
) -> Step[None]:
    """Starts a worker here, or has it started by the `order` that another host was given. `undo` where it will not run.

    Where another host took the order that undoes it itself, or it is not known what came of it.
    """
    there = hosts.is_other_host(host)
    try:
        if there:
            yield from hosts.await_start(call, host, order, name, agent_id)
        else:
            start(call.town, agent_id, name, instance)
    except TownError as e:
        if not there or isinstance(e, HostSilent):
            yield from undo(call, agent_id, instance)
        raise


def unmake(call: Call, agent_id: str, instance: str) -> Step[None]:
    """Undoes the registration of an agent whose worker did not start, unless the caretaker has gone on with it."""
    stop_tree(None, instance, 0)
    try:
        yield call.store.depart(agent_id, instance, 'Error', NOT_STARTED, 'backlog')
        yield call.store.remove(agent_id)
    except Conflict:
        return
    report_spool.forget(call.town.root, agent_id)


def kill(call: Call, *, agent: AgentRef, force: Force = False) -> Step[Acted]:
    """Stop an agent now: its whole process tree gets TERM, and KILL after 5 seconds (at once with force).

    When this answers no process of it is left, and its unfinished task is back in the backlog with its attempt
    counted. To let it finish its round first, close it. An agent on another host is stopped by the townhall there; if
    none is heard of, it is stopped when one is again, and with force it is given up now: what it says later is refused.
    """
    found = yield from look_up(call, agent)
    yield from stop_process(call, found, 'killed', 0 if force else GRACE_SECS, abandon=force)
    return {'status': 'stopped', 'agent': found.name}


def stop_process(
    call: Call, found: Known, why: str, grace: float, to: str = 'backlog', abandon: bool = False
) -> Step[None]:
    """Ends every process of an agent and says so in its record. Its unfinished task goes `to` the backlog or inbox.

    With `abandon` an agent on a host that is silent is given up; else that raises HostSilent.
    """
    if found.instance and found.instance == os.environ.get(INSTANCE_VARIABLE):
        raise Conflict(
            f"'{found.name}' can't be stopped from within its own run; to end after this round:  tt close {found.name}",
            code='own-run',
        )
    if found.state in LIVE:
        if hosts.is_other_host(found.process.host):
            return (yield from _stop_there(call, found, why, grace, to, abandon))
        judged = report_spool.judge(call.town.root, found.id, found.instance, found.process)
        if is_in_other_namespace(found.process) and judged != 'dead':
            return (yield from _stop_beside(call, found, why, to, abandon))
        yield from _unless_gone(call, found.id, _drain(call, found.id))
    elif found.state == 'Error':
        yield call.store.steer(found.id, 'stop', 'Stopped', ('Error',))  # nor is it started again
    if found.instance:
        left = stop_tree(found.process if found.process.pid else None, found.instance, grace)
        if left:
            raise Internal(
                f"Processes {left} of agent '{found.name}' can't be stopped; they may belong to another user"
            )
    if found.state in LIVE:
        ending = call.store.depart(found.id, found.instance, 'Stopped', why, to)
        yield from _unless_gone(call, found.id, holders.free(call.store, call.town.root, found.id, ending))


def _drain(call: Call, agent_id: str) -> Step[None]:
    """Has an agent take nothing new from here on."""
    yield call.store.steer(agent_id, 'stop', 'Draining', LIVE)


def _stop_there(call: Call, found: Known, why: str, grace: float, to: str, abandon: bool) -> Step[None]:
    """As stop_process, for an agent on another host."""
    host = found.process.host
    since = yield from hosts.stop_remote(call, host, found.id, found.name, found.instance, why, grace, to)
    if not since or (yield from _await_rest(call, found.id, _GOODBYE_SECS)).state in AT_REST:
        return
    if not abandon:
        raise HostSilent(
            f"No townhall of host '{host}' is heard of (last: {since}); '{found.name}' is Draining: it ends after this "
            f'round, or is stopped when one is there again. To give it up now:  tt kill {found.name} --force',
            retry_after=5,
        )
    yield from _give_up(call, found, f'{why}; given up, for host {host} is silent', to)


def _stop_beside(call: Call, found: Known, why: str, to: str, abandon: bool) -> Step[None]:
    """As stop_process, for an agent that goes by this host's name in another container: no process is seen of it."""
    if not abandon:
        raise Conflict(
            f"'{found.name}' runs in another container (namespace of pids) of host '{found.process.host}'; stop it "
            f'there, or give it up:  tt kill {found.name} --force',
            code='other-host',
        )
    yield from _give_up(call, found, f'{why}; given up, for it runs in another container', to)


def _give_up(call: Call, found: Known, why: str, to: str) -> Step[None]:
    """Frees what an agent holds whose process may live on: what it reports later is refused."""

    def depart() -> Step[None]:
        yield call.store.depart(found.id, found.instance, 'Stopped', why, to)

    yield from _unless_gone(call, found.id, depart())


def _unless_gone(call: Call, agent_id: str, change: Step[None]) -> Step[None]:
    """A change of an agent that is live, unless its worker has said goodbye by itself meanwhile."""
    try:
        yield from change
    except Conflict:
        if (yield from look_up(call, agent_id)).state in LIVE:
            raise


def restart(call: Call, *, agent: AgentRef, host: HostName | None = None) -> Step[Acted]:
    """Stop an agent if it runs, and start it again. It runs when this answers.

    It takes up its unfinished task and its inbox. It runs on the host where it ran before, or moves to the one named.
    """
    found = yield from look_up(call, agent)
    there = host or found.process.host
    if not hosts.is_other_host(there):
        registry.find_cli(call.config, json.loads(found.json)['cli'])
    yield from stop_process(call, found, 'restarted', GRACE_SECS, 'inbox')
    yield from revive(call, found.id, found.name, start_worker, there)
    return {'status': 'restarted', 'agent': found.name}


def revive(call: Call, agent_id: str, name: str, start: Any, host: str = '') -> Step[None]:
    """Starts a process for an agent that has none, with `start(town, agent id, name, instance)`, or on another host."""
    instance = new_id()
    us = identify(os.getpid()).line
    reply = yield call.store.restarting(agent_id, call.config.max_agents, instance, us, hosts.where(call, host))
    yield from _bring_up(call, host, text(reply[2]), agent_id, name, instance, start, put_down)


def put_down(call: Call, agent_id: str, instance: str) -> Step[None]:
    """Says that the worker of an agent did not start, unless the caretaker was faster."""
    stop_tree(None, instance, 0)
    with suppress(Conflict):
        yield call.store.depart(agent_id, instance, 'Error', NOT_STARTED, 'inbox')


def prune(call: Call, *, all: Everything = False) -> Step[Pruned]:
    """Forget the agents that are Stopped or in Error; with all, every agent, live ones being killed first.

    Nothing of theirs is lost: queued tasks return to the backlog, messages go to the conductor's mailbox. Live ones on
    hosts that are silent are left as they are, and named.
    """
    states: Iterable[str] = (*AT_REST, *LIVE) if all else ('Stopped', 'Error')
    reply = yield call.store.evidence(states)
    removed, left = [], []
    silent = {each['host'] for each in (yield from hosts.list_hosts(call))['hosts'] if each['silent']} if all else set()
    for agent_id, *_ in reply[1]:
        try:
            found = yield from look_up(call, text(agent_id))
            if found.state in LIVE and hosts.is_other_host(found.process.host) and found.process.host in silent:
                left.append(found.name)
                continue
            if all:
                yield from stop_process(call, found, 'pruned', GRACE_SECS)
            yield from _empty(call, found.id)
            yield call.store.remove(found.id, this_host())
        except (Conflict, NotFound, HostSilent):
            continue  # alive again, gone meanwhile, or on a host that is silent: it stays out of the list
        report_spool.forget(call.town.root, found.id)
        removed.append(found.name)
    pruned: Pruned = {'removed': len(removed), 'agents': removed}
    return pruned | {'left': left} if left else pruned


def _empty(call: Call, agent_id: str) -> Step[None]:
    """Returns the queued tasks of an agent that does not run to the backlog, a bounded number at a time."""
    while (yield call.store.reclaim(agent_id, '', MAX_MOVED))[0] == MAX_MOVED:
        pass


def _steer(call: Call, agent: str, verb: str) -> Step[Acted]:
    if agent.lower() in CONDUCTOR_NAMES:
        raise Conflict(f"'{agent}' is a mailbox for people and can't be told to {verb}", code='not-a-worker')
    steering = STEERING[verb]
    reply = yield call.store.steer(agent, verb, steering['to'], steering['legal'])
    return {'status': text(reply[1]).lower(), 'agent': text(reply[0])}


def interrupt(call: Call, *, agent: AgentRef) -> Step[Acted]:
    """Pause an agent: it finishes the round it is in and then takes nothing until it is resumed."""
    return (yield from _steer(call, agent, 'interrupt'))


def resume(call: Call, *, agent: AgentRef) -> Step[Acted]:
    """Let a paused agent go on."""
    return (yield from _steer(call, agent, 'resume'))


def close(call: Call, *, agent: AgentRef) -> Step[Acted]:
    """Let an agent finish the round it is in, and then stop. What waits in its inbox stays there."""
    return (yield from _steer(call, agent, 'close'))


# ------------------------------------------------------------------------------------------------ worker processes


def start_worker(town: Town, agent_id: str, name: str, instance: str) -> None:
    """Starts an agent's worker and returns when it runs. Raises Unavailable with what it said if it does not."""
    log = TownDir(town.root).log(name)
    env = registry.environment(town.config, os.environ) | {'PYTHONPATH': python_path(), 'PYTHONUNBUFFERED': '1'}
    env |= {'TINYTOWN_TOWN': str(town.root), 'TINYTOWN_AGENT_ID': agent_id}  # by which doctor knows it
    try:
        ours, its = socket.socketpair()
        with ours, its:
            argv = python('tinytown.worker', name, '--fd', spawner.FD)
            spawner.start(town.root, argv, town.root, env, log, [its.fileno()], instance)
            its.close()
            ours.settimeout(WORKER_START_SECS)
            ours.sendall(_charter(town, agent_id, instance))
            ours.shutdown(socket.SHUT_WR)
            said = ours.recv(4096).decode('utf-8', 'replace') or 'it ended'
    except OSError as e:
        said = str(e)
    if said != 'ok':
        raise Unavailable(
            f"The worker of '{name}' did not start within {WORKER_START_SECS:g} s: {said} (see {log})",
            code='spawn-failed',
            retry_after=5,
        )


def _charter(town: Town, agent_id: str, instance: str) -> bytes:
    """What a worker is told on its socket and not in argv or environment, because a Redis URL may hold a password."""
    settings = configuration.as_told(town.config)
    return json.dumps(
        {'root': str(town.root), 'agent_id': agent_id, 'instance': instance, 'settings': settings}
    ).encode()
