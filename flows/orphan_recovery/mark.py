"""Mark: the verdict, given by one conditional statement against the row as it stands.

What it can wrongly do is overwrite a run that finished a moment ago, or condemn one that beat or
changed hands since it was detected. So the statement locks the row, repeats the whole predicate
under the lock, compares with what detection saw, and writes the mark and its evidence together
or not at all. Whatever it leaves alone, it names.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    FromClause,
    Select,
    cast,
    func,
    null,
    or_,
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from orphan_recovery.condemn import EVIDENCE, WHOSE, UndoneError, condemn, require_stands
from orphan_recovery.database import NOW, Executor, server_started
from orphan_recovery.describe import runs_table
from orphan_recovery.events import log_verdict
from orphan_recovery.ledger import require_ledger, verdicts
from orphan_recovery.miss import name_misses
from orphan_recovery.record import note_direct_call, record
from orphan_recovery.request import DEFAULT_REASON, SweepRequest, check_reason
from orphan_recovery.rules import threshold_of
from orphan_recovery.run import Evidence, WorkerRun
from orphan_recovery.runs import RunsTable
from orphan_recovery.seen import as_seen, snapshots
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.targets import find_target
from orphan_recovery.verdict import Outcome, Verdict

_STARTED = server_started()


async def mark_run_as_crashed(
    session: AsyncSession, run: WorkerRun, reason: str = DEFAULT_REASON
) -> bool:
    """Mark one detected orphan as crashed, if it is one still.

    Waits for the row if another transaction holds it; set ``lock_timeout`` to bound that. The
    verdict is written to the ledger in the same transaction. The statement bypasses the ORM: an
    instance of the row that the session holds must be refreshed.

    Args:
        session: on the database that holds the runs, by SQLAlchemy's psycopg dialect. Never
            committed here: the caller owns the transaction, and nothing stands before it commits.
        run: what :func:`detect_orphaned_runs` saw.
        reason: what the run's error text begins with, 1 to 1,000 characters.

    Returns:
        True if the run stands marked by this call, or by an earlier one for the same ``run``
        whose acknowledgement was lost. False if it is no orphan any more: it finished, beat,
        changed hands, vanished, or another sweep marked it. The ledger says which.

    Raises:
        ConfigurationError: the reason, the table, the ledger or the session cannot be used.
        UndecidedError: the server was restarted since ``run`` was detected: detect it anew. Or a
            trigger of the table left out the update.
        UndoneError: a trigger of the table put the run back in flight: roll back.
        sqlalchemy.exc.DBAPIError: as the database raised it, so that a retry policy can act on
            it; :func:`orphan_recovery.policy.is_transient` tells whether to.
    """
    check_reason(reason)
    await require_ledger(session)
    request = SweepRequest(
        asked_by="mark_run_as_crashed",
        target=find_target(run.target),
        threshold_minutes=max(1, int(run.threshold.total_seconds() // 60)),
        reason=reason,
        sweep_id=run.sweep_id,
    )
    await note_direct_call(session, request)
    verdict = await mark_one(session, request, run)
    log_verdict(request, verdict)
    return verdict.outcome is Outcome.MARKED


class UndecidedError(RuntimeError):
    """The row looks as detection saw it, and yet the statement did not mark it.

    So it is where the server was restarted since: nobody could beat meanwhile. And where a trigger
    of the table leaves the update out. It is no verdict: the next sweep detects the run anew.
    """

    def __init__(self, run: WorkerRun) -> None:
        self.run = run
        super().__init__(
            f"run {run.id!r} is unchanged since it was detected, yet was not marked (the server "
            "may have been restarted since, so that nobody could beat, or a trigger of the table "
            "kept it from being updated); the next sweep looks anew"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return UndecidedError, (self.run,)


async def mark(
    db: Executor, request: SweepRequest, runs: Sequence[WorkerRun], *, skip_locked: bool = False
) -> list[Verdict | None]:
    """Give the verdict on each of ``runs``, and record it. Does not commit.

    Args:
        db: an open transaction; the sweep must be in the ledger.
        request: the sweep that detected them.
        runs: detected orphans of that sweep, at least one; none twice.
        skip_locked: do not wait for rows that another transaction holds.

    Returns:
        A verdict for each run, in order. None, only with ``skip_locked``, where the row was held
        by someone: nothing is known yet.

    Raises:
        UndoneError: a trigger of the table took a mark back.
        sqlalchemy.exc.DBAPIError: any database error; the transaction is then to be rolled back,
            and no verdict stands.
    """
    table = await runs_table(db, request.target)
    values = as_seen(request, runs)
    if table.elsewhere:
        await _require_transaction(db)
        locked = await db.execute(_lock(table, skip_locked), values)
        levels = {row.isolation for row in locked} - {"read committed"}
        if levels:
            raise ConfigurationError(
                f"this transaction is {levels.pop()}, which hides the signs of life that target "
                f"{request.target.name!r} keeps in another table since it began: mark in one that "
                "is read committed"
            )
    statement = _mark(table, request, skip_locked)
    seen = {run.id: run for run in runs}
    rows = (await db.execute(statement, values)).mappings().all()
    if undone := [row["run_id"] for row in rows if row["judged_at"] is None]:
        raise UndoneError(undone)
    if rows:
        await require_stands(db, table, request)
    marked = {
        row["run_id"]: Verdict(
            run=seen[row["run_id"]],
            outcome=Outcome.MARKED,
            judged_at=row["judged_at"],
            silence=row["silence"],
        )
        for row in rows
    }
    left = [run for run in runs if run.id not in marked]
    named = await name_misses(db, table, request, left) if left else {}
    await record(db, request, [v for v in named.values() if v is not None and v.is_miss])
    return [marked.get(run.id) or named[run.id] for run in runs]


async def mark_one(db: Executor, request: SweepRequest, run: WorkerRun) -> Verdict:
    """Give and record the verdict on one run, waiting for its row. Does not commit.

    Args:
        db: an open transaction; the sweep must be in the ledger.
        request: the sweep that detected it.
        run: a detected orphan of that sweep.

    Returns:
        The verdict: a mark, also by an earlier try of the sweep, or a miss by its name.

    Raises:
        UndecidedError: no verdict could be given.
        UndoneError: a trigger of the table took the mark back.
        sqlalchemy.exc.DBAPIError: any database error, a lock time-out among them.
    """
    [verdict] = await mark(db, request, [run])
    if verdict is None:
        raise UndecidedError(run)
    return verdict


async def settle(db: Executor, request: SweepRequest, failed: Sequence[Verdict]) -> list[Verdict]:
    """Look once more at runs whose mark failed, and record what they are. Does not commit.

    A try whose acknowledgement was lost has left its verdict in the ledger, and a run may have
    finished or beaten since: then that is the truth. Otherwise the failure is recorded.

    Args:
        db: an open transaction; the sweep must be in the ledger.
        request: the sweep that tried them.
        failed: its failures, none twice; may be empty.

    Returns:
        The verdicts as they now stand, in order.

    Raises:
        ConfigurationError: the table cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    if not failed:
        return []
    table = await runs_table(db, request.target)
    named = await name_misses(db, table, request, [verdict.run for verdict in failed])
    settled = []
    for verdict in failed:
        now = named[verdict.run.id]
        settled.append(verdict if now is None or now.outcome is Outcome.FAILED else now)
    await record(db, request, [v for v in settled if v.outcome is not Outcome.MARKED])
    return settled


