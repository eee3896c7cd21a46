"""Recover: the whole sweep without Prefect, for a worker's start-up and for the command line.

The hazard is a recovery that keeps a worker from starting: so but for a configuration that cannot
be used nothing is raised, and the report says what happened.
"""

import asyncio
from datetime import timedelta
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.attempt import in_transaction, retried
from orphan_recovery.database import address, describe, make_engine, transaction
from orphan_recovery.detect import look_at_fleet
from orphan_recovery.doubt import Doubt
from orphan_recovery.events import log_end, log_start
from orphan_recovery.judge import judge_all
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.settings import (
    ConfigurationError,
    check_threshold,
)
from orphan_recovery.sweep import (
    Look,
    begin,
    decide_on,
    finish,
    is_enabled,
    look_again_at,
    look_until_sure,
    tell_of,
    whoami,
)
from orphan_recovery.targets import find_target
from orphan_recovery.turn import in_turn
from orphan_recovery.verdict import Verdict

MAX_SETTLE_SECONDS: Final = 86_400


async def recover_orphaned_runs(threshold_minutes: int | None = None) -> dict[str, Any]:
    """Detect and mark all orphans: for a worker's start-up, and for operations scripts.

    Of the target that is meant by default (see :func:`recover_target` for another). Opens its own
    connections, commits in batches of a fraction of a second each, and may be called by any
    number of workers at once: who comes while another sweep of the table is at work waits for it,
    for ten seconds at most; and where another that was asked the same has looked since, and judged
    all that it found, there is nothing left to look for.

    Args:
        threshold_minutes: the silence that makes an orphan, in whole minutes, at least 1; None
            for the target's own, which is ``ORPHAN_THRESHOLD_MINUTES`` unless it says otherwise.

    Returns:
        ``enabled``; in runs: ``detected``, ``recovered`` (marked), ``skipped`` (no orphan any
        more) and ``failed``; ``runs``, a list of at most 1,000 with outcome and evidence,
        failures first; ``error``, None or what stopped the sweep before its end, such as a
        database that cannot be reached. Further: ``target, dry_run, sweep_id, threshold_minutes,
        outcomes, in_flight, undatable, ahead, exempt, held, hold, silent_workers, looked_twice,
        postponed, seen_by, message, warnings, next_steps``; ``held`` is how many runs it did not
        dare to mark, by the hold ``hold``, and ``silent_workers`` up to ten of the workers that
        look dead there; ``looked_twice`` and ``postponed`` why it looked a second time, or left
        what has beaten to the next sweep, or None; ``seen_by`` None, or the id of the sweep that
        looked in this one's place: what was marked is in its report; ``message`` is the headline,
        ``warnings`` what a person has to look at besides, and ``next_steps`` what is to be done:
        lists of texts, empty if there is nothing.
        With recovery switched off, ``enabled`` is False and the database is not touched.

    Raises:
        ConfigurationError: the threshold, a variable or the file of targets holds a value that
            cannot be used. Nothing else is raised: neither a bad run nor a lost database stops a
            worker's start.
    """
    return await _recover("recover_orphaned_runs", None, threshold_minutes)


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
    return await _recover("recover_target", target, threshold_minutes)


async def _recover(
    called: str, target: str | None, threshold_minutes: int | None
) -> dict[str, Any]:
    if threshold_minutes is not None:
        check_threshold(threshold_minutes)
    request = SweepRequest(
        asked_by=whoami(called),
        target=find_target(target),
        threshold_minutes=threshold_minutes,
    )
    return await _report_on(request)


async def recover_worker(
    worker_id: str, *, target: str | None = None, settle_seconds: float | None = None
) -> dict[str, Any]:
    """Recover at once what a worker held before it died, for when it is back under its old name.

    Whoever is back cannot still be working on what it held before; only a second process of the
    same name could. So this waits for as long as such a twin would need to beat, and recovers
    what has not been heard of in that time, whatever the threshold and the rules say.

    Args:
        worker_id: the worker, as its runs name it.
        target: as in :func:`recover_target`.
        settle_seconds: how long to wait, above 0 and at most 86,400; None for two beats of the
            target. Shorter than a beat, it takes a twin that lives for dead.

    Returns:
        As :func:`recover_orphaned_runs`.

    Raises:
        ConfigurationError: as there.
    """
    meant = find_target(target)
    if settle_seconds is not None and not 0 < settle_seconds <= MAX_SETTLE_SECONDS:
        raise ConfigurationError(
            f"settle_seconds is {settle_seconds!r}: give a number of seconds above 0 and at most "
            f"{MAX_SETTLE_SECONDS}, or leave it out"
        )
    settle = 2 * meant.beat if settle_seconds is None else timedelta(seconds=settle_seconds)
    request = SweepRequest(
        asked_by=whoami("recover_worker"), target=meant, worker=worker_id, returned=settle
    )
    if is_enabled() and await _holds_any(request):
        await asyncio.sleep(settle.total_seconds())
    return await _report_on(request)


async def _holds_any(request: SweepRequest) -> bool:
    """Whether there is anything to wait for; where that cannot be asked, there may be."""
    try:
        engine = make_engine(address(request.target))
        try:
            async with transaction(engine) as connection:
                return (await look_at_fleet(connection, request)).in_flight > 0
        finally:
            await engine.dispose()
    except Exception:  # the sweep itself says it
        return True


async def run_sweep(request: SweepRequest) -> SweepReport:
    """One whole sweep in this process: look, mark in slices or pages, summarise. Commits each of
    these by itself.

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
        try:
            engine = make_engine(address(request.target))
            try:
                await _sweep(engine, request, report)
            finally:
                await engine.dispose()
        except Exception as error:
            report.error = describe(error)
            log_end(report)
            raise
    else:
        report.enabled = False
    log_end(report)
    return report


async def _report_on(request: SweepRequest) -> dict[str, Any]:
    """Sweep, and raise nothing: neither a bad run nor a lost database stops a worker's start."""
    try:
        report = await run_sweep(request)
    except Exception as error:
        report = SweepReport(request, error=describe(error))
    return report.as_dict()


async def _sweep(engine: AsyncEngine, request: SweepRequest, report: SweepReport) -> None:
    failed, decision = list[Verdict](), None

    async def look_again(before: Look, doubt: Doubt) -> Look:
        await asyncio.sleep(doubt.wait.total_seconds())
        return await retried(
            lambda: in_turn(engine, request, lambda db, _: look_again_at(db, request, before))
        )

    try:
        look = await retried(
            lambda: in_turn(engine, request, lambda db, other: begin(db, request, other))
        )
        tell_of(look, report)
        if look.is_closed:
            return
        look = await look_until_sure(report, look, look_again)
        decision = await in_transaction(engine, lambda db: decide_on(db, report, look))
        report.held = decision.held
        # What falls silent after the look is not for this sweep.
        if look.fleet.orphans:
            await judge_all(engine, report, decision, failed)
    except ConfigurationError:
        raise
    except Exception as error:
        report.error = describe(error)
    if report.fleet is None:  # it never began, and has nothing to close
        return
    try:
        settled = await in_transaction(engine, lambda db: finish(db, report, failed, decision))
        report.judged(settled)
    except Exception as error:
        report.judged(failed)
        report.error = report.error or describe(error)
