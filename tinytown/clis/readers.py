"""Reads what coding CLIs print: the steps for the log, the final answer, the reason of a failure, and the usage.

`reader` makes the reader of one run. `worker.cli_run` feeds it the run's output and asks it for the `Outcome` at the
end. Each format was recorded from the real program; `tests/recorded/clis` holds the recordings. A format that changes
must never stop a run: a line that a reader doesn't understand is shown as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..console import clean
from .outcome import Outcome, Usage, Verdict, judge, reset_time

RESULT_BYTES: Final = 65_536  # of a stored result: its head and its tail
MAX_LINE: Final = 8 << 20  # bytes; a longer line is shown as text
_SHOWN_LINES: Final = 12  # of the output of one tool call
_SHOWN_CHARS: Final = 300  # of one such line, and of one argument
_REASON_CHARS: Final = 500  # of the reason why a run was cut short, which events and lists repeat
_TEXT_CHARS: Final = 4096  # of the error of a task
_ESCAPES: Final = re.compile(
    r'\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,4096}(?:\x07|\x1b\\)?|[PX^_][^\x1b]{0,4096}(?:\x1b\\)?|[ -/]*[0-~])'
    r'|\x9b[0-?]*[ -/]*[@-~]'
)


def plain(text: str) -> str:
    """Text as a person would see it on a terminal, without escape sequences, overwritten lines, control characters."""
    lines = _ESCAPES.sub('', text).replace('\r\n', '\n').split('\n')
    return clean('\n'.join(line.rstrip('\r').rpartition('\r')[2] for line in lines))


class Excerpt:
    """The head and the tail of a stream, at most `limit` bytes. A mark shows how much is missing between them."""

    def __init__(self, limit: int = RESULT_BYTES) -> None:
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._cut = 0

    def add(self, data: bytes) -> None:
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._half:
            self._trim()

    def _trim(self) -> None:
        extra = len(self._tail) - self._half
        if extra > 0:
            del self._tail[:extra]
            self._cut += extra

    def text(self) -> str:
        """The excerpt as plain text."""
        self._trim()
        if not self._cut:
            return plain((self._head + self._tail).decode('utf-8', 'replace')).strip()
        head = self._head.decode('utf-8', 'ignore')
        tail = self._tail.lstrip(bytes(range(0x80, 0xC0))).decode('utf-8', 'replace')
        return plain(f'{head}\n[… {self._cut} bytes are left out here …]\n{tail}').strip()


def shortened(text: str) -> str:
    """A final answer, cut to what a task stores."""
    excerpt = Excerpt()
    excerpt.add(text.encode('utf-8', 'replace'))
    return excerpt.text()


class Reader:
    """Reads a run whose output is plain text. Only its exit status says how it ended.

    Subclasses read the texts or the JSON of particular CLIs. They set `fault` to the CLI's own message of a failure.
    """

    def __init__(self) -> None:
        self.stdout, self.stderr = Excerpt(), Excerpt()
        self.fault = ''
        self.http_status: int | None = None
        self.resets_at: float | None = None

    def feed(self, data: bytes) -> bytes:
        """Takes a piece of the standard output. Returns what the log shows of it."""
        self.stdout.add(data)
        return data

    def feed_stderr(self, data: bytes) -> bytes:
        """Takes a piece of the standard error. Returns what the log shows of it."""
        self.stderr.add(data)
        return data

    def finish(self) -> bytes:
        """Ends the standard output. Returns the rest for the log."""
        return b''

    def outcome(self, status: int, now: float) -> Outcome:
        """How a run with this exit status (negative: a signal) ended at the time `now`."""
        if status < 0:
            return self._ended('killed', f'ended by signal {-status}', now)
        if self.fault:
            fault = ' '.join(plain(self.fault).split())
            return self._ended(judge(fault, self.http_status), fault, now)
        if status == 0:
            return self.completed()
        text = self.stderr.text() or self.stdout.text()
        verdict: Verdict = 'broken' if status in (126, 127) else self.judge_text(text)
        reason = text if verdict == 'failed' else last_line(text)
        return self._ended(verdict, f'exit status {status}: {reason}'.rstrip(': '), now)

    def completed(self) -> Outcome:
        """The outcome of a run that ended with exit status 0 and reported no failure."""
        return Outcome('done', self.stdout.text(), usage=self.usage())

    def judge_text(self, _text: str) -> Verdict:
        """The verdict on a run that failed with this text and nothing else."""
        return 'failed'

    def usage(self) -> Usage:
        return Usage()

    def _ended(self, verdict: Verdict, message: str, now: float) -> Outcome:
        resets_at = (self.resets_at or reset_time(message, now)) if verdict == 'limited' else None
        most = _TEXT_CHARS if verdict == 'failed' else _REASON_CHARS
        error = message if len(message) <= most else f'{message[: most // 2]} … {message[-(most // 2) :]}'
        return Outcome(verdict, None, error, resets_at, self.usage())


def last_line(text: str) -> str:
    """The last line of a text that says something, rather than being the frame of a stack trace."""
    lines = [line.strip() for line in text.splitlines()]
    telling = [line for line in lines if line and not line.startswith(('at ', '}', '{', 'File "'))]
    return (telling or lines or [''])[-1]


class ModelText(Reader):
    """Reads a CLI that prints plain text and uses a model service: a failure's text tells whose fault it is."""

    def judge_text(self, text: str) -> Verdict:
        return judge(last_line(text))


