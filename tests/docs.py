"""`make docs`: writes those parts of the documents that are generated from the code.

A part begins with `<!-- made: NAME -->` and ends with `<!-- end -->`. The functions in PARTS generate them.
`tests/test_docs.py` checks that the files are up to date.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from tinytown import config, errors
from tinytown.cli import main as cli
from tinytown.core.operations import OPERATIONS, Op
from tinytown.core.stats import Stats
from tinytown.mcp import catalog, content
from tinytown.model import TASK_BOUNDS
from tinytown.rest import health, openapi
from tinytown.rest.metrics import HTTP_BOUNDS, Meter, render_metrics
from tinytown.schema import Parameter
from tinytown.toml_edit import to_toml
from tinytown.townhall import main as townhall
from tinytown.townhall import process, systemd

REPOSITORY: Final = Path(__file__).parents[1]
PART: Final = re.compile(r'(<!-- made: (\w+) -->\n).*?(<!-- end -->)', re.S)
SHARED: Final = frozenset({'help', 'town', 'json', 'url', 'api_key_file', 'verbose'})  # options of every command


def pages() -> list[Path]:
    named = [REPOSITORY / name for name in ('README.md', 'ARCHITECTURE.md')]
    return [*named, *sorted((REPOSITORY / 'docs').glob('*.md'))]


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table. `head` is its column titles, separated by |."""
    titles = head.split('|')
    lines = [f'| {" | ".join(map(_cell, line))} |' for line in (titles, *rows)]
    return '\n'.join([lines[0], '|---' * len(titles) + '|', *lines[1:]])


def _cell(text: str) -> str:
    return ' '.join(text.replace('|', r'\|').split())


@cache
def event_types() -> frozenset[str]:
    """Every event type in the Redis scripts."""
    scripts = (REPOSITORY / 'tinytown' / 'state' / 'scripts.lua').read_text()
    return frozenset(re.findall(r"'((?:agent|task|message|town)\.[a-z_]+)'", scripts))


def first_sentence(text: str) -> str:
    """The text before the first full stop, colon or semicolon."""
    return re.split(r'(?<=[.;:])\s', ' '.join(text.split()))[0].rstrip('.;:')


# ------------------------------------------------------------------------------------------------- configuration


def settings() -> str:
    """Every setting, by table of the configuration file."""
    parts: dict[str, list[list[str]]] = {}
    for each in config.settings().values():
        section, _, key = each.path.rpartition('.')
        env = '' if each.path in ('name', 'agent_clis') else f'<br>`{each.env}`'
        reload = 'restart' if each.path in process._FIXED else 'reload'
        row = [f'`{key}`{env}', _kind(each), f'`{to_toml(each.default)}`', reload, each.doc]
        parts.setdefault(section, []).append(row)
    head = 'setting|type|default|applied at|meaning'
    titles = {section: f'[{section}]' if section else 'At the top of the file' for section in parts}
    return '\n\n'.join(f'### {titles[section]}\n\n{table(head, rows)}' for section, rows in parts.items())


def _kind(setting: config.Setting) -> str:
    if setting.path == config.KEYS:
        return '`[[townhall.auth.keys]]`: tables'
    words = _word_of(setting.kind)
    if setting.low is not None and setting.high is not None:
        words += f', {setting.low} to {setting.high}'
    return words


def _word_of(kind: Any) -> str:
    plain = {bool: 'true or false', int: 'whole number', str: 'text'}
    if kind in plain:
        return plain[kind]
    of = get_args(kind)
    if get_origin(kind) is Literal:
        return 'one of ' + ', '.join(f'`{to_toml(each)}`' for each in of)
    if get_origin(kind) is list:
        return 'list of scopes' if get_origin(of[0]) is Literal else f'list: {_word_of(of[0])}'
    return f'table: name = {_word_of(of[1])}'


# --------------------------------------------------------------------------------------------------- command lines


