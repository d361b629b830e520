"""What a run of a real coding CLI printed, read again: `tests/recorded/clis` holds CLI-CASE.out and .err.

A loopback model gave the answers. A new version of a CLI is a new recording, and a look at the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinytown.clis.outcome import Outcome, Usage, judge, reset_time
from tinytown.clis.readers import FORMATS, RESULT_BYTES, Excerpt, Reader, plain, reader

RECORDED = Path(__file__).parents[1] / 'recorded' / 'clis'
NOW = 1_796_067_600.0  # 2026-11-30 19:40:00 UTC


def replay(cli: str, case: str, status: int, piece: int = 997) -> tuple[Outcome, str]:
    """(outcome, log) of a recorded run whose output came in pieces of this size."""
    one, log = reader(cli), b''
    out = (RECORDED / f'{cli}-{case}.out').read_bytes()
    for i in range(0, len(out), piece):
        log += one.feed(out[i : i + piece])
    err = RECORDED / f'{cli}-{case}.err'
    one.feed_stderr(err.read_bytes() if err.exists() else b'')
    return one.outcome(status, NOW), (log + one.finish()).decode()


@pytest.mark.parametrize(
    ('cli', 'case', 'status', 'verdict', 'error'),
    [
        ('claude', 'usage', 1, 'limited', 'API Error: Request rejected (429) · You have reached your usage limit'),
        ('claude', '429', 1, 'overloaded', 'Request rejected (429)'),
        ('claude', '529', 1, 'overloaded', 'API Error: 529 Overloaded'),
        ('claude', '401', 1, 'unauthorised', 'Invalid API key · Fix external API key'),
        ('claude', 'credit', 1, 'unauthorised', 'Credit balance is too low'),
        ('claude', 'away', 1, 'overloaded', 'Unable to connect to API (ConnectionRefused)'),
        ('codex', 'usage', 1, 'limited', 'You’ve hit your usage limit'),
        ('codex', '429', 1, 'overloaded', 'exceeded retry limit, last status: 429'),
        ('codex', '500', 1, 'overloaded', 'high demand'),
        ('codex', '401', 1, 'unauthorised', 'unexpected status 401 Unauthorized: invalid x-api-key'),
        ('codex', 'credit', 1, 'unauthorised', 'Your credit balance is too low'),
        ('gemini', '401', 145, 'unauthorised', 'invalid x-api-key'),
        ('copilot', 'usage', 1, 'limited', 'Last error: 429 You have reached your usage limit'),
        ('copilot', '429', 1, 'overloaded', 'Last error: 429'),
        ('copilot', '529', 1, 'overloaded', 'Last error: 529'),
        ('copilot', '401', 1, 'unauthorised', 'Authentication failed with provider'),
        ('copilot', 'away', 1, 'overloaded', 'Could not connect to local model provider'),
        ('opencode', 'usage', 1, 'limited', 'You have reached your usage limit'),
        ('opencode', '429', 1, 'overloaded', 'This request would exceed your rate limit'),
        ('opencode', '401', 1, 'unauthorised', 'invalid x-api-key'),
        ('aider', 'usage', 0, 'limited', 'litellm.RateLimitError'),
        ('aider', '429', 0, 'overloaded', 'litellm.RateLimitError'),
        ('aider', '529', 0, 'overloaded', 'litellm.InternalServerError'),
        ('aider', '401', 0, 'unauthorised', 'litellm.AuthenticationError'),
        ('aider', 'away', 0, 'overloaded', 'Connection refused'),
    ],
)
def test_a_run_that_its_provider_refused_is_not_a_failure_of_the_work(
    cli: str, case: str, status: int, verdict: str, error: str
) -> None:
    outcome, _ = replay(cli, case, status)
    assert (outcome.verdict, outcome.result) == (verdict, None)
    assert error in (outcome.error or '')
    assert '\n' not in (outcome.error or '')


@pytest.mark.parametrize('piece', [1, 4096])
@pytest.mark.parametrize('cli', ['claude', 'codex', 'gemini', 'copilot', 'opencode', 'aider'])
def test_the_result_of_a_run_is_the_final_answer(cli: str, piece: int) -> None:
    outcome, log = replay(cli, 'done', 0, piece)
    assert (outcome.verdict, outcome.error) == ('done', None)
    assert (outcome.result or '').splitlines()[0] == 'the answer is 42'
    assert 'the answer is 42\n' in log


@pytest.mark.parametrize('cli', ['claude', 'codex', 'gemini', 'copilot', 'opencode'])
def test_the_log_shows_each_command_with_its_output_and_no_json(cli: str) -> None:
    outcome, log = replay(cli, 'shell', 0)
    assert outcome.result == 'shell done'
    command, output, answer = (
        log.index(text) for text in ('echo hi-from-shell; false', '  | hi-from-shell', 'shell done')
    )
    assert command < output < answer
    assert not [line for line in log.splitlines() if line.startswith('{')]


def test_the_usage_of_a_run_is_what_the_cli_says() -> None:
    assert replay('claude', 'shell', 0)[0].usage == Usage(
        2400, 84, 600, 0.021599999999999998, 2, 'claude-opus-4-8[1m]', 'e1b52f81-b3f9-40e7-9a78-1e4e908078b6'
    )
    assert replay('codex', 'shell', 0)[0].usage[:4] == (2400, 84, 600, None)
    assert replay('gemini', 'done', 0)[0].usage[:3] == (2400, 84, 600)
    assert replay('opencode', 'shell', 0)[0].usage[:5] == (2400, 84, 0, 0, 2)
    assert replay('aider', 'done', 0)[0].usage[:5] == (1500, 42, None, 0.0043, 1)
    assert replay('copilot', 'shell', 0)[0].usage[4:6] == (2, 'gpt-4o')


def test_a_json_cli_that_ends_without_its_last_event_has_not_done_its_work() -> None:
    one = reader('codex')
    one.feed(b'{"type":"thread.started","thread_id":"x"}\n{"type":"turn.started"}\n')
    assert one.outcome(0, NOW)[:3] == ('failed', None, 'it ended without a result')


def test_another_program_of_the_same_name_is_judged_by_its_exit_status() -> None:
    one = reader('claude')
    assert one.feed(b'plain words\n') == b'plain words\n'
    assert one.outcome(0, NOW)[:2] == ('done', 'plain words')


@pytest.mark.parametrize('output', FORMATS)
def test_no_output_stops_a_reader(output: str) -> None:
    strange = [
        b'[]\n',
        b'{"type":1}\n',
        b'{"type":"result"}\n',
        b'{"type":"assistant","message":7}\n',
        b'[' * 9000 + b'\n',
    ]
    one = reader(output)
    for line in [*strange, b'\xff\xfe\x00\n', b'{"type":"item.completed","item":[]}\n', b'{"type":"error"']:
        one.feed(line)
    one.finish()
    assert one.outcome(3, NOW).verdict in ('failed', 'broken', 'overloaded')


@pytest.mark.parametrize(
    ('status', 'text', 'verdict'),
    [
        (127, 'sh: nosuch: not found', 'broken'),
        (126, '', 'broken'),
        (1, 'the tests fail', 'failed'),
        (1, 'API Error: 429', 'failed'),  # a CLI of the town's own: its words may be about anything
        (-9, '', 'killed'),
    ],
)
def test_a_cli_of_unknown_format_is_judged_by_its_exit_status(status: int, text: str, verdict: str) -> None:
    one = Reader()
    one.feed_stderr(text.encode())
    assert one.outcome(status, NOW).verdict == verdict


@pytest.mark.parametrize(
    ('message', 'verdict'),
    [
        ("error: unknown option '--prnt'", 'broken'),
        ('--dangerously-skip-permissions cannot be used with root/sudo privileges for security reasons', 'broken'),
        ('fetch failed', 'overloaded'),
        ('Your session has expired. Please run /login', 'unauthorised'),
        ('You have exceeded your current quota', 'limited'),
        ('the build is broken', 'failed'),
    ],
)
def test_a_message_tells_whose_fault_it_is(message: str, verdict: str) -> None:
    assert judge(message) == verdict


@pytest.mark.parametrize(
    ('text', 'seconds'),
    [
        ('You’ve hit your usage limit. Try again in 2 days 3 hours 5 minutes.', 183_900),
        ('{"resets_in_seconds": 3600}', 3600),
        ('"retryDelay": "34s"', 34),
        ('limit reached · resets 9pm (UTC)', 80 * 60),
        ('resets 7:40 AM (UTC)', 12 * 3600),
        ('Claude AI usage limit reached|1796067700', 100),
        ('try again later', None),
        ('resets 25:99pm', None),
    ],
)
def test_a_reset_time_is_read_from_words(text: str, seconds: int | None) -> None:
    moment = reset_time(text, NOW)
    assert (moment and round(moment - NOW)) == seconds


def test_a_subscriptions_limit_ends_when_the_event_says() -> None:
    one = reader('claude')
    event = {'type': 'rate_limit_event', 'rate_limit_info': {'status': 'rejected', 'resetsAt': NOW + 99}}
    result = {'type': 'result', 'is_error': True, 'api_error_status': 429, 'result': 'usage limit reached', 'usage': {}}
    result['usage'] = {'input_tokens': 0, 'output_tokens': 0}
    one.feed(f'{json.dumps(event)}\n{json.dumps(result)}\n'.encode())
    assert (one.outcome(1, NOW).verdict, one.outcome(1, NOW).resets_at) == ('limited', NOW + 99)


def test_colours_and_overwritten_lines_do_not_reach_a_result() -> None:
    assert plain('\x1b[1;31mred\x1b[0m 10%\r 20%\r100%\nok\x1b]0;title\x07!\x00') == '100%\nok!\ufffd'


def test_a_long_result_keeps_its_head_and_its_tail_and_says_what_is_missing() -> None:
    excerpt = Excerpt()
    for i in range(30_000):
        excerpt.add(f'line {i}\n'.encode())
    text = excerpt.text()
    assert text.startswith('line 0\n')
    assert text.endswith('line 29999')
    assert len(text.encode()) <= RESULT_BYTES + 100
    assert '[… 253354 bytes are left out here …]' in text


def test_a_result_of_claude_that_is_no_success_fails_the_work() -> None:
    one = reader('claude')
    one.feed(b'{"type":"result","subtype":"error_max_turns","is_error":false,"num_turns":3}\n')
    assert one.outcome(0, NOW)[:3] == ('failed', None, 'error_max_turns')


def test_half_of_a_last_line_is_no_result() -> None:
    one = reader('claude')
    one.feed(b'{"type":"system","subtype":"init"}\n{"type":"result","is_error":false,"resu')
    one.finish()
    assert one.outcome(0, NOW)[:3] == ('failed', None, 'it ended without a result')
