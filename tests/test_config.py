"""Configuration: sources and precedence, refused values and their messages, changing one line of a file."""

from __future__ import annotations

import re
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tinytown import config
from tinytown.cli.main import main
from tinytown.config import FILE, load, parse, settings, template
from tinytown.errors import UsageError
from tinytown.settings import AgentSettings, Config
from tinytown.toml_edit import change

ENV = 'TINYTOWN_TOWNHALL_REST_PORT'


def town(root: Path, text: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / FILE).write_bytes(text.encode())
    return root


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as raised:
        parse(text.encode(), 'the file')
    assert str(raised.value).startswith('the file')
    return str(raised.value)


# --------------------------------------------------------------------------------------------------- where it is from


def test_a_name_alone_is_a_valid_town(directory: Path) -> None:
    found = load(town(directory, 'name = "alone"'), environ={})
    assert {path: config.get(found, path) for path in settings()} == {
        path: 'alone' if path == 'name' else setting.default for path, setting in settings().items()
    }


@pytest.mark.parametrize(
    ('path', 'default', 'globally', 'locally', 'environment', 'flag'),
    [
        ('townhall.rest_port', 8787, '1', '2', ('3', 3), 4),
        ('townhall.read_only', False, 'true', 'false', ('TRUE', True), False),
        ('townhall.access_log', 'text', '"json"', '"off"', ('json', 'json'), 'text'),
        ('agent.pass_env', [], '["A"]', '["B"]', ('C, D,', ['C', 'D']), ['E']),
        ('default_cli', 'claude', '"codex"', '"demo"', ('gemini', 'gemini'), 'aider'),
        ('townhall.limits.idle_secs', 75, '1', '2', (' 3 ', 3), 4),
    ],
)
def test_a_flag_beats_the_environment_the_towns_file_the_global_file_and_the_default(
    directory: Path, path: str, default: Any, globally: str, locally: str, environment: tuple[str, Any], flag: Any
) -> None:
    root, shared = town(directory / 'town', 'name = "a"'), directory / '.tt' / 'config.toml'
    environ = {'HOME': str(directory)}

    def value(flags: dict[str, Any] | None = None) -> Any:
        return config.get(load(root, flags, environ), path)

    assert value() == default
    shared.parent.mkdir()
    shared.write_text(f'{path} = {globally}\n')
    assert value() == tomllib.loads(f'v = {globally}')['v']
    town(root, f'name = "a"\n{path} = {locally}')
    assert value() == tomllib.loads(f'v = {locally}')['v']
    environ['TINYTOWN_' + path.upper().replace('.', '_')] = environment[0]
    assert value() == environment[1]
    assert value({path: None}) == environment[1]
    assert value({path: flag}) == flag


