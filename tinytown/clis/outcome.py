"""How a run of a coding CLI ended: a verdict with its reason, because an exit status alone says too little.

`readers` finds the message of the CLI or of its provider; `judge` turns that message into a verdict. Only `done`
and `failed` are about the work; the other verdicts are about the CLI, its account or the machine.
"""

from __future__ import annotations

import datetime
import re
from typing import Final, Literal, NamedTuple

Verdict = Literal['done', 'failed', 'limited', 'overloaded', 'unauthorised', 'broken', 'killed']


class Usage(NamedTuple):
    """What a run has used, as far as the CLI says it. None: it does not say."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    requests: int | None = None
    model: str | None = None
    session_id: str | None = None


class Outcome(NamedTuple):
    """The end of a run.

    `result` is the final answer, `error` the reason in one line. `resets_at` is when the provider accepts requests
    again, in seconds since the epoch, None if it did not say.
    """

    verdict: Verdict
    result: str | None = None
    error: str | None = None
    resets_at: float | None = None
    usage: Usage = Usage()


# The texts of providers and CLIs. `judge` gives their order.
_UNAUTHORISED: Final = re.compile(
    r'\b40[123]\b|invalid (x-)?api[ -]key|incorrect api key|authenticat|unauthori[sz]ed|not logged in|'
    r'log ?in again|please run /login|token (has )?expired|permission.denied|credit balance|payment required|billing',
    re.I,
)
_LIMITED: Final = re.compile(
    r'usage.limit|insufficient_quota|exceeded your current quota|quota (will reset|exceeded)|hit your (\w+ )?limit|'
    r'(daily|weekly|monthly|5-hour|session|spend(ing)?) limit|limit reached',
    re.I,
)
_OVERLOADED: Final = re.compile(
    r'\b(408|409|429|5[0-9][0-9])\b|overloaded|rate.?limit|too many requests|RESOURCE_EXHAUSTED|unavailable|'
    r'internal ?server ?error|high demand|(unable|failed) to connect|could not connect|APIConnectionError|'
    r'connection ?(error|refused|reset|closed|timed out)|'
    r'ECONN|ENOTFOUND|EAI_AGAIN|ETIMEDOUT|EHOSTUNREACH|ENETUNREACH|socket hang up|network|fetch failed|timed? ?out|'
    r'stream disconnected|error sending request',
    re.I,
)
_BROKEN: Final = re.compile(
    r'unknown (option|argument)|unexpected argument|unrecognized (argument|option)|invalid (option|value)|'
    r'no such option|cannot be used with root|as root|not found in path|command not found|cannot find module|'
    r'not running in a trusted|untrusted',
    re.I,
)


def judge(message: str, status: int | None = None) -> Verdict:
    """The verdict on an error message. `status` is the HTTP status of the provider's answer, None if unknown."""
    text = f'{status} {message}' if status else message
    if _LIMITED.search(message):
        return 'limited'
    if status == 429 or (status and status >= 500):
        return 'overloaded'
    for verdict, pattern in (('unauthorised', _UNAUTHORISED), ('overloaded', _OVERLOADED), ('broken', _BROKEN)):
        if pattern.search(text):
            return verdict  # type: ignore[return-value]  # the names above are verdicts
    return 'failed'


# ------------------------------------------------------------------------------------------------------- reset times

_SECONDS: Final = re.compile(r'resets?_in_seconds\W{1,4}(\d{1,8})|retry.?(?:after|delay)\W{1,4}(\d{1,8})', re.I)
_EPOCH: Final = re.compile(r'limit reached\|(\d{10})\b', re.I)  # of claude: seconds since the epoch
_SPAN: Final = re.compile(
    r'(?:try again|resets?) in\s+((?:\d{1,6}\s*(?:days?|d|hours?|h|min(?:ute)?s?|m|sec(?:ond)?s?|s)\b[\s,and]{0,8})+)',
    re.I,
)
_PART: Final = re.compile(r'(\d+)\s*([dhms])', re.I)
_CLOCK: Final = re.compile(r'(?:resets?|try again)(?: at)?\s+(\d{1,2})(?::(\d{2}))?\s*([ap])\.?m\.?(\s*\(UTC\))?', re.I)
_UNITS: Final = {'d': 86_400, 'h': 3_600, 'm': 60, 's': 1}


def reset_time(text: str, now: float) -> float | None:
    """When a limit ends, in seconds since the epoch, from what a CLI prints: a span, a number of seconds, or a clock.

    A clock without a zone is in the local zone of this machine. None if the text names no time.
    """
    if match := _SECONDS.search(text):
        return now + int(match[1] or match[2])
    if match := _EPOCH.search(text):
        return float(match[1])
    if match := _SPAN.search(text):
        return now + sum(int(number) * _UNITS[unit.lower()] for number, unit in _PART.findall(match[1]))
    if match := _CLOCK.search(text):
        return _next(int(match[1]), int(match[2] or 0), match[3].lower() == 'p', bool(match[4]), now)
    return None


def _next(hour: int, minute: int, is_afternoon: bool, is_utc: bool, now: float) -> float | None:
    """The next moment at which a clock shows this time."""
    if hour > 12 or minute > 59:
        return None
    zone = datetime.UTC if is_utc else None
    present = datetime.datetime.fromtimestamp(now, datetime.UTC).astimezone(zone)
    moment = present.replace(hour=hour % 12 + 12 * is_afternoon, minute=minute, second=0, microsecond=0)
    if moment <= present:
        moment += datetime.timedelta(days=1)
    return moment.timestamp()
