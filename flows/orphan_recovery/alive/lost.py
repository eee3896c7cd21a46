"""Lost: what a worker is told when a run is no longer its own, or it cannot prove that it is."""

from enum import StrEnum
from functools import partial
from typing import Any


class LostBy(StrEnum):
    """How a run was lost."""

    MARKED = "marked"
    """It stands crashed: the worker was silent for too long, or a person ended the run."""
    CHANGED_HANDS = "changed_hands"
    """Another worker holds it."""
    FINISHED = "finished"
    """It has ended otherwise, or was put back."""
    VANISHED = "vanished"
    """Its row is gone."""
    UNPROVEN = "unproven"
    """For longer than the threshold no beat came through: by now it may have been marked."""


class RunLost(RuntimeError):  # noqa: N818 - named for what a worker reads
    """The run is not this worker's any more: stop, and report nothing as done.

    Attributes:
        run_id: the run.
        by: how it was lost.
        found: the row as it stood instead; empty if it is gone, or could not be asked.
        contested: whether a result that came too late was recorded as a contested verdict.
    """

    def __init__(
        self,
        run_id: str,
        by: LostBy,
        found: dict[str, Any] | None = None,
        *,
        contested: bool = False,
    ) -> None:
        self.run_id, self.by, self.found, self.contested = run_id, by, found or {}, contested
        told = ", ".join(f"{name} {value}" for name, value in self.found.items() if value)
        super().__init__(f"run {run_id} is lost ({by.value}){': ' if told else ''}{told}")

    def __reduce__(self) -> tuple[Any, ...]:
        """It crosses processes: from a pool's worker to whoever waits for it."""
        again = partial(RunLost, contested=self.contested)
        return again, (self.run_id, self.by, self.found)
