"""Flow: what Prefect adds. A task run an orphan against as many empty ones; slices; a flow run.

The hazard is a server that is still busy with the round before. So each round waits until the
server has recorded all task runs, and every flow is the first of its process.
"""

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.data import Fleet, Server
from benchmarks.processes import Ran, free_port, run
from benchmarks.rates import SWEEP, check_marked_once
from benchmarks.results import Goal, Measured, Result, Side, Size

# Prefect's server records some 30 task runs a second by default, and is busy long after. For both
# sides alike.
RECORDING = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "0.5",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
}


def flow(server: Server, size: Size) -> Measured:
    """A task run an orphan; slices, beyond the fixed cost of a flow run, where the flow has them.

    All on one server: what finds nothing, what has a task run each, empty tasks, slices, in turn.
    """
    from benchmarks.flow_sides import CAN_SLICE

    few = Fleet(size.rows, size.tasks)
    many, none = Fleet(size.rows, size.orphans), Fleet(size.rows, 0)
    each, empty = list[Ran](), list[Ran]()
    sliced, sweeps, fixed = list[Ran](), list[Ran](), list[Ran]()
    with prefect_server() as api:
        if size.flow_rounds > 1:  # a server's first flow run is slow
            with server.copy(none) as url:
                _run(api, url, "recover", 0)
        for _ in range(size.flow_rounds):
            with server.copy(none) as url:
                fixed.append(_run(api, url, "recover", 0))
                empty.append(_run(api, url, "empty", size.tasks))
            with server.copy(few) as url:
                each.append(_run(api, url, "recover", size.tasks))
                check_marked_once(url, size.tasks)
            if CAN_SLICE:
                with server.copy(many) as url:
                    sweeps.append(run(url, *SWEEP))
                with server.copy(many) as url:
                    sliced.append(_run(api, url, "recover", 0, size.task_each_up_to))
                    check_marked_once(url, size.orphans)
    server.forget(few)
    server.forget(none)
    a_run = Side("a flow run that finds nothing", [one.seconds for one in fixed], "s")
    results = [
        Result(
            f"flow, {size.tasks:,} orphans, a task run each, against empty tasks",
            [mine.seconds / other.seconds for mine, other in zip(each, empty, strict=True)],
            Goal(1.15),
            sides=[
                Side("flow", [one.seconds for one in each], "s"),
                Side("flow of empty tasks", [one.seconds for one in empty], "s"),
                a_run,
            ],
        )
    ]
    if sliced:
        beyond = median(a_run.values)
        pairs = zip(sliced, sweeps, strict=True)
        results.append(
            Result(
                f"flow in slices, {size.orphans:,} orphans, against the start-up path",
                [max(mine.seconds - beyond, 0) / sweep.seconds for mine, sweep in pairs],
                Goal(1.3),
                sides=[
                    Side("flow", [one.seconds for one in sliced], "s"),
                    a_run,
                    Side("start-up path", [one.seconds for one in sweeps], "s"),
                ],
                notes=["of the flow, what is beyond a flow run that finds nothing"],
            )
        )
    return Measured(results)


def _run(api: str, url: str, side: str, tasks: int, task_each_up_to: int = 0) -> Ran:
    """One flow in a process of its own, which has ``tasks`` task runs of that kind."""
    before = _recorded(api)
    with tempfile.TemporaryDirectory(prefix="orphan-bench-") as home:
        environment = {"PREFECT_API_URL": api, "PREFECT_HOME": home, "DO_NOT_TRACK": "1"}
        ran = run(url, "benchmarks.flow_sides", side, tasks, task_each_up_to, **environment)
    _await_records(api, before + tasks)
    return ran


def _recorded(api: str) -> int:
    return int(httpx.post(f"{api}/task_runs/count", json={}, timeout=60).raise_for_status().json())


def _await_records(api: str, count: int) -> None:
    """Return once so many task runs are recorded, or no more come."""
    give_up_at, last = time.monotonic() + 120, -1
    while time.monotonic() < give_up_at and (now := _recorded(api)) < count:
        if now == last:
            time.sleep(3)
            if _recorded(api) == last:
                return
        last = now
        time.sleep(0.5)


@contextmanager
def prefect_server() -> Iterator[str]:
    """The API address of a real server of our own."""
    with tempfile.TemporaryDirectory(prefix="orphan-bench-") as folder:
        port = free_port()
        api = f"http://127.0.0.1:{port}/api"
        environment: dict[str, Any] = {
            **os.environ,
            **RECORDING,
            "PREFECT_HOME": folder,
            "PREFECT_UI_API_URL": "/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        environment.pop("PREFECT_API_URL", None)
        command = [str(Path(sys.executable).with_name("prefect")), "server", "start"]
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--port", str(port)], env=environment, stdout=output, stderr=output
            )
        try:
            _await_health(api, process, log)
            yield api
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_health(api: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up_at = time.monotonic() + 180
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{api}/health", timeout=2):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the Prefect server did not come up:\n{log.read_text()[-3000:]}")
