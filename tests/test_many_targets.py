"""Many targets: each table by its own description, and one that is broken stops no other."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from orphan_recovery import ConfigurationError, recover_orphaned_runs, recover_target
from orphan_recovery.all_targets_flow import recover_all_targets
from orphan_recovery.database import database_url
from prefect_support import Api, client_of, flow_run_of, marks, run, sweep
from support import database_of_its_own, free_port
from targets_support import BILLING, FLEET, REPORTS, Jobs

MISFIT = BILLING.replace("billing", "misfit").replace('"seen_at"', '"last_beat"')


@pytest.fixture
def new_database(
    server: str, jobs: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Jobs]]:
    """Makes a database for a target; the variable that its description names holds the address."""
    monkeypatch.delenv("ORPHAN_RECOVERY_DATABASE_URL", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with ExitStack() as stack:

        def new(target: str) -> Jobs:
            url = stack.enter_context(database_of_its_own(server, jobs))
            monkeypatch.setenv(f"{target.upper()}_DATABASE_URL", url)
            return stack.enter_context(Jobs(url))

        yield new


@pytest.fixture
def billing(new_database: Callable[[str], Jobs]) -> Jobs:
    return new_database("billing")


@pytest.fixture
def reports(new_database: Callable[[str], Jobs]) -> Jobs:
    return new_database("reports")


@pytest.fixture
def fleet(new_database: Callable[[str], Jobs]) -> Jobs:
    return new_database("fleet")


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes the file that describes the targets; the environment names it."""
    file = tmp_path / "targets.toml"

    def described(*targets: str) -> None:
        file.write_text("".join(targets))
        monkeypatch.setenv("ORPHAN_RECOVERY_CONFIG", str(file))

    return described


@pytest.fixture
def api(prefect: str) -> Api:
    return Api(prefect)


async def sweep_all(api: Api, **parameters: Any) -> State[Any]:
    """Run the flow that sweeps every target, in this process, to its final state."""
    async with api.used():
        state: State[Any] = await recover_all_targets(**parameters, return_state=True)
    return state


def nowhere() -> str:
    """An address at which nobody listens."""
    return f"postgresql://me:S3cret@127.0.0.1:{free_port()}/nowhere"


# The flow, of one target


async def test_the_flow_sweeps_the_target_it_is_given_and_no_other(
    billing: Jobs, reports: Jobs, describe: Callable[..., None], api: Api
) -> None:
    describe(BILLING, REPORTS)
    billing.add_invoice(1)
    billing.add_invoice(2, seen="21 minutes")
    billing.add_invoice(3, seen="19 minutes")  # within the target's own threshold of 20
    billing.add_invoice(4, state="new")  # no worker holds it
    billing.add_invoice(5, state="done")
    billing.add_run("of no target's table")
    reports.add_report(6)
    state = await sweep(api, target="billing")
    assert state.is_completed()
    assert state.message == (
        "billing: 2 orphaned runs detected: 2 marked crashed (threshold 20 minutes, 3 in flight)"
    )
    assert billing.invoices() == {1: "lost", 2: "lost", 3: "working", 4: "new", 5: "done"}
    assert billing.status("of no target's table") == "running"
    assert reports.reports() == {6: 1}
    [crash] = billing.do("SELECT * FROM invoice_jobs WHERE job_no = 2")
    assert crash["trouble"].startswith("orphaned: no sign of life from its worker; last sign")
    assert crash["ended_at"] is not None

    assert set(marks(api.task_runs(flow_run_of(state)))) == {"1", "2"}
    artifacts = api.artifacts(flow_run_of(state))
    assert set(artifacts) == {
        "orphan-recovery-billing-verdicts",
        "orphan-recovery-billing-summary",
    }
    summary = artifacts["orphan-recovery-billing-summary"]["data"]
    assert "- target `billing`, table `invoice_jobs`" in summary

    [told] = billing.sweeps()
    assert (told["target"], told["table_name"]) == ("billing", "invoice_jobs")
    assert (told["threshold"], told["marked"]) == (timedelta(minutes=20), 2)
    assert billing.verdicts_of("billing") == {"1": "marked", "2": "marked"}
    assert reports.sweeps() == []


