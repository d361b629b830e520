"""What may be set: every setting is one field below, with its default, what it means, its unit and its bounds.

`config.py` reads them; `tt config` and the file that `tt init` writes are made from them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, NoReturn, Self, TypeVar, dataclass_transform

from .model import HOST_PATTERN, Scope

T = TypeVar('T')

TOWN_NAME_PATTERN: Final = r'[a-z0-9][a-z0-9_-]{0,62}'
CLI_NAME_PATTERN: Final = r'[A-Za-z0-9][A-Za-z0-9._-]{0,62}'


class Spec(NamedTuple):
    """One setting: its default, what it means (with its unit), and its bounds."""

    default: Any
    doc: str
    low: int | None
    high: int | None
    pattern: str

    def make(self) -> Any:
        """The default, as a value that its owner may change."""
        return type(self.default)(self.default) if isinstance(self.default, (list, dict)) else self.default


def _set(default: Any, doc: str, low: int | None = None, high: int | None = None, pattern: str = '') -> Any:
    return Spec(default, doc, low, high, pattern)


def _table(kind: Callable[[], T]) -> T:
    """A table below this one."""
    return kind  # type: ignore[return-value]  # `Section` makes one of it for every instance


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Section:
    """A table of settings, which does not change: each has its default unless it is given.

    This is no dataclass, because what that writes and compiles for each table was a tenth of the time that `tt` and a
    worker take to start. `specs` are the settings of a table, `tables` those below it, `kinds` the types of both.
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
        made = {name: spec.make() for name, spec in self.specs.items() if name not in given}
        made |= {name: table() for name, table in self.tables.items() if name not in given}
        self.__dict__.update(made | given)

    def but(self, **given: Any) -> Self:
        """The same with other values for some."""
        return type(self)(**{**self.__dict__, **given})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # lists and tables are among the values

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())})'

    def __setattr__(self, name: str, _value: object) -> NoReturn:
        raise AttributeError(f'{type(self).__name__}.{name} does not change')


class RedisSettings(Section):
    """Where the state of a town is."""

    url: str = _set('', 'redis://, rediss://, unix://, redis+sentinel://, redis+cluster:// …; without it: its own')
    password_file: str = _set('', 'file with the password for redis.url, if that has none')
    tls_ca_path: str = _set('', 'rediss: authorities that sign servers, PEM; without it those of the machine')
    tls_cert_path: str = _set('', 'rediss: our certificate for servers that want one, PEM')
    tls_key_path: str = _set('', 'rediss: its private key, PEM, not encrypted')
    tls_check_hostname: bool = _set(True, "rediss: a server's certificate must name the host that we connect to")
    sentinel_user: str = _set('', 'redis+sentinel: who we are to the sentinels')
    sentinel_password_file: str = _set('', 'redis+sentinel: file with the password for the sentinels')
    appendfsync: Literal['always', 'everysec'] = _set('always', 'when the managed Redis writes to disk')


class LimitSettings(Section):
    """What bounds a townhall that serves."""

    connections: int = _set(4096, 'most open connections; a further one is answered 503', 1, 1_000_000)
    streams: int = _set(
        256, 'most answers that go on (event streams, long polls); a further one is answered 503', 1, 1_000_000
    )
    body_bytes: int = _set(1_048_576, 'largest request body', 1024, 1 << 30)
    head_secs: int = _set(10, 'time for the head of a request to arrive', 1, 3600)
    body_secs: int = _set(30, 'time for its body', 1, 3600)
    write_secs: int = _set(30, 'time for a client to take its answer', 1, 3600)
    idle_secs: int = _set(75, 'time a connection may wait between requests', 1, 86400)
    drain_secs: int = _set(10, 'time that requests under way get when the server stops', 0, 3600)


class AuthSettings(Section):
    """Who may call."""

    mode: Literal['none', 'api_key', 'oidc'] = _set('none', 'how callers are known; none: loopback only')
    local_users: Literal['same', 'any'] = _set('same', 'mode none: which users of this machine may call')
    api_key_hash: str = _set('', 'mode api_key: the argon2id hash of a key (see tt generate-api-key)')
    api_key_scopes: list[Scope] = _set(['admin'], 'what the key of api_key_hash may do')
    keys: list[dict[str, Any]] = _set([], 'mode api_key: keys with id, hash, scopes, expires, note (see tt key create)')
    issuer: str = _set('', 'mode oidc: URL of the issuer, as it stands in `iss` of its tokens')
    audience: str = _set('', 'mode oidc: what must stand in `aud` of a token')
    jwks_url: str = _set('', "mode oidc: URL of the issuer's keys; without it the issuer is asked where they are")
    required_scopes: list[str] = _set([], 'mode oidc: scopes that every token must have')
    scope_claim: str = _set('', 'mode oidc: the claim that holds scopes, a.b for b in a; without it scope and scp')
    clock_skew_seconds: int = _set(60, "mode oidc: how far the issuer's clock and ours may differ", 0, 600)


class TlsSettings(Section):
    """HTTPS."""

    enabled: bool = _set(False, 'serve HTTPS; without this line: if there is another in this table')
    cert_path: str = _set('', "the server's certificate and those between it and a root, PEM")
    key_path: str = _set('', 'its private key, PEM, not encrypted; not readable by other users')


