"""Claim and finish: a worker's two conditional writes, at the beginning of a run and at its end.

The hazard is a result that overwrites a verdict, or another worker's run. So each write wins only
if the run still is what the worker believes it to be; what it does not win, it names; and where a
result came for a run that stands crashed, the ledger gets a contested verdict.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import RowMapping, Text, cast, literal, or_, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.alive.beat import found, guards, look, lost_by
from orphan_recovery.alive.beater import Beater, await_future
from orphan_recovery.alive.beaters import beater_of, reporting
from orphan_recovery.alive.lost import LostBy, RunLost
from orphan_recovery.attempt import bounded
from orphan_recovery.database import NOW, STATEMENT_TIMEOUT_MS, address, describe, transaction
from orphan_recovery.describe import runs_table
from orphan_recovery.log import logger
from orphan_recovery.policy import is_outage, retrying
from orphan_recovery.record import record_contest
from orphan_recovery.runs import RunsTable
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target, where

if TYPE_CHECKING:
    from concurrent.futures import Future

LONGEST_TRY_SECONDS: Final = 1.5 * STATEMENT_TIMEOUT_MS / 1000
"""For one try of a claim or a result: a statement's whole time, and the wait for a connection."""


async def claim(
    run_id: str, worker_id: str, *, status: str | int | None = None, target: str | None = None
) -> bool:
    """Take a run that nobody holds. Commits. Any number of workers may ask at once; one gets it.

    Args:
        run_id: the run's key, as text; of a key of several columns, a JSON array of texts.
        worker_id: who takes it.
        status: what a run is called that a worker holds; None for ``running``, or the only status
            in flight.
        target: its target; None for the one that is meant by default.

    Returns:
        True if the run is this worker's now, also by an earlier call whose acknowledgement was
        lost. False if another was faster, or it is not there to be taken.

    Raises:
        ConfigurationError: the target has no column for the worker, or the status is not of those
            in flight.
        sqlalchemy.exc.DBAPIError: as the database raised it, after the retries of the policy.
    """
    meant = find_target(target)
    work = _claim(meant, str(run_id), as_text(worker_id), status)
    return await await_future(_submit(_beater(meant), work))


def claim_sync(
    run_id: str, worker_id: str, *, status: str | int | None = None, target: str | None = None
) -> bool:
    """:func:`claim` from synchronous code."""
    meant = find_target(target)
    work = _claim(meant, str(run_id), as_text(worker_id), status)
    return bool(_submit(_beater(meant), work).result())


async def finish_run(
    run_id: str,
    *,
    worker_id: str | None = None,
    status: str | int = "completed",
    output: Any = None,
    error: str | None = None,
    target: str | None = None,
) -> None:
    """Write a run's result, if the run still is the worker's own. Commits.

    Args:
        run_id: the run's key, as text; of a key of several columns, a JSON array of texts.
        worker_id: who held it; None not to check.
        status: what it ends as, in the table's words.
        output: what it gave back, ready for JSON, where the target has a column for it.
        error: what went wrong, where it has a column for that.
        target: its target; None for the one that is meant by default.

    Raises:
        RunLost: the run is not the worker's any more, and nothing was written; it says what
            happened. Where the run stands crashed by a verdict, that is recorded as contested.
        ConfigurationError: the status is in flight, or the target does not fit.
        sqlalchemy.exc.DBAPIError: as the database raised it, after the retries of the policy.
    """
    meant = find_target(target)
    result, beater = Result(str(status), output, error), _beater(meant)
    run, worker = str(run_id), as_text(worker_id)
    with reporting(beater, run, worker):
        await await_future(submit_finish(beater, run, worker, result))


def finish_run_sync(
    run_id: str,
    *,
    worker_id: str | None = None,
    status: str | int = "completed",
    output: Any = None,
    error: str | None = None,
    target: str | None = None,
) -> None:
    """:func:`finish_run` from synchronous code."""
    meant = find_target(target)
    result, beater = Result(str(status), output, error), _beater(meant)
    run, worker = str(run_id), as_text(worker_id)
    with reporting(beater, run, worker):
        submit_finish(beater, run, worker, result).result()


@dataclass(frozen=True, slots=True)
class Result:
    """What a worker reports."""

    status: str
    output: Any
    error: str | None


def submit_finish(
    beater: Beater, run_id: str, worker_id: str | None, result: Result
) -> "Future[None]":
    """Write a result in a beater's thread, to the beater's target: as :func:`finish_run`."""
    return _submit(beater, _finish(beater.target, run_id, worker_id, result))


def as_text(worker_id: object) -> str | None:
    """A worker as the table is asked for it: people also give numbers and uuids."""
    return None if worker_id is None else str(worker_id)


def _beater(target: Target) -> Beater:
    return beater_of(target, address(target), target.beat.total_seconds())


def _submit(beater: Beater, work: Any) -> "Future[Any]":
    """Do ``work`` in the beater's thread, all of it again while the error is transient."""

    async def retried(engine: AsyncEngine) -> Any:
        first = True
        async for attempt in retrying():
            with attempt:
                try:
                    async with bounded(LONGEST_TRY_SECONDS):
                        result = await work(engine, first)
                except Exception as error:
                    if isinstance(error, TimeoutError):
                        await engine.dispose()  # what is idle there may hang as this one did
                    # What the server refused was not heard. Only a try without its answer may be.
                    first = first and not is_outage(error)
                    raise
        return result

    return beater.submit(retried)


