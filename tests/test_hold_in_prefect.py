"""Hold in Prefect: a flow run that waits for a person, and stands in nobody's way meanwhile.

Executed by a real worker of a real work pool, and asked over the API that the UI uses.
"""

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.all_targets_flow import recover_all_targets
from orphan_recovery.deploy import releases
from orphan_recovery.flow import SweepFailed, recover_orphaned_runs
from orphan_recovery.flow_heed import Heeded, heed
from orphan_recovery.flow_hold import Answer, Given
from prefect_support import Api, client_of, deploy, flow_run_of, marks, run, sweep, working
from support import Database, database_of_its_own, until

YES = {"decision": "mark them crashed", "your_name": "Ada L."}
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="module")
def client(prefect_api: str, home: Path) -> dict[str, str]:
    return client_of(prefect_api, home)


@pytest.fixture(scope="module")
def api(prefect_api: str) -> Iterator[Api]:
    """A server without other deployments."""
    api = Api(prefect_api)
    api.forget_deployments()
    yield api
    api.forget_deployments()


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[Database]:
    """The database that the worker's environment names."""
    with database_of_its_own(server, template) as url, Database(url) as database:
        yield database


@pytest.fixture(scope="module")
def worker(api: Api, shared: Database, client: dict[str, str], home: Path) -> Iterator[None]:
    """Executes what is started; no sweep is due but those that a test starts."""
    deploy(client, scheduled=False)
    with working(client, home / "worker.log", ORPHAN_RECOVERY_DATABASE_URL=shared.url):
        yield


@pytest.fixture
def fleet(worker: None, shared: Database) -> Iterator[Database]:
    """Twelve workers, of which all look dead; no hold is open that an earlier test left."""
    add_fleet(shared)
    yield shared
    shared.do("DELETE FROM worker_runs WHERE status IN ('queued', 'running')")
    shared.do(
        "UPDATE orphan_recovery.holds SET ended_at = now(), ended_as = 'recovered'"
        " WHERE ended_at IS NULL"
    )


def add_fleet(db: Database) -> None:
    tag = db.one("SELECT count(*) FROM orphan_recovery.sweeps")  # what is terminal stays
    for number in range(12):
        db.add_run(f"run-{tag}-{number:02}", worker=f"worker-{number}")


def come_back(db: Database) -> None:
    db.do("UPDATE worker_runs SET heartbeat_at = now() WHERE status = 'running'")


def in_flight(db: Database) -> list[str]:
    return sorted(run for run, status in db.statuses().items() if status == "running")


def open_hold(db: Database) -> dict[str, Any]:
    [hold] = db.do("SELECT * FROM orphan_recovery.holds WHERE ended_at IS NULL")
    return hold


def approvals(db: Database, hold: dict[str, Any]) -> list[dict[str, Any]]:
    return db.do("SELECT * FROM orphan_recovery.approvals WHERE hold_id = %s", hold["hold_id"])


def start_held(api: Api, deployment: str = "scheduled") -> dict[str, Any]:
    """A sweep of the deployment, once it is held."""
    started = api.start(deployment).raise_for_status().json()
    held = api.await_state(started["id"], "PAUSED", *ENDS)
    until(lambda: api.flow_run(held["id"])["state_name"] != "Suspended", "the name of its state")
    return api.flow_run(held["id"])


def resume(api: Api, flow_run: dict[str, Any], answer: dict[str, Any] | None) -> dict[str, Any]:
    """What the UI's form does."""
    path = f"/flow_runs/{flow_run['id']}/resume"
    result: dict[str, Any] = api.call("POST", path, {"run_input": answer}).raise_for_status().json()
    return result


def retry(api: Api, flow_run: dict[str, Any]) -> dict[str, Any]:
    """What the UI's button does; the flow run once it has ended anew."""
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    path = f"/flow_runs/{flow_run['id']}/set_state"
    api.call("POST", path, {"state": state, "force": True}).raise_for_status()
    return api.await_state(flow_run["id"], "PAUSED", *ENDS)


def events(api: Api, name: str) -> list[dict[str, Any]]:
    found = api.call("POST", "/events/filter", {"filter": {"event": {"name": [name]}}})
    events: list[dict[str, Any]] = found.raise_for_status().json()["events"]
    return events