async def _require_transaction(db: Executor) -> None:
    """A lock has to be kept until the verdict: without a transaction it is given back at once."""
    connection = db if isinstance(db, AsyncConnection) else await db.connection()
    raw = (await connection.get_raw_connection()).driver_connection
    if raw is not None and raw.autocommit:
        raise ConfigurationError(
            "this session commits each statement by itself (AUTOCOMMIT), where the signs of life "
            "are kept in another table: mark in a transaction that is read committed"
        )


def _lock(table: RunsTable, skip_locked: bool) -> Select[Any]:
    """Lock the rows before they are judged.

    A lock that is waited for shows the row as it stands then, but all else as it stood when the
    statement began. A worker may have beaten meanwhile in a row of its own; so where signs of
    life are kept elsewhere, the waiting is done here, and the verdict's statement looks afresh.
    """
    seen = snapshots()
    return (
        select(*table.key, func.current_setting("transaction_isolation").label("isolation"))
        .select_from(table.table.join(seen, table.is_row(seen.c.run_id)))
        .order_by(*table.key)
        .with_for_update(of=table.table, key_share=True, skip_locked=skip_locked)
    )


@lru_cache(maxsize=64)
def _mark(table: RunsTable, request: SweepRequest, skip_locked: bool) -> CompoundSelect[Any]:
    """Lock, judge, mark and record: one statement, so that none of it stands without the rest.
    What a trigger took back has no time of judgement.

    Built once for each sweep: to build it takes longer than to execute it.
    """
    seen = snapshots()
    locked = (
        select(
            *(column.label(f"key_{n}") for n, column in enumerate(table.key)),
            *([] if table.target.lock is None else [table.lock_key.label("lock_key")]),
            *(seen.c[name] for name in ("run_id", "reason", *EVIDENCE)),
            *(table.text(role).label(role) for role in WHOSE),
        )
        .select_from(table.reads_from(seen))
        .where(*guards(table, request, seen).values())
        .order_by(*table.key)  # two sweeps lock in the same order: no deadlock
        .with_for_update(of=table.table, key_share=True, skip_locked=skip_locked)
        .cte("orphan_recovery_locked")
    )
    marked, recording = condemn(table, request, locked)
    told = (verdicts.c.run_id, verdicts.c.judged_at, verdicts.c.silence)
    recorded = recording.returning(*told).cte("orphan_recovery_recorded")
    nothing = (cast(null(), column.type).label(column.name) for column in told[1:])
    undone = select(marked.c.run_id, *nothing).where(~marked.c.stands)
    return select(recorded).union_all(undone)


