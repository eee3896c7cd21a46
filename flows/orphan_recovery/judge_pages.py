"""Judge page by page: longest silence first, with a reason for whatever is left alone.

The hazard is that one bad row costs the rest its recovery, or one locked row delays it. So a page
that fails is halved until the bad row stands alone, and rows that others have locked are passed
over, looked at anew a few times, and only then waited for, each by itself; so are those whose mark
waits for a lock that a trigger of the table wants, such as on a counter. All of them together wait
no longer than :mod:`orphan_recovery.waiting` says; what is left then is tried once more.
"""

import asyncio
from collections.abc import Collection
from functools import partial
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.attempt import LONGEST_TRY_SECONDS, bounded, in_transaction
from orphan_recovery.database import POOL_SIZE, describe, set_lock_timeout, transaction
from orphan_recovery.detect import Among, detect
from orphan_recovery.events import log_detected, log_verdict
from orphan_recovery.mark import mark
from orphan_recovery.policy import is_outage, is_transient, waited_too_long
from orphan_recovery.report import SHOWN, SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.verdict import Outcome, Verdict
from orphan_recovery.waiting import HASTY_LOCK_TIMEOUT_MS, Waiting

PAGE: Final = 500
"""Runs detected, and marked, in one transaction."""
PATIENCE: Final = 8
"""Rounds in which rows that others have locked, such as another sweep's slice, are looked at anew
before each is waited for by itself; each after twice as long, two and a half seconds in all."""


async def judge_pages(
    engine: AsyncEngine,
    report: SweepReport,
    among: Among | None,
    failed: list[Verdict],
    judged: Collection[str] = (),
) -> None:
    """Mark page by page, longest silence first, naming whatever is left alone. Commits each page.

    Args:
        engine: where the runs are.
        report: is told of every verdict but the failures; a dry run, of the orphans.
        among: only runs for which this holds.
        failed: those of before, which are not tried again; is given the failures, which are yet
            to be settled, also where an error ends it.
        judged: further runs with a verdict of this sweep, which stands: they are not judged again.

    Raises:
        ConfigurationError: the table cannot be used.
        sqlalchemy.exc.DBAPIError, OSError: an outage, or a look that failed: after the retries of
            the policy. What is marked stands.
    """
    request, waiting = report.request, Waiting()
    tried = {*judged, *(verdict.run.id for verdict in failed)}
    for patience in reversed(range(PATIENCE)):
        locked = await _judge_each_page(engine, report, among, tried, failed)
        if locked:
            waiting.begin()
        if len(locked) <= POOL_SIZE or not patience or waiting.is_over:
            break
        await asyncio.sleep(0.01 * 2 ** (PATIENCE - patience))
    report.saw(locked)
    if locked:
        log_detected(request, locked)
    # Last, so that a row that is locked for long delays no other.
    at_once = asyncio.Semaphore(POOL_SIZE)
    marking = (_mark_locked(engine, request, run, at_once, waiting) for run in locked)
    given = await asyncio.gather(*marking)
    _tell(report, [verdict for verdict in given if verdict is not None], failed)
    left = [run for run, verdict in zip(locked, given, strict=True) if verdict is None]
    await _try_once_more(engine, report, left, failed, waiting)


async def _try_once_more(
    engine: AsyncEngine,
    report: SweepReport,
    runs: list[WorkerRun],
    failed: list[Verdict],
    waiting: Waiting,
) -> None:
    """Mark what is free by now of the runs that are waited for no longer; the others fail."""
    request = report.request
    for start in range(0, len(runs), PAGE):
        page = runs[start : start + PAGE]
        verdicts = await mark_page(engine, request, page, hasty=True)
        given = [
            verdict or _failure(request, run, waiting.in_vain_for(run))
            for run, verdict in zip(page, verdicts, strict=True)
        ]
        _tell(report, given, failed)


def _tell(report: SweepReport, given: list[Verdict], failed: list[Verdict]) -> None:
    """Tell the report; but the failures are yet to be settled."""
    report.judged([v for v in given if v.outcome is not Outcome.FAILED])
    failed += [v for v in given if v.outcome is Outcome.FAILED]