def commands() -> str:
    """Every command of `tt`, under the headings of its help."""
    parser = cli.build_parser()
    lines = []
    for line in (parser.description or '').splitlines()[1:]:
        if line.endswith(':') and not line.startswith(' '):
            lines += [f'### {line.rstrip(":")}', '']
        elif words := re.match(r'  (\S+(?: \S+)?)(?:  +|$)', line):
            lines += _command(f'tt {words[1]}', _subparser(parser, words[1]))
    return '\n'.join(lines).rstrip()


def townhall_options() -> str:
    """The command line of `townhall`."""
    parser = townhall.townhall_parser()
    modes = ' | '.join(townhall.MODES)
    return '\n'.join([f'`townhall [{modes}]`', '', *_options(parser, SHARED - {'town', 'verbose'})])


def service_commands() -> str:
    """The commands of `townhall service`. All take --town."""
    parser = systemd.service_parser()
    [group] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    lines = []
    for word, command in group.choices.items():
        lines += _command(f'townhall service {word}', command)
    return '\n'.join(lines).rstrip()


def shared_options() -> str:
    """The options of every `tt` command."""
    return '\n'.join(_options(cli.build_parser(), frozenset({'help'})))


def _subparser(parser: argparse.ArgumentParser, words: str) -> argparse.ArgumentParser:
    for word in words.split():
        [group] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        parser = group.choices[word]
    return parser


def _command(words: str, parser: argparse.ArgumentParser) -> list[str]:
    own = [each for each in parser._actions if each.dest not in SHARED]
    given = ' '.join(_usage(each) for each in sorted(own, key=lambda each: bool(each.option_strings)))
    options = _options(parser, SHARED)
    return [
        f'**`{words} {given}'.rstrip() + '`**',
        '',
        f'{parser.description}',
        *([''] if options else []),
        *options,
        '',
    ]


def _usage(action: argparse.Action) -> str:
    if not action.option_strings:
        metavar = str(action.metavar or action.dest.upper())
        return f'[{metavar}]' if action.nargs == '?' else metavar
    return f'[{_spelled(action)}]'


def _spelled(action: argparse.Action) -> str:
    """The last spelling of an option, with its value."""
    takes = action.nargs != 0
    return action.option_strings[-1] + (f' {action.metavar or action.dest.upper()}' if takes else '')


def _options(parser: argparse.ArgumentParser, without: frozenset[str]) -> list[str]:
    found = []
    for action in parser._actions:
        if action.dest not in without and not isinstance(action, argparse._SubParsersAction):
            name = _spelled(action) if action.option_strings else _usage(action).strip('[]')
            help_text = (action.help or '').replace('%%', '%')
            found.append(f'- `{name}`{f": {help_text}" if help_text else ""}')
    return found


# ------------------------------------------------------------------------------------------------------------- REST


def operations() -> str:
    """The table of operations."""
    rows = (
        [f'`{op.name}`', f'{_methods(op)} `{op.path}`', f'`{op.cli}`', f'`{op.scope}`', first_sentence(op.summary)]
        for op in OPERATIONS
    )
    return table('operation|REST|`tt`|scope|what it does', rows)


def _methods(op: Op) -> str:
    return f'{op.method}, {op.also}' if op.also else op.method


def routes() -> str:
    """Every route of an operation with its arguments and statuses."""
    rows = (
        [f'{_methods(op)} `{op.path}`', _arguments(op), str(op.status), f'`{op.scope}`', _statuses(op)]
        for op in OPERATIONS
    )
    return table('route|takes|success|scope|errors', rows)


def _arguments(op: Op) -> str:
    named = (each for each in op.parameters.values() if each.name not in op.placeholders)
    return ', '.join(f'`{each.name}`' + ('' if each.required else '?') for each in named)


def _statuses(op: Op) -> str:
    """The error statuses, without those that every request can get."""
    every = {400, 403, 413, 415, 422, 429, 500, 503}
    return ', '.join(str(status) for status in sorted(openapi._failures(op, op.method, 'none') - every))


