"""Declares every setting of a town as one field: its default, meaning, unit and bounds.

`config.py` reads the values. `tt config`, the file that `tt init` writes and docs/configuration.md show the meanings.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, NoReturn, Self, TypeVar, dataclass_transform

from .model import HOST_PATTERN, Scope

T = TypeVar('T')

TOWN_NAME_PATTERN: Final = r'[a-z0-9][a-z0-9_-]{0,62}'
CLI_NAME_PATTERN: Final = r'[A-Za-z0-9][A-Za-z0-9._-]{0,62}'


class Spec(NamedTuple):
    """One setting: its default, its meaning with the unit, and its bounds."""

    default: Any
    doc: str
    low: int | None
    high: int | None
    pattern: str

    def make(self) -> Any:
        """A copy of the default, safe to change."""
        return type(self.default)(self.default) if isinstance(self.default, (list, dict)) else self.default


def _set(default: Any, doc: str, low: int | None = None, high: int | None = None, pattern: str = '') -> Any:
    return Spec(default, doc, low, high, pattern)


def _table(kind: Callable[[], T]) -> T:
    """A table within this one."""
    return kind  # type: ignore[return-value]  # `Section` creates one for every instance


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Section:
    """An immutable table of settings. Each setting has its default unless it is given.

    This is not a dataclass: the code that `dataclass` generates and compiles for each table took a tenth of the time in
    which `tt` and a worker start. `specs` are the settings of a table, `tables` the tables in it, `kinds` the types of
    both.
    """

    kinds: ClassVar[dict[str, Any]]
    specs: ClassVar[dict[str, Spec]]
    tables: ClassVar[dict[str, type['Section']]]

    def __init_subclass__(cls) -> None:
        cls.kinds = dict(cls.__annotations__)
        own = {name: cls.__dict__[name] for name in cls.kinds}
        cls.specs = {name: value for name, value in own.items() if isinstance(value, Spec)}
        cls.tables = {name: value for name, value in own.items() if isinstance(value, type)}

    def __init__(self, **given: Any) -> None:
        for name in given:
            if name not in self.kinds:
                raise TypeError(f'{type(self).__name__} has no {name}')
        defaults = {name: spec.make() for name, spec in self.specs.items() if name not in given}
        defaults |= {name: table() for name, table in self.tables.items() if name not in given}
        self.__dict__.update(defaults | given)

    def but(self, **given: Any) -> Self:
        """A copy with the given values replaced, as `dataclasses.replace` makes it."""
        return type(self)(**{**self.__dict__, **given})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # lists and tables are among the values

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())})'

    def __setattr__(self, name: str, _value: object) -> NoReturn:
        raise AttributeError(f'{type(self).__name__}.{name} is read-only')


class RedisSettings(Section):
    """The Redis that holds the town's state."""

    url: str = _set('', 'redis://, rediss://, unix://, redis+sentinel://, redis+cluster:// …; empty: a managed Redis')
    password_file: str = _set('', 'file that holds the password for redis.url, if the URL has none')
    tls_ca_path: str = _set('', 'rediss: CA certificates to verify the server with, PEM; empty: those of the system')
    tls_cert_path: str = _set('', 'rediss: client certificate, if the server asks for one, PEM')
    tls_key_path: str = _set('', 'rediss: private key of the client certificate, PEM, not encrypted')
    tls_check_hostname: bool = _set(
        True, "rediss: require that a server's certificate names the host that we connect to"
    )
    sentinel_user: str = _set('', 'redis+sentinel: user name for the sentinels')
    sentinel_password_file: str = _set('', 'redis+sentinel: file that holds the password for the sentinels')
    appendfsync: Literal['always', 'everysec'] = _set(
        'always', 'when the managed Redis writes to disk: before it replies, or every second'
    )


class LimitSettings(Section):
    """Limits of a serving townhall."""

    connections: int = _set(4096, 'maximum number of open connections; further ones are answered 503', 1, 1_000_000)
    streams: int = _set(
        256, 'maximum number of event streams and long polls; further ones are answered 503', 1, 1_000_000
    )
    body_bytes: int = _set(1_048_576, 'maximum size of a request body, in bytes', 1024, 1 << 30)
    head_secs: int = _set(10, 'time for a request head to arrive, in seconds', 1, 3600)
    body_secs: int = _set(30, 'time for a request body to arrive, in seconds', 1, 3600)
    write_secs: int = _set(30, 'time for a client to receive its answer, in seconds', 1, 3600)
    idle_secs: int = _set(75, 'time that a connection may be idle between requests, in seconds', 1, 86400)
    drain_secs: int = _set(10, 'time for running requests to finish when the server stops, in seconds', 0, 3600)


