"""Hold: stop before marking when too much of the fleet looks dead, and ask a person.

The hazard is on both sides: a sweep that crashes a live fleet, and a safety valve that never opens
again. So a hold is about the runs that it names and nothing else, says what it saw, is released
by one person for a limited time, and is closed by the first sweep that sees the fleet recovered.
Orphans outside of it are marked as ever.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Integer,
    Select,
    Text,
    and_,
    case,
    cast,
    func,
    insert,
    literal,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP

from orphan_recovery.database import NOW, Executor, Span
from orphan_recovery.describe import runs_table
from orphan_recovery.detect import Among, Silence, look_at_silence, orphans
from orphan_recovery.doubt import Circumstances
from orphan_recovery.ledger import SCHEMA, approvals, hold_runs, holds, verdicts
from orphan_recovery.report import Held
from orphan_recovery.request import SweepRequest
from orphan_recovery.rules import threshold_of
from orphan_recovery.runs import RunsTable
from orphan_recovery.target import Target
from orphan_recovery.verdict import Outcome
from orphan_recovery.words import iso


@dataclass(frozen=True, slots=True)
class Decision:
    """What a sweep may mark."""

    held: Held | None
    """What it may not; None if nothing is held."""
    among: Among | None
    """Which orphans may be marked; None for all."""
    orphans: int = 0
    """How many those are, by the last count; 0 where nobody counted."""
    is_under_hold: bool = False
    """Whether some of the rest stand under a hold, released or not."""


async def decide(
    db: Executor,
    request: SweepRequest,
    now: Circumstances,
    seen_at: datetime,
    among: Among | None = None,
    seen: Silence | None = None,
) -> Decision:
    """Hold what looks like too much, close what has recovered. Does not commit.

    One sweep of a target decides at a time: two at once open one hold. A narrower sweep (of one
    tenant or worker, or by a longer threshold than the target's) has not seen the whole fleet, so
    it closes nothing.

    Args:
        db: a transaction of the caller's.
        request: the sweep; it must be in the ledger.
        now: what the sweep saw of the database.
        seen_at: when it last looked at the fleet: what falls silent later it did not doubt.
        among: judge only runs for which this holds; the others are for a later sweep.
        seen: what that look counted. Where it is not too much and nothing is held, there is no
            need to count again.

    Returns:
        What may be marked. Its ``held`` is what may not, by a hold of this sweep or of one before
        that nobody has released; None where there is no such hold, or no orphan under it.

    Raises:
        ConfigurationError: the table cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    target, table = request.target, await runs_table(db, request.target)
    only = true() if among is None else among(table)
    name = literal(f"orphan_recovery hold {target.name}", Text)
    await db.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
    any_open, workers_then = await _are_open(db, target)
    if seen is not None and not any_open and not seen.is_too_much(target):
        return Decision(None, seen_silent(request, seen_at, among), seen.orphans)
    silence = await look_at_silence(db, request, only)
    eligible = seen_silent(request, seen_at, among)
    if not silence.is_too_much(target):
        if not any_open:
            return Decision(None, eligible, silence.orphans)
        if among is None and await _are_over(db, request, silence, workers_then):
            await _close_all(db, request)
            return Decision(None, eligible, silence.orphans)
    rest = silence
    if any_open:
        rest = await look_at_silence(db, request, and_(only, ~_in_open_hold(table, target)))
    is_new = bool(rest.orphans) and rest.is_too_much(target, fleet=silence.workers)
    if is_new:
        await _open(db, request, now, rest, only)

    def allowed(runs: RunsTable) -> ColumnElement[bool]:
        return and_(~_blocked(runs, target), eligible(runs))

    held = await what_is_held(db, request, is_new=is_new)
    to_mark = silence.orphans - (held.runs if held else 0)
    return Decision(held, allowed, to_mark, is_under_hold=True)


async def what_is_held(db: Executor, request: SweepRequest, *, is_new: bool = False) -> Held | None:
    """What a sweep may not mark, as it is now: the orphans of holds that nobody has released, or
    whose release has expired. Reads only.

    Args:
        db: where to read.
        request: the sweep; of what is out of its scope nothing is told.
        is_new: whether this sweep has opened the latest of these holds itself.

    Returns:
        None if there are none; else by the latest of these holds.

    Raises:
        sqlalchemy.exc.DBAPIError: any database error.
    """
    target, table = request.target, await runs_table(db, request.target)
    unreleased = await _standing(db, target)
    blocked = await look_at_silence(db, request, _blocked(table, target))
    if not (unreleased and blocked.orphans):  # released, or none of this sweep's business
        return None
    (hold_id, opened_at, evidence), *others = unreleased
    return Held(
        hold_id,
        opened_at,
        evidence,
        runs=blocked.orphans,
        is_new=is_new,
        others=tuple(other for other, _, _ in others),
    )


async def what_stands(db: Executor, request: SweepRequest, silence: Silence) -> Held | None:
    """What a sweep would not mark by the holds before it, for a dry run, which needs no ledger.
    Reads only.

    Args:
        db: where to read.
        request: the dry run.
        silence: what it saw.

    Returns:
        As :func:`what_is_held`; None, too, where a sweep would close the holds, and where there is
        no ledger that this role may read.
    """
    if not (await db.execute(_MAY_READ)).scalar_one():
        return None
    held = await what_is_held(db, request)
    if held is None or silence.is_too_much(request.target):
        return held
    _, workers_then = await _are_open(db, request.target)
    return None if await _are_over(db, request, silence, workers_then) else held


_MAY_READ: Final = text(
    """
    SELECT count(*) = 3 FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = :ledger AND c.relname IN ('holds', 'hold_runs', 'approvals')
      AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
    """
).bindparams(ledger=SCHEMA)


def seen_silent(
    request: SweepRequest,
    seen_at: datetime,
    among: Among | None = None,
) -> Among:
    """Only what was silent when it was looked at: what falls silent since was not doubted."""
    instant = literal(seen_at, TIMESTAMP(timezone=True))

    def seen(runs: RunsTable) -> ColumnElement[bool]:
        silent = runs.sign_of_life <= instant - threshold_of(runs, request)
        return silent if among is None else and_(silent, among(runs))

    return seen


async def ended_holds(db: Executor, within: timedelta) -> dict[UUID, str]:
    """As what each hold in the ledger ended that did so within so long. Reads only."""
    statement = select(holds.c.hold_id, holds.c.ended_as).where(
        holds.c.ended_at > NOW - literal(within, Span)
    )
    return {row.hold_id: row.ended_as for row in await db.execute(statement)}


async def _open(
    db: Executor,
    request: SweepRequest,
    now: Circumstances,
    silence: Silence,
    only: ColumnElement[bool],
) -> UUID:
    """Record a hold on every orphan that no open hold is about."""
    hold_id = uuid4()
    evidence = {
        "counted": silence.counted,
        "silent_workers": silence.silent_workers,
        "workers": silence.workers,
        "orphans": silence.orphans,
        "some_silent_workers": silence.some,
        "silent_since": silence.last and iso(silence.last),
        "first_silent_since": silence.first and iso(silence.first),
        "server_started_at": iso(now.server_started_at),
        "last_sweep_at": now.last_sweep_at and iso(now.last_sweep_at),
        "failed_over": now.failed_over_for is not None,
        "threshold_minutes": request.minutes,
        "hold_share": request.target.hold_share,
    }
    await db.execute(
        insert(holds).values(
            hold_id=hold_id,
            target=request.target.name,
            sweep_id=request.sweep_id,
            opened_at=NOW,
            evidence=evidence,
        )
    )
    table = await runs_table(db, request.target)
    found = orphans(table, request).where(only, ~_in_open_hold(table, request.target)).subquery()
    await db.execute(
        insert(hold_runs).from_select(
            ["hold_id", "run_id"], select(literal(hold_id, hold_runs.c.hold_id.type), found.c.id)
        )
    )
    return hold_id


async def _are_open(db: Executor, target: Target) -> tuple[int, int | None]:
    """How many holds are open, and how many workers there were at most when they were opened."""
    workers = cast(holds.c.evidence["workers"].astext, Integer)
    is_open = select(func.count(), func.max(workers)).where(
        holds.c.target == target.name, holds.c.ended_at.is_(None)
    )
    count, workers_then = (await db.execute(is_open)).one()
    return count, workers_then


async def _are_over(
    db: Executor, request: SweepRequest, silence: Silence, workers_then: int | None
) -> bool:
    """Whether the open holds are to be closed by a sweep that sees no more than that silent."""
    if not request.is_whole:
        return False
    table = await runs_table(db, request.target)
    named = await look_at_silence(db, request, _in_open_hold(table, request.target))
    return not named.orphans or silence.is_over(request.target, workers_then)


async def _close_all(db: Executor, request: SweepRequest) -> None:
    """The fleet has recovered: close every open hold of the target.

    It was released if a run of it was marked under an approval; else it recovered by itself.
    """
    marked = (
        select(approvals.c.hold_id)
        .select_from(
            approvals.join(hold_runs, hold_runs.c.hold_id == approvals.c.hold_id).join(
                verdicts, verdicts.c.run_id == hold_runs.c.run_id
            )
        )
        .where(
            approvals.c.hold_id == holds.c.hold_id,
            verdicts.c.target == holds.c.target,
            verdicts.c.outcome == Outcome.MARKED.value,
            verdicts.c.judged_at >= approvals.c.approved_at,
        )
        .correlate(holds)
        .exists()
    )
    await db.execute(
        update(holds)
        .where(holds.c.target == request.target.name, holds.c.ended_at.is_(None))
        .values(
            ended_at=NOW,
            ended_as=case((marked, literal("released")), else_=literal("recovered")),
            ended_by=request.sweep_id,
        )
    )


async def _standing(db: Executor, target: Target) -> list[tuple[UUID, datetime, dict[str, Any]]]:
    """The open holds that no valid approval releases, the latest first."""
    statement = (
        select(holds.c.hold_id, holds.c.opened_at, holds.c.evidence)
        .where(holds.c.target == target.name, holds.c.ended_at.is_(None), ~_released())
        .order_by(holds.c.opened_at.desc())
    )
    return [(row[0], row[1], row[2]) for row in await db.execute(statement)]


def _released(of: FromClause = holds) -> ColumnElement[bool]:
    return (
        select(approvals.c.hold_id)
        .where(approvals.c.hold_id == of.c.hold_id, approvals.c.expires_at > NOW)
        .exists()
    )


# By names of ours: the runs table may be called as the ledger's are, in another schema.
_HOLDS: Final = holds.alias("orphan_recovery_holds")
_HOLD_RUNS: Final = hold_runs.alias("orphan_recovery_hold_runs")


def _open_runs(table: RunsTable, target: Target) -> Select[Any]:
    return (
        select(_HOLD_RUNS.c.run_id)
        .select_from(_HOLD_RUNS.join(_HOLDS, _HOLDS.c.hold_id == _HOLD_RUNS.c.hold_id))
        .where(
            _HOLDS.c.target == target.name,
            _HOLDS.c.ended_at.is_(None),
            _HOLD_RUNS.c.run_id == table.run_id,
            # What was heard of since may be another attempt, of whose death nobody has judged.
            table.sign_of_life <= _HOLDS.c.opened_at,
        )
    )


def _in_open_hold(table: RunsTable, target: Target) -> ColumnElement[bool]:
    return _open_runs(table, target).correlate(table.table).exists()


def _blocked(table: RunsTable, target: Target) -> ColumnElement[bool]:
    """Whether a run is in an open hold that nobody has released."""
    return _open_runs(table, target).where(~_released(_HOLDS)).correlate(table.table).exists()