class Aider(ModelText):
    """Reads aider. It ends with status 0 always, and wraps its lines; a run has succeeded if its last request has."""

    _FAULT: Final = re.compile(r'^litellm\.\w+:.*(?:\n(?!Retrying|The API|$).*)*', re.M)
    _REPLY: Final = re.compile(
        r'^Tokens: ([\d.]+k?) sent\b[^$]*?([\d.]+k?)\s+received\.(?:\s+Cost:\s+\S+\s+message,\s+\$([\d.]+))?', re.M
    )
    _PREAMBLE: Final = re.compile(r'^Aider v.*(?:\n.+)*\n\n', re.M)

    def outcome(self, status: int, now: float) -> Outcome:
        text = self.stdout.text()
        faults = list(self._FAULT.finditer(text))
        replies = list(self._REPLY.finditer(text))
        if faults and not (replies and replies[-1].start() > faults[-1].start()):
            self.fault = faults[-1][0]
        return super().outcome(status, now)

    def completed(self) -> Outcome:
        text = self.stdout.text()
        preamble = self._PREAMBLE.search(text)
        return Outcome('done', text[preamble.end() if preamble else 0 :], usage=self.usage())

    def usage(self) -> Usage:
        replies = self._REPLY.findall(self.stdout.text())
        if not replies:
            return Usage()
        return Usage(
            input_tokens=sum(_tokens(sent) for sent, _, _ in replies),
            output_tokens=sum(_tokens(received) for _, received, _ in replies),
            cost_usd=float(replies[-1][2]) if replies[-1][2] else None,
            requests=len(replies),
        )


def _tokens(text: str) -> int:
    return round(float(text.removesuffix('k')) * (1000 if text.endswith('k') else 1))


class JsonLines(ModelText):
    """Reads a CLI that prints a JSON object a line. `show` returns the lines for the log, and keeps what it learns.

    `answer` is the last text of the model. `is_finished` is set by the event that ends a successful run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answer = ''
        self.is_finished = False
        self.knows_format = False
        self.used: dict[str, Any] = {}
        self._rest = bytearray()

    def feed(self, data: bytes) -> bytes:
        self.stdout.add(data)
        searched = len(self._rest)
        self._rest += data
        end = self._rest.rfind(b'\n', searched)
        if end < 0 and len(self._rest) <= MAX_LINE:
            return b''
        end = end if end >= 0 else len(self._rest)
        whole, self._rest = bytes(self._rest[:end]), self._rest[end + 1 :]
        return b''.join(self._shown(line) for line in whole.split(b'\n'))

    def finish(self) -> bytes:
        rest, self._rest = bytes(self._rest), bytearray()
        return self._shown(rest)

    def _shown(self, line: bytes) -> bytes:
        """What the log shows of a line: the lines of `show`, or the line itself if it is no event of this CLI."""
        if not line.strip():
            return b''
        try:
            event = json.loads(line)
            kind = event['type']
            self.knows_format |= isinstance(kind, str)
            lines = list(self.show(kind, event))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return line + b'\n'
        return ''.join(f'{text}\n' for text in lines).encode('utf-8', 'replace')

    def show(self, kind: str, event: dict[str, Any]) -> Iterator[str]:
        """Takes an event. Yields lines for the log."""
        raise NotImplementedError

    def completed(self) -> Outcome:
        if not self.knows_format:  # another program of that name, or another version
            return super().completed()
        if not self.is_finished:
            return Outcome('failed', None, 'it ended without a result', usage=self.usage())
        return Outcome('done', shortened(self.answer), usage=self.usage())

    def usage(self) -> Usage:
        return Usage(**self.used)

    def count(self, **amounts: Any) -> None:
        """Adds to the numbers of the usage; replaces its names."""
        for name, amount in amounts.items():
            before = self.used.get(name)
            both_numbers = isinstance(before, int | float) and isinstance(amount, int | float)
            if amount is not None:
                self.used[name] = before + amount if both_numbers else amount


def _call(tool: str, arguments: Any) -> str:
    """The log's line for a tool call: its name, and the argument that says most."""
    told = ''
    if isinstance(arguments, dict):
        names = ('command', 'file_path', 'filePath', 'path', 'pattern', 'query', 'url', 'prompt')
        values = [arguments[name] for name in names if name in arguments] or list(arguments.values())
        told = ' '.join(str(values[0]).split()) if values else ''
    return f'> {tool}: {told[:_SHOWN_CHARS]}'.rstrip(': ')


