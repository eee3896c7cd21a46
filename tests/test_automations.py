"""The alarms of deployments/automation.yaml, created on a real server, which is seen to act."""

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]
from prefect import flow

import orphan_recovery.flow
from orphan_recovery.names import FLOW_NAME
from prefect_support import ROOT, Api, client_of, deploy, flow_run_of, run, sweep, working
from support import Database, until

FILE = ROOT / "deployments" / "automation.yaml"
SILENT = "orphan-recovery has not succeeded for 15 minutes"
FAILED = "orphan-recovery failed"
HELD = "orphan-recovery is held"
DIED = "orphan-recovery died in mid-sweep"
CONTROL = "the same alarm about a flow that never runs"
HEARTBEAT = "prefect.flow-run.heartbeat"
BY_HEARTBEAT = "the same as that about a death, by Prefect's own heartbeat alone"


def written() -> dict[str, dict[str, Any]]:
    """The automations of the file by name."""
    return {one["name"]: one for one in yaml.safe_load(FILE.read_text())["automations"]}


@pytest.fixture(scope="module")
def api(prefect_api: str) -> Iterator[Api]:
    """A server without automations and deployments, at first."""
    api = Api(prefect_api)
    api.forget_deployments()
    yield api
    api.forget_deployments()
    for automation in api.find("automations"):
        api.call("DELETE", f"/automations/{automation['id']}").raise_for_status()


