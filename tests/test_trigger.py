"""Triggered and scheduled sweeps, executed by a real worker of a real work pool."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from sqlalchemy import make_url

from alive.proxy import Proxy
from orphan_recovery.doctor.schedule import look_up_schedule
from orphan_recovery.target import Target
from prefect_support import Api, client_of, deploy, process, run, working
from support import Database, database_of_its_own, free_port, until


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="module")
def client(prefect_api: str, home: Path) -> dict[str, str]:
    return client_of(prefect_api, home)


@pytest.fixture(scope="module")
def api(prefect_api: str) -> Iterator[Api]:
    """A server without deployments, at first."""
    api = Api(prefect_api)
    api.forget_deployments()
    yield api
    api.forget_deployments()


@pytest.fixture(scope="module")
def deployed(api: Api, client: dict[str, str]) -> None:
    """The deployments are there. No sweep is due, so that each is one that a test started."""
    deploy(client, scheduled=False)


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[Database]:
    """The database that the worker's environment names."""
    with database_of_its_own(server, template) as url, Database(url) as database:
        yield database


@pytest.fixture
def database(shared: Database) -> Iterator[Database]:
    """The same, with nothing in flight; what is terminal or in the ledger stays, as ever."""
    yield shared
    shared.do("DROP FUNCTION IF EXISTS poison() CASCADE")
    shared.do("DELETE FROM worker_runs WHERE status IN ('queued', 'running')")


@pytest.fixture(scope="module")
def worker(deployed: None, shared: Database, client: dict[str, str], home: Path) -> Iterator[None]:
    with working(client, home / "worker.log", ORPHAN_RECOVERY_DATABASE_URL=shared.url):
        yield


def flow_run_in(output: str) -> str:
    """The id in the address that was printed."""
    found = re.search(r"^flow run \S+: http://\S+/runs/flow-run/([0-9a-f-]{36})$", output, re.M)
    assert found, output
    return found[1]


def test_a_server_without_the_deployment_is_a_usage_error(api: Api, client: dict[str, str]) -> None:
    """The first here, before anything is deployed."""
    done = run("orphan-recovery", "trigger", "--wait", **client)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no deployment 'recover-orphaned-runs/on-demand'" in done.stderr
    assert "deploy --all" in done.stderr
    assert api.find("flow_runs", deployments={"name": {"any_": ["on-demand"]}}) == []


@contextmanager
def guarded() -> Iterator[str]:
    """A server that answers as Prefect's does to whoever gives no password."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"exception_message":"Unauthorized"}'
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the base class's word

        def log_message(self, *_: object) -> None:
            """Nothing: it is the test that tells."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


@pytest.mark.parametrize("command", [("trigger", "--wait"), ("serve",)], ids=" ".join)
def test_a_server_that_cannot_be_used_is_a_usage_error_in_one_line(
    api: Api, client: dict[str, str], shared: Database, command: tuple[str, ...]
) -> None:
    nowhere, beside = f"http://127.0.0.1:{free_port()}/api", api.url.removesuffix("/api")
    with guarded() as guard:
        for url, told in {
            nowhere: f"the Prefect API at {nowhere} cannot be reached (ConnectError)",
            beside: f"{beside} is no Prefect API: does PREFECT_API_URL end in /api?",
            guard: "HTTP 401: set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY for Prefect Cloud",
        }.items():
            here = {"PREFECT_API_URL": url, "ORPHAN_RECOVERY_DATABASE_URL": shared.url}
            done = run("orphan-recovery", *command, **{**client, **here})
            assert (done.returncode, done.stdout) == (2, "")
            assert told in done.stderr
            assert done.stderr.count("\n") == 1


