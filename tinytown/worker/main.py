"""The worker: the process of one agent. Takes what its inbox holds, runs the coding CLI on it, reports, goes on.

The order is what makes it safe to be killed anywhere: replay reports that were not delivered; hello; then pick up,
beat, run, keep the report on disk, deliver it, forget it, acknowledge the messages. It never polls: between rounds it
blocks on its inbox, during one it waits for its CLI.
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
from ..clis.registry import Cli
from ..config import from_values
from ..core import holders
from ..core.town import Town
from ..errors import Conflict, NotFound, TownError, Unavailable, UsageError
from ..files import write_atomically
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
from .cli_run import CliRun, RunLog
from .prompt import Letter, Work, compose

BEAT_SECS: Final = 5.0  # at most; and three fit into a lease
MOST_MESSAGES: Final = 100
_END_GRACE: Final = 2.0  # for what a CLI leaves running when it ends


class Terminated(BaseException):
    """SIGTERM or SIGINT: the worker is to end."""


class Worker:
    """One process of one agent, from hello to goodbye. `instance` tells it from every other process of that agent."""

    def __init__(self, town: Town, agent_id: str, instance: str, log: RunLog) -> None:
        self.town = town
        self.id = agent_id
        self.instance = instance
        self.log = log
        self.name = ''
        self.role: str | None = None
        self.cli: Cli
        self._most_rounds = 0
        self._rounds = 0
        self._terminated = False
        self._may_raise = False
        self._woken, self._waker = os.pipe()
        self._deliveries = town.config.agent.max_attempts
        self._beat_secs = min(BEAT_SECS, town.config.agent.lease_secs / 3)

    # ------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Delivers what an earlier process could not report, and takes the agent over. Raises TownError."""
        for file, report in report_spool.waiting(self.town.root, self.id):
            self._deliver(file, report)
        _, _, found, *_ = self.town.store.call(self.town.store.agent(self.id))
        record = json.loads(found)
        self.name, self.role = record['name'], record['role_id']
        self.cli = registry.find_cli(self.town.config, record['cli'])  # before anybody takes us for alive
        report_spool.note_process(self.town.root, self.id, self.instance)
        me = identify(os.getpid())
        signal.signal(signal.SIGTERM, self._on_signal)  # from here on we are to say that we end
        signal.signal(signal.SIGINT, self._on_signal)
        hello = self.town.store.hello(self.id, self.instance, me.host, me.boot, me.pid, me.start)
        [most] = self.town.store.call(hello)
        self._most_rounds = int(most)
        self.note(f'worker {self.instance} of {self.name} is up (pid {me.pid}, cli {self.cli.name})')

    def run(self) -> int:
        """Works until it is told to stop, is fenced, or has done its rounds. The exit status of the process."""
        try:
            return self._work()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # it ends anyway; a late one would look like a violent death

    def _work(self) -> int:
        try:
            while True:
                if self._terminated:
                    raise Terminated
                found = self._ask(
                    self.town.store.pickup(self.id, self.instance, MOST_MESSAGES, self._deliveries, self.log.offset)
                )
                if found[0] == b'work':
                    self._round(found[1], found[2], json.loads(found[3]))
                elif found[1] == b'Draining':
                    return self._leave('Stopped', 'closed')
                else:
                    self._rest(text(found[1]), text(found[2]), text(found[3]))
                if self._most_rounds and self._rounds >= self._most_rounds:
                    return self._leave('Stopped', f'did its {self._rounds} rounds')
        except Terminated:
            return self._end_by_signal()
        except (Conflict, NotFound) as e:
            self.note(f'ending: {e.detail}')
            return 0
        except Exception as e:
            import traceback  # late: only faults need it

            self.note(traceback.format_exc())
            self._leave('Error', f'its worker failed: {e}')
            return 1

    def _rest(self, state: str, urgent: str, normal: str) -> None:
        """Blocks until something has come in since the last look, or it is time for a heartbeat."""
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
        """Whoever stops an agent has said so (it is Draining) and settles its record once no process is left."""
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
        self.note(f'stopping: {why}')
        self._clean_up()
        try:
            ending = self.town.store.depart(self.id, self.instance, state, why, 'backlog')
            self.town.store.run(holders.free(self.town.store, self.town.root, self.id, ending))
        except TownError as e:
            self.note(f'could not say so: {e.detail}')
        return 0

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self._terminated:
            self._terminated = True
            os.write(self._waker, b'!')
        if self._may_raise:
            self._may_raise = False
            raise Terminated

    @contextmanager
    def _may_be_terminated(self) -> Iterator[None]:
        """Within, a signal ends the wait at once; elsewhere it is looked at when what is under way is done.

        So only a wait on which nothing hangs may stand within: a run of the CLI has the pipe to be woken by.
        """
        self._may_raise = True
        try:
            if self._terminated:
                raise Terminated
            yield
        finally:
            self._may_raise = False

    def _ask(self, command: Command) -> Any:
        """A round trip, repeated while Redis is away: every script that a worker calls may be repeated."""
        return self._insist(partial(self.town.store.call, command))

    def _insist(self, ask: Callable[[], Any]) -> Any:
        pause = 0.1
        while True:
            try:
                return ask()
            except Unavailable as e:
                self.note(f'waiting for Redis: {e.detail}')
                with self._may_be_terminated():
                    time.sleep(pause)
                pause = min(pause * 2, 2.0)

    # ------------------------------------------------------------------------------------------------- rounds

    def _round(self, task: Any, messages: list[Any], backlog: list[dict[str, Any]]) -> None:
        """One run of the CLI: at most one task, and the messages that wait."""
        work = None
        if task:
            task_id, attempt, head, tags = task
            work = Work(text(task_id), attempt, json.loads(head + b'}')['description'], json.loads(tags))
        held = (work.id, str(work.attempt)) if work else ()
        if self._terminated or (work and self._beat(held)):
            return  # it was taken away before it began
        self._rounds += 1
        self.note(
            f'round {self._rounds}: '
            + (f'task {work.id} attempt {work.attempt}' if work else f'{len(messages)} messages')
        )
        self.log.secrets = town_secrets.known_secrets(self.town.root, self.town.config, os.environ)  # those of today
        letters = [_letter(each) for each in messages]
        prompt = compose(self.town.name, self.name, self.role, work, letters, backlog)
        try:
            env, file = self._environment(work), TownDir(self.town.root).prompt(self.id)
            job = CliRun(self.cli, prompt, file, self.town.root, env, self.log, self._woken)
        except OSError as e:
            self._cannot_run(e)
        ended = job.wait(lambda: self._is_over(job, held), self._beat_secs)
        if not ended:
            job.stop(self.instance)
        if self._terminated:  # whoever stops us stops the CLI too, so its end says nothing of the work
            self.note('the round was ended by a signal')
            self._clean_up()
            raise Terminated
        if not ended:
            self.note('the round was ended: its task is no longer ours')
        elif work:
            self._report(work, job)
        self._clean_up()
        well = ended and job.status == 0
        if not well and messages:
            self.note(f'exit status {job.status}: {len(messages)} messages stay for another round')
        acknowledged = [text(part) for lane, entry, *_ in messages for part in (lane, entry)] if well else []
        run = (work.id, work.attempt, self.log.offset) if work else NO_RUN
        self._ask(self.town.store.round_done(self.id, self.instance, acknowledged, run))

    def _is_over(self, job: CliRun, held: tuple[str, ...]) -> bool:
        """Whether a run is to be ended, asked at every heartbeat of it."""
        reap_orphans(but=(job.pid,))
        return self._terminated or self._beat(held)

    def _beat(self, held: tuple[str, ...]) -> bool:
        """Says that the worker lives and holds its task. Whether it has lost it."""
        try:
            reply = self.town.store.call(self.town.store.beat(self.id, self.instance, held))
        except Conflict:
            return True
        except Unavailable:
            return False  # can't tell: the lease goes on, and what we report is checked
        return bool(reply[1])

    def _cannot_run(self, error: OSError) -> NoReturn:
        why = f'{self.cli.argv[0]} can not be run: {error}'
        self.note(why)
        self._ask(self.town.store.depart(self.id, self.instance, 'Error', why, 'inbox'))
        raise Conflict(why)

    def _clean_up(self) -> None:
        """Ends what the CLI left running: all that is below us, for we adopt orphans, and all that bears our mark."""
        reap_orphans()
        me = identify(os.getpid())
        if tree(me, self.instance):
            left = stop_tree(me, self.instance, _END_GRACE)
            self.note(f'ended processes that the CLI had left{f"; {left} could not be" if left else ""}')
            reap_orphans()

    def _environment(self, work: Work | None) -> dict[str, str]:
        """What the CLI sees: the allow-list, who it is, and our `tt` first on its PATH."""
        env = registry.environment(self.town.config, os.environ)
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

    def _report(self, work: Work, job: CliRun) -> None:
        """Tells the end of a task. It is on disk before it is sent, and stays there until it was received."""
        outcome, result, error = job.outcome()
        report = {'task': work.id, 'attempt': str(work.attempt), 'outcome': outcome, 'result': result, 'error': error}
        file = None
        try:
            file = report_spool.keep(self.town.root, self.id, report)
        except OSError as e:
            self.note(f'task {work.id}: its report could not be kept: {e}')
        self._deliver(file, report)

    def _deliver(self, file: Path | None, report: dict[str, Any]) -> None:
        def once() -> str:
            store = self.town.store.acting_as(self.name or self.id)
            return store.run(report_spool.deliver(store, report))

        self.note(self._insist(once))
        if file:
            file.unlink(missing_ok=True)

    def note(self, what: str) -> None:
        self.log.line(f'{rfc3339(time.time())} tinytown: {what}')


