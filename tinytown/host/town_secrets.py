"""The secrets of a town, as far as this process knows them: what logs and answers must not show."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from .. import log
from ..clis.registry import key_names
from ..config import FILE, read_settings
from ..redaction import Secrets, masked, passwords
from ..settings import Config
from .town_dir import TownDir

_PATH: Final = re.compile(r'/[\w./:+-]*')


def known_secrets(root: Path, config: Config, environ: Mapping[str, str]) -> Secrets:
    """The secrets of a town that this process knows of.

    The keys of the coding CLIs and what `agent.pass_env` names (paths aside), the passwords of Redis (those in files,
    too) and of proxies, and the tokens of agents with the key that they are made with.
    """
    values = [environ.get(name, '') for name in key_names(config)]
    values = [value for value in values if not _PATH.fullmatch(value)]
    urls = [config.redis.url or '', *(value for name, value in environ.items() if name.lower().endswith('_proxy'))]
    for url in urls:
        values += passwords(url)
    town_dir = TownDir(root)
    for file in (*_password_files(root, config), town_dir.token_key, *town_dir.tokens()):
        with suppress(OSError):
            values.append(file.read_text('utf-8', 'surrogateescape'))
    return Secrets(values)


def ready_log(root: Path, config: Config) -> None:
    """Has this process write its log as a town's settings say, and without its secrets."""
    wanted = config.townhall.log
    log.configure(wanted.format, wanted.level, config.name, known_secrets(root, config, os.environ).hide)


def exposed(root: Path, config: Config) -> list[str]:
    """Of the files that hold a password of Redis those that every user of this machine may read; each with the mend."""
    url = read_settings(root / FILE).get('redis.url', '')
    own = [root / FILE] if masked(url) != url else []
    found = [file for file in (*own, *_password_files(root, config)) if file.stat().st_mode & stat.S_IROTH]
    return [
        f'{file} holds a password that every user of this machine may read; run  chmod o-r {file}' for file in found
    ]


def _password_files(root: Path, config: Config) -> list[Path]:
    """Those that settings name and that can be read without waiting for somebody to write (a named pipe)."""
    given = config.redis.password_file, config.redis.sentinel_password_file
    named = [root / Path(name).expanduser() for name in given if name]
    return [file for file in named if file.is_file()]