async def test_a_threshold_that_is_asked_for_comes_before_the_targets_own(
    billing: Jobs, describe: Callable[..., None], api: Api
) -> None:
    describe(BILLING, REPORTS)
    billing.add_invoice(1, seen="21 minutes")
    billing.add_invoice(2, seen="31 minutes")
    state = await sweep(api, target="billing", threshold_minutes=30)
    assert state.is_completed()
    assert billing.invoices() == {1: "working", 2: "lost"}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"target": "biling"}, "there is no target 'biling'"),
        ({}, "which target?"),
    ],
    ids=["misspelt", "none meant"],
)
async def test_without_a_target_that_is_meant_the_flow_fails_before_it_reads_anything(
    describe: Callable[..., None],
    api: Api,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, str],
    told: str,
) -> None:
    """There is not even a database here that it could read."""
    describe(BILLING, REPORTS)
    monkeypatch.setenv("BILLING_DATABASE_URL", nowhere())
    monkeypatch.setenv("REPORTS_DATABASE_URL", nowhere())
    state = await sweep(api, **asked)
    recorded = api.flow_run(flow_run_of(state))
    assert recorded["state_type"] == "FAILED"
    assert told in recorded["state"]["message"]
    assert "'billing', 'reports'" in recorded["state"]["message"]  # those that there are
    mine = {"flow_runs": {"id": {"any_": [recorded["id"]]}}}
    assert api.find("task_runs", **mine) == []


async def test_two_sweeps_of_a_target_at_once_mark_each_orphan_once(
    billing: Jobs, describe: Callable[..., None], api: Api
) -> None:
    describe(BILLING, REPORTS)
    for number in range(1, 11):
        billing.add_invoice(number)
    with billing.connect() as holder:
        holder.execute("SELECT FROM invoice_jobs WHERE job_no = 7 FOR UPDATE")
        by_flow = asyncio.create_task(sweep(api, target="billing"))
        await asyncio.to_thread(billing.await_lock_wait)
        at_startup = asyncio.create_task(recover_target("billing"))
        await asyncio.to_thread(billing.await_lock_wait, 2)  # both have seen it, and want it
    state, report = await by_flow, await at_startup
    assert state.is_completed()
    assert report["error"] is None
    assert set(billing.invoices().values()) == {"lost"}
    outcomes = [v["outcome"] for v in billing.verdicts() if v["run_id"] == "7"]
    assert sorted(outcomes) == ["already_marked", "marked"]
    marked = [int(v["run_id"]) for v in billing.verdicts() if v["outcome"] == "marked"]
    assert sorted(marked) == list(range(1, 11))


# The flow, of all targets


@dataclass(frozen=True)
class Broken:
    """What came of a sweep of four targets, of which three were broken."""

    api: Api
    state: State[Any]
    """How the flow ended."""
    done: "subprocess.CompletedProcess[str]"
    """How the command line ended, which swept databases of its own."""
    billing: dict[str, Jobs]
    fleet: dict[str, Jobs]
    """By who swept them: ``flow`` or ``command``."""


@pytest.fixture(scope="module")
def broken(
    server: str, jobs: str, prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broken]:
    """One target cannot be reached, one has a bad row, one does not fit its table, one is well.

    The flow and the command line sweep side by side: both try an outage again for some seconds.
    """
    folder = tmp_path_factory.mktemp("broken")
    file = folder / "targets.toml"
    file.write_text(REPORTS + FLEET + MISFIT + BILLING)
    with ExitStack() as stack:
        billing, fleet = dict[str, Jobs](), dict[str, Jobs]()
        environment = dict[str, dict[str, str]]()
        for who in ("flow", "command"):
            for databases in (billing, fleet):
                url = stack.enter_context(database_of_its_own(server, jobs))
                databases[who] = stack.enter_context(Jobs(url))
            billing[who].add_invoice(1)
            fleet[who].add_run("poisoned", age="3 hours")
            fleet[who].add_run("sound")
            fleet[who].poison("poisoned")
            environment[who] = {
                **client_of(prefect_api, folder),
                "ORPHAN_RECOVERY_CONFIG": str(file),
                "REPORTS_DATABASE_URL": nowhere(),
                "FLEET_DATABASE_URL": fleet[who].url,
                "MISFIT_DATABASE_URL": billing[who].url,
                "BILLING_DATABASE_URL": billing[who].url,
            }
        api = Api(prefect_api)
        command = ("orphan-recovery", "sweep", "--all-targets", "--json")

        async def both() -> tuple[State[Any], "subprocess.CompletedProcess[str]"]:
            by_command = asyncio.to_thread(run, *command, **environment["command"])
            state, done = await asyncio.gather(sweep_all(api), by_command)
            return state, done

        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment["flow"].items():
                patch.setenv(name, value)
            state, done = asyncio.run(both())
        yield Broken(api, state, done, billing, fleet)


