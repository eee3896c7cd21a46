"""Procrastinate as its users run it: its own schema, its own jobs, its own worker.

A test starts it as a process of its own, so that it can be killed like one. Its hazard is to be
kinder than the real thing: everything that touches the database is Procrastinate's own code.
"""

import argparse
import asyncio
import time
from pathlib import Path

from procrastinate import App, PsycopgConnector

HEARTBEAT_SECONDS = 0.5
"""Procrastinate sets no lower bound; its default is 10."""
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
    asyncio.run(do(parser.parse_args()))


async def do(asked: argparse.Namespace) -> None:
    app = make_app(asked.database_url)
    async with app.open_async():
        if asked.schema:
            await app.schema_manager.apply_schema_async()
        if asked.enqueue:
            for number in range(asked.quick):
                await app.configure_task("quick", queue=asked.enqueue).defer_async(number=number)
            await app.configure_task("hold", queue=asked.enqueue).defer_async(until=asked.until)
        if asked.work:
            await app.run_worker_async(
                queues=[asked.work],
                name=asked.work,
                concurrency=4,
                update_heartbeat_interval=HEARTBEAT_SECONDS,
            )


def make_app(url: str) -> App:
    app = App(connector=PsycopgConnector(conninfo=url, min_size=1, max_size=4))

    @app.task(name="quick")
    async def quick(number: int) -> int:
        return number

    @app.task(name="hold")
    def hold(until: str) -> None:
        while not (until and Path(until).exists()):
            time.sleep(LOOK_SECONDS)

    return app


if __name__ == "__main__":
    main()
