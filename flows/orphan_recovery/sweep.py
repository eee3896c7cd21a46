"""Sweep: what the flow and the start-up path do alike: look, doubt, decide, close.

The hazard is that one of the two believes what the other would not; so neither has a rule of its
own for when to mark.
"""

import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import ColumnElement, Text, and_, any_, false, func, literal, or_, select, true
from sqlalchemy.dialects.postgresql import ARRAY

from orphan_recovery.database import Executor, server_started
from orphan_recovery.describe import runs_table
from orphan_recovery.detect import Among, Fleet, Silence, look_at_fleet, look_at_silence, orphans
from orphan_recovery.doubt import (
    LONGEST_WAIT,
    Circumstances,
    Doubt,
    are_writers_kept_out,
    beat_of,
    doubts,
    look_at_circumstances,
    look_at_server,
)
from orphan_recovery.events import log_doubt, log_held, log_sight
from orphan_recovery.hold import Decision, decide, what_is_held, what_stands
from orphan_recovery.ledger import ledger_there
from orphan_recovery.mark import has_verdict, settle
from orphan_recovery.record import close_sweep, open_sweep
from orphan_recovery.report import Held, SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import Evidence
from orphan_recovery.runs import RunsTable
from orphan_recovery.settings import RECOVERY_ENABLED, ConfigurationError, load_settings
from orphan_recovery.shared import left_by, question_about
from orphan_recovery.targets import where
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
    kept_out: bool = False
    """Whether somebody locked the table against writes."""
    hides_rows: bool = False
    """Whether row security may have kept runs from it."""
    stands: Held | None = None
    """Of a dry run: what a sweep would not mark by a hold before it."""
    is_closed: bool = False
    """Whether nothing is left to do, and the ledger has the sweep's end, if it has the sweep."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to judge and nothing to close: the common case."""
        return self.silence is None and not self.open_holds

    def emptied(self) -> "Look":
        """The same, as if it had found nothing to do."""
        now = None if self.now is None else replace(self.now, open_holds=())
        fleet = replace(self.fleet, orphans=0, beating=0)
        return replace(self, now=now, fleet=fleet, silence=None, doubt=None, unlocked=frozenset())

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

    Returns:
        What it saw; with ``is_closed`` if there is nothing to do. So it is too where an earlier
        try, whose acknowledgement was lost, saw nothing to do and closed the sweep.

    Raises:
        ConfigurationError: the table or the ledger is not there, or the database is a standby.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    question = None
    if seen_by is None:
        table = await runs_table(db, request.target)  # if it does not fit, that is first to tell
        _require_sight(table)
        question = question_about(request.question, table.relation)
        async with ledger_there():
            now = await look_at_circumstances(db, request)
        look, timeline = await look_at(db, request, now), now.timeline
        if table.relation.hides_rows:  # it answers for nobody who may see more
            look, question = replace(look, hides_rows=True), None
    else:
        fleet, timeline = await left_by(db, seen_by)
        look = Look(None, fleet, None, None, seen_by=seen_by)
    fleet = look.fleet
    log_sight(request, fleet, hides_rows=look.hides_rows)
    if request.dry_run:
        stands = None if look.silence is None else await what_stands(db, request, look.silence)
        return replace(look, is_closed=look.is_idle, stands=stands)
    is_closed = await open_sweep(
        db,
        request,
        fleet,
        timeline,
        question=question,
        nothing_to_do=look.is_idle,
        seen_by=look.seen_by,
    )
    # What an earlier try closed, for it saw nothing, stays closed: what came since is for the next.
    return replace(look.emptied() if is_closed else look, is_closed=is_closed)


def _require_sight(table: RunsTable) -> None:
    """Refuse to judge by signs of life that row security may hide: who beats would look silent.

    Raises:
        ConfigurationError: it may.
    """
    for what, kept in table.elsewhere.items():
        if kept.relation.hides_rows:
            name = getattr(table.target, what).table
            raise ConfigurationError(
                f"{where(table.target, what, 'table')} is {name!r}, of which row security may "
                "hide rows from this role, so that a worker that beats would look silent: give "
                "the role a policy that shows it every row (USING (true)), or BYPASSRLS"
            )


def tell_of(look: Look, report: SweepReport) -> None:
    """Keep in the report what was seen before the sweep judged."""
    now = look.now
    if report.request.dry_run and look.silence is not None:
        too_much = look.silence.is_too_much(report.request.target)
        share = look.silence.in_words() if too_much else None
        report.doubted = share if look.doubt is None else str(look.doubt)
        report.stands = look.stands
    report.looked(
        look.fleet,
        server_started_at=None if now is None else now.server_started_at,
        marked=0 if now is None else now.marked,
        contested=0 if now is None else now.contested,
        seen_by=look.seen_by,
        hides_rows=look.hides_rows,
    )


async def look_until_sure(
    report: SweepReport, look: Look, look_again: Callable[[Look, Doubt], Awaitable[Look]]
) -> Look:
    """Look again while there is a doubt that the sweep can wait for. A dry run does not wait.

    Args:
        report: is told why it looked twice, or left what has beaten to the next sweep.
        look: its first.
        look_again: gives whoever lives the time to beat that the doubt asks for, then looks.

    Returns:
        The last look; in doubt still, if that would take the sweep too long.
    """
    while (doubt := look.doubt) is not None and not report.request.dry_run:
        log_doubt(report.request, doubt)
        if not look.may_wait_for(doubt):
            report.postponed = str(doubt)
            break
        report.looked_twice = str(doubt)
        look = await look_again(look, doubt)
    return look