def test_coding_clis_of_the_global_file_are_added_to_the_towns_own(directory: Path) -> None:
    (directory / '.tt').mkdir()
    (directory / '.tt' / 'config.toml').write_text('[agent_clis]\na = "one"\nb = "two"\n')
    environ = {'HOME': str(directory)}
    town(directory, template('x', {}))
    assert load(directory, environ=environ).agent_clis == {'a': 'one', 'b': 'two'}
    town(directory, template('x', {}) + 'b = "mine"\n')
    assert load(directory, environ=environ).agent_clis == {'a': 'one', 'b': 'mine'}


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('max_agent = 1', 'max_agent is not a setting; did you mean max_agents?'),
        ('rest_port = 1', 'rest_port is not a setting; did you mean townhall.rest_port?'),
        ('townhall.port = 1', 'townhall.port is not a setting; did you mean townhall.'),
        ('[townhal]\nbind = "::1"', '[townhal] is not a table of settings; did you mean townhall?'),
        (
            '[townhall.limit]\nidle_secs = 1',
            '[townhall.limit] is not a table of settings; did you mean townhall.limits?',
        ),
        ('zzzzzz = 1', 'zzzzzz is not a setting; `tt config` lists all settings'),
        ('townhall = 3', 'townhall = 3: it is a table; write [townhall]'),
        ('[[redis]]\nurl = ""', "redis = [{'url': ''}]: it is a table; write [redis]"),
        ('max_agents = "10"', "max_agents = '10': give a whole number"),
        ('max_agents = true', 'max_agents = True: give a whole number'),
        ('max_agents = 0', 'max_agents = 0: give 1 to 100000'),
        ('townhall.rest_port = 65536', 'townhall.rest_port = 65536: give 0 to 65535'),
        ('townhall.read_only = "yes"', "townhall.read_only = 'yes': give true or false"),
        ('redis.appendfsync = "no"', "redis.appendfsync = 'no': choose one of 'always', 'everysec'"),
        ('agent.pass_env = "A"', "agent.pass_env = 'A': give a list of texts"),
        ('agent.pass_env = [1]', 'agent.pass_env = [1]: give a list of texts'),
        ('default_cli = 1', 'default_cli = 1: give text in quotes'),
        ('default_cli = "a\\nb"', "default_cli = 'a\\nb': give text of printable characters only"),
        ('name = "My Town"', "name = 'My Town': it must match [a-z0-9]"),
        ('name = ""', "name = '': it must match"),
        ('agent_clis = "x"', 'give a table of name = "command --flag"'),
        ('agent_clis.x = ""', 'give a table of name'),
        ('agent_clis.x = "a \'b"', 'give a table of name'),
        ('agent_clis."a b" = "x"', 'give a table of name'),
        ('agent_clis.x.y = "z"', 'give a table of name'),
        ('name = ', 'it is not TOML: '),
        ('a = ' + '[' * 3000, 'it is not TOML'),
    ],
)
def test_an_error_message_names_the_setting_the_value_and_the_fix(text: str, says: str) -> None:
    assert says in refusal(text)


def test_a_file_that_is_not_utf_8_is_refused_by_name(directory: Path) -> None:
    (directory / FILE).write_bytes(b'name = "\xff"')
    with pytest.raises(UsageError, match=r'tinytown\.toml: it is not UTF-8 \(byte 8\)'):
        load(directory, environ={})


@pytest.mark.parametrize(
    ('value', 'says'), [('many', 'give a whole number'), ('', 'give a whole'), ('70000', 'give 0 to')]
)
def test_an_invalid_environment_variable_is_refused_by_name(directory: Path, value: str, says: str) -> None:
    with pytest.raises(UsageError, match=f'^{ENV}: townhall.rest_port = .*{says}'):
        load(town(directory, 'name = "a"'), environ={ENV: value})


def test_a_file_that_every_user_can_write_to_is_refused(directory: Path) -> None:
    file = town(directory, 'name = "a"') / FILE
    file.chmod(0o646)
    with pytest.raises(UsageError, match=f'{file} can be changed by every user.*chmod o-w {file}'):
        load(directory, environ={})
    file.chmod(0o644)
    (directory / '.tt').mkdir()
    shared = directory / '.tt' / 'config.toml'
    shared.touch()
    shared.chmod(0o666)
    with pytest.raises(UsageError, match=f'{shared} can be changed'):
        load(directory, environ={'HOME': str(directory)})


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('"townhall.rest_port" = 3', '"townhall.rest_port" is not a setting.* townhall.rest_port'),
        ('[townhall]\n"tls.enabled" = true', 'townhall."tls.enabled" is not a setting.* townhall.tls.enabled'),
    ],
)
def test_a_quoted_name_with_a_dot_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text.encode(), FILE)


def test_a_table_can_not_be_set_from_the_environment(directory: Path) -> None:
    env = {'TINYTOWN_AGENT_ROLE_SCOPES': 'lead=admin'}
    said = r'^TINYTOWN_AGENT_ROLE_SCOPES: agent.role_scopes is a table; write \[agent.role_scopes\] and its entries'
    with pytest.raises(UsageError, match=said):
        load(town(directory, 'name = "a"'), environ=env)