def _output(text: Any) -> Iterator[str]:
    """The log's lines for the output of a tool call, shortened."""
    if isinstance(text, list):
        text = '\n'.join(str(part.get('text', '')) for part in text if isinstance(part, dict))
    lines = str(text or '').rstrip().splitlines()
    for line in lines[:_SHOWN_LINES]:
        yield f'  | {line[:_SHOWN_CHARS]}'
    if len(lines) > _SHOWN_LINES:
        yield f'  | … {len(lines) - _SHOWN_LINES} more lines'


class Claude(JsonLines):
    """Reads `claude --print --output-format stream-json --verbose`."""

    def show(self, kind: str, event: dict[str, Any]) -> Iterator[str]:
        if kind == 'system':
            yield from self._system(event)
        elif kind in ('assistant', 'user'):
            yield from self._message(event['message']['content'])
        elif kind == 'rate_limit_event':
            limit = event['rate_limit_info']
            if limit.get('status') == 'rejected':
                self.resets_at = limit.get('resetsAt')
        elif kind == 'result':
            self._end(event)

    def _system(self, event: dict[str, Any]) -> Iterator[str]:
        if event.get('subtype') == 'init':
            self.count(model=event['model'], session_id=event['session_id'])
            version = event.get('claude_code_version', '')
            yield f'claude {version}, model {event["model"]}, session {event["session_id"]}'
        elif event.get('subtype') == 'api_retry':
            why = f'{event["error_status"] or ""} {event["error"]}'.strip()
            yield f'! retry {event["attempt"]} of {event["max_retries"]}: {why}'

    def _message(self, content: Any) -> Iterator[str]:
        for part in content if isinstance(content, list) else ():
            if part['type'] == 'text':
                self.answer = part['text']
                yield from self.answer.splitlines()
            elif part['type'] == 'tool_use':
                yield _call(part['name'], part['input'])
            elif part['type'] == 'tool_result':
                yield from _output(part.get('content'))

    def _end(self, event: dict[str, Any]) -> None:
        used = event.get('usage') or {}
        cached = (used.get('cache_read_input_tokens') or 0) + (used.get('cache_creation_input_tokens') or 0)
        self.used |= {
            'input_tokens': used.get('input_tokens'),
            'output_tokens': used.get('output_tokens'),
            'cached_tokens': cached,
            'cost_usd': event.get('total_cost_usd'),
            'requests': event.get('num_turns'),
        }
        self.answer = str(event.get('result') or self.answer)
        is_error = event.get('is_error') or event.get('subtype', 'success') != 'success'
        self.is_finished = not is_error
        if is_error:
            self.fault = str(event.get('result') or event.get('subtype') or 'it failed')
            self.http_status = event.get('api_error_status')


class Codex(JsonLines):
    """Reads `codex exec --json`."""

    def show(self, kind: str, event: dict[str, Any]) -> Iterator[str]:
        if kind == 'thread.started':
            self.count(session_id=event['thread_id'])
            yield f'codex, session {event["thread_id"]}'
        elif kind in ('item.started', 'item.completed'):
            yield from self._item(event['item'], kind == 'item.completed')
        elif kind == 'turn.completed':
            self.is_finished = True
            used = event['usage']
            self.used |= {
                'input_tokens': used['input_tokens'],
                'output_tokens': used['output_tokens'],
                'cached_tokens': used.get('cached_input_tokens'),
            }
        elif kind == 'error':
            yield f'! {event["message"]}'
        elif kind == 'turn.failed':
            self.fault = _inner_message(event['error']['message'])

    def _item(self, item: dict[str, Any], is_over: bool) -> Iterator[str]:
        kind = item['type']
        if kind == 'agent_message' and is_over:
            self.answer = item['text']
            yield from self.answer.splitlines()
        elif kind == 'command_execution':
            if is_over:
                yield from _output(item['aggregated_output'])
            else:
                yield _call('shell', item)
        elif kind == 'mcp_tool_call' and not is_over:
            yield _call(f'{item.get("server", "")}.{item.get("tool", "")}', item.get('arguments'))
        elif kind == 'file_change' and is_over:
            for change in item.get('changes', ()):
                yield f'> {change.get("kind", "change")}: {change.get("path", "")}'
        elif kind == 'error' and is_over:
            yield f'! {item["message"]}'