def arguments() -> str:
    """Every argument by name, with its meaning, or several if operations differ."""
    meanings: dict[str, dict[str, list[str]]] = {}
    for op in OPERATIONS:
        for each in op.parameters.values():
            meanings.setdefault(each.name, {}).setdefault(_meaning(each), []).append(op.name)
    rows = []
    for name, found in sorted(meanings.items()):
        for meaning, users in found.items():
            rows.append([f'`{name}`', meaning if len(found) == 1 else f'{meaning} ({_some(users)})'])
    return table('argument|what it is', rows)


def _some(names: list[str]) -> str:
    return ', '.join(f'`{name}`' for name in names[:3]) + (' …' if len(names) > 3 else '')


def _meaning(parameter: Parameter) -> str:
    schema = parameter.schema
    kind = schema['type']
    words = {'string': 'text', 'integer': 'whole number', 'boolean': 'true or false', 'array': 'list of texts'}[kind]
    if 'enum' in schema:
        words = 'one of ' + ', '.join(f'`{each}`' for each in schema['enum'])
    bounds = [str(schema[each]) for each in ('minimum', 'maximum') if each in schema]
    words += f', {" to ".join(bounds)}' if bounds else ''
    words += f', {schema["maxLength"]:,} characters at most' if 'maxLength' in schema else ''
    words += f'; default `{json.dumps(schema["default"])}`' if 'default' in schema else ''
    description = schema.get('description', '')
    return description if words == 'text' else f'{description} ({words})' if description else words


@cache
def codes() -> dict[str, int]:
    """The status of every error code that a problem document can have."""
    found = {code: kind.status for code, (kind, _) in errors.REFUSALS.items()}
    for file in sorted((REPOSITORY / 'tinytown').rglob('*.py')):
        found |= dict(_explicit_codes(ast.parse(file.read_text())))
    return found | {kind.code: kind.status for kind in _kinds().values()}


def _kinds() -> dict[str, type[errors.TownError]]:
    found = (each for each in vars(errors).values() if isinstance(each, type))
    return {kind.__name__: kind for kind in found if issubclass(kind, errors.TownError)}


def _explicit_codes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(code, status) of the errors that the source raises with an explicit code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _kinds():
            for keyword in node.keywords:
                if keyword.arg == 'code' and isinstance(keyword.value, ast.Constant):
                    yield str(keyword.value.value), _kinds()[node.func.id].status


# -------------------------------------------------------------------------------------------------------------- MCP


def tools() -> str:
    """Every tool, with the effect that its hints declare."""
    rows = []
    for name, tool in catalog.tools().items():
        hints = tool['annotations']
        effect = 'reads' if hints['readOnlyHint'] else 'destroys' if hints['destructiveHint'] else 'changes'
        effect += ', repeatable' if hints['idempotentHint'] and not hints['readOnlyHint'] else ''
        scope = catalog._operation(name)[0].scope
        rows.append([f'`{tool["name"]}`', first_sentence(tool['description']), effect, f'`{scope}`'])
    return table('tool|what it does|effect|scope', rows)


def resources() -> str:
    rows = [[f'`{each["uri"]}`', each['description']] for each in content.RESOURCES]
    rows += [[f'`{each["uriTemplate"]}`', each['description']] for each in content.TEMPLATES]
    return table('resource|what it holds', rows)


def prompts() -> str:
    rows = []
    for each in content.PROMPTS:
        named = (a['name'] + ('' if a['required'] else '?') for a in each.get('arguments', ()))
        rows.append([f'`{each["name"]}`', ', '.join(f'`{name}`' for name in named), each['description']])
    return table('prompt|arguments|what it says', rows)


# --------------------------------------------------------------------------------------------------------- monitoring


def metrics() -> str:
    """Every metric in a townhall's answer to a scrape."""
    meter = Meter()
    meter.observe('town.get', 'GET', 200, 0.001)
    text = render_metrics(meter, Stats('', 0, 0, 0, 0, 0, 0, 0, {}, {}), 0.0)
    rows = []
    for name, what, kind in re.findall(r'^# HELP (\w+) (.+)\n# TYPE \w+ (\w+)$', text, re.M):
        labels = sorted({label for line in re.findall(rf'^{name}\w*{{(.*)}}', text, re.M) for label in _labels(line)})
        rows.append([f'`{name}`', kind, ', '.join(f'`{label}`' for label in labels if label != 'le'), what])
    return table('metric|kind|labels|what it is', rows)