@pytest.fixture(scope="module")
def as_written(api: Api, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The automations, created by the command in the file's head."""
    client = client_of(api.url, tmp_path_factory.mktemp("client"))
    done = run("prefect", "automation", "create", "--from-file", str(FILE), **client)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def impatient(api: Api) -> None:
    """The alarms about silence once more, after ten seconds: the least that Prefect allows."""
    for name, automation in written().items():
        if name in (SILENT, DIED):
            automation["trigger"]["within"] = 10
            api.call("POST", "/automations/", automation).raise_for_status()
    control = written()[SILENT]
    control["name"] = CONTROL
    control["trigger"]["within"] = 10
    control["trigger"]["match_related"][0]["prefect.resource.name"] = "a flow that never runs"
    api.call("POST", "/automations/", control).raise_for_status()
    by_heartbeat = written()[DIED]
    by_heartbeat["name"] = BY_HEARTBEAT
    by_heartbeat["trigger"] |= {"within": 10, "after": [HEARTBEAT], "expect": [HEARTBEAT]}
    api.call("POST", "/automations/", by_heartbeat).raise_for_status()


def test_every_key_of_the_file_takes_effect(api: Api, as_written: None) -> None:
    created = {one["name"]: one for one in api.find("automations")}
    for name, asked in written().items():
        told = created[name]
        assert told["enabled"] is True
        for key in ("expect", "after", "for_each"):
            told["trigger"][key].sort()
            if key in asked["trigger"]:
                asked["trigger"][key].sort()
        assert told["trigger"] | asked.pop("trigger") == told["trigger"]
        for action, told_action in zip(asked.pop("actions"), told["actions"], strict=True):
            assert told_action | action == told_action
        assert told | asked == told


async def test_a_failed_sweep_raises_the_alarm_and_another_flow_does_not(
    db: Database, prefect: str, api: Api, as_written: None
) -> None:
    async with api.used():
        other = await somebody_elses(return_state=True)
    assert other.is_failed()
    [poisoned] = db.add_orphans(1)
    db.poison(poisoned)
    messages: dict[str, str | None] = {}
    for _ in range(5):  # a server on its small default database may lose an event, or repeat it
        state = await sweep(api)
        assert state.is_failed()
        messages[f"prefect.flow-run.{flow_run_of(state)}"] = state.message
        if await asyncio.to_thread(goes_off, api, FAILED, seconds=15):
            break
    assert alarms(api, FAILED)
    for alarm in alarms(api, FAILED):
        about = alarm["payload"]["triggering_event"]["resource"]
        assert about["prefect.state-message"] == messages[about["prefect.resource.id"]]
    assert alarms(api, DIED) == []


async def test_a_hold_raises_its_alarm_and_not_that_of_a_failure(
    db: Database, prefect: str, api: Api, as_written: None
) -> None:
    for number in range(12):
        db.add_run(f"silent-{number}", worker=f"worker-{number}")
    for _ in range(5):  # as above
        db.do(
            "UPDATE orphan_recovery.holds SET ended_at = now(), ended_as = 'recovered'"
            " WHERE ended_at IS NULL"
        )
        assert (await sweep(api)).name == "Held"
        if await asyncio.to_thread(goes_off, api, HELD, seconds=15):
            break
    [alarm, *_] = alarms(api, HELD)
    told = alarm["payload"]["triggering_event"]
    assert told["resource"]["prefect.resource.name"] == "default"
    assert (told["payload"]["runs"], told["payload"]["silent_workers"]) == (12, 12)
    for alarm in alarms(api, FAILED):
        about = alarm["payload"]["triggering_event"]["resource"]
        assert about["prefect.state-name"] != "Held"


@flow(name="somebody-elses")
async def somebody_elses() -> None:
    raise RuntimeError("none of our business")


def test_silence_is_noticed_and_completed_scheduled_sweeps_are_not_silence(
    api: Api, as_written: None, impatient: None
) -> None:
    deployment = deployed_by_hand(api)
    died = started(api, deployment)  # and never heard of again

    def control_went_off() -> bool:
        set_state(api, started(api, deployment), "COMPLETED")
        time.sleep(1)  # as often as that, and no more: the server's own database is a small one
        return bool(alarms(api, CONTROL))

    until(control_went_off, "the alarm about silence")
    assert alarms(api, SILENT) == []

    ended = api.await_state(died["id"], "CRASHED")
    assert ended["state"]["message"].startswith("Not heard of for 10 minutes")


def test_a_death_is_told_once_by_the_alarm_about_failures(
    api: Api, as_written: None, impatient: None
) -> None:
    """The others only show it."""
    deployment = deployed_by_hand(api)
    for _ in range(5):  # as above
        died = started(api, deployment)
        api.await_state(died["id"], "CRASHED")
        if goes_off(api, FAILED, seconds=15, about=died):
            break
    assert len(alarms(api, FAILED, about=died)) == 1
    calling = [
        name for name, one in written().items() if one["actions"] == [{"type": "do-nothing"}]
    ]
    assert calling == [SILENT, FAILED, HELD]


def test_the_end_of_a_sweep_is_heard_although_its_heartbeat_comes_after_it(
    api: Api, impatient: None
) -> None:
    deployment = deployed_by_hand(api)
    for _ in range(5):  # as above
        ended = started(api, deployment)
        set_state(api, ended, "COMPLETED")
        beat(api, ended)
        if not goes_off(api, BY_HEARTBEAT, seconds=30, about=ended):
            continue
        time.sleep(5)
        if not alarms(api, DIED, about=ended):
            break
    assert alarms(api, BY_HEARTBEAT, about=ended)
    assert not alarms(api, DIED, about=ended)


async def test_only_what_is_running_still_is_taken_for_dead_whatever_became_of_the_events(
    db: Database, prefect: str, api: Api, as_written: None, impatient: None
) -> None:
    """Not a short sweep that has ended, nor one that waits for a person: of that one, Prefect
    would show a death if it were asked to."""
    db.add_orphans(2)
    state = await sweep(api)
    assert state.is_completed()
    ended = api.flow_run(flow_run_of(state))
    deployment = deployed_by_hand(api)
    held, died = started(api, deployment), started(api, deployment)
    set_state(api, held, "PAUSED", name="Held")
    for _ in range(5):  # as above
        silent = [one for one in (ended, held, died) if not alarms(api, BY_HEARTBEAT, about=one)]
        for one in silent:
            beat(api, one)
        for one in silent:
            await asyncio.to_thread(goes_off, api, BY_HEARTBEAT, seconds=30, about=one)
    for one in (ended, held, died):
        assert alarms(api, BY_HEARTBEAT, about=one)
    await asyncio.to_thread(api.await_state, died["id"], "CRASHED")
    await asyncio.sleep(5)
    assert api.flow_run(ended["id"])["state_type"] == "COMPLETED"
    assert api.flow_run(held["id"])["state_name"] == "Held"
    assert alarms(api, FAILED, about=ended) == alarms(api, FAILED, about=held) == []


async def test_a_sweep_that_is_long_at_work_beats_and_is_not_taken_for_dead(
    db: Database,
    prefect: str,
    api: Api,
    as_written: None,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orphan_recovery.flow, "BEAT_SECONDS", 2)
    [orphan] = db.add_orphans(1)
    with db.connect() as blocker:
        blocker.execute("LOCK TABLE orphan_recovery.sweeps IN ACCESS EXCLUSIVE MODE")
        sweeping = asyncio.create_task(sweep(api))
        await asyncio.to_thread(db.await_lock_wait)
        other = started(api, deployed_by_hand(api))  # begun later
        await asyncio.to_thread(api.await_state, other["id"], "CRASHED")
        blocker.rollback()
    state = await sweeping
    assert state.is_completed()
    assert db.status(orphan) == "crashed"
    assert not alarms(api, DIED, about=api.flow_run(flow_run_of(state)))


def test_a_sweep_that_is_killed_with_its_worker_is_shown_as_crashed_and_short_ones_are_not(
    db: Database, api: Api, as_written: None, impatient: None, tmp_path: Path
) -> None:
    client = client_of(api.url, tmp_path)
    deploy(client, scheduled=False)
    with working(client, tmp_path / "worker.log") as worker:
        short = [start(api, "COMPLETED") for _ in range(3)]
        with db.connect() as blocker:
            blocker.execute("LOCK TABLE orphan_recovery.sweeps IN ACCESS EXCLUSIVE MODE")
            killed = start(api, "RUNNING")
            db.await_lock_wait()
            worker.kill()
            os.kill(int(str(killed["infrastructure_pid"]).rpartition(":")[2]), signal.SIGKILL)
            ended = api.await_state(killed["id"], "CRASHED")
    assert ended["state"]["message"].startswith("Not heard of for 10 minutes")
    for one in short:
        assert api.flow_run(one["id"])["state_type"] == "COMPLETED"
        assert not alarms(api, FAILED, about=one)


def start(api: Api, kind: str) -> dict[str, Any]:
    """A sweep that the worker executes, once it is in this type of state."""
    return api.await_state(api.start("scheduled").raise_for_status().json()["id"], kind)


def goes_off(api: Api, name: str, *, seconds: float, about: dict[str, Any] | None = None) -> bool:
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at and not alarms(api, name, about=about):
        time.sleep(0.2)
    return bool(alarms(api, name, about=about))


def alarms(api: Api, name: str, *, about: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The times that an automation of this name went off; about this flow run, if one is given."""
    body = {"filter": {"event": {"name": ["prefect.automation.triggered"]}}, "limit": 50}
    answer = api.call("POST", "/events/filter", body).raise_for_status()
    events: list[dict[str, Any]] = answer.json()["events"]
    return [
        event
        for event in events
        if event["resource"]["prefect.resource.name"] == name
        and (about is None or about["id"] in str(event["payload"]))
    ]


def deployed_by_hand(api: Api) -> dict[str, Any]:
    flow_id = api.call("POST", "/flows/", {"name": FLOW_NAME}).raise_for_status().json()["id"]
    body = {"name": "scheduled", "flow_id": flow_id}
    made: dict[str, Any] = api.call("POST", "/deployments/", body).raise_for_status().json()
    return made


def started(api: Api, deployment: dict[str, Any]) -> dict[str, Any]:
    path = f"/deployments/{deployment['id']}/create_flow_run"
    made: dict[str, Any] = api.call("POST", path, {}).raise_for_status().json()
    set_state(api, made, "RUNNING")
    return made


def set_state(api: Api, flow_run: dict[str, Any], kind: str, **more: str) -> None:
    body = {"state": {"type": kind, **more}, "force": True}
    api.call("POST", f"/flow_runs/{flow_run['id']}/set_state", body).raise_for_status()


def beat(api: Api, flow_run: dict[str, Any]) -> None:
    """What Prefect emits while a flow run's process lives, from its beginning on."""
    related = {
        "prefect.resource.id": f"prefect.flow.{flow_run['flow_id']}",
        "prefect.resource.role": "flow",
        "prefect.resource.name": FLOW_NAME,
    }
    event = {
        "id": str(uuid.uuid4()),
        "event": HEARTBEAT,
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{flow_run['id']}"},
        "related": [related],
        "payload": {},
    }
    answer = api.call("POST", "/events", [event])
    answer.raise_for_status()
