"""Detect: which runs in flight have been silent for the threshold or longer.

What it can wrongly do is take age for death: a run that never beats shows only when it was
created and started, so a threshold below the longest honest run condemns a live one. Let workers
beat (``heartbeat_at``), or set the threshold above the longest run. Nothing is decided here for
good: marking repeats the whole predicate under a lock.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select, Text, func, literal, select, tuple_
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncSession

from orphan_recovery import ORPHAN_THRESHOLD_MINUTES
from orphan_recovery.database import Executor
from orphan_recovery.request import SweepRequest
from orphan_recovery.rules import in_words, number_of, reason_of, shortest, threshold_of
from orphan_recovery.run import Evidence, WorkerRun
from orphan_recovery.runs import TIMES, RunsTable, runs_table
from orphan_recovery.settings import ConfigurationError

_AWARE = TIMESTAMP(timezone=True)


async def detect_orphaned_runs(
    session: AsyncSession, threshold_minutes: int = ORPHAN_THRESHOLD_MINUTES
) -> list[WorkerRun]:
    """The orphans now, oldest sign of life first, of the target that is meant by default.

    Args:
        session: any session on the database that holds the runs. It is only read from; nothing
            is set, locked or committed.
        threshold_minutes: the silence that makes an orphan, in whole minutes, at least 1.

    Returns:
        One frozen snapshot for each orphan; an empty list if there is none. All of them carry
        the same new ``sweep_id``, under which :func:`mark_run_as_crashed` records its verdicts.

    Raises:
        ConfigurationError: the threshold, or the table, cannot be used.
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
) -> list[WorkerRun]:
    """The orphans within ``request``'s scope, oldest sign of life first. Reads only.

    Args:
        db: where to read.
        request: threshold and scope; its ``limit`` is a bound here too.
        after: go on behind this one, in the same order. Keys, not offsets: runs that stay
            orphans (because they cannot be marked) never starve the rest.
        page: at most so many rows.
    """
    runs = await runs_table(db, request.target)
    statement = orphans(runs, request, after=after)
    bounds = [n for n in (page, request.limit) if n is not None]
    if bounds:
        statement = statement.limit(min(bounds))
    rows = (await db.execute(statement)).mappings()
    return [_snapshot(request, dict(row)) for row in rows]


def orphans(
    runs: RunsTable, request: SweepRequest, *, after: WorkerRun | None = None
) -> Select[Any]:
    """The statement that finds orphans. Served by a partial index of what is in flight."""
    now = func.statement_timestamp(type_=_AWARE)
    threshold = threshold_of(runs, literal(request.threshold))
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
            number_of(runs).label("rule"),
            now.label("seen_at"),
        )
        .select_from(runs.reads_from())
        .where(runs.in_flight)  # what is terminal never comes up
        .where(runs.silent_since(now - threshold, now - shortest(request)))  # database time
        .order_by(runs.sign_of_life, *runs.key)  # longest silence first; ties always the same way
    )
    statement = _within(statement, runs, request)
    if after is not None:
        last = (literal(after.sign_of_life, _AWARE), *runs.key_of(literal(after.id, Text)))
        statement = statement.where(tuple_(runs.sign_of_life, *runs.key) > tuple_(*last))
    return statement


def _within(statement: Select[Any], runs: RunsTable, request: SweepRequest) -> Select[Any]:
    for role, name in (("tenant_id", request.tenant), ("worker_id", request.worker)):
        if name is None:
            continue
        if not runs.has(role):
            raise ConfigurationError(
                f"only {role} {name!r} was asked for, but target {runs.target.name!r} has no "
                f"column for {role}: name it under columns, or ask for the whole table"
            )
        statement = statement.where(runs.text(role) == name)
    return statement


def _snapshot(request: SweepRequest, row: dict[str, Any]) -> WorkerRun:
    row["evidence"] = Evidence(row["evidence"])
    for name in (*TIMES, "worker_seen_at", "sign_of_life", "seen_at"):  # from session's TimeZone
        row[name] = row[name] and row[name].astimezone(UTC)
    number = row.pop("rule")
    return WorkerRun(
        target=request.target.name,
        rule=in_words(request.target, number),
        rule_reason=reason_of(request.target, number),
        sweep_id=request.sweep_id,
        **row,
    )


@dataclass(frozen=True, slots=True)
class Fleet:
    """All that is in flight, and the part of it that silence cannot judge."""

    in_flight: int
    undatable: int
    """Runs without any sign of life: no created_at, no started_at, no heartbeat_at."""
    ahead: int
    """Runs whose last sign of life is in the database's future: a worker with a wrong clock."""
    ahead_workers: list[str]
    """Up to ten of the workers that hold the latter."""
    exempt: int
    """Runs that a rule with ``never`` keeps from being judged."""
    seen_at: datetime


async def look_at_fleet(db: Executor, request: SweepRequest) -> Fleet:
    """Count the runs in flight, and those whose silence cannot be judged. Reads only.

    Neither kind is marked, so each sweep has to say that they are there: else an orphan among
    them would be silently lost.
    """
    runs = await runs_table(db, request.target)
    now = func.statement_timestamp(type_=_AWARE)
    # A minute of grace: a beat that was written while this statement began is no wrong clock.
    ahead = runs.sign_of_life > now + timedelta(minutes=1)
    workers = func.array_agg(runs.text("worker_id").distinct()).filter(ahead)
    threshold = threshold_of(runs, literal(request.threshold))
    statement = (
        select(
            func.count().label("in_flight"),
            func.count().filter(runs.sign_of_life.is_(None)).label("undatable"),
            func.count().filter(ahead).label("ahead"),
            func.coalesce(workers, []).label("ahead_workers"),
            func.count().filter(threshold.is_(None)).label("exempt"),
            now.label("seen_at"),
        )
        .select_from(runs.reads_from())
        .where(runs.in_flight)
    )
    row = (await db.execute(_within(statement, runs, request))).mappings().one()
    workers_ahead = sorted(w for w in row["ahead_workers"] if w is not None)[:10]
    return Fleet(**{**row, "ahead_workers": workers_ahead})