def _inner_message(message: str) -> str:
    """The message within a provider's JSON error, before that JSON, which may name a reset time."""
    found = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)*)"', message)
    return f'{json.loads(chr(34) + found[1] + chr(34))} ({message})' if found else message


class Gemini(JsonLines):
    """Reads `gemini --output-format stream-json`."""

    def __init__(self) -> None:
        super().__init__()
        self._is_speaking = False  # whether the last event was a piece of the answer, which comes in pieces

    def show(self, kind: str, event: dict[str, Any]) -> Iterator[str]:
        was_speaking, self._is_speaking = self._is_speaking, kind == 'message' and event['role'] == 'assistant'
        if kind == 'init':
            self.count(session_id=event['session_id'])
            yield f'gemini, model {event.get("model")}, session {event["session_id"]}'
        elif self._is_speaking:
            self.answer = self.answer + event['content'] if was_speaking else event['content']
            yield from event['content'].splitlines()
        elif kind == 'tool_use':
            yield _call(event['tool_name'], event['parameters'])
        elif kind == 'tool_result':
            yield from _output(event.get('output') or (event.get('error') or {}).get('message'))
        elif kind == 'result':
            self._end(event)

    def _end(self, event: dict[str, Any]) -> None:
        stats = event.get('stats') or {}
        models = stats.get('models') or {}
        self.count(
            input_tokens=stats.get('input_tokens'),
            output_tokens=stats.get('output_tokens'),
            cached_tokens=stats.get('cached'),
            model=max(models, key=lambda name: models[name].get('total_tokens', 0), default=None),
        )
        self.is_finished = event['status'] == 'success'
        if not self.is_finished:
            message = event['error']['message']
            code = re.search(r'"code"\s*:\s*(\d{3})', message)
            self.http_status = int(code[1]) if code else None
            self.fault = _inner_message(message)


class Copilot(JsonLines):
    """Reads `copilot --output-format json`."""

    def show(self, kind: str, event: dict[str, Any]) -> Iterator[str]:
        data = event.get('data', {})
        if kind == 'assistant.message':
            self.count(model=data.get('model'), requests=1)
            self.answer = data['content'] or self.answer
            yield from data['content'].splitlines()
        elif kind == 'tool.execution_start':
            yield _call(data['toolName'], data['arguments'])
        elif kind == 'tool.execution_complete':
            yield from _output(data['result']['content'] if data.get('success') else data.get('error'))
        elif kind == 'session.info':
            yield f'! {data["message"]}'
        elif kind == 'session.error':
            self.fault = data['message']
            self.http_status = data.get('statusCode')
        elif kind == 'result':
            self.count(session_id=event['sessionId'])
            self.is_finished = event['exitCode'] == 0


class OpenCode(JsonLines):
    """Reads `opencode run --format json`."""

    def show(self, kind: str, event: dict[str, Any]) -> Iterator[str]:
        self.used['session_id'] = event['sessionID']
        part = event.get('part', {})
        if kind == 'text':
            self.answer = part['text']
            yield from self.answer.splitlines()
        elif kind == 'tool_use':
            yield _call(part['tool'], part['state'].get('input'))
            yield from _output(part['state'].get('output') or part['state'].get('error'))
        elif kind == 'step_finish':
            tokens = part['tokens']
            self.count(
                input_tokens=tokens['input'],
                output_tokens=tokens['output'],
                cached_tokens=tokens['cache']['read'],
                cost_usd=part.get('cost'),
                requests=1,
            )
            self.is_finished = part.get('reason') != 'tool-calls'
        elif kind == 'error':
            data = event['error'].get('data', {})
            self.fault = str(data.get('message') or event['error'].get('name'))
            self.http_status = data.get('statusCode')
            self.fault += f' ({data["responseBody"]})' if data.get('responseBody') else ''


_READERS: Final[dict[str, Callable[[], Reader]]] = {
    'text': Reader,
    'model': ModelText,
    'aider': Aider,
    'claude': Claude,
    'codex': Codex,
    'gemini': Gemini,
    'copilot': Copilot,
    'opencode': OpenCode,
}
FORMATS: Final = tuple(_READERS)


def reader(output: str) -> Reader:
    """A reader for one run whose output has this format, one of `FORMATS`."""
    return _READERS[output]()
