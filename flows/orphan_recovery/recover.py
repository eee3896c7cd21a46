"""Recover: the whole sweep without Prefect, for a worker's start-up and for the command line.

The hazard is that one bad row, or one bad moment, costs the rest its recovery. So the sweep goes
page by page in small transactions, a page that fails is halved until the bad row stands alone,
and only an outage of the database itself ends it, loudly; what is left is found again by the
next sweep.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery import RECOVERY_ENABLED
from orphan_recovery.database import (
    POOL_SIZE,
    Executor,
    address,
    describe,
    make_engine,
    transaction,
)
from orphan_recovery.detect import Fleet, detect, look_at_fleet
from orphan_recovery.ledger import close_sweep, open_sweep, require_ledger
from orphan_recovery.log import logger
from orphan_recovery.mark import log_verdict, mark, mark_one, settle
from orphan_recovery.policy import is_outage, retrying
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.settings import (
    ENABLED_VARIABLE,
    ConfigurationError,
    check_threshold,
    load_settings,
)
from orphan_recovery.targets import find_target
from orphan_recovery.verdict import Outcome, Verdict

T = TypeVar("T")

PAGE: Final = 500
"""Runs detected, and marked, in one transaction at most."""


async def recover_orphaned_runs(threshold_minutes: int | None = None) -> dict[str, Any]:
    """Detect and mark all orphans: for a worker's start-up, and for operations scripts.

    Of the target that is meant by default (see :func:`recover_target` for another). Opens its own
    connections, commits in batches of at most 500 runs, and may be called by any number of
    workers at once.

    Args:
        threshold_minutes: the silence that makes an orphan, in whole minutes, at least 1; None
            for the target's own, which is ``ORPHAN_THRESHOLD_MINUTES`` unless it says otherwise.

    Returns:
        ``enabled``; in runs: ``detected``, ``recovered`` (marked), ``skipped`` (no orphan any
        more) and ``failed``; ``runs``, a list of at most 1,000 with outcome and evidence,
        failures first; ``error``, None or what stopped the sweep before its end, such as a
        database that cannot be reached. Further: ``target, dry_run, sweep_id, threshold_minutes,
        outcomes, in_flight, undatable, ahead, exempt, message``. With recovery switched off,
        ``enabled`` is False and the database is not touched.

    Raises:
        ConfigurationError: the threshold, a variable or the file of targets holds a value that
            cannot be used. Nothing else is raised: neither a bad run nor a lost database stops a
            worker's start.
    """
    return await recover_target(None, threshold_minutes)


async def recover_target(
    target: str | None, threshold_minutes: int | None = None
) -> dict[str, Any]:
    """As :func:`recover_orphaned_runs`, for the target of that name in the file of targets.

    Args:
        target: its name; None for the one that is meant by default.
        threshold_minutes: as there. The target's rules come before it.

    Returns:
        As there.

    Raises:
        ConfigurationError: as there, or there is no such target.
    """
    if threshold_minutes is not None:
        check_threshold(threshold_minutes)
    request = SweepRequest(
        asked_by=whoami("recover_orphaned_runs"),
        target=find_target(target),
        threshold_minutes=threshold_minutes,
    )
    try:
        report = await run_sweep(request)
    except Exception as error:
        report = SweepReport(request, error=describe(error))
        log_end(report)
    return report.as_dict()


async def run_sweep(request: SweepRequest) -> SweepReport:
    """One whole sweep in this process: detect, mark page by page, summarise.

    Args:
        request: which target, scope, threshold, reason, and whether to write at all.

    Returns:
        The report. Its ``error`` says what ended the sweep early, if something did.

    Raises:
        ConfigurationError: the address, the table or the ledger cannot be used.
    """
    report = SweepReport(request)
    if is_enabled():
        log_start(request)
        engine = make_engine(address(request.target))
        try:
            await _sweep(engine, request, report)
        finally:
            await engine.dispose()
    else:
        report.enabled = False
    log_end(report)
    return report


def is_enabled() -> bool:
    """Whether recovery may run. Off, now or when the process started, is off."""
    return RECOVERY_ENABLED and load_settings().recovery_enabled


def whoami(what: str) -> str:
    """``what``, and which process on which host asked, for the ledger."""
    return f"{what} on {socket.gethostname()}, process {os.getpid()}"


async def _sweep(engine: AsyncEngine, request: SweepRequest, report: SweepReport) -> None:
    failed: list[Verdict] = []
    try:
        report.fleet = await _in_transaction(engine, lambda db: begin(db, request))
        failed = await _judge_all(engine, request, report)
    except ConfigurationError:
        raise
    except Exception as error:
        report.error = describe(error)
    try:
        report.judged(
            await _in_transaction(
                engine, lambda db: finish(db, request, failed, report.detected, report.error)
            )
        )
    except Exception as error:
        report.judged(failed)
        report.error = report.error or describe(error)


async def begin(db: Executor, request: SweepRequest) -> Fleet:
    """Look at the whole fleet and open the sweep in the ledger. Does not commit.

    A dry run opens nothing. Warns of runs in flight that silence cannot judge.

    Raises:
        ConfigurationError: the table or the ledger is not there.
    """
    fleet = await look_at_fleet(db, request)
    if fleet.undatable:
        logger.warning("runs_without_sign_of_life", extra={"count": fleet.undatable})
    if fleet.ahead:
        logger.warning(
            "runs_ahead_of_database_clock",
            extra={"count": fleet.ahead, "worker_ids": fleet.ahead_workers},
        )
    if not request.dry_run:
        await require_ledger(db)
        await open_sweep(db, request, fleet)
    return fleet


async def finish(
    db: Executor,
    request: SweepRequest,
    failed: list[Verdict],
    detected: int,
    error: str | None,
) -> list[Verdict]:
    """Record what failed and close the sweep. Does not commit. A dry run has nothing to close.

    Returns:
        The failures as they now stand: a lost acknowledgement may turn out to have been a mark.
    """
    if request.dry_run:
        return []
    settled = await settle(db, request, failed)
    await close_sweep(db, request, detected=detected, error=error)
    return settled


async def _judge_all(
    engine: AsyncEngine, request: SweepRequest, report: SweepReport
) -> list[Verdict]:
    """Detect and mark page by page. Returns the failures, which are yet to be settled."""
    held: list[WorkerRun] = []
    failed: list[Verdict] = []
    last: WorkerRun | None = None
    while request.limit is None or report.detected < request.limit:
        size = PAGE if request.limit is None else min(PAGE, request.limit - report.detected)

        next_page = partial(detect, request=request, after=last, page=size)
        page = await _in_transaction(engine, next_page)
        if not page:
            break
        last = page[-1]
        report.saw(page)
        log_detected(page)
        if not request.dry_run:
            verdicts = await _mark_page(engine, request, page)
            held += [run for run, verdict in zip(page, verdicts, strict=True) if verdict is None]
            given = [verdict for verdict in verdicts if verdict is not None]
            failed += [v for v in given if v.outcome is Outcome.FAILED]
            report.judged([v for v in given if v.outcome is not Outcome.FAILED])
    # Last, so that a row which somebody holds for long delays no other.
    waiting = asyncio.Semaphore(POOL_SIZE)
    for verdict in await asyncio.gather(
        *(_mark_held(engine, request, run, waiting) for run in held)
    ):
        if verdict.outcome is Outcome.FAILED:
            failed.append(verdict)
        else:
            report.judged([verdict])
    return failed


async def _mark_page(
    engine: AsyncEngine, request: SweepRequest, runs: list[WorkerRun]
) -> list[Verdict | None]:
    """Mark a page in one transaction; if it fails, its halves, down to the one bad row."""

    try:
        verdicts = await _in_transaction(
            engine, lambda db: mark(db, request, runs, skip_locked=True)
        )
    except Exception as error:
        if is_outage(error):
            raise
        if len(runs) == 1:
            return [_failure(request, runs[0], error)]
        middle = len(runs) // 2
        first = await _mark_page(engine, request, runs[:middle])
        return first + await _mark_page(engine, request, runs[middle:])
    for verdict in verdicts:
        if verdict is not None:
            log_verdict(verdict, request)
    return verdicts


async def _mark_held(
    engine: AsyncEngine, request: SweepRequest, run: WorkerRun, at_once: asyncio.Semaphore
) -> Verdict:
    """Mark a run whose row somebody held, waiting for it this time."""
    async with at_once:
        try:
            verdict = await _in_transaction(engine, lambda db: mark_one(db, request, run))
        except Exception as error:
            return _failure(request, run, error)
    log_verdict(verdict, request)
    return verdict


async def _in_transaction(
    engine: AsyncEngine, work: Callable[[AsyncConnection], Awaitable[T]]
) -> T:
    """Do ``work`` in a transaction of its own; all of it again while the error is transient."""
    async for attempt in retrying():
        with attempt:
            async with transaction(engine) as connection:
                result = await work(connection)
    return result


def _failure(request: SweepRequest, run: WorkerRun, error: Exception) -> Verdict:
    verdict = Verdict(run=run, outcome=Outcome.FAILED, error=describe(error))
    log_verdict(verdict, request)
    return verdict


def log_start(request: SweepRequest) -> None:
    """Emit the event of a sweep that begins."""
    fields = {
        "sweep_id": str(request.sweep_id),
        "target": request.target.name,
        "threshold_minutes": request.minutes,
        "dry_run": request.dry_run,
        "scope": request.scope,
    }
    logger.info("orphan_recovery_starting", extra=fields)


def log_detected(runs: list[WorkerRun]) -> None:
    """Emit the event of orphans found, with their ids."""
    fields = {"count": len(runs), "run_ids": [run.id for run in runs]}
    logger.info("orphaned_runs_detected", extra=fields)


def log_end(report: SweepReport) -> None:
    """Emit the events of a sweep that ended, or did not begin."""
    if not report.enabled:
        logger.warning("orphan_recovery_disabled", extra={"switched_off_by": ENABLED_VARIABLE})
        return
    told = report.as_dict()
    names = (
        "target",
        "sweep_id",
        "dry_run",
        "detected",
        "recovered",
        "skipped",
        "failed",
        "undatable",
    )
    fields = {name: told[name] for name in (*names, "ahead")}
    if report.error:
        logger.error("orphan_recovery_failed", extra={**fields, "error": report.error})
        return
    if not report.detected:
        asked = report.request
        about = {"target": asked.target.name, "threshold_minutes": asked.minutes}
        logger.info("no_orphaned_runs_found", extra=about)
    logger.info("orphan_recovery_complete", extra=fields)
