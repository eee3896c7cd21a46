"""Summarize: what stands crashed in all, for an operations dashboard. Reads only.

The hazard is a lost database that looks like a quiet day: an error is raised here, never turned
into a count of none.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, RowMapping, Select, func, literal, select

from orphan_recovery.database import NOW, Executor, Span, address, make_engine, transaction
from orphan_recovery.describe import runs_table
from orphan_recovery.doubt import CONTESTS_WITHIN
from orphan_recovery.ledger import SAME_VERDICT, SCHEMA, contests, ledger_there, verdicts
from orphan_recovery.runs import RunsTable
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target
from orphan_recovery.verdict import Outcome
from orphan_recovery.words import iso

NEWEST: Final = 10
"""Crashes that are told one by one."""


async def get_crash_recovery_summary() -> dict[str, Any]:
    """What stands crashed, for an operations dashboard. Opens its own session; reads only.

    Of the target that is meant by default.

    Returns:
        ``total_crashed``: crashed runs in the table, in runs. ``recent_crashes``: the newest ten,
        newest first, each with ``run_id``, ``worker_id``, ``tenant_id``, ``created_at``,
        ``crashed_at`` (ISO 8601 texts in UTC, or None) and ``error``. It is ready for JSON. Where
        the table has no status of its own for a crash, those count that the ledger has marked.
        ``contests``: how many verdicts of the last 30 days a worker that lived has contested: the
        measured rate of false positives, with ``verdicts, contested, rate, by_task, by_worker``;
        None without a ledger.

    Raises:
        ConfigurationError: the address or the table cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    return await summarize_target(find_target())


async def summarize_target(target: Target) -> dict[str, Any]:
    """As :func:`get_crash_recovery_summary`, for any target."""
    engine = make_engine(address(target))
    try:
        async with transaction(engine) as connection:
            return await crash_summary(connection, target)
    finally:
        await engine.dispose()


async def crash_summary(db: Executor, target: Target) -> dict[str, Any]:
    """The same on a connection or session of the caller's. Reads only.

    Raises:
        ConfigurationError: the table cannot be used, or there is no ledger.
        sqlalchemy.exc.DBAPIError: any database error.
    """
    table = await runs_table(db, target)
    own = target.crash_is_its_own_status
    async with ledger_there():
        total = await db.execute(_crashed(table) if own else _marked(target))
        # Where the rows do not say which are the newest, the ledger does.
        by_rows = own and table.has("completed_at")
        recent = await (_newest(db, table) if by_rows else _newest_of_ledger(db, table))
    return {
        "total_crashed": total.scalar_one(),
        "recent_crashes": [
            {k: iso(v) if isinstance(v, datetime) else v for k, v in row.items()} for row in recent
        ],
        "contests": await _contests(db, target),
    }


async def _contests(db: Executor, target: Target) -> dict[str, Any] | None:
    """How often verdicts were wrong, in all and where most often."""
    if await db.scalar(select(func.to_regclass(f"{SCHEMA}.contests"))) is None:
        return None
    total = (await db.execute(_rates(target))).mappings().one()
    told: dict[str, Any] = _rate(total)
    for name, side in {"by_task": verdicts.c.task, "by_worker": verdicts.c.worker_id}.items():
        told[name] = []
        if total["contested"]:  # else there is nothing to tell, and no need to look for it
            rows = (await db.execute(_rates(target, side))).mappings()
            told[name] = [_rate(row) for row in rows]
    return told


def _rates(target: Target, *by: ColumnElement[Any]) -> Select[Any]:
    contested = func.count(contests.c.run_id)
    statement = (
        select(*by, func.count().label("verdicts"), contested.label("contested"))
        .select_from(verdicts.join(contests, SAME_VERDICT, isouter=True))
        .where(*_of_late(target))
    )
    if by:
        statement = statement.group_by(*by).having(contested > 0).order_by(contested.desc(), *by)
    return statement.limit(10)


def _rate(row: RowMapping) -> dict[str, Any]:
    rate = row["contested"] / row["verdicts"] if row["verdicts"] else 0.0
    return {**row, "rate": round(rate, 6)}


def _crashed(table: RunsTable) -> Select[Any]:
    """How many rows stand crashed."""
    return select(func.count()).select_from(table.table).where(table.is_crashed)


def _marked(target: Target) -> Select[Any]:
    """How many runs the ledger has marked: the status alone does not tell a crash."""
    return select(func.count()).select_from(verdicts).where(*_of(target))


def _of(target: Target) -> list[ColumnElement[bool]]:
    return [verdicts.c.target == target.name, verdicts.c.outcome == Outcome.MARKED.value]


def _of_late(target: Target) -> list[ColumnElement[bool]]:
    since = NOW - literal(CONTESTS_WITHIN, Span)
    return [*_of(target), verdicts.c.judged_at > since]


async def _newest(db: Executor, table: RunsTable) -> Sequence[RowMapping]:
    """The newest of the rows that stand crashed."""
    statement = (
        select(
            table.run_id.label("run_id"),
            *(table.text(role).label(role) for role in ("worker_id", "tenant_id")),
            table.shown("created_at").label("created_at"),
            table.shown("completed_at").label("crashed_at"),
            table.error_text.label("error"),
        )
        .where(table.is_crashed)
        # Served by the partial index of what is crashed, read backwards.
        .order_by(table.plain("completed_at").desc().nulls_last(), *table.key)
        .limit(NEWEST)
    )
    return (await db.execute(statement)).mappings().all()


async def _newest_of_ledger(db: Executor, table: RunsTable) -> Sequence[RowMapping]:
    """The newest of the runs that the ledger has marked; mostly they are found among the verdicts
    of late, which an index knows."""
    for marked in (_of_late(table.target), _of(table.target)):
        newest = verdicts.c.judged_at.desc(), verdicts.c.run_id
        last = select(verdicts).where(*marked).order_by(*newest).limit(NEWEST).subquery()
        statement = (
            select(
                last.c.run_id,
                last.c.worker_id,
                last.c.tenant_id,
                table.shown("created_at").label("created_at"),
                last.c.judged_at.label("crashed_at"),
                func.coalesce(table.error_text, last.c.reason).label("error"),
            )
            .select_from(last.join(table.table, table.is_row(last.c.run_id), isouter=True))
            .order_by(last.c.judged_at.desc(), last.c.run_id)
        )
        found = (await db.execute(statement)).mappings().all()
        if len(found) == NEWEST:
            break
    return found