class AuthSettings(Section):
    """Authentication: who may call."""

    mode: Literal['none', 'api_key', 'oidc'] = _set(
        'none', 'how callers authenticate; none: only on loopback or a unix socket'
    )
    local_users: Literal['same', 'any'] = _set(
        'same', 'mode none: which local users may call: the one that runs townhall, or any'
    )
    api_key_hash: str = _set('', 'mode api_key: argon2id hash of a single key (tt generate-api-key makes one)')
    api_key_scopes: list[Scope] = _set(['admin'], 'mode api_key: scopes of the key of api_key_hash')
    keys: list[dict[str, Any]] = _set(
        [], 'mode api_key: keys with id, hash, scopes, expires, note (tt key create adds one)'
    )
    issuer: str = _set('', 'mode oidc: URL of the issuer, exactly as in the `iss` claim of its tokens')
    audience: str = _set('', 'mode oidc: value that the `aud` claim of a token must contain')
    jwks_url: str = _set('', "mode oidc: URL of the issuer's keys; empty: discovered from the issuer")
    required_scopes: list[str] = _set([], 'mode oidc: scopes that every token must have')
    scope_claim: str = _set('', 'mode oidc: claim that holds the scopes (a.b: b within a); empty: scope and scp')
    clock_skew_seconds: int = _set(60, "mode oidc: tolerated difference to the issuer's clock, in seconds", 0, 600)


class TlsSettings(Section):
    """HTTPS."""

    enabled: bool = _set(False, 'serve HTTPS; if not set: true when this table sets anything else')
    cert_path: str = _set('', 'server certificate, followed by its intermediate certificates, PEM')
    key_path: str = _set('', 'private key of the certificate, PEM, not encrypted; not readable by other users')


class MtlsSettings(Section):
    """Client certificates."""

    enabled: bool = _set(False, 'ask clients for certificates; if not set: true when this table sets anything else')
    required: bool = _set(False, 'refuse clients without a certificate')
    ca_path: str = _set('', 'CA certificates to verify client certificates with, PEM')
    crl_path: str = _set('', 'revocation lists, one for each of these CAs, PEM')
    subjects: dict[str, list[Scope]] = _set({}, 'scopes by common name of the client certificate')


class RateLimitSettings(Section):
    """Limits on how often a caller may call."""

    enabled: bool = _set(False, 'limit how often each caller may call; if not set: true when this table exists')
    requests_per_minute: int = _set(600, 'reads per minute and caller', 1, 10_000_000)
    burst_size: int = _set(100, 'requests that may come in one burst', 1, 10_000_000)
    mutating_requests_per_minute: int = _set(
        120, 'changes per minute and caller, counted apart from reads', 1, 10_000_000
    )


class CorsSettings(Section):
    """Web pages of other origins."""

    allowed_origins: list[str] = _set(
        [],
        'origins whose web pages may call, such as "https://town.example"',
        pattern=r'https?://[a-z0-9.-]+(:[0-9]{1,5})?',
    )


class AuditSettings(Section):
    """The audit log of changes and denials."""

    path: str = _set(
        '.tt/audit.jsonl', "audit log of changes, relative to the town's directory; denials go to NAME.denied.jsonl"
    )
    max_bytes: int = _set(67_108_864, 'size in bytes at which either file is rotated to NAME.1', 65536, 1 << 40)
    keep: int = _set(4, 'number of rotated files to keep of either; NAME.1 is the newest', 1, 100)


class MetricsSettings(Section):
    """The endpoints for Prometheus and autoscalers."""

    scope: Literal['', 'town.read', 'town.write', 'agent.manage', 'admin'] = _set(
        '', 'scope that /metrics and /api/scaling require; empty: they need no authentication'
    )


class McpSettings(Section):
    """The tools that MCP offers to models."""

    tools: list[str] = _set([], 'names of the tools to offer, as in tools/list; empty: all')
    read_only: bool = _set(False, 'offer only tools that change nothing')


