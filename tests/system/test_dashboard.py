"""The dashboard in a real Chromium: what a person sees and does, and what becomes of it in the town."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tinytown.model import MANAGE, READ, WRITE
from tinytown.state.store import Command

from ..auth.test_access import Keyed
from ..ground import enlist, pipeline
from ..support import Hall, Place, free_port, make_town, shell_cli
from . import tools
from .browser import Visit, chromium

HOSTILE = '<img src=x onerror="window.hacked = 1"><b>bold</b> \u202etxet'


@pytest.fixture(scope='module')
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope='module')
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A town whose agents are played by the tests."""
    place = make_town(tmp_path_factory.mktemp('d'), max_agents=1000, agent={'lease_secs': 3600})
    yield place
    place.store.call(Command(None, ('FLUSHALL',)))  # its agents have no processes that could be stopped
    place.close()


@pytest.fixture(scope='module')
def theatre(stage: Place) -> Hall:
    return stage.hall()


@pytest.fixture
def scene(stage: Place, theatre: Hall) -> Place:
    """That town, empty, with its townhall running."""
    assert theatre.process.poll() is None
    opening = stage.store.open((stage.root / '.tt' / 'town-id').read_text().strip())
    pipeline(stage, [Command(None, ('FLUSHALL',)), opening])  # so that townhall sees none but a town
    return stage


def test_an_agent_spawned_elsewhere_appears_and_a_task_assigned_here_is_seen_to_complete(
    browser: Browser, hall: Hall
) -> None:
    with Visit(browser, hall) as visit:
        expect(visit.page.locator('#agents .none')).to_have_text('No agents yet. Spawn one, and give it a task.')
        assert hall.post('/v1/agents', {'name': 'backend', 'cli': 'demo', 'role_id': 'reviewer'}).status == 201
        expect(visit.agent('backend')).to_contain_text('Idle')
        expect(visit.agent('backend')).to_contain_text('demo, reviewer')
        visit.press('New task')
        visit.fill('ask-task', 'Add task', task='write a haiku', agent='backend')
        expect(visit.count('completed')).to_have_text('1')
        expect(visit.page.locator('#work tbody tr')).to_contain_text('demo: done: write a haiku')
        expect(visit.agent('backend')).to_contain_text('demo: done: write a haiku')
        expect(visit.page.locator('#feed')).to_contain_text('task.completed backend')
        assert visit.page.evaluate('performance.getEntriesByType("navigation").length') == 1


def test_an_agent_is_spawned_steered_and_killed_after_a_confirmation(browser: Browser, hall: Hall) -> None:
    with Visit(browser, hall) as visit:
        visit.is_live()
        visit.press('Spawn')
        visit.fill('ask-spawn', 'Spawn', name='no good')
        expect(visit.page.locator('#ask-spawn [role=alert]')).to_contain_text("'no good'")
        expect(visit.page.locator('#ask-spawn [name=name]')).to_have_attribute('aria-invalid', 'true')
        visit.fill('ask-spawn', 'Spawn', name='backend')
        expect(visit.agent('backend')).to_contain_text('Idle')
        visit.press('backend', '#agents')
        visit.press('Pause', '#detail')
        expect(visit.agent('backend')).to_contain_text('Paused')
        visit.press('Resume', '#detail')
        expect(visit.agent('backend')).to_contain_text('Idle')
        visit.press('Kill', '#detail')
        visit.press('Cancel', '#ask-sure')
        assert hall.get('/v1/agents/backend').json['state'] == 'Idle'
        visit.press('Kill', '#detail')
        visit.press('Kill', '#ask-sure')
        expect(visit.agent('backend')).to_contain_text('Stopped')
        assert hall.get('/v1/agents/backend').json['state'] == 'Stopped'
        visit.press('Restart', '#detail')
        expect(visit.agent('backend')).to_contain_text('Idle')


