"""PgQueuer as its users run it: its own schema, its own jobs, its own worker.

A test starts it as a process of its own, so that it can be killed like one. Its hazard is to be
kinder than the real thing: everything that touches the database is PgQueuer's own code. A worker
picks up the silent jobs of others, so each queue here has entrypoints that only its own workers
know; else the living one would run the killed one's job again within seconds.
"""

import argparse
import asyncio
import time
from datetime import timedelta
from pathlib import Path

import psycopg
from pgqueuer import Job, PgQueuer, Queries

HEARTBEAT_TIMEOUT = timedelta(seconds=4)
"""It beats twice in it. PgQueuer sets no lower bound, and its default is 30 seconds; but a beat may
wait for a second while psycopg listens, and with much less a worker picks up its own jobs again."""
LOOK_SECONDS = 0.05


def main() -> None:
    """Do what the options say, in the order: schema, enqueue, work."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("database_url")
    parser.add_argument("--schema", action="store_true", help="create the schema")
    parser.add_argument("--enqueue", metavar="QUEUE", help="add jobs to it: quick ones, a long one")
    parser.add_argument("--quick", type=int, default=2, help="so many of them end at once")
    parser.add_argument("--until", default="", help="the long one ends when this file exists")
    parser.add_argument("--work", metavar="QUEUE", help="work on it, for ever")
    parser.add_argument("--limit", type=int, default=0, help="so many long ones at once, or any")
    asyncio.run(do(parser.parse_args()))


async def do(asked: argparse.Namespace) -> None:
    connecting = psycopg.AsyncConnection.connect(asked.database_url, autocommit=True)
    async with await connecting as connection:
        queries = Queries.from_psycopg_connection(connection)
        if asked.schema:
            await queries.install()
        if asked.enqueue:
            for _ in range(asked.quick):
                await queries.enqueue(f"{asked.enqueue}-quick", None)
            await queries.enqueue(f"{asked.enqueue}-hold", asked.until.encode())
        if asked.work:
            await work(PgQueuer.from_psycopg_connection(connection), asked.work, asked.limit)


async def work(pgq: PgQueuer, queue: str, limit: int) -> None:
    @pgq.entrypoint(f"{queue}-quick", on_failure="hold")
    async def quick(job: Job) -> None:
        pass

    @pgq.entrypoint(f"{queue}-hold", concurrency_limit=limit, on_failure="hold")
    async def hold(job: Job) -> None:
        await asyncio.to_thread(wait_for, (job.payload or b"").decode())

    await pgq.run(dequeue_timeout=timedelta(seconds=1), heartbeat_timeout=HEARTBEAT_TIMEOUT)


def wait_for(until: str) -> None:
    while not (until and Path(until).exists()):
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
