"""Targets: a description is understood whole, or refused whole, before anything is touched.

Each mistake is one clear error: it names the file or the variable, the key, and the way out.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from cli_support import run
from orphan_recovery import ConfigurationError
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Elsewhere, Rule, split_table
from orphan_recovery.targets import find_target, load_targets
from support import Database, database_of_its_own, free_port

EXAMPLE = """
[targets.billing]
database_url_env = "BILLING_DATABASE_URL"
table = "public.jobs"
in_flight = ["claimed", "running"]
crashed = "dead"
threshold_minutes = 45

[targets.billing.columns]
id = "job_id"
status = "state"
worker_id = "locked_by"
tenant_id = "account"
task = "kind"
created_at = "inserted_at"
error = "last_error"

[targets.billing.worker_heartbeat]
table = "public.processes"
key = "name"
run_key = "locked_by"
last_seen = "pinged_at"

[[targets.billing.rules]]
match = { task = "export-*" }
threshold_minutes = 480

[[targets.billing.rules]]
match = { tenant_id = "internal" }
never = true
"""

EXAMPLE_TABLES = """
CREATE TABLE processes (name text PRIMARY KEY, pinged_at timestamptz NOT NULL);
CREATE TABLE jobs (
    job_id bigint PRIMARY KEY, state text NOT NULL, locked_by text, account text, kind text,
    inserted_at timestamptz NOT NULL, last_error text
);
"""

ENVIRONMENT = "ORPHAN_RECOVERY_TARGETS__BILLING__"


class File:
    """The file that describes the targets; the environment names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def says(self, text: str) -> None:
        self.path.write_text(text)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> File:
    for name in os.environ:
        if name.startswith("ORPHAN_"):
            monkeypatch.delenv(name)
    file = File(tmp_path / "orphan-recovery.toml")
    monkeypatch.setenv("ORPHAN_RECOVERY_CONFIG", str(file))
    return file


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[None]:
    """Prefect as it is on a machine where no API is named."""
    with temporary_settings({PREFECT_HOME: tmp_path}, restore_defaults={PREFECT_API_URL}):
        yield


def request(*, dry_run: bool = False) -> SweepRequest:
    return SweepRequest(asked_by="test", target=find_target(), dry_run=dry_run)


def refusal() -> str:
    """Why the file and the environment are refused, in one line."""
    with pytest.raises(ConfigurationError) as raised:
        load_targets()
    told = str(raised.value)
    assert "\n" not in told
    return told


def test_the_example_is_understood_whole(file: File) -> None:
    file.says(EXAMPLE)
    target = find_target("billing")
    assert target.database_url_env == "BILLING_DATABASE_URL"
    assert (target.table, split_table(target.table)) == ("public.jobs", ("public", "jobs"))
    assert (target.in_flight, target.crashed) == (("claimed", "running"), "dead")
    assert target.threshold_minutes == 45
    assert target.columns.id == ("job_id",)
    assert (target.columns.status, target.columns.worker_id) == ("state", "locked_by")
    assert target.columns.heartbeat_at is None, "not named, so looked for by this name"
    assert target.worker_heartbeat == Elsewhere(
        table="public.processes", key="name", run_key="locked_by", last_seen="pinged_at"
    )
    assert target.rules == (
        Rule(match={"task": "export-*"}, threshold_minutes=480),
        Rule(match={"tenant_id": "internal"}, never=True),
    )
    assert not target.is_default_table
    assert find_target() == target, "the only one is meant by default"


