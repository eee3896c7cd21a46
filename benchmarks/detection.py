"""Detection: what a look costs where nothing, or little, is orphaned.

The hazard is a warm side and a cold one: both run in this process on the same database, in turn,
after a look each that does not count. The bare query is driven by plain psycopg, rows as tuples.
Neither may have the server's parallel workers: in ten million rows both queries cost so nearly
what makes the planner ask for them that one may get them and the other not, and to start them
takes longer than to look.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from statistics import median
from typing import Final
from unittest.mock import patch

import psycopg
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.data import Fleet, Server
from benchmarks.processes import Ran, run
from benchmarks.results import Goal, Measured, Point, Result, Side, Size
from benchmarks.sides import THRESHOLD_MINUTES
from orphan_recovery.database import database_url, make_engine
from orphan_recovery.detect import detect_orphaned_runs

Look = Callable[[], Awaitable[int]]

_NOT_PARALLEL: Final = {"PGOPTIONS": "-c max_parallel_workers_per_gather=0"}

BARE: Final = """
SELECT id, status, worker_id, tenant_id, task, parent_run_id, attempt, is_retry, created_at,
       started_at, heartbeat_at, greatest(created_at, started_at, heartbeat_at) AS sign_of_life,
       CASE WHEN heartbeat_at = greatest(created_at, started_at, heartbeat_at)
            THEN 'run heartbeat' ELSE 'age' END AS evidence,
       %(threshold)s::interval AS threshold, statement_timestamp() AS seen_at
FROM worker_runs
WHERE status IN ('queued', 'running')
  AND created_at <= statement_timestamp() - %(threshold)s::interval
  AND greatest(created_at, started_at, heartbeat_at)
      <= statement_timestamp() - %(threshold)s::interval
ORDER BY sign_of_life, id
"""


def detection(server: Server, size: Size) -> Measured:
    """Few orphans among many rows, against the bare query; and what the cost follows."""
    measured = Measured()
    by_rows, by_flight = list[Point](), list[Point]()
    fleets = {n: Fleet(n, size.found, live=size.in_flight - size.found) for n in size.tables}
    for rows, fleet in fleets.items():
        ours, bare = _look_at(server, fleet, size)
        by_rows.append({"rows": rows, "detection": median(ours), "bare query": median(bare)})
        if rows in (size.tables[0], size.tables[-1]):
            measured.results.append(
                Result(
                    f"detection among {rows:,} rows against the bare query",
                    [mine / other for mine, other in zip(ours, bare, strict=True)],
                    Goal(1.5),
                    sides=[Side("detection", ours, "ms"), Side("bare query", bare, "ms")],
                    notes=[f"{size.found:,} orphans, {size.in_flight:,} in flight"],
                )
            )
    *_, few, many = size.tables
    in_few, in_many = _look_at_both(server, (fleets[few], fleets[many]), size)
    measured.results.append(
        Result(
            f"detection among {many:,} rows against {few:,}",
            [larger / smaller for smaller, larger in zip(in_few, in_many, strict=True)],
            Goal(1.5),
            sides=[Side(f"{many:,}", in_many, "ms"), Side(f"{few:,}", in_few, "ms")],
            notes=["as many in flight: the cost follows them, not the table"],
        )
    )
    for fleet in fleets.values():
        server.forget(fleet)
    for in_flight in size.in_flights:
        fleet = Fleet(size.tables[1], size.found, live=max(in_flight - size.found, 0))
        ours, bare = _look_at(server, fleet, size)
        server.forget(fleet)
        point = {"in flight": in_flight, "detection": median(ours), "bare query": median(bare)}
        by_flight.append(point)
    measured.series = {"detection by rows": by_rows, "detection by in flight": by_flight}
    return measured


def idle(server: Server, size: Size) -> Measured:
    """A sweep that finds nothing: how much it asks."""
    fleet, own, every = Fleet(size.rows, 0), list[Ran](), list[Ran]()
    for _ in range(size.rounds):
        for ran, all_of_them in ((own, 0), (every, 1)):
            with server.copy(fleet) as url:
                ran.append(run(url, "benchmarks.sides", "idle", all_of_them))
    server.forget(fleet)
    took = Side("a sweep that finds nothing", [one.seconds * 1000 for one in own], "ms")
    with_sqlalchemy = Side("with SQLAlchemy's own", [one.count for one in every], "statements")
    return Measured(
        [
            Result(
                "statements of a sweep that finds nothing",
                [one.count for one in own],
                Goal(9),
                unit="statements",
                sides=[took, with_sqlalchemy],
            )
        ]
    )


def _look_at(server: Server, fleet: Fleet, size: Size) -> tuple[list[float], list[float]]:
    """Milliseconds of detection and of the bare query, a median a round."""
    url = server.address(server.template(fleet))

    async def looks() -> tuple[list[float], list[float]]:
        async with (
            _detection(url) as detect,
            await psycopg.AsyncConnection.connect(url, prepare_threshold=None) as plain,
        ):

            async def query() -> int:
                rows = await plain.execute(BARE, {"threshold": f"{THRESHOLD_MINUTES} minutes"})
                return len(await rows.fetchall())

            assert await detect() == await query() == fleet.orphans
            return await _in_turn(detect, query, size)

    with patch.dict(os.environ, _NOT_PARALLEL):
        return asyncio.run(looks())


def _look_at_both(
    server: Server, fleets: tuple[Fleet, Fleet], size: Size
) -> tuple[list[float], list[float]]:
    """Milliseconds of detection in two tables, a median a round."""
    one, other = (server.address(server.template(fleet)) for fleet in fleets)

    async def looks() -> tuple[list[float], list[float]]:
        async with _detection(one) as in_one, _detection(other) as in_other:
            await in_one()
            await in_other()
            return await _in_turn(in_one, in_other, size)

    with patch.dict(os.environ, _NOT_PARALLEL):
        return asyncio.run(looks())


@asynccontextmanager
async def _detection(url: str) -> AsyncIterator[Look]:
    """What a caller of the product does; it returns how many orphans there are."""
    engine = make_engine(database_url(url))
    try:
        async with AsyncSession(engine) as session:

            async def detect() -> int:
                return len(await detect_orphaned_runs(session, THRESHOLD_MINUTES))

            yield detect
    finally:
        await engine.dispose()


async def _in_turn(one: Look, other: Look, size: Size) -> tuple[list[float], list[float]]:
    medians = list[float](), list[float]()
    for _ in range(size.rounds):
        took = list[float](), list[float]()
        for _ in range(size.looks):
            for look, milliseconds in zip((one, other), took, strict=True):
                began = time.perf_counter()
                await look()
                milliseconds.append((time.perf_counter() - began) * 1000)
        for of_side, milliseconds in zip(medians, took, strict=True):
            of_side.append(median(milliseconds))
    return medians
