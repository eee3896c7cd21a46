"""The command line, run as a person or a script runs it: output, and an exit code to trust."""

import json
import logging
import re
from pathlib import Path

import pytest
from sqlalchemy import make_url

from cli_support import run
from orphan_recovery.log import WaitFormatter
from support import Database, ended_in_the_ledger, free_port, open_in_the_ledger


def test_migrate_sweep_summary(blank: Database) -> None:
    first = run("migrate")
    assert (first.returncode, first.stderr) == (0, "")
    assert "went from revision none to ledger_0001, runs_0001" in first.stdout
    assert "made: an index that serves detection: worker_runs_in_flight" in first.stdout
    assert "is at revision ledger_0001, runs_0001 already" in run("migrate").stdout
    orphans = blank.add_orphans(2)
    blank.add_run("alive", age="1 minute")

    looked = run("sweep", "--dry-run")
    assert looked.returncode == 0
    assert "dry run: 2 orphaned runs would be judged, nothing was written" in looked.stdout
    assert blank.sweeps() == []

    swept = run("sweep", "--reason", "node lost")
    assert swept.returncode == 0
    assert "2 orphaned runs detected: 2 marked crashed" in swept.stdout
    for orphan in orphans:
        assert orphan in swept.stdout
    assert blank.statuses() == {**dict.fromkeys(orphans, "crashed"), "alive": "running"}
    assert blank.sweeps()[0]["asked_by"].startswith("orphan-recovery sweep on ")

    told = json.loads(run("summary", "--json").stdout)
    assert told["total_crashed"] == 2
    assert told["recent_crashes"][0]["error"].startswith("node lost; ")
    blank.add_run("nobody's", worker=None, tenant=None)
    run("sweep")
    shown = run("summary").stdout
    assert "3 crashed in all" in shown
    assert f"  {orphans[0]}  (worker worker-1, no tenant)" in shown
    assert "  nobody's  (no worker, no tenant)" in shown


def test_sweep_prints_json_for_scripts_and_nothing_else(db: Database) -> None:
    db.add_orphans(1)
    done = run("sweep", "--json", "--threshold-minutes", "5")
    report = json.loads(done.stdout)
    assert (report["recovered"], report["threshold_minutes"]) == (1, 5)
    assert done.stderr == ""


def test_a_dry_run_with_a_limit_says_how_many_there_are(db: Database) -> None:
    db.add_orphans(5)
    looked = run("sweep", "--dry-run", "--limit", "2").stdout
    assert "dry run: 2 orphaned runs would be judged of 5, nothing was written" in looked


def test_where_a_table_would_be_too_long_it_says_where_the_rest_is(db: Database) -> None:
    db.add_orphans(210)
    assert "200 of 210 are shown: --json lists up to 1,000" in run("sweep", "--dry-run").stdout
    swept = run("sweep").stdout
    assert (
        f"200 of 210 are shown: the ledger has all, of sweep {db.sweeps()[0]['sweep_id']}" in swept
    )


def test_a_run_that_cannot_be_marked_gives_exit_code_1_and_says_what_next(db: Database) -> None:
    orphans = db.add_orphans(2)
    db.poison(orphans[0])
    done = run("sweep")
    assert done.returncode == 1
    assert "1 FAILED" in done.stdout
    assert "poisoned row" in done.stdout
    assert "next: 1 could not be marked" in done.stderr


@pytest.mark.parametrize("command", [["summary"], ["approve", "aaaa"], ["sweep"]], ids=str)
def test_without_a_ledger_each_command_says_what_to_do(
    blank: Database, tmp_path: Path, command: list[str]
) -> None:
    blank.do("CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz)")
    file = tmp_path / "targets.toml"
    file.write_text('[targets.jobs]\ntable = "jobs"\ncrashed = "failed"\n')
    done = run(*command, ORPHAN_RECOVERY_CONFIG=str(file))
    assert done.returncode == 2
    assert "run `orphan-recovery migrate`" in done.stderr


def test_a_role_without_rights_is_told_where_to_find_them(db: Database) -> None:
    db.do("DROP ROLE IF EXISTS reader")
    db.do("CREATE ROLE reader LOGIN")
    db.do("GRANT SELECT ON worker_runs TO reader")
    url = make_url(db.url).set(username="reader").render_as_string(hide_password=False)
    try:
        swept = run("sweep", ORPHAN_RECOVERY_DATABASE_URL=url)
        assert "SQLSTATE 42501" in swept.stdout
        assert "lacks a right: `orphan-recovery sql --target default`, run as" in swept.stderr
        assert "the tables' owner has to run what it prints." in swept.stderr
        asked = run("approve", "aaaa", ORPHAN_RECOVERY_DATABASE_URL=url)
        assert (asked.returncode, asked.stdout) == (1, "")
        assert "This database role lacks a right: `orphan-recovery sql --target " in asked.stderr
        db.do("CREATE SCHEMA locked CREATE TABLE runs (id int PRIMARY KEY)")
        table = {"ORPHAN_RECOVERY_TARGETS__DEFAULT__TABLE": "locked.runs"}
        examined = run("doctor", ORPHAN_RECOVERY_DATABASE_URL=url, **table)
        assert "lacks a right: `orphan-recovery sql --target default`" in examined.stdout
    finally:
        db.do("DROP OWNED BY reader")
        db.do("DROP ROLE reader")


