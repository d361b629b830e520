"""The secrets of a town that this process knows, so that logs and answers don't show them."""

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
    """Collects the secrets of a town.

    These are: the coding CLIs' keys and the variables in `agent.secret_env` (unless a value is a path); the passwords
    of Redis, from its URL and from files, and of proxies; the agents' tokens and the key that signs them.
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


def configure_log(root: Path, config: Config) -> None:
    """Configures this process's log by the town's settings; it hides the town's secrets."""
    settings = config.townhall.log
    log.configure(settings.format, settings.level, config.name, known_secrets(root, config, os.environ).hide)


def exposed(root: Path, config: Config) -> list[str]:
    """A warning for each file with a password of Redis that every user of this machine may read."""
    url = read_settings(root / FILE).get('redis.url', '')
    own = [root / FILE] if masked(url) != url else []
    readable = [file for file in (*own, *_password_files(root, config)) if file.stat().st_mode & stat.S_IROTH]
    return [
        f'{file} holds a password that every user of this machine may read; run  chmod o-r {file}' for file in readable
    ]


def _password_files(root: Path, config: Config) -> list[Path]:
    """The regular files among the password files in the settings. Reading a named pipe would wait for its writer."""
    settings = config.redis.password_file, config.redis.sentinel_password_file
    named = [root / Path(name).expanduser() for name in settings if name]
    return [file for file in named if file.is_file()]
