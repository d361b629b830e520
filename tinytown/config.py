"""Reads a town's configuration, checks it, and writes the text of a new file. Start reading at `load`.

Precedence: flag, environment, the town's `tinytown.toml`, `~/.tt/config.toml`, default. `settings.Config` declares
every setting as one field. The environment variable of a setting is TINYTOWN_ and its path in upper case: for
`townhall.rest_port`, TINYTOWN_TOWNHALL_REST_PORT. `name` and `agent_clis` have none. Coding CLIs from both files are
merged.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

from . import api_key_table, trust
from .errors import UsageError
from .model import Scope
from .settings import CLI_NAME_PATTERN, Config, Section
from .toml_edit import to_toml

SectionT = TypeVar('SectionT', bound=Section)

FILE: Final = trust.FILE
USER_FILE: Final = trust.USER_FILE
ALIASES: Final = {
    'townhall.tls.cert_file': 'townhall.tls.cert_path',
    'townhall.tls.key_file': 'townhall.tls.key_path',
    'townhall.mtls.ca_file': 'townhall.mtls.ca_path',
}  # older spellings, still accepted in files
KEYS: Final = 'townhall.auth.keys'
SECRETS: Final = frozenset({KEYS, 'townhall.auth.api_key_hash'})  # never shown, never passed to workers
ENABLING_TABLES: Final = frozenset({'townhall.rate_limit'})  # an empty table in the file already enables them


@dataclass(frozen=True)
class Setting:
    """One setting: its path, type, default, description and bounds."""

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
        """The value, if it is valid. Raises UsageError that names `source`, the value and the fix."""
        wrong = self._violation(value)
        if wrong:
            is_hidden = isinstance(value, dict) or self.path in SECRETS or self.path == 'redis.url'
            shown = '' if is_hidden else f' = {value!r}'
            raise UsageError(f'{source}: {self.path}{shown}: {wrong}')
        return [api_key_table.with_text_time(key) for key in value] if self.path == KEYS else value

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
                return 'give text in quotes'
            if not value.isprintable():
                return 'give text of printable characters only'
            return '' if not self.pattern or re.fullmatch(self.pattern, value) else f'it must match {self.pattern}'
        if kind == list[Scope]:
            return api_key_table.scopes_violation(value)
        if self.path == KEYS:
            return api_key_table.violation(value)
        if get_origin(kind) is list:
            return self._item_violation(value)
        if kind == dict[str, list[Scope]]:
            return _subjects_violation(value)
        if not isinstance(value, dict):
            return 'give a table of name = "command --flag"'
        bad = next((name for name, command in value.items() if not _is_command(name, command)), None)
        return '' if bad is None else f'{bad}: give a table of name = "command --flag"'

    def _item_violation(self, value: Any) -> str:
        item_type = get_args(self.kind)[0]
        if not isinstance(value, list) or any(type(item) is not item_type for item in value):
            return f'give a list of {"whole numbers" if item_type is int else "texts"}'
        if item_type is str:
            bad = next((item for item in value if self.pattern and not re.fullmatch(self.pattern, item)), None)
            return '' if bad is None else f'{bad!r} must match {self.pattern}'
        low, high = self.low or 0, self.high or 0
        is_valid = all(low <= item <= high for item in value)
        return '' if is_valid else f'give numbers from {low} to {high}'

    def read(self, text: str, source: str) -> Any:
        """The value in the text of a flag or environment variable. Raises UsageError if it is not valid."""
        value: Any = text
        if get_origin(self.kind) is dict:
            raise UsageError(f'{source}: {self.path} is a table; write [{self.path}] and its entries into {FILE}')
        if self.kind is int and re.fullmatch(r'-?\d{1,18}', text.strip()):
            value = int(text)
        elif self.kind is bool:
            value = {'true': True, '1': True, 'false': False, '0': False}.get(text.strip().lower(), text)
        elif get_origin(self.kind) is list:
            value = [part.strip() for part in text.split(',') if part.strip()]
            if get_args(self.kind)[0] is int and all(part.isdecimal() for part in value):
                value = [int(part) for part in value]
        return self.check(value, source)


def _subjects_violation(value: Any) -> str:
    is_valid = (
        isinstance(value, dict)
        and '' not in value
        and not any(api_key_table.scopes_violation(scopes) for scopes in value.values())
    )
    return '' if is_valid else f'give a table of "name" = [scopes]; scopes are {", ".join(get_args(Scope))}'


def _is_command(name: str, command: Any) -> bool:
    """Whether this is a valid entry of [agent_clis]."""
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # an unclosed quote
        words = []
    return bool(words) and re.fullmatch(CLI_NAME_PATTERN, name) is not None


@lru_cache(maxsize=1)
def settings() -> dict[str, Setting]:
    """Every setting by its path."""
    return {setting.path: setting for setting in _walk(Config, '')}


def _walk(section: type[Section], prefix: str) -> Iterator[Setting]:
    for name, kind in section.kinds.items():
        if name in section.tables:
            yield from _walk(section.tables[name], f'{prefix}{name}.')
        elif name in section.specs:
            spec = section.specs[name]
            yield Setting(prefix + name, kind, spec.make(), *spec[1:])


def find_setting(path: str, source: str) -> Setting:
    """The setting with this path. Raises UsageError that suggests the nearest known name."""
    known = settings()
    if path in known:
        return known[path]
    leaf = [name for name in known if name.rsplit('.', 1)[-1] == path.rsplit('.', 1)[-1]]
    raise UsageError(f'{source}: {path} is not a setting{_nearest(path, known, leaf)}')


def _nearest(path: str, known: Iterable[str], fallback: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(path, known, 1, 0.5) or fallback
    return f'; did you mean {near[0]}?' if near else '; `tt config` lists all settings'


@lru_cache(maxsize=1)
def sections() -> frozenset[str]:
    """The paths of all tables that hold settings."""
    return frozenset(
        '.'.join(parts[:i]) for path in settings() for parts in [path.split('.')] for i in range(1, len(parts))
    )


# ----------------------------------------------------------------------------------------------------------- loading

EXPECTED: Final = 'TINYTOWN_CREDENTIALS'  # the credentials that must be there: systemd omits what it can't read
_VARIABLE: Final = re.compile(r'[A-Z][A-Z0-9_]*')


def take_credentials(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets environment variables from files in $CREDENTIALS_DIRECTORY that have their name (TINYTOWN_REDIS_URL, say).

    This keeps secrets out of systemd units (LoadCredential=) and out of a container's environment. A variable that is
    already set wins. Raises UsageError if an expected credential is missing or a file can't be read.
    """
    directory = environ.get('CREDENTIALS_DIRECTORY')
    for name in environ.get(EXPECTED, '').split():
        if not directory or not Path(directory, name).exists():
            raise UsageError(f'credential {name} is missing; check the file that LoadCredential= of the unit names')
    for file in sorted(Path(directory).iterdir()) if directory else []:
        if _VARIABLE.fullmatch(file.name) and file.name not in environ:
            try:
                environ[file.name] = file.read_text().strip()
            except (OSError, ValueError) as e:
                raise UsageError(f'credential {file}: {e}; it must be a text file that this user may read') from None


