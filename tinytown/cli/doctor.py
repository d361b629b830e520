"""What `tt doctor` looks for: processes, records and tasks that do not fit together; and how each is mended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..core import hosts, recovery
from ..core.town import Call
from ..errors import TownError
from ..host import report_spool
from ..host.processes import Identity, agents_processes, stop_tree
from ..model import LIVE
from ..state.store import text

_QUIET_MS = 15_000  # three heartbeats


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: its kind, what it is, what to do. `cure` mends it, where it can be mended from here."""

    kind: str
    what: str
    advice: str
    cure: Callable[[], str] | None = None
    mended: bool = False

    def shown(self) -> dict[str, Any]:
        return {'kind': self.kind, 'what': self.what, 'advice': self.advice, 'mended': self.mended}


def examine(call: Call, served: bool) -> list[Finding]:
    """What is wrong in a town, seen from this machine. `served` says whether a townhall runs here. Raises TownError."""
    rows = [[text(part) for part in row] for row in call.store.call(call.store.evidence(LIVE))[1]]
    found = [] if served else [_unserved()]
    return found + _silent_hosts(call) + _strays(call, {row[3] for row in rows}) + _ghosts(call, rows) + _orphans(call)


def mend(finding: Finding) -> Finding:
    """The finding after an attempt to mend it."""
    if finding.cure is None:
        return finding
    try:
        return replace(finding, advice=finding.cure(), mended=True)
    except TownError as e:
        return replace(finding, advice=e.detail)


def _unserved() -> Finding:
    what = 'no townhall of this town runs here, so nobody looks after its workers'
    return Finding('unserved', what, 'Start one:  tt start')


def _silent_hosts(call: Call) -> list[Finding]:
    """Hosts that have live agents, and no townhall to look after them."""
    found = []
    for host in call.store.run(hosts.list_hosts(call))['hosts']:
        if host['silent'] and host['agents'] and not host['here']:
            what = f"host '{host['host']}' has {host['agents']} live agents and was last heard of {host['heard_at']}"
            advice = 'Start a townhall there; if it does not come back, give its agents up:  tt kill AGENT --force'
            found.append(Finding('silent host', what, advice))
    return found


def _strays(call: Call, instances: set[str]) -> list[Finding]:
    """Processes without a record: they belong to workers that are no more."""

    def cure(instance: str) -> Callable[[], str]:
        return lambda: f'Could not be ended: {left}' if (left := stop_tree(None, instance)) else 'Ended'

    found = []
    for instance, pids in agents_processes(str(call.town.root)).items():
        if instance not in instances:
            what = f'processes {pids} of a worker that is no more still run'
            found.append(Finding('stray processes', what, 'tt doctor --fix ends them', cure(instance)))
    return found


def _ghosts(call: Call, rows: list[list[str]]) -> list[Finding]:
    """Records without a process, and workers that are not heard of."""

    def recover() -> str:
        call.store.run(recovery.recover(call))
        return 'Recovered: what it held is in the backlog'

    found = []
    for agent_id, name, state, instance, host, boot, pid, start, age in rows:
        process = Identity(host, boot, int(pid or 0), start)
        if pid and report_spool.judge(call.town.root, agent_id, instance, process) == 'dead':
            what = f"agent '{name}' is {state}, but its process {pid} is gone"
            found.append(Finding('dead worker', what, 'tt recover, or tt doctor --fix, frees what it held', recover))
        elif age and int(age) > _QUIET_MS:
            what = f"agent '{name}' ({state}, process {pid} on {host}) was last heard of {int(age) // 1000} s ago"
            found.append(Finding('quiet worker', what, f'It may hang or be paused; see its log, or  tt restart {name}'))
    return found


def _orphans(call: Call) -> list[Finding]:
    """Tasks whose agent is gone or does not run."""

    def cure() -> str:
        moved = call.store.run(recovery.orphan_tasks(call, action='to_backlog'))['count']
        return f'{moved} returned to the backlog'

    count = call.store.run(recovery.orphan_tasks(call))['count']
    what = f'{count} unfinished tasks wait for agents that do not run'
    advice = 'tt restart AGENT, tt reclaim, or tt doctor --fix, which returns them to the backlog'
    return [Finding('orphaned tasks', what, advice, cure)] if count else []