async def _judge_each_page(
    engine: AsyncEngine,
    report: SweepReport,
    among: Among | None,
    tried: set[str],
    failed: list[Verdict],
) -> list[WorkerRun]:
    """One pass. Returns the runs whose rows others have locked."""
    request, locked = report.request, list[WorkerRun]()
    last: WorkerRun | None = None
    while (room := _room(report, locked)) > 0:
        look = partial(detect, request=request, after=last, page=room, among=among)
        page = await in_transaction(engine, look)
        if not page:
            break
        is_first, last = last is None, page[-1]
        page = [run for run in page if run.id not in tried]
        if request.dry_run:
            if shown := page[: max(0, SHOWN - report.detected)]:
                log_detected(request, shown)
            report.saw(page)
            continue
        if request.target.orphans_per_second is not None and not is_first:
            await asyncio.sleep(len(page) / request.target.orphans_per_second)
        verdicts = await mark_page(engine, request, page) if page else []
        pairs = list(zip(page, verdicts, strict=True))
        judged = [run for run, verdict in pairs if verdict is not None]
        locked += [run for run, verdict in pairs if verdict is None]
        report.saw(judged)
        if judged:
            log_detected(request, judged)
        given = [verdict for verdict in verdicts if verdict is not None]
        tried |= {v.run.id for v in given}
        _tell(report, given, failed)
    return locked


def _room(report: SweepReport, locked: list[WorkerRun]) -> int:
    """How many runs the next page may have."""
    limit, page = report.request.limit, PAGE
    if not report.request.dry_run:  # what is marked, is so at most a second's worth at once
        page = min(page, report.request.target.orphans_per_second or page)
    return page if limit is None else min(page, limit - report.detected - len(locked))


async def mark_page(
    engine: AsyncEngine, request: SweepRequest, runs: list[WorkerRun], *, hasty: bool = False
) -> list[Verdict | None]:
    """Mark a page in one transaction; if it fails, its halves, down to the one bad row. Commits.

    If it failed since it waited too long for a lock, its halves are tried once, and hardly wait:
    else one run whose mark has to wait would cost half a minute at each halving.

    Args:
        engine: where the runs are.
        request: the sweep that detected them.
        runs: a page of them, at least one.
        hasty: try once, and hardly wait for a lock.

    Returns:
        A verdict for each run, in order, a failure where it was the bad row. None where another
        transaction had locked the row, or the mark is to be waited for: nothing is known yet.

    Raises:
        sqlalchemy.exc.DBAPIError, OSError: an outage, after the retries of the policy.
    """
    try:
        if hasty:
            verdicts = await _mark_hastily(engine, request, runs)
        else:
            verdicts = await in_transaction(
                engine, lambda db: mark(db, request, runs, skip_locked=True)
            )
    except Exception as error:
        if is_outage(error):
            raise
        if len(runs) == 1:
            is_to_wait = hasty and is_transient(error)
            return [None if is_to_wait else _failure(request, runs[0], error)]
        middle, hasty = len(runs) // 2, hasty or waited_too_long(error)
        first = await mark_page(engine, request, runs[:middle], hasty=hasty)
        return first + await mark_page(engine, request, runs[middle:], hasty=hasty)
    for verdict in verdicts:
        if verdict is not None:
            log_verdict(request, verdict)
    return verdicts


async def _mark_hastily(
    engine: AsyncEngine, request: SweepRequest, runs: list[WorkerRun]
) -> list[Verdict | None]:
    async with bounded(LONGEST_TRY_SECONDS), transaction(engine) as connection:
        await set_lock_timeout(connection, HASTY_LOCK_TIMEOUT_MS)
        return await mark(connection, request, runs, skip_locked=True)


async def _mark_locked(
    engine: AsyncEngine,
    request: SweepRequest,
    run: WorkerRun,
    at_once: asyncio.Semaphore,
    waiting: Waiting,
) -> Verdict | None:
    """Mark a run that was passed over, waiting for it this time; None if that is over."""
    async with at_once:
        if waiting.is_over:
            return None
        try:
            verdict = await in_transaction(engine, lambda db: waiting.mark(db, request, run))
        except Exception as error:
            return _failure(request, run, error)
    log_verdict(request, verdict)
    return verdict


def _failure(request: SweepRequest, run: WorkerRun, error: Exception) -> Verdict:
    verdict = Verdict(run=run, outcome=Outcome.FAILED, error=describe(error))
    log_verdict(request, verdict)
    return verdict
