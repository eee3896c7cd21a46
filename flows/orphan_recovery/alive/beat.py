"""Beat: the statements that give a sign of life, and say what became of a run that is lost.

The hazard is a beat that revives what is dead: so it writes only to a run that is in flight and
still this worker's. A row that somebody holds is passed over, not waited for: one that is held
for long must not keep the others from beating.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    RowMapping,
    Select,
    Text,
    and_,
    column,
    func,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql.selectable import TableValuedAlias

from orphan_recovery.alive.lost import LostBy, RunLost
from orphan_recovery.database import NOW, Span, describe, transaction
from orphan_recovery.describe import runs_table
from orphan_recovery.policy import is_outage
from orphan_recovery.request import SweepRequest
from orphan_recovery.rules import threshold_of
from orphan_recovery.runs import RunsTable, stored
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target
from orphan_recovery.targets import where

REFUSALS: Final = (DBAPIError, UnicodeError)
"""What the database, or already the way to it, raises for a run that it does not take: half of a
character, such as a file's name may have, cannot even be sent."""

Run = tuple[str, str | None]
"""A run's key as it was given, and its worker."""


@dataclass(frozen=True, slots=True)
class Beaten:
    """What one beat proved."""

    thresholds: dict[Run, timedelta | None]
    """The runs that are still their worker's, with their thresholds; None: never an orphan."""
    lost: dict[Run, RunLost]
    refused: dict[Run, str]
    """Runs for which the database could not be asked, such as by a key that is none; and why."""


def require_beat(table: RunsTable) -> None:
    """Refuse a target that has no place for a beat.

    Raises:
        ConfigurationError: it has neither a heartbeat column nor a table of workers.
    """
    if not table.has("heartbeat_at") and "worker_heartbeat" not in table.elsewhere:
        raise ConfigurationError(
            f"{where(table.target)} has no place for a beat: name a column as heartbeat_at under "
            "columns, or a worker_heartbeat"
        )


async def beat_for(
    engine: AsyncEngine, target: Target, runs: Sequence[Run], beaten: Beaten
) -> None:
    """Give a sign of life for each of ``runs``. Commits.

    Args:
        engine: where the runs are.
        target: whose they are.
        runs: as in :func:`beat`.
        beaten: is told what :func:`beat` returns, and what was refused, part by part: what has
            come through by then is so whatever happens to the rest.

    Raises:
        ConfigurationError: the target does not fit, or has no place for a beat.
        sqlalchemy.exc.DBAPIError: as the database raised it, where it was about no single run.
    """

    async def give(some: Sequence[Run]) -> None:
        async with transaction(engine) as db:
            table = await runs_table(db, target, anew=True)
            require_beat(table)
            told = await beat(db, table, some)
        beaten.thresholds.update(told.thresholds)
        beaten.lost.update(told.lost)

    await one_by_one_at_worst(give, runs, beaten.refused)


async def one_by_one_at_worst(
    do: Callable[[Sequence[Run]], Awaitable[None]], runs: Sequence[Run], refused: dict[Run, str]
) -> None:
    """Do something for all runs at once; where it fails, for halves, down to the one that is at
    fault: it must not keep the others from beating.

    Args:
        do: it.
        runs: for these.
        refused: is told of the runs for which it fails alone, and why.

    Raises:
        sqlalchemy.exc.DBAPIError: the database is away, or refuses it for every run.
        UnicodeError: every run has a name that is no text.
    """
    try:
        await do(runs)
    except REFUSALS as error:
        if is_outage(error) or len(runs) == 1:
            raise
        middle, failed = len(runs) // 2, 0
        for half in (runs[:middle], runs[middle:]):
            try:
                await one_by_one_at_worst(do, half, refused)
            except REFUSALS as reason:
                if is_outage(reason):
                    raise
                failed += 1
                for run in half:
                    refused.setdefault(run, describe(reason))
        if failed == 2:
            raise


async def beat(db: AsyncConnection, table: RunsTable, runs: Sequence[Run]) -> Beaten:
    """Give a sign of life for each of ``runs``. Does not commit.

    Args:
        db: an open transaction.
        table: the target's table.
        runs: the key of each run as text, and its worker; None for a worker that is not checked.

    Returns:
        What is still this worker's and what is lost. A row that somebody holds is in neither.
    """
    rows = (await db.execute(_beat(table, runs))).mappings()
    thresholds = {(row["run_id"], row["held_by"]): row["threshold"] for row in rows}
    left = [run for run in runs if run not in thresholds]
    lost: dict[Run, RunLost] = {}
    if left:
        for row in (await db.execute(look(table, left))).mappings():
            by = lost_by(row)
            if by is not None:
                lost[row["run_id"], row["held_by"]] = RunLost(row["run_id"], by, found(row))
    return Beaten(thresholds, lost, {})


