"""Flow: what Prefect adds. A task run an orphan against as many empty ones; slices; a flow run.

The hazard is a server that is still busy with the round before: one on SQLite then answers 503 to
whoever would begin a flow run, and Prefect's client tries again two seconds later. So each round
waits until the server has nothing more to write, and every flow is the first of its process.
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
from benchmarks.rates import SWEEP, check_marked_once, in_turn
from benchmarks.results import Goal, Measured, Result, Side, Size

# Prefect's server records some 30 task runs a second by default, and is busy long after. For both
# sides alike.
RECORDING = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "0.5",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
}
QUIET_SECONDS = 4.0
"""Longer than any of these writers waits for its next bundle."""
LONGEST_SECONDS = 300.0


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

        def settle() -> None:
            if size.flow_rounds > 1:
                _await_quiet(api)

        def run_flow(fleet: Fleet, side: str, tasks: int = 0, *, in_slices: bool = False) -> Ran:
            with server.copy(fleet) as url:
                settle()
                ran = _run(api, url, side, tasks, size.task_each_up_to if in_slices else 0)
                if side == "recover" and fleet.orphans:
                    check_marked_once(url, fleet.orphans)
            return ran

        if size.flow_rounds > 1:  # a server's first flow run is slow
            run_flow(none, "recover")
        for number in range(size.flow_rounds):
            fixed.append(run_flow(none, "recover"))
            sides = {"recover": (each, few), "empty": (empty, none)}
            for side, (ran, fleet) in in_turn(sides, number):
                ran.append(run_flow(fleet, side, size.tasks))
            if CAN_SLICE:
                with server.copy(many) as url:
                    settle()
                    sweeps.append(run(url, *SWEEP))
                sliced.append(run_flow(many, "recover", in_slices=True))
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
    with tempfile.TemporaryDirectory(prefix="orphan-bench-") as home:
        environment = {"PREFECT_API_URL": api, "PREFECT_HOME": home, "DO_NOT_TRACK": "1"}
        return run(url, "benchmarks.flow_sides", side, tasks, task_each_up_to, **environment)


def _await_quiet(api: str) -> None:
    """Return once the server has recorded nothing more for a while; it writes by the bundle."""
    began = since = time.monotonic()
    written = _written(api)
    while time.monotonic() - since < QUIET_SECONDS:
        if time.monotonic() - began > LONGEST_SECONDS:
            raise RuntimeError(f"{api} still records after {LONGEST_SECONDS:.0f} seconds")
        time.sleep(0.5)
        if (now := _written(api)) != written:
            written, since = now, time.monotonic()


def _written(api: str) -> tuple[int, int]:
    """How many task runs, and how many events, are recorded."""
    runs = httpx.post(f"{api}/task_runs/count", json={}, timeout=60).raise_for_status().json()
    events = httpx.post(f"{api}/events/filter", json={"limit": 1}, timeout=60).raise_for_status()
    return int(runs), int(events.json()["total"])


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