def _letter(message: list[bytes]) -> Letter:
    lane, _, kind, record = message
    found = json.loads(record)
    return Letter(text(kind), found['from'], found['summary'], lane == b'u')


def install_tt(root: Path) -> Path:
    """A directory that holds a `tt` of this very installation."""
    directory = TownDir(root).programs
    directory.mkdir(mode=0o700, exist_ok=True)
    script = f'#!/bin/sh\nPYTHONPATH={shlex.quote(python_path())} exec {shlex.join(python("tinytown.cli"))} "$@"\n'
    file = directory / 'tt'
    if not file.exists() or file.read_text() != script:
        write_atomically(file, script, 0o700)
    return directory


# ------------------------------------------------------------------------------------------------------------- process


def open_here(town: Town, agent_id: str, name: str, instance: str, echo: bool = False) -> Worker:
    """A worker in this process, started. Raises TownError."""
    become_subreaper()
    os.environ[INSTANCE_VARIABLE] = instance
    agent_tokens.issue(town.root, agent_id, instance)
    secrets = town_secrets.known_secrets(town.root, town.config, os.environ)
    log = RunLog(TownDir(town.root).log(name), town.config.retention.log_bytes, secrets, echo)
    worker = Worker(town, agent_id, instance, log)
    worker.start()
    return worker


def main(argv: list[str] | None = None) -> int:
    """`python -m tinytown.worker NAME --fd N`, as townhall and tt start it: the rest is told over descriptor N."""
    parser = argparse.ArgumentParser(prog='tinytown.worker', description=main.__doc__)
    parser.add_argument('name')
    parser.add_argument('--fd', type=int, required=True)
    arguments = parser.parse_args(argv)
    with socket.socket(fileno=arguments.fd) as starter:
        try:
            told = json.loads(_read_all(starter))
            root = Path(told['root'])
            config = from_values(told['settings'], root)
            name_host(config.host)
            store = Store(managed_redis.endpoint(root, config), config.name, config.retention.events)
            worker = open_here(Town(root, config, store), told['agent_id'], arguments.name, told['instance'])
        except (TownError, UsageError) as e:
            starter.sendall(str(e).encode())
            return 1
        with suppress(OSError):  # who started us may have died: the agent is there all the same
            starter.sendall(b'ok')
    return worker.run()


def _read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b''.join(parts)


if __name__ == '__main__':
    sys.exit(main())
