"""`make docs`: writes the parts of the documents that are made from the code, between their markers.

A part begins with `<!-- made: NAME -->` and ends with `<!-- end -->`. `tests/test_docs.py` holds the files to what this
would write.
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
    """A Markdown table. `head` has its titles with | between."""
    titles = head.split('|')
    lines = [f'| {" | ".join(map(_cell, line))} |' for line in (titles, *rows)]
    return '\n'.join([lines[0], '|---' * len(titles) + '|', *lines[1:]])


def _cell(text: str) -> str:
    return ' '.join(text.replace('|', r'\|').split())


@cache
def event_types() -> frozenset[str]:
    """Every type of event, from the scripts that tell of them."""
    scripts = (REPOSITORY / 'tinytown' / 'state' / 'scripts.lua').read_text()
    return frozenset(re.findall(r"'((?:agent|task|message|town)\.[a-z_]+)'", scripts))


def first_sentence(text: str) -> str:
    """What stands before the first full stop, colon or semicolon."""
    return re.split(r'(?<=[.;:])\s', ' '.join(text.split()))[0].rstrip('.;:')


# ------------------------------------------------------------------------------------------------- configuration


def settings() -> str:
    """Every setting, by table of the file."""
    parts: dict[str, list[list[str]]] = {}
    for each in config.settings().values():
        section, _, key = each.path.rpartition('.')
        env = '' if each.path in ('name', 'agent_clis') else f'<br>`{each.env}`'
        reload = 'restart' if each.path in process._FIXED else 'reload'
        row = [f'`{key}`{env}', _kind(each), f'`{to_toml(each.default)}`', reload, each.doc]
        parts.setdefault(section, []).append(row)
    head = 'setting|kind|default|taken up|meaning'
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
    """Every command of `tt`, by the topics of its help."""
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
    """What every command of `tt` takes."""
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
            said = (action.help or '').replace('%%', '%')
            found.append(f'- `{name}`{f": {said}" if said else ""}')
    return found


# ------------------------------------------------------------------------------------------------------------- REST


def operations() -> str:
    """The README's table of operations."""
    rows = (
        [f'`{op.name}`', f'{_methods(op)} `{op.path}`', f'`{op.cli}`', f'`{op.scope}`', first_sentence(op.summary)]
        for op in OPERATIONS
    )
    return table('operation|REST|`tt`|scope|what it does', rows)


def _methods(op: Op) -> str:
    return f'{op.method}, {op.also}' if op.also else op.method


def routes() -> str:
    """Every route of the table with what it takes and may answer."""
    rows = (
        [f'{_methods(op)} `{op.path}`', _arguments(op), str(op.status), f'`{op.scope}`', _statuses(op)]
        for op in OPERATIONS
    )
    return table('route|takes|success|scope|errors', rows)


def _arguments(op: Op) -> str:
    named = (each for each in op.parameters.values() if each.name not in op.placeholders)
    return ', '.join(f'`{each.name}`' + ('' if each.required else '?') for each in named)


def _statuses(op: Op) -> str:
    """What may be refused beyond what every request may be."""
    every = {400, 403, 413, 415, 422, 429, 500, 503}
    return ', '.join(str(status) for status in sorted(openapi._failures(op, op.method, 'none') - every))


def arguments() -> str:
    """Every argument by its name, with the meanings that it has."""
    meanings: dict[str, dict[str, list[str]]] = {}
    for op in OPERATIONS:
        for each in op.parameters.values():
            meanings.setdefault(each.name, {}).setdefault(_meaning(each), []).append(op.name)
    rows = []
    for name, found in sorted(meanings.items()):
        for said, used in found.items():
            rows.append([f'`{name}`', said if len(found) == 1 else f'{said} ({_some(used)})'])
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
    said = schema.get('description', '')
    return said if words == 'text' else f'{said} ({words})' if said else words


