"""The orchestrator: a real Prefect server, a process that serves the deployments, and its API.

The hazards are a server of the viewer's that is taken for ours, and a schedule that goes off in
the middle of the story. So the server has a folder and a port of its own, and the schedule is
paused as soon as it is there. Prefect is not imported here: it is seen as any client sees it.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from orphan_recovery.demo.processes import Child, Processes, installed
from orphan_recovery.names import FLOW_NAME, ON_DEMAND, SCHEDULED


@dataclass(frozen=True, slots=True)
class FlowRun:
    """A flow run as Prefect has it."""

    id: str
    name: str
    state: str


@dataclass(frozen=True, slots=True)
class TaskRun:
    """A task run as Prefect has it."""

    name: str
    state: str


class Orchestrator:
    """A Prefect server of the demo's own.

    Args:
        processes: where its processes are started.
        folder: an empty folder for its files.
        database_url: the database that holds the runs.
    """

    def __init__(self, processes: Processes, folder: Path, database_url: str) -> None:
        self._processes = processes
        self.port = _free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": f"{self.address}/api",
            "PREFECT_UI_API_URL": "/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
            "ORPHAN_RECOVERY_DATABASE_URL": database_url,
        }
        # trust_env: a proxy of the viewer's has no business with 127.0.0.1.
        self._api = httpx.Client(base_url=f"{self.address}/api", timeout=30, trust_env=False)

    def start_server(self) -> Child:
        """Start the server; it needs a while to answer."""
        command = [installed("prefect"), "server", "start", "--port", str(self.port)]
        return self._processes.start("Prefect server", command, self.environment)

    def answers(self) -> bool:
        """Whether the server is up."""
        try:
            return self._api.get("/health").is_success
        except httpx.TransportError:
            return False

    def serve(self, default_threshold: timedelta | None) -> Child:
        """Start ``orphan-recovery serve``.

        Args:
            default_threshold: of a flow run that is started without one; None for the package's.
        """
        environment = dict(self.environment)
        if default_threshold is not None:
            minutes = int(default_threshold.total_seconds() // 60)
            environment["ORPHAN_THRESHOLD_MINUTES"] = str(minutes)
        command = [installed("orphan-recovery"), "serve"]
        return self._processes.start("orphan-recovery serve", command, environment)

    def trigger(self, *options: str) -> Child:
        """Start ``orphan-recovery trigger`` with these options."""
        command = [installed("orphan-recovery"), "trigger", *options]
        name = "orphan-recovery trigger"
        return self._processes.start(name, command, self.environment, may_end=True)

    def deployment(self, name: str) -> str | None:
        """The id of a deployment, or None if it is not there (yet)."""
        try:
            answer = self._api.get(f"/deployments/name/{FLOW_NAME}/{name}")
        except httpx.TransportError:  # a busy server may take its time
            return None
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        return str(answer.raise_for_status().json()["id"])

    def page_of(self, name: str) -> str:
        """The address of a deployment's page in the UI."""
        return f"{self.address}/deployments/deployment/{self.deployment(name)}"

    def pause_schedule(self) -> bool:
        """Pause the scheduled deployment, if it is there: its runs that wait are taken away.

        False if it is not there yet, or the server was too busy to answer.
        """
        return self._on_scheduled("pause_deployment")

    def resume_schedule(self) -> bool:
        """Let the scheduled deployment go on. False as above."""
        return self._on_scheduled("resume_deployment")

    def sweeps_on_demand(self) -> list[FlowRun]:
        """The flow runs of the on-demand deployment, in the order in which they were started."""
        deployment = {"id": {"any_": [self.deployment(ON_DEMAND)]}}
        found = self._find("flow_runs", deployments=deployment, sort="EXPECTED_START_TIME_ASC")
        return [FlowRun(run["id"], run["name"], run["state_name"]) for run in found]

    def task_runs(self, flow_run: FlowRun) -> list[TaskRun]:
        """The task runs of a flow run. They are recorded a moment after they ended."""
        found = self._find("task_runs", flow_runs={"id": {"any_": [flow_run.id]}})
        return [TaskRun(run["name"], run["state_name"]) for run in found]

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def _on_scheduled(self, what: str) -> bool:
        found = self.deployment(SCHEDULED)
        if found is None:
            return False
        try:
            self._api.post(f"/deployments/{found}/{what}").raise_for_status()
        except httpx.TransportError:  # to be asked again
            return False
        return True

    def _find(self, kind: str, **asked: Any) -> Sequence[dict[str, Any]]:
        answer = self._api.post(f"/{kind}/filter", json=asked).raise_for_status()
        found: list[dict[str, Any]] = answer.json()
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
