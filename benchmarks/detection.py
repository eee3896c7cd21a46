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
from collections.abc import Awaitable, Callable
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
    for rows in size.tables:
        fleet = Fleet(rows, size.found, live=size.in_flight - size.found)
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
    few, many = by_rows[-2:]
    measured.results.append(
        Result(
            f"detection among {size.tables[-1]:,} rows against {size.tables[-2]:,}",
            [many["detection"] / few["detection"]],
            Goal(1.5),
            notes=["as many in flight: the cost follows them, not the table"],
        )
    )
    for in_flight in size.in_flights:
        fleet = Fleet(size.tables[1], size.found, live=max(in_flight - size.found, 0))
        ours, bare = _look_at(server, fleet, size)
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
    environment = {
        "ORPHAN_RECOVERY_DATABASE_URL": url,
        "PGOPTIONS": "-c max_parallel_workers_per_gather=0",
    }
    try:
        with patch.dict(os.environ, environment):
            return asyncio.run(_look(url, fleet, size))
    finally:
        server.forget(fleet)


async def _look(url: str, fleet: Fleet, size: Size) -> tuple[list[float], list[float]]:
    engine = make_engine(database_url(url))
    ours, bare = list[float](), list[float]()
    threshold = {"threshold": f"{THRESHOLD_MINUTES} minutes"}
    try:
        async with (
            AsyncSession(engine) as session,
            await psycopg.AsyncConnection.connect(url, prepare_threshold=None) as plain,
        ):

            async def detect() -> int:
                return len(await detect_orphaned_runs(session, THRESHOLD_MINUTES))

            async def query() -> int:
                return len(await (await plain.execute(BARE, threshold)).fetchall())

            assert await detect() == await query() == fleet.orphans
            for _ in range(size.rounds):
                first, second = list[float](), list[float]()
                for _ in range(size.looks):
                    first.append(await _milliseconds(detect))
                    second.append(await _milliseconds(query))
                ours.append(median(first))
                bare.append(median(second))
    finally:
        await engine.dispose()
    return ours, bare


async def _milliseconds(look: Callable[[], Awaitable[int]]) -> float:
    began = time.perf_counter()
    await look()
    return (time.perf_counter() - began) * 1000
