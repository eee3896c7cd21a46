"""Summarize: what stands crashed in all, for an operations dashboard. Reads only.

The hazard is a lost database that looks like a quiet day: an error is raised here, never turned
into a count of none.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from orphan_recovery.database import Executor, make_engine, transaction
from orphan_recovery.report import iso
from orphan_recovery.runs import RunStatus, runs_table


async def get_crash_recovery_summary() -> dict[str, Any]:
    """What stands crashed, for an operations dashboard. Opens its own session; reads only.

    Returns:
        ``total_crashed``: crashed runs in the table, in runs. ``recent_crashes``: the newest ten,
        newest first, each with ``run_id``, ``worker_id``, ``tenant_id``, ``created_at``,
        ``crashed_at`` (ISO 8601 texts in UTC, or None) and ``error``. It is ready for JSON.

    Raises:
        ConfigurationError: the address or the table cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    engine = make_engine()
    try:
        async with transaction(engine) as connection:
            return await crash_summary(connection)
    finally:
        await engine.dispose()


async def crash_summary(db: Executor) -> dict[str, Any]:
    """The same on a connection or session of the caller's."""
    table = await runs_table(db)
    crashed = table.columns.status == RunStatus.CRASHED.value
    total = await db.execute(select(func.count()).select_from(table.table).where(crashed))
    newest = await db.execute(
        select(
            table.text("id").label("run_id"),
            table.text("worker_id").label("worker_id"),
            table.text("tenant_id").label("tenant_id"),
            table.utc("created_at").label("created_at"),
            table.utc("completed_at").label("crashed_at"),
            table.text("error").label("error"),
        )
        .where(crashed)
        # Served by worker_runs_crashed.
        .order_by(table.columns.completed_at.desc().nulls_last(), table.columns.id)
        .limit(10)
    )
    return {
        "total_crashed": total.scalar_one(),
        "recent_crashes": [
            {k: iso(v) if isinstance(v, datetime) else v for k, v in row.items()}
            for row in newest.mappings()
        ],
    }
