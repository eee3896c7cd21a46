"""Slices: detect, judge, mark and record many orphans in one statement, on the server.

The hazard is speed that looks less carefully. So a slice has detection's own predicate, which
holds against each row as it stands under its lock; a row that somebody else holds is passed over,
and comes up again when the slices are through; and what a mark writes is what it always writes.
Only counts travel, but for the first runs of a sweep, which its report shows one by one.
"""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    Insert,
    Integer,
    Select,
    Text,
    bindparam,
    case,
    func,
    literal,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP

from orphan_recovery.condemn import EVIDENCE, WHOSE, UndoneError, condemn, require_stands
from orphan_recovery.database import NOW, Executor, Span
from orphan_recovery.describe import runs_table
from orphan_recovery.detect import Among, orphans, snapshot
from orphan_recovery.ledger import verdicts
from orphan_recovery.request import SweepRequest
from orphan_recovery.rules import in_words, reason_of, shortest
from orphan_recovery.run import Evidence, WorkerRun
from orphan_recovery.runs import PLACE, RunsTable
from orphan_recovery.verdict import Outcome, Verdict

_AWARE = TIMESTAMP(timezone=True)
_EARLIEST: Final = datetime(1, 1, 2, tzinfo=UTC)
"""What is older than Python can tell is left to the page by page way."""
_LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""No orphan was created so late."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a slice ended, in the order of the index: by creation, then by key."""

    created_at: datetime
    run_id: str


@dataclass(frozen=True, slots=True)
class Stretch:
    """What is left of the index, in that order, and from which of its ends it is taken.

    A statement has both ends, known or not, since to build another takes milliseconds.
    """

    behind: Position | None = None
    before: Position | None = None
    backwards: bool = False

    @property
    def values(self) -> dict[str, Any]:
        """What a slice's statement takes."""
        return {
            "behind": self.behind.created_at if self.behind else _EARLIEST,
            "behind_run": self.behind.run_id if self.behind else None,
            "before": self.before.created_at if self.before else _LATEST,
            "before_run": self.before.run_id if self.before else None,
        }


@dataclass(frozen=True, slots=True)
class Slice:
    """What one slice did."""

    seconds: float
    """How long its statement took, and so at most how long it has kept rows locked so far."""

    taken: int
    """Orphans that it locked."""
    is_last: bool
    """Whether it found fewer than asked for: there are no more."""
    marked: int
    """Those of them that stand crashed by it."""
    last: Position | None
    """Where it ended; None if it took none."""
    verdicts: list[Verdict] = field(default_factory=list)
    """Of the marked ones, where they were to be shown."""
    runs: list[WorkerRun] = field(default_factory=list)
    """Of the taken ones, likewise."""


async def is_sliceable(db: Executor, request: SweepRequest) -> bool:
    """Whether slices are a way for this sweep.

    They go by creation, so they are none where the longest silence comes first. And a statement
    sees another table as it was when the statement began, a row as it is under its lock: where
    signs of life are kept elsewhere, the two are looked at one after the other.
    """
    table = await runs_table(db, request.target)
    ordered = request.limit is not None
    return table.has("created_at") and not table.elsewhere and not ordered and not request.dry_run


async def take_slice(
    db: Executor,
    request: SweepRequest,
    *,
    size: int,
    stretch: Stretch,
    among: Among | None,
    shown: bool,
) -> Slice:
    """Mark the next orphans of a stretch, in the order in which they were created or, from its
    other end, against it. Does not commit.

    Args:
        db: a transaction of the caller's, READ COMMITTED, and in a lane
            (:func:`orphan_recovery.lane.enter`).
        request: the sweep; it must be in the ledger.
        size: at most so many.
        stretch: of which runs.
        among: only runs for which this holds.
        shown: return the verdicts too, and not their number alone.

    Returns:
        How many it took, how many of those it marked, and where it ended. It takes no row that
        another transaction has locked.

    Raises:
        UndoneError: a trigger of the table took a mark back; names some.
        sqlalchemy.exc.DBAPIError: any database error; the transaction is then to be rolled back.
    """
    table = await runs_table(db, request.target)
    began = time.monotonic()
    statement = _slice(table, request, among, backwards=stretch.backwards, shown=shown)
    rows = list((await db.execute(statement, {"size": size, **stretch.values})).mappings())
    took = time.monotonic() - began
    if undone := [row["id"] for row in rows if row["undone"]] if shown else rows[0]["undone"]:
        raise UndoneError(undone)
    if rows:
        await require_stands(db, table, request)
    if shown:
        return _shown(request, size, [dict(row) for row in rows], took)
    [row] = rows
    last = Position(row["created_at"].astimezone(UTC), row["run_id"]) if row["taken"] else None
    return Slice(took, row["taken"], row["taken"] < size, row["marked"], last)


