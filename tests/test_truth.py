"""The truth trigger and the ledger's: what is terminal, or written down, never changes."""

from typing import LiteralString
from uuid import uuid4

import psycopg
import pytest

from orphan_recovery import recover_orphaned_runs
from support import Database

FORBIDDEN: list[LiteralString] = [
    "status = 'running'",
    "status = 'completed', success = true",
    "success = NULL",
    "error = 'another story'",
    """output_json = '{"late": "result"}'""",
    "started_at = now()",
    "completed_at = now()",
    "worker_id = 'thief'",
    "tenant_id = 'thief'",
    "id = 'other'",
]


@pytest.mark.parametrize("status", ["crashed", "failed"])
@pytest.mark.parametrize("change", FORBIDDEN)
def test_a_terminal_run_never_changes(db: Database, status: str, change: LiteralString) -> None:
    db.add_run("run", status=status)
    db.do("UPDATE worker_runs SET success = true WHERE false")
    db.do("ALTER TABLE worker_runs DISABLE TRIGGER prevent_worker_run_mutation")
    db.do("UPDATE worker_runs SET success = false, error = 'first story'")
    db.do("ALTER TABLE worker_runs ENABLE TRIGGER prevent_worker_run_mutation")
    before = db.do("SELECT * FROM worker_runs")
    with pytest.raises(psycopg.errors.RaiseException, match=r"^TRUTH_VIOLATION: run run") as raised:
        db.do("UPDATE worker_runs SET " + change)
    assert raised.value.sqlstate == "P0001"
    assert db.do("SELECT * FROM worker_runs") == before


@pytest.mark.parametrize("status", ["completed", "failed", "crashed"])
def test_a_terminal_run_is_never_deleted(db: Database, status: str) -> None:
    db.add_run("run", status=status)
    with pytest.raises(psycopg.errors.RaiseException, match=r"^TRUTH_VIOLATION"):
        db.do("DELETE FROM worker_runs")
    assert db.statuses() == {"run": status}


def test_what_is_no_truth_may_still_be_written(db: Database) -> None:
    db.add_run("run", status="crashed")
    db.do("UPDATE worker_runs SET heartbeat_at = now(), task = 'renamed', status = 'crashed'")
    db.do(
        "INSERT INTO worker_runs (id, parent_run_id, attempt, is_retry)"
        " VALUES ('b', 'run', 2, true)"
    )
    db.do("UPDATE worker_runs SET parent_run_id = 'other', attempt = 3, is_retry = true")
    db.add_run("live")
    db.do("DELETE FROM worker_runs WHERE id = 'live'")
    assert set(db.statuses()) == {"run", "b"}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE orphan_recovery.verdicts SET outcome = 'vanished'",
        "DELETE FROM orphan_recovery.verdicts",
        "TRUNCATE orphan_recovery.verdicts",
        "UPDATE orphan_recovery.sweeps SET ended_as = 'died'",
        "UPDATE orphan_recovery.sweeps SET ended_at = NULL, ended_as = NULL",
        "DELETE FROM orphan_recovery.sweeps",
        "TRUNCATE orphan_recovery.sweeps CASCADE",
    ],
)
async def test_the_ledger_is_append_only(db: Database, change: LiteralString) -> None:
    db.add_run("run")
    await recover_orphaned_runs()
    before = (db.sweeps(), db.verdicts())
    with pytest.raises(psycopg.errors.RaiseException, match=r"^LEDGER_VIOLATION") as raised:
        db.do(change)
    assert raised.value.sqlstate == "P0001"
    assert (db.sweeps(), db.verdicts()) == before


def test_a_verdict_of_no_sweep_is_refused(db: Database) -> None:
    with pytest.raises(psycopg.errors.ForeignKeyViolation, match=r"^LEDGER_VIOLATION"):
        db.do(
            "INSERT INTO orphan_recovery.verdicts (sweep_id, run_id, target, outcome, status_seen,"
            " sign_of_life, evidence, silence, threshold, rule, reason, judged_at) VALUES"
            " (gen_random_uuid(), 'x', 'default', 'marked', 'running', now(), 'age', '1 h', '1 h',"
            " 'r', 'r', now())"
        )
    assert db.verdicts() == []


async def test_verdicts_of_several_sweeps_are_refused_if_there_is_none_of_one(
    db: Database,
) -> None:
    """Wherever among the others they stand, which are written if each has its sweep."""
    db.add_run("run")
    await recover_orphaned_runs()
    [sweep] = db.sweeps()
    known, unknown = sweep["sweep_id"], uuid4()
    add = (
        "INSERT INTO orphan_recovery.verdicts (sweep_id, run_id, target, outcome, status_seen,"
        " sign_of_life, evidence, silence, threshold, rule, reason, judged_at) SELECT told,"
        " 'x' || n, 'default', 'vanished', 'running', now(), 'age', '1 h', '1 h', 'r', 'r', now()"
        " FROM unnest(%s::uuid[]) WITH ORDINALITY AS one (told, n)"
    )
    for several in ([known, known, unknown], [unknown, known], [unknown, unknown]):
        with pytest.raises(psycopg.errors.ForeignKeyViolation, match=str(unknown)):
            db.do(add, several)
    db.do(
        "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
        " threshold, scope, version, opened_at) VALUES (%s, 'default', 'worker_runs', 'test',"
        " 'test', '30 minutes', '{}', '0', now())",
        unknown,
    )
    db.do(add, [known, unknown])
    assert len(db.verdicts()) == 3


def test_an_open_sweep_may_be_closed_and_nothing_else(db: Database) -> None:
    db.do(
        "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
        " threshold, scope, version, opened_at) VALUES (gen_random_uuid(), 'default',"
        " 'worker_runs', 'test', 'test', '30 minutes', '{}', '0', now())"
    )
    with pytest.raises(psycopg.errors.RaiseException, match=r"^LEDGER_VIOLATION"):
        db.do(
            "UPDATE orphan_recovery.sweeps SET asked_by = 'someone else',"
            " ended_at = now(), ended_as = 'completed'"
        )
    db.do("UPDATE orphan_recovery.sweeps SET ended_at = now(), ended_as = 'completed'")
