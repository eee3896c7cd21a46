"""The flow: detect, mark each orphan as a task of its own, summarise.

The hazard is an orchestrator that hides what happened: one failed mark that fails all, or one
that nobody hears of. So each orphan has its own task run (``flow_tasks.py``); and the flow decides
its end explicitly, Failed with a message that counts as soon as one orphan could not be marked.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.exceptions import Pause, TerminationSignal
from prefect.states import Completed, Failed
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.attempt import in_transaction
from orphan_recovery.database import address, describe, make_engine
from orphan_recovery.doubt import Doubt
from orphan_recovery.events import log_detected, log_end, log_start, log_verdict
from orphan_recovery.flow_heed import heed
from orphan_recovery.flow_hold import (
    ASKED_FOR,
    HELD,
    answer_to_this_run,
    ask_in_the_ui,
    can_ask,
    tell_of_hold,
    this_run,
    undelivered_answers,
    who_asks,
    who_left_them,
    withdraw_questions,
)
from orphan_recovery.flow_tasks import (
    behind,
    decide,
    detect,
    look_again,
    mark,
    mark_pages,
    mark_slices,
    open_sweep,
    summarise,
    unseen,
)
from orphan_recovery.hold import Decision, ended_holds
from orphan_recovery.judge import Progress
from orphan_recovery.mark_together import SharedMarks
from orphan_recovery.names import FLOW_NAME, TRIGGERED
from orphan_recovery.policy import is_outage
from orphan_recovery.report import SweepReport
from orphan_recovery.report_pages import as_markdown, as_table
from orphan_recovery.request import DEFAULT_REASON, MAX_REASON_LENGTH, MOST_RUNS, SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.settings import MAX_THRESHOLD_MINUTES
from orphan_recovery.slices import is_sliceable
from orphan_recovery.sweep import Look, finish, is_enabled, look_until_sure, tell_of
from orphan_recovery.target import DEFAULT_TARGET
from orphan_recovery.targets import find_target
from orphan_recovery.verdict import Outcome, Verdict

MOST_TASKS = 10_000
BEAT = "orphan-recovery.beat"
BEAT_SECONDS = 120.0
"""Between two events that say that a sweep is at work still; the first comes after as long."""
CLOSING_SECONDS = 5.0
"""How long a sweep that is told to stop may take to say so in the ledger."""
TASKS_AT_ONCE = 64
"""Task runs side by side. They mark together, so that each needs no connection of its own."""


class SweepFailed(RuntimeError):  # noqa: N818 - named for what an operator reads
    """The sweep did not end well. ``report`` is what it did all the same."""

    def __init__(self, report: SweepReport) -> None:
        super().__init__(report.headline())
        self.report = report.as_dict()


@flow(name=FLOW_NAME, persist_result=False)
async def recover_orphaned_runs(
    target: Annotated[str, Field(min_length=1)] | None = None,
    threshold_minutes: Annotated[int, Field(ge=1, le=MAX_THRESHOLD_MINUTES)] | None = None,
    dry_run: bool = False,
    tenant: Annotated[str, Field(min_length=1)] | None = None,
    worker: Annotated[str, Field(min_length=1)] | None = None,
    limit: Annotated[int, Field(ge=1, le=MOST_RUNS)] | None = None,
    reason: Annotated[str, Field(min_length=1, max_length=MAX_REASON_LENGTH)] = DEFAULT_REASON,
    task_each_up_to: Annotated[int, Field(ge=0, le=MOST_TASKS)] = 1_000,
) -> State[Any]:
    """Find runs whose worker died and mark each as crashed.

    Every verdict repeats the whole check against the row under its lock, so a run that finishes,
    beats or changes hands in the meantime is left alone. Look first with *dry run*.

    Args:
        target: Which table, by its name in orphan-recovery.toml. Leave at None for the one that
            is meant by default.
        threshold_minutes: Minutes of silence that make a run an orphan, at least 1. Leave at None
            for the target's own. Keep it above three heartbeats; for runs that do not beat,
            above the longest honest run.
        dry_run: Only look: list what would be judged and write nothing at all.
        tenant: Only runs of this tenant. Leave at None for all.
        worker: Only runs held by this worker. Leave at None for all.
        limit: Judge at most so many runs, longest silence first. Leave at None for no limit.
        reason: What the error text of each marked run begins with.
        task_each_up_to: Up to so many orphans, each is marked by a task run of its own. More are
            marked many at a time: in slices of thousands, a task run for a few seconds of them;
            where limit is given, or the table allows no slices, in pages, all by one task run.
    """
    request = SweepRequest(
        asked_by=_asked_by(),
        target=find_target(target),
        threshold_minutes=threshold_minutes,
        tenant=tenant,
        worker=worker,
        limit=limit,
        reason=reason,
        dry_run=dry_run,
    )
    report = SweepReport(request)
    async with _beating():
        return await _recover(report, task_each_up_to)


async def _recover(report: SweepReport, task_each_up_to: int) -> State[Any]:
    request, target = report.request, report.request.target.name
    told = list[str]()
    if is_enabled():
        engine = make_engine(address(request.target))
        try:
            if (given := await answer_to_this_run()) is not None:
                heeded = await heed(engine, target, given)
                if heeded.is_left:
                    return Completed(message=heeded.told)
                told += [] if heeded.is_released else [heeded.told]
            log_start(request)
            await _sweep(engine, report, task_each_up_to)
        finally:
            await engine.dispose()
    else:
        report.enabled = False
    log_end(report)
    await _show(report)
    if report.ended_well:
        message = "; ".join((report.headline(), *told))
        return Completed(message=message, data=report.as_dict())
    if report.held is not None:
        asker = await who_asks(report)
        left = None if asker else await who_left_them(report)
        asks = report.is_held and asker is None and left is None and can_ask()
        if report.held.is_new or asks:
            tell_of_hold(report)
        if asks:
            await ask_in_the_ui(report)  # ends this process
        if asker:
            told.append(f"flow run {asker} waits for the answer")
        if left is not None:
            told.append(left.in_words(report.held.hold_id, target))
    name = HELD if report.is_held else "Failed"
    message = "; ".join((report.headline(), *told))
    return Failed(name=name, message=message, data=SweepFailed(report))


async def _sweep(engine: AsyncEngine, report: SweepReport, task_each_up_to: int) -> None:
    request, failed, decision = report.request, list[Verdict](), None

    async def again(before: Look, doubt: Doubt) -> Look:
        seconds = doubt.wait.total_seconds()
        get_run_logger().warning("looking again in %.0f seconds, because %s", seconds, doubt)
        await asyncio.sleep(seconds)
        return await look_again(engine, request, before)

    try:
        look = await open_sweep(engine, request)
        tell_of(look, report)
        look = await look_until_sure(report, look, again)
        async for given in undelivered_answers(look.open_holds):
            await heed(engine, request.target.name, given)
        decision = await decide(engine, report, look)
        report.held = decision.held
        to_judge = min(look.fleet.orphans, request.limit or look.fleet.orphans)
        mark_all = _mark_many if to_judge > task_each_up_to else _mark_each
        await mark_all(engine, report, decision, failed)
    except Exception as error:
        report.error = describe(behind(error))
    except (Pause, TerminationSignal, asyncio.CancelledError):
        await _close_at_once(engine, report, failed, decision)
        raise
    if report.fleet is None:  # it never began, and has nothing to close
        return
    try:
        settled = await summarise(engine, unseen(report), unseen(failed), unseen(decision))
        report.judged(settled)
    except Exception as error:
        report.judged(failed)
        report.error = report.error or describe(behind(error))
    else:
        await _withdraw_questions(engine, request)


async def _close_at_once(
    engine: AsyncEngine, report: SweepReport, failed: list[Verdict], decision: Decision | None
) -> None:
    """Prefect ends this flow run: say so in the ledger, for no task run can be begun any more."""
    if report.fleet is None:
        return
    report.error = "the flow run was suspended, cancelled or told to stop while it swept"
    close = partial(finish, report=report, failed=failed, decision=decision)
    with suppress(Exception):  # then it stays open there, as that of a sweep that was killed
        async with asyncio.timeout(CLOSING_SECONDS):
            await in_transaction(engine, close)


async def _withdraw_questions(engine: AsyncEngine, request: SweepRequest) -> None:
    """Nobody is to be asked about what is settled; where that fails, the next sweep does it."""
    if request.dry_run:
        return
    try:
        ended = await in_transaction(engine, partial(ended_holds, within=ASKED_FOR))
        await withdraw_questions(ended)
    except Exception as error:
        told = describe(behind(error))
        get_run_logger().warning("questions about ended holds were not withdrawn: %s", told)


async def _mark_many(
    engine: AsyncEngine, report: SweepReport, decision: Decision, failed: list[Verdict]
) -> None:
    """Thousands at a time: a task run for each would outlast the sweep by far."""
    request, number = report.request, 0
    progress = Progress(orphans=decision.orphans)
    by_slices = await in_transaction(engine, partial(is_sliceable, request=request))
    while by_slices and not progress.is_through:
        number += 1
        stretch = mark_slices.with_options(task_run_name=f"mark-slices-{number}")
        try:
            progress = await stretch(engine, request, decision, progress)
        finally:
            failed += [v for v in progress.verdicts if v.outcome is Outcome.FAILED]
            progress.hand_over_to(report)
    judged = unseen(progress.judged)
    await mark_pages(engine, unseen(report), decision, unseen(failed), judged)


async def _mark_each(
    engine: AsyncEngine, report: SweepReport, decision: Decision, failed: list[Verdict]
) -> None:
    """One task run an orphan, side by side. What cannot be marked fails its own task run only."""
    request = report.request
    runs: list[WorkerRun] = (await detect(engine, request, decision)).unquote()
    report.saw(runs)
    if runs:
        log_detected(request, runs)
    if request.dry_run:
        return
    at_once = asyncio.Semaphore(TASKS_AT_ONCE)
    marks = SharedMarks(engine, request, runs)
    outage: str | None = None

    async def judged(run: WorkerRun) -> Verdict:
        nonlocal outage
        async with at_once:
            if outage:  # thousands of retries against a lost database help nobody
                return Verdict(run=run, outcome=Outcome.FAILED, error=f"not tried after {outage}")
            # Prefect's overloads take the task for a sync one here.
            state = await mark(marks, run.id, return_state=True)  # type: ignore[misc]
        if run.id in marks.verdicts:
            return marks.verdicts[run.id]
        result = await state.aresult(raise_on_failure=False)
        error = result if isinstance(result, BaseException) else RuntimeError(state.message)
        error = behind(error)
        if is_outage(error):
            outage = describe(error)
        verdict = Verdict(run=run, outcome=Outcome.FAILED, error=describe(error))
        log_verdict(request, verdict)
        return verdict

    with _frozen():
        verdicts = await asyncio.gather(*(judged(run) for run in runs))
    report.judged([v for v in verdicts if v.outcome is not Outcome.FAILED])
    failed += [v for v in verdicts if v.outcome is Outcome.FAILED]


@asynccontextmanager
async def _beating() -> AsyncIterator[None]:
    """Tell Prefect's automations, now and then, that this flow run is at work still.

    Prefect's own heartbeat does not serve for that. Its first one is sent as the flow run begins;
    of a short sweep it may arrive after the end, as if that were not one.
    """
    run = this_run()

    async def beat() -> None:
        while run is not None:
            await asyncio.sleep(BEAT_SECONDS)
            about = {"prefect.resource.id": f"prefect.flow-run.{run.id}"}
            emit_event(event=BEAT, resource={**about, "prefect.resource.name": run.name})

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


@contextmanager
def _frozen() -> Iterator[None]:
    """Keep what has been loaded so far out of garbage collections.

    With Prefect that is nearly two hundred thousand objects, and a thousand task runs make so many
    new ones that all there are is looked through twice, an eighth of a second each time.
    """
    is_ours = not gc.get_freeze_count()  # else whoever froze it says for how long
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


async def _show(report: SweepReport) -> None:
    """The report in Prefect's own places: the log, and two artifacts that keep their history."""
    name = report.request.target.name
    key = "orphan-recovery" if name == DEFAULT_TARGET else f"orphan-recovery-{name}"
    key = key.replace("_", "-")
    level = logging.INFO if report.enabled and not report.warnings() else logging.WARNING
    level = level if report.ended_well else logging.ERROR
    get_run_logger().log(level, report.headline())
    await acreate_table_artifact(
        key=f"{key}-verdicts", table=as_table(report), description=report.headline()
    )
    await acreate_markdown_artifact(
        key=f"{key}-summary", markdown=as_markdown(report), description=report.headline()
    )


def _asked_by() -> str:
    """Which flow run asked, and who started that, for the ledger."""
    run = this_run()
    if run is None:
        return f"flow {FLOW_NAME}"
    if run.auto_scheduled:
        origin = "its schedule"
    elif TRIGGERED in run.tags:
        origin = "orphan-recovery trigger"
    else:
        origin = (run.created_by and run.created_by.display_value) or "hand"
    return f"flow run {run.name} ({run.id}), started by {origin}"
