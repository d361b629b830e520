"""The prompt of a round, and the built-in CLI that reads one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tinytown.clis import registry
from tinytown.settings import Config
from tinytown.worker.prompt import InboxMessage, Work, compose, fits_role

WORK = Work('t-1', 2, 'Mend the parser.\n\nIt drops the last line.', ['parser', 'bug'])


def prompt(
    work: Work | None = None,
    *letters: InboxMessage,
    role: str | None = None,
    backlog: list[dict[str, Any]] | None = None,
) -> str:
    return compose('my-town', 'w', role, work, letters, backlog or [])


def section(text: str, title: str) -> list[str]:
    """The lines below a heading, to the next one."""
    _, _, rest = text.partition(f'## {title}\n\n')
    assert rest, f'{title} is not in {text}'
    return rest.partition('\n## ')[0].strip().splitlines()


def test_a_prompt_names_the_agent_the_town_the_task_and_how_to_report() -> None:
    text = prompt(WORK, role='reviewer')
    assert text.startswith('You are w, an agent of the town my-town. You review:')
    assert section(text, 'Task') == WORK.description.splitlines()
    assert section(text, 'About the task') == ['Task t-1, attempt 2. Tags: parser, bug.']
    assert 'tt task complete --result' in text
    assert 'tt send NAME "text" --query' in text
    assert text.endswith('\n')


def test_a_prompt_leaves_out_missing_tags_and_the_text_of_an_unknown_role() -> None:
    text = prompt(Work('t-1', 1, 'do it', []), role='gardener')
    assert text.startswith('You are w, an agent of the town my-town.\n')
    assert section(text, 'About the task') == ['Task t-1, attempt 1.']


def test_a_round_without_a_task_says_nothing_about_reporting_one() -> None:
    text = prompt(None, InboxMessage('query', 'ann', 'Why?', False))
    assert '## Task' not in text
    assert 'tt task' not in text


def test_requests_are_listed_information_is_shortened_acks_are_counted_and_urgent_messages_come_first() -> None:
    text = prompt(
        None,
        InboxMessage('info', 'ann', 'lunch  is\nready', False),
        InboxMessage('query', 'ann', 'Why?', False),
        InboxMessage('ack', 'ann', 'fine', False),
        InboxMessage('task', 'bob', 'Stop!', True),
        InboxMessage('info', 'bob', 'x' * 400, True),
        InboxMessage('ack', 'bob', 'good', True),
    )
    assert section(text, 'Messages to act on') == ['- urgent: a request from bob: Stop!', '- a question from ann: Why?']
    assert section(text, 'For your information') == ['- from bob: ' + 'x' * 299 + '…', '- from ann: lunch is ready']
    assert section(text, 'Confirmations') == ['2 received.']


def test_information_beyond_the_limit_is_only_counted() -> None:
    lines = section(
        prompt(None, *[InboxMessage('info', 'ann', str(i), False) for i in range(25)]), 'For your information'
    )
    assert len(lines) == 21
    assert lines[-1] == '- and 5 more'


def test_backlog_tasks_that_fit_the_role_are_listed_up_to_a_limit() -> None:
    backlog = [{'task_id': f't{i}', 'description': f'number\n{i}', 'tags': ['reviewer', 'x']} for i in range(10)]
    title = 'Backlog that fits your role (not yours to do; claim with tt backlog claim)'
    lines = section(prompt(WORK, role='reviewer', backlog=backlog), title)
    assert lines == [f'- t{i}: number {i}' for i in range(8)]
    assert 'Backlog' not in prompt(WORK, role='worker', backlog=backlog)


@pytest.mark.parametrize(
    ('role', 'tags', 'fits'),
    [
        ('reviewer', [], True),
        ('reviewer', ['parser'], True),
        ('reviewer', ['Reviewer'], True),
        ('reviewer', ['worker'], False),
        ('reviewer', ['worker', 'reviewer'], True),
        ('gardener', ['gardener'], True),
        ('worker', ['gardener'], True),
        (None, ['parser'], True),
        (None, ['worker'], False),
    ],
)
def test_a_task_fits_a_role_unless_it_is_tagged_for_others(role: str | None, tags: list[str], fits: bool) -> None:
    assert fits_role(role, tags) is fits


# ------------------------------------------------------------------------------------------------------------- CLIs


def run_demo(task: str) -> subprocess.CompletedProcess[str]:
    demo = registry.find_cli(Config(name='t'), 'demo')
    text = prompt(Work('t-1', 1, task, []))
    return subprocess.run(demo.argv, input=text, capture_output=True, text=True, check=False, timeout=20)


def test_the_demo_does_what_its_task_says() -> None:
    done = run_demo('say hello\n\nto everyone')
    assert (done.returncode, done.stdout) == (0, 'demo: done: say hello\n\nto everyone\n')
    slept = run_demo('sleep 0.01 and go on')
    assert (slept.returncode, slept.stdout.splitlines()[0]) == (0, 'demo: sleeping for 0.01 s')
    failed = run_demo('please fail')
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, '', 'demo: failed, as the task asked\n')


def test_the_demo_runs_without_a_task() -> None:
    demo = registry.find_cli(Config(name='t'), None if Config().default_cli == 'demo' else 'demo')
    text = prompt(None, InboxMessage('query', 'ann', 'can you fail? sleep 99', False))
    done = subprocess.run(demo.argv, input=text, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stdout) == (0, 'demo: done: the messages\n')


def test_a_prompt_is_never_an_argument_of_a_built_in_cli() -> None:
    for cli in registry.known_clis(Config(name='t')).values():
        assert cli.install
        assert cli.takes_file is any('{prompt_file}' in part for part in cli.argv)
    assert registry.known_clis(Config(name='t'))['demo'].argv[0] == sys.executable


def test_a_towns_own_cli_replaces_a_built_in_one() -> None:
    own = Config(name='t', agent_clis={'claude': "sh -c 'cat {prompt_file}'"}, default_cli='claude')
    found = registry.find_cli(own, None)
    assert found.takes_file
    assert [part.replace('/x', '{prompt_file}') for part in found.argv] == ['sh', '-c', 'cat {prompt_file}']


def test_a_cli_gets_only_allowed_environment_variables() -> None:
    config = Config(name='t')
    given = {'HOME': '/h', 'LC_TIME': 'C', 'XDG_CACHE_HOME': '/c', 'ANTHROPIC_API_KEY': 'k', 'https_proxy': 'p'}
    secret = {'DATABASE_URL': 's', 'TINYTOWN_REDIS_URL': 's', 'PYTHONPATH': 's', 'LD_PRELOAD': 's', 'AWS_SECRET': 's'}
    assert registry.worker_environment(config, given | secret) == given
