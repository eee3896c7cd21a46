"""The report: what one sweep did, for the caller, the log, and an operator.

The hazard is a report that sounds well when it is not: a sweep that was cut off, or that could
not judge some runs, says so in its headline.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from orphan_recovery.database import missing_right, where_address_is
from orphan_recovery.detect import Fleet
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.settings import ENABLED_VARIABLE
from orphan_recovery.target import DEFAULT_TARGET
from orphan_recovery.verdict import Outcome, Verdict
from orphan_recovery.words import counted, iso, some_of, span

SHOWN: Final = 1_000
"""Runs that a report lists at most; the ledger has all."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a sweep did not dare: the runs of an open hold that nobody has released."""

    hold_id: UUID
    opened_at: datetime
    evidence: dict[str, Any]
    """What the sweep saw that opened it."""
    runs: int
    """Orphans that are held now."""
    is_new: bool
    """Opened by this sweep, and not by one before."""
    others: tuple[UUID, ...] = ()
    """Further holds that stand."""

    @property
    def since_first(self) -> str:
        """Since when the first of them has been silent, for who has read since when the last has;
        nothing where that is the same."""
        saw = self.evidence
        if saw["first_silent_since"] == saw["silent_since"]:
            return ""
        return f", the first of them since {saw['first_silent_since']}"

    def in_words(self) -> str:
        saw = self.evidence
        return (
            f"{saw['silent_workers']} of {saw['workers']} {saw['counted']} look dead since "
            f"{saw['silent_since']}"
        )

    @property
    def silent(self) -> list[str]:
        """Up to ten of the workers that looked dead; of the runs, where no worker is kept."""
        return list(self.evidence["some_silent_workers"])