async def test_the_example_is_swept_as_it_says(
    file: File, blank: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.says(EXAMPLE)
    monkeypatch.setenv("BILLING_DATABASE_URL", blank.url)
    monkeypatch.delenv("ORPHAN_RECOVERY_DATABASE_URL")
    with blank.connect(autocommit=True) as owner:
        owner.execute(EXAMPLE_TABLES.encode())
    blank.do("INSERT INTO processes VALUES ('dead', now() - interval '3 hours'), ('alive', now())")
    blank.do(
        "INSERT INTO jobs SELECT id, state, worker, account, kind, now() - interval '3 hours' FROM"
        " (VALUES (1, 'running', 'dead', 'acme', 'mail'), (2, 'claimed', 'gone', 'acme', 'mail'),"
        " (3, 'running', 'alive', 'acme', 'mail'), (4, 'running', 'dead', 'acme', 'export-all'),"
        " (5, 'running', 'dead', 'internal', 'mail'), (6, 'done', 'dead', 'acme', 'mail'))"
        " AS job (id, state, worker, account, kind)"
    )
    assert "revision ledger_0001" in migrate(find_target()).done
    report = await run_sweep(request())
    assert (report.error, report.detected, report.recovered) == (None, 2, 2)
    states = {row["job_id"]: row["state"] for row in blank.do("SELECT job_id, state FROM jobs")}
    assert states == {1: "dead", 2: "dead", 3: "running", 4: "running", 5: "running", 6: "done"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("jobs", (None, "jobs")),
        ("public.Jobs", ("public", "Jobs")),
        ('"my.schema"."a ""table"""', ("my.schema", 'a "table"')),
        ('public."jobs.2"', ("public", "jobs.2")),
        ("jöbs größe", (None, "jöbs größe")),
    ],
)
def test_a_table_is_named_as_the_catalogue_has_it(name: str, parts: tuple[str, str]) -> None:
    assert split_table(name) == parts


def test_without_a_file_there_is_the_default_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORPHAN_RECOVERY_CONFIG", raising=False)
    [(name, target)] = load_targets().items()
    assert (name, target.table, target.is_default_table) == ("default", "worker_runs", True)
    Path("orphan-recovery.toml").write_text(EXAMPLE)
    assert list(load_targets()) == ["billing"], "the file of the working directory is read"


HEAD = "[targets.billing]\n"
COLUMNS = f"{HEAD}[targets.billing.columns]\n"
IN_FLIGHT = "in_flight = ['running', 'on hold']\n"
RULE = f"{HEAD}[[targets.billing.rules]]\nmatch = {{ task = 'x' }}\n"
ELSEWHERE = (
    f"{HEAD}[targets.billing.worker_heartbeat]\ntable = 'w'\nkey = 'id'\nrun_key = 'worker_id'\n"
)


def rule_for(status: str) -> str:
    return f"[[targets.billing.rules]]\nmatch = {{ status = '{status}' }}\nnever = true\n"


