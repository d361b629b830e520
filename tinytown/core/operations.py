"""The table of operations.

Everything that a client can ask of a town is one row here. REST, MCP, the command line, OpenAPI and metrics are derived
from the rows and hold no policy of their own. To add an operation, write a function in its concern's module and add a
row. The function's signature is the input schema, its docstring the help, its return annotation the output schema.
`dispatch.call` runs an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from ..model import ADMIN, MANAGE, READ, WRITE, Scope
from ..schema import Parameter, input_schema, output_schema, signature
from ..state.store import Step
from . import agent_logs, agents, backlog, dead_letters, events, hosts, messages, recovery, tasks, town


@dataclass(frozen=True)
class Op:
    """One row of the table.

    name      the operation's name; MCP tools have `_` instead of the dot
    function  takes a Call and keyword-only arguments; returns a Step
    scope     the scope that a caller needs
    method    the REST method, for `path`; `also` is a second method that does the same
    path      the REST path; its {placeholders} are arguments
    cli       the words after `tt`
    status    the HTTP status of success
    slow      it waits or works on processes, so it runs on a thread and never on the event loop; only a slow operation
              may take more than one round trip to Redis
    """

    name: str
    function: Callable[..., Step[Any]]
    scope: Scope
    method: str
    path: str
    cli: str
    status: int = 200
    slow: bool = False
    also: str = ''

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        return signature(self.function)[0]

    @cached_property
    def output(self) -> dict[str, Any]:
        """The JSON Schema of the answer."""
        return output_schema(signature(self.function)[1])

    @cached_property
    def input(self) -> dict[str, Any]:
        """The JSON Schema of the arguments."""
        return input_schema(self.parameters)

    @property
    def placeholders(self) -> list[str]:
        """The names of the arguments in the path."""
        return [part[1:-1] for part in self.path.split('/') if part.startswith('{')]

    @property
    def summary(self) -> str:
        """The first paragraph of the help, on one line."""
        return ' '.join((self.function.__doc__ or '').split('\n\n')[0].split())

    @property
    def changes(self) -> bool:
        """Whether the operation may change the town."""
        return self.scope != READ


# fmt: off
OPERATIONS: Final = (
    Op('town.get', town.info, READ, 'GET', '/v1/town', 'town'),
    Op('town.get_status', town.status, READ, 'GET', '/v1/status', 'status'),
    Op('town.list_hosts', hosts.list_hosts, READ, 'GET', '/v1/hosts', 'hosts'),
    Op('town.reset', recovery.reset, ADMIN, 'POST', '/v1/town/reset', 'reset', slow=True),

    Op('agent.list', agents.list_agents, READ, 'GET', '/v1/agents', 'list'),
    Op('agent.spawn', agents.spawn, MANAGE, 'POST', '/v1/agents', 'spawn', status=201, slow=True),
    Op('agent.prune', agents.prune, MANAGE, 'POST', '/v1/agents/prune', 'prune', slow=True),
    Op('agent.get', agents.show, READ, 'GET', '/v1/agents/{agent}', 'show'),
    Op('agent.get_result', agents.result, READ, 'GET', '/v1/agents/{agent}/result', 'result'),
    Op('agent.kill', agents.kill, MANAGE, 'POST', '/v1/agents/{agent}/kill', 'kill', slow=True),
    Op('agent.restart', agents.restart, MANAGE, 'POST', '/v1/agents/{agent}/restart', 'restart', slow=True),
    Op('agent.interrupt', agents.interrupt, MANAGE, 'POST', '/v1/agents/{agent}/interrupt', 'interrupt'),
    Op('agent.resume', agents.resume, MANAGE, 'POST', '/v1/agents/{agent}/resume', 'resume'),
    Op('agent.close', agents.close, MANAGE, 'POST', '/v1/agents/{agent}/close', 'close'),
    Op('agent.logs', agent_logs.read_log, READ, 'GET', '/v1/agents/{agent}/logs', 'logs', slow=True),
    Op('agent.wait', agents.wait, READ, 'POST', '/v1/agents/{agent}/wait', 'wait', slow=True),
    Op('agent.inbox', messages.inbox, READ, 'GET', '/v1/agents/{agent}/inbox', 'inbox', also='POST'),
    Op('agent.ack', messages.acknowledge, WRITE, 'POST', '/v1/agents/{agent}/inbox/ack', 'ack'),

    Op('task.assign', tasks.assign, WRITE, 'POST', '/v1/tasks/assign', 'assign', status=201),
    Op('task.list_pending', tasks.list_pending, READ, 'GET', '/v1/tasks/pending', 'pending'),
    Op('task.list', tasks.list_tasks, READ, 'GET', '/v1/tasks', 'task list'),
    Op('task.get', tasks.show, READ, 'GET', '/v1/tasks/{task_id}', 'task show'),
    Op('task.complete', tasks.complete, WRITE, 'POST', '/v1/tasks/{task_id}/complete', 'task complete'),
    Op('task.fail', tasks.fail, WRITE, 'POST', '/v1/tasks/{task_id}/fail', 'task fail'),
    Op('task.release', tasks.release, WRITE, 'POST', '/v1/tasks/{task_id}/release', 'task release'),
    Op('task.history', tasks.history, READ, 'GET', '/v1/tasks/{task_id}/history', 'task why'),
    Op('task.cancel', tasks.cancel, WRITE, 'POST', '/v1/tasks/{task_id}/cancel', 'task cancel'),
    Op('task.retry', tasks.retry, WRITE, 'POST', '/v1/tasks/{task_id}/retry', 'task retry'),

    Op('backlog.list', backlog.list_backlog, READ, 'GET', '/v1/backlog', 'backlog list'),
    Op('backlog.add', backlog.add, WRITE, 'POST', '/v1/backlog', 'backlog add', status=201),
    Op('backlog.assign_all', backlog.assign_all, WRITE, 'POST', '/v1/backlog/assign-all', 'backlog assign-all'),
    Op('backlog.claim', backlog.claim, WRITE, 'POST', '/v1/backlog/{task_id}/claim', 'backlog claim'),
    Op('backlog.remove', backlog.remove, WRITE, 'DELETE', '/v1/backlog/{task_id}', 'backlog remove'),

    Op('deadletter.list', dead_letters.list_dead, READ, 'GET', '/v1/deadletter', 'deadletter list'),
    Op('deadletter.retry', dead_letters.retry, WRITE, 'POST', '/v1/deadletter/{id}/retry', 'deadletter retry'),
    Op('deadletter.drop', dead_letters.drop, WRITE, 'POST', '/v1/deadletter/{id}/drop', 'deadletter drop'),

    Op('events.list', events.list_events, READ, 'GET', '/v1/events', 'events'),
    Op('events.latest', events.latest, READ, 'GET', '/v1/history', 'history'),

    Op('message.send', messages.send, WRITE, 'POST', '/v1/messages/send', 'send', status=201),

    Op('recovery.recover_agents', recovery.recover, MANAGE, 'POST', '/v1/recover', 'recover', slow=True),
    Op('recovery.reclaim_tasks', recovery.reclaim, MANAGE, 'POST', '/v1/reclaim', 'reclaim', slow=True),
    Op('recovery.orphan_tasks', recovery.orphan_tasks, MANAGE, 'POST', '/v1/reclaim/orphan-tasks', 'orphans'),
)
# fmt: on

BY_NAME: Final = {op.name: op for op in OPERATIONS}
