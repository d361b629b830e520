"""The configuration of a town: what may be set, where it comes from, and how one line of the file is changed.

Precedence: flag, environment, the town's `tinytown.toml`, `~/.tt/config.toml`, default. Every setting is one field
below; its environment name is TINYTOWN_ and its path in upper case (`townhall.rest_port`: TINYTOWN_TOWNHALL_REST_PORT).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import stat
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from .errors import UsageError

FILE: Final = 'tinytown.toml'
TOWN_NAME_PATTERN: Final = r'[a-z0-9][a-z0-9_-]{0,62}'


def _set(default: Any, doc: str, low: int | None = None, high: int | None = None, pattern: str = '') -> Any:
    """A setting: its default, what it means (with its unit), and its bounds."""
    metadata = {'doc': doc, 'low': low, 'high': high, 'pattern': pattern}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Redis:
    url: str = _set('', 'redis://, rediss:// or unix:// address of a Redis; without it the town runs its own')
    appendfsync: Literal['always', 'everysec'] = _set('always', 'when the managed Redis writes to disk')


@dataclass(frozen=True)
class Limits:
    connections: int = _set(4096, 'most open connections; a further one is answered 503', 1, 1_000_000)
    body_bytes: int = _set(1_048_576, 'largest request body', 1024, 1 << 30)
    head_secs: int = _set(10, 'time for the head of a request to arrive', 1, 3600)
    body_secs: int = _set(30, 'time for its body', 1, 3600)
    write_secs: int = _set(30, 'time for a client to take its answer', 1, 3600)
    idle_secs: int = _set(75, 'time a connection may wait between requests', 1, 86400)
    drain_secs: int = _set(10, 'time that requests under way get when the server stops', 0, 3600)


@dataclass(frozen=True)
class Auth:
    mode: Literal['none'] = _set('none', 'how callers are known; none: loopback only')


@dataclass(frozen=True)
class Townhall:
    bind: str = _set('127.0.0.1', 'address to listen on')
    rest_port: int = _set(8787, 'port of the REST API', 0, 65535)
    request_timeout_ms: int = _set(
        30_000, 'time after which an operation is answered 503, outcome unknown', 100, 3_600_000
    )
    allowed_hosts: list[str] = _set([], 'names, beside localhost and addresses, under which clients may call')
    access_log: Literal['text', 'json', 'off'] = _set('text', 'one line a request on stderr')
    read_only: bool = _set(False, 'refuse every change')
    auth: Auth = field(default_factory=Auth)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Retention:
    events: int = _set(100_000, 'how many events are kept', 100, 100_000_000)
    log_bytes: int = _set(10_485_760, 'largest log of an agent; then it is rotated once', 65536, 1 << 40)


@dataclass(frozen=True)
class AgentSettings:
    max_rounds: int = _set(0, 'rounds after which a worker stops; 0: no limit', 0, 1_000_000)
    lease_secs: int = _set(60, 'how long a taken task stays with a worker that is not heard of', 6, 86400)
    max_attempts: int = _set(3, 'how often a task is tried', 1, 1000)
    pass_env: list[str] = _set([], 'further environment variables that a coding CLI sees')


@dataclass(frozen=True)
class Config:
    """A town's settings. `agent_clis` maps names to command lines; `file` is where the town's own came from."""

    name: str = _set('', 'name of the town', pattern=TOWN_NAME_PATTERN)
    default_cli: str = _set('claude', 'the coding CLI of agents that name none')
    max_agents: int = _set(10, 'most live agents', 1, 100_000)
    redis: Redis = field(default_factory=Redis)
    townhall: Townhall = field(default_factory=Townhall)
    retention: Retention = field(default_factory=Retention)
    agent: AgentSettings = field(default_factory=AgentSettings)
    agent_clis: dict[str, str] = _set({}, 'coding CLIs of your own: name = "command --flag"')
    file: Path | None = None


# ----------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """One leaf of the configuration: where it stands, its type and bounds."""

    path: str
    kind: Any
    default: Any
    doc: str
    low: int | None
    high: int | None
    pattern: str

    @property
    def env(self) -> str:
        return 'TINYTOWN_' + self.path.upper().replace('.', '_')

    def check(self, value: Any, source: str) -> Any:
        """The value if it is of the right kind. Raises UsageError that names the source, the value and the mend."""
        wrong = self._violation(value)
        if wrong:
            raise UsageError(f'{source}: {self.path} = {value!r}: {wrong}')
        return value

    def _violation(self, value: Any) -> str:
        kind = self.kind
        if get_origin(kind) is Literal:
            return '' if value in get_args(kind) else f'choose one of {", ".join(map(repr, get_args(kind)))}'
        if kind is bool:
            return '' if isinstance(value, bool) else 'give true or false'
        if kind is int:
            if not isinstance(value, int) or isinstance(value, bool):
                return 'give a whole number'
            low, high = self.low, self.high
            return '' if (low is None or low <= value) and (high is None or value <= high) else f'give {low} to {high}'
        if kind is str:
            if not isinstance(value, str):
                return 'give a text in quotes'
            return '' if not self.pattern or re.fullmatch(self.pattern, value) else f'it must match {self.pattern}'
        if get_origin(kind) is list:
            return '' if isinstance(value, list) and all(isinstance(v, str) for v in value) else 'give a list of texts'
        return (
            ''
            if isinstance(value, dict) and all(isinstance(v, str) and v.strip() for v in value.values())
            else 'give a table of name = "command --flag"'
        )

    def read(self, text: str, source: str) -> Any:
        """The value that a text (of a flag or the environment) stands for."""
        value: Any = text
        if self.kind is int and re.fullmatch(r'-?\d{1,18}', text.strip()):
            value = int(text)
        elif self.kind is bool:
            value = {'true': True, '1': True, 'false': False, '0': False}.get(text.strip().lower(), text)
        elif get_origin(self.kind) is list:
            value = [part.strip() for part in text.split(',') if part.strip()]
        return self.check(value, source)


@lru_cache(maxsize=1)
def settings() -> dict[str, Setting]:
    """Every setting by its path."""
    return {setting.path: setting for setting in _walk(Config, '')}


def _walk(section: Any, prefix: str) -> Iterator[Setting]:
    hints = get_type_hints(section)
    for each in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[each.name]):
            yield from _walk(hints[each.name], f'{prefix}{each.name}.')
        elif each.metadata:
            default = each.default if each.default is not dataclasses.MISSING else []
            meta = each.metadata
            yield Setting(
                prefix + each.name, hints[each.name], default, meta['doc'], meta['low'], meta['high'], meta['pattern']
            )


def find_setting(path: str, source: str) -> Setting:
    """The setting of that path. Raises UsageError with the nearest known name."""
    known = settings()
    if path in known:
        return known[path]
    near = difflib.get_close_matches(path, known, 1, 0.5)
    leaf = [name for name in known if name.rsplit('.', 1)[-1] == path.rsplit('.', 1)[-1]]
    hint = f'; did you mean {(near or leaf)[0]}?' if near or leaf else '; `tt config` lists what there is'
    raise UsageError(f'{source}: {path} is not a setting{hint}')


# ----------------------------------------------------------------------------------------------------------- loading


def load(root: Path, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration of the town in `root`. `flags` maps setting paths to values. Raises UsageError."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    home = environ.get('HOME')
    files = ([Path(home) / '.tt' / 'config.toml'] if home else []) + [root / FILE]
    for file in files:
        if file.exists():
            values.update(_flatten(read_file(file), str(file)))
    for setting in settings().values():
        if setting.env in environ and setting.path not in ('name', 'agent_clis'):
            values[setting.path] = setting.read(environ[setting.env], setting.env)
    for path, value in (flags or {}).items():
        if value is not None:
            values[path] = find_setting(path, 'flag').check(value, 'flag')
    if not values.get('name'):
        raise UsageError(f'{root / FILE}: name is missing; add  name = "my-town"')
    return from_values(values, root)


def from_values(values: Mapping[str, Any], root: Path) -> Config:
    """The configuration with these (checked) values, by path, and defaults for the rest."""
    return typing.cast(Config, _build(Config, '', dict(values) | {'file': root / FILE}))


def read_file(file: Path) -> dict[str, Any]:
    """A TOML file. Raises UsageError when it can't be read or is open to be changed by anyone."""
    try:
        if file.stat().st_mode & stat.S_IWOTH:
            raise UsageError(f'{file} may be changed by every user of this machine; run  chmod o-w {file}')
        return tomllib.loads(file.read_text('utf-8'))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UsageError(f'{file}: {e}') from None