def test_a_broken_target_fails_its_own_flow_run_and_no_other(broken: Broken) -> None:
    api, billing, fleet = broken.api, broken.billing["flow"], broken.fleet["flow"]
    parent = api.flow_run(flow_run_of(broken.state))
    assert parent["state_type"] == "FAILED"
    message = parent["state"]["message"]
    assert message.startswith("3 of 4 targets FAILED (reports, fleet, misfit). ")
    sweeps = api.within(parent["id"])
    assert {name: run["state_type"] for name, run in sweeps.items()} == {
        "sweep-reports": "FAILED",
        "sweep-fleet": "FAILED",
        "sweep-misfit": "FAILED",
        "sweep-billing": "COMPLETED",
    }
    told = {name: run["state"]["message"] for name, run in sweeps.items()}
    assert "connection failed" in told["sweep-reports"]
    assert "S3cret" not in told["sweep-reports"]
    assert "1 marked crashed, 1 FAILED" in told["sweep-fleet"]
    assert "targets.misfit.columns.heartbeat_at is 'last_beat'" in told["sweep-misfit"]
    assert "it has job_no, state, held_by" in told["sweep-misfit"]
    assert "1 orphaned run detected: 1 marked crashed" in told["sweep-billing"]
    for one in told.values():
        assert one in message  # who reads only the parent reads them all

    assert billing.invoices() == {1: "lost"}
    assert fleet.statuses() == {"poisoned": "running", "sound": "crashed"}
    assert [sweep["target"] for sweep in billing.sweeps()] == ["billing"]
    by_run = marks(api.task_runs(sweeps["sweep-fleet"]["id"]))
    assert {run: task_run["state_type"] for run, task_run in by_run.items()} == {
        "poisoned": "FAILED",
        "sound": "COMPLETED",
    }
    asked = fleet.sweeps()[0]["asked_by"]
    assert asked.startswith(f"flow run sweep-fleet ({sweeps['sweep-fleet']['id']}), ")


