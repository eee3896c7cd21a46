"""The dashboard's summary."""

import json
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError

from orphan_recovery import get_crash_recovery_summary, recover_orphaned_runs
from support import Database, free_port
from tables_support import configure


async def test_the_newest_ten_crashes_come_newest_first(db: Database) -> None:
    for n in range(12):
        db.add_run(f"run-{n:02}", worker=f"w{n}", tenant=f"t{n}")
        await recover_orphaned_runs()
    db.add_run("failed", status="failed")
    summary = await get_crash_recovery_summary()
    assert summary["total_crashed"] == 12
    recent = summary["recent_crashes"]
    assert [crash["run_id"] for crash in recent] == [f"run-{n:02}" for n in range(11, 1, -1)]
    assert set(recent[0]) == {
        *("run_id", "worker_id", "tenant_id", "created_at", "crashed_at", "error")
    }
    assert (recent[0]["worker_id"], recent[0]["tenant_id"]) == ("w11", "t11")
    assert recent[0]["created_at"] < recent[0]["crashed_at"]
    assert recent[0]["crashed_at"].endswith("Z")
    assert recent[0]["error"].startswith("orphaned: no sign of life")
    json.dumps(summary)


async def test_with_nothing_crashed_it_is_empty(db: Database) -> None:
    none = {"verdicts": 0, "contested": 0, "rate": 0.0, "by_task": [], "by_worker": []}
    told = await get_crash_recovery_summary()
    assert told == {"total_crashed": 0, "recent_crashes": [], "contests": none}


async def test_a_crash_without_a_time_comes_last(db: Database) -> None:
    db.add_run("no-time", status="crashed")
    db.add_run("orphan")
    await recover_orphaned_runs()
    recent = (await get_crash_recovery_summary())["recent_crashes"]
    assert [(crash["run_id"], crash["crashed_at"] is None) for crash in recent] == [
        ("orphan", False),
        ("no-time", True),
    ]


@pytest.mark.parametrize("crashed", ["crashed", "failed"], ids=["by rows", "by the ledger"])
async def test_a_time_that_no_clock_reaches_is_told_as_none(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashed: str
) -> None:
    described = f"[targets.default]\ncrashed = '{crashed}'\nterminal = ['{crashed}']\n"
    configure(tmp_path, monkeypatch, described, "default")
    db.add_run("orphan")
    await recover_orphaned_runs()
    db.do("ALTER TABLE worker_runs DISABLE TRIGGER USER")
    db.do("UPDATE worker_runs SET created_at = 'infinity', completed_at = 'infinity'")
    [crash] = (await get_crash_recovery_summary())["recent_crashes"]
    assert (crash["run_id"], crash["created_at"]) == ("orphan", None)
    assert (crash["crashed_at"] is None) is (crashed == "crashed")


async def test_a_lost_database_is_raised_and_not_shown_as_no_crashes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://127.0.0.1:{free_port()}/nowhere")
    monkeypatch.delenv("ORPHAN_RECOVERY_DATABASE_URL", raising=False)
    with pytest.raises(DBAPIError):
        await get_crash_recovery_summary()