async def look_again_at(db: Executor, request: SweepRequest, before: Look) -> Look:
    """Look a second time: what is in doubt now is only what came while the sweep waited. Reads
    only.

    Args:
        db: where to read.
        request: the sweep.
        before: its last look, which was in doubt.

    Returns:
        What it saw. In doubt only if the server came up again, or failed over, since that look;
        or if the table was locked against writes at either of them.

    Raises:
        ConfigurationError: the table cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    assert before.now is not None  # noqa: S101 - it was in doubt of what it saw itself
    now = await look_at_server(db, before.now)
    look = await look_at(db, request, now, kept_out=before.kept_out)
    came_up_again = now.server_started_at != before.now.server_started_at
    failed_over = now.other_timeline
    waited = before.waited + (before.doubt.wait if before.doubt else timedelta(0))
    kept_out = before.kept_out or look.kept_out
    doubt = look.doubt if came_up_again or failed_over or kept_out else None
    now = replace(now, last_sweep_at=before.now.last_sweep_at)  # for a hold to tell
    unlocked = before.unlocked & look.unlocked
    look = replace(look, unlocked=unlocked, hides_rows=before.hides_rows)
    return replace(look, now=now, doubt=doubt, waited=waited)


async def look_at(
    db: Executor, request: SweepRequest, now: Circumstances, *, kept_out: bool = False
) -> Look:
    """Look at the fleet, and whether what is silent there is to be believed. Reads only.

    Args:
        db: where to read.
        request: the sweep.
        now: what is known of the database.
        kept_out: whether the table was locked against writes a moment ago.

    Returns:
        What it saw, and what is in doubt of it.

    Raises:
        ConfigurationError: the table cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    fleet = await look_at_fleet(db, request)
    if not fleet.orphans:
        return Look(now, fleet, None, None)
    silence, beat = await look_at_silence(db, request), None
    if request.target.lock is not None:
        unlocked = await _unlocked(db, request)
        doubt = doubts(now, fleet, silence, request, request.target.beat)
        return Look(now, fleet, silence, doubt, unlocked=unlocked)
    locked = False
    if fleet.beating:
        beat, _ = await beat_of(db, request, now.back_since(request))
        locked = await are_writers_kept_out(db, request)
    beat, kept_out = beat or request.target.beat, kept_out or locked
    doubt = doubts(now, fleet, silence, request, beat, kept_out=kept_out)
    return Look(now, fleet, silence, doubt, kept_out=locked)


async def _unlocked(db: Executor, request: SweepRequest) -> frozenset[str]:
    table = await runs_table(db, request.target)
    found = orphans(table, request).where(table.evidence == Evidence.LOCK.value).subquery()
    return frozenset((await db.execute(select(found.c.id))).scalars())


async def decide_on(db: Executor, report: SweepReport, look: Look) -> Decision:
    """What may be marked, after the last look. Does not commit; a dry run decides nothing.

    Args:
        db: a transaction of the caller's.
        report: of the sweep, which must be in the ledger; read, not written.
        look: the last one.

    Returns:
        Which orphans may be marked, and what is held. Where what has beaten is left to the next
        sweep, only those that show their age alone; where there was no orphan, none.

    Raises:
        ConfigurationError: the table cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
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
    if decision.held is not None:
        log_held(request, decision.held)
    return decision


async def finish(
    db: Executor, report: SweepReport, failed: list[Verdict], decision: Decision | None
) -> list[Verdict]:
    """Record what failed and close the sweep. Does not commit. A dry run has nothing to close.

    A sweep that a hold came back over, or that a crash of the server made forget, says so.

    Args:
        db: a transaction of the caller's.
        report: is told the ledger's counts, and what keeps the sweep from having ended well.
        failed: what could not be marked.
        decision: what the sweep might mark; None where it did not come to that.

    Returns:
        The failures as they now stand: a lost acknowledgement may turn out to have been a mark.
    """
    request = report.request
    if request.dry_run:
        return []
    settled = await settle(db, request, failed)
    detected, left = report.detected, 0
    if decision is not None and report.error is None:
        if decision.is_under_hold and report.held is None:  # an approval may have expired
            report.held = await what_is_held(db, request)
            if report.held is not None:
                log_held(request, report.held)
        if await _has_come_up_again(db, report):
            detected, left = 0, await _left(db, request, decision)
            report.error = _FORGOTTEN.format(left) if left else None
    closed = await close_sweep(
        db,
        request,
        detected=detected,
        left=left,
        error=report.error,
        looked_twice=report.looked_twice or report.postponed,
        hold=report.held.hold_id if report.held else None,
    )
    late = sum(verdict.outcome is Outcome.MARKED for verdict in settled)
    report.heard_of(closed.marked - late, closed.detected)
    return settled


_FORGOTTEN: Final = (
    "the server crashed, and forgot what was marked a moment before: {} of the orphans have no "
    "verdict, and are detected again by the next sweep"
)


async def _has_come_up_again(db: Executor, report: SweepReport) -> bool:
    """Whether the server may have forgotten slices, which do not wait for the disk. Where a limit
    leaves orphans, none are taken."""
    if report.server_started_at is None or report.request.limit is not None:
        return False
    started = (await db.execute(select(server_started()))).scalar_one()
    return bool(started != report.server_started_at)


async def _left(db: Executor, request: SweepRequest, decision: Decision) -> int:
    """How many orphans the sweep might have marked and has no verdict on, in runs. Reads only."""
    table = await runs_table(db, request.target)
    allowed = true() if decision.among is None else decision.among(table)
    found = orphans(table, request).where(allowed, ~has_verdict(request, table.run_id)).subquery()
    return int((await db.execute(select(func.count()).select_from(found))).scalar_one())


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
