"""`tt doctor`: finds processes, records and tasks that do not fit together, and mends them on request.

`lifecycle` calls `examine`, and with --fix `mend` on each finding.
"""

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
    """One thing that is wrong in a town."""

    kind: str
    what: str  # a sentence about it
    advice: str  # what to do; or what `mend` did, or why it failed
    cure: Callable[[], str] | None = None  # mends it and returns what it did; None if it can't be mended from here
    mended: bool = False

    def to_json(self) -> dict[str, Any]:
        return {'kind': self.kind, 'what': self.what, 'advice': self.advice, 'mended': self.mended}


def examine(call: Call, served: bool) -> list[Finding]:
    """What is wrong in a town, seen from this machine. `served`: a townhall runs here. Raises TownError."""
    rows = [[text(part) for part in row] for row in call.store.call(call.store.evidence(LIVE))[1]]
    instances = {row[3] for row in rows}
    findings = [] if served else [_unserved()]
    return findings + _silent_hosts(call) + _strays(call, instances) + _missing_workers(call, rows) + _orphans(call)


def mend(finding: Finding) -> Finding:
    """Tries to mend a finding. Returns it with the result."""
    if finding.cure is None:
        return finding
    try:
        return replace(finding, advice=finding.cure(), mended=True)
    except TownError as e:
        return replace(finding, advice=e.detail)


def _unserved() -> Finding:
    what = 'no townhall of this town runs here, so nothing supervises its workers'
    return Finding('unserved', what, 'Start one:  tt start')


def _silent_hosts(call: Call) -> list[Finding]:
    """Other hosts that have live agents, but no townhall that supervises them."""
    findings = []
    for host in call.store.run(hosts.list_hosts(call))['hosts']:
        if host['silent'] and host['agents'] and not host['here']:
            heard = f'no sign of life since {host["heard_at"]}' if host['heard_at'] else 'never gave a sign of life'
            what = f"host '{host['host']}' has {host['agents']} live agents, but {heard}"
            advice = (
                'Start a townhall there; if the host does not come back, give up its agents:  tt kill AGENT --force'
            )
            findings.append(Finding('silent host', what, advice))
    return findings


def _strays(call: Call, instances: set[str]) -> list[Finding]:
    """Processes of workers that have no record any longer. `instances` are the workers that have one."""

    def cure(instance: str) -> Callable[[], str]:
        return lambda: f'Could not be ended: {left}' if (left := stop_tree(None, instance)) else 'Ended'

    findings = []
    for instance, pids in agents_processes(str(call.town.root)).items():
        if instance not in instances:
            what = f'processes {pids} of a worker that no longer exists still run'
            findings.append(Finding('stray processes', what, 'tt doctor --fix ends them', cure(instance)))
    return findings


def _missing_workers(call: Call, rows: list[list[str]]) -> list[Finding]:
    """Records of live workers whose process is gone, or that send no heartbeats."""

    def recover() -> str:
        call.store.run(recovery.recover(call))
        return 'Recovered: what it held is in the backlog'

    findings = []
    for agent_id, name, state, instance, host, boot, pid, start, age in rows:
        process = Identity(host, boot, int(pid or 0), start)
        if pid and report_spool.judge(call.town.root, agent_id, instance, process) == 'dead':
            what = f"agent '{name}' is {state}, but its process {pid} is gone"
            findings.append(Finding('dead worker', what, 'tt recover, or tt doctor --fix, frees what it held', recover))
        elif age and int(age) > _QUIET_MS:
            what = f"agent '{name}' ({state}, process {pid} on {host}) sent its last heartbeat {int(age) // 1000} s ago"
            advice = f'It may hang or be paused; see its log, or  tt restart {name}'
            findings.append(Finding('quiet worker', what, advice))
    return findings


def _orphans(call: Call) -> list[Finding]:
    """Tasks whose agent is gone or does not run."""

    def cure() -> str:
        moved = call.store.run(recovery.orphan_tasks(call, action='to_backlog'))['count']
        return f'{moved} returned to the backlog'

    count = call.store.run(recovery.orphan_tasks(call))['count']
    what = f'{count} unfinished tasks wait for agents that do not run'
    advice = 'tt restart AGENT, tt reclaim, or tt doctor --fix, which returns them to the backlog'
    return [Finding('orphaned tasks', what, advice, cure)] if count else []