def about(event: dict[str, Any], flow_run: dict[str, Any]) -> bool:
    resources = [event["resource"], *event["related"]]
    return any(r["prefect.resource.id"].endswith(flow_run["id"]) for r in resources)


def is_told(api: Api, event: str, flow_run: dict[str, Any]) -> bool:
    return any(about(found, flow_run) for found in events(api, event))


def pid_of(flow_run: dict[str, Any]) -> int:
    return int(str(flow_run["infrastructure_pid"]).rpartition(":")[2])


def is_gone(flow_run: dict[str, Any]) -> bool:
    """Whether the process that executed it has ended."""
    try:
        os.kill(pid_of(flow_run), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_held_sweep_waits_in_the_ui_and_marks_its_runs_once_a_person_says_so(
    api: Api, fleet: Database
) -> None:
    silent = in_flight(fleet)
    held = start_held(api)
    assert (held["state_name"], held["state_type"]) == ("Held", "PAUSED")
    hold = open_hold(fleet)
    assert held["state"]["message"].startswith("HELD: 12 of 12 workers look dead since ")
    assert str(hold["hold_id"]) in held["state"]["message"]
    assert in_flight(fleet) == silent
    told = fleet.sweeps()[-1]
    assert (told["ended_as"], told["hold"]) == ("held", hold["hold_id"])
    until(lambda: is_gone(held), "the end of its process")

    for name in ("prefect.flow-run.Held", "orphan-recovery.held"):
        until(partial(is_told, api, name, held), f"the event {name}")
    [event] = [e for e in events(api, "orphan-recovery.held") if about(e, held)]
    assert event["resource"]["prefect.resource.id"] == "orphan-recovery.target.default"
    assert event["payload"]["hold_id"] == str(hold["hold_id"])
    assert (event["payload"]["runs"], event["payload"]["silent_workers"]) == (12, 12)
    artifacts = api.artifacts(held["id"])
    assert "## What was not dared" in artifacts["orphan-recovery-summary"]["data"]

    keys = held["state"]["state_details"]["run_input_keyset"]
    form = {
        key: api.get(f"/flow_runs/{held['id']}/input/{keys[key]}")
        for key in keys
        if key != "response"
    }
    assert set(form["schema"]["required"]) == {"decision", "your_name"}
    assert form["schema"]["properties"]["decision"]["enum"] == [
        "mark them crashed",
        "leave them alone",
    ]
    [advice, saw, silent_ones, circumstances, command] = form["description"].split("\n\n")
    assert advice.startswith("**See whether they live before you answer")
    assert saw.startswith("12 of 12 workers look dead since ")
    assert saw.endswith("12 runs are not marked.")
    assert silent_ones.startswith("Silent: `worker-0`, `worker-1`, `worker-10`, ")
    assert silent_ones.endswith(" and 2 more.")
    assert circumstances.startswith("The server has been up since ")
    assert f"`orphan-recovery approve {hold['hold_id']} --target default`" in command

    for bad in (
        None,
        {},
        {"decision": "mark them crashed"},
        {"your_name": "Ada L."},
        {**YES, "your_name": ""},
        {**YES, "your_name": " \t"},
        {**YES, "your_name": "Ada\x00L."},
        {**YES, "your_name": "A" * 201},
        {**YES, "note": "the rack\x00"},
        {**YES, "decision": "certainly"},
        {**YES, "decision": True},
        {**YES, "for_minutes": 0},
        {**YES, "for_minutes": 20_000},
    ):
        assert resume(api, held, bad)["status"] == "REJECT", bad
    assert api.flow_run(held["id"])["state_name"] == "Held"
    assert approvals(fleet, hold) == []

    answer = {**YES, "for_minutes": 15, "note": "rack on fire"}
    assert resume(api, held, answer)["status"] == "ACCEPT"
    ended = api.await_state(held["id"], *ENDS)
    assert ended["state_type"] == "COMPLETED"
    assert "12 orphaned runs detected: 12 marked crashed" in ended["state"]["message"]
    assert {fleet.status(run) for run in silent} == {"crashed"}
    assert set(marks(api.task_runs(held["id"]))) == set(silent)
    answered = f"hold {hold['hold_id']} was released by Ada L."
    until(lambda: answered in str(api.logs(held["id"])), "the log's word")
    assert str(api.logs(held["id"])).count("Suspending flow run") == 1
    [approval] = approvals(fleet, hold)
    assert approval["approved_by"] == "Ada L., in Prefect's UI"
    assert approval["note"] == "rack on fire"
    for_seconds = (approval["expires_at"] - approval["approved_at"]).total_seconds()
    assert 14 * 60 < for_seconds < 15 * 60, "it counts from when it was given"
    last = fleet.sweeps()[-1]
    assert (last["ended_as"], last["marked"]) == ("completed", 12)
    assert held["id"] in last["asked_by"]

    path = f"/flow_runs/{held['id']}/input/{keys['response']}"
    assert api.call("GET", path).status_code == 404, "it is heeded once"
    again = retry(api, held)
    assert again["state_type"] == "COMPLETED"
    assert again["state"]["message"].startswith("no orphaned run found")
    assert approvals(fleet, hold) == [approval]


def test_one_flow_run_asks_about_a_hold_and_later_ones_point_to_it(
    api: Api, fleet: Database
) -> None:
    """At most one sweep at once: a held one is none. A question is asked, and told of, once."""
    silent = in_flight(fleet)
    first = start_held(api)
    hold = open_hold(fleet)
    for number in (20, 21, 22):
        fleet.add_run(f"live-{number}", worker=f"worker-{number}", age="1 minute")
    outside = fleet.add_run("of somebody else", worker="worker-23")
    second = api.await_state(api.start("scheduled").json()["id"], "PAUSED", *ENDS)
    assert (second["state_type"], second["state_name"]) == ("FAILED", "Held")
    assert str(hold["hold_id"]) in second["state"]["message"]
    assert second["state"]["message"].endswith(f"flow run {first['name']} waits for the answer")
    assert fleet.status(outside) == "crashed", "it does what it may all the same"
    assert open_hold(fleet) == hold
    assert not [e for e in events(api, "orphan-recovery.held") if about(e, second)]

    assert resume(api, first, YES)["status"] == "ACCEPT"
    api.await_state(first["id"], *ENDS)
    assert [a["approved_by"] for a in approvals(fleet, hold)] == ["Ada L., in Prefect's UI"]
    assert {fleet.status(run) for run in silent} == {"crashed"}

    api.await_state(api.start("scheduled").json()["id"], "COMPLETED")
    ended = fleet.one(
        "SELECT ended_as FROM orphan_recovery.holds WHERE hold_id = %s", hold["hold_id"]
    )
    assert ended == "released"
    assert api.flow_run(first["id"])["state_type"] == "COMPLETED", "there is nothing to withdraw"


def test_a_question_that_somebody_cancelled_is_asked_anew(api: Api, fleet: Database) -> None:
    first = start_held(api)
    path = f"/flow_runs/{first['id']}/set_state"
    api.call("POST", path, {"state": {"type": "CANCELLED"}, "force": True}).raise_for_status()
    again = retry(api, first)  # nobody has answered it, and it can ask but once
    assert (again["state_type"], again["state_name"]) == ("FAILED", "Held")
    assert again["state"]["message"].startswith("HELD: 12 of 12 workers look dead")
    second = start_held(api)
    assert (second["state_type"], second["state_name"]) == ("PAUSED", "Held")
    until(partial(is_told, api, "orphan-recovery.held", second), "the event")
    assert approvals(fleet, open_hold(fleet)) == []


def test_an_answer_whose_flow_run_prefect_cancels_is_heeded_by_the_next_sweep(
    api: Api, fleet: Database
) -> None:
    """At most one sweep of the deployment runs at once: a second one is cancelled, also if it is
    one that a person has just resumed."""
    silent = in_flight(fleet)
    held = start_held(api)
    hold = open_hold(fleet)
    with fleet.connect() as blocker:  # another sweep that takes a while
        blocker.execute("LOCK TABLE orphan_recovery.sweeps IN ACCESS EXCLUSIVE MODE")
        other = api.start("scheduled").json()
        api.await_state(other["id"], "RUNNING")
        assert resume(api, held, YES)["status"] == "ACCEPT"
        ended = api.await_state(held["id"], *ENDS)
        assert ended["state_type"] == "CANCELLED"
        blocker.rollback()
    api.await_state(other["id"], *ENDS)
    [approval] = approvals(fleet, hold)
    assert approval["approved_by"] == "Ada L., in Prefect's UI"
    assert {fleet.status(run) for run in silent} == {"crashed"}
    api.await_state(api.start("scheduled").json()["id"], "COMPLETED")
    assert approvals(fleet, hold) == [approval], "it is heeded once"


def test_an_answer_whose_flow_run_was_killed_is_heeded_by_the_next_sweep(
    api: Api, fleet: Database
) -> None:
    silent = in_flight(fleet)
    held = start_held(api)
    hold = open_hold(fleet)
    with fleet.connect() as blocker:  # so that it can be killed before it has heeded it
        blocker.execute("LOCK TABLE orphan_recovery.holds IN ACCESS EXCLUSIVE MODE")
        assert resume(api, held, YES)["status"] == "ACCEPT"
        fleet.await_lock_wait()
        os.kill(pid_of(api.flow_run(held["id"])), signal.SIGKILL)
        assert api.await_state(held["id"], *ENDS)["state_type"] == "CRASHED"
        blocker.rollback()
    assert approvals(fleet, hold) == []
    next_one = api.await_state(api.start("scheduled").json()["id"], "PAUSED", *ENDS)
    assert next_one["state_type"] == "COMPLETED"
    assert [a["approved_by"] for a in approvals(fleet, hold)] == ["Ada L., in Prefect's UI"]
    assert {fleet.status(run) for run in silent} == {"crashed"}


async def heeded(api: Api, engine: AsyncEngine, given: Given) -> Heeded:
    """What an answer comes to in a flow run, which is not the one that asked."""

    @flow
    async def heeds() -> Heeded:
        return await heed(engine, "default", given)

    async with api.used():
        return await heeds()


async def held_by_a_direct_call(api: Api, db: Database) -> dict[str, Any]:
    add_fleet(db)
    await sweep(api)
    return open_hold(db)


def given(hold_id: UUID | None, ago: timedelta) -> Given:
    """An answer of so long ago, for an hour."""
    return Given(Answer.model_validate(YES), datetime.now(UTC) - ago, uuid4(), hold_id)


async def test_an_answer_counts_from_when_it_was_given_and_once(
    api: Api, db: Database, prefect: str, engine: AsyncEngine
) -> None:
    """By Prefect's clock, where that makes it shorter; a pool may be down for days."""
    hold = await held_by_a_direct_call(api, db)
    told, is_released, _ = await heeded(api, engine, given(hold["hold_id"], timedelta(days=3)))
    assert (is_released, approvals(db, hold)) == (False, [])
    assert "was for 1 h and has expired before a sweep could heed it" in told
    assert f"`orphan-recovery approve {hold['hold_id']} --target default`" in told

    answer = given(hold["hold_id"], timedelta(minutes=40))
    for _ in range(2):
        assert (await heeded(api, engine, answer)).is_released
    [approval] = approvals(db, hold)
    lasts = approval["expires_at"] - approval["approved_at"]
    assert timedelta(minutes=19) < lasts <= timedelta(minutes=20)

    ahead = given(hold["hold_id"], -timedelta(days=1))
    assert (await heeded(api, engine, ahead)).is_released
    [_, approval] = approvals(db, hold)
    assert approval["expires_at"] - approval["approved_at"] <= timedelta(hours=1)

    told, is_released, is_left = await heeded(api, engine, given(None, timedelta()))
    assert (is_released, is_left) == (False, False)
    assert "this flow run has lost the tag that names its hold" in told


async def test_an_answer_outlasts_a_lost_connection(
    api: Api, db: Database, prefect: str, engine: AsyncEngine
) -> None:
    hold = await held_by_a_direct_call(api, db)
    with db.connect() as blocker:
        blocker.execute("LOCK TABLE orphan_recovery.approvals IN ACCESS EXCLUSIVE MODE")
        heeding = asyncio.create_task(heeded(api, engine, given(hold["hold_id"], timedelta())))
        await asyncio.to_thread(db.await_lock_wait)
        db.do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        blocker.rollback()
    assert (await heeding).is_released
    assert len(approvals(db, hold)) == 1


def test_a_pipeline_hears_of_a_hold_and_a_person_who_does_not_approve_leaves_all_as_it_is(
    api: Api, client: dict[str, str], fleet: Database
) -> None:
    silent = in_flight(fleet)
    done = run("orphan-recovery", "trigger", "--wait", **client)
    assert done.returncode == 3
    assert "Held: HELD: 12 of 12 workers look dead" in done.stdout
    assert "the sweep is held, and waits for a person" in done.stderr
    found = re.search(r"runs/flow-run/([0-9a-f-]{36})$", done.stdout, re.M)
    assert found, done.stdout
    held, hold = api.flow_run(found[1]), open_hold(fleet)
    assert f"\norphan-recovery approve {hold['hold_id']} --target default\n" in done.stderr
    printed = (Path(client["PREFECT_HOME"]) / "worker.log").read_text()
    by = f"target='default' sweep_id='{hold['sweep_id']}' hold_id='{hold['hold_id']}'"
    assert f"orphan_recovery - orphan_recovery_held {by}" in printed, "not its name alone"
    swept = len(fleet.sweeps())
    assert resume(api, held, {**YES, "decision": "leave them alone"})["status"] == "ACCEPT"
    ended = api.await_state(held["id"], *ENDS)
    assert ended["state_type"] == "COMPLETED"
    assert ended["state"]["message"] == (
        f"hold {hold['hold_id']} stands: Ada L. left its runs alone, so nobody is asked again; "
        f"`orphan-recovery approve {hold['hold_id']} --target default` releases it still"
    )
    assert (in_flight(fleet), approvals(fleet, hold)) == (silent, [])
    assert open_hold(fleet) == hold
    assert len(fleet.sweeps()) == swept


def test_of_all_targets_each_that_is_held_has_a_command_that_releases_it() -> None:
    one, two = uuid4(), uuid4()
    seen = "12 of 12 workers look dead since 2026-11-27T03:00:00Z (w1, w2), 12 orphaned runs not"
    message = (
        f"2 of 3 targets HELD (default, dj_2). default: HELD: {seen} marked (hold {one}); no other "
        f"orphaned run found; uu: no orphaned run found; dj_2: HELD: {seen} marked (hold {two}); no"
    )
    assert releases(message) == [
        f"orphan-recovery approve {one} --target default",
        f"orphan-recovery approve {two} --target dj_2",
    ]
    assert releases(f"HELD: {seen} marked (hold {one}); no") == releases(message)[:1]


@pytest.mark.parametrize("delivered", [True, False], ids=["delivered", "cancelled by Prefect"])
def test_a_hold_that_a_person_left_alone_is_not_asked_about_again(
    api: Api, fleet: Database, client: dict[str, str], delivered: bool
) -> None:
    silent = in_flight(fleet)
    held = start_held(api)
    hold = open_hold(fleet)
    answer = {**YES, "decision": "leave them alone", "note": "the switch is being replaced"}
    with fleet.connect() as blocker:
        if not delivered:  # another sweep of the deployment is at work at that moment
            blocker.execute("LOCK TABLE orphan_recovery.sweeps IN ACCESS EXCLUSIVE MODE")
            api.await_state(api.start("scheduled").json()["id"], "RUNNING")
        assert resume(api, held, answer)["status"] == "ACCEPT"
        ended = api.await_state(held["id"], *ENDS)
        assert ended["state_type"] == ("COMPLETED" if delivered else "CANCELLED")
        blocker.rollback()
    for _ in range(2):  # what the first finds, it leaves for the next
        until(lambda: no_sweep_runs(api), "the end of the other sweep")
        later = api.await_state(api.start("scheduled").json()["id"], "PAUSED", *ENDS)
        assert (later["state_type"], later["state_name"]) == ("FAILED", "Held")
        assert later["state"]["message"].endswith(
            "; Ada L. left its runs alone (the switch is being replaced), so nobody is asked "
            f"again; `orphan-recovery approve {hold['hold_id']} --target default` releases it still"
        )
        assert not [e for e in events(api, "orphan-recovery.held") if about(e, later)]
    assert (in_flight(fleet), approvals(fleet, hold)) == (silent, [])

    approving = ("orphan-recovery", "approve", str(hold["hold_id"]))
    here = {**client, "ORPHAN_RECOVERY_DATABASE_URL": fleet.url}
    assert run(*approving, **here).returncode == 0
    api.await_state(api.start("scheduled").json()["id"], "COMPLETED")
    assert {fleet.status(run) for run in silent} == {"crashed"}


def no_sweep_runs(api: Api) -> bool:
    at_work = {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}
    return not api.find("flow_runs", flow_runs=at_work)


def test_an_approval_after_the_fleet_came_back_releases_nothing_and_says_so(
    api: Api, fleet: Database, client: dict[str, str]
) -> None:
    silent = in_flight(fleet)
    held = start_held(api)
    hold = open_hold(fleet)
    come_back(fleet)
    done = run("orphan-recovery", "sweep", **client, ORPHAN_RECOVERY_DATABASE_URL=fleet.url)
    assert done.returncode == 0
    assert resume(api, held, YES)["status"] == "ACCEPT"
    ended = api.await_state(held["id"], *ENDS)
    assert ended["state_type"] == "COMPLETED"
    assert ended["state"]["message"] == (
        "no orphaned run found (threshold 30 minutes, 12 in flight); no answer was needed: "
        f"hold {hold['hold_id']} has ended: its fleet has recovered"
    )
    assert (in_flight(fleet), approvals(fleet, hold)) == (silent, [])
    assert held["id"] in fleet.sweeps()[-1]["asked_by"], "and it is a sweep"


@pytest.mark.parametrize("ending", ["released on the command line", "ended outside of Prefect"])
def test_a_question_about_a_hold_that_has_ended_is_withdrawn_by_the_next_sweep(
    api: Api, fleet: Database, client: dict[str, str], ending: str
) -> None:
    """Else it would stand there for days, answered or not."""
    silent = in_flight(fleet)
    held = start_held(api)
    hold = open_hold(fleet)
    here = {**client, "ORPHAN_RECOVERY_DATABASE_URL": fleet.url}
    if ending == "released on the command line":
        approving = ("orphan-recovery", "approve", str(hold["hold_id"]))
        assert run(*approving, **here).returncode == 0
        marking = api.await_state(api.start("scheduled").json()["id"], "COMPLETED")
        assert {fleet.status(run) for run in silent} == {"crashed"}
        until(lambda: "Finished in state" in str(api.logs(marking["id"])), "the end of its log")
        assert "not withdrawn" not in str(api.logs(marking["id"]))
        assert api.flow_run(held["id"])["state_name"] == "Held", "its hold may stand for more"
        how = "a person released it and its runs were marked"
    else:
        come_back(fleet)
        assert run("orphan-recovery", "sweep", **here).returncode == 0
        how = "its fleet has recovered"
    looking = api.start("scheduled", dry_run=True).json()
    api.await_state(looking["id"], "COMPLETED")
    assert api.flow_run(held["id"])["state_name"] == "Held", "a dry run writes nothing"

    sweeping = api.await_state(api.start("scheduled").json()["id"], *ENDS)
    assert sweeping["state_type"] == "COMPLETED"
    withdrawn = api.flow_run(held["id"])
    assert withdrawn["state_type"] == "CANCELLED"
    assert withdrawn["state"]["message"] == (
        f"no answer is needed any more: hold {hold['hold_id']} has ended: {how}"
    )
    told = f"flow run {held['name']} is cancelled: no answer is needed any more"
    until(lambda: any(told in line for line in api.logs(sweeping["id"])), "the log's word")
    assert resume(api, held, YES)["status"] == "ABORT"


async def test_a_sweep_that_cannot_withdraw_a_question_ends_well_all_the_same(
    api: Api, db: Database, prefect: str
) -> None:
    [orphan] = db.add_orphans(1)
    db.do("ALTER TABLE orphan_recovery.holds RENAME COLUMN ended_as TO ended_otherwise")
    state = await sweep(api)
    assert state.is_completed()
    assert db.status(orphan) == "crashed"
    told = "questions about ended holds were not withdrawn: UndefinedColumn: "
    until(lambda: any(told in line for line in api.logs(flow_run_of(state))), "the log's word")


async def test_a_flow_run_that_nobody_can_resume_fails_by_the_name_of_held(
    api: Api, db: Database, prefect: str
) -> None:
    """One without a deployment: a direct call."""
    add_fleet(db)
    state = await sweep(api)
    recorded = api.flow_run(flow_run_of(state))
    assert (recorded["state_type"], recorded["state_name"]) == ("FAILED", "Held")
    hold = open_hold(db)
    assert recorded["state"]["message"].startswith("HELD: 12 of 12 workers look dead")
    assert str(hold["hold_id"]) in recorded["state"]["message"]
    until(partial(is_told, api, "orphan-recovery.held", recorded), "the event")
    async with api.used():
        with pytest.raises(SweepFailed, match="HELD: 12 of 12 workers") as caught:
            await recover_orphaned_runs()
    assert caught.value.report["hold"] == str(hold["hold_id"])
    assert len(in_flight(db)) == 12


async def test_the_flow_looks_twice_before_it_asks_anybody(
    api: Api, db: Database, prefect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_TARGETS__DEFAULT__HEARTBEAT_SECONDS", "2")
    add_fleet(db)
    db.do("UPDATE worker_runs SET heartbeat_at = created_at")
    sweeping = asyncio.create_task(sweep(api))
    await asyncio.to_thread(until, lambda: bool(db.sweeps()), "its first look")
    alive = "UPDATE worker_runs SET heartbeat_at = now() WHERE id <> 'run-0-07'"
    await asyncio.to_thread(db.do, alive)
    state = await sweeping
    assert state.is_completed()
    assert "1 orphaned run detected: 1 marked crashed" in (state.message or "")
    assert "look-again" in api.task_runs(flow_run_of(state))
    [told] = db.sweeps()
    assert "12 of 12 workers look dead" in told["looked_twice"]
    assert db.do("SELECT * FROM orphan_recovery.holds") == []
    assert db.status("run-0-07") == "crashed"


async def test_a_sweep_within_another_flow_run_fails_by_the_name_of_held(
    api: Api, db: Database, prefect: str
) -> None:
    add_fleet(db)
    async with api.used():
        state = await recover_all_targets(return_state=True)
    parent = api.flow_run(flow_run_of(state))
    assert (parent["state_type"], parent["state_name"]) == ("FAILED", "Held")
    assert "1 of 1 target HELD (default)" in parent["state"]["message"]
    assert "default: HELD: 12 of 12 workers look dead" in parent["state"]["message"]
    [child] = api.find("flow_runs", flow_runs={"parent_flow_run_id": {"any_": [parent["id"]]}})
    assert (child["state_type"], child["state_name"]) == ("FAILED", "Held")
    assert child["state"]["message"].startswith("HELD: 12 of 12 workers look dead")
    assert len(in_flight(db)) == 12
    until(partial(is_told, api, "orphan-recovery.held", child), "the event")


async def test_a_flow_run_that_failed_beside_a_hold_names_the_hold(
    api: Api, db: Database, prefect: str
) -> None:
    """That a run could not be marked is the worse news, and nobody is asked then."""
    for number in range(12):
        db.add_run(f"silent-{number}", worker=f"worker-{number}")
    live = [db.add_run(f"live-{n}", worker=f"live-{n}", age="1 minute") for n in range(10)]
    await sweep(api)
    hold = open_hold(db)
    db.do(
        "UPDATE worker_runs SET created_at = now() - interval '1 hour', started_at = NULL"
        " WHERE id = %s",
        live[0],
    )
    db.poison(live[0])
    state = await sweep(api)
    recorded = api.flow_run(flow_run_of(state))
    assert (recorded["state_type"], recorded["state_name"]) == ("FAILED", "Failed")
    assert "1 FAILED" in recorded["state"]["message"]
    assert str(hold["hold_id"]) in recorded["state"]["message"]