def test_to_restart_an_agent_that_works_asks_for_a_confirmation_too(
    browser: Browser, scene: Place, theatre: Hall
) -> None:
    agent = enlist(scene, 'backend')
    with Visit(browser, theatre) as visit:
        visit.press('backend', '#agents')
        expect(visit.page.locator('#detail').get_by_role('button', name='Restart')).to_be_visible()
        scene.do('task.assign', agent='backend', task='write a haiku')
        agent.take()
        expect(visit.agent('backend')).to_contain_text('Working')
        visit.press('Restart', '#detail')
        expect(visit.page.locator('#ask-sure')).to_contain_text('starts again as another attempt')
        visit.press('Cancel', '#ask-sure')
        assert agent.show()['state'] == 'Working'


def test_the_output_of_an_agent_is_seen_as_it_comes(browser: Browser, place: Place) -> None:
    gate = place.root / 'gate'
    cli = shell_cli(f'echo before the gate; until [ -e {gate} ]; do sleep 0.1; done; echo behind it; sleep 60')
    with (place.root / 'tinytown.toml').open('a') as file:
        file.write(f'[agent_clis]\nslow = {cli!r}\n' if "'" not in cli else f'[agent_clis]\nslow = """{cli}"""\n')
    hall = place.hall()
    hall.post('/v1/agents', {'name': 'slow', 'cli': 'slow'})
    with Visit(browser, hall) as visit:
        visit.press('slow', '#agents')
        visit.press('Assign', '#detail')
        expect(visit.page.locator('#ask-task [name=agent]')).to_have_value('slow')
        visit.fill('ask-task', 'Add task', task='pass the gate')
        output = visit.page.locator('#detail pre')
        expect(output).to_contain_text('before the gate')
        assert 'behind it' not in output.inner_text()
        gate.touch()
        expect(output).to_contain_text('behind it')


def test_the_backlog_is_added_to_claimed_and_cleared(browser: Browser, scene: Place, theatre: Hall) -> None:
    agent = enlist(scene, 'backend')
    with Visit(browser, theatre) as visit:
        visit.is_live()
        for text in ('first', 'second'):
            visit.press('New task')
            visit.fill('ask-task', 'Add task', task=text, tags='ops, slow')
        expect(visit.count('backlog')).to_have_text('2')
        visit.tab('backlog').click()
        rows = visit.page.locator('#work tbody tr')
        expect(rows).to_have_count(2)
        expect(rows.first).to_contain_text('ops, slow')
        rows.first.get_by_role('button', name='Claim').click()
        visit.fill('ask-claim', 'Give', agent='backend')
        expect(rows).to_have_count(1)
        expect(visit.count('assigned')).to_have_text('1')
        rows.first.get_by_role('button', name='Remove').click()
        visit.press('Remove', '#ask-sure')
        expect(visit.page.locator('#work .none')).to_have_text('No tasks here.')
        assert scene.do('task.get', task_id=agent.take()[0])['description'] == 'first'


def test_dead_letters_are_tried_again_or_dropped(browser: Browser, scene: Place, theatre: Hall) -> None:
    agent = enlist(scene, 'backend')
    for text in ('poison', 'venom'):
        agent.die_of(scene.do('task.assign', agent='backend', task=text)['task_id'])
    with Visit(browser, theatre) as visit:
        visit.tab('dead').click()
        rows = visit.page.locator('#work tbody tr')
        expect(rows).to_have_count(2)
        expect(rows.first).to_contain_text('it was poison')
        rows.filter(has_text='poison').first.get_by_role('button', name='Retry').click()
        expect(visit.count('backlog')).to_have_text('1')
        expect(visit.count('dead')).to_have_text('1')
        expect(rows).to_have_count(1)
        rows.first.get_by_role('button', name='Drop').click()
        visit.press('Drop', '#ask-sure')
        expect(visit.count('dead')).to_have_text('0')
        expect(visit.page.locator('#work .none')).to_have_text('Nothing was given up.')


def test_a_task_tells_its_history(browser: Browser, scene: Place, theatre: Hall) -> None:
    agent = enlist(scene, 'backend')
    scene.do('task.assign', agent='backend', task='write a haiku\nin three lines')
    task, attempt = agent.take()
    with Visit(browser, theatre) as visit:
        visit.page.locator('#work tbody').get_by_role('button', name='write a haiku').click()
        detail = visit.page.locator('#detail')
        expect(detail).to_contain_text('in three lines')
        expect(detail.locator('.attempts')).to_contain_text('1: running on backend')
        agent.finish(task, attempt)
        expect(detail.locator('.attempts')).to_contain_text('1: completed on backend')
        words = [step.split()[0] for step in detail.locator('.history li > :nth-child(2)').all_inner_texts()]
        assert words == ['created', 'assigned', 'started', 'completed']
        expect(detail.locator('pre').first).to_have_text('done')
        visit.page.keyboard.press('Escape')
        expect(detail).not_to_be_visible()