def test_a_sweep_that_no_worker_took_in_time_stays_scheduled_and_is_no_success(
    deployed: None, api: Api, client: dict[str, str]
) -> None:
    """Before there is a worker."""
    done = run("orphan-recovery", "trigger", "--wait", "--timeout", "1", **client)
    assert done.returncode == 1
    assert "the flow run is still Scheduled after 1 s, and stays scheduled: see" in done.stderr
    assert "whether a worker or `orphan-recovery serve` is up" in done.stderr
    flow_run = flow_run_in(done.stdout)
    assert api.flow_run(flow_run)["state_type"] == "SCHEDULED"
    api.call("DELETE", f"/flow_runs/{flow_run}").raise_for_status()


def test_a_server_that_asks_for_a_password_is_told_of_by_the_doctor_too() -> None:
    with guarded() as guard, temporary_settings({PREFECT_API_URL: guard}):
        schedule = look_up_schedule(Target())
    assert schedule.told == f"the Prefect API at {guard} cannot be asked: HTTP 401"
    assert "PREFECT_API_AUTH_STRING" in (schedule.way_out or "")


def test_flow_runs_that_nothing_picks_up_are_told_of_by_the_doctor(
    deployed: None, api: Api, client: dict[str, str]
) -> None:
    """Before there is a worker."""
    path = f"/deployments/{api.deployment('on-demand')['id']}/create_flow_run"
    made = []

    def due(minutes_ago: float, called: str = "Scheduled") -> None:
        at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
        details = {"scheduled_time": at.isoformat()}
        state = {"type": "SCHEDULED", "name": called, "state_details": details}
        asked = api.call("POST", path, {"state": state}).raise_for_status()
        made.append(asked.json()["id"])

    try:
        with temporary_settings({PREFECT_API_URL: api.url}):
            due(-5)
            due(0.05)
            well = look_up_schedule(Target())
            assert "late" not in well.told, "none that is to come, nor one that is due just now"
            due(0.3, "Late")
            one = look_up_schedule(Target())
            assert one.told == (
                f"{well.told}; 1 flow run of on-demand is late: nothing picks it up"
            )
            due(2)
            two = look_up_schedule(Target())
        assert "; 2 flow runs of on-demand are late: nothing picks them up" in two.told
        assert (two.way_out or "").startswith(
            "see whether `prefect worker start` or `orphan-recovery serve` is up; "
        )
    finally:
        for flow_run in made:
            api.call("DELETE", f"/flow_runs/{flow_run}").raise_for_status()


@pytest.mark.parametrize("loss", ["cut", "swallow"])
def test_a_server_that_goes_away_while_a_pipeline_waits_is_named(
    deployed: None, api: Api, client: dict[str, str], tmp_path: Path, loss: str
) -> None:
    with Proxy(api.url.replace("http", "postgresql", 1)) as proxy:  # it passes on any bytes
        through = f"http://127.0.0.1:{make_url(proxy.url).port}/api"
        log = tmp_path / "trigger.log"
        asked = ("orphan-recovery", "trigger", "--wait", "--timeout", "8")
        with process(*asked, log=log, **{**client, "PREFECT_API_URL": through}) as waiting:
            until(lambda: "Scheduled" in log.read_text(), "a pipeline that waits")
            getattr(proxy, loss)()
            assert waiting.wait(20) == 1, "it waits no longer than it was told to"
    told = log.read_text()
    assert f"the Prefect API at {through} was lost while waiting" in told
    assert "goes on all the same: look there, or trigger again" in told
    assert "Traceback" not in told
    [flow_run] = re.findall(r"/flow-run/([0-9a-f-]{36})$", told, re.M)
    api.call("DELETE", f"/flow_runs/{flow_run}").raise_for_status()


