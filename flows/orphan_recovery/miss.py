"""Miss: why a run was left alone, from its row and the ledger as they stand now.

The hazard is a name that does not fit: a run that another sweep marked, told as finished. So each
is compared with what detection saw, and with what the ledger has of it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import RowMapping, Select, Text, and_, cast, func, or_, select

from orphan_recovery.database import NOW, Executor
from orphan_recovery.ledger import verdicts
from orphan_recovery.request import SweepRequest
from orphan_recovery.rules import threshold_of
from orphan_recovery.run import WorkerRun
from orphan_recovery.runs import RunsTable
from orphan_recovery.seen import as_seen, snapshots
from orphan_recovery.verdict import Outcome, Verdict


async def name_misses(
    db: Executor, table: RunsTable, request: SweepRequest, runs: Sequence[WorkerRun]
) -> dict[str, Verdict | None]:
    """Say why each of ``runs`` was left alone, from the row and the ledger as they stand now.
    Reads only.

    Args:
        db: the transaction in which the mark found that they are no orphans.
        table: where they are.
        request: the sweep.
        runs: as it saw them.

    Returns:
        A verdict for each by its id; None where nothing has changed that explains it: as far as
        can be seen it is an orphan still.

    Raises:
        sqlalchemy.exc.DBAPIError: any database error.
    """
    statement = _look_anew(table, request)
    found_now = (await db.execute(statement, as_seen(request, runs))).mappings()
    rows = {row["run_id"]: row for row in found_now}
    named: dict[str, Verdict | None] = {}
    for run in runs:
        now = rows[run.id]
        outcome = _outcome_of_miss(now)
        found = {name: now[name] for name in ("status", "worker_id", "sign_of_life")}
        found["completed_at"] = now["completed_at"]
        if outcome is None:
            named[run.id] = None
            continue
        named[run.id] = Verdict(
            run=run,
            outcome=outcome,
            judged_at=now["judged_at"],
            silence=now["own_silence"],
            found=None if outcome in (Outcome.MARKED, Outcome.VANISHED) else found,
        )
    return named


@lru_cache(maxsize=64)
def _look_anew(table: RunsTable, request: SweepRequest) -> Select[Any]:
    """The rows of the snapshots as they stand now, compared with them, and what the ledger has."""
    seen, sweep_id = snapshots(), request.sweep_id
    own, other = (verdicts.alias(f"orphan_recovery_{name}") for name in ("own", "other"))
    marked_by_another = (
        select(other.c.run_id)
        .where(
            other.c.target == request.target.name,
            other.c.run_id == seen.c.run_id,
            other.c.outcome == Outcome.MARKED.value,
            other.c.sweep_id != sweep_id,
            other.c.judged_at >= seen.c.sign_of_life,  # not before it was tried again, in place
        )
        .exists()
    )
    silent = and_(
        table.sign_of_life <= NOW - seen.c.threshold,
        table.sign_of_life <= NOW - threshold_of(table, request, seen.c.threshold),
        ~table.is_locked,
    )
    return select(
        seen.c.run_id,
        table.key[0].is_(None).label("vanished"),
        or_(table.in_flight, table.is_waiting).label("has_not_ended"),
        table.is_crashed.label("is_crashed"),
        table.text("status").label("status"),
        table.text("worker_id").label("worker_id"),
        cast(table.sign_of_life, Text).label("sign_of_life"),  # text: it may be infinity
        table.text("completed_at").label("completed_at"),
        table.text("worker_id").is_not_distinct_from(seen.c.worker_id).label("same_worker"),
        (table.text("status") == seen.c.status).label("same_status"),
        table.sign_of_life.is_not_distinct_from(seen.c.sign_of_life).label("same_sign"),
        silent.label("silent"),
        own.c.outcome.label("own_outcome"),
        func.coalesce(own.c.judged_at, NOW).label("judged_at"),
        own.c.silence.label("own_silence"),
        marked_by_another.label("marked_by_another"),
    ).select_from(
        table.reads_from(seen, outer=True).join(
            own, and_(own.c.sweep_id == sweep_id, own.c.run_id == seen.c.run_id), isouter=True
        )
    )


def _outcome_of_miss(now: RowMapping) -> Outcome | None:
    if now["own_outcome"] is not None:
        return Outcome(now["own_outcome"])  # this sweep's earlier try, unacknowledged
    if now["vanished"]:
        return Outcome.VANISHED
    if not now["has_not_ended"]:
        crashed = now["is_crashed"] and now["marked_by_another"]
        return Outcome.ALREADY_MARKED if crashed else Outcome.FINISHED_FIRST
    if not now["same_worker"]:
        return Outcome.CHANGED_HANDS
    if not (now["same_status"] and now["same_sign"] and now["silent"]):
        return Outcome.SIGN_OF_LIFE
    return None  # as it was seen: another transaction holds the row
