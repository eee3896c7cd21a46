"""Condemn: what a mark writes, into the row and into the ledger, by one statement.

The hazard is a mark without its evidence, or evidence of a mark that never was. So the ledger's
row is made from what the update returned, in the same statement, and from the row as it was
under its lock; and a mark that a trigger of the table took back is none.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    Insert,
    Select,
    Text,
    cast,
    func,
    insert,
    literal,
    null,
    select,
    text,
    update,
)

from orphan_recovery.database import NOW, Executor
from orphan_recovery.ledger import SCHEMA, verdicts
from orphan_recovery.request import SweepRequest
from orphan_recovery.runs import PLACE, RunsTable
from orphan_recovery.verdict import Outcome

WHOSE: Final = ("worker_id", "tenant_id", "task")
EVIDENCE: Final = ("status", "sign_of_life", "evidence", "threshold", "rule")
_INSERT, _DELETE, _UPDATE = 4, 8, 16
"""What a trigger fires for, as pg_trigger has it."""


class UndoneError(RuntimeError):
    """A trigger of the table put runs back in flight while they were marked.

    The transaction is to be rolled back: what else the mark wrote would stay.
    """

    def __init__(self, run_ids: Sequence[str]) -> None:
        self.run_ids = tuple(run_ids)
        super().__init__(
            f"a trigger of the table put {', '.join(map(repr, run_ids))} back in flight during the "
            "mark: let it pass a row that becomes crashed"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return UndoneError, (self.run_ids,)


def condemn(table: RunsTable, request: SweepRequest, locked: CTE) -> tuple[CTE, Insert]:
    """Mark the rows of ``locked`` as crashed, and record it. Nothing is executed here.

    Args:
        table: the runs.
        request: the sweep whose verdict it is.
        locked: what was judged, locked in this statement: ``key_0`` and so on, ``place`` where
            the rows are to be found by it, ``lock_key`` where a lock is the evidence, ``run_id``,
            ``reason``, and the columns of ``WHOSE`` and ``EVIDENCE``, in the row's own words.

    Returns:
        What was updated, and whether it ``stands``, or was put back in flight by a trigger: then
        all is to be rolled back; and the statement, which has that and ``locked`` in it, and
        returns nothing yet.
    """
    marked = (
        update(table.table)
        .where(*_is_row(table, locked))
        .where(table.text("status") == locked.c.status)  # in parts by status, unique with it only
        .where(*_unheld(table, locked))
        .values(_crash(table, request, locked))
        .returning(
            # As it was before: the mark may have released its worker.
            *(locked.c[name] for name in ("run_id", "reason", *EVIDENCE, *WHOSE)),
            table.in_flight.is_not(True).label("stands"),  # the row as it is now
        )
        .cte("orphan_recovery_marked")
    )
    recorded = {
        "sweep_id": literal(request.sweep_id, verdicts.c.sweep_id.type),
        "target": literal(request.target.name),
        "outcome": literal(Outcome.MARKED.value),
        "judged_at": NOW,
        "silence": NOW - marked.c.sign_of_life,
        "status_seen": marked.c.status,
        **{name: marked.c[name] for name in ("run_id", "reason", *WHOSE)},
        **{name: marked.c[name] for name in ("sign_of_life", "evidence", "threshold", "rule")},
    }
    # From a select of its own, so that the update is in it once.
    rows = marked.select().with_only_columns(*recorded.values())
    return marked, insert(verdicts).from_select(list(recorded), rows)


async def require_stands(db: Executor, table: RunsTable, request: SweepRequest) -> None:
    """Refuse what this transaction marked, if a trigger that fires after the update put some of it
    back in flight: what the update returns does not show that yet. Reads only.

    Raises:
        UndoneError: one did; names some.
    """
    if undone := list((await db.execute(_undone_after(table, request))).scalars()):
        raise UndoneError(undone)


@lru_cache(maxsize=64)
def _undone_after(table: RunsTable, request: SweepRequest) -> Select[Any]:
    # Of a table without such a trigger, as nearly all are, nothing else is read. The truth trigger
    # refuses, and puts nothing back. Asked anew each time: it takes a hundredth of a millisecond,
    # and a part or a trigger may be added in mid-sweep.
    acts_after = text(
        "EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = ANY (ARRAY("
        " WITH RECURSIVE below (oid) AS (SELECT CAST(:oid AS oid) UNION SELECT inhrelid"
        " FROM pg_catalog.pg_inherits JOIN below ON inhparent = below.oid)"
        " SELECT oid FROM below)) AND NOT tgisinternal"
        " AND tgenabled <> 'D' AND tgtype & 2 = 0 AND tgtype & :events <> 0"
        " AND tgfoid IS DISTINCT FROM to_regprocedure(:truth))"
    ).bindparams(
        oid=table.relation.oid,
        # A row that the mark moves to another part is deleted in the one and inserted in the other.
        events=_UPDATE | _INSERT | _DELETE if table.relation.kind == "p" else _UPDATE,
        truth=f"{SCHEMA}.prevent_worker_run_mutation()",
    )
    own = verdicts.alias("orphan_recovery_own")  # the runs may be called verdicts, too
    mine = (
        select(own.c.run_id)
        .where(own.c.sweep_id == request.sweep_id, own.c.run_id == table.run_id)
        .where(own.c.outcome == Outcome.MARKED.value)
        .where(own.c.judged_at >= func.transaction_timestamp(type_=NOW.type))
    )
    return (
        select(table.run_id)
        .select_from(table.table)
        .where(acts_after, table.in_flight, mine.exists())
        .limit(10)
    )


def _is_row(table: RunsTable, locked: CTE) -> list[ColumnElement[bool]]:
    """Which row it is: by its key; and, where that is known, by its place, which a lock keeps as it
    is, so that it is found without a look into the index. By the place alone it would be another
    row, too, once the table has a child. A version that came after the statement began is not seen
    there, and left for others."""
    keys = [column == locked.c[f"key_{n}"] for n, column in enumerate(table.key)]
    return [table.columns[PLACE] == locked.c[PLACE], *keys] if PLACE in locked.c else keys


def _unheld(table: RunsTable, locked: CTE) -> list[ColumnElement[bool]]:
    """Where a lock is the evidence: take it. Who lives holds it; who wakes up now has to wait.

    Shared, so that two marks at once of a worker's runs do not take each other for the worker.
    """
    if table.target.lock is None:
        return []
    return [func.pg_try_advisory_xact_lock_shared(locked.c.lock_key)]


def _crash(table: RunsTable, request: SweepRequest, locked: CTE) -> dict[Any, Any]:
    """What a crashed row holds: of its columns, those that the table has."""
    row, facts = table.columns, table.facts
    values: dict[Any, Any] = {row.status: literal(table.target.crashed, facts["status"].type)}
    if "success" in facts:
        values[row.success] = literal(False)
    if "completed_at" in facts:
        values[row.completed_at] = table.stored("completed_at", NOW)
    if "error" in facts:
        values[row.error] = table.written("error", cast(_error_text(request, locked), Text))
    return {**values, **dict.fromkeys(table.released, null())}


def _error_text(request: SweepRequest, locked: CTE) -> ColumnElement[str]:
    """The reason, and the evidence in a line that a person can read."""
    at = func.to_char(func.timezone("UTC", locked.c.sign_of_life), "YYYY-MM-DD HH24:MI:SS")
    silence = func.date_trunc("second", NOW - locked.c.sign_of_life)
    return func.concat(
        locked.c.reason,
        "; last sign of life ",
        at,
        " UTC (",
        locked.c.evidence,
        "), silent for ",
        silence,
        ", threshold ",
        locked.c.threshold,
        f", sweep {request.sweep_id}",
    )