def test_a_pipeline_goes_on_after_a_sweep_that_ended_well(
    worker: None, api: Api, client: dict[str, str], database: Database
) -> None:
    database.add_run("orphan", worker="old-worker", age="40 minutes")
    database.add_run("too young", worker="old-worker", age="20 minutes")
    database.add_run("of another worker", worker="other-worker", age="5 hours")
    done = run(
        *("orphan-recovery", "trigger", "--wait", "--threshold-minutes", "30"),
        *("--worker", "old-worker", "--reason", "deploy"),
        **client,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Completed: 1 orphaned run detected: 1 marked crashed" in done.stdout
    assert database.status("orphan") == "crashed"
    assert database.status("too young") == database.status("of another worker") == "running"
    flow_run = api.flow_run(flow_run_in(done.stdout))
    assert flow_run["parameters"] == {
        "threshold_minutes": 30,
        "worker": "old-worker",
        "reason": "deploy",
    }
    assert set(flow_run["tags"]) == {"orphan-recovery", "triggered"}
    sweep = database.sweeps()[-1]
    asked_by = f"flow run {flow_run['name']} ({flow_run['id']}), started by orphan-recovery trigger"
    assert sweep["asked_by"] == asked_by
    assert (sweep["reason"], sweep["scope"]) == ("deploy", {"worker": "old-worker"})


def test_a_pipeline_stops_after_a_sweep_that_failed(
    worker: None, api: Api, client: dict[str, str], database: Database
) -> None:
    database.add_run("poisoned", age="3 hours")
    database.add_run("sound")
    database.poison("poisoned")
    done = run("orphan-recovery", "trigger", "--wait", **client)
    assert done.returncode == 1
    assert "Failed: 2 orphaned runs detected: 1 marked crashed, 1 FAILED" in done.stdout
    assert "the sweep ended Failed: 2 orphaned runs detected: 1 marked" in done.stderr
    found = re.search(
        r"done next is in its summary: http://\S+/artifact/([0-9a-f-]{36})$", done.stderr
    )
    assert found, done.stderr
    artifact = api.get(f"/artifacts/{found[1]}")
    assert artifact["flow_run_id"] == flow_run_in(done.stdout)
    assert "## What to do next" in artifact["data"]
    assert database.status("sound") == "crashed"
    assert api.flow_run(flow_run_in(done.stdout))["state_type"] == "FAILED"


def test_the_schedule_sweeps_by_itself_and_never_twice_at_once(
    worker: None, api: Api, database: Database
) -> None:
    orphan = database.add_run("found by the schedule")
    with database.connect() as holder:
        holder.execute("SELECT FROM worker_runs WHERE id = %s FOR UPDATE", (orphan,))
        first = sweep_now_by_schedule(api)
        database.await_lock_wait()
        assert api.flow_run(first)["state_type"] == "RUNNING"
        second = api.start("scheduled").raise_for_status().json()
        ended = api.await_state(second["id"], "CANCELLED", "COMPLETED", "RUNNING")
        assert ended["state_type"] == "CANCELLED"
        assert "concurrency limit" in ended["state"]["message"]
    assert api.await_state(first, "COMPLETED", "FAILED", "CRASHED")["state_type"] == "COMPLETED"
    assert database.status(orphan) == "crashed"
    mine = [v for v in database.verdicts() if v["run_id"] == orphan]
    assert [v["outcome"] for v in mine] == ["marked"]
    [sweep] = [s for s in database.sweeps() if s["sweep_id"] == mine[0]["sweep_id"]]
    assert sweep["asked_by"].endswith(f"({first}), started by its schedule")


def sweep_now_by_schedule(api: Api) -> str:
    """Let the schedule fall due now, and once; the id of the flow run that it plans."""
    scheduled = api.deployment("scheduled")
    path = f"/deployments/{scheduled['id']}/schedules/{scheduled['schedules'][0]['id']}"
    now = datetime.now(UTC)
    interval = {"interval": 300, "anchor_date": (now + timedelta(seconds=3)).isoformat()}
    api.call("PATCH", path, {"active": True, "schedule": interval}).raise_for_status()
    api.call("POST", f"/deployments/{scheduled['id']}/schedule", {}).raise_for_status()
    planned = {
        "deployments": {"id": {"any_": [scheduled["id"]]}},
        "flow_runs": {"expected_start_time": {"before_": (now + timedelta(minutes=1)).isoformat()}},
    }
    until(lambda: bool(api.find("flow_runs", **planned)), "a sweep that the schedule planned")
    [run] = api.find("flow_runs", **planned)
    assert run["auto_scheduled"]
    return str(run["id"])
