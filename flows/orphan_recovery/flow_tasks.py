"""The flow's tasks: one for each step of a sweep, and one for each orphan.

The hazard is one failed mark that fails all, or a try that can only fail again. So each task run
is retried by itself, by the policy's plan and only for what is transient; and what it raises is
one line, for people who read it in the UI or in the log.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar, cast

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff
from prefect.utilities.annotations import quote
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import describe, transaction
from orphan_recovery.detect import detect as detect_orphans
from orphan_recovery.events import log_verdict, marks_told_quietly
from orphan_recovery.hold import Decision
from orphan_recovery.judge import Progress, judge_slices
from orphan_recovery.judge_pages import judge_pages
from orphan_recovery.log import FieldsAfter
from orphan_recovery.mark_together import SharedMarks
from orphan_recovery.policy import is_transient, retry_plan
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.sweep import Look, begin, decide_on, finish, look_again_at
from orphan_recovery.turn import in_turn
from orphan_recovery.verdict import Verdict
from orphan_recovery.waiting import HeldError
from orphan_recovery.words import span

T = TypeVar("T")

STRETCH_SECONDS = 5.0
"""How long one task run goes on with slices."""


async def _worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Prefect's question, answered by the policy. It has to be async: see ``Task.retries``."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(behind(error))


_PLAN = retry_plan()
_RETRIED: dict[str, Any] = {
    "retries": _PLAN.retries,
    "retry_delay_seconds": exponential_backoff(_PLAN.backoff_factor),
    "retry_jitter_factor": _PLAN.jitter,
    "retry_condition_fn": _worth_retrying,
    # A look at the database is never to be answered from a cache.
    "cache_policy": NO_CACHE,
    "persist_result": False,
}
_RETRIED_WITHIN: dict[str, Any] = {**_RETRIED, "retries": 0}
"""Of a task with many transactions: each of them is tried again by the same plan, by itself."""


def unseen(value: T) -> T:
    """As a task's parameter: Prefect looks through it, field by field of each run, for results of
    other tasks, unless it is quoted."""
    return cast("T", quote(value))


class DatabaseError(RuntimeError):
    """A database error in one line, for people who read it in the UI."""

    def __init__(self, told: str, raised: DBAPIError | None = None) -> None:
        super().__init__(told)
        self.raised = raised
        """What the database raised: kept here, for a cause is printed with its whole traceback."""


def behind(error: BaseException) -> BaseException:
    """What the database raised, of a :class:`DatabaseError`; any other error is told as it is."""
    return error.raised or error if isinstance(error, DatabaseError) else error


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Raise what the database raises as a :class:`DatabaseError`."""
    try:
        yield
    except DBAPIError as error:  # its own text is the whole statement
        raise DatabaseError(describe(error), error) from None


def _without_traceback(record: logging.LogRecord) -> bool:
    """Prefect logs each failed try with forty lines of its own code: of what is told to people in
    one line, that line is all."""
    raised = record.exc_info[1] if record.exc_info else None
    if isinstance(raised, (DatabaseError, ConfigurationError, HeldError)):
        record.exc_info = None
    return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_without_traceback)
for _handler in logging.getLogger().handlers:  # Prefect's console prints an event's name alone
    if isinstance(_handler, PrefectConsoleHandler) and _handler.formatter is not None:
        _handler.setFormatter(FieldsAfter(_handler.formatter))


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    with errors_in_a_line():
        async with transaction(engine) as connection:
            yield connection


@task(name="open-sweep", task_run_name="open-sweep", **_RETRIED)
async def open_sweep(engine: AsyncEngine, request: SweepRequest) -> Look:
    """Record that the sweep begins, and look at all that is in flight."""
    with errors_in_a_line():
        return await in_turn(engine, request, lambda db, other: begin(db, request, other))


@task(name="look-again", task_run_name="look-again", **_RETRIED)
async def look_again(engine: AsyncEngine, request: SweepRequest, look: Look) -> Look:
    """Look a second time, after whoever lives has had the time to beat."""
    with errors_in_a_line():
        return await in_turn(engine, request, lambda db, _: look_again_at(db, request, look))


@task(name="decide", task_run_name="decide", **_RETRIED)
async def decide(engine: AsyncEngine, report: SweepReport, look: Look) -> Decision:
    """Hold what looks like too much of the fleet; close what has recovered."""
    async with _transaction(engine) as connection:
        return await decide_on(connection, report, look)


@task(name="detect", task_run_name="detect", **_RETRIED)
async def detect(engine: AsyncEngine, request: SweepRequest, decision: Decision) -> quote:
    """Find the orphans that may be marked, and quote the list of them; reads only."""
    async with _transaction(engine) as connection:
        return quote(await detect_orphans(connection, request, among=decision.among))


@task(name="mark", task_run_name="mark-{run_id}", **_RETRIED)
async def mark(marks: SharedMarks, run_id: str) -> State[Any]:
    """Give the verdict on one orphan; its task run's state tells it, and so does its log."""
    run = marks.runs[run_id]
    with errors_in_a_line():
        verdict = await marks.mark(run)
    with marks_told_quietly():
        log_verdict(marks.request, verdict)
    message = (
        f"{run.id}: {verdict.outcome.value}; silent for {span(run.silence)} by its "
        f"{run.evidence.value} when detected, threshold {span(run.threshold)}, held by worker "
        f"{run.worker_id or '(none)'}"
    )
    marks.verdicts[run_id] = verdict  # as the state's data, Prefect would look through it
    return Completed(message=message)


@task(name="mark-slices", **_RETRIED_WITHIN)
async def mark_slices(
    engine: AsyncEngine, request: SweepRequest, decision: Decision, progress: Progress
) -> Progress:
    """Mark so many orphans as a few seconds allow, slice by slice, each in its own transaction."""
    with errors_in_a_line(), marks_told_quietly():
        await judge_slices(engine, request, progress, decision.among, seconds=STRETCH_SECONDS)
    get_run_logger().info("%d orphans judged", progress.detected)
    return progress


@task(name="mark-pages", task_run_name="mark-pages", **_RETRIED_WITHIN)
async def mark_pages(
    engine: AsyncEngine,
    report: SweepReport,
    decision: Decision,
    failed: list[Verdict],
    judged: set[str],
) -> None:
    """Mark, page by page, what no slice has taken; a dry run lists it. Adds what failed."""
    with errors_in_a_line(), marks_told_quietly(), _telling_how_far(report):
        await judge_pages(engine, report, decision.among, failed, judged)


@contextmanager
def _telling_how_far(report: SweepReport) -> Iterator[None]:
    """Say in the flow run's log, every few seconds, how many have been judged."""

    async def tell() -> None:
        while True:
            await asyncio.sleep(STRETCH_SECONDS)
            get_run_logger().info("%d orphans judged", report.detected)

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()


@task(name="summarise", task_run_name="summarise", **_RETRIED)
async def summarise(
    engine: AsyncEngine, report: SweepReport, failed: list[Verdict], decision: Decision | None
) -> list[Verdict]:
    """Settle what failed, and close the sweep in the ledger."""
    async with _transaction(engine) as connection:
        return await finish(connection, report, failed, decision)
