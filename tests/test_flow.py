"""The flow, run against a real Prefect server, which is then asked what it saw."""

import asyncio
import gc
import json
import logging
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from sqlalchemy import make_url

from orphan_recovery import flow_tasks, judge, judge_pages
from orphan_recovery.flow import SweepFailed, recover_orphaned_runs
from orphan_recovery.policy import RetryPlan
from prefect_support import Api, flow_run_of, marks, sweep
from support import Database, until

LANE_1 = (
    "SELECT pg_advisory_xact_lock("
    "hashtextextended('orphan_recovery lane 1 of public.worker_runs', 0))"
)


@pytest.fixture
def api(prefect: str) -> Api:
    return Api(prefect)


async def test_a_sweep_that_finds_nothing_completes_and_says_so(db: Database, api: Api) -> None:
    db.add_run("alive", age="3 hours", beat="1 minute")
    state = await sweep(api)
    assert state.is_completed()
    assert state.message == "no orphaned run found (threshold 30 minutes, 1 in flight)"
    assert db.status("alive") == "running"
    assert marks(api.task_runs(flow_run_of(state))) == {}


async def test_what_comes_after_a_look_that_found_nothing_is_for_the_next_sweep(
    db: Database, api: Api
) -> None:
    """Nobody has doubted its silence, and the sweep is closed already."""
    db.do(
        "CREATE FUNCTION one_more() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO worker_runs (id, created_at) VALUES ('late', now() - interval '3 hours');"
        " RETURN NULL; END $$"
    )
    db.do(
        "CREATE TRIGGER one_more AFTER INSERT ON orphan_recovery.sweeps"
        " FOR EACH ROW EXECUTE FUNCTION one_more()"
    )
    state = await sweep(api)
    assert state.is_completed()
    assert state.message == "no orphaned run found (threshold 30 minutes, 0 in flight)"
    assert db.status("late") == "queued"
    db.do("DROP TRIGGER one_more ON orphan_recovery.sweeps")
    assert (await sweep(api)).is_completed()
    assert db.status("late") == "crashed"
    assert [(told["detected"], told["marked"]) for told in db.sweeps()] == [(0, 0), (1, 1)]


async def test_each_orphan_has_a_task_run_of_its_own(db: Database, api: Api) -> None:
    orphans = db.add_orphans(12)
    db.add_run("alive", age="1 minute")
    state = await sweep(api)
    assert state.is_completed()
    assert state.message == (
        "12 orphaned runs detected: 12 marked crashed (threshold 30 minutes, 13 in flight)"
    )
    task_runs = api.task_runs(flow_run_of(state))
    assert sorted(marks(task_runs)) == orphans
    assert {run["state_type"] for run in task_runs.values()} == {"COMPLETED"}
    assert len(task_runs) == len(orphans) + 4  # open-sweep, decide, detect, summarise
    for orphan, run in marks(task_runs).items():
        message = run["state"]["message"]
        assert message.startswith(f"{orphan}: marked; silent for 1 h ")
        assert "by its age when detected, threshold 30 min, held by worker worker-" in message
    assert db.statuses() == {**dict.fromkeys(orphans, "crashed"), "alive": "running"}


@pytest.mark.parametrize("frozen_by_others", [False, True])
async def test_while_it_marks_what_is_loaded_is_kept_out_of_garbage_collections(
    db: Database, api: Api, caplog: pytest.LogCaptureFixture, frozen_by_others: bool
) -> None:
    """And no longer; what somebody else froze stays so."""
    caplog.set_level(logging.INFO, "orphan_recovery")
    db.add_orphans(2)
    frozen: list[int] = []

    def count(record: logging.LogRecord) -> bool:
        if record.getMessage() == "orphan_run_marked_crashed":
            frozen.append(gc.get_freeze_count())
        return True

    if frozen_by_others:
        gc.freeze()
    caplog.handler.addFilter(count)
    try:
        assert (await sweep(api)).is_completed()
        left = gc.get_freeze_count()
    finally:
        caplog.handler.removeFilter(count)
        gc.unfreeze()
    assert len(frozen) == 2
    assert min(frozen) > 100_000
    assert (left > 0) is frozen_by_others


