"""prefect.yaml, deployed to a real server and read back: each key of it takes effect.

Prefect ignores keys it does not know, so the file alone proves nothing.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]

from prefect_support import ROOT, Api, client_of, deploy
from support import until


@pytest.fixture(scope="module")
def client(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return client_of(prefect_api, tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def api(prefect_api: str, client: dict[str, str]) -> Iterator[Api]:
    """A server to which the deployments were deployed."""
    api = Api(prefect_api)
    api.forget_deployments()
    deploy(client)
    yield api
    api.forget_deployments()


def written() -> dict[str, dict[str, Any]]:
    """The deployments of prefect.yaml by name."""
    file = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    return {deployment["name"]: deployment for deployment in file["deployments"]}


@pytest.mark.parametrize("name", ["scheduled", "on-demand", "all-targets"])
def test_every_key_of_a_deployment_takes_effect(api: Api, name: str) -> None:
    asked, told = dict(written()[name]), api.deployment(name)
    assert told["name"] == asked.pop("name")
    assert told["entrypoint"] == asked.pop("entrypoint")
    assert told["tags"] == asked.pop("tags")
    assert {"name": told["work_pool_name"]} == asked.pop("work_pool")
    told_schedules = told["schedules"]
    for schedule in asked.pop("schedules", []):
        told_schedule = told_schedules.pop()
        assert told_schedule["schedule"]["interval"] == schedule.pop("interval")
        anchor = datetime.fromisoformat(told_schedule["schedule"]["anchor_date"])
        assert anchor == datetime.fromisoformat(schedule.pop("anchor_date"))
        assert told_schedule["slug"] == schedule.pop("slug")
        assert schedule == {}
    assert told_schedules == []
    if limit := asked.pop("concurrency_limit", None):
        assert told["global_concurrency_limit"]["limit"] == limit.pop("limit")
        options = told["concurrency_options"]
        assert options["collision_strategy"] == limit.pop("collision_strategy")
        assert limit == {}
    assert told["pull_steps"] == []  # the package is installed: nothing is pulled
    assert asked == {}, "a key that this test does not know; see that it takes effect"


def test_a_sweep_is_due_every_five_minutes(api: Api) -> None:
    scheduled = api.deployment("scheduled")
    [schedule] = scheduled["schedules"]
    assert (scheduled["paused"], schedule["active"]) == (False, True)
    first, second = await_due(api)[:2]
    assert second - first == timedelta(minutes=5)


def test_on_demand_runs_only_when_asked(api: Api) -> None:
    on_demand = api.deployment("on-demand")
    assert on_demand["schedules"] == []
    assert on_demand["global_concurrency_limit"] is None  # a pipeline's sweep is never cancelled


def test_deploying_again_changes_nothing(api: Api, client: dict[str, str]) -> None:
    """Neither an id, nor when sweeps are due, nor that a person paused the schedule.

    An interval that starts anew with each deploy would put the next sweep off each time, for
    ever where deploys come more often than sweeps.
    """
    scheduled = api.deployment("scheduled")
    [schedule] = scheduled["schedules"]
    path = f"/deployments/{scheduled['id']}/schedules/{schedule['id']}"
    api.call("PATCH", path, {"active": False}).raise_for_status()
    before = {name: api.deployment(name) for name in written()}
    deploy(client)
    after = {name: api.deployment(name) for name in written()}
    for deployment in (*before.values(), *after.values()):
        for changing in ("updated", "last_polled", "status"):
            del deployment[changing]
        for one in deployment["schedules"]:
            del one["updated"]
    assert after == before
    api.call("PATCH", path, {"active": True}).raise_for_status()


@pytest.mark.parametrize("name", ["scheduled", "on-demand"])
def test_the_form_tells_each_parameter_and_its_limits(api: Api, name: str) -> None:
    parameters = api.deployment(name)["parameter_openapi_schema"]["properties"]
    assert set(parameters) == {
        "target",
        "threshold_minutes",
        "dry_run",
        "tenant",
        "worker",
        "limit",
        "reason",
        "task_each_up_to",
    }
    for about in parameters.values():
        assert about["description"].endswith(".")
    threshold = parameters["threshold_minutes"]
    number = {"type": "integer", "minimum": 1, "maximum": 5_256_000}
    assert threshold["anyOf"] == [number, {"type": "null"}]
    assert "Minutes of silence that make a run an orphan" in threshold["description"]
    assert api.deployment(name)["enforce_parameter_schema"] is True


@pytest.mark.parametrize(
    "bad",
    [
        {"threshold_minutes": 0},
        {"threshold_minutes": "abc"},
        {"target": ""},
        {"tenant": ""},
        {"worker": ""},
        {"limit": 0},
        {"reason": ""},
    ],
    ids=str,
)
def test_the_server_refuses_what_cannot_be_meant(api: Api, bad: dict[str, Any]) -> None:
    answer = api.start("on-demand", **bad)
    assert 400 <= answer.status_code < 500, answer.text
    assert next(iter(bad)) in answer.text
    on_demand = {"deployments": {"id": {"any_": [api.deployment("on-demand")["id"]]}}}
    assert api.find("flow_runs", **on_demand) == []


def await_due(api: Api) -> list[datetime]:
    """When the next sweeps are due, once the server's scheduler has planned them."""
    mine = {
        "deployments": {"id": {"any_": [api.deployment("scheduled")["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "sort": "EXPECTED_START_TIME_ASC",
    }
    until(lambda: len(api.find("flow_runs", **mine)) >= 2, "sweeps that are due")
    return [datetime.fromisoformat(r["expected_start_time"]) for r in api.find("flow_runs", **mine)]
