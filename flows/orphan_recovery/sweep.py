"""Sweep: what the flow and the start-up path do alike: look, doubt, decide, close.

The hazard is that one of the two believes what the other would not; so neither has a rule of its
own for when to mark.
"""

import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, Text, and_, any_, false, literal, or_, select
from sqlalchemy.dialects.postgresql import ARRAY

from orphan_recovery import RECOVERY_ENABLED
from orphan_recovery.database import Executor
from orphan_recovery.describe import runs_table
from orphan_recovery.detect import Among, Fleet, Silence, look_at_fleet, look_at_silence, orphans
from orphan_recovery.doubt import (
    LONGEST_WAIT,
    Circumstances,
    Doubt,
    beat_of,
    doubts,
    look_at_circumstances,
    look_at_server,
)
from orphan_recovery.hold import Decision, decide
from orphan_recovery.ledger import ledger_there
from orphan_recovery.log import logger
from orphan_recovery.mark import settle
from orphan_recovery.record import close_sweep, open_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import Evidence, WorkerRun
from orphan_recovery.runs import RunsTable
from orphan_recovery.settings import ENABLED_VARIABLE, load_settings
from orphan_recovery.shared import left_by
from orphan_recovery.verdict import Outcome, Verdict


def is_enabled() -> bool:
    """Whether recovery may run. Off, now or when the process started, is off."""
    return RECOVERY_ENABLED and load_settings().recovery_enabled


def whoami(what: str) -> str:
    """``what``, and which process on which host asked, for the ledger."""
    return f"{what} on {socket.gethostname()}, process {os.getpid()}"


@dataclass(frozen=True, slots=True)
class Look:
    """What a sweep sees before it judges."""

    now: Circumstances | None
    """None where another sweep looked in this one's place."""
    fleet: Fleet
    silence: Silence | None
    """None where nothing is silent."""
    doubt: Doubt | None
    """Why it is not to be believed yet."""
    waited: timedelta = timedelta(0)
    """How long the sweep has waited for it in all."""
    seen_by: UUID | None = None
    """The other sweep that looked, where this one took over what it saw."""
    unlocked: frozenset[str] = frozenset()
    """Runs whose lock was gone at every look, where locks are the evidence."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to judge and nothing to close: the common case."""
        return self.silence is None and not self.open_holds

    @property
    def open_holds(self) -> tuple[UUID, ...]:
        return () if self.now is None else self.now.open_holds

    def may_wait_for(self, doubt: Doubt) -> bool:
        """Whether the sweep can wait for that; else it is left to the next one."""
        return self.waited + doubt.wait <= LONGEST_WAIT


async def begin(db: Executor, request: SweepRequest, seen_by: UUID | None = None) -> Look:
    """Look at the whole fleet and open the sweep in the ledger. Does not commit.

    A dry run opens nothing. Warns of runs in flight that silence cannot judge.

    Args:
        db: a transaction of the caller's.
        request: the sweep.
        seen_by: another sweep, which answers for this one (see :mod:`orphan_recovery.shared`):
            what it saw is taken over, and nothing looked at.

    Raises:
        ConfigurationError: the table or the ledger is not there, or the database is a standby.
    """
    if seen_by is None:
        await runs_table(db, request.target)  # a description that does not fit is the first to tell
        async with ledger_there():
            now = await look_at_circumstances(db, request)
        look, timeline = await look_at(db, request, now), now.timeline
    else:
        fleet, timeline = await left_by(db, seen_by)
        look = Look(None, fleet, None, None, seen_by=seen_by)
    fleet = look.fleet
    if fleet.undatable:
        logger.warning("runs_without_sign_of_life", extra={"count": fleet.undatable})
    if fleet.ahead:
        logger.warning(
            "runs_ahead_of_database_clock",
            extra={"count": fleet.ahead, "worker_ids": fleet.ahead_workers},
        )
    if not request.dry_run:
        await open_sweep(
            db,
            request,
            fleet,
            timeline,
            nothing_to_do=look.is_idle,
            seen_by=look.seen_by,
        )
    return look


def tell_of(look: Look, report: SweepReport) -> None:
    """Keep in the report what was seen before the sweep judged."""
    marked, contested = (0, 0) if look.now is None else (look.now.marked, look.now.contested)
    report.looked(look.fleet, marked=marked, contested=contested, seen_by=look.seen_by)


async def look_again_at(db: Executor, request: SweepRequest, before: Look) -> Look:
    """Look a second time: what is in doubt now is only what came while the sweep waited."""
    assert before.now is not None  # noqa: S101 - it was in doubt of what it saw itself
    now = await look_at_server(db, before.now)
    look = await look_at(db, request, now)
    came_up_again = now.server_started_at != before.now.server_started_at
    failed_over = now.other_timeline
    waited = before.waited + (before.doubt.wait if before.doubt else timedelta(0))
    doubt = look.doubt if came_up_again or failed_over else None
    return replace(look, doubt=doubt, waited=waited, unlocked=before.unlocked & look.unlocked)