def load(
    root: Path,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    uid: int | None = None,
) -> Config:
    """The configuration of the town in `root`. `flags` maps paths of settings to values.

    Raises UsageError if it is invalid, or if user `uid` (default: the caller) must not believe it (see `trust`).
    """
    environ = os.environ if environ is None else environ
    uid = os.geteuid() if uid is None else uid
    trust.check_town(root, uid, environ)
    values: dict[str, Any] = {}
    home = environ.get('HOME')
    for file in _files(root, Path(home) if home else None):
        if file.exists():
            is_users = file != root / FILE
            if is_users:
                trust.check_user_file(file, uid)
            found = read_settings(file, is_users)
            clis = {**values.get('agent_clis', {}), **found.get('agent_clis', {})}
            values |= found | ({'agent_clis': clis} if clis else {})
    for setting in settings().values():
        if setting.env in environ and setting.path not in ('name', 'agent_clis'):
            values[setting.path] = setting.read(environ[setting.env], setting.env)
    for path, value in (flags or {}).items():
        if value is not None:
            values[path] = find_setting(path, 'flag').check(value, 'flag')
    if not values.get('name'):
        raise UsageError(f'{root / FILE}: name is missing; add  name = "my-town"')
    return from_values(values, root)


def sources(root: Path, flags: Mapping[str, Any]) -> list[str]:
    """The names of the files, environment variables and flags that `load` takes settings from."""
    files = [file for file in _files(root, home()) if file.exists()]
    named = [setting.env for setting in settings().values() if setting.env in os.environ]
    given = [f'a flag ({path})' for path, value in flags.items() if value is not None]
    return [*map(str, files), *named, *given]


def _files(root: Path, user_home: Path | None) -> list[Path]:
    return [*([user_home / USER_FILE] if user_home else []), root / FILE]


def from_values(values: Mapping[str, Any], root: Path) -> Config:
    """The configuration with these values, by path, and defaults for the rest. The values are checked already."""
    enabled = {
        f'{table}.enabled': True
        for table in ('townhall.tls', 'townhall.mtls', 'townhall.rate_limit')
        if any(path.startswith(table + '.') for path in values)  # configuring a table enables it
    }
    return _build(Config, '', enabled | dict(values)).but(file=root / FILE)


