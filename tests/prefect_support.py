"""What a real Prefect server recorded, read back over its API, and processes that talk to it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import yaml  # type: ignore[import-untyped, unused-ignore]
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from orphan_recovery.flow import recover_orphaned_runs
from orphan_recovery.names import ALL_FLOW_NAME, FLOW_NAME
from support import until

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


class Api:
    """A Prefect server's HTTP API, as any client sees it."""

    def __init__(self, url: str) -> None:
        self.url = url
        # One on SQLite may wait a whole minute for its own lock before it answers at all. And it
        # ends a connection that was idle for five seconds, so none is to be used again by then.
        self._client = httpx.Client(timeout=180, limits=httpx.Limits(keepalive_expiry=2))

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Flows called within run against this server, and have told it all at the end."""
        with temporary_settings({PREFECT_API_URL: self.url}):
            try:
                yield
            finally:
                await APILogHandler.aflush()
                await cast("Awaitable[None]", EventsWorker.drain_all())

    def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        for _ in range(60):
            answer = self._client.request(method, f"{self.url}{path}", json=body)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)  # its own database is busy; Prefect's clients wait and ask again too
        return answer

    def get(self, path: str) -> Any:
        return self.call("GET", path).raise_for_status().json()

    def find(self, kind: str, **body: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (
            self.call("POST", f"/{kind}/filter", body).raise_for_status().json()
        )
        return found

    def within(self, flow_run_id: Any) -> dict[str, dict[str, Any]]:
        """The flow runs that a flow run started, by name."""
        mine = {"parent_flow_run_id": {"any_": [str(flow_run_id)]}}
        return {run["name"]: run for run in self.find("flow_runs", flow_runs=mine)}

    def deployment(self, name: str) -> dict[str, Any]:
        flow = ALL_FLOW_NAME if name == "all-targets" else FLOW_NAME
        deployment: dict[str, Any] = self.get(f"/deployments/name/{flow}/{name}")
        return deployment

    def pause_schedules(self) -> None:
        """From now on no sweep is due but those that a test starts."""
        for deployment in self.find("deployments"):
            path = f"/deployments/{deployment['id']}/pause_deployment"
            self.call("POST", path).raise_for_status()

    def forget_deployments(self) -> None:
        """Leave this server without deployments of the flow and without work pools."""
        for deployment in self.find("deployments"):
            self.call("DELETE", f"/deployments/{deployment['id']}").raise_for_status()
        for pool in self.find("work_pools"):
            self.call("DELETE", f"/work_pools/{pool['name']}").raise_for_status()

    def start(self, name: str, **parameters: Any) -> httpx.Response:
        """Ask for a flow run of a deployment now, as the UI does."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.call("POST", path, {"parameters": parameters})

    def flow_run(self, flow_run_id: Any) -> dict[str, Any]:
        run: dict[str, Any] = self.get(f"/flow_runs/{flow_run_id}")
        return run

    def await_state(self, flow_run_id: Any, *types: str, seconds: float = 240) -> dict[str, Any]:
        """The flow run once it has entered one of these types of state."""
        until(
            lambda: self.flow_run(flow_run_id)["state_type"] in types,
            f"flow run {flow_run_id} to be {' or '.join(types)}",
            seconds,
        )
        return self.flow_run(flow_run_id)

    def task_runs(self, flow_run_id: Any) -> dict[str, dict[str, Any]]:
        """The task runs of a flow run by name, once the records of all of them have arrived.

        The server records them a moment late; the one that closes the sweep is the last.
        """
        mine = {"flow_runs": {"id": {"any_": [str(flow_run_id)]}}, "limit": 200}

        def settled() -> bool:
            runs = self.find("task_runs", **mine)
            ended = all(run["state_type"] in FINAL for run in runs)
            return ended and any(run["name"] == "summarise" for run in runs)

        until(settled, f"the task runs of flow run {flow_run_id}")
        return {run["name"]: run for run in self.find("task_runs", **mine)}

    def artifacts(self, flow_run_id: Any) -> dict[str, dict[str, Any]]:
        """The artifacts of a flow run by key."""
        mine = {"flow_run_id": {"any_": [str(flow_run_id)]}}
        return {artifact["key"]: artifact for artifact in self.find("artifacts", artifacts=mine)}

    def logs(self, flow_run_id: Any) -> list[str]:
        mine = {"flow_run_id": {"any_": [str(flow_run_id)]}}
        return [log["message"] for log in self.find("logs", logs=mine)]


async def sweep(api: Api, **parameters: Any) -> State[Any]:
    """Run the flow in this process to its final state."""
    async with api.used():
        state: State[Any] = await recover_orphaned_runs(**parameters, return_state=True)
    return state


def flow_run_of(state: State[Any]) -> Any:
    """The id of the flow run that ended in ``state``."""
    return state.state_details.flow_run_id


def marks(task_runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of the task runs that marked an orphan, by the orphan's id."""
    return {n.removeprefix("mark-"): run for n, run in task_runs.items() if n.startswith("mark-")}


def client_of(prefect_api: str, home: Path) -> dict[str, str]:
    """The environment of a process that talks to this server, and to no other."""
    return {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1"}


def deploy(client: dict[str, str], *, scheduled: bool = True) -> None:
    """Deploy prefect.yaml, to a work pool named process.

    Args:
        client: the environment of the command.
        scheduled: without it, no sweep is due but those that a test starts. To silence a schedule
            afterwards is not enough: Prefect may be about to plan a sweep that is due by then.
    """
    file = ROOT / "prefect.yaml"
    if not scheduled:
        written = yaml.safe_load(file.read_text())
        for deployment in written["deployments"]:
            for schedule in deployment.get("schedules", []):
                schedule["active"] = False
        file = Path(client["PREFECT_HOME"]) / "prefect.yaml"
        file.write_text(yaml.safe_dump(written))
    template = ProcessWorker.get_default_base_job_template()
    pool = {"name": "process", "type": "process", "base_job_template": template}
    answer = Api(client["PREFECT_API_URL"]).call("POST", "/work_pools/", pool)
    assert answer.status_code in (201, 409), answer.text  # made, or there already
    command = ("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file))
    done = run(*command, **client)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def working(
    client: dict[str, str], log: Path, **environment: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker of that work pool; it asks often what there is to do."""
    often = {"PREFECT_WORKER_QUERY_SECONDS": "0.5", **environment}
    command = ("prefect", "worker", "start", "--pool", "process", "--type", "process")
    with process(*command, log=log, **client, **often) as worker:
        yield worker


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of this environment, run from the checkout's root to its end."""
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@contextmanager
def process(*command: str, log: Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A long-lived command of this environment in a process group of its own, ended for sure."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        for number, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
            try:
                os.killpg(started.pid, number)
                started.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
