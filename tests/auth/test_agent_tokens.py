"""Agent tokens: what an agent may do through a townhall and with `tt`, and when its token becomes invalid."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tinytown import config
from tinytown.auth import agent_tokens
from tinytown.core.agents import look_up
from tinytown.core.town import Call
from tinytown.errors import TownError, Unauthorized
from tinytown.host.town_dir import TownDir
from tinytown.model import CONDUCTOR_ID

from ..support import LONG, OPERATOR, Place, make_town, shell_cli, until

HOLD = shell_cli('cat >/dev/null; tt send conductor holding --info; exec sleep 60')


@pytest.fixture
def town(directory: Path) -> Iterator[Place]:
    """A town where agents with the role `lead` may manage others. Its CLI reports that it runs, then stays."""
    made = make_town(
        directory, default_cli='hold', agent_clis={'hold': HOLD}, agent={'role_scopes': {'lead': ['agent.manage']}}
    )
    yield made
    made.close()


def token(place: Place, name: str) -> str:
    agent_id = place.do('agent.get', agent=name)['id']
    file = TownDir(place.root).token(agent_id)
    assert file.stat().st_mode & 0o777 == 0o600
    return file.read_text().strip()


def bearer(place: Place, name: str) -> dict[str, str]:
    return {'Authorization': f'Bearer {token(place, name)}'}


def spawned(place: Place, *names: str, **more: Any) -> None:
    for name in names:
        place.do('agent.spawn', name=name, **more)


def ended(place: Place, task_id: str) -> str:
    """The final state of a task; '' while it has none."""
    state: str = place.do('task.get', task_id=task_id)['state']
    return state if state in ('completed', 'failed', 'cancelled') else ''


def working(place: Place, name: str) -> str:
    """The id of a task that an agent has claimed and is running."""
    task_id: str = place.do('task.assign', agent=name, task='go on')['task_id']
    place.await_event('message.sent', agent_name='conductor')
    assert place.do('task.get', task_id=task_id)['state'] == 'running'
    return task_id


def test_an_agent_acts_as_itself_and_its_messages_are_verified(town: Place) -> None:
    spawned(town, 'a', 'b')
    hall, a = town.hall(), bearer(town, 'a')
    a_id = town.do('agent.get', agent='a')['id']
    for sender in ({}, {'from': 'a'}, {'from': a_id}, {'from': a_id[:8]}, {'from': 'A'}):
        body = {'to': 'conductor', 'message': 'hello', 'kind': 'info'} | sender
        assert hall.post('/v1/messages/send', body, **a).status == 201
    for sender in ({'from': 'b'}, {'from': 'conductor'}, {'from': CONDUCTOR_ID}, {'from': a_id[:3]}):
        answer = hall.post('/v1/messages/send', {'to': 'b', 'message': 'do it'} | sender, **a)
        assert (answer.status, answer.json['code']) == (403, 'not-yourself'), sender
    hall.post('/v1/messages/send', {'to': 'conductor', 'message': 'as a person', 'from': 'a', 'kind': 'info'})
    found = town.do('agent.inbox', agent='conductor')['messages']
    assert [(each['from'], each.get('verified')) for each in found] == [(a_id, True)] * 5 + [(a_id, None)]
    assert town.do('agent.inbox', agent='b')['total'] == 0


def test_an_agent_can_not_manage_other_agents_unless_its_role_may(town: Place) -> None:
    spawned(town, 'a', 'b')
    spawned(town, 'boss', role_id='lead')
    hall = town.hall()
    for path in ('/v1/agents/b/kill', '/v1/agents/b/close', '/v1/recover', '/v1/town/reset'):
        answer = hall.post(path, **bearer(town, 'a'))
        assert (answer.status, answer.json['code']) == (403, 'insufficient-scope'), path
    answer = hall.post('/v1/agents/conductor/inbox/ack', {'all': True}, **bearer(town, 'a'))
    assert (answer.status, answer.json['code']) == (403, 'not-yourself')
    assert hall.post('/v1/agents/a/inbox/ack', {'all': True}, **bearer(town, 'a')).status == 200
    assert hall.get('/v1/status', **bearer(town, 'a')).status == 200
    assert hall.post('/v1/backlog', {'description': 'more'}, **bearer(town, 'a')).status == 201
    assert hall.post('/v1/agents/b/kill', {'force': True}, **bearer(town, 'boss')).status == 200
    assert hall.post('/v1/town/reset', **bearer(town, 'boss')).status == 403


@pytest.mark.parametrize('verb', ['complete', 'fail', 'release'])
def test_only_the_holder_reports_on_a_task_and_must_name_the_attempt(town: Place, verb: str) -> None:
    spawned(town, 'a', 'b')
    hall, task_id = town.hall(), working(town, 'a')
    path = f'/v1/tasks/{task_id}/{verb}'
    other = hall.post(path, {'attempt': 1}, **bearer(town, 'b'))
    assert (other.status, other.json['code']) == (403, 'not-your-task')
    silent = hall.post(path, **bearer(town, 'a'))
    assert (silent.status, silent.json['errors'][0]['pointer']) == (422, '/attempt')
    stale = hall.post(path, {'attempt': 2}, **bearer(town, 'a'))
    assert (stale.status, stale.json['code']) == (409, 'stale-attempt')
    assert hall.post(path, {'attempt': 1}, Idempotency_Key='k', **bearer(town, 'a')).status == 200
    assert hall.post(path, {'attempt': 1}, Idempotency_Key='k', **bearer(town, 'a')).status == 200
    audit = [json.loads(line) for line in (town.root / '.tt' / 'audit.jsonl').read_text().splitlines()]
    a_id = town.do('agent.get', agent='a')['id']
    assert audit[-1]['principal'] == f'agent:a:{a_id}'
    assert town.do('task.history', task_id=task_id)['history'][-1]['by'] == 'a'


def test_a_token_becomes_invalid_with_the_process_that_it_was_made_for(town: Place) -> None:
    spawned(town, 'a')
    hall, first = town.hall(), bearer(town, 'a')
    assert hall.get('/v1/status', **first).status == 200
    town.do('agent.restart', agent='a')
    second = bearer(town, 'a')
    assert [hall.get('/v1/status', **each).status for each in (first, second)] == [401, 200]
    town.do('agent.kill', agent='a', force=True)
    answer = hall.get('/v1/status', **second)
    assert (answer.status, answer.json['code']) == (401, 'invalid-token')
    assert answer.headers['www-authenticate'] == 'Bearer realm="tinytown", error="invalid_token"'
    agent_id = town.do('agent.get', agent='a')['id']
    town.do('agent.prune')
    assert hall.get('/v1/status', **second).status == 401
    assert not TownDir(town.root).token(agent_id).exists()


FORGED: dict[str, Callable[[str], str]] = {
    'another last character': lambda token: token[:-1] + ('A' if token[-1] != 'A' else 'B'),
    'cut short': lambda token: token[:-1],
    'longer': lambda token: token + 'A',
    'another agent': lambda token: token[:4] + '0' * 8 + token[12:],
    'another instance': lambda token: token[:41] + '0' * 8 + token[49:],
    'a MAC with another key': lambda token: token[:78] + hmac.digest(b'mine', token[:77].encode(), 'sha256').hex()[:43],
    'prefix alone': lambda _: agent_tokens.TOKEN_PREFIX,
    'upper case': str.upper,
}  # fmt: skip


@pytest.mark.parametrize('mode', ['none', 'api_key'])
def test_a_forged_token_is_refused_in_every_mode(town: Place, mode: str) -> None:
    spawned(town, 'a')
    if mode == 'api_key':
        town.tt('generate-api-key', '--write')
    hall, real = town.hall(), token(town, 'a')
    assert hall.get('/v1/status', Authorization=f'Bearer {real}').status == 200
    for name, forge in FORGED.items():
        forged = forge(real)
        assert forged != real
        if forged.startswith(agent_tokens.TOKEN_PREFIX) or mode == 'api_key':
            assert hall.get('/v1/status', X_API_Key=forged).status == 401, name
            assert hall.get('/v1/status', Authorization=f'Bearer {forged}').status == 401, name


def test_tt_within_a_run_acts_as_its_agent_and_sends_its_token_to_a_townhall(directory: Path) -> None:
    script = 'cat >/dev/null; tt {url} kill b; tt {url} send conductor --from b no; tt {url} send conductor yes --info'
    place = make_town(directory)
    hall = place.hall()  # starts before this process reads the configuration, so that it knows the new CLIs
    clis = {name: shell_cli(script.format(url=url)) for name, url in
            (('here', ''), ('there', f'--url http://127.0.0.1:{hall.port}'))}  # fmt: skip
    with open(directory / config.FILE, 'a') as file:
        file.write('[agent_clis]\n' + ''.join(f'{name} = {json.dumps(line)}\n' for name, line in clis.items()))
    for name in clis:
        place.do('agent.spawn', name=name, cli=name)
        task_id = place.do('task.assign', agent=name, task='x')['task_id']
        assert until(partial(ended, place, task_id), LONG) == 'completed'  # once the script has run its three commands
        agent_id = place.do('agent.get', agent=name)['id']
        log = place.log(name)
        assert "agent.kill needs the scope agent.manage; '" in log
        assert f"Agent '{name}' can't speak for 'b'" in log
        assert token(place, name) not in log
        message = place.do('agent.inbox', agent='conductor')['messages'][-1]
        assert (message['from'], message['summary']) == (agent_id, 'yes')
        assert message.get('verified') == (True if name == 'there' else None)
    place.close()


def test_the_token_key_of_a_town_is_made_once_and_only_its_owner_may_read_it(directory: Path) -> None:
    make_town(directory)
    key = agent_tokens.key_of(directory)
    assert agent_tokens.key_of(directory) == key
    file = directory / '.tt' / 'token-key'
    assert file.stat().st_mode & 0o777 == 0o600
    agent_tokens.issue(directory, CONDUCTOR_ID, CONDUCTOR_ID)
    shown = TownDir(directory).token(CONDUCTOR_ID).read_text().strip()
    assert agent_tokens.read_token(key, shown) == (CONDUCTOR_ID, CONDUCTOR_ID)
    with pytest.raises(Unauthorized):
        agent_tokens.read_token(key + b'0', shown)


def test_a_token_of_the_conductor_is_refused_even_with_a_right_mac(town: Place) -> None:
    nobody = Call(town.town, OPERATOR)
    with pytest.raises(Unauthorized):
        town.store.run(agent_tokens.principal(nobody, CONDUCTOR_ID, ''))
    with pytest.raises(TownError):
        town.store.run(look_up(nobody, CONDUCTOR_ID))


def test_a_role_adds_scopes_to_those_of_every_agent(directory: Path) -> None:
    (directory / config.FILE).write_text(
        'name = "x"\n[agent.role_scopes]\nlead = ["agent.manage"]\ndefault = ["admin"]'
    )
    found = config.load(directory)
    assert agent_tokens.scopes_of(found, 'worker') == {'town.read', 'town.write'}
    assert agent_tokens.scopes_of(found, 'lead') == {'town.read', 'town.write', 'agent.manage'}
    assert agent_tokens.scopes_of(found, None) == {'town.read', 'town.write', 'admin'}