def guards(
    table: RunsTable, request: SweepRequest, seen: FromClause
) -> dict[str, ColumnElement[bool]]:
    """The whole predicate, against the row as it stands under its lock. Each by its own name.

    Args:
        table: the runs.
        request: the sweep.
        seen: the snapshots, which this sweep took.
    """
    own_threshold = threshold_of(table, request, seen.c.threshold)
    return {
        # It finished first.
        "in flight": table.in_flight,
        # It was started, or put back.
        "same status": table.text("status") == seen.c.status,
        # It changed hands.
        "same worker": table.text("worker_id").is_not_distinct_from(seen.c.worker_id),
        # It beat.
        "same sign of life": table.sign_of_life == seen.c.sign_of_life,
        # It is silent, by the database's clock now: that of a new primary may be behind.
        "silent": table.sign_of_life <= NOW - seen.c.threshold,
        # And by the rules as they are for the row as it is.
        "silent by its rule": table.sign_of_life <= NOW - own_threshold,
        # While the server was away nobody could beat: what was seen before is no evidence.
        "same server": or_(seen.c.evidence == Evidence.AGE.value, seen.c.seen_at > _STARTED),
        # An earlier try of this sweep was heard after all.
        "no verdict yet": ~has_verdict(request, seen.c.run_id),
    }


def has_verdict(request: SweepRequest, run_id: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a sweep has given its verdict on a run."""
    given = select(verdicts.c.run_id)
    given = given.where(verdicts.c.sweep_id == request.sweep_id, verdicts.c.run_id == run_id)
    return given.exists()