async def test_two_targets_in_one_database_share_its_ledger_and_nothing_else(
    billing: Jobs, describe: Callable[..., None], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tables have a run 7; that of one is no word about that of the other."""
    describe(BILLING, REPORTS)
    monkeypatch.setenv("REPORTS_DATABASE_URL", billing.url)
    billing.add_invoice(7)
    billing.add_invoice(8, seen="1 minute")
    billing.add_report(7)
    billing.add_report(8)
    looked = await sweep_all(api, dry_run=True)
    assert looked.is_completed()
    assert "1 orphaned run would be judged, nothing was written" in (looked.message or "")
    assert (billing.invoices()[7], billing.reports()[7]) == ("working", 1)
    assert (billing.sweeps(), billing.verdicts()) == ([], [])

    state = await sweep_all(api, reason="node lost")
    assert state.is_completed()
    assert state.message == (  # each is named once
        "2 targets swept. billing: 1 orphaned run detected: 1 marked crashed (threshold 20 "
        "minutes, 2 in flight); reports: 2 orphaned runs detected: 2 marked crashed (threshold "
        "60 minutes, 2 in flight)"
    )
    sweeps = api.within(flow_run_of(state))
    assert set(sweeps) == {"sweep-billing", "sweep-reports"}
    assert set(marks(api.task_runs(sweeps["sweep-billing"]["id"]))) == {"7"}
    assert set(marks(api.task_runs(sweeps["sweep-reports"]["id"]))) == {"7", "8"}
    assert billing.invoices() == {7: "lost", 8: "working"}
    assert billing.reports() == {7: 4, 8: 4}
    assert billing.verdicts_of("billing") == {"7": "marked"}
    assert billing.verdicts_of("reports") == {"7": "marked", "8": "marked"}
    told = {s["target"]: (s["table_name"], s["marked"], s["reason"]) for s in billing.sweeps()}
    assert told == {
        "billing": ("invoice_jobs", 1, "node lost"),
        "reports": ("report_jobs", 2, "node lost"),
    }
    keys = {key for run in sweeps.values() for key in api.artifacts(run["id"])}
    assert keys == {
        f"orphan-recovery-{target}-{what}"
        for target in ("billing", "reports")
        for what in ("verdicts", "summary")
    }


async def test_a_mark_in_one_table_is_no_mark_of_the_same_run_in_another(
    billing: Jobs, describe: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that fails by itself, in the word for a crash, has finished first."""
    describe(BILLING, REPORTS)
    monkeypatch.setenv("REPORTS_DATABASE_URL", billing.url)
    billing.add_invoice(7)
    billing.add_report(7)
    await recover_target("billing")
    with billing.connect() as worker:
        worker.execute("UPDATE report_jobs SET status = 4 WHERE id = 7")
        sweeping = asyncio.create_task(recover_target("reports"))
        await asyncio.to_thread(billing.await_lock_wait)
    report = await sweeping
    assert (report["detected"], report["recovered"], report["skipped"]) == (1, 0, 1)
    assert billing.verdicts_of("reports") == {"7": "finished_first"}


# The command line


def test_sweep_of_one_target_and_its_summary(
    billing: Jobs, describe: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the ledger tells whose crashes they are: here two targets share it."""
    describe(BILLING, REPORTS)
    monkeypatch.setenv("REPORTS_DATABASE_URL", billing.url)
    billing.add_invoice(1)
    billing.add_report(1)
    done = run("orphan-recovery", "sweep", "--target", "billing")
    assert (done.returncode, done.stderr) == (0, "")
    assert "billing: 1 orphaned run detected: 1 marked crashed" in done.stdout
    assert (billing.invoices(), billing.reports()) == ({1: "lost"}, {1: 1})

    told = json.loads(run("orphan-recovery", "summary", "--target", "billing", "--json").stdout)
    assert told["total_crashed"] == 1
    [crash] = told["recent_crashes"]
    assert (crash["run_id"], crash["worker_id"]) == ("1", "press-1")
    assert crash["error"].startswith("orphaned: no sign of life from its worker; last sign")
    assert "0 crashed in all" in run("orphan-recovery", "summary", "--target", "reports").stdout


def test_sweep_of_all_targets(
    billing: Jobs, reports: Jobs, fleet: Jobs, describe: Callable[..., None]
) -> None:
    describe(BILLING, REPORTS, FLEET)
    billing.add_invoice(1)
    reports.add_report(2)
    fleet.add_run("alive", age="3 hours", beat="1 minute")
    looked = run("orphan-recovery", "sweep", "--all-targets", "--dry-run", "--json")
    assert (looked.returncode, looked.stderr) == (0, "")
    assert [(r["target"], r["dry_run"], r["detected"]) for r in json.loads(looked.stdout)] == [
        ("billing", True, 1),
        ("reports", True, 1),
        ("fleet", True, 0),
    ]
    assert (billing.invoices(), reports.reports()) == ({1: "working"}, {2: 1})

    done = run("orphan-recovery", "sweep", "--all-targets")
    assert (done.returncode, done.stderr) == (0, "")
    headlines = [line for line in done.stdout.splitlines() if "(threshold " in line]
    assert [line.partition(": ")[0] for line in headlines] == ["billing", "reports", "fleet"]
    assert headlines[1].startswith("reports: 1 orphaned run detected: 1 marked crashed")
    assert (billing.invoices(), reports.reports()) == ({1: "lost"}, {2: 4})
    assert fleet.statuses() == {"alive": "running"}


def test_a_broken_target_stops_no_other_and_is_named(broken: Broken) -> None:
    """The one that is well comes last in the file."""
    assert (broken.done.returncode, broken.done.stderr) == (1, "")
    assert "S3cret" not in broken.done.stdout
    reports, fleet, misfit, billing = json.loads(broken.done.stdout)
    told = [report["target"] for report in (reports, fleet, misfit, billing)]
    assert told == ["reports", "fleet", "misfit", "billing"]
    assert "connection failed" in reports["error"]
    assert (fleet["error"], fleet["recovered"], fleet["failed"]) == (None, 1, 1)
    assert "targets.misfit.columns.heartbeat_at is 'last_beat'" in misfit["error"]
    assert (billing["error"], billing["recovered"], billing["failed"]) == (None, 1, 0)
    assert broken.billing["command"].invoices() == {1: "lost"}
    assert broken.fleet["command"].statuses() == {"poisoned": "running", "sound": "crashed"}


def test_a_target_without_an_address_stops_no_other_either(
    billing: Jobs, describe: Callable[..., None]
) -> None:
    describe(FLEET, BILLING)
    billing.add_invoice(1)
    done = run("orphan-recovery", "sweep", "--all-targets")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("fleet: ")]
    assert "'FLEET_DATABASE_URL'" in line
    assert billing.invoices() == {1: "lost"}

    alone = run("orphan-recovery", "sweep", "--target", "fleet")
    assert (alone.returncode, alone.stdout) == (2, "")
    assert "'FLEET_DATABASE_URL' (database_url_env), which is not set" in alone.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--target", "billing", "--all-targets"], "both given"),
        (["sweep", "--target", "biling"], "there is no target 'biling'; there is"),
        (["sweep"], "which target? There is 'billing', 'reports'"),
        (["summary", "--target", "biling"], "there is no target 'biling'"),
        (["trigger", "--target", "billing", "--all-targets"], "both given: give one of them"),
        (["trigger", "--worker", "press-1", "--all-targets"], "leave out worker"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    billing: Jobs,
    describe: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    describe(BILLING, REPORTS)
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    billing.add_invoice(1)
    done = run("orphan-recovery", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert billing.invoices() == {1: "working"}


# A worker's start-up


async def test_a_worker_recovers_the_target_it_names(
    billing: Jobs, reports: Jobs, describe: Callable[..., None]
) -> None:
    describe(BILLING, REPORTS)
    billing.add_invoice(1)
    reports.add_report(2)
    report = await recover_target("billing")
    assert (report["target"], report["threshold_minutes"]) == ("billing", 20)
    assert (report["detected"], report["recovered"], report["error"]) == (1, 1, None)
    assert (billing.invoices(), reports.reports()) == ({1: "lost"}, {2: 1})
    with pytest.raises(ConfigurationError, match="there is no target 'biling'"):
        await recover_target("biling")
    with pytest.raises(ConfigurationError, match="which target"):
        await recover_orphaned_runs()


CONTRACT = """
import asyncio, json, sys
from orphan_recovery import (
    ORPHAN_THRESHOLD_MINUTES, detect_orphaned_runs, get_crash_recovery_summary,
    mark_run_as_crashed, recover_orphaned_runs,
)
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

async def main(url):
    engine = create_async_engine(url)
    async with AsyncSession(engine) as session:
        detected = await detect_orphaned_runs(session)
        marked = await mark_run_as_crashed(session, detected[0])
        await session.commit()
    await engine.dispose()
    report = await recover_orphaned_runs()
    summary = await get_crash_recovery_summary()
    print(json.dumps({
        "threshold": ORPHAN_THRESHOLD_MINUTES,
        "detected": [(run.target, run.id) for run in detected],
        "marked": marked,
        "recovered": [run["run_id"] for run in report["runs"]],
        "crashed": [crash["run_id"] for crash in summary["recent_crashes"]],
    }))

asyncio.run(main(sys.argv[1]))
"""


def contract(url: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The four functions of the contract, called one after the other in a process of their own."""
    address = database_url(url).render_as_string(hide_password=False)
    return subprocess.run(
        [sys.executable, "-c", CONTRACT, address],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_says_which_target_the_contract_means(
    billing: Jobs, reports: Jobs, describe: Callable[..., None]
) -> None:
    describe(BILLING, REPORTS)
    billing.add_invoice(1, made="3 hours")
    billing.add_invoice(2, seen="25 minutes")
    billing.add_invoice(3, seen="15 minutes")
    reports.add_report(4, begun="3 hours")
    reports.add_report(5)
    reports.add_report(6, begun="59 minutes")
    told = json.loads(contract(billing.url, ORPHAN_RECOVERY_TARGET="billing").stdout)
    assert told == {
        "threshold": 20,
        "detected": [["billing", "1"], ["billing", "2"]],
        "marked": True,
        "recovered": ["2"],
        "crashed": ["2", "1"],
    }
    assert billing.invoices() == {1: "lost", 2: "lost", 3: "working"}
    assert billing.verdicts_of("billing") == {"1": "marked", "2": "marked"}
    assert reports.reports() == {4: 1, 5: 1, 6: 1}

    told = json.loads(contract(reports.url, ORPHAN_RECOVERY_TARGET="reports").stdout)
    assert told["threshold"] == 60
    assert told["detected"] == [["reports", "4"], ["reports", "5"]]
    assert (told["marked"], told["recovered"], told["crashed"]) == (True, ["5"], ["5", "4"])
    assert reports.reports() == {4: 4, 5: 4, 6: 1}


def test_a_target_that_is_not_there_is_refused_when_the_package_is_imported(
    billing: Jobs, describe: Callable[..., None]
) -> None:
    describe(BILLING, REPORTS)
    done = contract(billing.url, ORPHAN_RECOVERY_TARGET="biling")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith(
        "there is no target 'biling', which ORPHAN_RECOVERY_TARGET names; there is 'billing', "
        "'reports'"
    )