OFTEN = {"ORPHAN_RECOVERY_TARGETS__DEFAULT__HEARTBEAT_SECONDS": "1"}


def test_a_sweep_that_waits_says_in_a_sentence_why(db: Database) -> None:
    ended_in_the_ledger(db, ago="40 minutes")
    db.add_run("run", beat="2 hours")
    done = run("sweep", **OFTEN)
    assert done.returncode == 0
    looks = r"The sweep looks again in \d s, because .*no sweep has looked for 40 min.*\.\n"
    assert re.fullmatch(looks, done.stderr)
    open_in_the_ledger(db)
    done = run("sweep", **OFTEN)
    assert done.stderr == (
        "Another sweep of this table is at work: this one waits for it, ten seconds at most.\n"
    )


@pytest.mark.parametrize("arguments", [["sweep", "--json"], ["-v", "sweep"]], ids=str)
def test_a_script_is_told_nothing_of_it_and_who_reads_events_nothing_twice(
    db: Database, arguments: list[str]
) -> None:
    ended_in_the_ledger(db, ago="40 minutes")
    db.add_run("run", beat="2 hours")
    done = run(*arguments, **OFTEN)
    assert (done.returncode, db.status("run")) == (0, "crashed")
    assert "The sweep looks again" not in done.stderr
    assert done.stderr.count("sweep_looks_twice") == arguments.count("-v")


def test_what_is_left_to_the_next_sweep_is_not_waited_for(db: Database) -> None:
    ended_in_the_ledger(db, ago="40 minutes")
    db.add_run("run", beat="2 hours")
    done = run("sweep", ORPHAN_RECOVERY_TARGETS__DEFAULT__HEARTBEAT_SECONDS="90")
    assert "left to the next sweep, because " in done.stdout
    assert "The sweep looks again" not in done.stderr


def test_every_event_that_is_told_in_words_has_what_the_words_need() -> None:
    record = logging.makeLogRecord({"msg": "sweep_gives_way", "writes_per_second": 7})
    assert WaitFormatter().format(record).startswith("Others write to this server: ")