def test_messages_are_sent_and_those_to_the_conductor_are_read_and_cleared(
    browser: Browser, scene: Place, theatre: Hall
) -> None:
    enlist(scene, 'backend')
    with Visit(browser, theatre) as visit:
        visit.is_live()
        visit.press('Message')
        visit.page.locator('#ask-message [name=kind]').select_option('info')
        visit.page.locator('#ask-message [name=urgent]').check()
        visit.fill('ask-message', 'Send', to='backend', message='we ship on Friday')
        expect(visit.agent('backend')).to_contain_text('1 urgent')
        visit.press('backend', '#agents')
        expect(visit.page.locator('#detail .letters')).to_contain_text('we ship on Friday')
        scene.do('message.send', to='conductor', message='may I?', from_='backend')
        expect(visit.page.locator('#mail')).to_have_text('1')
        visit.page.keyboard.press('i')
        expect(visit.page.locator('#detail .letters')).to_contain_text('task from backend')
        visit.press('Clear all', '#detail')
        expect(visit.page.locator('#detail')).to_contain_text('The mailbox is empty.')


def test_a_key_is_asked_for_and_leaves_no_trace(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    keyed = Keyed(tmp_path_factory.mktemp('k'))
    try:
        with Visit(browser, keyed.place.hall()) as visit:
            _unlocks(visit, keyed)
    finally:
        keyed.place.close()


def _unlocks(visit: Visit, keyed: Keyed) -> None:
    page, key = visit.page, keyed.keys[READ].key
    visit.fill('ask-key', 'Open', key='tt_wrong')
    expect(page.locator('#ask-key [role=alert]')).to_have_text('the API key is not valid')
    visit.fill('ask-key', 'Open', key=key)
    visit.is_live()
    page.reload()
    visit.is_live()
    visit.press('New task')
    visit.fill('ask-task', 'Add task', task='what only others may add')
    expect(page.locator('#ask-task [role=alert]')).to_contain_text(f'backlog.add needs the scope {WRITE}')
    visit.press('Cancel', '#ask-task')
    expect(page.locator('#limits')).to_have_text(
        f'You lack the scope {WRITE}, so you cannot change tasks or send messages.'
    )
    expect(page.get_by_role('button', name='New task')).not_to_be_visible()
    expect(page.get_by_role('button', name='Spawn')).to_be_visible()
    assert page.evaluate('JSON.stringify([{...localStorage}, document.cookie])') == '[{},""]'
    assert not [url for url in [page.url, *visit.requests] if key in url]
    page.close()
    again = visit.open()
    expect(again.locator('#ask-key')).to_be_visible()
    assert again.evaluate('sessionStorage.getItem("key")') is None


def test_what_agents_and_people_write_stays_text(browser: Browser, hall: Hall) -> None:
    hall.post('/v1/agents', {'name': 'backend', 'cli': 'demo', 'nickname': '<i>it</i>'})
    hall.post('/v1/tasks/assign', {'agent': 'backend', 'task': HOSTILE})
    hall.post('/v1/messages/send', {'to': 'conductor', 'message': HOSTILE})
    hall.post('/v1/backlog', {'description': HOSTILE, 'tags': ['<s>']})
    with Visit(browser, hall) as visit:
        page, shown = visit.page, HOSTILE.replace('\u202e', '\ufffd')
        expect(visit.count('completed')).to_have_text('1')
        expect(visit.agent('backend')).to_contain_text(f'demo: done: {shown}')
        visit.press('backend', '#agents')
        expect(page.locator('#detail pre')).to_contain_text(shown)
        visit.press('Mailbox 1')
        expect(page.locator('#detail .letters')).to_contain_text(shown)
        page.locator('#work').get_by_role('button', name='<img').first.click()
        expect(page.locator('#detail .said')).to_have_text(shown)
        expect(page.locator('#feed')).to_contain_text(shown)
        assert page.evaluate('[document.images.length, typeof hacked]') == [0, 'undefined']
        assert page.locator('main :is(i, s), #rail :is(i, s), main td b').count() == 0


def test_a_lost_connection_is_told_and_what_was_missed_is_seen(browser: Browser, place: Place) -> None:
    hall = place.hall('--port', str(free_port()))  # where it can be opened again
    with Visit(browser, hall) as visit:
        visit.is_live()
        hall.kill()
        expect(visit.page.locator('#link')).to_have_text('Not connected')
        expect(visit.page.locator('#bar')).to_contain_text('Trying again in')
        visit.press('New task')
        visit.fill('ask-task', 'Add task', task='sent into the void')
        expect(visit.page.locator('#ask-task [role=alert]')).to_have_text('The townhall cannot be reached.')
        place.do('backlog.add', description='meanwhile')
        place.hall('--port', str(hall.port))
        visit.is_live()
        expect(visit.page.locator('#bar')).not_to_be_visible()
        expect(visit.page.locator('#work tbody tr')).to_contain_text('meanwhile')
        visit.press('Add task', '#ask-task')
        expect(visit.count('backlog')).to_have_text('2')


@pytest.mark.parametrize('width', [390, 320])
def test_nothing_has_to_be_scrolled_sideways_on_a_phone(
    browser: Browser, scene: Place, theatre: Hall, width: int
) -> None:
    _peopled(scene)
    with Visit(browser, theatre, viewport={'width': width, 'height': 800}, has_touch=True) as visit:
        visit.is_live()
        for tab in ('dead', 'backlog', 'all'):
            visit.tab(tab).click()
            expect(visit.page.locator('#work tbody tr').first).to_be_visible()
            assert not visit.is_too_wide()
        for button in ('New task', 'Message', 'Spawn', 'Help'):
            visit.press(button)
            assert not visit.is_too_wide()
            visit.page.keyboard.press('Escape')
        visit.agent('a' * 63).click()
        expect(visit.page.locator('#detail .letters li').first).to_be_visible()
        assert not visit.is_too_wide()


def _peopled(place: Place) -> None:
    """An agent in most states, and a task in every one, with long words."""
    worker, _ = enlist(place, 'a' * 63), enlist(place, 'frontend')
    worker.die_of(place.do('task.assign', agent=worker.name, task='poison')['task_id'])
    for text in ('done', 'fails', 'runs ' + 'x' * 300, 'waits'):
        place.do('task.assign', agent=worker.name, task=text)
    worker.finish(*worker.take())
    worker.finish(*worker.take(), 'failed')
    worker.take()
    place.do('backlog.add', description='y' * 300, tags=['ops'])
    place.do('task.cancel', task_id=place.do('backlog.add', description='not this')['task_id'])
    place.do('message.send', to=worker.name, message='z' * 300, urgent=True)
    place.do('agent.interrupt', agent='frontend')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1400, 390])