@cache
def codes() -> dict[str, int]:
    """The code of every problem document that the code can make, with its status."""
    found = {code: kind.status for code, (kind, _) in errors.REFUSALS.items()}
    for file in sorted((REPOSITORY / 'tinytown').rglob('*.py')):
        found |= dict(_written(ast.parse(file.read_text())))
    return found | {kind.code: kind.status for kind in _kinds().values()}


def _kinds() -> dict[str, type[errors.TownError]]:
    found = (each for each in vars(errors).values() if isinstance(each, type))
    return {kind.__name__: kind for kind in found if issubclass(kind, errors.TownError)}


def _written(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(code, status) of the errors that are made with a code of their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _kinds():
            for keyword in node.keywords:
                if keyword.arg == 'code' and isinstance(keyword.value, ast.Constant):
                    yield str(keyword.value.value), _kinds()[node.func.id].status


# -------------------------------------------------------------------------------------------------------------- MCP


def tools() -> str:
    """Every tool with what its hints say."""
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
    """Every metric, from what a townhall says when it is scraped."""
    meter = Meter()
    meter.observe('town.get', 'GET', 200, 0.001)
    said = render_metrics(meter, Stats('', 0, 0, 0, 0, 0, 0, 0, {}, {}), 0.0)
    rows = []
    for name, what, kind in re.findall(r'^# HELP (\w+) (.+)\n# TYPE \w+ (\w+)$', said, re.M):
        labels = sorted({label for line in re.findall(rf'^{name}\w*{{(.*)}}', said, re.M) for label in _labels(line)})
        rows.append([f'`{name}`', kind, ', '.join(f'`{label}`' for label in labels if label != 'le'), what])
    return table('metric|kind|labels|what it is', rows)


def _labels(line: str) -> list[str]:
    return re.findall(r'(\w+)="', line)


def buckets() -> str:
    """The bounds of the histograms, in seconds."""
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
        said = re.sub(r'\{\{ *\$(\w+)(?:\.(\w+))?.*?\}\}', r'…', summary[1])
        rows.append([f'`{block.split()[0]}`', severity[1], held[1] if held else 'at once', said])
    return table('alert|severity|after|what it says', rows)


def served() -> str:
    """The routes that are no operations."""
    rows = [[f'GET `{path}`', what] for path, what in _PLAIN.items()]
    assert set(_PLAIN) == set(health.ROUTES)
    return table('route|what it is', rows)


_PLAIN: Final = {
    '/health': 'the process serves; asks nobody else',
    '/healthz': 'the same',
    '/ready': 'requests can be served: Redis answers, the audit can be written, it does not drain; else 503 and why',
    '/readyz': 'the same',
    '/metrics': 'Prometheus text 0.0.4; 503, with what is known, while Redis does not answer',
    '/api/scaling': 'how many agents the town could use',
    '/openapi.json': 'OpenAPI 3.1 of everything here',
}

# --------------------------------------------------------------------------------------------------------- architecture


def rooms() -> str:
    """Every room of the package from the bottom up: its one job, and its modules."""
    rows = []
    for room in ('', *(room for floor in FLOORS for room in floor)):
        folder = REPOSITORY / 'tinytown' / room
        docstring = ast.get_docstring(ast.parse((folder / '__init__.py').read_text())) or ''
        modules = sorted(f'`{file.stem}`' for file in folder.glob('*.py') if not file.stem.startswith('__'))
        rows.append([f'`tinytown/{room}`', re.split(r'\.\s', docstring)[0].rstrip('.'), ', '.join(modules)])
    return table('room|its one job|modules', rows)


# The order of rooms: a room imports from those before its floor, and siblings never from each other.
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
    made.__name__: made
    for made in (settings, commands, shared_options, townhall_options, operations, routes, arguments, tools)
} | {made.__name__: made for made in (resources, prompts, metrics, buckets, alerts, served, service_commands, rooms)}


def written(text: str) -> str:
    """A page with its parts made anew. Raises KeyError for a part that is none."""
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