def to_values(config: Config) -> dict[str, Any]:
    """The settings by path, without secrets, for another process of the town; it rebuilds them with `from_values`."""
    return {path: get(config, path) for path in settings().keys() - SECRETS}


def read_settings(file: Path, is_users: bool = False) -> dict[str, Any]:
    """The settings in a file, by path. Raises UsageError if it can't be read, or if every user may write to it.

    `is_users` means the `~/.tt/config.toml` of a user, in which `trusted_towns` is allowed.
    """
    try:
        if file.stat().st_mode & stat.S_IWOTH:
            raise UsageError(f'{file} can be changed by every user of this machine; run  chmod o-w {file}')
        return parse(file.read_bytes(), str(file), is_users)
    except OSError as e:
        raise UsageError(f'{file}: {e.strerror}') from None


def parse(data: bytes, source: str, is_users: bool = False) -> dict[str, Any]:
    """The settings in the text of a file, by path. Raises UsageError that names `source`, the value and the fix."""
    try:
        table = tomllib.loads(data.decode('utf-8-sig'))
        _take_trusted_towns(table, source, is_users)
        return _flatten(table, source)
    except UnicodeDecodeError as e:
        raise UsageError(f'{source}: it is not UTF-8 (byte {e.start}); save it as UTF-8') from None
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f'{source}: it is not TOML: {e}') from None
    except RecursionError:
        raise UsageError(f'{source}: it is not TOML that can be read: it is nested too deep') from None
    except ValueError as e:  # an integer with too many digits, say
        raise UsageError(f'{source}: it is not TOML that can be read: {e}') from None


def _take_trusted_towns(table: dict[str, Any], source: str, is_users: bool) -> None:
    """Removes `trusted_towns`, which `trust` reads. Raises UsageError unless it stands in a user's own file."""
    if trust.SETTING in table:
        if not is_users:
            raise UsageError(f"{source}: a town can't vouch for itself; move {trust.SETTING} to ~/{USER_FILE}")
        trust.trusted_towns(table.pop(trust.SETTING), f'{source}: {trust.SETTING}')


def _flatten(table: Mapping[str, Any], source: str, prefix: str = '') -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if '.' in key:
            raise UsageError(f'{source}: {prefix}"{key}" is not a setting; remove the quotes if {prefix}{key} is meant')
        path = ALIASES.get(prefix + key, prefix + key)
        if path in found:
            other = next(alias for alias, meant in ALIASES.items() if meant == path)
            raise UsageError(f'{source}: {path} is given twice, once as {other}; remove one')
        if path in sections():
            if not isinstance(value, dict):
                raise UsageError(f'{source}: {path} = {value!r}: it is a table; write [{path}] and its settings below')
            found |= _flatten(value, source, path + '.')
            if path in ENABLING_TABLES and not value:
                found[path + '.enabled'] = True
        elif isinstance(value, dict) and path not in settings():
            raise UsageError(f'{source}: [{path}] is not a table of settings{_nearest(path, sections(), [])}')
        else:
            found[path] = find_setting(path, source).check(value, source)
    return found


def _build(section: type[SectionT], prefix: str, values: Mapping[str, Any]) -> SectionT:
    tables: dict[str, Any] = {name: _build(table, f'{prefix}{name}.', values) for name, table in section.tables.items()}
    return section(**tables, **{name: values[prefix + name] for name in section.specs if prefix + name in values})


def get(config: Config, path: str) -> Any:
    """The value of a setting, by its path."""
    value: Any = config
    for part in path.split('.'):
        value = getattr(value, part)
    return value


# -------------------------------------------------------------------------------------------------- places and names


def home() -> Path | None:
    """The user's home directory. None for a user without one, such as an arbitrary uid in a container."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def derive_name(root: Path) -> str:
    """A name for a town in `root`: the name of the directory, reduced to the characters of town names."""
    name = re.sub(r'[^a-z0-9_-]+', '-', root.resolve().name.lower()).strip('-_')[:63]
    return name or 'town'


# ---------------------------------------------------------------------------------------------------------- writing


def template(name: str, given: Mapping[str, Any]) -> str:
    """The text of a new tinytown.toml: `name`, the given settings, and all others as comments with their defaults."""
    lines = [f'name = {to_toml(name)}']
    section = ''
    for setting in settings().values():
        if setting.path in ('name', 'agent_clis'):
            continue
        table, _, key = setting.path.rpartition('.')
        if table != section:
            section = table
            lines += ['', f'[{table}]' if table not in ENABLING_TABLES else f'# [{table}]']
        mark = '' if setting.path in given else '# '
        value = given.get(setting.path, setting.default)
        lines.append(f'{mark}{key} = {to_toml(value)}'.ljust(40) + f'  # {setting.doc}')
    lines += ['', '[agent_clis]', '# my-cli = "command --flag"', '']
    return '\n'.join(lines)
