"""The ledger: the append-only record of sweeps and their verdicts.

The hazard is a history that can be edited, or that says something else than what was done. A
verdict is written in the transaction of its mark, a trigger refuses to change or delete it, and
a sweep is closed once. The tables live in a schema of their own, beside the runs.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    Column,
    Integer,
    Interval,
    MetaData,
    ScalarSelect,
    Subquery,
    Table,
    Text,
    Update,
    Uuid,
    case,
    func,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP, insert
from sqlalchemy.exc import DBAPIError

from orphan_recovery.database import Executor
from orphan_recovery.detect import Fleet
from orphan_recovery.request import SweepRequest, own_version
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.verdict import Outcome, Verdict

SCHEMA: Final = "orphan_recovery"
_NO_SUCH_TABLE: Final = ("42P01", "3F000")
DEAD_AFTER: Final = timedelta(hours=1)
"""A sweep that is open and gave no verdict for so long is taken for dead and closed."""

_AWARE = TIMESTAMP(timezone=True)
_metadata = MetaData(schema=SCHEMA)

sweeps: Final = Table(
    "sweeps",
    _metadata,
    Column("sweep_id", Uuid, primary_key=True),
    Column("target", Text),
    Column("table_name", Text),
    Column("asked_by", Text),
    Column("reason", Text),
    Column("threshold", Interval),
    Column("scope", JSONB),
    Column("version", Text),
    Column("question", Text),
    Column("seen_by", Uuid),
    Column("opened_at", _AWARE),
    Column("in_flight", Integer),
    Column("undatable", Integer),
    Column("ahead", Integer),
    Column("exempt", Integer),
    Column("timeline", Text),
    Column("looked_twice", Text),
    Column("hold", Uuid),
    Column("ended_at", _AWARE),
    Column("ended_as", Text),
    Column("detected", Integer),
    Column("marked", Integer),
    Column("missed", Integer),
    Column("failed", Integer),
    Column("error", Text),
)

verdicts: Final = Table(
    "verdicts",
    _metadata,
    Column("sweep_id", Uuid, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("target", Text),
    Column("outcome", Text),
    Column("worker_id", Text),
    Column("tenant_id", Text),
    Column("task", Text),
    Column("status_seen", Text),
    Column("sign_of_life", _AWARE),
    Column("evidence", Text),
    Column("silence", Interval),
    Column("threshold", Interval),
    Column("rule", Text),
    Column("reason", Text),
    Column("judged_at", _AWARE),
    Column("found", JSONB),
    Column("error", Text),
)


contests: Final = Table(
    "contests",
    _metadata,
    Column("sweep_id", Uuid, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("target", Text),
    Column("worker_id", Text),
    Column("reported_status", Text),
    Column("reported_at", _AWARE),
)


holds: Final = Table(
    "holds",
    _metadata,
    Column("hold_id", Uuid, primary_key=True),
    Column("target", Text),
    Column("sweep_id", Uuid),
    Column("opened_at", _AWARE),
    Column("evidence", JSONB),
    Column("ended_at", _AWARE),
    Column("ended_as", Text),
    Column("ended_by", Uuid),
)

hold_runs: Final = Table(
    "hold_runs",
    _metadata,
    Column("hold_id", Uuid, primary_key=True),
    Column("run_id", Text, primary_key=True),
)

approvals: Final = Table(
    "approvals",
    _metadata,
    Column("hold_id", Uuid, primary_key=True),
    Column("approved_at", _AWARE, primary_key=True),
    Column("expires_at", _AWARE),
    Column("approved_by", Text),
    Column("note", Text),
)


class Ended(StrEnum):
    """How a sweep ended."""

    COMPLETED = "completed"
    """Every detected orphan has its verdict, and none failed."""
    FAILED = "failed"
    """A run could not be marked, or the sweep could not go on. Its error says why."""
    HELD = "held"
    """Too much of the fleet looked dead: nothing of that was marked, and a person was asked."""
    DIED = "died"
    """It was killed; a later sweep closed it."""
    DIRECT = "direct"
    """No sweep at all: a caller of mark_run_as_crashed brought its own runs."""


@asynccontextmanager
async def ledger_there() -> AsyncIterator[None]:
    """Say what is to be done where what is asked of the ledger fails because there is none.

    Raises:
        ConfigurationError: the schema is not there. The transaction is then to be rolled back.
    """
    try:
        yield
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in _NO_SUCH_TABLE:
            raise
        raise _no_ledger() from error


async def require_ledger(db: Executor) -> None:
    """Refuse to go on without a ledger: a mark that leaves no evidence is not made.

    Raises:
        ConfigurationError: the schema is not there.
    """
    if (await db.execute(select(func.to_regclass(f"{SCHEMA}.verdicts")))).scalar_one() is None:
        raise _no_ledger()


async def open_sweep(
    db: Executor,
    request: SweepRequest,
    fleet: Fleet,
    timeline: str | None,
    *,
    nothing_to_do: bool = False,
    seen_by: UUID | None = None,
) -> None:
    """Record that a sweep begins, and close those that died. Does not commit.

    A second call for the same sweep, after a lost acknowledgement, changes nothing.

    Args:
        db: a transaction of the caller's.
        request: the sweep.
        fleet: what it saw.
        timeline: of the server's log.
        nothing_to_do: record in one go that it ended, and found nothing.
        seen_by: the sweep whose look it took over, instead of looking itself.
    """
    looked: dict[str, Any] = {
        "in_flight": fleet.in_flight,
        "undatable": fleet.undatable,
        "ahead": fleet.ahead,
        "exempt": fleet.exempt,
        "detected": fleet.orphans,  # until it is closed, and knows better
        "timeline": timeline,
        "opened_at": fleet.seen_at,
        "question": request.question,
        "seen_by": seen_by,
    }
    if nothing_to_do:
        counts = dict.fromkeys(("detected", "marked", "missed", "failed"), 0)
        looked |= {**counts, "ended_at": _NOW, "ended_as": Ended.COMPLETED.value}
    opened = insert(sweeps).values(**_identity(request), **looked).on_conflict_do_nothing()
    if seen_by is None:  # who looked in its place has done that, too
        opened = opened.add_cte(_closing_the_dead().cte("orphan_recovery_dead"))
    await db.execute(opened)


async def note_direct_call(db: Executor, request: SweepRequest) -> None:
    """Make sure that the verdict of a direct mark has a sweep to belong to. Does not commit."""
    ended = {"opened_at": _NOW, "ended_at": _NOW, "ended_as": Ended.DIRECT.value}
    await db.execute(insert(sweeps).values(**_identity(request), **ended).on_conflict_do_nothing())


async def record(db: Executor, request: SweepRequest, found: Sequence[Verdict]) -> None:
    """Write down verdicts that changed no run: misses and failures. Does not commit.

    What the ledger has already for the same sweep and run stands; so a failure that is recorded
    late never covers up a mark whose acknowledgement was lost.
    """
    for start in range(0, len(found), 500):  # a statement takes no more than 65,535 values
        rows = [_row(verdict, request) for verdict in found[start : start + 500]]
        await db.execute(insert(verdicts).values(rows).on_conflict_do_nothing())


async def close_sweep(
    db: Executor,
    request: SweepRequest,
    *,
    detected: int,
    error: str | None,
    looked_twice: str | None = None,
    hold: UUID | None = None,
) -> int:
    """Record how a sweep ended; the counts are the ledger's own. Does not commit.

    A sweep that is closed already stays as it is.

    Args:
        db: a transaction of the caller's.
        request: the sweep.
        detected: orphans detected, in runs.
        error: what stopped the sweep before its end, or None.
        looked_twice: why it looked a second time, or None.
        hold: the hold that it stopped at, or None.

    Returns:
        How many runs it marked: more than it knows of, where an acknowledgement was lost.
    """
    well = Ended.COMPLETED if hold is None else Ended.HELD
    counts = _tally(request.sweep_id)
    ended_as = case((counts.c.failed > 0, Ended.FAILED.value), else_=well.value)
    close = (
        update(sweeps)
        .where(sweeps.c.sweep_id == counts.c.sweep_id, sweeps.c.ended_at.is_(None))
        .values(
            marked=counts.c.marked,
            missed=counts.c.missed,
            failed=counts.c.failed,
            ended_at=_NOW,
            ended_as=ended_as if error is None else Ended.FAILED.value,
            detected=func.greatest(detected, counts.c.marked + counts.c.missed + counts.c.failed),
            error=error,
            looked_twice=looked_twice,
            hold=hold,
        )
        .returning(sweeps.c.marked)
    )
    marked = (await db.execute(close)).scalar_one_or_none()
    if marked is None:  # it was closed by an earlier try
        told = select(sweeps.c.marked).where(sweeps.c.sweep_id == request.sweep_id)
        marked = (await db.execute(told)).scalar_one()
    return int(marked)


async def record_contest(
    db: Executor,
    target: str,
    run_id: str,
    *,
    worker_id: str | None,
    reported_status: str,
    any_worker: bool = False,
) -> bool:
    """Record that a result was reported for a run that stands marked. Does not commit.

    Args:
        db: a transaction of the caller's.
        target: whose run it is, by name.
        run_id: the run.
        worker_id: who reported; None if that is not to be checked.
        reported_status: what the run would have ended as.
        any_worker: the target keeps no workers, so that whoever reports held the run.

    Returns:
        True if a verdict of the ledger is contested by it, now or already; False if the run was
        not marked by any sweep, or while another held it: that says nothing of whether its holder
        lived.
    """
    whose = true() if any_worker or worker_id is None else verdicts.c.worker_id == worker_id
    verdict = (
        select(
            verdicts.c.sweep_id,
            verdicts.c.run_id,
            verdicts.c.target,
            literal(worker_id, Text),
            literal(reported_status, Text),
            _NOW,
        )
        .where(verdicts.c.target == target, verdicts.c.run_id == run_id)
        .where(verdicts.c.outcome == Outcome.MARKED.value, whose)
        .order_by(verdicts.c.judged_at.desc())
        .limit(1)
    )
    await db.execute(
        insert(contests).from_select([c.name for c in contests.c], verdict).on_conflict_do_nothing()
    )
    return bool((await db.execute(select(verdict.exists()))).scalar_one())


def _closing_the_dead() -> Update:
    """Closes the sweeps that were killed before they could close themselves."""
    long_ago = _NOW - DEAD_AFTER
    gave_a_verdict = (
        select(verdicts.c.run_id)
        .where(verdicts.c.sweep_id == sweeps.c.sweep_id, verdicts.c.judged_at > long_ago)
        .exists()
    )
    dead = (
        select(sweeps.c.sweep_id)
        .where(sweeps.c.ended_at.is_(None), sweeps.c.opened_at < long_ago, ~gave_a_verdict)
        .with_for_update(skip_locked=True)  # two sweeps that begin at once do not wait here
    )
    return (
        update(sweeps)
        .where(sweeps.c.sweep_id.in_(dead))
        .values(
            **_counts(),
            ended_at=_NOW,
            ended_as=Ended.DIED.value,
            error="killed before its end; its verdicts stand, and what it left is detected again",
        )
    )


def _no_ledger() -> ConfigurationError:
    return ConfigurationError(
        f"the ledger, schema {SCHEMA!r}, is not in this database: run `orphan-recovery migrate`, "
        "which creates it"
    )


_NOW: Final = func.statement_timestamp(type_=_AWARE)


def _identity(request: SweepRequest) -> dict[str, Any]:
    return {
        "sweep_id": request.sweep_id,
        "target": request.target.name,
        "table_name": request.target.table,
        "asked_by": request.asked_by,
        "reason": request.reason,
        "threshold": request.threshold,
        "scope": request.scope,
        "version": own_version(),
    }


def _row(verdict: Verdict, request: SweepRequest) -> dict[str, Any]:
    run = verdict.run
    return {
        "sweep_id": run.sweep_id,
        "run_id": run.id,
        "target": request.target.name,
        "outcome": verdict.outcome.value,
        "worker_id": run.worker_id,
        "tenant_id": run.tenant_id,
        "task": run.task,
        "status_seen": run.status,
        "sign_of_life": run.sign_of_life,
        "evidence": run.evidence.value,
        "silence": verdict.silence if verdict.silence is not None else run.silence,
        "threshold": run.threshold,
        "rule": run.rule,
        "reason": request.reason_for(run),
        "judged_at": verdict.judged_at or _NOW,
        "found": verdict.found,
        "error": verdict.error,
    }


def _count(*outcomes: Outcome) -> ScalarSelect[int]:
    return (
        select(func.count())
        .select_from(verdicts)
        .where(
            verdicts.c.sweep_id == sweeps.c.sweep_id,
            or_(*(verdicts.c.outcome == outcome.value for outcome in outcomes)),
        )
        .scalar_subquery()
    )


def _tally(sweep_id: UUID) -> Subquery:
    """How many verdicts a sweep gave, of each kind; in one pass, for there may be a million."""
    marked, failed = (verdicts.c.outcome == o.value for o in (Outcome.MARKED, Outcome.FAILED))
    return (
        select(
            literal(sweep_id, verdicts.c.sweep_id.type).label("sweep_id"),
            func.count().filter(marked).label("marked"),
            func.count().filter(~marked, ~failed).label("missed"),
            func.count().filter(failed).label("failed"),
        )
        .where(verdicts.c.sweep_id == sweep_id)
        .subquery()
    )


def _counts() -> dict[str, ScalarSelect[int]]:
    others = [o for o in Outcome if o not in (Outcome.MARKED, Outcome.FAILED)]
    return {
        "marked": _count(Outcome.MARKED),
        "missed": _count(*others),
        "failed": _count(Outcome.FAILED),
    }
