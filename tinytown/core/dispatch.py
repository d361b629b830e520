"""Dispatch: the one way to an operation, for every front end.

`call` checks the caller's scope and rate limit, validates the arguments, puts a change on record, and gives the steps.
A front end that calls an operation's function itself would skip all of that, so none does.
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
    """What an audit line is about. A request without a known principal has none (None)."""

    request_id: str
    address: str
    by: Principal | None
    operation: str
    arguments: Mapping[str, Any]


class AuditTrail(Protocol):
    """The record of changes and refusals (`auth.audit`)."""

    def begin(self, visit: AuditSubject) -> Any:
        """Writes that a change is about to be made. Raises Unavailable if it can't: then nothing may be changed."""
        ...

    def end(self, record: Any, outcome: str, made: Any) -> None:
        """Writes the outcome of a change that `begin` announced."""
        ...

    def denied(self, visit: AuditSubject, error: TownError) -> None:
        """Writes a refusal."""
        ...


class RateLimit(Protocol):
    """How often a caller may call (`auth.rate_limit`)."""

    def take(self, by: Principal, address: str, changes: bool) -> None:
        """Counts one call, a read or a change. Raises TooManyRequests."""
        ...


class CallLimits(NamedTuple):
    """What dispatch enforces for one request beside scopes: the rate limit and the audit."""

    throttle: RateLimit
    audit: AuditTrail
    request_id: str
    address: str


def call(
    town: Town, by: Principal, op: Op, arguments: dict[str, Any], key: str = '', gate: CallLimits | None = None
) -> Step[Any]:
    """The one door: every front end comes through here, so no check can be missed by one of them.

    Checks the caller's scope and rate, and validates: raises TownError at once. The step is what runs then, on a store
    that is bound to the caller; every change and every refusal is on record. It gives what the operation gives: a dict
    of its shape, or a Page (JSON text of that shape). Without a `gate` (`tt`, which acts directly) there is no rate and
    no record.
    """
    enter(by, op.name, op.scope, arguments, gate)
    step = _perform(town, by, op, arguments, validate(op.parameters, arguments), key)
    if gate and op.changes:
        return _on_record(gate.audit, AuditSubject(gate.request_id, gate.address, by, op.name, arguments), step)
    return step


def enter(by: Principal, name: str, scope: Scope, arguments: dict[str, Any], gate: CallLimits | None) -> None:
    """The first half of the door: the caller's scope and rate. Raises Forbidden, TooManyRequests, and has it on record.

    What is served to callers who are known and is no operation comes through here too.
    """
    try:
        _check_scope(by, name, scope)
        if gate:
            gate.throttle.take(by, gate.address, scope != READ)
    except TownError as e:
        if gate:
            gate.audit.denied(AuditSubject(gate.request_id, gate.address, by, name, arguments), e)
        raise


def _check_scope(by: Principal, name: str, scope: Scope) -> None:
    if not by.may(scope):
        has = ', '.join(sorted(by.scopes)) or 'none'
        raise Forbidden(
            f"{name} needs the scope {scope}; '{by.name}' has {has}",
            code='insufficient-scope',
            challenge=f'Bearer error="insufficient_scope", scope="{scope}"' if by.name != LOCAL else '',
        )


def _on_record(audit: AuditTrail, subject: AuditSubject, step: Step[Any]) -> Step[Any]:
    """Runs a change between its two lines of the audit. Without the first it is not run."""
    record = audit.begin(subject)
    outcome, made = 'unknown', None
    try:
        made = yield from step
        outcome = 'ok'
    except TownError as e:
        outcome = e.code
        raise
    finally:
        audit.end(record, outcome, made)
    return made


def _perform(
    town: Town, by: Principal, op: Op, arguments: dict[str, Any], checked: dict[str, Any], key: str
) -> Step[Any]:
    """The steps of an operation, which runs once for its idempotency key."""
    name = by.agent_name or by.name
    if not (key and op.changes):
        return op.function(Call(town, by, town.store.acting_as(name)), **checked)
    scoped = f'{by.name} {op.name} {key}'  # neither an operation nor a key holds a space
    fingerprint = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
    if op.slow:
        return _once(town, op.function(Call(town, by, town.store.acting_as(name)), **checked), scoped, fingerprint)
    return op.function(Call(town, by, town.store.acting_as(name, scoped, fingerprint)), **checked)


def _once(town: Town, step: Step[Any], key: str, fingerprint: str) -> Step[Any]:
    """Runs an operation of several steps once for its key; a repetition is given the first answer."""
    longest = town.config.townhall.request_timeout_ms // 1000 + 60
    reply = yield town.store.begin(key, fingerprint, longest)
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
    """What an operation gave, as JSON."""
    if isinstance(answer, bytes):
        return answer
    return to_json(answer).encode()