async def look_at_slice(
    db: Executor, request: SweepRequest, *, size: int, stretch: Stretch, among: Among | None
) -> list[WorkerRun]:
    """The orphans that the next slice would take, as detection sees them. Reads only.

    Args:
        db: where to read.
        request: the sweep.
        size: at most so many.
        stretch: of which runs, and from which end.
        among: only runs for which this holds.

    Raises:
        sqlalchemy.exc.DBAPIError: any database error.
    """
    table = await runs_table(db, request.target)
    statement = _candidates(table, request, among, backwards=stretch.backwards, shown=True)
    rows = (await db.execute(statement, {"size": size, **stretch.values})).mappings()
    names = orphans(table, request).selected_columns.keys()
    return [snapshot(request, {name: row[name] for name in names}) for row in rows]


@lru_cache(maxsize=64)
def _slice(
    table: RunsTable, request: SweepRequest, among: Among | None, *, backwards: bool, shown: bool
) -> Select[Any]:
    """Built once for each sweep, for a sweep may take thousands of them."""
    locked = _candidates(table, request, among, backwards=backwards, shown=shown)
    if PLACE in table.columns:
        locked = locked.add_columns(table.columns[PLACE].label(PLACE))
    locked = locked.with_for_update(of=table.table, key_share=True, skip_locked=True)
    condemning = _each if shown else _counted
    return condemning(locked, table, request, backwards=backwards)


def _candidates(
    table: RunsTable, request: SweepRequest, among: Among | None, *, backwards: bool, shown: bool
) -> Select[Any]:
    """Detection's statement in the order of the index, with what the mark needs besides."""
    created = table.columns.created_at
    here = tuple_(created, *table.key)
    found = orphans(table, request)
    number = found.selected_columns.rule
    if not shown:
        needed = {"id", "status", "sign_of_life", "evidence", "threshold", "created_at", *WHOSE}
        found = found.with_only_columns(*(c for c in found.selected_columns if c.key in needed))
    rules = range(len(table.target.rules) + 1)
    found = (
        found.add_columns(
            *(column.label(f"key_{n}") for n, column in enumerate(table.key)),
            *([] if table.target.lock is None else [table.lock_key.label("lock_key")]),
            _rule(table, request, number).label("rule_in_words"),
            _by_number(
                number, {n: request.reason_by(reason_of(table.target, n)) for n in rules}
            ).label("reason"),
        )
        .where(here > tuple_(*_end("behind", table)), here < tuple_(*_end("before", table)))
        .order_by(None)
        .order_by(*_along([created, *table.key], backwards))
        .limit(bindparam("size", type_=Integer()))
    )
    if table.facts["created_at"].is_nullable:  # else detection's own predicate has it
        latest = table.stored("created_at", NOW - literal(shortest(request), Span))
        found = found.where(created <= latest)
    if among is not None:
        found = found.where(among(table))
    return found


def _end(name: str, table: RunsTable) -> list[ColumnElement[Any]]:
    where = table.stored("created_at", bindparam(name, type_=_AWARE))
    return [where, *table.key_of(bindparam(f"{name}_run", type_=Text()))]


def _along(columns: list[ColumnElement[Any]], backwards: bool) -> list[ColumnElement[Any]]:
    return [column.desc() for column in columns] if backwards else columns


def _rule(
    table: RunsTable, request: SweepRequest, number: ColumnElement[int]
) -> ColumnElement[str]:
    """What condemned each run, in words."""
    rules = range(len(table.target.rules) + 1)
    by_time = _by_number(number, {n: in_words(request, n, Evidence.AGE) for n in rules})
    if table.target.lock is None:
        return by_time
    by_lock = literal(in_words(request, 0, Evidence.LOCK), Text)
    return case((table.evidence == Evidence.LOCK.value, by_lock), else_=by_time)