def test_axe_finds_nothing_to_complain_of(
    browser: Browser, scene: Place, theatre: Hall, scheme: Any, width: int
) -> None:
    _peopled(scene)
    axe = (tools.npm('axe-core', '4.14.1') / 'axe.min.js').read_text()
    with Visit(
        browser,
        theatre,
        viewport={'width': width, 'height': 900},
        color_scheme=scheme,
        reduced_motion='reduce',  # colours on their way from one to another are none of the page's
        bypass_csp=True,
    ) as visit:
        visit.is_live()
        visit.page.evaluate(axe)
        expect(visit.page.locator('#work tbody tr').first).to_be_visible()
        assert _complaints(visit.page) == []
        for opened, press in (
            ('#detail', 'frontend'),
            ('#ask-spawn', 'Spawn'),
            ('#ask-message', 'Message'),
            ('#help', 'Help'),
        ):
            visit.press(press)
            expect(visit.page.locator(opened)).to_be_visible()
            assert _complaints(visit.page) == []
            visit.page.keyboard.press('Escape')
        visit.page.locator('#work .link').first.click()
        expect(visit.page.locator('#detail .history li').first).to_be_visible()
        assert _complaints(visit.page) == []


def _complaints(page: Page) -> list[str]:
    found = page.evaluate('axe.run(document)')
    assert 'color-contrast' in {each['id'] for each in found['passes']}
    return [
        f'{each["id"]}: {node["html"]}: {node["failureSummary"]}'
        for each in found['violations']
        for node in each['nodes']
    ]


