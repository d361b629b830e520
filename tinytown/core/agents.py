"""Operations on agents. An agent is a record in Redis, and a worker process while it is live.

Sections: reading, life cycle (spawn, kill, restart, prune, steering), and how a worker process starts. `hosts` sends
the orders to start and stop agents on other hosts; `holders` frees the tasks of an agent that ended. `recovery`,
`worker.supervisor` and `worker.host_orders` use the functions that are not operations.
"""

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

MAX_MOVED: Final = 200  # tasks or messages that one script moves, because a script blocks Redis
OnlyLive = Annotated[bool, Field('Only live agents')]
NOT_STARTED: Final = 'its worker did not start'
_EXIT_SECS: Final = 1.0  # how long to wait for an idle worker on a silent host to exit by itself
WORKER_START_SECS: Final = 10.0  # deadline for a worker's start


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
    """`left` are live agents on silent hosts. They were not changed."""

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
    """The record of one agent and the identity of its process. `json` is the agent as clients see it."""

    id: str
    name: str
    json: bytes
    state: str
    instance: str
    process: Identity


def look_up(call: Call, ref: str) -> Step[Known]:
    """Finds an agent by name, id or start of an id. Raises NotFound; and Conflict for the conductor, a mailbox only."""
    if ref.lower() in CONDUCTOR_NAMES:
        raise Conflict(f"'{ref}' is a mailbox for people, not an agent with a process", code='not-a-worker')
    reply = yield call.store.agent(ref)
    agent_id, name, record, state, instance, host, boot, pid, start = reply
    process = Identity(text(host or b''), text(boot or b''), int(pid or 0), text(start or b''))
    return Known(text(agent_id), text(name), record, text(state), text(instance or b''), process)


def of_this_directory(call: Call) -> Step[list[Known]]:
    """The live agents whose workers were started from this town directory, even if this host had another name then."""
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
    """Show one agent: its state, process, current task, and how much waits in its inbox."""
    found = yield from look_up(call, agent)
    return Page(found.json)


def result(call: Call, *, agent: AgentRef) -> Step[Page[LastResult]]:
    """Show the last task that an agent finished, with its result or error."""
    reply = yield call.store.agent_result(agent)
    return Page(b'{"agent":"%b","task":%b}' % (reply[0], reply[1] or b'null'))


def wait(call: Call, *, agent: AgentRef, timeout: WaitSeconds = 25) -> Step[Waited]:
    """Wait until an agent has stopped (Stopped, Cold or Error), at most timeout seconds, and show its state."""
    found = yield from _await_rest(call, agent, min(timeout, call.config.townhall.request_timeout_ms / 1000 - 1))
    return {'agent': found.name, 'state': _state(found.state), 'done': found.state in AT_REST}


def _await_rest(call: Call, agent: str, seconds: float) -> Step[Known]:
    """Waits until an agent has stopped, at most `seconds`. Returns the agent as it is then."""
    deadline = time.monotonic() + seconds
    while True:
        last = yield call.store.last_event()  # before the look-up, so that no event in between is missed
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
    """Start a new agent: a worker process that runs a coding CLI once a round. The answer comes when it is running.

    With host, the townhall of that host starts it. Without, it runs on the host of the townhall that you ask.
    """
    start, on_host = start_worker, host or ''
    return (yield from enlist(call, name, cli, role_id, nickname, parent_agent_id, max_rounds, start, on_host))


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
    """Registers an agent and starts its worker. If the start fails, removes the agent again and raises TownError.

    `start(town, agent id, name, instance)` starts a worker on this host. On another `host`, the townhall there starts
    it and checks the name of the coding CLI, because only it knows which ones are installed there.
    """
    if name.lower() in CONDUCTOR_NAMES or is_uuid(name):
        detail = f"'{name}' can't name an agent: it is reserved for the conductor's mailbox, or has the form of an id"
        raise Invalid(detail, errors=[{'pointer': '/name', 'detail': detail}])
    is_remote = hosts.is_other_host(host)
    chosen = cli or call.config.default_cli if is_remote else registry.find_cli(call.config, cli).name
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
    starter = identify(os.getpid()).line
    where = hosts.placement(call, host)
    reply = yield call.store.register(agent_id, name, head, call.config.max_agents, rounds, instance, starter, where)
    yield from _bring_up(call, host, text(reply[1]), agent_id, name, instance, start, undo_spawn)
    return spawned


def _bring_up(
    call: Call, host: str, order: str, agent_id: str, name: str, instance: str, start: Any, undo: Any
) -> Step[None]:
    """Starts a worker here, or waits until another host has carried out the `order` to start it.

    Calls `undo` if a start here fails, or if no townhall of the other host took the order. A townhall that took the
    order undoes a failed start itself.
    """
    is_remote = hosts.is_other_host(host)
    try:
        if is_remote:
            yield from hosts.await_start(call, host, order, name, agent_id)
        else:
            start(call.town, agent_id, name, instance)
    except TownError as e:
        if not is_remote or isinstance(e, HostSilent):
            yield from undo(call, agent_id, instance)
        raise