def _flatten(table: Mapping[str, Any], source: str, prefix: str = '') -> dict[str, Any]:
    found: dict[str, Any] = {}
    sections = {path.rsplit('.', 1)[0] for path in settings() if '.' in path} | {'townhall'}
    for key, value in table.items():
        path = prefix + key
        if isinstance(value, dict) and path in sections:
            found |= _flatten(value, source, path + '.')
        else:
            found[path] = find_setting(path, source).check(value, source)
    return found


def _build(section: Any, prefix: str, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(section)
    arguments = {}
    for each in dataclasses.fields(section):
        kind = hints[each.name]
        if dataclasses.is_dataclass(kind):
            arguments[each.name] = _build(kind, f'{prefix}{each.name}.', values)
        elif prefix + each.name in values:
            arguments[each.name] = values[prefix + each.name]
    return section(**arguments)


def get(config: Config, path: str) -> Any:
    """The value of a setting, by its path."""
    value: Any = config
    for part in path.split('.'):
        value = getattr(value, part)
    return value


# -------------------------------------------------------------------------------------------------- places and names


def find_root(start: Path) -> Path | None:
    """The nearest directory, from `start` upwards, that holds a town."""
    start = start.resolve()
    return next((each for each in (start, *start.parents) if (each / FILE).is_file()), None)


def derive_name(root: Path) -> str:
    """A name for a town in `root`: that of the directory, in the alphabet of town names."""
    name = re.sub(r'[^a-z0-9_-]+', '-', root.resolve().name.lower()).strip('-_')[:63]
    return name or 'town'


# ---------------------------------------------------------------------------------------------------------- writing


def template(name: str, given: Mapping[str, Any]) -> str:
    """A new tinytown.toml: `name`, what was given, and the rest as comments."""
    lines = [f'name = {to_toml(name)}']
    section = ''
    for setting in settings().values():
        if setting.path in ('name', 'agent_clis'):
            continue
        table, _, key = setting.path.rpartition('.')
        if table != section:
            section = table
            lines += ['', f'[{table}]']
        mark = '' if setting.path in given else '# '
        value = given.get(setting.path, setting.default)
        lines.append(f'{mark}{key} = {to_toml(value)}'.ljust(40) + f'  # {setting.doc}')
    lines += ['', '[agent_clis]', '# my-cli = "command --flag"', '']
    return '\n'.join(lines)


def to_toml(value: Any) -> str:
    """A value as TOML writes it."""
    import tomli_w

    return tomli_w.dumps({'v': value}).removeprefix('v = ').strip().replace('\n', ' ')


def change_line(source: str, path: str, value: Any) -> str:
    """The text of a configuration file with one setting changed or added; every other byte stays as it is."""
    table, _, key = path.rpartition('.')
    line = f'{_key(key)} = {to_toml(value)}'
    lines = source.splitlines(keepends=True)
    newline = '\r\n' if lines and lines[0].endswith('\r\n') else '\n'
    start, end = _table_span(lines, table)
    if start < 0:
        gap = '' if not source else newline if source.endswith('\n') else newline * 2
        return f'{source}{gap}[{table}]{newline}{line}{newline}'
    at = re.compile(rf'[ \t]*(?:{re.escape(key)}|"{re.escape(key)}"|\'{re.escape(key)}\')[ \t]*=')
    for i in range(start, end):
        if at.match(lines[i]):
            last = _value_end(lines, i, end)
            comment = _comment(''.join(lines[i:last]), lines[last])
            lines[i : last + 1] = [line + comment + newline]
            return ''.join(lines)
    while end > start and not lines[end - 1].strip():
        end -= 1
    if end and not lines[end - 1].endswith('\n'):
        lines[end - 1] += newline
    lines.insert(end, line + newline)
    return ''.join(lines)


def _key(key: str) -> str:
    return key if re.fullmatch(r'[A-Za-z0-9_-]+', key) else to_toml(key)


def _table_span(lines: list[str], table: str) -> tuple[int, int]:
    """Where the lines of a table stand, its header left out; (-1, -1) if there is none."""
    start = 0 if not table else -1
    for i, text in enumerate(lines):
        header = re.match(r'[ \t]*\[+[ \t]*([^\]]+?)[ \t]*\]', text)
        if not header:
            continue
        if start >= 0:
            return start, i
        if re.sub(r'\s*\.\s*', '.', header.group(1)).replace('"', '').replace("'", '') == table:
            start = i + 1
    return (start, len(lines)) if start >= 0 else (-1, -1)


def _value_end(lines: list[str], first: int, end: int) -> int:
    """The last line of the value that begins on line `first`: the shortest run of lines that is TOML."""
    for last in range(first, end):
        try:
            tomllib.loads(''.join(lines[first : last + 1]))
        except tomllib.TOMLDecodeError:
            continue
        return last
    return first


def _comment(before: str, line: str) -> str:
    """The comment at the end of the last line of a value, with the space before it."""
    for match in re.finditer(r'[ \t]*#', line):
        try:
            tomllib.loads(before + line[: match.start()])
        except tomllib.TOMLDecodeError:
            continue
        return line[match.start() :].rstrip('\r\n')
    return ''


def write_atomically(file: Path, text: str, mode: int = 0o644) -> None:
    """Replaces a file in one step, so that a reader sees the old or the new text; keeps the mode of an old one."""
    if file.exists():
        mode = stat.S_IMODE(file.stat().st_mode)
    draft = file.with_name(f'.{file.name}.{os.getpid()}')
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, 'w', encoding='utf-8', newline='') as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(draft, file)