def _beat(table: RunsTable, runs: Sequence[Run]) -> Select[Any]:
    seen = _as_held(runs)
    threshold = threshold_of(table, SweepRequest(asked_by="beat", target=table.target))
    kept = None if table.has("heartbeat_at") else table.elsewhere["worker_heartbeat"]
    held = (
        select(
            *(own.label(f"key_{n}") for n, own in enumerate(table.key)),
            seen.c.run_id,
            seen.c.worker_id.label("held_by"),
            threshold.label("threshold"),
            *([] if kept is None else [kept.our_key.label("worker")]),
        )
        .select_from(table.table.join(seen, table.is_row(seen.c.run_id)))
        .where(*guards(table, seen.c.worker_id).values())
        .order_by(*table.key)
        .with_for_update(of=table.table, key_share=True, skip_locked=True)
        .cte("orphan_recovery_held")
    )
    if kept is None:
        beaten = (
            update(table.table)
            .where(*(own == held.c[f"key_{n}"] for n, own in enumerate(table.key)))
            .values({table.columns.heartbeat_at: table.stored("heartbeat_at", NOW)})
            .returning(*(own.label(f"key_{n}") for n, own in enumerate(table.key)))
            .cte("orphan_recovery_beaten")
        )
        same = and_(*(held.c[f"key_{n}"] == beaten.c[f"key_{n}"] for n, _ in enumerate(table.key)))
        return select(held.c.run_id, held.c.held_by, held.c.threshold).join_from(held, beaten, same)
    free = (  # only workers beat: one write for each that holds any of the runs
        select(kept.their_key.label("worker"))
        .where(kept.their_key.in_(select(held.c.worker)))
        .order_by(kept.their_key)
        .with_for_update(of=kept.table, key_share=True, skip_locked=True)
        .cte("orphan_recovery_free")
    )
    workers = (
        update(kept.table)
        .where(kept.their_key.in_(select(free.c.worker)))
        .values({kept.table.c.last_seen: stored(NOW, kept.last_seen)})
        .returning(kept.their_key.label("worker"))
        .cte("orphan_recovery_workers")
    )
    return select(held.c.run_id, held.c.held_by, held.c.threshold).where(
        held.c.worker.in_(select(workers.c.worker))
    )


def look(table: RunsTable, runs: Sequence[Run], status: str | None = None) -> Select[Any]:
    """The rows of ``runs`` as they stand, and whether each is its worker's own.

    Args:
        table: the target's table.
        runs: as in :func:`beat`.
        status: what an earlier try would have written: then also whether the row is ``as_left`` by
            that, and when the run ``went_on_at``, if it did so after a verdict.
    """
    seen = _as_held(runs)
    own = is_own(table, seen.c.worker_id)
    tried: list[ColumnElement[Any]] = []
    if status is not None:
        tried.append(and_(own, table.has_status(status)).label("as_left"))
        tried.append(_went_on_at(table).label("went_on_at"))
    return (
        select(
            seen.c.run_id,
            seen.c.worker_id.label("held_by"),
            table.run_id.label("key"),
            _written(table, seen.c.worker_id).label("held_as"),
            table.key[0].is_(None).label("vanished"),
            table.in_flight.label("in_flight"),
            table.is_crashed.label("is_crashed"),
            table.text("status").label("status"),
            table.text("worker_id").label("worker_id"),
            table.text("completed_at").label("completed_at"),
            table.text("error").label("error"),
            own.label("own"),
            *tried,
        )
        .select_from(seen.join(table.table, table.is_row(seen.c.run_id), isouter=True))
        .order_by(seen.c.run_id)
    )


def guards(table: RunsTable, worker_id: ColumnElement[Any]) -> dict[str, ColumnElement[bool]]:
    """What a run must be for its worker to write to it: a beat, or a result."""
    return {
        # It was marked, or has ended.
        "in flight": table.in_flight,
        # It changed hands.
        "own": is_own(table, worker_id),
    }


def is_own(table: RunsTable, worker_id: ColumnElement[Any]) -> ColumnElement[bool]:
    """Whether the run is that worker's; always, where no worker is named or none is kept."""
    if not table.has("worker_id"):
        return true()
    return or_(worker_id.is_(None), table.is_same("worker_id", worker_id))


def _written(table: RunsTable, worker_id: ColumnElement[Any]) -> ColumnElement[str]:
    """A worker as the table writes it, by which a sweep knows it."""
    return table.as_written("worker_id", worker_id) if table.has("worker_id") else worker_id


def _went_on_at(table: RunsTable) -> ColumnElement[datetime | None]:
    """A time that is later than a verdict only where the run went on after it: a queue may have
    tried it again in its own row.

    A mark writes its own time as the run's end, which the column may round up, or a trigger set a
    moment later. Where no end is kept, who beats tells: but a beat that does not ask for the status
    also comes to a run that stands crashed, so it tells nothing where there is an end.
    """
    end: ColumnElement[Any] = table.shown("heartbeat_at")
    if table.has("completed_at"):
        end = table.shown("completed_at") - literal(timedelta(seconds=1), Span)
    return func.greatest(table.shown("started_at"), end)


def lost_by(row: RowMapping) -> LostBy | None:
    """How a run was lost, from its row as it stands; None if it is not."""
    if row["vanished"]:
        return LostBy.VANISHED
    if row["is_crashed"]:
        return LostBy.MARKED
    if not row["in_flight"]:
        return LostBy.FINISHED
    return None if row["own"] else LostBy.CHANGED_HANDS


def found(row: RowMapping) -> dict[str, Any]:
    """The row as it stood, for a person."""
    return {name: row[name] for name in ("status", "worker_id", "completed_at", "error")}


def _as_held(runs: Sequence[Run]) -> TableValuedAlias:
    ids = literal([run_id for run_id, _ in runs], ARRAY(Text()))
    workers = literal([worker_id for _, worker_id in runs], ARRAY(Text()))
    names = (column("run_id", Text()), column("worker_id", Text()))
    return (
        func.unnest(ids, workers).table_valued(*names, name="orphan_recovery_seen").render_derived()
    )
