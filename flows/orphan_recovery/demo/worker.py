"""One worker process: claims its runs, starts them, beats, and does what its standard input says.

What it can wrongly do is differ from a real worker, so that the demo proves nothing. It does only
what a real one does, by statements that trust nobody's manners: its last word on a run does not
ask whether the run is still its own. Its work is done when it is told so. It imports no Prefect.
"""

import argparse
import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Final

import psycopg

BEAT_SECONDS: Final = 1.0

CLAIM = """
UPDATE worker_runs SET worker_id = %s
WHERE id = ANY(%s) AND status = 'queued' AND worker_id IS NULL
"""
START = """
UPDATE worker_runs SET status = 'running', started_at = now()
WHERE id = ANY(%s) AND status = 'queued' AND worker_id = %s
"""
BEAT = "UPDATE worker_runs SET heartbeat_at = now() WHERE id = ANY(%s) AND status = 'running'"
FINISH = """
UPDATE worker_runs
SET status = 'completed', success = true, completed_at = now(), output_json = '{"rows": 1042}'
WHERE id = %s
"""


class Order(StrEnum):
    """What a worker can be told, a line each."""

    BE_QUIET = "be quiet"
    """Work on, but beat no more."""
    FINISH = "finish"
    """The work is done: write the result."""
    FINISH_AND_STALL = "finish and stall"
    """Write the result, and stop (SIGSTOP) just before COMMIT, with the row locked."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Work until standard input ends, which it does when the demo does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", help="the worker's name")
    parser.add_argument("--runs", nargs="*", default=[], help="runs to claim and start")
    parser.add_argument("--claims", nargs="*", default=[], help="runs to claim and not yet start")
    asked = parser.parse_args(arguments)
    address = os.environ["ORPHAN_RECOVERY_DATABASE_URL"]
    with psycopg.connect(address, application_name=asked.name, autocommit=True) as db:
        work(db, asked.name, asked.runs, asked.claims)


def work(
    db: "psycopg.Connection[tuple[object, ...]]", name: str, runs: list[str], claims: list[str]
) -> None:
    """Claim ``runs`` and ``claims``, start ``runs``, then beat once a second and obey.

    Args:
        db: a connection in autocommit mode.
        name: the worker's name.
        runs: ids of queued runs.
        claims: ids of further queued runs, which stay queued.
    """
    db.execute(CLAIM, (name, runs + claims))
    db.execute(START, (runs, name))
    is_beating = True
    for order in _orders():
        if order is None and is_beating:
            db.execute(BEAT, (runs,))
        elif order is Order.BE_QUIET:
            is_beating = False
        elif order in (Order.FINISH, Order.FINISH_AND_STALL):
            is_beating = False
            for run in runs:
                _finish(db, run, stall=order is Order.FINISH_AND_STALL)


def _finish(db: "psycopg.Connection[tuple[object, ...]]", run: str, *, stall: bool) -> None:
    try:
        with db.transaction():
            db.execute(FINISH, (run,))
            if stall:
                os.kill(os.getpid(), signal.SIGSTOP)
    except psycopg.errors.RaiseException as refusal:
        _say(f"refused {run}: {refusal.diag.message_primary}")
    else:
        _say(f"finished {run}")


def _orders() -> Iterator[Order | None]:
    """Each order as it comes, and None whenever it is time to beat."""
    rest = b""
    while True:
        if not select.select([0], [], [], BEAT_SECONDS)[0]:
            yield None
            continue
        read = os.read(0, 4096)
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from (Order(line.decode()) for line in lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
