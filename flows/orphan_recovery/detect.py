"""Detect: which runs in flight have been silent for the threshold or longer.

What it can wrongly do is take age for death: a run that never beats shows only when it was
created and started, so a threshold below the longest honest run condemns a live one. Let workers
beat (``heartbeat_at``), or set the threshold above the longest run. Nothing is decided here for
good: marking repeats the whole predicate under a lock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Select,
    Text,
    and_,
    case,
    false,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP, aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncSession

from orphan_recovery.database import NOW, Executor, Span
from orphan_recovery.describe import runs_table
from orphan_recovery.request import SweepRequest
from orphan_recovery.rules import in_words, number_of, reason_of, shortest, threshold_of
from orphan_recovery.run import Evidence, WorkerRun
from orphan_recovery.runs import TIMES, RunsTable
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target
from orphan_recovery.targets import ORPHAN_THRESHOLD_MINUTES

Among = Callable[[RunsTable], ColumnElement[bool]]
"""Which runs, of a table that is not known yet."""

_AWARE = TIMESTAMP(timezone=True)
_EVIDENCE: Final = {evidence.value: evidence for evidence in Evidence}


async def detect_orphaned_runs(
    session: AsyncSession, threshold_minutes: int = ORPHAN_THRESHOLD_MINUTES
) -> list[WorkerRun]:
    """The orphans now, oldest sign of life first, of the target that is meant by default.

    Args:
        session: on the database that holds the runs, by SQLAlchemy's psycopg dialect. It is only
            read from; nothing is set, locked or committed.
        threshold_minutes: the silence that makes an orphan, in whole minutes, at least 1.

    Returns:
        One frozen snapshot for each orphan; an empty list if there is none. All of them carry
        the same new ``sweep_id``, under which :func:`mark_run_as_crashed` records its verdicts.

    Raises:
        ConfigurationError: the threshold, the table, or the session cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    request = SweepRequest(threshold_minutes=threshold_minutes, asked_by="detect_orphaned_runs")
    return await detect(session, request)


async def detect(
    db: Executor,
    request: SweepRequest,
    *,
    after: WorkerRun | None = None,
    page: int | None = None,
    among: Among | None = None,
) -> list[WorkerRun]:
    """The orphans within ``request``'s scope, oldest sign of life first. Reads only.

    Args:
        db: where to read.
        request: threshold and scope; its ``limit`` is a bound here too.
        after: go on behind this one, in the same order. Keys, not offsets: runs that stay
            orphans (because they cannot be marked) never starve the rest.
        page: at most so many rows.
        among: only runs for which this holds.

    Returns:
        One frozen snapshot for each of them; an empty list if there is none, or none behind
        ``after``.

    Raises:
        ConfigurationError: the table cannot be used, or has no column for the scope.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    runs = await runs_table(db, request.target)
    if after is None:
        statement = _first(runs, replace(request, sweep_id=UUID(int=0), asked_by="anybody"))
    else:
        statement = orphans(runs, request, after=after)
    if among is not None:
        statement = statement.where(among(runs))
    bounds = [n for n in (page, request.limit) if n is not None]
    if bounds:
        statement = statement.limit(min(bounds))
    rows = await db.execute(statement)
    names = tuple(rows.keys())
    return [snapshot(request, dict(zip(names, row, strict=True))) for row in rows]


@lru_cache(maxsize=64)
def _first(runs: RunsTable, request: SweepRequest) -> Select[Any]:
    """Built once for all sweeps that ask for the same: else it takes as long as a small look."""
    return orphans(runs, request)


def orphans(
    runs: RunsTable, request: SweepRequest, *, after: WorkerRun | None = None
) -> Select[Any]:
    """The statement that finds orphans. Served by a partial index of what is in flight."""
    threshold = threshold_of(runs, request)
    statement = (
        select(
            runs.run_id.label("id"),
            *(runs.text(role).label(role) for role in ("status", "worker_id", "tenant_id")),
            *(runs.text(role).label(role) for role in ("task", "parent_run_id")),
            *(runs.plain(role).label(role) for role in ("attempt", "is_retry")),
            *(runs.utc(role).label(role) for role in TIMES),
            runs.worker_seen_at.label("worker_seen_at"),
            runs.sign_of_life.label("sign_of_life"),
            runs.evidence.label("evidence"),
            threshold.label("threshold"),
            number_of(runs, request).label("rule"),
            NOW.label("seen_at"),
        )
        .select_from(runs.reads_from())
        # In database time; and what is terminal never comes up.
        .where(runs.in_flight)
        .where(
            runs.silent_since(NOW - threshold, NOW - literal(shortest(request), Span))
        )  # database time
        .where(~runs.is_locked)  # a lock is proof of life
        .order_by(runs.sign_of_life, *runs.key)  # longest silence first; ties always the same way
    )
    statement = statement.where(*_scope(runs, request))
    if after is not None:
        last = (literal(after.sign_of_life, _AWARE), *runs.key_of(literal(after.id, Text)))
        statement = statement.where(tuple_(runs.sign_of_life, *runs.key) > tuple_(*last))
    return statement


def _scope(runs: RunsTable, request: SweepRequest) -> list[ColumnElement[bool]]:
    conditions = []
    for role, name in (("tenant_id", request.tenant), ("worker_id", request.worker)):
        if name is None:
            continue
        if not runs.has(role):
            raise ConfigurationError(
                f"only {role} {name!r} was asked for, but target {runs.target.name!r} has no "
                f"column for {role}: name it under columns, or ask for the whole table"
            )
        conditions.append(runs.is_same(role, literal(name, Text)))
    return conditions


def snapshot(request: SweepRequest, row: dict[str, Any]) -> WorkerRun:
    """A run as a row of :func:`orphans` shows it."""
    row["evidence"] = _EVIDENCE[row["evidence"]]
    for name in (*TIMES, "worker_seen_at", "sign_of_life", "seen_at"):  # from session's TimeZone
        row[name] = row[name] and row[name].astimezone(UTC)
    number = row.pop("rule")
    return WorkerRun(
        target=request.target.name,
        rule=in_words(request, number, row["evidence"]),
        rule_reason=reason_of(request.target, number),
        sweep_id=request.sweep_id,
        **row,
    )


@dataclass(frozen=True, slots=True)
class Fleet:
    """All that is in flight, and the part of it that silence cannot judge."""

    in_flight: int
    orphans: int
    """Runs that have been silent for their threshold or longer."""
    beating: int
    """Those of them that have beaten once: their last sign of life is a heartbeat."""
    undatable: int
    """Runs without any sign of life: all the times that would show one are empty."""
    ahead: int
    """Runs whose last sign of life is in the database's future: a worker with a wrong clock."""
    ahead_workers: list[str]
    """Up to ten of the workers that hold the latter."""
    exempt: int
    """Runs that a rule with ``never`` keeps from being judged."""
    seen_at: datetime


