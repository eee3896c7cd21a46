"""The crew: which worker holds which runs, and what is to befall it.

The hazard is a worker that meets its fate before it has done anything, so that the demo shows the
death of a run that never lived: each is seen to beat, in the database, before anything happens.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import Final

from orphan_recovery.demo.facts import Facts
from orphan_recovery.demo.processes import Child, Processes


class Fate(Enum):
    """What befalls a worker."""

    KILLED = auto()
    """SIGKILL in mid-run: no last word."""
    FROZEN = auto()
    """SIGSTOP past the threshold, then SIGCONT: a paused machine that comes back."""
    FINISHES_FIRST = auto()
    """Its beats do not get through; its result does, while the sweep is on."""
    LIVES = auto()
    """Nothing: it goes on beating."""


ORPHANED: Final = (Fate.KILLED, Fate.FROZEN)
"""Their runs end as crashed."""
SILENT: Final = (*ORPHANED, Fate.FINISHES_FIRST)
"""Their runs are detected."""


@dataclass(frozen=True, slots=True)
class Part:
    """One worker and its runs."""

    worker: str
    fate: Fate
    runs: tuple[str, ...]
    """Started."""
    claims: tuple[str, ...] = ()
    """Claimed and not yet started."""
    age: timedelta = timedelta(0)
    """How long ago its runs were created."""

    @property
    def all_runs(self) -> tuple[str, ...]:
        return self.runs + self.claims


CREW: Final = (
    Part("worker-1", Fate.KILLED, ("report-1", "report-2")),
    Part("worker-2", Fate.KILLED, ("import-1",)),
    Part("worker-3", Fate.KILLED, ("export-1",), claims=("export-2",)),
    Part("worker-4", Fate.FROZEN, ("video-1",)),
    Part("worker-5", Fate.FINISHES_FIRST, ("invoice-1",)),
    Part("worker-6", Fate.LIVES, ("backfill-1",), age=timedelta(hours=3)),
)


@dataclass(frozen=True)
class Crew:
    """The workers as processes."""

    parts: tuple[Part, ...]
    children: dict[str, Child]

    def having(self, *fates: Fate) -> list[Part]:
        """The parts with one of these fates."""
        return [part for part in self.parts if part.fate in fates]

    def runs(self, *fates: Fate) -> list[str]:
        """The runs of the workers with one of these fates."""
        return [run for part in self.having(*fates) for run in part.all_runs]

    def process(self, part: Part) -> Child:
        """The worker's process."""
        return self.children[part.worker]

    def one(self, fate: Fate) -> tuple[Part, Child]:
        """The only worker with this fate, and its process."""
        [part] = self.having(fate)
        return part, self.process(part)

    def all_beat(self, facts: Facts) -> bool:
        """Whether every run is held as it should be: started and beating, or claimed."""
        runs = facts.runs()
        return all(
            all(runs[r].status == "running" and runs[r].has_beaten for r in part.runs)
            and all(runs[r].worker_id == part.worker for r in part.all_runs)
            for part in self.parts
        )


def hire(processes: Processes, facts: Facts, parts: Sequence[Part], database_url: str) -> Crew:
    """Queue the runs and start the workers that take them."""
    children = {}
    for part in parts:
        for run in part.all_runs:
            facts.submit(run, task=run.partition("-")[0], age=part.age)
        command = [sys.executable, "-m", "orphan_recovery.demo.worker", part.worker]
        command += ["--runs", *part.runs, "--claims", *part.claims]
        address = {"ORPHAN_RECOVERY_DATABASE_URL": database_url}
        children[part.worker] = processes.start(part.worker, command, address)
    return Crew(tuple(parts), children)
