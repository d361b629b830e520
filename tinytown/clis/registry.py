"""The coding CLIs that an agent can run: their command lines, how they get the prompt, and their environment.

A CLI reads its prompt from standard input. If its command contains `{prompt_file}`, it reads the prompt from a file
instead. The prompt is never in argv, which every user of the machine can read.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from .. import trust
from ..errors import Invalid
from ..settings import Config

PROMPT_FILE: Final = '{prompt_file}'


@dataclass(frozen=True, slots=True)
class Cli:
    """One coding CLI.

    `install` says how to install it. `output` is the format of what it prints, one of `readers.FORMATS`. `keys` names
    the variables with its secrets, `reads` further variables that it gets; a name that ends in * stands for all that
    begin so. `sets` are variables of every run. `calls_tt` is False if it runs no commands, so that its prompt does not
    ask for any.
    """

    name: str
    argv: tuple[str, ...]
    install: str
    output: str = 'text'
    keys: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    sets: tuple[tuple[str, str], ...] = ()
    calls_tt: bool = True

    @property
    def takes_file(self) -> bool:
        """Whether the CLI reads its prompt from a file and not from standard input."""
        return any(PROMPT_FILE in part for part in self.argv)

    def command(self, prompt_file: Path) -> list[str]:
        """The argv of one run."""
        return [part.replace(PROMPT_FILE, str(prompt_file)) for part in self.argv]

    def takes(self, variable: str) -> bool:
        """Whether a run gets this variable of the worker's environment."""
        return variable in self.keys or _matches(variable, self.reads)


def _matches(variable: str, patterns: Iterable[str]) -> bool:
    return any(
        variable.startswith(pattern[:-1]) if pattern.endswith('*') else variable == pattern for pattern in patterns
    )


_CODEX: Final = Cli(
    'codex',
    (
        *('codex', 'exec', '--json', '--dangerously-bypass-approvals-and-sandbox', '--skip-git-repo-check'),
        *('-c', 'allow_login_shell=false', '-'),  # a login shell would set another PATH, and not find `tt`
    ),
    'npm install -g @openai/codex',
    'codex',
    keys=('OPENAI_API_KEY', 'CODEX_API_KEY', 'AZURE_OPENAI_API_KEY'),
    reads=('OPENAI_*', 'CODEX_*', 'AZURE_OPENAI_*'),
)

