"""The error family. A class carries its HTTP status and stable code; an instance says what is wrong and the mend."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any


class TownError(Exception):
    """Something a caller is told. `detail` names the value and what to do.

    `errors` lists the invalid places as {pointer, detail}; `retry_after` is in seconds; `allow` lists methods;
    `challenge` is the WWW-Authenticate of a caller who is not known, or may not (RFC 9110, 11.6.1).
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
    """No townhall of a host is heard of, or none takes orders."""

    code = 'host-silent'


class VersionNotSupported(TownError):
    status, code = 505, 'http-version-not-supported'


class UsageError(Exception):
    """A command line or configuration that can't be used: one line on stderr and exit status 2."""


# What a Redis script refuses, in the words of a person. {0}, {1} … are what the script returned beside the code.
REFUSALS: dict[str, tuple[type[TownError], str]] = {
    'agent-not-found': (NotFound, "Agent '{0}' not found"),
    'ambiguous-agent': (Conflict, "'{0}' is the start of more than one agent id; give more of it, or the name"),
    'agent-not-accepting': (
        Conflict,
        "Agent '{0}' is {1} and takes no tasks; restart it (tt restart {0}), or put the task into the backlog",
    ),
    'agent-live': (Conflict, "Agent '{0}' is {1}; kill it first (tt kill {0})"),
    'name-taken': (Conflict, "There is an agent named '{0}' already, in this or another case; choose another name"),
    'max-agents': (
        Conflict,
        'The town has its {0} live agents already; kill one, or raise max_agents in tinytown.toml',
    ),
    'bad-transition': (Conflict, "Agent '{0}' is {1}; it can't be told to {2} from there"),
    'stale-instance': (Conflict, "Agent '{0}' was stopped or started again meanwhile; look again:  tt show {0}"),
    'task-not-found': (NotFound, "Task '{0}' not found"),
    'task-not-pending': (Conflict, "Task '{0}' is {1}, not in the backlog"),
    'task-not-running': (Conflict, "Task '{0}' is {1}; only a running task can be released"),
    'no-dead-letter': (NotFound, "'{0}' is not among the dead letters"),
    'task-not-failed': (Conflict, "Task '{0}' is {1}; only a failed or cancelled task can be retried"),
    'not-your-task': (Forbidden, "Task '{0}' is not held by the agent that asks; its holder or a person may do this"),
    'task-finished': (Conflict, "Task '{0}' is {1} already"),
    'stale-attempt': (Conflict, "Attempt {1} of task '{0}' is not the current one; the task is at attempt {2}"),
    'idempotency-mismatch': (Invalid, "Idempotency-Key '{0}' was used with another request; take a new key"),
    'in-progress': (Conflict, "The request with Idempotency-Key '{0}' is still under way; ask again in a second"),
    'town-name-taken': (
        Conflict,
        'This Redis holds another town of the same name (id {0}); if this directory is to be a further host of that '
        'town:  tt init --join;  else change `name` in tinytown.toml, or the Redis',
    ),
    'no-such-town': (NotFound, "This Redis holds no town '{0}'; begin it on its first host (tt init; tt start)"),
    'host-unknown': (Conflict, "No townhall was ever heard of on host '{0}'; known hosts: {1}"),
    'host-silent': (
        HostSilent,
        "No townhall of host '{0}' was heard of since {1}; start one there, or choose another host (tt hosts)",
    ),
    'host-name-taken': (
        Conflict,
        "A townhall in another place ({1}) goes by the name of this host, '{0}'; give this one a name of its own: set "
        '`host` in tinytown.toml, or TINYTOWN_HOST',
    ),
}


def refusal(code: str, *details: str) -> TownError:
    """The error that stands for a script's refusal."""
    kind, text = REFUSALS[code]
    return kind(text.format(*details), code=code, retry_after=1 if code == 'in-progress' else None)