async def test_the_flow_waits_for_another_sweep_of_its_table(
    db: Database, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """And what it marks then it says to whoever asked for its events, each with its run."""
    caplog.set_level(logging.INFO, "orphan_recovery")
    [orphan] = db.add_orphans(1)
    with db.connect() as other:
        other.execute(LANE_1)
        sweeping = asyncio.ensure_future(sweep(api))
        await asyncio.to_thread(
            until, lambda: "sweep_waits_for_another" in caplog.messages, "it says that it waits"
        )
        await asyncio.sleep(0.5)
        assert db.sweeps() == []
        other.rollback()
    assert (await sweeping).is_completed()
    [event] = [r for r in caplog.records if r.message == "orphan_run_marked_crashed"]
    assert (event.levelname, event.__dict__["run_id"]) == ("INFO", orphan)


async def test_of_two_flows_that_wait_one_looks_for_both(
    db: Database, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "orphan_recovery")
    orphans = db.add_orphans(2)
    with db.connect() as other:
        other.execute(LANE_1)
        sweeping = [asyncio.ensure_future(sweep(api)) for _ in range(2)]
        await asyncio.to_thread(
            until, lambda: caplog.messages.count("sweep_waits_for_another") == 2, "both wait"
        )
        other.rollback()
    states = await asyncio.gather(*sweeping)
    first, second = db.sweeps()
    assert (first["marked"], second["marked"]) == (2, 0)
    assert (first["seen_by"], second["seen_by"]) == (None, first["sweep_id"])
    assert sorted(str(state.message) for state in states) == [
        "2 orphaned runs detected: 2 marked crashed (threshold 30 minutes, 2 in flight)",
        "no orphaned run found (threshold 30 minutes, 0 in flight, as sweep "
        f"{first['sweep_id']} left them)",
    ]
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


async def test_more_orphans_than_are_worth_a_task_run_each_are_marked_in_slices(
    db: Database, api: Api
) -> None:
    orphans = db.add_orphans(1_200)
    db.add_run("alive", age="1 minute")
    state = await sweep(api)
    assert state.is_completed(), state.message
    assert state.message == (
        "1200 orphaned runs detected: 1200 marked crashed (threshold 30 minutes, 1201 in flight)"
    )
    task_runs = api.task_runs(flow_run_of(state))
    expected = {"open-sweep", "decide", "mark-slices-1", "mark-pages", "summarise"}
    assert set(task_runs) == expected
    assert {run["state_type"] for run in task_runs.values()} == {"COMPLETED"}
    assert db.statuses() == {**dict.fromkeys(orphans, "crashed"), "alive": "running"}
    assert {v["outcome"] for v in db.verdicts()} == {"marked"}
    [told] = db.sweeps()
    assert (told["ended_as"], told["detected"], told["marked"]) == ("completed", 1_200, 1_200)


def loud_marks(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Of each, a worker's console would show a bare name."""
    marks = [r for r in caplog.records if r.message == "orphan_run_marked_crashed"]
    return [record for record in marks if record.levelno > logging.INFO]


async def test_many_that_cannot_be_taken_in_slices_are_marked_by_one_task_run(
    db: Database, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    orphans = db.add_orphans(30)
    state = await sweep(api, limit=20, task_each_up_to=10)
    assert state.is_completed()
    assert set(api.task_runs(flow_run_of(state))) == {
        "open-sweep",
        "decide",
        "mark-pages",
        "summarise",
    }
    assert db.outcomes() == dict.fromkeys(orphans[:20], "marked")
    assert loud_marks(caplog) == []


async def test_while_it_marks_page_by_page_it_tells_how_far_it_is(
    db: Database, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_TARGETS__DEFAULT__ORPHANS_PER_SECOND", "10")
    monkeypatch.setattr(flow_tasks, "STRETCH_SECONDS", 0.2)
    db.add_orphans(30)
    state = await sweep(api, limit=20, task_each_up_to=5)  # in pages of ten, a second apart
    assert state.is_completed(), state.message
    flow_run = flow_run_of(state)
    until(lambda: "10 orphans judged" in api.logs(flow_run), "it says how far it is")


async def test_a_dry_run_of_many_lists_them_by_one_task_run(db: Database, api: Api) -> None:
    orphans = db.add_orphans(30)
    state = await sweep(api, dry_run=True, task_each_up_to=10)
    assert "30 orphaned runs would be judged" in (state.message or "")
    assert "mark-pages" in api.task_runs(flow_run_of(state))
    assert "detect" not in api.task_runs(flow_run_of(state))
    table = json.loads(api.artifacts(flow_run_of(state))["orphan-recovery-verdicts"]["data"])
    assert [row["run"] for row in table] == orphans
    assert set(db.statuses().values()) == {"running"}


async def test_what_the_limit_leaves_counts_when_task_runs_are_few_enough(
    db: Database, api: Api
) -> None:
    orphans = db.add_orphans(30)
    state = await sweep(api, limit=5, task_each_up_to=10)
    assert set(marks(api.task_runs(flow_run_of(state)))) == set(orphans[:5])


async def test_slices_that_meet_a_bad_row_mark_the_rest_and_fail_the_flow_run(
    db: Database, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    orphans = db.add_orphans(30)
    db.poison(orphans[7])
    state = await sweep(api, task_each_up_to=10)
    assert state.is_failed()
    assert (state.message or "").startswith(
        "30 orphaned runs detected: 29 marked crashed, 1 FAILED"
    )
    assert db.outcomes() == {**dict.fromkeys(orphans, "marked"), orphans[7]: "failed"}
    assert db.status(orphans[7]) == "running"
    assert loud_marks(caplog) == []


async def test_a_run_that_changed_hands_while_slices_were_marked_is_counted_once(
    db: Database, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphans = db.add_orphans(30)
    db.poison(orphans[7])
    mark_page = judge_pages.mark_page

    async def moved_first(*asked: Any) -> Any:
        db.do("UPDATE worker_runs SET worker_id = 'another' WHERE id = %s", orphans[9])
        return await mark_page(*asked)

    monkeypatch.setattr(judge, "mark_page", moved_first)
    state = await sweep(api, task_each_up_to=10)
    assert (state.message or "").startswith(
        "30 orphaned runs detected: 28 marked crashed, 1 changed hands, 1 FAILED"
    )


async def test_slices_that_lose_their_database_end_the_sweep_loudly(
    db: Database, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetryPlan, "delay", lambda _self, retry: 0.01 * retry)
    orphans = db.add_orphans(30)
    db.do(
        "CREATE FUNCTION cut_off() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$"
    )
    db.do(
        "CREATE TRIGGER cut_off BEFORE UPDATE ON worker_runs"
        " FOR EACH ROW EXECUTE FUNCTION cut_off()"
    )
    state = await sweep(api, task_each_up_to=10)
    assert state.is_failed()
    assert "terminating connection" in (state.message or "")
    assert set(db.statuses().values()) == {"running"}
    assert [told["ended_as"] for told in db.sweeps()] == ["failed"]
    db.do("DROP TRIGGER cut_off ON worker_runs")
    assert (await sweep(api, task_each_up_to=10)).is_completed()
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


async def test_the_ledger_names_the_flow_run_that_asked(db: Database, api: Api) -> None:
    state = await sweep(api, reason="node lost")
    run = api.flow_run(flow_run_of(state))
    [asked] = db.sweeps()
    assert asked["asked_by"] == f"flow run {run['name']} ({run['id']}), started by hand"
    assert (asked["reason"], asked["ended_as"]) == ("node lost", "completed")


async def test_a_poisoned_row_fails_its_own_task_run_and_no_other(db: Database, api: Api) -> None:
    *others, poisoned = db.add_orphans(9)
    db.poison(poisoned)
    state = await sweep(api)
    assert state.is_failed()
    assert state.message is not None
    assert state.message.startswith("9 orphaned runs detected: 8 marked crashed, 1 FAILED")
    by_run = marks(api.task_runs(flow_run_of(state)))
    assert sorted(by_run) == [*others, poisoned]
    assert {by_run[run]["state_type"] for run in others} == {"COMPLETED"}
    assert by_run[poisoned]["state_type"] == "FAILED"
    assert "poisoned row" in by_run[poisoned]["state"]["message"]
    assert by_run[poisoned]["run_count"] == 1  # it fails again however often it is tried
    assert db.statuses() == {**dict.fromkeys(others, "crashed"), poisoned: "running"}
    [verdict] = [v for v in db.verdicts() if v["outcome"] != "marked"]
    assert (verdict["run_id"], verdict["outcome"]) == (poisoned, "failed")
    assert f"poisoned row {poisoned}" in verdict["error"]
    [told] = db.sweeps()
    assert (told["ended_as"], told["marked"], told["failed"]) == ("failed", 8, 1)


async def test_a_direct_call_of_a_failed_sweep_raises_with_its_report(
    db: Database, api: Api
) -> None:
    poisoned, other = db.add_orphans(2)
    db.poison(poisoned)
    async with api.used():
        with pytest.raises(SweepFailed) as caught:
            await recover_orphaned_runs()
    report = caught.value.report
    assert (report["detected"], report["recovered"], report["failed"]) == (2, 1, 1)
    assert [(r["run_id"], r["outcome"]) for r in report["runs"]] == [
        (poisoned, "failed"),
        (other, "marked"),
    ]
    assert str(caught.value) == report["message"]


@pytest.mark.parametrize(
    "bad",
    [
        {"threshold_minutes": 0},
        {"threshold_minutes": -5},
        {"threshold_minutes": "abc"},
        {"worker": ""},
        {"tenant": ""},
        {"limit": 0},
        {"limit": 2**31},
        {"task_each_up_to": -1},
        {"task_each_up_to": 10_001},
        {"reason": ""},
    ],
    ids=str,
)
async def test_a_value_that_cannot_be_meant_is_refused_before_anything_runs(
    db: Database, api: Api, bad: dict[str, Any]
) -> None:
    [orphan] = db.add_orphans(1)
    state = await sweep(api, **bad)
    assert state.is_failed()
    assert next(iter(bad)) in (state.message or "")
    assert db.status(orphan) == "running"
    assert db.sweeps() == []
    recorded = api.flow_run(flow_run_of(state))
    assert recorded["state_type"] == "FAILED"
    mine = {"flow_runs": {"id": {"any_": [recorded["id"]]}}}
    assert api.find("task_runs", **mine) == []


async def test_a_dry_run_lists_the_orphans_and_writes_nothing(db: Database, api: Api) -> None:
    orphans = db.add_orphans(3)
    state = await sweep(api, dry_run=True)
    assert state.is_completed()
    assert (state.message or "").startswith(
        "dry run: 3 orphaned runs would be judged, nothing was written"
    )
    assert set(db.statuses().values()) == {"running"}
    assert (db.sweeps(), db.verdicts()) == ([], [])
    assert marks(api.task_runs(flow_run_of(state))) == {}
    table = json.loads(api.artifacts(flow_run_of(state))["orphan-recovery-verdicts"]["data"])
    assert [(row["run"], row["outcome"]) for row in table] == [
        (orphan, "would be judged") for orphan in orphans
    ]


@pytest.mark.parametrize(
    ("scope", "within"),
    [
        ({"tenant": "t1"}, "abc"),
        ({"worker": "w1"}, "abd"),
        ({"tenant": "t1", "worker": "w1"}, "ab"),
        ({"limit": 2}, "ab"),
        ({"tenant": "t1", "worker": "w1", "limit": 1}, "a"),
        ({"threshold_minutes": 150}, "abc"),
    ],
    ids=str,
)
async def test_the_scope_narrows_what_is_judged(
    db: Database, api: Api, scope: dict[str, Any], within: str
) -> None:
    db.add_run("a", tenant="t1", worker="w1", age="5 hours")
    db.add_run("b", tenant="t1", worker="w1", age="4 hours")
    db.add_run("c", tenant="t1", worker="w2", age="3 hours")
    db.add_run("d", tenant="t2", worker="w1", age="2 hours")
    state = await sweep(api, **scope)
    assert state.is_completed()
    assert {run for run, status in db.statuses().items() if status == "crashed"} == set(within)
    asked = {name: value for name, value in scope.items() if name != "threshold_minutes"}
    assert db.sweeps()[0]["scope"] == asked


async def test_the_artifacts_tell_what_happened(db: Database, api: Api) -> None:
    marked, poisoned = db.add_orphans(2)
    db.poison(poisoned)
    state = await sweep(api, limit=5)
    artifacts = api.artifacts(flow_run_of(state))
    assert set(artifacts) == {"orphan-recovery-verdicts", "orphan-recovery-summary"}

    first, second = json.loads(artifacts["orphan-recovery-verdicts"]["data"])
    assert (first["run"], first["outcome"]) == (poisoned, "failed")  # worst news first
    assert "poisoned row" in first["found instead, or error"]
    assert (second["run"], second["outcome"], second["worker"]) == (marked, "marked", "worker-1")
    assert (second["evidence"], second["found instead, or error"]) == ("age", "")
    assert artifacts["orphan-recovery-verdicts"]["description"] == state.message

    summary = artifacts["orphan-recovery-summary"]["data"]
    assert state.message in summary
    assert str(db.sweeps()[0]["sweep_id"]) in summary
    assert "- limit: `5`" in summary
    assert "| marked | 1 |" in summary
    assert "| failed | 1 |" in summary
    assert "What to do next" in summary


async def test_no_password_reaches_the_ui_or_the_ledger(
    db: Database, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of the database nor one that the database's own error quotes."""
    [orphan] = db.add_orphans(1)
    db.poison(orphan)
    db.do(
        "CREATE OR REPLACE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'cannot reach postgresql://app:quoted-secret@replica/app'; END $$"
    )
    url = make_url(db.url)
    secret = url.password or "secret-of-our-own"  # where the server asks for none, any will do
    address = url.set(password=secret).render_as_string(hide_password=False)
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", address)
    state = await sweep(api)
    assert state.is_failed()
    run_id = flow_run_of(state)
    until(lambda: any("FAILED" in line for line in api.logs(run_id)), "the flow run's logs")
    shown = json.dumps(
        [api.flow_run(run_id), api.task_runs(run_id), api.artifacts(run_id), api.logs(run_id)]
    )
    kept = json.dumps([db.sweeps(), db.verdicts()], default=str)
    assert "cannot reach postgresql://app:***@replica/app" in shown
    assert "cannot reach postgresql://app:***@replica/app" in kept
    assert "quoted-secret" not in shown + kept
    assert secret not in shown + kept


async def test_recovery_that_is_switched_off_touches_nothing(
    db: Database, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    [orphan] = db.add_orphans(1)
    monkeypatch.setenv("ORPHAN_RECOVERY_ENABLED", "false")
    state = await sweep(api)
    assert state.is_completed()
    assert state.message == ("recovery is switched off: nothing was read and nothing was marked")
    assert db.status(orphan) == "running"
    assert db.sweeps() == []
    assert await asyncio.to_thread(level_of, api, state) == logging.WARNING


async def test_what_a_sweep_warns_of_is_a_warning_in_the_log_of_its_flow_run(
    db: Database, api: Api
) -> None:
    db.add_run("ahead", age="-1 hour")
    ahead = await sweep(api)
    db.do("UPDATE worker_runs SET created_at = now(), started_at = now()")
    well = await sweep(api)
    levels = [await asyncio.to_thread(level_of, api, state) for state in (ahead, well)]
    assert levels == [logging.WARNING, logging.INFO]


def level_of(api: Api, state: State[Any]) -> int:
    """Of the headline in the flow run's log, once it has arrived."""
    mine = {"flow_run_id": {"any_": [str(flow_run_of(state))]}}

    def told() -> list[int]:
        return [
            log["level"] for log in api.find("logs", logs=mine) if log["message"] == state.message
        ]

    until(lambda: bool(told()), "the headline in the log")
    return told()[0]


async def test_a_run_that_finishes_while_its_task_waits_is_left_alone(
    db: Database, api: Api
) -> None:
    finishing, other = db.add_orphans(2)
    with db.connect() as worker:
        worker.execute(
            "UPDATE worker_runs SET status = 'completed', success = true WHERE id = %s",
            (finishing,),
        )
        sweeping = asyncio.create_task(sweep(api))
        await asyncio.to_thread(db.await_lock_wait)
    state = await sweeping
    assert state.is_completed()
    assert "1 marked crashed, 1 finished first" in (state.message or "")
    # The statement saw it, under the row's lock; nothing had to refuse it.
    assert marks(api.task_runs(flow_run_of(state)))[finishing]["state_type"] == "COMPLETED"
    assert db.statuses() == {finishing: "completed", other: "crashed"}
    assert db.outcomes() == {finishing: "finished_first", other: "marked"}