def test_a_large_town_is_shown_in_part_and_in_whole_if_one_asks(browser: Browser, scene: Place, theatre: Hall) -> None:
    for i in range(100):
        enlist(scene, f'agent-{i}')
    for i in range(1000):
        scene.do('backlog.add', description=f'task {i}')
    with Visit(browser, theatre) as visit:
        rows = visit.page.locator('#agents tbody tr')
        expect(rows).to_have_count(30)
        expect(visit.page.locator('#agents .more')).to_contain_text('70 more')
        expect(visit.page.locator('#work .more')).to_contain_text('975 more')
        visit.press('Show all', '#agents')
        expect(rows).to_have_count(100)
        visit.page.locator('#filter').fill('agent-77 idle')
        expect(rows).to_have_count(1)
        visit.press('Show more', '#work')
        expect(visit.page.locator('#work tbody tr')).to_have_count(125)


def test_many_events_cause_few_requests_and_take_the_focus_from_nobody(
    browser: Browser, scene: Place, theatre: Hall
) -> None:
    enlist(scene, 'backend')
    with Visit(browser, theatre) as visit:
        visit.is_live()
        name = visit.agent('backend').get_by_role('button')
        name.focus()
        visit.requests.clear()
        began = visit.page.evaluate('performance.now()')
        for i in range(200):
            scene.do('task.assign', agent='backend', task=f'task {i}')
        expect(visit.count('assigned')).to_have_text('200')
        took = visit.page.evaluate('performance.now()') - began
        asked = [url for url in visit.requests if '/v1/status' in url]
        assert len(asked) <= took / 250 + 2
        expect(name).to_be_focused()


def test_everything_can_be_done_with_the_keyboard(browser: Browser, scene: Place, theatre: Hall) -> None:
    enlist(scene, 'backend')
    with Visit(browser, theatre, color_scheme='light') as visit:
        page, press = visit.page, visit.page.keyboard.press
        visit.is_live()
        press('?')
        expect(page.locator('#help')).to_contain_text('Open the mailbox')
        press('Escape')
        expect(page.locator('#help')).not_to_be_visible()  # while it is open keys are its own
        press('t')
        expect(page.locator('body')).to_have_css('color-scheme', 'dark')
        page.reload()
        assert page.evaluate('getComputedStyle(document.body).colorScheme') == 'dark'
        visit.is_live()
        visit.tab('all').focus()
        press('ArrowLeft')
        expect(visit.tab('dead')).to_be_focused()
        expect(visit.tab('dead')).to_have_attribute('aria-selected', 'true')
        visit.agent('backend').get_by_role('button').focus()
        press('Enter')
        expect(page.locator('#detail-title')).to_be_focused()
        press('n')
        expect(page.locator('#ask-task textarea')).to_be_focused()
        page.keyboard.type('typed n and s')
        press('Control+Enter')
        expect(visit.count('assigned')).to_have_text('1')
        expect(page.locator('#ask-task')).not_to_be_visible()
        press('Escape')
        expect(visit.agent('backend').get_by_role('button')).to_be_focused()
        press('?')
        page.locator('#use-keys').uncheck()
        press('Escape')
        press('n')
        expect(page.locator('#ask-task')).not_to_be_visible()


def test_spawning_is_hidden_from_who_may_not(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = make_town(tmp_path_factory.mktemp('r'), townhall={'read_only': True})
    try:
        with Visit(browser, place.hall()) as visit:
            visit.is_live()
            visit.press('Spawn')
            visit.fill('ask-spawn', 'Spawn', name='backend')
            expect(visit.page.locator('#limits')).to_contain_text(MANAGE)
            expect(visit.page.locator('#ask-spawn [role=alert]')).to_contain_text(MANAGE)
    finally:
        place.close()