@dataclass(slots=True)
class SweepReport:
    """What one sweep did. Counts are complete; the list of runs is bounded, failures first."""

    request: SweepRequest
    enabled: bool = True
    fleet: Fleet | None = None
    detected: int = 0
    counts: Counter[Outcome] = field(default_factory=Counter)
    error: str | None = None
    """What stopped the sweep before its end."""
    looked_twice: str | None = None
    """Why the sweep looked a second time before it believed."""
    postponed: str | None = None
    """Why what has beaten once was left to the next sweep."""
    doubted: str | None = None
    """Why a sweep would not believe yet what a dry run saw."""
    held: Held | None = None
    stands: Held | None = None
    """What a dry run saw that a sweep would not mark, by a hold before it."""
    seen_by: UUID | None = None
    """The sweep that looked in its place, after this one had begun, and judged what it found."""
    server_started_at: datetime | None = None
    """As it was when the sweep looked; None where another did."""
    hides_rows: bool = False
    """Whether row security may have kept runs from it."""
    is_closed: bool = False
    """Whether the ledger has its end, and why what failed did so."""
    marked_lately: int = 0
    """Verdicts that marked a run in the last 30 days."""
    contested_lately: int = 0
    """Those of them whose run was reported on afterwards, by a worker that lived."""
    _verdicts: list[Verdict] = field(default_factory=list, repr=False)
    _candidates: list[WorkerRun] = field(default_factory=list, repr=False)

    def saw(self, runs: list[WorkerRun]) -> None:
        """Count detected orphans; a dry run, which gives no verdicts, lists them."""
        self.detected += len(runs)
        if self.request.dry_run:
            self._candidates += runs[: SHOWN - len(self._candidates)]

    def judged(self, verdicts: list[Verdict]) -> None:
        """Count verdicts, and keep those that an operator wants to read first."""
        for verdict in verdicts:
            self.counts[verdict.outcome] += 1
            if len(self._verdicts) < SHOWN or verdict.outcome is Outcome.FAILED:
                self._verdicts.append(verdict)

    def heard_of(self, marked: int, detected: int) -> None:
        """Take the ledger's counts: acknowledgements of whole slices may have been lost, or slices
        themselves, with a server that crashed before the sweep was closed."""
        self.detected, self.counts[Outcome.MARKED], self.is_closed = detected, marked, True

    def looked(
        self,
        fleet: Fleet,
        *,
        server_started_at: datetime | None,
        marked: int,
        contested: int,
        seen_by: UUID | None = None,
        hides_rows: bool = False,
    ) -> None:
        """Keep what was seen before the sweep judged, and by which other; verdicts of the last 30
        days; and whether row security may have hidden runs."""
        self.hides_rows = hides_rows
        self.fleet, self.seen_by, self.server_started_at = fleet, seen_by, server_started_at
        self.marked_lately, self.contested_lately = marked, contested

    @property
    def recovered(self) -> int:
        return self.counts[Outcome.MARKED]

    @property
    def failed(self) -> int:
        return self.counts[Outcome.FAILED]

    @property
    def skipped(self) -> int:
        return sum(self.counts.values()) - self.recovered - self.failed

    @property
    def ended_well(self) -> bool:
        return self.error is None and self.failed == 0 and self.held is None

    @property
    def is_held(self) -> bool:
        """It stopped and asked; and that is all that is amiss."""
        return self.error is None and self.failed == 0 and self.held is not None

    @property
    def verdicts(self) -> list[Verdict]:
        """At most ``SHOWN``: failures first, then as they were given."""
        order = sorted(self._verdicts, key=lambda v: v.outcome is not Outcome.FAILED)
        return order[:SHOWN]

    @property
    def candidates(self) -> list[WorkerRun]:
        """What a dry run would have judged, at most ``SHOWN``."""
        return self._candidates

    def headline(self) -> str:
        """One line that tells what happened, worst news first."""
        if not self.enabled:
            return self._named("recovery is switched off: nothing was read and nothing was marked")
        threshold = counted(self.request.minutes, "minute")
        if not self.request.by_rules:
            threshold = span(self.request.threshold)
        if self.request.dry_run:
            told = f"dry run: {_runs(self.detected)} would be judged"
            if self.request.limit and self.fleet and self.fleet.orphans > self.detected:
                told += f" of {self.fleet.orphans}"
            told += ", nothing was written"
        elif self.detected:
            told = f"{_runs(self.detected)} detected: " + ", ".join(
                f"{self.counts[outcome]} {_IN_WORDS[outcome]}{self._for_example(outcome)}"
                for outcome in Outcome
                if self.counts[outcome]
            )
        elif self.error and self.fleet and self.fleet.orphans:
            told = f"{_runs(self.fleet.orphans)} seen, and none judged"
        else:
            told = f"no {'other ' if self.held or self.postponed else ''}orphaned run found"
        told += f" (threshold {threshold}"
        told += " where no rule says otherwise" if self.request.target.rules else ""
        if self.fleet:
            told += f", {self.fleet.in_flight} in flight"
            told += f", {self.fleet.exempt} exempt by a rule" if self.fleet.exempt else ""
            told += f", as sweep {self.seen_by} left them" if self.seen_by else ""
        told += ")"
        if self.held:
            some = some_of(self.held.silent[:3], self.held.evidence["silent_workers"])
            told = (
                f"HELD: {self.held.in_words()}{some}, {_runs(self.held.runs)} not marked (hold "
                f"{self.held.hold_id}); {told}"
            )
        if self.error and self.fleet is None:
            told = f"stopped before anything was read: {self.error}"
        elif self.error:
            told = f"stopped before its end: {self.error}; until then {told}"
        return self._named(told) + "".join(f"; {warning}" for warning, _ in self.warnings())

    def _named(self, told: str) -> str:
        """Whose it is, where that is not the default target."""
        name = self.request.target.name
        return told if name == DEFAULT_TARGET else f"{name}: {told}"

    def _for_example(self, outcome: Outcome) -> str:
        """What kept the first of the failed from being marked: a cause is mostly that of all."""
        failed = next((v for v in self.verdicts if v.outcome is Outcome.FAILED and v.error), None)
        if outcome is not Outcome.FAILED or failed is None:
            return ""
        why = f"by {failed.error}"
        if _LOCKED in (failed.error or ""):
            why = "is locked, or what its mark needs is, by another transaction"
        return f" ({failed.run.id} {why})"

    def warnings(self) -> list[tuple[str, str]]:
        """What a person has to look at besides, such as runs that silence cannot judge; and what
        to do about each."""
        if self.fleet is None:
            return []
        found, target = [], self.request.target
        if self.stands:
            found.append(
                (
                    f"a sweep would be HELD: {_runs(self.stands.runs)} not marked (hold "
                    f"{self.stands.hold_id}, which nobody has released)",
                    " ".join(self._ways_out_of(self.stands)),
                )
            )
        if self.doubted:
            found.append(
                (
                    f"a sweep would not believe that at once, because {self.doubted}",
                    "See whether the workers of these runs live. A sweep will look twice, leave "
                    "what has beaten to the next one, or ask a person.",
                )
            )
        if self.postponed:
            one = self.fleet.beating == 1
            whose = f"{_runs(self.fleet.beating)} that {'has' if one else 'have'} beaten"
            found.append(
                (
                    f"{whose} {'is' if one else 'are'} left to the next sweep, because "
                    f"{self.postponed}",
                    "Let the next sweep come: it marks those of them that are silent still.",
                )
            )
        if self.contested_lately > target.contest_limit * self.marked_lately:
            found.append(
                (
                    f"{self.contested_lately} of {self.marked_lately} verdicts of the last 30 days "
                    "were contested by a worker that lived",
                    "Give the tasks whose verdicts are contested a longer threshold: "
                    f"`orphan-recovery summary --target {target.name}` names them.",
                )
            )
        if self.hides_rows:
            found.append(
                (
                    f"row security may hide runs of {target.table} from this role",
                    "Give the role that sweeps a policy that shows it every row (USING (true)), or "
                    "BYPASSRLS: what it does not see, it does not recover.",
                )
            )
        if self.fleet.undatable:
            found.append(
                (
                    f"{self.fleet.undatable} in flight without any sign of life cannot be judged",
                    f"See what `orphan-recovery doctor --target {target.name}` says of clocks: it "
                    "names runs whose times are all empty. Name all columns with times in the "
                    "target's description, set created_at, or end those runs by hand.",
                )
            )
        if self.fleet.ahead:
            named = self.fleet.ahead_workers
            workers = f" (worker {', '.join(named)})" if named else ""
            found.append(
                (
                    f"{self.fleet.ahead} in flight with a sign of life in the database's future "
                    f"cannot be judged{workers}",
                    f"Set the clock of {'those hosts' if named else 'whoever wrote it'} right, and "
                    "let workers beat with now(), in UTC where the column has no time zone.",
                )
            )
        return found

    def next_steps(self) -> list[str]:
        """What is left for a person to do; empty if nothing is."""
        steps = []
        if not self.enabled:
            steps.append(f"Recovery is off by {ENABLED_VARIABLE}; unset it to switch it on.")
        if self.error and self.fleet is None:
            steps.append("Nothing was read and nothing marked. See to the cause named above.")
            steps += [told] if (told := where_address_is(self.request.target, self.error)) else []
        elif self.error:
            steps.append(
                "The sweep did not come to its end. What it marked stands; what it left is "
                "detected again by the next one. See to the cause named above, then run it again."
            )
        errors = [self.error, *(verdict.error for verdict in self.verdicts)]
        hints = (missing_right(error or "", self.request.target.name) for error in errors)
        steps += [hint for hint in hints if hint][:1]
        if self.held:
            steps += self._ways_out_of(self.held)
        if self.failed:
            one = self.failed == 1
            where = "the table of verdicts says why"
            if self.is_closed:
                where = "the table of verdicts and the ledger say why"
            steps.append(
                f"{self.failed} could not be marked, and {'stays an orphan' if one else 'stay'}"
                f"{'' if one else ' orphans'}: {where}, run by run. The next sweep tries again; a "
                "cause that stays (a trigger, a permission, a row that somebody keeps locked) "
                "fails again until it is mended."
            )
        steps += [way_out for _, way_out in self.warnings()]
        return steps

    def _ways_out_of(self, held: Held) -> list[str]:
        target = self.request.target.name
        some = some_of(held.silent, held.evidence["silent_workers"])
        steps = [
            f"See whether those workers live{some}: look at "
            "their hosts, their network, and the database they beat to. If they are dead, "
            "release their runs with "
            f"`orphan-recovery approve {held.hold_id} --target {target}`, or by resuming "
            "the held flow run in Prefect's UI; the next sweep marks them. If they live, do "
            "nothing: the hold is closed by the first sweep that hears of them."
        ]
        if held.others:
            others = ", ".join(map(str, held.others))
            steps.append(f"These stand too, each to be released by itself: {others}.")
        return steps

    def as_dict(self) -> dict[str, Any]:
        """The report for the contract's edge: plain values, ready for JSON."""
        listed = self.candidates if self.request.dry_run else self.verdicts
        return {
            "enabled": self.enabled,
            "dry_run": self.request.dry_run,
            "sweep_id": str(self.request.sweep_id),
            "target": self.request.target.name,
            "threshold_minutes": self.request.minutes,
            "detected": self.detected,
            "recovered": self.recovered,
            "skipped": self.skipped,
            "failed": self.failed,
            "outcomes": {outcome.value: self.counts[outcome] for outcome in Outcome},
            "in_flight": self.fleet.in_flight if self.fleet else None,
            "undatable": self.fleet.undatable if self.fleet else None,
            "ahead": self.fleet.ahead if self.fleet else None,
            "exempt": self.fleet.exempt if self.fleet else None,
            "held": self.held.runs if self.held else 0,
            "hold": str(self.held.hold_id) if self.held else None,
            "silent_workers": self.held.silent if self.held else [],
            "looked_twice": self.looked_twice,
            "postponed": self.postponed,
            "seen_by": str(self.seen_by) if self.seen_by else None,
            "runs": [_entry(item) for item in listed],
            "error": self.error,
            "message": self.headline(),
            "warnings": [warning for warning, _ in self.warnings()],
            "next_steps": self.next_steps(),
        }