# As of November 2026: claude 2.1, codex 0.171, gemini 0.61, copilot 1.0, opencode 1.18, aider 0.86.
_BUILT_IN: Final = (
    Cli(
        'claude',
        ('claude', '--print', '--output-format', 'stream-json', '--verbose', '--dangerously-skip-permissions'),
        'npm install -g @anthropic-ai/claude-code',
        'claude',
        keys=(
            *('ANTHROPIC_API_KEY', 'ANTHROPIC_AUTH_TOKEN', 'CLAUDE_CODE_OAUTH_TOKEN', 'ANTHROPIC_FOUNDRY_API_KEY'),
            *('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN', 'AWS_BEARER_TOKEN_BEDROCK'),
        ),
        reads=(
            *('ANTHROPIC_*', 'CLAUDE_*', 'CLOUD_ML_REGION', 'VERTEX_REGION_*', 'GOOGLE_CLOUD_PROJECT'),
            *('AWS_REGION', 'AWS_DEFAULT_REGION', 'AWS_PROFILE', 'AWS_CONFIG_FILE', 'AWS_SHARED_CREDENTIALS_FILE'),
            *('AWS_CA_BUNDLE', 'AWS_ENDPOINT_URL*'),
            *('GOOGLE_APPLICATION_CREDENTIALS', 'IS_SANDBOX', 'API_TIMEOUT_MS', 'BASH_*', 'MCP_*', 'DISABLE_*'),
            *('MAX_THINKING_TOKENS', 'MAX_MCP_OUTPUT_TOKENS', 'USE_BUILTIN_RIPGREP'),
        ),
        sets=(('CLAUDE_CODE_MAX_RETRIES', '3'),),  # by itself it retries for minutes and says nothing
    ),
    Cli(
        'auggie',
        ('auggie', '--print', '--quiet', '--instruction-file', PROMPT_FILE),
        'npm install -g @augmentcode/auggie',
        'model',
        keys=('AUGMENT_SESSION_AUTH', 'AUGMENT_API_TOKEN'),
        reads=('AUGMENT_*',),
    ),
    _CODEX,
    replace(_CODEX, name='codex-mini', argv=(*_CODEX.argv[:-1], '-m', 'gpt-5.4-mini', '-')),
    Cli(
        'aider',
        (
            *('aider', '--yes-always', '--no-auto-commits', '--no-check-update', '--no-gitignore', '--no-pretty'),
            *('--no-stream', '--no-show-release-notes', '--no-show-model-warnings', '--no-analytics'),
            *('--no-suggest-shell-commands', '--no-detect-urls', '--message-file', PROMPT_FILE),
        ),
        'python -m pip install aider-chat',
        'aider',
        keys=(
            *('OPENAI_API_KEY', 'ANTHROPIC_API_KEY', 'GEMINI_API_KEY', 'DEEPSEEK_API_KEY', 'OPENROUTER_API_KEY'),
            *('AZURE_API_KEY', 'GROQ_API_KEY', 'XAI_API_KEY', 'MISTRAL_API_KEY'),
        ),
        reads=('AIDER_*', 'OPENAI_*', 'ANTHROPIC_*', 'AZURE_*', 'OLLAMA_*', 'LM_STUDIO_*', 'LITELLM_*'),
        calls_tt=False,
    ),
    Cli(
        'gemini',
        ('gemini', '--approval-mode=yolo', '--skip-trust', '--output-format', 'stream-json'),
        'npm install -g @google/gemini-cli',
        'gemini',
        keys=('GEMINI_API_KEY', 'GOOGLE_API_KEY'),
        reads=('GEMINI_*', 'GOOGLE_*', 'CLOUD_SHELL'),
    ),
    Cli(
        'copilot',
        ('copilot', '--output-format', 'json', '--allow-all-tools', '--no-ask-user'),
        'npm install -g @github/copilot',
        'copilot',
        keys=('COPILOT_GITHUB_TOKEN', 'GH_TOKEN', 'GITHUB_TOKEN', 'COPILOT_PROVIDER_API_KEY'),
        reads=('COPILOT_*', 'GH_HOST'),
    ),
    Cli(
        'opencode',
        ('opencode', 'run', '--auto', '--format', 'json'),
        'npm install -g opencode-ai',
        'opencode',
        keys=(
            *('OPENCODE_API_KEY', 'ANTHROPIC_API_KEY', 'OPENAI_API_KEY', 'GEMINI_API_KEY', 'OPENROUTER_API_KEY'),
            *('GROQ_API_KEY', 'XAI_API_KEY', 'DEEPSEEK_API_KEY'),
        ),
        reads=('OPENCODE_*',),
    ),
    Cli(
        'cursor',
        ('cursor-agent', '-p', '--force', '--trust'),
        'see cursor.com/cli',
        'model',
        keys=('CURSOR_API_KEY',),
        reads=('CURSOR_*',),
    ),
    Cli('demo', (sys.executable, '-I', str(Path(__file__).with_name('demo_cli.py'))), 'it is part of Tinytown'),
)


def _own(name: str, command: str) -> Cli:
    """A CLI under [agent_clis]. If it runs the program of a built-in one, it is read and supplied like that one."""
    argv = tuple(shlex.split(command))
    twin = next((cli for cli in _BUILT_IN[:-1] if argv and Path(argv[0]).name == cli.argv[0]), None)
    install = 'it is set under [agent_clis]'
    if twin is None:
        return Cli(name, argv, install, keys=_ALL_KEYS)
    prints_json = twin.output in ('aider', 'model') or set(_json_flags(twin)) <= set(argv)
    return replace(twin, name=name, argv=argv, install=install, output=twin.output if prints_json else 'model')


def _json_flags(cli: Cli) -> list[str]:
    """The words of a command that choose its format."""
    return [word for word in cli.argv if 'json' in word]


_ALL_KEYS: Final = tuple(sorted({key for cli in _BUILT_IN for key in cli.keys}))


def known_clis(config: Config) -> dict[str, Cli]:
    """The CLIs of a town by name. One under [agent_clis] replaces a built-in one of the same name."""
    own = {name: _own(name, command) for name, command in config.agent_clis.items()}
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
    """The variables that hold secrets: the keys of the built-in CLIs, and those in `agent.secret_env`."""
    return frozenset({*_ALL_KEYS, *config.agent.secret_env})


def worker_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """The part of `environ` that a worker gets: what any CLI may need, because its agent's CLI may change."""
    clis = known_clis(config).values()
    return {
        name: value
        for name, value in environ.items()
        if _is_shared(config, name) or any(cli.takes(name) for cli in clis)
    }


def run_environment(config: Config, cli: Cli, environ: Mapping[str, str]) -> dict[str, str]:
    """The part of a worker's environment that a run of `cli` gets: no other provider's keys and settings."""
    passed = {name: value for name, value in environ.items() if _is_shared(config, name) or cli.takes(name)}
    return dict(cli.sets) | passed


def _is_shared(config: Config, name: str) -> bool:
    return (
        name in _PASSED
        or name.startswith(_PREFIXES)
        or name in config.agent.pass_env
        or name in config.agent.secret_env
    )
