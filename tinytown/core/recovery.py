"""Operations that free the work of dead or stopped agents, and the reset of a town.

The supervisor does the same continuously; these are for people, and for towns without a running townhall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypedDict

from ..errors import Conflict, NotFound
from ..host import report_spool
from ..host.processes import GRACE_SECS, Identity, is_in_other_namespace, stop_tree
from ..model import AT_REST, LIVE, AgentRef, Field
from ..state.store import Step, text
from . import holders, hosts
from .agents import MAX_MOVED, look_up, prune, stop_process
from .town import Call

ToBacklog = Annotated[bool, Field('To the backlog, which is also the default')]
AgentsOnly = Annotated[bool, Field('Keep tasks, messages and events')]
OrphanAction = Annotated[
    Literal['list', 'to_backlog', 'cancel', 'delete'], Field('What to do with them; list changes nothing')
]
Really = Annotated[bool, Field('Really do it, and kill live agents first')]


class Recovered(TypedDict):
    checked: int
    recovered: int
    agents: list[str]


class Reclaimed(TypedDict):
    reclaimed: int
    destination: str


class Orphan(TypedDict):
    task_id: str
    assigned_to: str
    state: Literal['assigned', 'running']
    reason: Literal['agent_missing', 'agent_terminal']


class Orphans(TypedDict):
    action: str
    count: int
    orphans: list[Orphan]


class Reset(TypedDict):
    agents: int
    tasks: int


def recover(call: Call) -> Step[Recovered]:
    """Find agents whose process is proven dead, and free their work: a running task returns to the backlog.

    A task that has used up its attempts becomes a dead letter. Dead means that the process is gone or its machine was
    rebooted. Agents that only miss heartbeats, or that run on another host, are not changed. This is refused if another
    machine or directory uses the name of this host.
    """
    yield hosts.claim_host(call.store, call.town.root)
    reply = yield call.store.evidence(LIVE)
    checked, found = reply
    recovered = []
    for agent_id, name, _, instance, process in _evidence(found):
        if process.pid and report_spool.judge(call.town.root, agent_id, instance, process) == 'dead':
            stop_tree(None, instance)  # child processes that it left behind
            try:
                death = holders.death(call.store, call.config, agent_id, instance, 'its process died')
                yield from holders.free(call.store, call.town.root, agent_id, death)
            except (Conflict, NotFound):
                continue  # another process recovered it first
            recovered.append(name)
    return {'checked': checked, 'recovered': len(recovered), 'agents': recovered}


def _evidence(found: list[list[bytes]]) -> Iterator[tuple[str, str, int, str, Identity]]:
    """(id, name, ms since its last heartbeat, instance, process) of each agent."""
    for row in found:
        agent_id, name, _, instance, host, boot, pid, start, age = map(text, row)
        yield agent_id, name, int(age or 0), instance, Identity(host, boot, int(pid or 0), start)


def free_if_silent(call: Call, agent: AgentRef, wait: Callable[[float], None]) -> Step[None]:
    """Frees the work of a worker in another container with this host's name, if it sends no heartbeat for a lease.

    Use it if nothing else can prove that worker dead, because its volume is gone. Returns without a change as soon as
    the worker sends a heartbeat. `wait` takes seconds.
    """
    wanted, before = (yield from look_up(call, agent)).id, -1
    for _ in range(call.config.agent.lease_secs + 1):
        found = [row for row in _evidence((yield call.store.evidence(LIVE))[1]) if row[0] == wanted]
        if not found:
            return
        _, _, age, instance, process = found[0]
        judged = report_spool.judge(call.town.root, wanted, instance, process)
        if age <= before or judged != 'unknown' or not is_in_other_namespace(process):
            return
        before = age
        wait(1.0)
    death = holders.death(call.store, call.config, wanted, instance, 'its container sent no heartbeat for a lease')
    yield from holders.free(call.store, call.town.root, wanted, death)


def reclaim(
    call: Call, *, to_backlog: ToBacklog = False, to: AgentRef | None = None, from_: AgentRef | None = None
) -> Step[Reclaimed]:
    """Move queued tasks away from agents that do not run: to the backlog (the default), or to another agent.

    from names one such agent; without from, the tasks of all of them are moved. Messages move along to an agent; if the
    tasks go to the backlog, messages stay where they are.
    """
    if to_backlog and to:
        raise Conflict('give either to_backlog or to, not both', code='two-destinations')
    if from_ is None:
        reply = yield call.store.evidence(AT_REST)
        sources = [text(row[0]) for row in reply[1]]
    else:
        sources = [(yield from look_up(call, from_)).id]
    destination = (yield from look_up(call, to)) if to else None
    moved = 0
    for source in sources:
        while True:
            tasks, messages = yield call.store.reclaim(source, destination.id if destination else '', MAX_MOVED)
            moved += tasks
            if max(tasks, messages) < MAX_MOVED:
                break
    return {'reclaimed': moved, 'destination': destination.name if destination else 'backlog'}


def orphan_tasks(call: Call, *, action: OrphanAction = 'list') -> Step[Orphans]:
    """List unfinished tasks whose agent was removed or does not run; or requeue, cancel or delete them.

    One call handles at most 200 tasks; call again for more.
    """
    reply = yield call.store.orphans(action, MAX_MOVED)
    orphans: list[Any] = [
        {'task_id': text(task), 'assigned_to': text(agent), 'state': text(state), 'reason': text(reason)}
        for task, agent, state, reason in reply[0]
    ]
    return {'action': action, 'count': len(orphans), 'orphans': orphans}


def reset(call: Call, *, agents_only: AgentsOnly = False, force: Really = False) -> Step[Reset]:
    """Empty the town: remove its agents and, unless agents_only, its tasks, messages and events.

    Without force it is refused, and the error says what would be removed. Live agents are killed first.
    """
    live = yield call.store.evidence(LIVE)
    if not force:
        doomed = f'{live[0]} agents ({len(live[1])} of them live)' + ('' if agents_only else ', all tasks and messages')
        raise Conflict(f'this would remove {doomed}; give force to do it', code='force-needed')
    for row in live[1]:
        found = yield from look_up(call, text(row[0]))
        yield from stop_process(call, found, 'town reset', GRACE_SECS, abandon=True)
    removed = yield from prune(call, all=True)
    tasks = 0
    if not agents_only:
        while True:
            deleted, left = yield call.store.purge_tasks(MAX_MOVED)
            tasks += deleted
            if not left:
                break
        yield call.store.purge_rest()
    return {'agents': removed['removed'], 'tasks': tasks}