async def look_at(db: Executor, request: SweepRequest, now: Circumstances) -> Look:
    """Look at the fleet, and whether what is silent there is to be believed. Reads only."""
    fleet = await look_at_fleet(db, request)
    if not fleet.orphans:
        return Look(now, fleet, None, None)
    silence, beat = await look_at_silence(db, request), None
    if request.target.lock is not None:
        unlocked = await _unlocked(db, request)
        doubt = doubts(now, fleet, silence, request, request.target.beat)
        return Look(now, fleet, silence, doubt, unlocked=unlocked)
    if fleet.beating:
        beat, _ = await beat_of(db, request)
    doubt = doubts(now, fleet, silence, request, beat or request.target.beat)
    return Look(now, fleet, silence, doubt)


async def _unlocked(db: Executor, request: SweepRequest) -> frozenset[str]:
    table = await runs_table(db, request.target)
    found = orphans(table, request).where(table.evidence == Evidence.LOCK.value).subquery()
    return frozenset((await db.execute(select(found.c.id))).scalars())


def log_doubt(request: SweepRequest, doubt: Doubt) -> None:
    """Emit the event of a sweep that looks twice."""
    fields = {"sweep_id": str(request.sweep_id), "target": request.target.name}
    seconds = doubt.wait.total_seconds()
    logger.warning(
        "sweep_looks_twice", extra={**fields, "reasons": str(doubt), "wait_seconds": seconds}
    )


async def decide_on(db: Executor, report: SweepReport, look: Look) -> Decision:
    """What may be marked, after the last look. Does not commit; a dry run decides nothing."""
    request = report.request
    if request.dry_run:
        return Decision(None, None)
    if look.now is None or look.is_idle:
        decision = Decision(None, None)
    elif report.postponed:
        decision = await decide(db, request, look.now, look.fleet.seen_at, among=_shows_only_age)
    else:
        decision = await decide(db, request, look.now, look.fleet.seen_at, seen=look.silence)
    if request.target.lock is not None:
        decision = replace(decision, among=_seen_unlocked(look.unlocked, decision.among))
    if not look.fleet.orphans:  # what came since was doubted by nobody: it is for the next sweep
        decision = replace(decision, among=_none)
    return _logged(request, decision)


def _logged(request: SweepRequest, decision: Decision) -> Decision:
    if decision.held is not None:
        fields = {"target": request.target.name, "hold_id": str(decision.held.hold_id)}
        fields |= {"runs": str(decision.held.runs), "is_new": str(decision.held.is_new)}
        logger.error("orphan_recovery_held", extra={**fields, "evidence": decision.held.evidence})
    return decision


async def finish(db: Executor, report: SweepReport, failed: list[Verdict]) -> list[Verdict]:
    """Record what failed and close the sweep. Does not commit. A dry run has nothing to close.

    Returns:
        The failures as they now stand: a lost acknowledgement may turn out to have been a mark.
    """
    request = report.request
    if request.dry_run:
        return []
    settled = await settle(db, request, failed)
    marked = await close_sweep(
        db,
        request,
        detected=report.detected,
        error=report.error,
        looked_twice=report.looked_twice or report.postponed,
        hold=report.held.hold_id if report.held else None,
    )
    late = sum(verdict.outcome is Outcome.MARKED for verdict in settled)
    report.heard_of(marked - late)
    return settled


def _seen_unlocked(unlocked: frozenset[str], among: Among | None) -> Among:
    """Of what a lock decides, only what had none at each look: another lost it a moment ago."""
    ids = literal(sorted(unlocked), ARRAY(Text()))

    def seen(table: RunsTable) -> ColumnElement[bool]:
        twice = or_(table.evidence != Evidence.LOCK.value, table.run_id == any_(ids))
        return twice if among is None else and_(among(table), twice)

    return seen


def _none(table: RunsTable) -> ColumnElement[bool]:  # noqa: ARG001
    return false()


def _shows_only_age(table: RunsTable) -> ColumnElement[bool]:
    return table.evidence == Evidence.AGE.value


def log_start(request: SweepRequest) -> None:
    """Emit the event of a sweep that begins."""
    fields = {
        "sweep_id": str(request.sweep_id),
        "target": request.target.name,
        "threshold_minutes": request.minutes,
        "dry_run": request.dry_run,
        "scope": request.scope,
    }
    logger.info("orphan_recovery_starting", extra=fields)


def log_detected(runs: list[WorkerRun]) -> None:
    """Emit the event of orphans found, with their ids."""
    fields = {"count": len(runs), "run_ids": [run.id for run in runs]}
    logger.info("orphaned_runs_detected", extra=fields)


def log_end(report: SweepReport) -> None:
    """Emit the events of a sweep that ended, or did not begin."""
    if not report.enabled:
        logger.warning("orphan_recovery_disabled", extra={"switched_off_by": ENABLED_VARIABLE})
        return
    told = report.as_dict()
    names = (
        "target",
        "sweep_id",
        "dry_run",
        "detected",
        "recovered",
        "skipped",
        "failed",
        "undatable",
    )
    fields = {name: told[name] for name in (*names, "ahead")}
    if report.error:
        logger.error("orphan_recovery_failed", extra={**fields, "error": report.error})
        return
    if not report.detected and not report.held:
        asked = report.request
        about = {"target": asked.target.name, "threshold_minutes": asked.minutes}
        about |= {"seen_by": str(report.seen_by)} if report.seen_by else {}
        logger.info("no_orphaned_runs_found", extra=about)
    logger.info("orphan_recovery_complete", extra=fields)
