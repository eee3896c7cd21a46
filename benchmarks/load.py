"""Load: workers on runs of their own, each loop of which claims, beats and finishes.

    python -m benchmarks.load WORKERS LOOPS_A_SECOND     (the environment names the database)

The hazard is a load that politely waits while it is hindered. So each loop is due at a fixed time,
and its latency counts from then. The statements are what the product's own worker sends.
"""

import json
import os
import sys
import threading
import time
from uuid import uuid4

import psycopg

CLAIM = (
    "UPDATE worker_runs SET status = 'running', worker_id = %(worker)s,"
    " started_at = statement_timestamp(), heartbeat_at = statement_timestamp()"
    " WHERE id = %(run)s AND status = 'queued' AND (worker_id IS NULL OR worker_id = %(worker)s)"
    " RETURNING 1"
)
BEAT = (
    "UPDATE worker_runs SET heartbeat_at = statement_timestamp() WHERE id = %(run)s"
    " AND status = 'running' AND worker_id = %(worker)s RETURNING 1"
)
FINISH = (
    "UPDATE worker_runs SET status = 'completed', success = true, output_json = '{\"rows\": 1042}',"
    " completed_at = statement_timestamp() WHERE id = %(run)s AND status = 'running'"
    " AND worker_id = %(worker)s RETURNING 1"
)


class Worker(threading.Thread):
    """One worker with one connection."""

    def __init__(self, number: int, loops_a_second: float, over: threading.Event) -> None:
        super().__init__()
        self.name, self.pause, self.over = f"worker-{number}", 1 / loops_a_second, over
        self.loops: list[tuple[float, float]] = []
        self.errors: list[str] = []
        self.db = psycopg.connect(os.environ["ORPHAN_RECOVERY_DATABASE_URL"], autocommit=True)

    def run(self) -> None:
        due = time.monotonic()
        while not self.over.is_set():
            try:
                self._loop()
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            self.loops.append((due, time.monotonic() - due))
            due += self.pause
            time.sleep(max(0.0, due - time.monotonic()))

    def _loop(self) -> None:
        values = {"run": str(uuid4()), "worker": self.name}
        self.db.execute("INSERT INTO worker_runs (id) VALUES (%(run)s)", values)
        for statement in (CLAIM, BEAT, FINISH):
            if self.db.execute(statement, values).rowcount != 1:
                raise RuntimeError(f"lost its run at {statement[:30]}")


def main(workers: int, loops_a_second: float) -> None:
    over = threading.Event()
    threads = [Worker(number, loops_a_second, over) for number in range(workers)]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    for thread in threads:
        thread.start()
    sys.stdin.readline()  # until it is told to end
    over.set()
    for thread in threads:
        thread.join()
    loops = sorted(loop for thread in threads for loop in thread.loops)
    errors = [error for thread in threads for error in thread.errors]
    sys.stdout.write(json.dumps({"loops": loops, "errors": errors}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
