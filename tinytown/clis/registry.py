"""The coding CLIs that an agent can run: their command lines, how they get the prompt, and their environment.

A CLI reads its prompt from standard input. If its command contains `{prompt_file}`, it reads the prompt from a file
instead. The prompt is never in argv, which every user of the machine can read.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .. import trust
from ..errors import Invalid
from ..settings import Config

PROMPT_FILE: Final = '{prompt_file}'


@dataclass(frozen=True, slots=True)
class Cli:
    """One coding CLI. `install` says how to install it; `keys` names the variables with its API keys."""

    name: str
    argv: tuple[str, ...]
    install: str
    keys: tuple[str, ...] = ()

    @property
    def takes_file(self) -> bool:
        """Whether the CLI reads its prompt from a file and not from standard input."""
        return any(PROMPT_FILE in part for part in self.argv)

    def command(self, prompt_file: Path) -> list[str]:
        """The argv of one run."""
        return [part.replace(PROMPT_FILE, str(prompt_file)) for part in self.argv]


def _cli(name: str, command: str, install: str, *keys: str) -> Cli:
    return Cli(name, tuple(shlex.split(command)), install, keys)


_CODEX: Final = 'codex exec --dangerously-bypass-approvals-and-sandbox --skip-git-repo-check'

# From their documentation as of November 2026.
_BUILT_IN: Final = (
    _cli(
        'claude',
        'claude --print --dangerously-skip-permissions',
        'npm install -g @anthropic-ai/claude-code',
        'ANTHROPIC_API_KEY',
        'CLAUDE_CODE_OAUTH_TOKEN',
    ),
    _cli(
        'auggie',
        'auggie --print --quiet --instruction-file {prompt_file}',
        'npm install -g @augmentcode/auggie',
        'AUGMENT_SESSION_AUTH',
    ),
    _cli('codex', f'{_CODEX} -', 'npm install -g @openai/codex', 'OPENAI_API_KEY', 'CODEX_API_KEY'),
    _cli(
        'codex-mini', f'{_CODEX} -m gpt-5.4-mini -', 'npm install -g @openai/codex', 'OPENAI_API_KEY', 'CODEX_API_KEY'
    ),
    _cli(
        'aider',
        'aider --yes-always --no-auto-commits --no-check-update --message-file {prompt_file}',
        'python -m pip install aider-chat',
        'OPENAI_API_KEY',
        'ANTHROPIC_API_KEY',
        'GEMINI_API_KEY',
        'DEEPSEEK_API_KEY',
        'OPENROUTER_API_KEY',
    ),
    _cli(
        'gemini',
        'gemini --approval-mode=yolo --skip-trust',
        'npm install -g @google/gemini-cli',
        'GEMINI_API_KEY',
        'GOOGLE_API_KEY',
    ),
    _cli(
        'copilot',
        'copilot --silent --allow-all-tools --no-ask-user',
        'npm install -g @github/copilot',
        'COPILOT_GITHUB_TOKEN',
        'GH_TOKEN',
        'GITHUB_TOKEN',
    ),
    _cli('cursor', 'cursor-agent -p --force --trust', 'see cursor.com/cli', 'CURSOR_API_KEY'),
    Cli('demo', (sys.executable, '-I', str(Path(__file__).with_name('demo_cli.py'))), 'it is part of Tinytown'),
)


def known_clis(config: Config) -> dict[str, Cli]:
    """The CLIs of a town by name. One under [agent_clis] replaces a built-in one of the same name."""
    own = {name: _cli(name, command, 'it is set under [agent_clis]') for name, command in config.agent_clis.items()}
    return {cli.name: cli for cli in _BUILT_IN} | own


def find_cli(config: Config, name: str | None) -> Cli:
    """Finds the CLI of that name, or the town's default one for None.

    Raises Invalid if the town has no such CLI or its program is not installed; the message says what to do.
    """
    import shutil  # late: it imports every compression module

    wanted = name or config.default_cli
    clis = known_clis(config)
    quoted = f"'{wanted}' (default_cli of the town)" if name is None else f"'{wanted}'"
    if wanted not in clis:
        raise _invalid(
            f'{quoted} is not a coding CLI of this town; known: {", ".join(clis)}. Add it under [agent_clis]'
        )
    cli = clis[wanted]
    if shutil.which(_resolve(config, cli.argv[0])) is None:
        raise _invalid(f"{quoted}: the program '{cli.argv[0]}' is not installed here. Install it: {cli.install}")
    return cli


def _resolve(config: Config, program: str) -> str:
    """Resolves a relative path against the town's root, because that is the working directory of a run."""
    return str(config.file.parent / program) if config.file and '/' in program else program


def _invalid(detail: str) -> Invalid:
    return Invalid(detail, code='unknown-cli', errors=[{'pointer': '/cli', 'detail': detail}])


# ---------------------------------------------------------------------------------------------------- environment

_PASSED: Final = frozenset(
    {'PATH', 'HOME', 'USER', 'LOGNAME', 'SHELL', 'LANG', 'TERM', 'TMPDIR', 'TZ', 'SSH_AUTH_SOCK'}
    | {trust.VARIABLE}  # so that `tt` in a run may use the town that its worker may use
    | {'http_proxy', 'https_proxy', 'no_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'NO_PROXY', 'ALL_PROXY'}
    | {'SSL_CERT_FILE', 'SSL_CERT_DIR', 'REQUESTS_CA_BUNDLE', 'CURL_CA_BUNDLE', 'NODE_EXTRA_CA_CERTS', 'GIT_SSL_CAINFO'}
)
_PREFIXES: Final = ('LC_', 'XDG_')


def key_names(config: Config) -> frozenset[str]:
    """The variables that hold secrets: the keys of the built-in CLIs, and those in `agent.pass_env`."""
    return frozenset({key for cli in _BUILT_IN for key in cli.keys} | set(config.agent.pass_env))


def environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """The part of `environ` that a worker and its CLI get: an allow-list, the built-in CLIs' keys, `agent.pass_env`."""
    allowed = _PASSED | key_names(config)
    return {name: value for name, value in environ.items() if name in allowed or name.startswith(_PREFIXES)}