def _labels(line: str) -> list[str]:
    return re.findall(r'(\w+)="', line)


def buckets() -> str:
    """The bucket bounds of the histograms, in seconds."""
    shown = [', '.join(f'{bound:g}' for bound in bounds) for bounds in (HTTP_BOUNDS, TASK_BOUNDS)]
    return f'Buckets of requests: {shown[0]} s. Buckets of tasks: {shown[1]} s.'


def alerts() -> str:
    """Every alert of deploy/alerts.yml."""
    text = (REPOSITORY / 'deploy' / 'alerts.yml').read_text()
    rows = []
    for block in re.split(r'^ +- alert: ', text, flags=re.M)[1:]:
        held = re.search(r'for: (\w+)', block)
        severity = re.search(r'severity: (\w+)', block)
        summary = re.search(r"summary: '(.*)'", block)
        assert severity
        assert summary
        message = re.sub(r'\{\{ *\$(\w+)(?:\.(\w+))?.*?\}\}', r'…', summary[1])
        rows.append([f'`{block.split()[0]}`', severity[1], held[1] if held else 'at once', message])
    return table('alert|severity|after|what it says', rows)


def served() -> str:
    """The routes that are not operations."""
    rows = [[f'GET `{path}`', what] for path, what in _PLAIN.items()]
    assert set(_PLAIN) == set(health.ROUTES)
    return table('route|what it is', rows)


_PLAIN: Final = {
    '/health': 'whether the process serves; it does not check Redis',
    '/healthz': 'the same',
    '/ready': 'whether it can serve: Redis answers, the audit log is writable, no drain; else 503 with the reason',
    '/readyz': 'the same',
    '/metrics': 'Prometheus text format 0.0.4; 503 with the remaining metrics while Redis does not answer',
    '/api/scaling': 'a recommended number of agents',
    '/openapi.json': 'the OpenAPI 3.1 document of this API',
}

# --------------------------------------------------------------------------------------------------------- architecture


def rooms() -> str:
    """Every room of the package from the bottom up, with its job and its modules."""
    rows = []
    for room in ('', *(room for floor in FLOORS for room in floor)):
        folder = REPOSITORY / 'tinytown' / room
        docstring = ast.get_docstring(ast.parse((folder / '__init__.py').read_text())) or ''
        modules = sorted(f'`{file.stem}`' for file in folder.glob('*.py') if not file.stem.startswith('__'))
        rows.append([f'`tinytown/{room}`', re.split(r'\.\s', docstring)[0].rstrip('.'), ', '.join(modules)])
    return table('room|its one job|modules', rows)


# The order of rooms: a room imports only from rooms on floors before its own.
FLOORS: Final = (
    ('state', 'clis'),
    ('host', 'http'),
    ('core',),
    ('auth',),
    ('rest', 'worker'),
    ('mcp', 'cli'),
    ('townhall',),
)

# -------------------------------------------------------------------------------------------------------------- writing

PARTS: Final[dict[str, Callable[[], str]]] = {
    part.__name__: part
    for part in (settings, commands, shared_options, townhall_options, operations, routes, arguments, tools)
} | {part.__name__: part for part in (resources, prompts, metrics, buckets, alerts, served, service_commands, rooms)}


def written(text: str) -> str:
    """A page with its parts generated again. Raises KeyError for an unknown part."""
    return PART.sub(lambda match: f'{match[1]}{PARTS[match[2]]()}\n{match[3]}', text)


def main() -> int:
    for page in pages():
        text = page.read_text()
        if (new := written(text)) != text:
            page.write_text(new)
            print(page.relative_to(REPOSITORY))
    return 0


if __name__ == '__main__':
    sys.exit(main())