def undo_spawn(call: Call, agent_id: str, instance: str) -> Step[None]:
    """Removes a new agent whose worker did not start, unless the supervisor has changed it already."""
    stop_tree(None, instance, 0)
    try:
        yield call.store.depart(agent_id, instance, 'Error', NOT_STARTED, 'backlog')
        yield call.store.remove(agent_id)
    except Conflict:
        return
    report_spool.forget(call.town.root, agent_id)


def kill(call: Call, *, agent: AgentRef, force: Force = False) -> Step[Acted]:
    """Stop an agent now: its whole process tree gets SIGTERM, and SIGKILL after 5 seconds (at once with force).

    When the answer comes, no process of the agent is left, and its unfinished task is back in the backlog; the attempt
    counts. To let an agent finish its round first, close it. If it runs on another host, the townhall there stops it.
    If that host is silent, the agent is stopped when a townhall is back there. With force it is abandoned now: its task
    returns to the backlog, and its later reports are refused.
    """
    found = yield from look_up(call, agent)
    yield from stop_process(call, found, 'killed', 0 if force else GRACE_SECS, abandon=force)
    return {'status': 'stopped', 'agent': found.name}


def stop_process(
    call: Call, found: Known, why: str, grace: float, to: str = 'backlog', abandon: bool = False
) -> Step[None]:
    """Ends all processes of an agent and sets it to Stopped. Its unfinished task goes to the backlog or its inbox.

    `why` goes into the events. `grace` is the time in seconds between SIGTERM and SIGKILL. `to` is 'backlog' or
    'inbox'. If the agent's host is silent, `abandon` frees its task at once; without `abandon` that raises HostSilent.
    """
    if found.instance and found.instance == os.environ.get(INSTANCE_VARIABLE):
        raise Conflict(
            f"'{found.name}' can't stop itself from its own run; to stop after this round:  tt close {found.name}",
            code='own-run',
        )
    if found.state in LIVE:
        if hosts.is_other_host(found.process.host):
            return (yield from _stop_on_other_host(call, found, why, grace, to, abandon))
        judged = report_spool.judge(call.town.root, found.id, found.instance, found.process)
        if is_in_other_namespace(found.process) and judged != 'dead':
            return (yield from _stop_in_other_container(call, found, why, to, abandon))
        yield from _unless_gone(call, found.id, _drain(call, found.id))
    elif found.state == 'Error':
        yield call.store.steer(found.id, 'stop', 'Stopped', ('Error',))  # the supervisor won't start it again
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
    """Makes an agent take no new work."""
    yield call.store.steer(agent_id, 'stop', 'Draining', LIVE)


def _stop_on_other_host(call: Call, found: Known, why: str, grace: float, to: str, abandon: bool) -> Step[None]:
    """`stop_process` for an agent on another host."""
    host = found.process.host
    since = yield from hosts.stop_remote(call, host, found.id, found.name, found.instance, why, grace, to)
    if not since or (yield from _await_rest(call, found.id, _EXIT_SECS)).state in AT_REST:
        return
    if not abandon:
        raise HostSilent(
            f"Host '{host}' is silent (last heartbeat of a townhall there: {since}). '{found.name}' is Draining: it "
            f'ends after this round, or when a townhall is back. To abandon it now:  tt kill {found.name} --force',
            retry_after=5,
        )
    yield from _abandon(call, found, f'{why}; abandoned because host {host} is silent', to)


def _stop_in_other_container(call: Call, found: Known, why: str, to: str, abandon: bool) -> Step[None]:
    """`stop_process` for an agent in another container with this host's name. Its processes are not visible here."""
    if not abandon:
        raise Conflict(
            f"'{found.name}' runs in another container (pid namespace) of host '{found.process.host}'; stop it "
            f'there, or abandon it:  tt kill {found.name} --force',
            code='other-host',
        )
    yield from _abandon(call, found, f'{why}; abandoned because it runs in another container', to)


def _abandon(call: Call, found: Known, why: str, to: str) -> Step[None]:
    """Frees the task of an agent whose process may still run. Its later reports are refused."""

    def depart() -> Step[None]:
        yield call.store.depart(found.id, found.instance, 'Stopped', why, to)

    yield from _unless_gone(call, found.id, depart())


def _unless_gone(call: Call, agent_id: str, change: Step[None]) -> Step[None]:
    """Runs a change of a live agent. A Conflict is ignored if the worker has exited by itself meanwhile."""
    try:
        yield from change
    except Conflict:
        if (yield from look_up(call, agent_id)).state in LIVE:
            raise


def restart(call: Call, *, agent: AgentRef, host: HostName | None = None) -> Step[Acted]:
    """Stop an agent if it runs, and start it again. The answer comes when it is running.

    It continues with its unfinished task and its inbox. It stays on its host, unless you name another host.
    """
    found = yield from look_up(call, agent)
    on_host = host or found.process.host
    if not hosts.is_other_host(on_host):
        registry.find_cli(call.config, json.loads(found.json)['cli'])
    yield from stop_process(call, found, 'restarted', GRACE_SECS, 'inbox')
    yield from revive(call, found.id, found.name, start_worker, on_host)
    return {'status': 'restarted', 'agent': found.name}