class LogSettings(Section):
    """The log of a townhall."""

    format: Literal['text', 'json', 'journal'] = _set(
        'text', 'format of the log: text, json (one object per line), or journal (fields of the systemd journal)'
    )
    level: Literal['debug', 'info', 'warning', 'error'] = _set(
        'info', 'lowest level that is logged; requests are info; `townhall --verbose` sets debug for one run'
    )


class TownhallSettings(Section):
    """The control plane."""

    bind: str = _set('127.0.0.1', 'address to listen on, or unix:/path')
    rest_port: int = _set(8787, 'port of the REST API', 0, 65535)
    mcp_port: int = _set(-1, 'port of `townhall mcp-http`; -1: rest_port + 1', -1, 65535)
    workers: int = _set(1, 'number of worker processes; each has its share of the limits', 1, 256)
    request_timeout_ms: int = _set(
        30_000, 'time in ms after which an operation is answered 503, outcome unknown', 100, 3_600_000
    )
    allowed_hosts: list[str] = _set([], 'host names under which clients may call, besides localhost and IP addresses')
    access_log: Literal['text', 'json', 'off'] = _set(
        'text', 'one line per request; text: in the format of townhall.log.format; json: always JSON'
    )
    read_only: bool = _set(False, 'refuse every change')
    log: LogSettings = _table(LogSettings)
    auth: AuthSettings = _table(AuthSettings)
    tls: TlsSettings = _table(TlsSettings)
    mtls: MtlsSettings = _table(MtlsSettings)
    cors: CorsSettings = _table(CorsSettings)
    audit: AuditSettings = _table(AuditSettings)
    rate_limit: RateLimitSettings = _table(RateLimitSettings)
    metrics: MetricsSettings = _table(MetricsSettings)
    mcp: McpSettings = _table(McpSettings)
    limits: LimitSettings = _table(LimitSettings)


class RetentionSettings(Section):
    """How long history is kept."""

    events: int = _set(100_000, 'number of events to keep', 100, 100_000_000)
    finished_tasks_days: int = _set(30, 'time to keep finished tasks and dead letters, in days', 1, 36500)
    log_bytes: int = _set(
        10_485_760, 'size in bytes at which the log of an agent is rotated; one old file is kept', 65536, 1 << 40
    )


class AgentSettings(Section):
    """How agents work."""

    idle_timeout_secs: int = _set(
        300, 'idle time in seconds after which /api/scaling recommends to remove agents', 1, 86400
    )
    max_rounds: int = _set(0, 'number of rounds after which a worker stops; 0: no limit', 0, 1_000_000)
    lease_secs: int = _set(60, 'time in seconds that a worker without heartbeats keeps its task', 6, 86400)
    max_attempts: int = _set(
        3, 'attempts at a task, or deliveries of a message, before it becomes a dead letter', 1, 1000
    )
    retry_backoff_secs: list[int] = _set(
        [1, 5, 25], 'pauses in seconds after each failed attempt of a task, and before each restart', 0, 86400
    )
    restart: Literal['never', 'on-failure'] = _set('never', 'whether to restart an agent whose worker died')
    restart_cap: int = _set(5, 'maximum number of restarts in a row without a completed task in between', 1, 1_000_000)
    role_scopes: dict[str, list[Scope]] = _set(
        {}, 'scopes by role that its agents have in addition to town.read and town.write'
    )
    pass_env: list[str] = _set([], 'additional environment variables to pass to coding CLIs')
    secret_env: list[str] = _set([], 'further ones whose values are secret: logs and results hide them')


class Config(Section):
    """A town's settings. `agent_clis` maps names to command lines. `file` is the town's configuration file."""

    name: str = _set('', 'name of the town', pattern=TOWN_NAME_PATTERN)
    default_cli: str = _set('claude', 'coding CLI of agents that are spawned without one')
    max_agents: int = _set(10, 'maximum number of live agents', 1, 100_000)
    host: str = _set('', 'name of this host among the hosts of the town; empty: the hostname',
                     pattern=f'({HOST_PATTERN})?')  # fmt: skip
    redis: RedisSettings = _table(RedisSettings)
    townhall: TownhallSettings = _table(TownhallSettings)
    retention: RetentionSettings = _table(RetentionSettings)
    agent: AgentSettings = _table(AgentSettings)
    agent_clis: dict[str, str] = _set({}, 'additional coding CLIs: name = "command --flag"')
    file: Path | None = None