def _by_number(number: ColumnElement[int], told: dict[int, str]) -> ColumnElement[str]:
    texts = {n: literal(text, Text) for n, text in told.items()}
    if len(set(told.values())) == 1:
        return texts[0]
    return case(*((number == literal(n, Integer), text) for n, text in texts.items()))


def _each(
    candidates: Select[Any], table: RunsTable, request: SweepRequest, *, backwards: bool
) -> Select[Any]:
    """One row for each orphan that was taken, with whether it was marked."""
    locked = candidates.cte("orphan_recovery_taken")
    marked, recording = _condemn(locked, table, request)
    recorded = recording.returning(verdicts.c.run_id).cte("orphan_recovery_recorded")
    # Looked up in a hash that no setting forbids, as a join's is here; and at the verdict's time,
    # which is that of the statement.
    is_marked = locked.c.id.in_(select(recorded.c.run_id))
    names = [column for column in locked.c if column.key[:4] != "key_" and column.key != PLACE]
    return select(
        *names,
        case((is_marked, NOW)).label("judged_at"),
        case((is_marked, NOW - locked.c.sign_of_life)).label("judged_silence"),
        locked.c.id.in_(select(marked.c.run_id).where(~marked.c.stands)).label("undone"),
    ).order_by(*_along(_order_of(locked, table), backwards))


def _counted(
    candidates: Select[Any], table: RunsTable, request: SweepRequest, *, backwards: bool
) -> Select[Any]:
    """One row in all: how many, how many of them were marked, and where it ended."""
    locked = candidates.cte("orphan_recovery_taken")
    marked, recording = _condemn(locked, table, request)
    last = (
        select(locked.c.created_at, locked.c.id)
        .order_by(*_along(_order_of(locked, table), not backwards))
        .limit(1)
        .subquery()
    )
    undone = func.array_agg(marked.c.run_id).filter(~marked.c.stands)
    taken = select(func.count()).select_from(locked).scalar_subquery().label("taken")
    counted = (taken, func.count().label("marked"), undone[1:10].label("undone"))
    counts = select(*counted).select_from(marked).subquery()
    # The insert is executed to its end although nothing of it is asked for.
    return (
        select(*counts.c, last.c.created_at, last.c.id.label("run_id"))
        .select_from(counts.join(last, true(), isouter=True))
        .add_cte(recording.cte("orphan_recovery_recorded"))
    )


def _order_of(locked: CTE, table: RunsTable) -> list[ColumnElement[Any]]:
    return [locked.c.created_at, *(locked.c[f"key_{n}"] for n, _ in enumerate(table.key))]


def _condemn(locked: CTE, table: RunsTable, request: SweepRequest) -> tuple[CTE, Insert]:
    """The mark, on what it reads by the names that it knows."""
    judged = select(
        *(locked.c[f"key_{n}"] for n, _ in enumerate(table.key)),
        *([locked.c[PLACE]] if PLACE in locked.c else []),
        *([] if table.target.lock is None else [locked.c.lock_key]),
        locked.c.id.label("run_id"),
        locked.c.rule_in_words.label("rule"),
        *(locked.c[name] for name in ("reason", *EVIDENCE, *WHOSE) if name != "rule"),
    ).cte("orphan_recovery_judged")
    return condemn(table, request, judged)


def _shown(request: SweepRequest, size: int, rows: list[dict[str, Any]], seconds: float) -> Slice:
    runs, given = [], []
    for row in rows:
        judged_at, silence = row.pop("judged_at"), row.pop("judged_silence")
        for name in ("rule_in_words", "reason", "lock_key", "undone"):
            row.pop(name, None)
        run = snapshot(request, row)
        runs.append(run)
        if judged_at is not None:
            verdict = Verdict(run=run, outcome=Outcome.MARKED, judged_at=judged_at, silence=silence)
            given.append(verdict)
    last = position_of(runs[-1]) if runs else None
    return Slice(seconds, len(runs), len(runs) < size, len(given), last, given, runs)


def position_of(run: WorkerRun) -> Position:
    """Where to go on behind a run that a slice took."""
    assert run.created_at is not None  # noqa: S101 - slices are taken by it
    return Position(run.created_at, run.id)