def test_scope_options_reach_the_sweep(db: Database) -> None:
    db.add_run("a", tenant="t1", worker="w1", age="5 hours")
    db.add_run("b", tenant="t1", worker="w1", age="4 hours")
    db.add_run("c", tenant="t1", worker="w2")
    db.add_run("d", tenant="t2", worker="w1")
    done = run("sweep", "--tenant", "t1", "--worker", "w1", "--limit", "1")
    assert done.returncode == 0
    assert [run for run, status in db.statuses().items() if status == "crashed"] == ["a"]
    assert db.sweeps()[0]["scope"] == {"tenant": "t1", "worker": "w1", "limit": 1}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["sweep", "--threshold-minutes", "0"], {}, "threshold_minutes is 0"),
        (["sweep", "--threshold-minutes", "-5"], {}, "threshold_minutes is -5"),
        (["sweep", "--threshold-minutes", "abc"], {}, "Invalid value for '--threshold-minutes'"),
        (["sweep", "--worker", ""], {}, "worker is ''"),
        (["sweep", "--limit", "0"], {}, "limit is 0"),
        (["sweep", "--nonsense"], {}, "No such option"),
        (["nonsense"], {}, "No such command"),
        (["sweep"], {"ORPHAN_THRESHOLD_MINUTES": "0"}, "ORPHAN_THRESHOLD_MINUTES is '0'"),
        (["sweep"], {"ORPHAN_RECOVERY_ENABLED": "maybe"}, "ORPHAN_RECOVERY_ENABLED is 'maybe'"),
        (["summary"], {"ORPHAN_RECOVERY_DATABASE_URL": "mysql://u:S3cret@h/d"}, "only Postgres"),
        (["trigger"], {"PREFECT_API_URL": ""}, "set PREFECT_API_URL"),
        (["serve"], {"PREFECT_API_URL": ""}, "set PREFECT_API_URL"),
        (["trigger", "--tenant", ""], {"PREFECT_API_URL": ""}, "tenant is ''"),
    ],
)
def test_bad_usage_and_configuration_give_exit_code_2_and_a_clear_line(
    db: Database, tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    db.add_run("run")
    done = run(*arguments, **{"PREFECT_HOME": str(tmp_path), **environment})
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "S3cret" not in done.stderr
    assert db.status("run") == "running"


@pytest.mark.parametrize("arguments", [["sweep"], ["sweep", "--dry-run"]], ids=str)
def test_an_empty_database_names_the_way_out(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments, ORPHAN_RECOVERY_CONFIG="")
    assert done.returncode == 2
    assert "run `orphan-recovery migrate`" in done.stderr
    missed = f"there is no orphan-recovery.toml in {tmp_path}, and ORPHAN_RECOVERY_CONFIG names no"
    assert missed in done.stderr, "perhaps another table was meant"
    (tmp_path / "orphan-recovery.toml").touch()
    assert missed not in run(*arguments, ORPHAN_RECOVERY_CONFIG="").stderr


def test_a_lost_database_gives_exit_code_1_and_no_traceback() -> None:
    url = f"postgresql://me:S3cret@127.0.0.1:{free_port()}/nowhere"
    for command in ("summary", "migrate"):
        done = run(command, ORPHAN_RECOVERY_DATABASE_URL=url)
        assert done.returncode == 1
        assert "orphan-recovery: OperationalError: connection" in done.stderr
        assert "S3cret" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture
def unreachable(tmp_path: Path) -> dict[str, str]:
    """The environment of two targets, at whose addresses nobody listens."""
    file = tmp_path / "targets.toml"
    file.write_text('[targets.dj]\ndatabase_url_env = "DJ_DB"\n[targets.uu]\n')
    url = f"postgresql://me:S3cret@127.0.0.1:{free_port()}/nowhere"
    return {
        "ORPHAN_RECOVERY_CONFIG": str(file),
        "DJ_DB": url,
        "ORPHAN_RECOVERY_DATABASE_URL": "",
        "DATABASE_URL": url,
    }


@pytest.mark.parametrize(("target", "variable"), [("dj", "DJ_DB"), ("uu", "DATABASE_URL")])
def test_a_database_that_cannot_be_reached_is_named_by_target_and_variable(
    unreachable: dict[str, str], target: str, variable: str
) -> None:
    told = f"Target '{target}' takes its address from {variable}. See whether it is right, and wh"
    summed = run("summary", "--target", target, **unreachable)
    assert summed.returncode == 1
    assert told in summed.stderr
    swept = run("sweep", "--target", target, **unreachable)
    assert swept.returncode == 1
    assert f"next: {told}" in swept.stderr
    assert "S3cret" not in summed.stderr + swept.stdout + swept.stderr


def test_what_is_no_fault_of_an_address_is_not_laid_to_it(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blank.do("CREATE ROLE blind LOGIN")
    url = make_url(blank.url).set(username="blind").render_as_string(hide_password=False)
    try:
        run("migrate")
        told = run("summary", ORPHAN_RECOVERY_DATABASE_URL=url).stderr
        assert "`orphan-recovery sql --target default`, run as one that has it" in told
        assert "takes its address from" not in told
    finally:
        blank.do("DROP ROLE blind")


def test_each_command_is_told_whole_in_the_list_of_all() -> None:
    told = run("--help", COLUMNS="80").stdout
    commands = told.partition("Commands:\n")[2].splitlines()
    assert len(commands) == 11
    for line in commands:
        assert re.fullmatch(r"  [a-z]+ +[A-Z][^.]{,57}\.", line), line


def test_of_all_targets_each_is_named_once(db: Database, tmp_path: Path) -> None:
    file = tmp_path / "targets.toml"
    file.write_text("[targets.dj]\n")
    swept = run("sweep", "--all-targets", ORPHAN_RECOVERY_CONFIG=str(file)).stdout
    assert swept.startswith("dj: no orphaned run found (threshold 30 minutes")
    swept = run("sweep", "--all-targets", ORPHAN_RECOVERY_CONFIG="").stdout
    assert swept.startswith("default: no orphaned run found (threshold 30 minutes")
    assert run("sweep", ORPHAN_RECOVERY_CONFIG=str(file)).stdout.startswith("dj: no orphaned run ")
    off = {"ORPHAN_RECOVERY_CONFIG": str(file), "ORPHAN_RECOVERY_ENABLED": "false"}
    assert run("sweep", **off).stdout.startswith("dj: recovery is switched off")


def test_switched_off_it_says_so(db: Database) -> None:
    db.add_run("run")
    done = run("sweep", ORPHAN_RECOVERY_ENABLED="false")
    assert done.returncode == 0
    assert "recovery is switched off" in done.stdout
    assert "unset it to switch it on" in done.stderr
    assert db.status("run") == "running"


def test_migrate_down_takes_the_schema_away_and_keeps_rows(db: Database) -> None:
    db.add_run("run")
    done = run("migrate", "--down")
    assert (done.returncode, done.stderr) == (0, "")
    assert db.one("SELECT to_regnamespace('orphan_recovery')") is None
    assert db.status("run") == "running"
