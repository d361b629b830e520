"""How long an agent pauses after a run that its CLI could not do, so that nothing drains its queue."""

from __future__ import annotations

import random
from typing import Final

from ..clis.outcome import Outcome

QUICK_SECS: Final = 10.0  # a run that fails sooner has done nothing
MAX_QUICK: Final = 3  # quick failures in a row that stop the agent for a while
_FIRST: Final = {'limited': 60, 'overloaded': 15, 'killed': 5, 'failed': 30}  # seconds
_LONGEST: Final = 1800  # seconds, of a pause whose end the provider did not tell
_JITTER: Final = 30  # seconds, so that the agents of one account do not all begin at once


class Pauses:
    """The pauses of one agent. Each failure of a kind in a row doubles the pause; a run that is done ends the row."""

    def __init__(self) -> None:
        self._row = 0
        self._quick = 0

    def after(self, outcome: Outcome, seconds: float, now: float) -> int:
        """The pause in seconds after a run that took `seconds` and ended at `now`; 0 for none."""
        verdict = outcome.verdict
        if verdict == 'done':
            self._row = self._quick = 0
            return 0
        if verdict == 'failed':
            self._quick = self._quick + 1 if seconds < QUICK_SECS else 0
            if self._quick < MAX_QUICK:
                return 0
        if outcome.resets_at:
            return max(1, round(outcome.resets_at - now + random.uniform(0, _JITTER)))
        self._row += 1
        return min(_FIRST[verdict] << min(self._row - 1, 10), _LONGEST)