async def look_at_fleet(db: Executor, request: SweepRequest) -> Fleet:
    """Count the runs in flight, and those whose silence cannot be judged. Reads only.

    Neither undatable nor ahead runs are marked, so each sweep has to say that they are there:
    else an orphan among them would be silently lost.

    Args:
        db: where to read.
        request: threshold, rules and scope: what is out of scope is not counted.

    Returns:
        The counts, in runs; all 0 where nothing is in flight.

    Raises:
        ConfigurationError: the table cannot be used, or has no column for the scope.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    runs = await runs_table(db, request.target)
    beats = [time.label(f"beat_{n}") for n, time in enumerate(runs.beats.values())]
    locks = [runs.is_locked.label("is_locked"), runs.is_held.label("is_held")]
    run = _each_once(
        select(
            runs.sign_of_life.label("sign"),
            threshold_of(runs, request).label("threshold"),
            *(beats if runs.target.lock is None else beats + locks),
        )
        .select_from(runs.reads_from())
        .where(runs.in_flight, *_scope(runs, request))
    )
    silent, beaten = run.sign <= NOW - run.threshold, [run[b.name] == run.sign for b in beats]
    if runs.target.lock is not None:  # as the evidence has it
        silent, beaten = and_(silent, ~run.is_locked), [*beaten, run.is_held]
    # A minute of grace: a beat that was written while this statement began is no wrong clock.
    too_late = NOW + timedelta(minutes=1)
    statement = select(
        func.count().label("in_flight"),
        func.count().filter(silent).label("orphans"),
        func.count().filter(silent, or_(false(), *beaten)).label("beating"),
        func.count().filter(run.sign.is_(None)).label("undatable"),
        func.count().filter(run.sign > too_late).label("ahead"),
        func.count().filter(run.threshold.is_(None)).label("exempt"),
        NOW.label("seen_at"),
    )
    row = (await db.execute(statement)).mappings().one()
    workers = list[str]()
    if row["ahead"]:  # asked for by itself, for it takes a sort of all that is in flight
        named = runs.text("worker_id").label("worker")
        ahead = runs.sign_of_life > too_late
        whose = select(named).select_from(runs.reads_from()).where(runs.in_flight, ahead)
        whose = whose.where(*_scope(runs, request), named.is_not(None)).distinct()
        workers = list((await db.execute(whose.order_by(named).limit(10))).scalars())
    return Fleet(**row, ahead_workers=workers)


def _each_once(rows: Select[Any]) -> Any:
    """Columns of ``rows``, each worked out once a row, however often it is named: the server would
    else put its expression in each place where it is, and OFFSET keeps it from that."""
    return rows.offset(0).subquery().c


@dataclass(frozen=True, slots=True)
class Silence:
    """How much of the fleet is silent. Counted in workers; in runs where no worker is kept."""

    orphans: int
    """In runs."""
    counted: str
    """``workers``; or ``runs``, where the table keeps no worker."""
    workers: int
    """All that hold a run in flight."""
    silent_workers: int
    """Those of them that hold an orphan, and of whom nothing was heard by any other run either."""
    some: list[str]
    """Up to ten of the latter."""
    first: datetime | None
    """The earliest last sign of life of an orphan."""
    last: datetime | None
    """The latest."""

    def is_too_much(self, target: Target, fleet: int | None = None) -> bool:
        """Whether it is more than this target is to believe without a person.

        Args:
            target: its share and its least sample.
            fleet: workers of the whole fleet, where this is what is left beside a hold.
        """
        enough = (self.workers if fleet is None else fleet) >= target.hold_least_workers
        return enough and self.silent_workers > target.hold_share * self.workers

    def in_words(self) -> str:
        return f"{self.silent_workers} of {self.workers} {self.counted} look dead"

    def is_over(self, target: Target, workers_then: int | None) -> bool:
        """Whether a fleet has recovered of which too much was silent.

        Its least sample plays no part, and workers that came since prove nothing about the others.

        Args:
            target: its share.
            workers_then: how many it had when it was held, if that is known.
        """
        workers = self.workers if workers_then is None else min(self.workers, workers_then)
        return self.silent_workers <= target.hold_share * workers


async def look_at_silence(
    db: Executor, request: SweepRequest, among: ColumnElement[bool] | None = None
) -> Silence:
    """Count the workers that look dead, and all. Reads only.

    Args:
        db: where to read.
        request: threshold, rules and scope. What is out of scope is none of the silent, and part
            of the whole: a sweep of one worker's runs is no danger to a fleet.
        among: count only runs for which this holds.

    Returns:
        The counts; all 0, and no times, where nothing is in flight.

    Raises:
        ConfigurationError: the table cannot be used, or has no column for the scope.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    runs = await runs_table(db, request.target)
    # What is out of scope is no orphan of this sweep, and no sign of life either; nor is a run that
    # is exempt, or may be silent for longer. A lock that is held is one.
    is_in_scope = and_(true(), *_scope(runs, request))
    row = _each_once(
        select(
            _who_is_counted(runs).label("worker"),
            func.coalesce(~runs.is_locked, false()).label("proves_nothing"),
            func.coalesce(is_in_scope, false()).label("is_in_scope"),
            runs.sign_of_life.label("sign"),
            threshold_of(runs, request).label("threshold"),
        )
        .select_from(runs.reads_from())
        .where(runs.in_flight, *([] if among is None else [among]))
    )
    overdue = and_(row.sign <= NOW - row.threshold, row.proves_nothing, row.is_in_scope)
    run = _each_once(select(*row, overdue.label("silent")))
    each = (
        select(
            run.worker,
            func.count().filter(run.silent).label("orphans"),
            and_(
                func.bool_and(run.proves_nothing),
                func.max(run.sign) <= NOW - func.min(run.threshold).filter(run.silent),
            ).label("is_silent"),
            func.min(run.sign).filter(run.silent).label("first"),
            func.max(run.sign).filter(run.silent).label("last"),
        )
        .group_by(run.worker)
        .subquery()
    )
    dead = each.c.is_silent & each.c.worker.is_not(None)
    names = func.array_agg(aggregate_order_by(each.c.worker, each.c.worker)).filter(dead)
    statement = select(
        func.coalesce(func.sum(each.c.orphans), 0).label("orphans"),
        func.count(each.c.worker).label("workers"),
        func.count().filter(dead).label("silent_workers"),
        func.coalesce(names[1:10], []).label("some"),
        func.min(each.c.first).label("first"),
        func.max(each.c.last).label("last"),
    )
    row = (await db.execute(statement)).mappings().one()
    counted = "workers" if runs.has("worker_id") else "runs"
    return Silence(counted=counted, **{**row, "orphans": int(row["orphans"])})


def _who_is_counted(runs: RunsTable) -> ColumnElement[str]:
    """The worker of each run; NULL for a run that nobody has taken yet.

    One that has beaten, and does not say whose it is, counts as a worker of its own: else a fleet
    that leaves the column empty would be none, of which nothing is ever too much.
    """
    if not runs.has("worker_id"):
        return runs.run_id
    has_beaten = or_(false(), *(time.is_not(None) for time in runs.beats.values()))
    return func.coalesce(runs.text("worker_id"), case((has_beaten, runs.run_id)))