_LOCKED: Final = "(SQLSTATE 55P03)"
"""In an error's text: a lock was not to be had in time."""
_IN_WORDS: Final = {
    Outcome.FAILED: "FAILED",
    Outcome.MARKED: "marked crashed",
    Outcome.ALREADY_MARKED: "already marked by another sweep",
    Outcome.FINISHED_FIRST: "finished first",
    Outcome.SIGN_OF_LIFE: "gave a sign of life",
    Outcome.CHANGED_HANDS: "changed hands",
    Outcome.VANISHED: "vanished",
}


def _runs(count: int) -> str:
    return counted(count, "orphaned run")


def _entry(item: Verdict | WorkerRun) -> dict[str, Any]:
    verdict = item if isinstance(item, Verdict) else None
    run = item.run if isinstance(item, Verdict) else item
    silence = verdict.silence if verdict and verdict.silence is not None else run.silence
    return {
        "run_id": run.id,
        "worker_id": run.worker_id,
        "tenant_id": run.tenant_id,
        "task": run.task,
        "outcome": verdict.outcome.value if verdict else None,
        "sign_of_life": iso(run.sign_of_life),
        "evidence": run.evidence.value,
        "rule": run.rule,
        "silence_seconds": round(silence.total_seconds()),
        "found": verdict.found if verdict else None,
        "error": verdict.error if verdict else None,
    }
