"""Events: what a sweep logs, a function an event; ``docs/events.md`` explains them to operators.

The hazard is an event that nobody can tie to a sweep, among those of fifty workers that start at
once. So each of them carries ``target`` and ``sweep_id``, and its fields are of native types. A
worker that beats logs its own: see :mod:`orphan_recovery.alive`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from orphan_recovery.detect import Fleet
from orphan_recovery.doubt import Doubt
from orphan_recovery.log import logger
from orphan_recovery.report import Held, SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.settings import ENABLED_VARIABLE
from orphan_recovery.verdict import Outcome, Verdict


def log_start(request: SweepRequest) -> None:
    """A sweep begins."""
    fields = {"threshold_minutes": request.minutes, "dry_run": request.dry_run}
    _log(logging.INFO, "orphan_recovery_starting", request, **fields, scope=request.scope)


def log_wait(request: SweepRequest) -> None:
    """It waits for another sweep of the same table."""
    _log(logging.INFO, "sweep_waits_for_another", request)


def log_sight(request: SweepRequest, fleet: Fleet, *, hides_rows: bool) -> None:
    """It has looked: warn of what it may not see, and of what silence cannot judge."""
    if hides_rows:
        _log(logging.WARNING, "row_security_hides_runs", request)
    if fleet.undatable:
        _log(logging.WARNING, "runs_without_sign_of_life", request, count=fleet.undatable)
    if fleet.ahead:
        fields = {"count": fleet.ahead, "worker_ids": fleet.ahead_workers}
        _log(logging.WARNING, "runs_ahead_of_database_clock", request, **fields)


def log_doubt(request: SweepRequest, doubt: Doubt) -> None:
    """It does not believe what it saw, and is to look twice."""
    fields = {"reasons": str(doubt), "wait_seconds": doubt.wait.total_seconds()}
    _log(logging.WARNING, "sweep_looks_twice", request, **fields)


def log_held(request: SweepRequest, held: Held) -> None:
    """It does not dare to mark some runs."""
    fields = {"hold_id": str(held.hold_id), "runs": held.runs, "is_new": held.is_new}
    _log(logging.ERROR, "orphan_recovery_held", request, **fields, evidence=held.evidence)


def log_gives_way(request: SweepRequest, writes_per_second: int) -> None:
    """It takes longer than it needs to, since others write so much."""
    _log(logging.INFO, "sweep_gives_way", request, writes_per_second=writes_per_second)


def log_detected(request: SweepRequest, runs: Sequence[WorkerRun]) -> None:
    """It has found orphans; with their ids."""
    fields = {"count": len(runs), "run_ids": [run.id for run in runs]}
    _log(logging.INFO, "orphaned_runs_detected", request, **fields)


_MARKED_LEVEL: Final = ContextVar("marked_level", default=logging.WARNING)


@contextmanager
def marks_told_quietly() -> Iterator[None]:
    """Within it a mark is logged as INFO: something else says that the run was marked.

    Of a thousand of them a worker's console would be full.
    """
    before = _MARKED_LEVEL.set(logging.INFO)
    try:
        yield
    finally:
        _MARKED_LEVEL.reset(before)


def log_verdict(request: SweepRequest, verdict: Verdict) -> None:
    """It has given a verdict. Misses have no event of their own: the summary counts them."""
    marked_level = _MARKED_LEVEL.get()
    if verdict.outcome is Outcome.MARKED and not logger.isEnabledFor(marked_level):
        return
    run = verdict.run
    fields: dict[str, Any] = {
        "run_id": run.id,
        "worker_id": run.worker_id,
        "tenant_id": run.tenant_id,
        "evidence": run.evidence.value,
        "sign_of_life": run.sign_of_life.isoformat(),
        "threshold_seconds": run.threshold.total_seconds(),
        "reason": request.reason_for(run),
    }
    if verdict.outcome is Outcome.MARKED:
        silence = verdict.silence.total_seconds() if verdict.silence else None
        fields |= {"silence_seconds": silence}
        _log(marked_level, "orphan_run_marked_crashed", request, **fields)
    elif verdict.outcome is Outcome.FAILED:
        fields |= {"error": verdict.error}
        _log(logging.ERROR, "failed_to_mark_orphan_crashed", request, **fields)


def log_marked(request: SweepRequest, count: int) -> None:
    """It has marked so many at once, each of which the ledger has."""
    _log(logging.WARNING, "orphan_runs_marked_crashed", request, count=count)


def log_end(report: SweepReport) -> None:
    """It has ended, or did not begin."""
    request = report.request
    if not report.enabled:
        fields = {"switched_off_by": ENABLED_VARIABLE}
        _log(logging.WARNING, "orphan_recovery_disabled", request, **fields)
        return
    told = report.as_dict()
    counts = {name: told[name] for name in _COUNTS}
    if report.error:
        _log(logging.ERROR, "orphan_recovery_failed", request, **counts, error=report.error)
        return
    if not report.detected and not report.held and not report.postponed:
        about: dict[str, Any] = {"threshold_minutes": request.minutes}
        about |= {"seen_by": str(report.seen_by)} if report.seen_by else {}
        _log(logging.INFO, "no_orphaned_runs_found", request, **about)
    counts |= {"postponed": report.postponed}
    _log(logging.INFO, "orphan_recovery_complete", request, **counts)


_COUNTS: Final = (
    *("dry_run", "detected", "recovered", "skipped", "failed"),
    *("held", "exempt", "undatable", "ahead"),
)


def _log(level: int, event: str, request: SweepRequest, **fields: Any) -> None:
    """Emit an event, with what all of them have."""
    about = {"target": request.target.name, "sweep_id": str(request.sweep_id)}
    logger.log(level, event, extra={**about, **fields})
