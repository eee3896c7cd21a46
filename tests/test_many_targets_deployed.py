"""Many targets, deployed and served: a schedule for each, and what a pipeline triggers."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]

from prefect_support import ROOT, Api, client_of, deploy, process, run
from support import database_of_its_own, until
from targets_support import BILLING, FLEET, Jobs


def test_the_example_in_prefect_yaml_deploys_once_it_is_uncommented(
    prefect_api: str, tmp_path: Path
) -> None:
    file = tmp_path / "prefect.yaml"
    file.write_text(uncommented((ROOT / "prefect.yaml").read_text()))
    client = client_of(prefect_api, tmp_path / "client")
    api = Api(prefect_api)
    api.forget_deployments()
    try:
        deploy(client)  # as it stands
        before = {d["name"]: d["id"] for d in api.find("deployments")}
        assert set(before) == {"scheduled", "on-demand", "all-targets"}
        command = ("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file))
        done = run(*command, **client)
        assert done.returncode == 0, done.stdout + done.stderr
        after = {d["name"]: d["id"] for d in api.find("deployments")}
        scheduled, billing = api.deployment("scheduled"), api.deployment("scheduled-billing")
        assert after == {**before, "scheduled-billing": billing["id"]}
    finally:
        api.forget_deployments()
    assert billing["parameters"] == {"target": "billing"}
    assert scheduled["parameters"] == {}
    [schedule] = billing["schedules"]
    assert (schedule["active"], schedule["slug"]) == (True, "every-five-minutes")
    assert schedule["schedule"] == scheduled["schedules"][0]["schedule"]
    assert schedule["schedule"]["interval"] == timedelta(minutes=5).total_seconds()
    for one in (scheduled, billing):  # each a limit of its own: they never cancel one another
        assert one["global_concurrency_limit"]["limit"] == 1
        assert one["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    limits = {one["global_concurrency_limit"]["id"] for one in (scheduled, billing)}
    assert len(limits) == 2
    for same in ("entrypoint", "tags", "work_pool_name", "pull_steps"):
        assert billing[same] == scheduled[same]


def uncommented(text: str) -> str:
    """prefect.yaml, with its example of a further target in force."""
    example = re.compile(r"^  # (- name: scheduled-\w+\n(?:  #   .*\n)+)", re.M)
    [commented] = [match.group() for match in example.finditer(text)]
    whole = text.replace(commented, commented.replace("  # ", "  "))
    names = [d["name"] for d in yaml.safe_load(whole)["deployments"]]
    assert names == ["scheduled", "scheduled-billing", "on-demand", "all-targets"]
    return whole


@pytest.fixture(scope="module")
def served(server: str, jobs: str) -> Iterator[dict[str, Jobs]]:
    """The databases of the targets that are served."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Jobs(stack.enter_context(database_of_its_own(server, jobs))))
            for name in ("default", "billing")
        }


@pytest.fixture(scope="module")
def client(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return client_of(prefect_api, tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def serving(
    prefect_api: str,
    client: dict[str, str],
    served: dict[str, Jobs],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    """One process that serves two targets. The clients that trigger know nothing of them."""
    folder = tmp_path_factory.mktemp("serving")
    file = folder / "targets.toml"
    file.write_text(BILLING + FLEET.replace("fleet", "default"))
    api = Api(prefect_api)
    api.forget_deployments()
    environment = {
        **client,
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "ORPHAN_RECOVERY_CONFIG": str(file),
        "FLEET_DATABASE_URL": served["default"].url,
        "BILLING_DATABASE_URL": served["billing"].url,
    }
    with process("orphan-recovery", "serve", log=folder / "serve.log", **environment):
        until(lambda: len(api.find("deployments")) == 4, "all deployments")
        yield api
    api.forget_deployments()


@pytest.fixture
def quiet(serving: Api) -> Api:
    """The same, while no schedule comes due: a sweep of its own would judge what a test adds."""
    serving.pause_schedules()
    return serving


def flow_run_in(output: str) -> str:
    """The id in the address that was printed."""
    found = re.search(r"^flow run \S+: http://\S+/runs/flow-run/([0-9a-f-]{36})$", output, re.M)
    assert found, output
    return found[1]


def test_serve_offers_a_schedule_for_each_target(serving: Api) -> None:
    """That of the target which is meant by default keeps the name it has where there is one."""
    names = {d["name"] for d in serving.find("deployments")}
    assert names == {"scheduled", "scheduled-billing", "on-demand", "all-targets"}
    for name, parameters in (("scheduled", {}), ("scheduled-billing", {"target": "billing"})):
        deployment = serving.deployment(name)
        assert deployment["parameters"] == parameters
        [schedule] = deployment["schedules"]
        assert (schedule["active"], schedule["schedule"]["interval"]) == (True, 300)
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    for name in ("on-demand", "all-targets"):
        assert serving.deployment(name)["schedules"] == []
        assert serving.deployment(name)["parameters"] == {}


def test_a_pipeline_triggers_one_target(
    quiet: Api, client: dict[str, str], served: dict[str, Jobs]
) -> None:
    served["billing"].add_invoice(1)
    served["default"].add_run("of the other", age="10 minutes")
    done = run("orphan-recovery", "trigger", "--target", "billing", "--wait", **client)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Completed: billing: 1 orphaned run detected: 1 marked crashed" in done.stdout
    assert served["billing"].invoices()[1] == "lost"
    flow_run = quiet.flow_run(flow_run_in(done.stdout))
    assert flow_run["parameters"] == {"target": "billing"}
    assert flow_run["deployment_id"] == quiet.deployment("on-demand")["id"]


def test_a_pipeline_triggers_all_targets(
    quiet: Api, client: dict[str, str], served: dict[str, Jobs]
) -> None:
    served["billing"].add_invoice(2)
    served["default"].add_run("orphan")
    command = ("orphan-recovery", "trigger", "--all-targets", "--wait", "--reason", "node lost")
    done = run(*command, **client)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Completed: 2 targets swept. " in done.stdout
    assert served["billing"].invoices()[2] == "lost"
    assert served["default"].status("orphan") == "crashed"
    assert {db.sweeps()[-1]["reason"] for db in served.values()} == {"node lost"}
    parent = quiet.flow_run(flow_run_in(done.stdout))
    assert parent["deployment_id"] == quiet.deployment("all-targets")["id"]
    assert set(quiet.within(parent["id"])) == {"sweep-billing", "sweep-default"}


def test_a_pipeline_that_names_no_target_of_the_file_stops(
    quiet: Api, client: dict[str, str], served: dict[str, Jobs]
) -> None:
    served["billing"].add_invoice(3)
    done = run("orphan-recovery", "trigger", "--target", "biling", "--wait", **client)
    assert done.returncode == 1
    assert "there is no target 'biling'" in done.stdout
    assert "there is 'billing', 'default'" in done.stdout
    assert "the sweep ended Failed" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert served["billing"].invoices()[3] == "working"
    assert quiet.flow_run(flow_run_in(done.stdout))["state_type"] == "FAILED"