def revive(call: Call, agent_id: str, name: str, start: Any, host: str = '') -> Step[None]:
    """Starts a worker for an agent that has none: by `start(town, agent id, name, instance)`, or on another host."""
    instance = new_id()
    starter, where = identify(os.getpid()).line, hosts.placement(call, host)
    reply = yield call.store.restarting(agent_id, call.config.max_agents, instance, starter, where)
    yield from _bring_up(call, host, text(reply[2]), agent_id, name, instance, start, undo_restart)


def undo_restart(call: Call, agent_id: str, instance: str) -> Step[None]:
    """Sets an agent whose worker did not start to Error, unless the supervisor has changed it already."""
    stop_tree(None, instance, 0)
    with suppress(Conflict):
        yield call.store.depart(agent_id, instance, 'Error', NOT_STARTED, 'inbox')


def prune(call: Call, *, all: Everything = False) -> Step[Pruned]:
    """Remove the agents that are Stopped or in Error; with all, remove every agent, and kill live ones first.

    Their queued tasks return to the backlog, and their messages go to the conductor's mailbox. Live agents on silent
    hosts are not changed; the answer lists them in left.
    """
    states: Iterable[str] = (*AT_REST, *LIVE) if all else ('Stopped', 'Error')
    reply = yield call.store.evidence(states)
    removed, left = [], []
    listed = (yield from hosts.list_hosts(call))['hosts'] if all else []
    silent = {host['host'] for host in listed if host['silent']}
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
            continue  # started again or removed meanwhile, or its host is silent: not in the list
        report_spool.forget(call.town.root, found.id)
        removed.append(found.name)
    pruned: Pruned = {'removed': len(removed), 'agents': removed}
    return pruned | {'left': left} if left else pruned


def _empty(call: Call, agent_id: str) -> Step[None]:
    """Moves the queued tasks of an agent that does not run to the backlog, in scripts of bounded length."""
    while (yield call.store.reclaim(agent_id, '', MAX_MOVED))[0] == MAX_MOVED:
        pass


def _steer(call: Call, agent: str, verb: str) -> Step[Acted]:
    if agent.lower() in CONDUCTOR_NAMES:
        raise Conflict(f"'{agent}' is a mailbox for people; it has no process to {verb}", code='not-a-worker')
    steering = STEERING[verb]
    reply = yield call.store.steer(agent, verb, steering['to'], steering['legal'])
    return {'status': text(reply[1]).lower(), 'agent': text(reply[0])}


def interrupt(call: Call, *, agent: AgentRef) -> Step[Acted]:
    """Pause an agent: it finishes its current round, then takes no work until it is resumed."""
    return (yield from _steer(call, agent, 'interrupt'))


def resume(call: Call, *, agent: AgentRef) -> Step[Acted]:
    """Let a paused agent continue."""
    return (yield from _steer(call, agent, 'resume'))


def close(call: Call, *, agent: AgentRef) -> Step[Acted]:
    """Let an agent finish its current round and then stop. Its inbox keeps the tasks and messages that wait."""
    return (yield from _steer(call, agent, 'close'))


# ------------------------------------------------------------------------------------------------ worker processes


def start_worker(town: Town, agent_id: str, name: str, instance: str) -> None:
    """Starts an agent's worker and waits until it runs. Raises Unavailable with its error message if it does not."""
    log = TownDir(town.root).log(name)
    env = registry.worker_environment(town.config, os.environ) | {'PYTHONPATH': python_path(), 'PYTHONUNBUFFERED': '1'}
    env |= {'TINYTOWN_TOWN': str(town.root), 'TINYTOWN_AGENT_ID': agent_id}  # `tt doctor` recognizes workers by these
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            argv = python('tinytown.worker', name, '--fd', spawner.FD)
            spawner.start(town.root, argv, town.root, env, log, [theirs.fileno()], instance)
            theirs.close()
            ours.settimeout(WORKER_START_SECS)
            ours.sendall(_handshake(town, agent_id, instance))
            ours.shutdown(socket.SHUT_WR)
            answer = ours.recv(4096).decode('utf-8', 'replace') or 'it exited'
    except OSError as e:
        answer = str(e)
    if answer != 'ok':
        raise Unavailable(
            f"The worker of '{name}' did not start within {WORKER_START_SECS:g} s: {answer} (see {log})",
            code='spawn-failed',
            retry_after=5,
        )


def _handshake(town: Town, agent_id: str, instance: str) -> bytes:
    """What a worker needs to know, as JSON. It goes over a socket because a Redis URL may contain a password.

    Other users could read argv, and child processes inherit the environment.
    """
    settings = configuration.to_values(town.config)
    return json.dumps(
        {'root': str(town.root), 'agent_id': agent_id, 'instance': instance, 'settings': settings}
    ).encode()
