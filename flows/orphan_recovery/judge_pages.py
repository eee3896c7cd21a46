"""Judge page by page: longest silence first, with a reason for whatever is left alone.

The hazard is that one bad row costs the rest its recovery, or one held row delays it. So a page
that fails is halved until the bad row stands alone, and rows that somebody holds are passed over,
looked at anew a few times, and only then waited for, each by itself.
"""

import asyncio
import logging
from contextvars import ContextVar
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.attempt import in_transaction
from orphan_recovery.database import POOL_SIZE, describe
from orphan_recovery.detect import Among, detect
from orphan_recovery.mark import log_verdict, mark, mark_one
from orphan_recovery.policy import is_outage
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.sweep import log_detected
from orphan_recovery.verdict import Outcome, Verdict

PAGE: Final = 500
"""Runs detected, and marked, in one transaction."""
PATIENCE: Final = 8
"""Rounds in which rows that others hold, such as another sweep's slice, are looked at anew before
each of them is waited for by itself; each after twice as long, two and a half seconds in all."""
MARKED_LEVEL: Final = ContextVar("marked_level", default=logging.WARNING)
"""At which a mark is logged. Prefect prints of an event no more than its name: of a thousand of
them a worker's console would be full, and tell nothing."""


async def judge_pages(
    engine: AsyncEngine, report: SweepReport, among: Among | None, failed: list[Verdict]
) -> None:
    """Mark page by page, longest silence first, naming whatever is left alone.

    Args:
        engine: where the runs are.
        report: is told of every verdict but the failures; a dry run, of the orphans.
        among: only runs for which this holds.
        failed: those of before, which are not tried again; is given the failures, which are yet
            to be settled, also where an error ends it.
    """
    request, tried = report.request, {verdict.run.id for verdict in failed}
    for patience in reversed(range(PATIENCE)):
        held = await _judge_each_page(engine, report, among, tried, failed)
        if len(held) <= POOL_SIZE or not patience:
            break
        await asyncio.sleep(0.01 * 2 ** (PATIENCE - patience))
    report.saw(held)
    # Last, so that a row which somebody holds for long delays no other.
    at_once = asyncio.Semaphore(POOL_SIZE)
    waiting = (_mark_held(engine, request, run, at_once) for run in held)
    given = await asyncio.gather(*waiting)
    report.judged([v for v in given if v.outcome is not Outcome.FAILED])
    failed += [v for v in given if v.outcome is Outcome.FAILED]


async def _judge_each_page(
    engine: AsyncEngine,
    report: SweepReport,
    among: Among | None,
    tried: set[str],
    failed: list[Verdict],
) -> list[WorkerRun]:
    """One pass. Returns the runs whose rows somebody holds."""
    request, held = report.request, list[WorkerRun]()
    last: WorkerRun | None = None
    while (room := _room(report, held)) > 0:
        look = partial(detect, request=request, after=last, page=room, among=among)
        page = await in_transaction(engine, look)
        if not page:
            break
        is_first, last = last is None, page[-1]
        page = [run for run in page if run.id not in tried]
        if request.dry_run:
            report.saw(page)
            continue
        if request.target.orphans_per_second is not None and not is_first:
            await asyncio.sleep(len(page) / request.target.orphans_per_second)
        verdicts = await mark_page(engine, request, page) if page else []
        pairs = list(zip(page, verdicts, strict=True))
        judged = [run for run, verdict in pairs if verdict is not None]
        held += [run for run, verdict in pairs if verdict is None]
        report.saw(judged)
        if judged:
            log_detected(judged)
        given = [verdict for verdict in verdicts if verdict is not None]
        failed += [v for v in given if v.outcome is Outcome.FAILED]
        tried |= {v.run.id for v in given}
        report.judged([v for v in given if v.outcome is not Outcome.FAILED])
    return held


def _room(report: SweepReport, held: list[WorkerRun]) -> int:
    """How many runs the next page may have."""
    limit, page = report.request.limit, PAGE
    if not report.request.dry_run:  # what is marked, is so at most a second's worth at once
        page = min(page, report.request.target.orphans_per_second or page)
    return page if limit is None else min(page, limit - report.detected - len(held))


async def mark_page(
    engine: AsyncEngine, request: SweepRequest, runs: list[WorkerRun]
) -> list[Verdict | None]:
    """Mark a page in one transaction; if it fails, its halves, down to the one bad row."""
    try:
        verdicts = await in_transaction(
            engine, lambda db: mark(db, request, runs, skip_locked=True)
        )
    except Exception as error:
        if is_outage(error):
            raise
        if len(runs) == 1:
            return [_failure(request, runs[0], error)]
        middle = len(runs) // 2
        first = await mark_page(engine, request, runs[:middle])
        return first + await mark_page(engine, request, runs[middle:])
    for verdict in verdicts:
        if verdict is not None:
            tell_of_verdict(verdict, request)
    return verdicts


async def _mark_held(
    engine: AsyncEngine, request: SweepRequest, run: WorkerRun, at_once: asyncio.Semaphore
) -> Verdict:
    """Mark a run whose row somebody held, waiting for it this time."""
    async with at_once:
        try:
            verdict = await in_transaction(engine, lambda db: mark_one(db, request, run))
        except Exception as error:
            return _failure(request, run, error)
    tell_of_verdict(verdict, request)
    return verdict


def _failure(request: SweepRequest, run: WorkerRun, error: Exception) -> Verdict:
    verdict = Verdict(run=run, outcome=Outcome.FAILED, error=describe(error))
    tell_of_verdict(verdict, request)
    return verdict


def tell_of_verdict(verdict: Verdict, request: SweepRequest) -> None:
    """Log a verdict, a mark at the level that was chosen for marks."""
    log_verdict(verdict, request, marked_level=MARKED_LEVEL.get())
