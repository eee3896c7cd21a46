"""The outcome of one mark, by name, with its evidence. Never a bare row count."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from orphan_recovery.run import WorkerRun


class Outcome(StrEnum):
    """What became of one detected orphan in one sweep."""

    MARKED = "marked"
    """It stands crashed by this sweep's verdict."""
    ALREADY_MARKED = "already_marked"
    """Another sweep marked it between detect and mark."""
    FINISHED_FIRST = "finished_first"
    """Its worker, or someone else, brought it to an end between detect and mark."""
    SIGN_OF_LIFE = "sign_of_life"
    """It beat, or moved on, between detect and mark: it lives."""
    CHANGED_HANDS = "changed_hands"
    """Another worker holds it now."""
    VANISHED = "vanished"
    """Its row is gone."""
    FAILED = "failed"
    """The database refused the mark, or could not be reached. It is an orphan still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One run's outcome in one sweep."""

    run: WorkerRun
    outcome: Outcome
    judged_at: datetime | None = None
    """The database's time; None if the database gave no answer."""
    silence: timedelta | None = None
    """Database time less last sign of life, when it was judged."""
    error: str | None = None
    """Why it failed; None for every other outcome."""
    found: dict[str, Any] | None = None
    """For a miss: the row as it stood instead."""

    @property
    def is_miss(self) -> bool:
        """The run was left alone because it is no orphan any more."""
        return self.outcome not in (Outcome.MARKED, Outcome.FAILED)
