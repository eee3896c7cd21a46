"""Record: write to the ledger that a sweep began, what its verdicts are, and how it ended.

The hazard is a history that says something else than what was done. A mark and its verdict are
one statement (see :mod:`orphan_recovery.condemn`); what is recorded here never covers up one that
stands already, and a sweep is closed once, by the ledger's own counts.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Row,
    ScalarSelect,
    Subquery,
    Text,
    Update,
    case,
    func,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from orphan_recovery.database import NOW, Executor
from orphan_recovery.detect import Fleet
from orphan_recovery.ledger import Ended, contests, sweeps, verdicts
from orphan_recovery.request import SweepRequest, own_version
from orphan_recovery.verdict import Outcome, Verdict

DEAD_AFTER: Final = timedelta(hours=1)
"""A sweep that is open and gave no verdict for so long is taken for dead and closed."""


async def open_sweep(
    db: Executor,
    request: SweepRequest,
    fleet: Fleet,
    timeline: str | None,
    *,
    question: str | None = None,
    nothing_to_do: bool = False,
    seen_by: UUID | None = None,
) -> bool:
    """Record that a sweep begins, and close those that died. Does not commit.

    A second call for the same sweep, after a lost acknowledgement, changes nothing.

    Args:
        db: a transaction of the caller's.
        request: the sweep.
        fleet: what it saw.
        timeline: of the server's log.
        question: what it asked, and of which table, for others that ask the same; None where it
            answers nobody.
        nothing_to_do: record in one go that it ended, and found nothing.
        seen_by: the sweep whose look it took over, instead of looking itself.

    Returns:
        Whether the sweep is closed already: there was nothing to do, as this call or the one
        whose acknowledgement was lost saw it.
    """
    looked: dict[str, Any] = {
        "in_flight": fleet.in_flight,
        "undatable": fleet.undatable,
        "ahead": fleet.ahead,
        "exempt": fleet.exempt,
        "detected": fleet.orphans,  # until it is closed, and knows better
        "timeline": timeline,
        "opened_at": fleet.seen_at,
        "question": question,
        "seen_by": seen_by,
    }
    if nothing_to_do:
        counts = dict.fromkeys(("detected", "marked", "missed", "failed"), 0)
        looked |= {**counts, "ended_at": NOW, "ended_as": Ended.COMPLETED.value}
    opened = insert(sweeps).values(**_identity(request), **looked).on_conflict_do_nothing()
    if seen_by is None:  # who looked in its place has done that, too
        opened = opened.add_cte(_closing_the_dead().cte("orphan_recovery_dead"))
    ended = (await db.execute(opened.returning(sweeps.c.ended_at))).first()
    if ended is None:  # by an earlier try
        told = select(sweeps.c.ended_at).where(sweeps.c.sweep_id == request.sweep_id)
        ended = (await db.execute(told)).one()
    return ended.ended_at is not None


async def note_direct_call(db: Executor, request: SweepRequest) -> None:
    """Make sure that the verdict of a direct mark has a sweep to belong to. Does not commit."""
    ended = {"opened_at": NOW, "ended_at": NOW, "ended_as": Ended.DIRECT.value}
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
    left: int = 0,
    error: str | None,
    looked_twice: str | None = None,
    hold: UUID | None = None,
) -> Row[Any]:
    """Record how a sweep ended; the counts are the ledger's own. Does not commit.

    A sweep that is closed already stays as it is.

    Args:
        db: a transaction of the caller's.
        request: the sweep.
        detected: orphans detected, in runs; at least as many as have a verdict, and ``left``.
        left: orphans that it left without a verdict, in runs.
        error: what stopped the sweep before its end, or None.
        looked_twice: why it looked a second time, or None.
        hold: the hold that it stopped at, or None.

    Returns:
        How many runs it ``marked``, and ``detected``: more than it knows of, where an
        acknowledgement was lost; fewer marks, where the server has forgotten some.
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
            ended_at=NOW,
            ended_as=ended_as if error is None else Ended.FAILED.value,
            detected=func.greatest(
                detected, counts.c.marked + counts.c.missed + counts.c.failed + left
            ),
            error=error,
            looked_twice=looked_twice,
            hold=hold,
        )
        .returning(sweeps.c.marked, sweeps.c.detected)
    )
    closed = (await db.execute(close)).one_or_none()
    if closed is None:  # by an earlier try
        told = select(sweeps.c.marked, sweeps.c.detected)
        closed = (await db.execute(told.where(sweeps.c.sweep_id == request.sweep_id))).one()
    return closed


async def record_contest(
    db: Executor,
    target: str,
    run_id: str,
    *,
    worker_id: str | None,
    reported_status: str,
    any_worker: bool = False,
    went_on_at: datetime | None = None,
) -> bool:
    """Record that a result was reported for a run that stands marked. Does not commit.

    Args:
        db: a transaction of the caller's.
        target: whose run it is, by name.
        run_id: the run.
        worker_id: who reported; None if that is not to be checked.
        reported_status: what the run would have ended as.
        any_worker: the target keeps no workers, so that whoever reports held the run.
        went_on_at: when the run is known to have gone on, in its own row; None if it is not.

    Returns:
        True if a verdict of the ledger is contested by it, now or already; False if the run was
        not marked by any sweep, or while another held it: that says nothing of whether its holder
        lived. Nor does it if the run went on after its last verdict, and so has an end of its own.
    """
    whose = true() if any_worker or worker_id is None else verdicts.c.worker_id == worker_id
    marks = verdicts.alias("orphan_recovery_marks")
    last = select(func.max(marks.c.judged_at)).where(
        marks.c.target == target,
        marks.c.run_id == run_id,
        marks.c.outcome == Outcome.MARKED.value,
    )
    its_end: ColumnElement[bool] = true()
    if went_on_at is not None:
        its_end = literal(went_on_at, NOW.type) <= last.scalar_subquery()
    verdict = (
        select(
            verdicts.c.sweep_id,
            verdicts.c.run_id,
            verdicts.c.target,
            literal(worker_id, Text),
            literal(reported_status, Text),
            NOW,
        )
        .where(verdicts.c.target == target, verdicts.c.run_id == run_id)
        .where(verdicts.c.outcome == Outcome.MARKED.value, whose, its_end)
        .order_by(verdicts.c.judged_at.desc())
        .limit(1)
    )
    await db.execute(
        insert(contests).from_select([c.name for c in contests.c], verdict).on_conflict_do_nothing()
    )
    return bool((await db.execute(select(verdict.exists()))).scalar_one())


def _closing_the_dead() -> Update:
    """Closes the sweeps that were killed before they could close themselves."""
    long_ago = NOW - DEAD_AFTER
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
            ended_at=NOW,
            ended_as=Ended.DIED.value,
            error="killed before its end; its verdicts stand, and what it left is detected again",
        )
    )


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
        "judged_at": verdict.judged_at or NOW,
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