@pytest.mark.parametrize(
    ("text", "place", "way_out"),
    [
        ("threshold_minutes = 5", "threshold_minutes is no key", "known are targets"),
        ("[target.billing]", "target is no key", "did you mean 'targets'?"),
        (f"{HEAD}tabel = 'x'", "targets.billing.tabel is no key", "did you mean 'table'?"),
        (
            f"{HEAD}database_url_secret = 'postgresql://me:S3cret@host/db'",
            "targets.billing.database_url_secret: give the name of a Prefect Secret block",
            "lower-case letters",
        ),
        (f"{HEAD}name = 'x'", "targets.billing has a key 'name'", "its heading is its name"),
        (
            f"{COLUMNS}heartbeat = 'x'",
            "targets.billing.columns.heartbeat is no key",
            "did you mean 'heartbeat_at'?",
        ),
        (
            f"{ELSEWHERE}last_seen = 'x'\nlastseen = 'x'",
            "targets.billing.worker_heartbeat.lastseen is no key",
            "did you mean 'last_seen'?",
        ),
        (f"{RULE}nevr = true", "targets.billing.rules.0.nevr is no key", "did you mean 'never'?"),
        (f"{HEAD}table =", "is not TOML", "at end of document"),
        (f"{HEAD}\ntable = public.jobs", "is not TOML", "line 3"),
        (HEAD + HEAD, "Cannot declare ('targets', 'billing') twice", "line 2"),
        (
            f"{HEAD}database_url_env = 'A'\ndatabase_url_secret = 'b'",
            "targets.billing: database_url_env and database_url_secret are both given",
            "a target has one source",
        ),
        (
            f"{COLUMNS}worker_id = 'who'\ntenant_id = 'who'",
            "targets.billing: worker_id and tenant_id are both the column 'who'",
            "",
        ),
        (f"{COLUMNS}worker_id = ''", "targets.billing.columns.worker_id is ''", "or false to"),
        (f"{COLUMNS}id = []", "targets.billing.columns.id", "at least 1"),
        (ELSEWHERE, "targets.billing.worker_heartbeat.last_seen", "required"),
        (RULE, "targets.billing.rules.0", "give either threshold_minutes, or never = true"),
        (
            f"{RULE}never = true\nthreshold_minutes = 5",
            "targets.billing.rules.0",
            "give either threshold_minutes, or never = true",
        ),
        (
            f"{HEAD}[[targets.billing.rules]]\nmatch = {{ taks = 'x' }}\nnever = true",
            "targets.billing.rules.0: match looks at 'taks'",
            "it may look at task, tenant_id, worker_id, status",
        ),
        (
            f"{HEAD}[[targets.billing.rules]]\nmatch = {{}}\nnever = true",
            "targets.billing.rules.0.match",
            "at least 1",
        ),
        ("[targets.Billing]", "the target's name is 'Billing'", "lower-case letters"),
        ("[targets.'my jobs']", "the target's name is 'my jobs'", "lower-case letters"),
        ("[targets.1st]", "the target's name is '1st'", "beginning with a letter"),
        ("[targets.'']", "the target's name is ''", "lower-case letters"),
        (f"[targets.{'x' * 64}]", "the target's name is 'xxx", "lower-case letters"),
        (f"{HEAD}table = 'a.b.c'", "table is 'a.b.c'", "give table or schema.table"),
        (f"{HEAD}table = 'jobs.'", "table is 'jobs.'", "give table or schema.table"),
        (f"{HEAD}in_flight = []", "targets.billing.in_flight", "at least 1"),
        (f"{HEAD}in_flight = 'running'", "targets.billing.in_flight is 'running'", "list"),
        (
            f"{HEAD}crashed = 'running'",
            "crashed is 'running'",
            "a mark must end a run; give another",
        ),
        (f"{HEAD}waiting = ['queued']", "in_flight and waiting both have queued", ""),
        (f"{HEAD}terminal = ['done']", "crashed is 'crashed', which terminal does not have", ""),
        (f"{HEAD}truth_trigger = true", "truth_trigger needs to know", "give terminal"),
        (f"{HEAD}release = ['status']", "release has 'status'", "which the mark writes"),
        (f"{HEAD}heartbeat_seconds = 0", "targets.billing.heartbeat_seconds is 0", "than 0"),
        (f"{HEAD}heartbeat_seconds = 1e300", "targets.billing.heartbeat_seconds is 1e+300", ""),
        (f"{HEAD}heartbeat_seconds = inf", "targets.billing.heartbeat_seconds is inf", ""),
        (
            f"{HEAD}threshold_minutes = 0",
            "targets.billing.threshold_minutes is 0",
            "give at least 1",
        ),
        (
            f"{HEAD}threshold_minutes = -5",
            "targets.billing.threshold_minutes is -5",
            "give at least 1",
        ),
        (f"{HEAD}threshold_minutes = 'abc'", "threshold_minutes is 'abc'", "give a whole number"),
        (f"{HEAD}threshold_minutes = 1.5", "threshold_minutes is 1.5", "give a whole number"),
        (f"{HEAD}threshold_minutes = true", "targets.billing.threshold_minutes is True", ""),
        (
            f"{HEAD}heartbeat_seconds = 0",
            "targets.billing.heartbeat_seconds is 0",
            "give more than 0",
        ),
        (f"{HEAD}threshold_minutes = 9999999", "targets.billing.threshold_minutes is 9", "at most"),
        (f"{RULE}threshold_minutes = 0", "targets.billing.rules.0.threshold_minutes is 0", "1"),
        (
            f"{RULE}never = true\n{rule_for('que?')}",
            "targets.billing.rules.1.match.status is 'que?', which is none of in_flight",
            "('queued', 'running'): the rule would match no run; name one of these",
        ),
        *(
            (f"{HEAD}{IN_FLIGHT}{rule_for(pattern)}", f"0.match.status is '{pattern}', ", "none of")
            for pattern in ("crashed", "runnin", "running?", "?n hol", "r.nning", "[r]unning")
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_error_with_file_key_and_way_out(
    file: File, text: str, place: str, way_out: str
) -> None:
    file.says(text)
    told = refusal()
    assert told.startswith(str(file))
    assert told.count(str(file)) == 1, "one mistake is told once"
    assert place in told
    assert way_out in told


def test_all_mistakes_are_told_at_once(file: File) -> None:
    file.says(f"{HEAD}tabel = 'x'\nthreshold_minutes = 0\n[targets.other]\ncrashed = ''")
    told = refusal()
    for key in ("billing.tabel", "billing.threshold_minutes", "other.crashed"):
        assert f"{file}: targets.{key} " in told


@pytest.mark.parametrize("pattern", ["running", "RUNNING", "r*", "*", "on hol?", "*hold"])
def test_a_rule_for_a_status_that_is_in_flight_is_none(file: File, pattern: str) -> None:
    """Whatever its case: where the column is a citext, that is all one."""
    file.says(f"{HEAD}{IN_FLIGHT}{rule_for(pattern)}")
    [rule] = load_targets()["billing"].rules
    assert rule.match == {"status": pattern}


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("THRESHOLD_MINUTES", "7", {"threshold_minutes": 7}),
        ("TABLE", "other.jobs", {"table": "other.jobs"}),
        ("DATABASE_URL_ENV", "OTHER", {"database_url_env": "OTHER"}),
        ("IN_FLIGHT", '["doing", 3]', {"in_flight": ("doing", "3")}),
        ("CRASHED", "7", {"crashed": "7"}),
        ("HEARTBEAT_SECONDS", "2.5", {"heartbeat_seconds": 2.5}),
        ("INDEX", "false", {"index": False}),
        ("RELEASE", '["locked_by"]', {"release": ("locked_by",)}),
        (
            "RULES",
            '[{"match": {"task": "x"}, "never": true}]',
            {"rules": (Rule(match={"task": "x"}, never=True),)},
        ),
    ],
)
def test_each_value_may_come_from_the_environment_which_beats_the_file(
    file: File, monkeypatch: pytest.MonkeyPatch, key: str, value: str, meant: dict[str, Any]
) -> None:
    file.says(EXAMPLE)
    in_file = find_target("billing")
    monkeypatch.setenv(ENVIRONMENT + key, value)
    assert find_target("billing") == in_file.model_copy(update=meant)


@pytest.mark.parametrize(
    ("key", "value", "role", "meant"),
    [
        ("WORKER_ID", "owner", "worker_id", "owner"),
        ("TENANT_ID", "false", "tenant_id", ""),
        ("STATUS", "phase", "status", "phase"),
        ("ID", '["a", "b"]', "id", ("a", "b")),
        ("ID", "key", "id", ("key",)),
    ],
)
def test_a_columns_name_may_come_from_the_environment(
    file: File, monkeypatch: pytest.MonkeyPatch, key: str, value: str, role: str, meant: object
) -> None:
    file.says(EXAMPLE)
    monkeypatch.setenv(f"{ENVIRONMENT}COLUMNS__{key}", value)
    columns = find_target("billing").columns
    assert getattr(columns, role) == meant
    assert columns.created_at == "inserted_at", "the others are as the file has them"


def test_where_no_file_is_found_the_error_says_in_which_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Prefect worker runs a flow in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORPHAN_RECOVERY_CONFIG", raising=False)
    with pytest.raises(ConfigurationError) as refused:
        find_target("billing")
    assert str(refused.value) == (
        "there is no target 'billing'; there is 'default', and no file orphan-recovery.toml in "
        f"{tmp_path}: name it by ORPHAN_RECOVERY_CONFIG, with its whole path"
    )


def test_a_target_may_be_described_by_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORPHAN_RECOVERY_CONFIG", raising=False)
    monkeypatch.setenv(f"{ENVIRONMENT}TABLE", "jobs")
    monkeypatch.setenv(f"{ENVIRONMENT}THRESHOLD_MINUTES", "5")
    [target] = load_targets().values()
    assert (target.name, target.table, target.threshold_minutes) == ("billing", "jobs", 5)


def test_a_value_of_another_type_is_told_without_the_words_of_the_library(file: File) -> None:
    file.says(
        f"{HEAD}threshold_minutes = 1.5\nhold_share = 'much'\nindex = 'maybe'\ntable = 7\n"
        "[target]\n"
    )
    told = [line.removeprefix(f"{file}: ") for line in refusal().split("; ")]
    assert sorted(told) == [
        "target is no key: did you mean 'targets'?",
        "targets.billing.hold_share is 'much': give a number",
        "targets.billing.index is 'maybe': give true or false",
        "targets.billing.table is 7: give a text",
        "targets.billing.threshold_minutes is 1.5: give a whole number",
    ]


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("THRESHOLD_MINUTES", "0", "1"),
        ("THRESHOLD_MINUTES", "abc", "'abc': give a whole number"),
        ("TRESHOLD_MINUTES", "5", "did you mean 'threshold_minutes'?"),
        ("COLUMNS__WORKERID", "x", "did you mean 'worker_id'?"),
        ("TABLE", "a.b.c", "give table or schema.table"),
        ("IN_FLIGHT", "queued,running", "JSON"),
        ("IN_FLIGHT", '["queued"', "JSON"),
        ("RULES", '[{"match": {"task": "x"}}]', "give either threshold_minutes, or never"),
        ("COLUMNS", '{"stauts": "x"}', "did you mean 'status'?"),
        ("RULES", '[{"match": {"status": "x"}, "never": true}]', "none of in_flight ('claimed', "),
    ],
)
def test_a_mistake_in_a_variable_is_told_by_the_variable(
    file: File, monkeypatch: pytest.MonkeyPatch, key: str, value: str, way_out: str
) -> None:
    file.says(EXAMPLE)
    monkeypatch.setenv(ENVIRONMENT + key, value)
    told = refusal()
    assert ENVIRONMENT + key in told
    assert str(file) not in told, "the file is not at fault"
    assert way_out in told


