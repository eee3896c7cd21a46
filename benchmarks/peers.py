"""Peers: how fast two queues give back the jobs of workers that died, by their own interfaces.

The hazard is an unkind peer: each does what its documentation says to do, on a fresh schema that
it made itself, with jobs of the same number. They queue jobs again, keep no evidence, and guard
less; the figures are for orientation.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from statistics import median
from uuid import uuid4

import psycopg
from pgqueuer import Queries
from pgqueuer.ports.repository import EntrypointExecutionParameter
from pgqueuer.types import QueueEntrypoint, QueueManagerId
from procrastinate import App, PsycopgConnector

from benchmarks.data import Fleet, Server, connect
from benchmarks.processes import run
from benchmarks.rates import SWEEP
from benchmarks.results import Measured, Result, Side, Size

BATCH = 10
"""Jobs that PgQueuer takes at once, by default."""


def peers(server: Server, size: Size) -> Measured:
    """All on the same number of orphans, in turn."""
    fleet = Fleet(size.peers * 2 + 1_000, size.peers)
    rates: dict[str, list[float]] = {}
    for _ in range(max(1, size.rounds // 2)):
        with server.copy(fleet) as url:
            rates.setdefault("start-up path", []).append(run(url, *SWEEP).rate)
        with server.copy(fleet) as url:
            ran = run(url, "benchmarks.sides", "loop", 1, size.peers)
            rates.setdefault("loop, a commit a row", []).append(ran.rate)
        for name, peer in (("Procrastinate", procrastinate), ("PgQueuer", pgqueuer)):
            database = server.create()
            try:
                url = server.address(database)
                rates.setdefault(name, []).append(asyncio.run(peer(url, size.peers)))
            finally:
                server.drop(database)
    ours = rates.pop("start-up path")
    server.forget(fleet)
    return Measured(
        [
            Result(
                f"rate against {name}",
                [mine / other for mine, other in zip(ours, theirs, strict=True)],
                sides=[Side("start-up path", ours, "orphans/s"), Side(name, theirs, "jobs/s")],
                notes=[f"{size.peers:,} orphans"],
            )
            for name, theirs in sorted(rates.items(), key=lambda each: median(each[1]))
        ]
    )


async def procrastinate(url: str, jobs: int) -> float:
    """Get the stalled jobs, retry each: its documentation's own task. Jobs a second."""
    app = App(connector=PsycopgConnector(conninfo=url))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        with connect(url) as db:
            db.execute(
                "INSERT INTO procrastinate_workers (last_heartbeat) VALUES (now() - interval '1 d')"
            )
            db.execute(
                "INSERT INTO procrastinate_jobs (queue_name, task_name, args, status, worker_id)"
                " SELECT 'default', 'report', '{}', 'doing',"
                " (SELECT max(id) FROM procrastinate_workers) FROM generate_series(1, %s)",
                [jobs],
            )
            db.execute("VACUUM (ANALYZE) procrastinate_jobs")

        async def retried() -> int:
            stalled = list(await app.job_manager.get_stalled_jobs())
            for job in stalled:
                await app.job_manager.retry_job(job)
            return len(stalled)

        return await _rate(retried, jobs)


async def pgqueuer(url: str, jobs: int) -> float:
    """Take the silent jobs of others, as its workers do, in batches. Jobs a second."""
    connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
    async with connection:
        queries = Queries.from_psycopg_connection(connection)
        await queries.install()
        with connect(url) as db:
            db.execute(
                "INSERT INTO pgqueuer (priority, status, entrypoint, created, updated, heartbeat,"
                " queue_manager_id) SELECT 0, 'picked', 'report', past, past, past, %s"
                " FROM (SELECT now() - interval '1 d' AS past) AS t, generate_series(1, %s)",
                [uuid4(), jobs],
            )
            db.execute("VACUUM (ANALYZE) pgqueuer")
        entrypoints = {QueueEntrypoint("report"): EntrypointExecutionParameter(0)}

        async def taken() -> int:
            count, me, silent = 0, QueueManagerId(uuid4()), timedelta(hours=1)
            while got := await queries.dequeue(BATCH, entrypoints, me, None, silent):
                count += len(got)
            return count

        return await _rate(taken, jobs)


async def _rate(recover: Callable[[], Awaitable[int]], jobs: int) -> float:
    began = time.perf_counter()
    done = await recover()
    seconds = time.perf_counter() - began
    assert done == jobs, f"{done} of {jobs}"
    return jobs / seconds