class MtlsSettings(Section):
    """Clients' certificates."""

    enabled: bool = _set(False, 'ask clients for certificates; without this line: if there is another in this table')
    required: bool = _set(False, 'refuse clients without one')
    ca_path: str = _set('', 'certificates of the authorities that sign those of clients, PEM')
    crl_path: str = _set('', 'revocation lists (PEM) of every one of these authorities')
    subjects: dict[str, list[Scope]] = _set({}, 'common names of clients, and the scopes that a certificate gives them')


class RateLimitSettings(Section):
    """How often a caller may call."""

    enabled: bool = _set(False, 'limit how often each caller may call; without this line: if this table is there')
    requests_per_minute: int = _set(600, 'reads of one caller', 1, 10_000_000)
    burst_size: int = _set(100, 'how many may come at once', 1, 10_000_000)
    mutating_requests_per_minute: int = _set(120, 'changes by one caller, counted apart', 1, 10_000_000)


class CorsSettings(Section):
    """Pages of other origins."""

    allowed_origins: list[str] = _set(
        [],
        'pages of other origins that may call, as "https://town.example"',
        pattern=r'https?://[a-z0-9.-]+(:[0-9]{1,5})?',
    )


class AuditSettings(Section):
    """The record of changes and refusals."""

    path: str = _set(
        '.tt/audit.jsonl', "file that records every change, from the town's directory; denials: NAME.denied.jsonl"
    )
    max_bytes: int = _set(67_108_864, 'largest size of either; then it is put aside, as NAME.1', 65536, 1 << 40)
    keep: int = _set(4, 'how many that were put aside are kept of either; NAME.1 is the newest', 1, 100)


class MetricsSettings(Section):
    """What Prometheus reads."""

    scope: Literal['', 'town.read', 'town.write', 'agent.manage', 'admin'] = _set(
        '', 'what a caller must have to read /metrics and /api/scaling; empty: nothing'
    )


class McpSettings(Section):
    """What models are offered."""

    tools: list[str] = _set([], 'the only tools that are offered, as in tools/list; empty: all')
    read_only: bool = _set(False, 'offer no tool that changes anything')


class LogSettings(Section):
    """What a townhall says, and how."""

    format: Literal['text', 'json', 'journal'] = _set(
        'text', 'of what is logged: text, one JSON object a line, or (journal) the fields of the journal of systemd'
    )
    level: Literal['debug', 'info', 'warning', 'error'] = _set(
        'info', 'the least that is logged; debug is what `townhall --verbose` logs; requests are info'
    )


class TownhallSettings(Section):
    """The control plane."""

    bind: str = _set('127.0.0.1', 'address to listen on, or unix:/path')
    rest_port: int = _set(8787, 'port of the REST API', 0, 65535)
    mcp_port: int = _set(-1, 'port of `townhall mcp-http`; -1: rest_port + 1', -1, 65535)
    workers: int = _set(1, 'processes that serve, each with its share of the limits', 1, 256)
    request_timeout_ms: int = _set(
        30_000, 'time after which an operation is answered 503, outcome unknown', 100, 3_600_000
    )
    allowed_hosts: list[str] = _set([], 'names, beside localhost and addresses, under which clients may call')
    access_log: Literal['text', 'json', 'off'] = _set(
        'text', 'one line a request; text: as townhall.log.format has it, json: in JSON in any case'
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
    """How long what is past is kept."""

    events: int = _set(100_000, 'how many events are kept', 100, 100_000_000)
    finished_tasks_days: int = _set(30, 'how long finished tasks and dead letters are kept', 1, 36500)
    log_bytes: int = _set(10_485_760, 'largest log of an agent; then it is rotated once', 65536, 1 << 40)


class AgentSettings(Section):
    """How agents work."""

    idle_timeout_secs: int = _set(
        300, 'how long agents without work are idle before /api/scaling calls for none', 1, 86400
    )
    max_rounds: int = _set(0, 'rounds after which a worker stops; 0: no limit', 0, 1_000_000)
    lease_secs: int = _set(60, 'how long a taken task stays with a worker that is not heard of', 6, 86400)
    max_attempts: int = _set(
        3, 'how often a task is tried, or a message delivered, before it is a dead letter', 1, 1000
    )
    retry_backoff_secs: list[int] = _set(
        [1, 5, 25], 'pauses after the attempts of a task, and before restarts', 0, 86400
    )
    restart: Literal['never', 'on-failure'] = _set('never', 'whether an agent whose worker died is started again')
    restart_cap: int = _set(5, 'how often in a row, without a completed task between', 1, 1_000_000)
    role_scopes: dict[str, list[Scope]] = _set({}, 'what agents of a role may do beyond town.read and town.write')
    pass_env: list[str] = _set([], 'further environment variables that a coding CLI sees')


class Config(Section):
    """A town's settings. `agent_clis` maps names to command lines; `file` is where the town's own came from."""

    name: str = _set('', 'name of the town', pattern=TOWN_NAME_PATTERN)
    default_cli: str = _set('claude', 'the coding CLI of agents that name none')
    max_agents: int = _set(10, 'most live agents', 1, 100_000)
    host: str = _set('', 'name of this host among those that share the Redis; empty: what the system says',
                     pattern=f'({HOST_PATTERN})?')  # fmt: skip
    redis: RedisSettings = _table(RedisSettings)
    townhall: TownhallSettings = _table(TownhallSettings)
    retention: RetentionSettings = _table(RetentionSettings)
    agent: AgentSettings = _table(AgentSettings)
    agent_clis: dict[str, str] = _set({}, 'coding CLIs of your own: name = "command --flag"')
    file: Path | None = None