def test_a_town_without_a_name_is_refused(directory: Path) -> None:
    with pytest.raises(UsageError, match='name is missing; add  name = "my-town"'):
        load(town(directory, ''), environ={})


# ------------------------------------------------------------------------------------------------------------- init


def test_init_writes_the_given_settings_and_all_others_as_comments(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = directory / 'new' / 'My Town'
    assert main(['init', '--town', str(root), '--cli', 'demo']) == 0
    assert capsys.readouterr().out == f'Made the town my-town in {root}. Start it:  tt start --town {root}\n'
    text = (root / FILE).read_text()
    assert parse(text.encode(), FILE) == {'name': 'my-town', 'default_cli': 'demo', 'agent_clis': {}}
    assert load(root, environ={}).default_cli == 'demo'
    assert (root / '.tt').stat().st_mode & 0o777 == 0o700
    assert main(['init', '--town', str(root)]) == 2
    monkeypatch.chdir(directory)
    assert main(['init', '--name', 'No Good']) == 2
    assert "--name: name = 'No Good': it must match" in capsys.readouterr().err
    assert main(['init', '--name', '']) == 2
    assert not (directory / FILE).exists()


def test_the_comments_in_a_new_file_show_the_defaults() -> None:
    text = template('x', {})
    lines = [line.removeprefix('# ') for line in text.splitlines() if 'my-cli' not in line]
    values = parse('\n'.join(lines).encode(), 'x')
    assert values == {path: setting.default for path, setting in settings().items()} | {'name': 'x'}


@pytest.mark.parametrize(
    ('directory_name', 'name'),
    [
        ('shop', 'shop'), ('My Town', 'my-town'), ('_x_', 'x'), ('Größe', 'gr-e'), ('a.b', 'a-b'), ('---', 'town'),
        ('日本', 'town'), ('x' * 100, 'x' * 63), ('a_b-1', 'a_b-1'),
    ],
)  # fmt: skip
def test_a_town_is_named_after_its_directory(directory: Path, directory_name: str, name: str) -> None:
    assert config.derive_name(directory / directory_name) == name
    settings()['name'].check(name, 'derived')


# ---------------------------------------------------------------------------------------------------- changing a line

# Valid files that are hard to edit.
AWKWARD = {
    'new': template('a', {}),
    'name alone': 'name = "a"',
    'CRLF': 'name = "a"\r\nmax_agents = 3 # three\r\n\r\n[townhall]\r\nrest_port = 1\r\n',
    'no final newline': '# top\nname = "a"\n[townhall]\nrest_port = 1',
    'tables in another order': '[agent]\nlease_secs = 9\n\n# about the hall\n[townhall]\nbind="::1"\n[agent_clis]\n'
    'x = "y"\n[redis]\n[townhall.limits]\nidle_secs=1\n',
    'tight and wide': 'name="a"\n  max_agents   =   5#five\n\t[ townhall ]  # hall\n\trest_port\t=\t1\t# "port"\n',
    'quoted': '"name" = \'a\'\n\'max_agents\' = 5\n["townhall".\'limits\']\n"idle_secs" = 4\n',
    'dotted': 'name = "a"\ntownhall.rest_port = 5 # hall\ntownhall . limits . idle_secs = 6\nredis.url = ""\n# end',
    'dotted in a table': '[townhall]\nlimits.idle_secs = 6\n# after\n[agent]\n',
    'lines like others': 'name = "a"\ndefault_cli = '
    '"""\\\n   demo\\\n   """ # [townhall]\n# [redis]\n# max_agents = 1\n'
    "[agent_clis]\nx = '''[townhall] \\# rest_port = 7'''\n[townhall]\n"
    'allowed_hosts = [\n  "[redis]", # url = 1\n  "# no",\n  "max_agents = 3", "]"\n] # the end\n',
    'marks': '\ufeffname = "a" # a\u2028b \x85 c\nmax_agents = 3\n',
    'names with dots': '[agent_clis]\n"my.cli" = "x # y"\nmy-cli = "z"\n[redis]\n',
}
CHANGES: list[tuple[tuple[str, ...], Any]] = [
    (('name',), 'other'),
    (('max_agents',), 77),
    (('default_cli',), 'a "quoted" # \\ Größe'),
    (('townhall', 'rest_port'), 9999),
    (('townhall', 'allowed_hosts'), ['a', 'b # c', 'd]']),
    (('townhall', 'read_only'), True),
    (('townhall', 'limits', 'idle_secs'), 88),
    (('townhall', 'limits', 'drain_secs'), 0),
    (('redis', 'url'), 'unix:///x'),
    (('agent', 'max_rounds'), 12),
    (('agent_clis', 'my.cli'), 'run --it "now"'),
    (('agent_clis', 'my-cli'), "run 'it'"),
]


@pytest.mark.parametrize('source', AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize(('path', 'value'), CHANGES, ids=['.'.join(path) for path, _ in CHANGES])
def test_a_changed_setting_leaves_every_other_byte_as_it_is(source: str, path: tuple[str, ...], value: Any) -> None:
    before, changed = parse(source.encode(), 'before'), change(source, path, value)
    after = parse(changed.encode(), 'after')
    if path[0] == 'agent_clis':
        assert after == before | {'agent_clis': before.get('agent_clis', {}) | {path[1]: value}}
    else:
        assert after == before | {'.'.join(path): value}
    assert_only_its_lines_changed(source, changed)
    assert change(changed, path, value) == changed


def assert_only_its_lines_changed(before: str, after: str) -> None:
    """Only one line, or the lines of one value, may change. A trailing comment and all line ends must stay."""
    kept = after.split('\n')
    gone = [line for line in before.split('\n') if line not in kept]
    assert len(gone) <= (1 if '"""' not in before else 6)
    for comment in re.findall(r'#[ \w]*$', '\n'.join(gone), re.M)[-1:]:
        assert comment in after
    if '\r\n' in before:
        assert after.count('\n') == after.count('\r\n')


def test_a_new_setting_is_inserted_where_a_person_would_look_for_it() -> None:
    changed = change(template('a', {}), ('townhall', 'rest_port'), 1).splitlines()
    assert changed[changed.index('rest_port = 1') - 1].startswith('# rest_port = 8787')
    source = 'name = "a"\n\n[agent]\nlease_secs = 9\n\n# the hall\n[townhall]\n'
    assert change(source, ('agent', 'max_rounds'), 1) == source.replace('= 9\n', '= 9\nmax_rounds = 1\n')
    assert change(source, ('max_agents',), 1) == source.replace('"a"\n', '"a"\nmax_agents = 1\n')
    assert change(source, ('redis', 'url'), '') == source + '\n[redis]\nurl = ""\n'


def test_an_inline_table_is_not_edited() -> None:
    with pytest.raises(UsageError, match=r'redis = \{ … \}: this table is written in braces; change it by hand'):
        change('redis = { url = "" }\n', ('redis', 'url'), 'unix:///x')


@pytest.fixture
def tt_config(directory: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    town(directory, '# mine\nname = "a" # name\r\n[agent_clis] # CLIs\nx = "y"')

    def run(*words: str) -> tuple[int, str, str]:
        status = main(['config', '--town', str(directory), *words])
        return status, *capsys.readouterr()

    return run


def test_config_shows_and_changes_settings(directory: Path, tt_config: Any) -> None:
    file = directory / FILE
    assert tt_config('townhall.rest_port') == (0, '8787\n', '')
    assert tt_config('townhall.rest_port', '9000')[0] == 0
    assert tt_config('townhall.rest_port') == (0, '9000\n', '')
    assert tt_config('agent.pass_env', 'A,B')[1] == (f'agent.pass_env = ["A", "B"]  ({file})\n')
    assert tt_config('agent.pass_env', '--json')[1] == '{"agent.pass_env": ["A", "B"]}\n'
    assert tt_config('townhall.read_only', 'true')[0] == 0
    assert tt_config('agent_clis.my.cli', 'run "it now"')[0] == 0
    assert tt_config('agent_clis.my.cli') == (0, 'run "it now"\n', '')
    listed = tt_config()[1].splitlines()
    shown = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in listed}
    assert shown['townhall.read_only'] == 'true'
    assert shown['agent_clis'] == 'x = "y", my.cli = "run \\"it now\\""'
    assert (
        file.read_bytes()
        .decode()
        .startswith('# mine\nname = "a" # name\r\n[agent_clis] # CLIs\nx = "y"\r\n"my.cli" = ')
    )


def test_config_never_shows_the_redis_password_and_makes_its_file_private(directory: Path, tt_config: Any) -> None:
    file = directory / FILE
    assert tt_config('redis.url', 'redis://db:7')[0] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    results = [tt_config('redis.url', 'redis://me:s[cret@db'), tt_config('redis.url'), tt_config(), tt_config('--json')]
    assert [(status, 'redis://me:***@db' in out, 's[cret' in out) for status, out, _ in results] == [
        (0, True, False)
    ] * 4
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load(directory).redis.url == 'redis://me:s[cret@db'


@pytest.mark.parametrize(
    ('words', 'status', 'says'),
    [
        (('redis.url', 'redis ://:x@h'), 2, "redis.url: it can't be read"),
        (('redis.url', 'redis://:x@h:6379/0/1'), 2, 'redis.url: there is too much after the host'),
        (('max_agents', 'many'), 2, "tt config: max_agents = 'many': give a whole number"),
        (('max_agents', '0'), 2, 'give 1 to 100000'),
        (('max_agent', '1'), 2, 'did you mean max_agents?'),
        (('name', 'Not Good'), 2, 'it must match'),
        (('townhall', '1'), 2, 'townhall is not a setting; did you mean townhall.'),
        (('agent_clis', 'x'), 2, 'agent_clis is a table; write [agent_clis] and its entries into tinytown.toml'),
        (('agent_clis.z', ''), 2, 'give a table of name'),
        (('agent_clis.z', "a 'b"), 2, 'give a table of name'),
        (('agent_clis.a b', 'x'), 2, 'give a table of name'),
        (('agent_clis.z',), 1, 'agent_clis.z is not set'),
        (('default_cli', '\udcff'), 2, 'printable'),
    ],
)
def test_config_refuses_a_change_that_could_not_be_loaded(
    directory: Path, tt_config: Any, words: tuple[str, ...], status: int, says: str
) -> None:
    before = (directory / FILE).read_bytes()
    result, out, err = tt_config(*words)
    assert (result, out) == (status, '')
    assert says in err
    assert err.count('\n') == 1
    assert (directory / FILE).read_bytes() == before


def test_a_changed_file_keeps_its_mode_and_stays_a_symbolic_link(directory: Path, tt_config: Any) -> None:
    file, real = directory / FILE, directory / 'dotfiles.toml'
    file.rename(real)
    file.symlink_to(real)
    real.chmod(0o660)
    assert tt_config('max_agents', '5')[0] == 0
    assert file.is_symlink()
    assert 'max_agents = 5' in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o660
    assert not list(directory.glob('.*tinytown*'))


def test_settings_are_immutable_and_can_be_copied_with_changes() -> None:
    one = Config(name='a')
    other = one.but(townhall=one.townhall.but(workers=2))
    assert (other.name, other.townhall.workers, one.townhall.workers) == ('a', 2, 1)
    assert other != one
    assert other.but(townhall=one.townhall) == one
    assert one.agent.retry_backoff_secs is not other.but(agent=AgentSettings()).agent.retry_backoff_secs
    with pytest.raises(AttributeError, match=r'Config\.name is read-only'):
        one.name = 'b'  # type: ignore[misc]
    with pytest.raises(TypeError, match='Config has no nmae'):
        one.but(nmae='b')
