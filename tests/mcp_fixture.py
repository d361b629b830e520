"""The catalog that the official conformance suite asks for by name, on the protocol code that Townhall ships.

    python -m tests.mcp_fixture DIR [PORT]    serves it on /mcp, the way `townhall mcp-http` serves the town in DIR

It covers the parts of the protocol that a town does not use: requests to the client (sampling, elicitation, roots) in
both generations, log messages, lists that change.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tinytown.mcp.jsonrpc import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    META_PREFIX,
    MISSING_CAPABILITY,
    RESOURCE_NOT_FOUND,
    Fault,
)
from tinytown.mcp.protocol import LEVELS, Cancel, McpRequest, McpServer, Notify, RunMode
from tinytown.model import Json, Principal
from tinytown.state.store import Step

PNG: Final = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=='
WAV: Final = 'UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAIA+AAACABAAZGF0YQAAAAA='
PATIENCE: Final = 20.0

Tool = Callable[['Fixture', McpRequest, Json], Json]
_tools: dict[str, tuple[Tool, RunMode, Json]] = {}


def tool(run_mode: RunMode = 'quick', **properties: Json) -> Callable[[Tool], Tool]:
    """Registers a function as a tool. The name of the tool is `test_` and the function's name."""

    def add(function: Tool) -> Tool:
        schema = {'type': 'object', 'properties': properties, 'additionalProperties': False}
        _tools[f'test_{function.__name__.rstrip("_")}'] = (function, run_mode, schema)
        return function

    return add


def text(*lines: str) -> Json:
    return {'content': [{'type': 'text', 'text': line} for line in lines]}


def image() -> Json:
    return {'type': 'image', 'data': PNG, 'mimeType': 'image/png'}


def resource(uri: str, mime_type: str, content: str) -> Json:
    return {'type': 'resource', 'resource': {'uri': uri, 'mimeType': mime_type, 'text': content}}


def form(message: str, **properties: Json) -> Json:
    """An elicitation request, which asks a person to fill in a form."""
    schema = {'type': 'object', 'properties': properties, 'required': list(properties)}
    return {'method': 'elicitation/create', 'params': {'mode': 'form', 'message': message, 'requestedSchema': schema}}


def sampling(prompt: str, max_tokens: int) -> Json:
    message = {'role': 'user', 'content': {'type': 'text', 'text': prompt}}
    return {'method': 'sampling/createMessage', 'params': {'messages': [message], 'maxTokens': max_tokens}}


ROOTS: Final = {'method': 'roots/list', 'params': {}}
NAME: Final = {'type': 'string'}


# --------------------------------------------------------------------------------------------------- plain tools


