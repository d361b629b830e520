"""The errors that callers get. A class carries the HTTP status and a stable code, an instance the message.

At the end stand the messages for what Redis scripts refuse (`REFUSALS`); `state/store.py` raises them.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any


class TownError(Exception):
    """An error that is reported to the caller. `detail` names the wrong value and what to do.

    `errors` lists the invalid values as {pointer, detail}. `retry_after` is in seconds. `allow` lists the allowed
    methods. `challenge` is the WWW-Authenticate header of a 401 or 403 (RFC 9110, 11.6.1).
    """

    status = 500
    code = 'internal'

    def __init__(
        self,
        detail: str,
        *,
        code: str = '',
        errors: list[dict[str, str]] | None = None,
        retry_after: int | None = None,
        allow: str = '',
        challenge: str = '',
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.errors = errors
        self.retry_after = retry_after
        self.allow = allow
        self.challenge = challenge

    @property
    def title(self) -> str:
        return HTTPStatus(self.status).phrase

    def problem(self, request_id: str = '') -> dict[str, Any]:
        """The problem document of RFC 9457 (which obsoletes 7807), with our `code`, `request_id` and `errors`."""
        document: dict[str, Any] = {
            'type': f'https://tinytown.dev/errors/{self.status}',
            'title': self.title,
            'status': self.status,
            'detail': self.detail,
            'code': self.code,
        }
        if request_id:
            document['request_id'] = request_id
        if self.errors:
            document['errors'] = self.errors
        return document


class BadRequest(TownError):
    status, code = 400, 'bad-request'


class Unauthorized(TownError):
    status, code = 401, 'unauthorized'


class Forbidden(TownError):
    status, code = 403, 'forbidden'


class NotFound(TownError):
    status, code = 404, 'not-found'


class MethodNotAllowed(TownError):
    status, code = 405, 'method-not-allowed'


class RequestTimeout(TownError):
    status, code = 408, 'request-timeout'


class Conflict(TownError):
    status, code = 409, 'conflict'


class LengthRequired(TownError):
    status, code = 411, 'length-required'


class TooLarge(TownError):
    status, code = 413, 'body-too-large'


class UriTooLong(TownError):
    status, code = 414, 'uri-too-long'


class UnsupportedMediaType(TownError):
    status, code = 415, 'unsupported-media-type'


class ExpectationFailed(TownError):
    status, code = 417, 'expectation-failed'


class Misdirected(TownError):
    status, code = 421, 'misdirected-request'


class Invalid(TownError):
    status, code = 422, 'invalid'


class TooManyRequests(TownError):
    status, code = 429, 'too-many-requests'


class HeadTooLarge(TownError):
    status, code = 431, 'head-too-large'


class Internal(TownError):
    status, code = 500, 'internal'


class NotImplemented501(TownError):
    status, code = 501, 'not-implemented'


class Unavailable(TownError):
    status, code = 503, 'unavailable'


class HostSilent(Unavailable):
    """No townhall of a host sends heartbeats, or none carries out orders."""

    code = 'host-silent'


class VersionNotSupported(TownError):
    status, code = 505, 'http-version-not-supported'


class UsageError(Exception):
    """An invalid command line or configuration: one line on stderr, and exit status 2."""


# The message for each code with which a Redis script refuses. The script returns {0}, {1} … after the code.
REFUSALS: dict[str, tuple[type[TownError], str]] = {
    'agent-not-found': (NotFound, "Agent '{0}' not found"),
    'ambiguous-agent': (Conflict, "More than one agent id starts with '{0}'; give more of the id, or the name"),
    'agent-not-accepting': (
        Conflict,
        "Agent '{0}' is {1} and takes no tasks; restart it (tt restart {0}), or put the task into the backlog",
    ),
    'agent-live': (Conflict, "Agent '{0}' is {1}; kill it first (tt kill {0})"),
    'name-taken': (Conflict, "An agent named '{0}' exists already (case does not matter); choose another name"),
    'max-agents': (
        Conflict,
        'The town already has {0} live agents, its maximum; kill one, or raise max_agents in tinytown.toml',
    ),
    'bad-transition': (Conflict, "Agent '{0}' is {1}; {2} is not possible in this state"),
    'stale-instance': (Conflict, "Agent '{0}' was stopped or restarted in the meantime; check it:  tt show {0}"),
    'task-not-found': (NotFound, "Task '{0}' not found"),
    'task-not-pending': (Conflict, "Task '{0}' is {1}, not in the backlog"),
    'task-not-running': (Conflict, "Task '{0}' is {1}; only a running task can be released"),
    'no-dead-letter': (NotFound, "'{0}' is not among the dead letters"),
    'task-not-failed': (Conflict, "Task '{0}' is {1}; only a failed or cancelled task can be retried"),
    'not-your-task': (Forbidden, "Task '{0}' is not held by this agent; only its holder or a person may do this"),
    'task-finished': (Conflict, "Task '{0}' is already {1}"),
    'stale-attempt': (Conflict, "Attempt {1} of task '{0}' is not the current one; the task is at attempt {2}"),
    'idempotency-mismatch': (Invalid, "Idempotency-Key '{0}' was used for a different request; use a new key"),
    'in-progress': (Conflict, "The request with Idempotency-Key '{0}' is still in progress; send it again in a second"),
    'town-name-taken': (
        Conflict,
        'This Redis holds another town of the same name (id {0}). To make this directory a further host of that town:  '
        'tt init --join;  otherwise change `name` in tinytown.toml, or use another Redis',
    ),
    'no-such-town': (NotFound, "This Redis holds no town '{0}'; create it on its first host (tt init; tt start)"),
    'host-unknown': (Conflict, "No townhall has ever run on host '{0}'; known hosts: {1}"),
    'host-silent': (
        HostSilent,
        "The townhall of host '{0}' was last heard from at {1}; start one there, or choose another host (tt hosts)",
    ),
    'host-name-taken': (
        Conflict,
        "A townhall elsewhere ({1}) uses the name of this host, '{0}'; give this host a name of its own: set `host` "
        'in tinytown.toml, or TINYTOWN_HOST',
    ),
}


def refusal(code: str, *details: str) -> TownError:
    """The error for a script's refusal: its `code`, and the `details` that the script returned."""
    kind, text = REFUSALS[code]
    return kind(text.format(*details), code=code, retry_after=1 if code == 'in-progress' else None)
