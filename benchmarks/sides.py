"""Sides: what is measured, each in a process of its own that waits for the word to go.

    python -m benchmarks.sides SIDE     (the environment names the database)

The hazard is a baseline that does less, or more, than it says. The bare statement writes what the
product writes (the same columns, the same text, the same row of the ledger), without its guards;
the loop is the usual one: it selects, then updates each row by its id and keeps no ledger.
"""

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psycopg

THRESHOLD_MINUTES: Final = 720
"""Half a day, so that what lives in a template is still alive hours later; orphans are two days
old."""

_SILENT: Final = """
status IN ('queued', 'running')
AND created_at <= statement_timestamp() - %(threshold)s::interval
AND greatest(created_at, started_at, heartbeat_at)
    <= statement_timestamp() - %(threshold)s::interval
"""
_ORPHANS: Final = f"SELECT id FROM worker_runs WHERE {_SILENT} ORDER BY created_at"  # noqa: S608
BARE: Final = f"""
WITH marked AS (
    UPDATE worker_runs
    SET status = 'crashed', success = false, completed_at = statement_timestamp(),
        error = concat(%(reason)s::text, '; last sign of life ',
            to_char(timezone('UTC', greatest(created_at, started_at, heartbeat_at)),
                    'YYYY-MM-DD HH24:MI:SS'), ' UTC (age), silent for ',
            date_trunc('second', statement_timestamp()
                       - greatest(created_at, started_at, heartbeat_at)),
            ', threshold ', %(threshold)s::interval, ', sweep ', %(sweep)s::uuid)
    WHERE {_SILENT}
    RETURNING id, worker_id, tenant_id, task,
              greatest(created_at, started_at, heartbeat_at) AS sign_of_life
)
INSERT INTO orphan_recovery.verdicts (sweep_id, run_id, target, outcome, worker_id, tenant_id, task,
    status_seen, sign_of_life, evidence, silence, threshold, rule, reason, judged_at)
SELECT %(sweep)s, id, 'default', 'marked', worker_id, tenant_id, task, 'running', sign_of_life,
       'age', statement_timestamp() - sign_of_life, %(threshold)s::interval,
       'silence >= threshold', %(reason)s, statement_timestamp()
FROM marked
"""  # noqa: S608
_OPEN: Final = """
INSERT INTO orphan_recovery.sweeps
    (sweep_id, target, table_name, asked_by, reason, threshold, scope, version, opened_at)
VALUES (%(sweep)s, 'default', 'worker_runs', 'benchmark', %(reason)s, %(threshold)s, '{}', '0',
        statement_timestamp())
"""


def values() -> dict[str, Any]:
    """What the bare statement is given."""
    return {
        "sweep": uuid4(),
        "threshold": f"{THRESHOLD_MINUTES} minutes",
        "reason": "orphaned: no sign of life from its worker",
    }


def sweep() -> Callable[[], int]:
    """The start-up path, as a worker or the command line takes it."""
    from orphan_recovery.recover import run_sweep
    from orphan_recovery.request import SweepRequest

    request = SweepRequest(asked_by="benchmark", threshold_minutes=THRESHOLD_MINUTES)

    def swept() -> int:
        report = asyncio.run(run_sweep(request))
        if doubted := report.looked_twice or report.postponed:
            raise SystemExit(f"it waited, so its time tells nothing: {doubted}")
        if not report.ended_well:
            raise SystemExit(report.headline())
        return report.recovered

    return swept


def bare() -> Callable[[], int]:
    """One statement that marks all and records each, in one transaction."""

    def marked() -> int:
        given = values()
        with psycopg.connect(_address()) as db:
            db.execute(_OPEN, given)
            return db.execute(BARE, given).rowcount

    return marked


def loop(rows_a_commit: int = 1, at_most: int | None = None) -> Callable[[], int]:
    """Select the orphans, then update each by its id. No guard, no ledger."""

    def marked() -> int:
        given = {**values(), "limit": at_most}
        with psycopg.connect(_address()) as db:
            found = db.execute(f"{_ORPHANS} LIMIT %(limit)s", given).fetchall()
            for number, (run_id,) in enumerate(found, 1):
                db.execute(
                    "UPDATE worker_runs SET status = 'crashed', success = false, error = %s,"
                    " completed_at = now() WHERE id = %s",
                    [given["reason"], run_id],
                )
                if number % rows_a_commit == 0:
                    db.commit()
        return len(found)

    return marked


def orm(at_most: int) -> Callable[[], int]:
    """The same loop as the stack's own users write it: mapped rows, a session, a commit a row."""
    from sqlalchemy import func, select, text
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
    from sqlalchemy.ext.automap import automap_base

    from orphan_recovery.database import database_url

    async def marked() -> int:
        engine = create_async_engine(database_url())
        base: Any = automap_base()
        async with engine.begin() as connection:
            await connection.run_sync(base.prepare)
        run = base.classes.worker_runs
        given = values()
        silent = text(_SILENT.replace("%(threshold)s::interval", "CAST(:threshold AS interval)"))
        async with AsyncSession(engine, expire_on_commit=False) as session:
            found = select(run).where(silent).order_by(run.created_at).limit(at_most)
            runs = (await session.scalars(found, {"threshold": given["threshold"]})).all()
            for one in runs:
                one.status, one.success, one.error = "crashed", False, given["reason"]
                one.completed_at = func.now()
                await session.commit()
        await engine.dispose()
        return len(runs)

    return lambda: asyncio.run(marked())


def connected() -> Callable[[], int]:
    """A process that connects, asks one thing, and stays until nobody wants to hear from it."""
    sweep()  # it has loaded what a sweeper has

    def stayed() -> int:
        with psycopg.connect(_address()) as db:
            db.execute("SELECT 1")
            sys.stdin.read()
        return 0

    return stayed


def idle(all_of_them: int) -> Callable[[], int]:
    """A sweep; returns how many statements it sent.

    Args:
        all_of_them: 1 for all that the driver was given, with SQLAlchemy's own (its first look at
            the server, its pings); 0 for those of the product.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    own = every = 0
    execute = psycopg.AsyncCursor.execute

    async def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal every
        every += 1
        return await execute(self, *arguments, **options)

    def sent(*_: Any) -> None:
        nonlocal own
        own += 1

    psycopg.AsyncCursor.execute = counted  # type: ignore[method-assign]
    event.listen(Engine, "before_cursor_execute", sent)
    swept = sweep()

    def count() -> int:
        swept()
        return every if all_of_them else own

    return count


def _address() -> str:
    return os.environ["ORPHAN_RECOVERY_DATABASE_URL"]


def peak_kib() -> int:
    """The most memory that this process has had: its own, not that of whoever started it."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // 1024 if sys.platform == "darwin" else most


def serve(side: Callable[[], int]) -> None:
    """Wait for the word, do it, tell how it went."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    began = time.monotonic()
    count = side()
    seconds = time.monotonic() - began
    told = {"began": began, "seconds": seconds, "count": count, "peak_kib": peak_kib()}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


SIDES: Final[dict[str, Callable[..., Callable[[], int]]]] = {
    "sweep": sweep,
    "bare": bare,
    "loop": loop,
    "orm": orm,
    "connected": connected,
    "idle": idle,
}

if __name__ == "__main__":
    serve(SIDES[sys.argv[1]](*map(int, sys.argv[2:])))
