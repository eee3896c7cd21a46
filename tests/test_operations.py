"""What deployments/ tells an operator to run, run as it is told."""

import os
import re
import subprocess
import sys
from typing import Any

import psycopg
import pytest

from prefect_support import ROOT
from support import Database

HERE = ROOT / "deployments"


def test_old_rows_are_retired_by_the_statements_in_the_readme(db: Database) -> None:
    runs, ledger = statements_under("Keeping the tables small")
    old, new = "now() - interval '500 days'", "now()"
    for name, at in (("old", old), ("new", new)):
        db.add_run(name, age="500 days")
        db.do(f"UPDATE worker_runs SET status = 'failed', completed_at = {at} WHERE id = %s", name)
        db.do(
            "WITH sweep AS (INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name,"
            " asked_by, reason, threshold, scope, version, opened_at, ended_at, ended_as) VALUES"
            f" (gen_random_uuid(), 'default', 't', %s, 'r', '1 hour', '{{}}', '0', {at}, {at},"
            " 'completed') RETURNING sweep_id) INSERT INTO orphan_recovery.verdicts (sweep_id,"
            " run_id, target, outcome, status_seen, sign_of_life, evidence, silence, threshold,"
            " rule, reason, judged_at) SELECT sweep_id, %s, 'default', 'marked', 'running', now(),"
            f" 'age', '1 hour', '1 hour', 'r', 'r', {at} FROM sweep",
            *(name, name),
        )
    db.add_run("in flight", age="500 days")
    history_around(db)
    with db.connect(autocommit=True) as owner:
        for statement in (runs, ledger, runs, ledger):
            owner.execute(statement.encode())
    assert db.statuses() == {"new": "failed", "in flight": "running"}
    held = {"holds still", "held until now", "closed a hold now"}
    assert {sweep["asked_by"] for sweep in db.sweeps()} == {
        "new",
        "answered since",
        "answers one since",
        *held,
    }
    assert list(db.outcomes()) == ["new"]
    assert db.do("SELECT run_id FROM orphan_recovery.contests") == []
    for table in ("holds", "hold_runs", "approvals"):
        assert db.one(f"SELECT count(DISTINCT hold_id) FROM orphan_recovery.{table}") == 2
    for guarded in ("worker_runs WHERE id = 'new'", "orphan_recovery.verdicts"):
        with pytest.raises(psycopg.errors.RaiseException, match="VIOLATION"):
            db.do(f"DELETE FROM {guarded}")
    with pytest.raises(psycopg.errors.RaiseException, match="LEDGER_VIOLATION"):
        db.do("DELETE FROM orphan_recovery.sweeps")


def history_around(db: Database) -> None:
    """All that a sweep of long ago may have left, and what of it is not to be retired yet."""
    old, new = "now() - interval '500 days'", "now()"
    ids: dict[str, Any] = {}
    for asked_by, at, seen_by in (
        ("long ago", old, None),
        ("answered long ago", old, "long ago"),
        ("answers one since", old, None),
        ("answered since", new, "answers one since"),
        ("held long ago", old, None),
        ("holds still", old, None),
        ("held until now", old, None),
        ("closed a hold now", new, None),
    ):
        [row] = db.do(
            "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
            " threshold, scope, version, seen_by, opened_at, ended_at, ended_as) VALUES"
            f" (gen_random_uuid(), 'default', 't', %s, 'r', '1 hour', '{{}}', '0', %s, {at}, {at},"
            " 'completed') RETURNING sweep_id",
            *(asked_by, seen_by and ids[seen_by]),
        )
        ids[asked_by] = row["sweep_id"]
    db.do(
        "INSERT INTO orphan_recovery.contests (sweep_id, run_id, target, reported_status,"
        f" reported_at) VALUES (%s, 'old', 'default', 'completed', {old})",
        ids["long ago"],
    )
    for held_by, ended_at, ended_by in (
        ("held long ago", old, ids["long ago"]),
        ("held until now", new, ids["closed a hold now"]),
        ("holds still", "NULL::timestamptz", None),
    ):
        [hold] = db.do(
            "INSERT INTO orphan_recovery.holds (hold_id, target, sweep_id, opened_at, evidence,"
            f" ended_at, ended_as, ended_by) VALUES (gen_random_uuid(), 'default', %s, {old},"
            f" '{{}}', {ended_at}, CASE WHEN {ended_at} IS NOT NULL THEN 'released' END, %s)"
            " RETURNING hold_id",
            *(ids[held_by], ended_by),
        )
        db.do("INSERT INTO orphan_recovery.hold_runs VALUES (%s, 'old')", hold["hold_id"])
        db.do(
            "INSERT INTO orphan_recovery.approvals (hold_id, approved_at, expires_at,"
            f" approved_by) VALUES (%s, {old}, {old}, 'somebody')",
            hold["hold_id"],
        )


def statements_under(heading: str) -> list[str]:
    text = (HERE / "README.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```sql\n(.*?)```", text, re.S)


def test_every_file_is_in_the_readme_and_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (HERE / "README.md").read_text())
    assert [link for link in links if not (HERE / link).exists()] == []
    files = {path.name for path in HERE.iterdir() if path.is_file()}
    assert files - set(links) == {"README.md"}


def test_a_worker_recovers_before_it_takes_runs(db: Database) -> None:
    orphan = db.add_run("orphan")
    done = start_worker()
    assert done.returncode == 0
    assert "1 orphaned run detected: 1 marked crashed" in done.stderr
    assert re.search(r"orphaned_runs_detected .* count=1 run_ids=\['orphan'\]", done.stderr)
    assert done.stderr.rstrip().endswith("ready for runs")
    assert db.status(orphan) == "crashed"


def test_a_worker_starts_although_its_recovery_failed(db: Database) -> None:
    db.do("DROP SCHEMA orphan_recovery CASCADE")
    done = start_worker()
    assert done.returncode == 0
    assert "ERROR   recovery at start" in done.stderr
    assert done.stderr.rstrip().endswith("ready for runs")


def start_worker() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "worker_startup.py")],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