JOBS = """
CREATE TYPE phase AS ENUM ('queued', 'running', 'failed');
CREATE DOMAIN state AS text CHECK (VALUE IN ('queued', 'running', 'failed'));
CREATE TABLE jobs (
    id bigint PRIMARY KEY, status text, worker text, created_at timestamptz, day date, won int,
    told text, shouted text GENERATED ALWAYS AS (told || '!') STORED, number int UNIQUE,
    slot text NOT NULL DEFAULT 'free',
    phase phase, state state, short varchar(5), code int, checked text
    CHECK (checked IN ('queued', 'running', 'failed') AND checked <> ':x')
);
CREATE TABLE people (name text, seen text);
CREATE UNIQUE INDEX worker_of_running ON jobs (worker) WHERE status = 'running';
CREATE VIEW old_jobs AS SELECT * FROM jobs;
CREATE SCHEMA other;
CREATE TABLE other.tasks (id int PRIMARY KEY);
"""


@pytest.fixture(scope="module")
def jobs(server: str) -> Iterator[Database]:
    """A database with tables of somebody's, on which no description here fits."""
    with database_of_its_own(server) as url, Database(url) as database:
        with database.connect(autocommit=True) as owner:
            owner.execute(JOBS.encode())
        yield database


def relations(db: Database) -> list[dict[str, Any]]:
    """Everything that has a name in the database, and is not the server's own."""
    return db.do(
        "SELECT n.nspname, c.relname, c.relkind, c.relhastriggers FROM pg_namespace n"
        " LEFT JOIN pg_class c ON c.relnamespace = n.oid"
        " WHERE n.nspname !~ '^pg_|^information_schema$' ORDER BY 1, 2"
    )


