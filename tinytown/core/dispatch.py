"""Dispatch: the one way to an operation, for every front end.

`call` checks the caller's scope and rate limit, validates the arguments, writes the audit records of a change, and
returns the step to run. A front end that called an operation's function itself would skip these checks, so none does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ..errors import Forbidden, TownError
from ..model import LOCAL, READ, Principal, Scope, to_json
from ..schema import validate
from ..state.store import Page, Step
from .operations import Op
from .town import Call, Town


class AuditSubject(NamedTuple):
    """The request that an audit record describes. `by` is None if the caller was not authenticated."""

    request_id: str
    address: str
    by: Principal | None
    operation: str
    arguments: Mapping[str, Any]


class AuditTrail(Protocol):
    """The audit log of changes and refusals. `auth.audit` implements it."""

    def begin(self, subject: AuditSubject) -> Any:
        """Records that a change is about to run. Raises Unavailable if it can't; the change must not run then.

        Returns the value that `end` takes as `record`.
        """
        ...

    def end(self, record: Any, outcome: str, answer: Any) -> None:
        """Records the outcome of a change: `ok` or an error code. `answer` is None if the change failed."""
        ...

    def denied(self, subject: AuditSubject, error: TownError) -> None:
        """Records a refusal."""
        ...


class RateLimit(Protocol):
    """How often a caller may call. `auth.rate_limit` implements it."""

    def take(self, by: Principal, address: str, changes: bool) -> None:
        """Counts one call. Raises TooManyRequests if the caller has reached its limit."""
        ...


class CallLimits(NamedTuple):
    """The rate limit and the audit log that apply to one request, with the request's id and the client's address."""

    throttle: RateLimit
    audit: AuditTrail
    request_id: str
    address: str


def call(
    town: Town, by: Principal, op: Op, arguments: dict[str, Any], key: str = '', limits: CallLimits | None = None
) -> Step[Any]:
    """Checks a call and returns the step that carries it out. Every front end calls this, so none can skip a check.

    Raises TownError at once if the caller lacks the scope, has reached its rate limit, or gave invalid arguments. The
    step uses a store that is bound to the caller. It returns the operation's answer: a dict of its output shape, or a
    Page, which is JSON text of that shape. `key` is the idempotency key, '' for none. `tt` works on a town directly and
    passes no `limits`: then there is neither a rate limit nor an audit record.
    """
    enter(by, op.name, op.scope, arguments, limits)
    step = _perform(town, by, op, arguments, validate(op.parameters, arguments), key)
    if limits and op.changes:
        return _audited(limits.audit, AuditSubject(limits.request_id, limits.address, by, op.name, arguments), step)
    return step


def enter(by: Principal, name: str, scope: Scope, arguments: dict[str, Any], limits: CallLimits | None) -> None:
    """Checks the caller's scope and rate limit, and records a refusal. Raises Forbidden, TooManyRequests.

    `rest.health` calls this for the endpoints that need a scope but are not operations.
    """
    try:
        _check_scope(by, name, scope)
        if limits:
            limits.throttle.take(by, limits.address, scope != READ)
    except TownError as e:
        if limits:
            limits.audit.denied(AuditSubject(limits.request_id, limits.address, by, name, arguments), e)
        raise


def _check_scope(by: Principal, name: str, scope: Scope) -> None:
    if not by.may(scope):
        has = ', '.join(sorted(by.scopes)) or 'none'
        raise Forbidden(
            f"{name} needs the scope {scope}; '{by.name}' has {has}",
            code='insufficient-scope',
            challenge=f'Bearer error="insufficient_scope", scope="{scope}"' if by.name != LOCAL else '',
        )


def _audited(audit: AuditTrail, subject: AuditSubject, step: Step[Any]) -> Step[Any]:
    """Runs a change between its two audit records. If the first can't be written, the change does not run."""
    record = audit.begin(subject)
    outcome, answer = 'unknown', None
    try:
        answer = yield from step
        outcome = 'ok'
    except TownError as e:
        outcome = e.code
        raise
    finally:
        audit.end(record, outcome, answer)
    return answer


def _perform(
    town: Town, by: Principal, op: Op, arguments: dict[str, Any], checked: dict[str, Any], key: str
) -> Step[Any]:
    """The step of an operation. With an idempotency key, a change runs only once for that key."""
    name = by.agent_name or by.name
    if not (key and op.changes):
        return op.function(Call(town, by, town.store.acting_as(name)), **checked)
    scoped = f'{by.name} {op.name} {key}'  # unambiguous: operation names and keys contain no space
    fingerprint = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
    if op.slow:
        return _once(town, op.function(Call(town, by, town.store.acting_as(name)), **checked), scoped, fingerprint)
    return op.function(Call(town, by, town.store.acting_as(name, scoped, fingerprint)), **checked)


def _once(town: Town, step: Step[Any], key: str, fingerprint: str) -> Step[Any]:
    """Runs a slow operation once for its idempotency key. A repeated request gets the first answer.

    Other operations are one script, which checks the key itself.
    """
    max_secs = town.config.townhall.request_timeout_ms // 1000 + 60  # after this, the key of a crashed request is free
    reply = yield town.store.begin(key, fingerprint, max_secs)
    if reply[0] == b'done':
        return Page(reply[1])
    try:
        answer = encode_answer((yield from step))
    except Exception:
        yield town.store.settle(key, b'')
        raise
    yield town.store.settle(key, answer)
    return Page(answer)


def encode_answer(answer: Any) -> bytes:
    """An operation's answer as JSON bytes."""
    if isinstance(answer, bytes):
        return answer
    return to_json(answer).encode()