@tool()
def simple_text(_fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    return text('This is a simple text response for testing.')


@tool()
def image_content(_fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    return {'content': [image()]}


@tool()
def audio_content(_fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    return {'content': [{'type': 'audio', 'data': WAV, 'mimeType': 'audio/wav'}]}


@tool()
def embedded_resource(_fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    return {'content': [resource('test://embedded-resource', 'text/plain', 'This is an embedded resource content.')]}


@tool()
def multiple_content_types(_fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    mixed = resource('test://mixed-content-resource', 'application/json', '{"test":"data","value":123}')
    return {'content': [{'type': 'text', 'text': 'Multiple content types test:'}, image(), mixed]}


@tool()
def error_handling(_fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    return text('This tool intentionally returns an error for testing') | {'isError': True}


_SCHEMA: Final[Json] = {
    'type': 'object',
    'additionalProperties': False,
    '$schema': 'https://json-schema.org/draft/2020-12/schema',
    '$defs': {
        'address': {
            '$anchor': 'addressDef',
            'type': 'object',
            'properties': {'street': {'type': 'string'}, 'city': {'type': 'string'}},
        }
    },
    'properties': {
        'name': {'type': 'string'},
        'address': {'$ref': '#/$defs/address'},
        'contactMethod': {'type': 'string', 'enum': ['phone', 'email']},
        'phone': {'type': 'string'},
        'email': {'type': 'string'},
    },
    'allOf': [{'anyOf': [{'required': ['phone']}, {'required': ['email']}]}],
    'if': {'properties': {'contactMethod': {'const': 'phone'}}, 'required': ['contactMethod']},
    'then': {'required': ['phone']},
    'else': {'required': ['email']},
}


def json_schema_2020_12_tool(_fixture: Fixture, _request: McpRequest, arguments: Json) -> Json:
    return text(json.dumps(arguments))


_tools['json_schema_2020_12_tool'] = (json_schema_2020_12_tool, 'quick', _SCHEMA)


@tool(region={'type': 'string', 'x-mcp-header': 'Region'}, count={'type': 'integer', 'x-mcp-header': 'Count'})
def header_parameter(_fixture: Fixture, _request: McpRequest, arguments: Json) -> Json:
    return text(json.dumps(arguments))


# -------------------------------------------------------------------------------------------------- tools that notify


@tool('stream')
def tool_with_progress(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    for done in (0, 50, 100):
        request.progress(done, 100)
    return text('Progress was reported')


def _log(request: McpRequest, *lines: str) -> None:
    """Sends log messages; to a modern client only if its request asks for them."""
    if not request.is_modern or request.meta.get(f'{META_PREFIX}logLevel') in LEVELS:
        for line in lines:
            request.notify('notifications/message', {'level': 'info', 'data': line})


@tool('stream')
def tool_with_logging(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    _log(request, 'Tool execution started', 'Tool processing data', 'Tool execution completed')
    return text('Three messages were logged')


@tool('stream')
def logging_tool(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    _log(request, 'Logged')
    return text('Logged, if that was asked for')


@tool('stream')
def reconnection(_fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    return text('There was no need to reconnect')


@tool()
def trigger_tool_change(fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    fixture.changed('tools')
    return text('The tools have changed')


@tool()
def trigger_prompt_change(fixture: Fixture, _request: McpRequest, _arguments: Json) -> Json:
    fixture.changed('prompts')
    return text('The prompts have changed')


# ------------------------------------------------------------------------- requests to the client, legacy protocol


@tool('stream', prompt={'type': 'string'})
def sampling_(fixture: Fixture, request: McpRequest, arguments: Json) -> Json:
    answer = fixture.demand(request, sampling(arguments['prompt'], 100))
    return text(f'LLM response: {answer["content"]["text"]}')


@tool('stream', message={'type': 'string'})
def elicitation(fixture: Fixture, request: McpRequest, arguments: Json) -> Json:
    wanted = form(
        arguments['message'],
        username={'type': 'string', 'description': "User's response"},
        email={'type': 'string', 'description': "User's email address"},
    )
    answer = fixture.demand(request, wanted)
    return text(f'User response: action: {answer["action"]}, content: {json.dumps(answer.get("content"))}')


def _elicit(fixture: Fixture, request: McpRequest, **properties: Json) -> Json:
    wanted = form('Please fill this in', **properties)
    wanted['params']['requestedSchema']['required'] = []
    answer = fixture.demand(request, wanted)
    return text(f'Elicitation completed: action={answer["action"]}, content={json.dumps(answer.get("content"))}')


@tool('stream')
def elicitation_sep1034_defaults(fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    return _elicit(
        fixture,
        request,
        name={'type': 'string', 'default': 'John Doe'},
        age={'type': 'integer', 'default': 30},
        score={'type': 'number', 'default': 95.5},
        status={'type': 'string', 'enum': ['active', 'inactive', 'pending'], 'default': 'active'},
        verified={'type': 'boolean', 'default': True},
    )


def _titled(*titles: str) -> list[Json]:
    return [{'const': f'value{i}', 'title': title} for i, title in enumerate(titles, 1)]


@tool('stream')
def elicitation_sep1330_enums(fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    options, short = ['option1', 'option2', 'option3'], ['opt1', 'opt2', 'opt3']
    names = ['Option One', 'Option Two', 'Option Three']
    return _elicit(
        fixture,
        request,
        untitledSingle={'type': 'string', 'enum': options},
        titledSingle={'type': 'string', 'oneOf': _titled('First Option', 'Second Option', 'Third Option')},
        legacyEnum={'type': 'string', 'enum': short, 'enumNames': names},
        untitledMulti={'type': 'array', 'items': {'type': 'string', 'enum': options}},
        titledMulti={'type': 'array', 'items': {'anyOf': _titled('First Choice', 'Second Choice', 'Third Choice')}},
    )


# ------------------------------------------------------------------------- requests to the client, modern protocol


def need(request: McpRequest, state: str, **requests: Json) -> Json | None:
    """The result that asks the client for input; None if the request already carries all of it."""
    given = request.params.get('inputResponses', {})
    if not isinstance(given, dict):
        raise Fault(INVALID_PARAMS, 'inputResponses must be an object')
    if all(isinstance(given.get(name), dict) for name in requests):
        return None
    signed = {'requestState': sign(request, state)} if state else {}
    return {'resultType': 'input_required', 'inputRequests': requests, **signed}


_SECRET: Final = os.urandom(32)


def sign(request: McpRequest, state: str) -> str:
    """Signs a state, so that it is only accepted unchanged, from the same principal, for the same tool or prompt."""
    bound = f'{request.by.name} {request.params.get("name")} {state}'
    return f'{state}.{hmac.new(_SECRET, bound.encode(), hashlib.sha256).hexdigest()}'


def state_of(request: McpRequest) -> str:
    """The state that the client returned, '' if it returned none. Raises Fault for a wrong signature."""
    given = request.params.get('requestState')
    if given is None:
        return ''
    state = str(given).partition('.')[0]
    if not hmac.compare_digest(str(given), sign(request, state)):
        raise Fault(INVALID_PARAMS, 'requestState differs from what the server sent')
    return state


WHO: Final = form('What is your name?', name=NAME)
OK: Final = form('Please confirm', ok={'type': 'boolean'})


@tool()
def missing_capability(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    if 'sampling' not in request.meta.get(f'{META_PREFIX}clientCapabilities', {}):
        raise Fault(MISSING_CAPABILITY, 'this tool needs sampling', {'requiredCapabilities': {'sampling': {}}})
    return text('The client can sample')


@tool('stream')
def streaming_elicitation(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    request.progress(0, 1)
    return need(request, '', user_name=WHO) or text('Elicited')


@tool()
def input_required_result_elicitation(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    return need(request, '', user_name=WHO) or text(f'Hello, {_answer(request, "user_name")["content"]["name"]}!')


@tool()
def input_required_result_sampling(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    asked = need(request, '', capital_question=sampling('What is the capital of France?', 100))
    return asked or text(_answer(request, 'capital_question')['content']['text'])


@tool()
def input_required_result_list_roots(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    return need(request, '', client_roots=ROOTS) or text(json.dumps(_answer(request, 'client_roots')['roots']))


@tool()
def input_required_result_request_state(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    return need(request, 'waiting', confirm=OK) or text('state-ok' if state_of(request) == 'waiting' else 'no state')


@tool()
def input_required_result_tampered_state(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    state_of(request)
    return need(request, 'waiting', confirm=OK) or text('state-ok')


@tool()
def input_required_result_multiple_inputs(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    state_of(request)
    asked = need(request, 'waiting', user_name=WHO, greeting=sampling('Generate a greeting', 50), client_roots=ROOTS)
    return asked or text('All of it has come')


@tool()
def input_required_result_multi_round(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    state = state_of(request)
    if state == 'second':
        return need(request, 'second', step2=_COLOUR) or text('Both steps are done')
    return need(request, 'first', step1=_STEP1) or need(request, 'second', step2=_COLOUR) or text('Both steps are done')


_STEP1: Final = form('Step 1: What is your name?', name=NAME)
_COLOUR: Final = form('Step 2: What is your favorite color?', color={'type': 'string'})


@tool()
def input_required_result_capabilities(_fixture: Fixture, request: McpRequest, _arguments: Json) -> Json:
    can = request.meta.get(f'{META_PREFIX}clientCapabilities', {})
    requests = {'user_name': WHO} if 'elicitation' in can else {}
    requests |= {'greeting': sampling('Generate a greeting', 50)} if 'sampling' in can else {}
    return need(request, '', **requests) or text('Nothing could be asked')


def _answer(request: McpRequest, name: str) -> Json:
    found: Json = request.params['inputResponses'][name]
    return found


# ----------------------------------------------------------------------------------------------------- the catalog


def _prompt(name: str, *arguments: str) -> Json:
    listed = [{'name': each, 'required': True} for each in arguments]
    return {'name': name, 'description': 'For the conformance suite', **({'arguments': listed} if listed else {})}


PROMPTS: Final = [
    _prompt('test_simple_prompt'),
    _prompt('test_prompt_with_arguments', 'arg1', 'arg2'),
    _prompt('test_prompt_with_embedded_resource', 'resourceUri'),
    _prompt('test_prompt_with_image'),
    _prompt('test_input_required_result_prompt'),
]


def _messages(*contents: Json) -> Json:
    return {'messages': [{'role': 'user', 'content': content} for content in contents]}


def _text(content: str) -> Json:
    return {'type': 'text', 'text': content}


class Fixture:
    """The catalog (`protocol.CatalogProtocol`)."""

    page = 100

    def __init__(self) -> None:
        self.info: Json = {'name': 'conformance-fixture', 'title': 'Conformance fixture', 'version': '1'}
        self.instructions = 'For the conformance suite.'
        self.capabilities: Json = {
            'tools': {'listChanged': True},
            'resources': {'subscribe': True},
            'prompts': {'listChanged': True},
            'completions': {},
            'logging': {},
        }
        self._watchers: list[tuple[Json, Notify]] = []
        self._demands: dict[str, _Demand] = {}

    def tools(self, _by: Principal) -> list[Json]:
        return [
            {'name': name, 'description': 'For the conformance suite', 'inputSchema': schema}
            for name, (_, _, schema) in _tools.items()
        ]

    def run_mode(self, _request: McpRequest, tool: str) -> RunMode:
        return _tools[tool][1] if tool in _tools else 'quick'

    def call(self, request: McpRequest, tool: str, arguments: Json) -> Step[Json]:
        yield from ()
        if tool not in _tools:
            raise Fault(INVALID_PARAMS, f'there is no tool {tool!r}')
        return _tools[tool][0](self, request, arguments)

    def resources(self, _by: Principal) -> list[Json]:
        uris = ('test://static-text', 'test://static-binary', 'test://watched-resource')
        return [{'uri': uri, 'name': uri.removeprefix('test://')} for uri in uris]

    def templates(self, _by: Principal) -> list[Json]:
        return [{'uriTemplate': 'test://template/{id}/data', 'name': 'template'}]

    def read(self, _request: McpRequest, uri: str) -> Step[list[Json]]:
        yield from ()
        if uri in ('test://static-text', 'test://watched-resource'):
            return [{'uri': uri, 'mimeType': 'text/plain', 'text': 'This is the content of the static text resource.'}]
        if uri == 'test://static-binary':
            return [{'uri': uri, 'mimeType': 'image/png', 'blob': PNG}]
        if uri.startswith('test://template/') and uri.endswith('/data'):
            number = uri.split('/')[3]
            found = {'id': number, 'templateTest': True, 'data': f'Data for ID: {number}'}
            return [{'uri': uri, 'mimeType': 'application/json', 'text': json.dumps(found)}]
        raise Fault(RESOURCE_NOT_FOUND, 'Resource not found', {'uri': uri})

    def prompts(self, _by: Principal) -> list[Json]:
        return PROMPTS

    def prompt(self, request: McpRequest, name: str, arguments: dict[str, str]) -> Step[Json]:
        yield from ()
        if name == 'test_simple_prompt':
            return _messages(_text('This is a simple prompt for testing.'))
        if name == 'test_prompt_with_arguments':
            return _messages(_text(f"Prompt with arguments: arg1='{arguments['arg1']}', arg2='{arguments['arg2']}'"))
        if name == 'test_prompt_with_embedded_resource':
            embedded = resource(arguments['resourceUri'], 'text/plain', 'Embedded resource content for testing.')
            return _messages(embedded, _text('Please process the embedded resource above.'))
        if name == 'test_prompt_with_image':
            return _messages(image(), _text('Please analyze the image above.'))
        if name == 'test_input_required_result_prompt':
            wanted = form('What context should the prompt use?', context={'type': 'string'})
            return need(request, '', user_context=wanted) or _messages(_text('With the context that was given'))
        raise Fault(INVALID_PARAMS, f'there is no prompt {name!r}')

    def complete(self, _request: McpRequest, _ref: Json, _argument: str, value: str) -> Step[list[str]]:
        yield from ()
        return [word for word in ('paris', 'park', 'party', 'test') if word.startswith(value)]

    def granted(self, _by: Principal, wanted: Json) -> Json:
        return {name: value for name, value in wanted.items() if name != 'resourcesListChanged'}

    def position(self) -> Step[str]:
        yield from ()
        return ''

    def watch(self, _position: str, wanted: Json, notify: Notify) -> Cancel:
        watcher = (wanted, notify)
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def changed(self, kind: str) -> None:
        """Notifies the watchers of a list that it has changed."""
        for wanted, notify in list(self._watchers):
            if wanted.get(f'{kind}ListChanged'):
                notify(f'notifications/{kind}/list_changed', {})

    def demand(self, request: McpRequest, wanted: Json) -> Json:
        """Sends a request to a legacy client, and waits for its result."""
        if request.is_modern:
            raise Fault(INVALID_PARAMS, 'a server sends no requests to the client in this revision')
        demand = _Demand()
        number = f'demand-{os.urandom(8).hex()}'
        self._demands[number] = demand
        request.send({'jsonrpc': '2.0', 'id': number, **wanted})
        if not demand.has_come.wait(PATIENCE) or demand.result is None:
            raise Fault(INTERNAL_ERROR, 'the client gave no answer')
        return demand.result

    def heard(self, message: Any) -> None:
        """Takes a client's response to a request of `demand`."""
        demand = self._demands.pop(str(message.get('id')), None) if isinstance(message, dict) else None
        if demand:
            demand.result = message.get('result')
            demand.has_come.set()


class _Demand:
    def __init__(self) -> None:
        self.has_come = threading.Event()
        self.result: Json | None = None


class FixtureMcp(McpServer):
    """The protocol, which passes responses of the client to the fixture."""

    def read(self, message: Any, *rest: Any, **named: Any) -> McpRequest | None:
        assert isinstance(self.catalog, Fixture)
        if isinstance(message, dict) and 'method' not in message:
            self.catalog.heard(message)
        return super().read(message, *rest, **named)


def main(root: str, port: str = '0') -> int:
    """Serves the catalog as `townhall mcp-http` serves a town. The exit status."""
    from tinytown import config, log
    from tinytown.townhall.process import TownhallProcess

    log.configure()
    flags = {'townhall.mcp_port': int(port)}
    hall = TownhallProcess(Path(root), config.load(Path(root), flags), flags, 'mcp-http')
    hall.mcp = FixtureMcp(Fixture())
    return hall.run()


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