def described(keys: str = "", columns: str = "", more: str = "") -> str:
    table = "" if "table =" in keys else 'table = "public.jobs"\n'
    return f"{HEAD}{table}{keys}\n[targets.billing.columns]\n{columns}\n{more}"


HEARTBEAT = "[targets.billing.worker_heartbeat]\nkey = 'name'\nrun_key = 'worker'\n"


@pytest.mark.parametrize(
    ("text", "key", "fault"),
    [
        (
            described(columns="worker_id = 'wroker'"),
            "columns.worker_id is 'wroker'",
            "no such column: it has id, status, worker, created_at",
        ),
        (described(columns="status = 'stat'"), "columns.status is 'stat'", "no such column"),
        (described(columns="id = 'key'"), "columns.id is 'key'", "no such column"),
        (described("release = ['claim']"), "release is 'claim'", "no such column"),
        (
            described("in_flight = ['running']", "status = 'phase'"),
            "crashed has 'crashed'",
            "the enum phase has 'queued', 'running', 'failed'",
        ),
        (
            described("in_flight = ['doing']\ncrashed = 'failed'", "status = 'phase'"),
            "in_flight has 'doing'",
            "the enum phase has",
        ),
        (
            described(columns="status = 'checked'"),
            "crashed has 'crashed'",
            "cannot hold: the table has the condition",
        ),
        (described(columns="status = 'state'"), "crashed has 'crashed'", "cannot hold"),
        (
            described("in_flight = ['doing']\ncrashed = 'failed'", "status = 'state'"),
            "in_flight has 'doing'",
            "cannot hold",
        ),
        (
            described("in_flight = ['busy']", "status = 'short'"),
            "crashed has 'crashed'",
            "cannot hold",
        ),
        (described("in_flight = [1]", "status = 'code'"), "crashed has 'crashed'", "cannot hold"),
        (described("crashed = 9", "status = 'code'"), "in_flight has 'queued'", "cannot hold"),
        (
            described('table = "public.Jobs"'),
            "table is 'public.Jobs'",
            "did you mean public.jobs?",
        ),
        (described("table = 'tasks'"), "table is 'tasks'", "did you mean other.tasks?"),
        (described("table = 'nothing'"), "table is 'nothing'", "give it as schema.table"),
        (
            described("table = 'old_jobs'"),
            "table is 'old_jobs'",
            "is a view: a row of it cannot be locked and marked; name the table",
        ),
        (
            described(columns="id = 'worker'"),
            "columns.id is ['worker']",
            "which no unique index of 'public.jobs' covers: one mark could hit several rows",
        ),
        (described(columns="id = 'number'"), "columns.id", "NULL"),
        (
            described(columns="started_at = 'day'"),
            "columns.started_at: column 'day'",
            "is date: a time must be timestamptz, or timestamp in UTC; name another column, or "
            "started_at = false",
        ),
        (
            described(columns="success = 'won'"),
            "columns.success: column 'won'",
            "is integer, where boolean is needed; name another column, or success = false",
        ),
        (
            described(columns="error = 'won'"),
            "columns.error: column 'won'",
            "is integer, where text, json or jsonb is needed",
        ),
        (
            described(columns="error = 'shouted'"),
            "columns.error: column 'shouted'",
            "is generated, and cannot be written; name another, or error = false",
        ),
        (
            described(columns="created_at = false"),
            "targets.billing has no source of signs of life",
            "name a column as created_at",
        ),
        (
            described(more="[[targets.billing.rules]]\nmatch = { task = 'x' }\nnever = true"),
            "rules.0.match looks at 'task'",
            "has no column: name it under columns, or leave the rule out",
        ),
        (
            described(more=f"{HEARTBEAT}table = 'persons'\nlast_seen = 'seen'"),
            "worker_heartbeat.table is 'persons'",
            "give it as schema.table",
        ),
        (
            described(more=f"{HEARTBEAT}table = 'people'\nlast_seen = 'saw'"),
            "worker_heartbeat.last_seen is 'saw'",
            "but table 'people' has no such column: it has name, seen",
        ),
        (
            described(more=f"{HEARTBEAT}table = 'people'\nlast_seen = 'seen'"),
            "worker_heartbeat.last_seen: column 'seen' of table 'people'",
            "is text: a time must be timestamptz",
        ),
        (described("release = ['slot']"), "release has 'slot'", "NOT NULL"),
    ],
)
async def test_what_does_not_fit_the_database_is_refused_and_nothing_is_written(
    file: File,
    jobs: Database,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    key: str,
    fault: str,
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", jobs.url)
    file.says(text)
    before = relations(jobs)
    told = []
    with pytest.raises(ConfigurationError) as raised:
        migrate(find_target())
    told.append(str(raised.value))
    with pytest.raises(ConfigurationError) as raised:
        await run_sweep(request(dry_run=True))
    told.append(str(raised.value))
    assert told[0] == told[1]
    assert told[0].startswith(f"{file}: targets.billing")
    assert key in told[0]
    assert fault in told[0]
    assert relations(jobs) == before


async def test_a_place_in_the_environment_is_named_as_well(
    file: File, jobs: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", jobs.url)
    monkeypatch.setenv(f"{ENVIRONMENT}COLUMNS__WORKER_ID", "wroker")
    file.says(described())
    with pytest.raises(ConfigurationError, match=f"^{ENVIRONMENT}COLUMNS__WORKER_ID is 'wroker'"):
        await run_sweep(request(dry_run=True))


@pytest.mark.parametrize("scope", ["tenant", "worker"])
async def test_a_scope_that_the_table_cannot_tell_is_refused_and_nothing_is_marked(
    file: File, blank: Database, scope: str
) -> None:
    file.says('[targets.billing]\ntable = "jobs"\n')
    blank.do("CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz)")
    blank.do("INSERT INTO jobs VALUES (1, 'running', now() - interval '1 day')")
    target = find_target()
    migrate(target)
    asked: dict[str, Any] = {scope: "one"}
    with pytest.raises(ConfigurationError, match=f"no column for {scope}_id: name it under"):
        await run_sweep(SweepRequest(asked_by="test", target=target, **asked))
    assert blank.one("SELECT status FROM jobs") == "running"
    assert blank.sweeps() == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ORPHAN_RECOVERY_TARGET": "biling"},
            "no target 'biling', which ORPHAN_RECOVERY_TARGET names;",
        ),
        ({}, "which target.*'billing', 'mail'.*--target or ORPHAN_RECOVERY_TARGET"),
    ],
)
def test_which_target_is_meant_is_never_guessed(
    file: File, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    file.says("[targets.billing]\n[targets.mail]\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message):
        find_target()


def test_the_variable_comes_before_the_target_named_default(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.says("[targets.mail]\n[targets.default]\n")
    assert find_target().name == "default"
    monkeypatch.setenv("ORPHAN_RECOVERY_TARGET", "mail")
    assert find_target().name == "mail"
    assert find_target("default").name == "default", "what is asked for comes before both"


async def test_the_variable_of_an_address_that_is_not_set_is_named(file: File) -> None:
    file.says(EXAMPLE)
    with pytest.raises(ConfigurationError, match=r"variable 'BILLING_DATABASE_URL'.*is not set"):
        await run_sweep(request())


async def test_a_password_put_in_place_of_a_variables_name_is_not_shown(file: File) -> None:
    file.says(f"{HEAD}database_url_env = 'postgresql://me:S3cret@host/runs'")
    with pytest.raises(ConfigurationError, match="database_url_env") as raised:
        await run_sweep(request())
    assert "S3cret" not in str(raised.value)


async def test_a_secret_without_a_prefect_api_says_so(file: File, nowhere: None) -> None:
    file.says(f"{HEAD}database_url_secret = 'billing-db'")
    with pytest.raises(ConfigurationError, match=r"'billing-db'.*set PREFECT_API_URL"):
        await run_sweep(request())


async def test_a_secret_block_is_read_or_missed_by_name(
    prefect: str, db: Database, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORPHAN_RECOVERY_DATABASE_URL", raising=False)
    block = f"runs-{uuid4().hex[:12]}"
    file.says(f"[targets.default]\ndatabase_url_secret = '{block}'")
    db.add_run("orphan")
    with temporary_settings({PREFECT_API_URL: prefect}):
        with pytest.raises(ConfigurationError, match=f"'{block}'.*create it in Prefect's UI"):
            await run_sweep(request())
        secret: Any = Secret(value=db.url)
        await secret.save(block)
        report = await run_sweep(request())
    assert (report.error, report.recovered) == (None, 1)
    assert db.status("orphan") == "crashed"


@pytest.mark.parametrize(
    ("text", "arguments", "variables", "message"),
    [
        (f"{HEAD}tabel = 'x'", ["sweep"], {}, "tabel is no key: did you mean 'table'?"),
        ("[targets.billing", ["doctor"], {}, "is not TOML"),
        (
            HEAD,
            ["summary"],
            {f"{ENVIRONMENT}THRESHOLD_MINUTES": "0"},
            f"{ENVIRONMENT}THRESHOLD_MINUTES is '0'",
        ),
        (HEAD, ["sweep", "--target", "mail"], {}, "no target 'mail'; there is"),
        (
            f"{HEAD}[targets.mail]\n",
            ["sweep"],
            {"ORPHAN_RECOVERY_TARGET": "male"},
            "no target 'male', which ORPHAN_RECOVERY_TARGET names",
        ),
        (f"{HEAD}[targets.mail]\n", ["migrate"], {}, "which target?"),
        (None, ["sweep"], {}, "ORPHAN_RECOVERY_CONFIG names "),
        (described(columns="worker_id = 'wroker'"), ["migrate"], {}, "is 'wroker', but table"),
        (
            described(columns="status = 'state'"),
            ["sweep", "--dry-run"],
            {},
            "crashed has 'crashed'",
        ),
        (f"{HEAD}database_url_env = 'UNSET_X'", ["sql"], {}, "'UNSET_X' (database_url_env)"),
    ],
)
def test_on_the_command_line_it_is_exit_code_2_and_one_line(
    file: File,
    jobs: Database,
    text: str | None,
    arguments: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    if text is not None:
        file.says(text)
    done = run(*arguments, ORPHAN_RECOVERY_DATABASE_URL=jobs.url, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert re.fullmatch("orphan-recovery: .+\n", done.stderr), "one line, no traceback"


def test_a_database_that_cannot_be_reached_is_one_line_too(file: File) -> None:
    file.says(EXAMPLE)
    url = f"postgresql://me:S3cret@127.0.0.1:{free_port()}/runs"
    done = run("migrate", BILLING_DATABASE_URL=url)
    assert done.returncode == 1
    assert re.fullmatch("orphan-recovery: OperationalError: .+\n", done.stderr)
    assert "S3cret" not in done.stderr


@pytest.mark.parametrize(
    ("text", "variables", "minutes"),
    [
        (HEAD, {"ORPHAN_THRESHOLD_MINUTES": "11"}, 11),
        (EXAMPLE, {"ORPHAN_THRESHOLD_MINUTES": "11"}, 45),
        (EXAMPLE, {f"{ENVIRONMENT}THRESHOLD_MINUTES": "7"}, 7),
        (f"{EXAMPLE}[targets.mail]\n", {"ORPHAN_THRESHOLD_MINUTES": "11"}, 11),
        (f"{EXAMPLE}[targets.mail]\n", {"ORPHAN_RECOVERY_TARGET": "billing"}, 45),
    ],
)
def test_the_contracts_threshold_is_that_of_the_target_meant_by_default(
    file: File, text: str, variables: dict[str, str], minutes: int
) -> None:
    file.says(text)
    code = "import orphan_recovery; print(orphan_recovery.ORPHAN_THRESHOLD_MINUTES)"
    environment = {**os.environ, **variables}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert told.stdout.decode().strip() == str(minutes), told.stderr.decode()
