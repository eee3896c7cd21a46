"""`orphan-recovery serve`: all deployments from one process, without a work pool."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_support import BIN, ROOT, Api, client_of, process, run
from support import Database, until


@pytest.fixture
def client(prefect_api: str, tmp_path: Path) -> dict[str, str]:
    return client_of(prefect_api, tmp_path / "client")


@pytest.fixture
def api(prefect_api: str) -> Iterator[Api]:
    """A server without deployments, at first."""
    api = Api(prefect_api)
    api.forget_deployments()
    yield api
    api.forget_deployments()


def test_one_process_serves_all_deployments_and_can_be_replaced(
    db: Database, api: Api, client: dict[str, str], tmp_path: Path
) -> None:
    db.add_run("held", worker="old-worker", age="2 minutes")
    # Young enough for a scheduled sweep, which may come due meanwhile, to leave it alone too.
    db.add_run("of another", worker="another-worker", age="2 minutes")
    command = ("orphan-recovery", "serve")
    often = {**client, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with process(*command, log=tmp_path / "serve.log", **often) as serving:
        until(lambda: len(api.find("deployments")) == 3, "all deployments")
        scheduled, on_demand = api.deployment("scheduled"), api.deployment("on-demand")
        assert scheduled["work_pool_name"] is on_demand["work_pool_name"] is None
        [schedule] = scheduled["schedules"]

        done = pipeline(client, OLD_WORKER="old-worker", RELEASE="2.4.1", THRESHOLD_MINUTES="1")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Completed: dry run: 1 orphaned run would be judged" in done.stdout
        assert "Completed: 1 orphaned run detected: 1 marked crashed" in done.stdout
        assert db.statuses() == {"held": "crashed", "of another": "running"}
        [sweep] = [sweep for sweep in db.sweeps() if sweep["marked"]]
        assert sweep["reason"] == "orphaned: worker replaced by release 2.4.1"

        os.kill(serving.pid, signal.SIGTERM)  # as a supervisor does, in a rolling deploy
        assert serving.wait(60) == 0
    assert not re.findall("Warning:|Traceback", (tmp_path / "serve.log").read_text())
    left = api.deployment("scheduled")
    assert left["paused"] is False
    assert left["schedules"] == scheduled["schedules"]  # others that serve it are not silenced

    path = f"/deployments/{left['id']}/schedules/{schedule['id']}"
    api.call("PATCH", path, {"active": False}).raise_for_status()
    with process(*command, log=tmp_path / "again.log", **client):
        updated = left["updated"]
        until(lambda: api.deployment("scheduled")["updated"] != updated, "the next process")
        [after] = api.deployment("scheduled")["schedules"]
    # The next sweep is not put off by a restart, and what a person paused stays paused.
    assert (after["id"], after["schedule"]) == (schedule["id"], schedule["schedule"])
    assert after["active"] is False


IMPATIENT = "import asyncio, orphan_recovery.deploy as d; d.LEAVING_SECONDS = {}; {}"


@pytest.mark.parametrize("ends_in_time", [True, False])
def test_a_sweep_at_work_may_end_and_none_is_left_running(
    db: Database, api: Api, client: dict[str, str], tmp_path: Path, ends_in_time: bool
) -> None:
    """Else the next ones by schedule would be cancelled, for the server thinks that it runs."""
    orphan, log = db.add_run("orphan"), tmp_path / "serve.log"
    run_it = "asyncio.run(d.serve_deployments())"
    command = ("python", "-c", IMPATIENT.format(60 if ends_in_time else 1, run_it))
    with process(*command, log=log, **client) as serving, db.connect() as holder:
        until(lambda: "serving recover-orphaned-runs/scheduled, " in log.read_text(), "its word")
        api.pause_schedules()
        holder.execute("SELECT FROM worker_runs WHERE id = %s FOR UPDATE", (orphan,))
        sweep = api.start("on-demand").raise_for_status().json()
        db.await_lock_wait()
        os.kill(serving.pid, signal.SIGTERM)
        until(lambda: "told to stop" in log.read_text(), "that it heard")
        if ends_in_time:
            assert api.flow_run(sweep["id"])["state_type"] == "RUNNING"
            holder.rollback()
        assert serving.wait(60) == 0
        ended = api.flow_run(sweep["id"])["state_type"]
    assert ended == ("COMPLETED" if ends_in_time else "CANCELLED")
    [told] = db.sweeps()
    assert told["ended_as"] == ("completed" if ends_in_time else "failed")
    assert ends_in_time or "told to stop while it swept" in told["error"]
    # Of a flow run that is cancelled, Prefect itself prints where it was.
    assert not re.findall("Warning:|Traceback" if ends_in_time else "Warning:", log.read_text())


@pytest.mark.parametrize("unset", ["OLD_WORKER", "RELEASE"])
def test_a_pipeline_with_an_empty_name_stops_before_it_does_anything(
    blank: Database, client: dict[str, str], unset: str
) -> None:
    done = pipeline(client, **{"OLD_WORKER": "old-worker", "RELEASE": "2.4.1", unset: ""})
    assert done.returncode != 0
    assert unset in done.stderr
    assert blank.one("SELECT to_regclass('worker_runs')") is None  # not even the migration ran


def pipeline(client: dict[str, str], **given: str) -> subprocess.CompletedProcess[str]:
    """The step of a deploy pipeline, with the command on its path."""
    script = str(ROOT / "deployments" / "pipeline.sh")
    return run(script, PATH=f"{BIN}:{os.environ['PATH']}", **client, **given)
