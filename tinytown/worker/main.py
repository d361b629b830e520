"""The worker: the process of one agent. It takes work from its inbox, runs the coding CLI on it, reports, and repeats.

The order is what makes it safe to be killed anywhere: deliver the reports in the spool; hello; then pick up, send a
heartbeat, run the CLI, write the report to the spool, deliver it, remove it, acknowledge the messages. The worker never
polls: between rounds it blocks on its inbox, and during a round it waits for the CLI.

Start with `Worker._work`, the loop, and `Worker._round`, one run of the CLI. `core.agents.start_worker` starts the
process; `main` is its entry point.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from ..auth import agent_tokens
from ..clis import registry
from ..clis.outcome import Outcome
from ..clis.registry import Cli
from ..config import from_values
from ..console import explain
from ..core import holders
from ..core.town import Town
from ..errors import Conflict, NotFound, TownError, Unavailable, UsageError
from ..files import make_directory, write_atomically
from ..host import managed_redis, report_spool, town_secrets
from ..host.processes import (
    INSTANCE_VARIABLE,
    become_subreaper,
    identify,
    name_host,
    python,
    python_path,
    reap_orphans,
    stop_tree,
    tree,
)
from ..host.town_dir import TownDir
from ..model import rfc3339
from ..state.store import NO_RUN, Command, Store, text
from ..trust import check_town
from .cli_run import CliRun, RunLog
from .pauses import Pauses
from .prompt import InboxMessage, Work, compose

MAX_BEAT_SECS: Final = 5.0  # between two heartbeats; less if three of them would not fit into a lease
MAX_MESSAGES: Final = 100  # of one round
_LEFTOVER_GRACE: Final = 2.0  # seconds, for the processes that a CLI left running


class Terminated(BaseException):
    """The worker received SIGTERM or SIGINT and must end."""


class Worker:
    """One worker process of an agent. `instance` is unique to this process; a later worker has another one."""

    def __init__(self, town: Town, agent_id: str, instance: str, log: RunLog) -> None:
        self.town = town
        self.id = agent_id
        self.instance = instance
        self.log = log
        self.name = ''
        self.role: str | None = None
        self.cli: Cli
        self._max_rounds = 0
        self._rounds = 0
        self._pauses = Pauses()
        self._terminated = False
        self._may_raise = False
        self._wake_read, self._wake_write = os.pipe()
        self._deliveries = town.config.agent.max_attempts
        self._beat_secs = min(MAX_BEAT_SECS, town.config.agent.lease_secs / 3)

    # ------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Delivers the reports of earlier workers, and becomes the agent's worker. Raises TownError."""
        for file, report in report_spool.waiting(self.town.root, self.id):
            self._deliver(file, report)
        _, _, json_record, *_ = self.town.store.call(self.town.store.agent(self.id))
        record = json.loads(json_record)
        self.name, self.role = record['name'], record['role_id']
        self.cli = registry.find_cli(self.town.config, record['cli'])  # may raise; so before `hello` makes us live
        report_spool.note_process(self.town.root, self.id, self.instance)
        me = identify(os.getpid())
        signal.signal(signal.SIGTERM, self._on_signal)  # after `hello`, a worker must record its own end
        signal.signal(signal.SIGINT, self._on_signal)
        hello = self.town.store.hello(self.id, self.instance, me.host, me.boot, me.pid, me.start)
        [rounds] = self.town.store.call(hello)
        self._max_rounds = int(rounds)
        self.note(f'worker {self.instance} of {self.name} is up (pid {me.pid}, cli {self.cli.name})')

    def run(self) -> int:
        """Works until it is stopped, has done its rounds, or another worker has its agent. Returns the exit status."""
        try:
            return self._work()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # it ends anyway; a late signal would make its exit status wrong

    def _work(self) -> int:
        """The loop. Returns the exit status."""
        try:
            while True:
                if self._terminated:
                    raise Terminated
                reply = self._ask(
                    self.town.store.pickup(self.id, self.instance, MAX_MESSAGES, self._deliveries, self.log.offset)
                )
                if reply[0] == b'work':
                    self._round(reply[1], reply[2], json.loads(reply[3]))
                elif reply[1] == b'Draining':
                    return self._leave('Stopped', 'closed')
                else:
                    self._rest(text(reply[1]), text(reply[2]), text(reply[3]))
                if self._max_rounds and self._rounds >= self._max_rounds:
                    return self._leave('Stopped', f'did its {self._rounds} rounds')
        except Terminated:
            return self._end_by_signal()
        except (Conflict, NotFound) as e:
            self.note(f'ending: {e.detail}')
            return 0
        except Exception as e:
            import traceback  # late: only a bug needs it

            self.note(traceback.format_exc())
            self._leave('Error', f'its worker failed: {e}')
            return 1

    def _rest(self, state: str, urgent: str, normal: str) -> None:
        """Blocks until the inbox has new entries or a heartbeat is due. Sends the heartbeat.

        `urgent` and `normal` are the last entries that `pickup` saw in the two message lanes. A paused agent waits for
        control entries only.
        """
        after = {'c': '0-0'}
        if state != 'Paused':
            after |= {'t': '0-0', 'u': urgent, 'n': normal}
        doorbell = self.town.store.doorbell(self.id, after, int(self._beat_secs * 1000))
        self._insist(partial(self._listen, doorbell))
        reap_orphans()
        self._ask(self.town.store.beat(self.id, self.instance, ()))

    def _listen(self, doorbell: Command) -> None:
        with self._may_be_terminated():
            self.town.store.call(doorbell)

    def _end_by_signal(self) -> int:
        """Ends the worker after SIGTERM or SIGINT. Returns the exit status.

        If the agent is Draining, another process is stopping it, and updates its record once no process is left.
        """
        self._clean_up()
        try:
            state = self.town.store.call(self.town.store.beat(self.id, self.instance, ()))[0]
        except TownError as e:
            self.note(f'ending by a signal: {e.detail}')
            return 0
        if state == b'Draining':
            self.note('ending: stopped')
            return 0
        return self._leave('Stopped', 'terminated by a signal')

    def _leave(self, state: str, why: str) -> int:
        """Ends the worker by itself: records the agent's state and frees what it holds. Returns the exit status."""
        self.note(f'stopping: {why}')
        self._clean_up()
        try:
            ending = self.town.store.depart(self.id, self.instance, state, why, 'backlog')
            self.town.store.run(holders.free(self.town.store, self.town.root, self.id, ending))
        except TownError as e:
            self.note(f'could not record that: {e.detail}')
        return 0

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self._terminated:
            self._terminated = True
            os.write(self._wake_write, b'!')
        if self._may_raise:
            self._may_raise = False
            raise Terminated

    @contextmanager
    def _may_be_terminated(self) -> Iterator[None]:
        """Within this context a signal raises Terminated at once. Elsewhere it sets a flag that is checked later.

        So only a wait that may be cut off anywhere belongs inside. A run of the CLI is woken through a pipe instead.
        """
        self._may_raise = True
        try:
            if self._terminated:
                raise Terminated
            yield
        finally:
            self._may_raise = False

    def _ask(self, command: Command) -> Any:
        """Sends a command to Redis, again and again until Redis answers. Every script of a worker may run twice."""
        return self._insist(partial(self.town.store.call, command))

    def _insist(self, function: Callable[[], Any]) -> Any:
        """Calls a function until it no longer raises Unavailable, with a growing pause between the calls."""
        pause = 0.1
        while True:
            try:
                return function()
            except Unavailable as e:
                self.note(f'waiting for Redis: {e.detail}')
                with self._may_be_terminated():
                    time.sleep(pause)
                pause = min(pause * 2, 2.0)

    # ------------------------------------------------------------------------------------------------- rounds

    def _round(self, task: Any, messages: list[Any], backlog: list[dict[str, Any]]) -> None:
        """Runs the CLI once, on at most one task and the messages in the inbox. Raises Terminated, Conflict."""
        work = None
        if task:
            task_id, attempt, head, tags = task
            work = Work(text(task_id), attempt, json.loads(head + b'}')['description'], json.loads(tags))
        held = (work.id, str(work.attempt)) if work else ()
        if self._terminated or (work and self._beat(held)):
            return  # a signal came, or the task was taken away, before the run began
        self._rounds += 1
        self.note(
            f'round {self._rounds}: '
            + (f'task {work.id} attempt {work.attempt}' if work else f'{len(messages)} messages')
        )
        self.log.secrets = town_secrets.known_secrets(self.town.root, self.town.config, os.environ)  # files may change
        received = [_message(entry) for entry in messages]
        prompt = compose(self.town.name, self.name, self.role, work, received, backlog, self.cli.calls_tt)
        try:
            env, file = self._environment(work), TownDir(self.town.root).prompt(self.id)
            run = CliRun(self.cli, prompt, file, self.town.root, env, self.log, self._wake_read)
        except OSError as e:
            self._cannot_run(e)
        ended = run.wait(lambda: self._must_stop(run, held), self._beat_secs)
        if not ended:
            run.stop(self.instance)
        if self._terminated:  # the process that stops a worker also stops its CLI, so the exit status means nothing
            self.note('the round was ended by a signal')
            self._clean_up()
            raise Terminated
        if not ended:
            self.note('the round was ended: its task is no longer ours')
        outcome = run.outcome() if ended else None
        if outcome and work and outcome.verdict in ('done', 'failed'):
            self._report(work, outcome)
        self._clean_up()
        entries = [text(part) for lane, entry, *_ in messages for part in (lane, entry)]
        if outcome:
            self._judge(outcome, run.seconds, entries)
        succeeded = outcome is not None and outcome.verdict == 'done'
        if not succeeded and messages:
            self.note(f'exit status {run.status}: {len(messages)} messages stay for another round')
        attempt = (work.id, work.attempt, self.log.offset) if work else NO_RUN
        self._ask(self.town.store.round_done(self.id, self.instance, entries if succeeded else (), attempt))

    def _judge(self, outcome: Outcome, seconds: float, entries: list[str]) -> None:
        """Draws the consequences of a verdict for the agent. Raises Conflict if its CLI can't be used.

        `seconds` is how long the run took, `entries` are the messages of the round.
        """
        why = outcome.error or outcome.verdict
        if outcome.verdict in ('unauthorised', 'broken'):
            self._give_up(f'{self.cli.name}: {why}')
        pause = self._pauses.after(outcome, seconds, time.time())
        if pause:
            self.note(f'{outcome.verdict}: {why}; pausing for {pause} s')
            counts, why = outcome.verdict == 'killed', f'{outcome.verdict}: {why}'
            self._ask(self.town.store.pause_agent(self.id, self.instance, why, pause, counts, entries))

    def _must_stop(self, run: CliRun, held: tuple[str, ...]) -> bool:
        """Sends a heartbeat during a run. Returns whether the run must be stopped."""
        reap_orphans(but=(run.pid,))
        return self._terminated or self._beat(held)

    def _beat(self, held: tuple[str, ...]) -> bool:
        """Sends a heartbeat for the worker and the task that it holds. Returns whether it has lost the task."""
        try:
            reply = self.town.store.call(self.town.store.beat(self.id, self.instance, held))
        except Conflict:
            return True
        except Unavailable:
            return False  # not known: go on, since a report of a lost task will be refused anyway
        return bool(reply[1])

    def _cannot_run(self, error: OSError) -> NoReturn:
        """Puts the agent in Error and its task back in its inbox. Raises Conflict, which ends the worker."""
        self._give_up(f"{self.cli.argv[0]} can't be run: {error}")

    def _give_up(self, why: str) -> NoReturn:
        """Puts the agent in Error and its task back in its inbox. Raises Conflict, which ends the worker."""
        self.note(why)
        self._ask(self.town.store.depart(self.id, self.instance, 'Error', why, 'inbox'))
        raise Conflict(why)

    def _clean_up(self) -> None:
        """Ends the processes that the CLI left running: our descendants (we adopt orphans), and those with our mark."""
        reap_orphans()
        me = identify(os.getpid())
        if tree(me, self.instance):
            left = stop_tree(me, self.instance, _LEFTOVER_GRACE)
            failed = f'; could not end {left}' if left else ''
            self.note(f'ended processes that the CLI left running{failed}')
            reap_orphans()

    def _environment(self, work: Work | None) -> dict[str, str]:
        """The CLI's environment: the allow-list, the agent and task, and a PATH that starts with our `tt`."""
        env = registry.run_environment(self.town.config, self.cli, os.environ)
        env['PATH'] = f'{install_tt(self.town.root)}:{env.get("PATH", os.defpath)}'
        env |= {
            INSTANCE_VARIABLE: self.instance,
            'TINYTOWN_TOWN': str(self.town.root),
            'TINYTOWN_AGENT_ID': self.id,
            'TINYTOWN_AGENT_NAME': self.name,
        }
        if self.town.config.host:
            env['TINYTOWN_HOST'] = self.town.config.host
        if work:
            env |= {'TINYTOWN_TASK_ID': work.id, 'TINYTOWN_ATTEMPT': str(work.attempt)}
        return env

    # ------------------------------------------------------------------------------------------------- reports

    def _report(self, work: Work, outcome: Outcome) -> None:
        """Reports the outcome of a task. The report is on disk until Redis has received it."""
        state = 'completed' if outcome.verdict == 'done' else 'failed'
        report: dict[str, Any] = {'task': work.id, 'attempt': str(work.attempt), 'outcome': state}
        report |= {'result': outcome.result, 'error': outcome.error}
        file = None
        try:
            file = report_spool.keep(self.town.root, self.id, report)
        except OSError as e:
            self.note(f'task {work.id}: its report could not be written to the spool: {e}')
        self._deliver(file, report)

    def _deliver(self, file: Path | None, report: dict[str, Any]) -> None:
        def once() -> str:
            store = self.town.store.acting_as(self.name or self.id)
            return store.run(report_spool.deliver(store, report))

        self.note(self._insist(once))
        if file:
            file.unlink(missing_ok=True)

    def note(self, message: str) -> None:
        """Writes a line of the worker's own to the agent's log."""
        self.log.line(f'{rfc3339(time.time())} tinytown: {message}')