def _claim(target: Target, run_id: str, worker_id: str | None, status: str | int | None) -> Any:
    running = _running(target) if status is None else str(status)
    if running not in target.in_flight:
        raise ConfigurationError(
            f"status is {running!r}, which {where(target, 'in_flight')} does not have"
        )

    async def work(engine: AsyncEngine, first: bool) -> bool:
        async with transaction(engine) as db:
            table = await runs_table(db, target, anew=True)
            if not table.has("worker_id"):
                raise ConfigurationError(
                    f"{where(target)} has no column for worker_id: a claim could not be told"
                )
            won = (await db.execute(_claiming(table, run_id, worker_id, running))).first()
            if won is not None or first:
                return won is not None
            look_again = look(table, [(run_id, worker_id)], running)
            row = (await db.execute(look_again)).mappings().one()
            return bool(row["as_left"])  # an earlier try was heard after all

    return work


def _running(target: Target) -> str:
    if "running" in target.in_flight:
        return "running"
    if len(target.in_flight) == 1:
        return target.in_flight[0]
    raise ConfigurationError(
        f"{where(target, 'in_flight')} has several statuses: say which one a run has that a "
        "worker holds, by status"
    )


def _claiming(table: RunsTable, run_id: str, worker_id: str | None, running: str) -> Any:
    row, facts, target = table.columns, table.facts, table.target
    free = [s for s in (*target.in_flight, *target.waiting) if s != running]
    values: dict[Any, Any] = {
        row.status: literal(running, facts["status"].type),
        row.worker_id: cast(literal(worker_id, Text), facts["worker_id"].type),
    }
    for role in ("started_at", "heartbeat_at"):
        if role in facts:
            values[row[role]] = table.stored(role, NOW)
    return (
        update(table.table)
        .where(table.is_row(literal(run_id, Text)))
        .where(row.status.in_([literal(s, facts["status"].type) for s in free]))
        .where(or_(row.worker_id.is_(None), table.is_same("worker_id", literal(worker_id, Text))))
        .values(values)
        .returning(literal(1))
    )


def _finish(target: Target, run_id: str, worker_id: str | None, result: Result) -> Any:
    if result.status in (*target.in_flight, *target.waiting):
        raise ConfigurationError(f"status is {result.status!r}, which ends nothing")
    if target.ends is not None and result.status not in target.ends:
        raise ConfigurationError(
            f"status is {result.status!r}, which {where(target, 'terminal')} does not have: "
            f"it has {', '.join(map(repr, target.ends))}"
        )

    async def work(engine: AsyncEngine, first: bool) -> None:
        async with transaction(engine) as db:
            table = await runs_table(db, target, anew=True)
            if (await db.execute(_finishing(table, run_id, worker_id, result))).first():
                return
            look_again = look(table, [(run_id, worker_id)], result.status)
            row = (await db.execute(look_again)).mappings().one()
            if not first and row["as_left"]:
                return  # an earlier try was heard after all
        by = lost_by(row) or LostBy.CHANGED_HANDS
        contested = by is LostBy.MARKED and await _contest(engine, table, row, result)
        raise RunLost(run_id, by, found(row), contested=contested)

    return work


def _finishing(table: RunsTable, run_id: str, worker_id: str | None, result: Result) -> Any:
    row, facts = table.columns, table.facts
    values: dict[Any, Any] = {row.status: literal(result.status, facts["status"].type)}
    if "success" in facts:
        failed = result.status in ("failed", table.target.crashed)
        values[row.success] = literal(result.error is None and not failed)
    if "completed_at" in facts:
        values[row.completed_at] = table.stored("completed_at", NOW)
    for role, told in (("error", result.error), ("output_json", result.output)):
        if role in facts and told is not None:
            values[row[role]] = table.written(role, told)
    return (
        update(table.table)
        .where(table.is_row(literal(run_id, Text)))
        .where(*guards(table, literal(worker_id, Text)).values())
        .values(values)
        .returning(literal(1))
    )


async def _contest(engine: AsyncEngine, table: RunsTable, row: RowMapping, result: Result) -> bool:
    """Record that a result came for a run that a verdict had marked. Never raises."""
    target, run_id, worker_id = table.target, row["key"], row["held_as"]
    try:
        async with transaction(engine) as db:
            contested = await record_contest(
                db,
                target.name,
                run_id,
                worker_id=worker_id,
                reported_status=result.status,
                any_worker=not table.has("worker_id"),
                went_on_at=row["went_on_at"],
            )
    except DBAPIError as error:  # no ledger there, or no right to write to it
        fields = {"run_id": run_id, "target": target.name, "error": describe(error)}
        logger.error("contest_not_recorded", extra=fields)
        return False
    if contested:
        by = {"worker_id": worker_id, "reported": result.status}
        logger.error("verdict_contested", extra={"run_id": run_id, "target": target.name, **by})
    return contested