def _message(entry: list[bytes]) -> InboxMessage:
    lane, _, kind, json_record = entry
    record = json.loads(json_record)
    return InboxMessage(text(kind), record['from'], record['summary'], lane == b'u')


def install_tt(root: Path) -> Path:
    """Writes a `tt` that runs this installation. Returns its directory, for a PATH."""
    directory = TownDir(root).programs
    make_directory(directory)
    script = f'#!/bin/sh\nPYTHONPATH={shlex.quote(python_path())} exec {shlex.join(python("tinytown.cli"))} "$@"\n'
    file = directory / 'tt'
    if not file.exists() or file.read_text() != script:
        write_atomically(file, script, 0o700)
    return directory


# ------------------------------------------------------------------------------------------------------------- process


def open_here(town: Town, agent_id: str, name: str, instance: str, echo: bool = False) -> Worker:
    """Makes this process the worker of an agent. Returns the started worker; call its `run`. Raises TownError."""
    become_subreaper()
    os.environ[INSTANCE_VARIABLE] = instance
    agent_tokens.issue(town.root, agent_id, instance)
    secrets = town_secrets.known_secrets(town.root, town.config, os.environ)
    log = RunLog(TownDir(town.root).log(name), town.config.retention.log_bytes, secrets, echo)
    worker = Worker(town, agent_id, instance, log)
    worker.start()
    return worker


def main(argv: list[str] | None = None) -> int:
    """`python -m tinytown.worker NAME --fd N`: townhall and tt start it, and send it JSON over the socket N."""
    parser = argparse.ArgumentParser(prog='tinytown.worker', description=main.__doc__)
    parser.add_argument('name')
    parser.add_argument('--fd', type=int, required=True)
    arguments = parser.parse_args(argv)
    with socket.socket(fileno=arguments.fd) as starter:
        try:
            charter = json.loads(_read_all(starter))
            root = Path(charter['root'])
            check_town(root)
            config = from_values(charter['settings'], root)
            name_host(config.host)
            store = Store(managed_redis.endpoint(root, config), config.name, config.retention.events)
            worker = open_here(Town(root, config, store), charter['agent_id'], arguments.name, charter['instance'])
        except (TownError, UsageError, OSError) as e:
            starter.sendall(explain(e)[0].encode())
            return 1
        with suppress(OSError):  # the process that started us may have died; the agent works all the same
            starter.sendall(b'ok')
    return worker.run()


def _read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b''.join(parts)


if __name__ == '__main__':
    sys.exit(main())
