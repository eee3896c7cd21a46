"""Init: tables as people really have them, described by looking, and nothing else done."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cli_support import run
from orphan_recovery.database import database_url, make_engine
from orphan_recovery.detect import detect
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target
from support import Database


@dataclass(frozen=True)
class Schema:
    """A table of somebody's, with one orphan and one live run in it, and what it is told by."""

    made: str
    table: str
    orphan: str
    """The orphan's key."""
    described: dict[str, Any]
    """What the draft has to have understood; columns under their roles."""
    corrected: dict[str, str] = field(default_factory=dict)
    """What a person has to put right in it."""


SCHEMAS = {
    "rails": Schema(
        made="""
            CREATE TABLE schema_migrations (version varchar PRIMARY KEY);
            CREATE TABLE background_jobs (
                id bigserial PRIMARY KEY, queue_name varchar, job_class varchar NOT NULL,
                state varchar(255) NOT NULL DEFAULT 'pending', locked_by varchar,
                last_error text, attempts integer DEFAULT 0, started_at timestamp(6),
                finished_at timestamp(6), created_at timestamp(6) NOT NULL,
                updated_at timestamp(6) NOT NULL
            );
            INSERT INTO background_jobs (id, job_class, state, locked_by, created_at, updated_at)
            SELECT id, 'MailJob', state, 'host:1', now() AT TIME ZONE 'UTC' - age::interval, now()
            FROM (VALUES (1, 'pending', '9 hours'), (2, 'running', '9 hours'),
                  (3, 'running', '1 minute'), (4, 'succeeded', '9 hours'),
                  (5, 'failed', '9 hours')) AS job (id, state, age);
        """,
        table="public.background_jobs",
        orphan="2",
        described={
            "in_flight": ("running",),
            "waiting": ("pending",),
            "terminal": ("failed", "succeeded"),
            "crashed": "failed",
            "status": "state",
            "worker_id": "locked_by",
            "task": "job_class",
            "error": "last_error",
            "attempt": "attempts",
            "completed_at": "finished_at",
        },
    ),
    "django": Schema(
        made="""
            CREATE TABLE django_migrations (id int PRIMARY KEY, applied timestamptz);
            CREATE TABLE auth_user (id int PRIMARY KEY, is_active boolean, date_joined timestamptz);
            CREATE TABLE reports_reporttask (
                id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
                idempotency_key varchar(64) UNIQUE,
                status smallint NOT NULL, created timestamptz NOT NULL, started timestamptz,
                finished timestamptz, traceback text, organization_id int, result jsonb
            );
            INSERT INTO reports_reporttask (id, status, created)
            VALUES ('00000000-0000-0000-0000-000000000001', 2, now() - interval '9 hours'),
                   ('00000000-0000-0000-0000-000000000002', 2, now()),
                   ('00000000-0000-0000-0000-000000000003', 3, now() - interval '9 hours');
        """,
        table="public.reports_reporttask",
        orphan="00000000-0000-0000-0000-000000000001",
        described={  # what the numbers mean cannot be guessed
            "id": ("id",),
            "tenant_id": "organization_id",
            "created_at": "created",
            "started_at": "started",
            "completed_at": "finished",
            "error": "traceback",
        },
        corrected={
            'in_flight = ["SAY WHICH"]': "in_flight = [1, 2]",
            'crashed = "SAY WHAT"': "crashed = 9",
            'terminal = ["SAY WHAT"]': "terminal = [3, 9]",
        },
    ),
    "prisma": Schema(
        made="""
            CREATE TYPE "JobStatus" AS ENUM
                ('QUEUED', 'IN_PROGRESS', 'COMPLETED', 'FAILED', 'Needs "review"');
            CREATE TABLE "Job" (
                "id" text PRIMARY KEY, "status" "JobStatus" NOT NULL DEFAULT 'QUEUED',
                "workerId" text, "tenantId" text, "jobType" text, "errorMessage" text,
                "createdAt" timestamp(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
                "startedAt" timestamp(3), "lastHeartbeatAt" timestamp(3), "completedAt" timestamp(3)
            );
            CREATE TABLE "_prisma_migrations" (id text PRIMARY KEY, started_at timestamptz);
            INSERT INTO "Job" ("id", "status", "createdAt", "lastHeartbeatAt")
            SELECT id, status::"JobStatus", u - interval '9 hours', u - age::interval
            FROM (VALUES ('c1', 'IN_PROGRESS', '2 hours'), ('c2', 'IN_PROGRESS', '1 second'),
                         ('c3', 'QUEUED', NULL)) AS job (id, status, age),
                 timezone('UTC', now()) AS u;
        """,
        table="public.Job",
        orphan="c1",
        described={
            "in_flight": ("IN_PROGRESS",),
            "waiting": ("QUEUED",),
            "terminal": ("COMPLETED", "FAILED"),
            "crashed": "FAILED",
            "worker_id": "workerId",
            "tenant_id": "tenantId",
            "task": "jobType",
            "created_at": "createdAt",
            "started_at": "startedAt",
            "heartbeat_at": "lastHeartbeatAt",
            "completed_at": "completedAt",
            "error": "errorMessage",
        },
    ),
    "queue": Schema(
        made="""
            CREATE SCHEMA queue;
            CREATE TABLE queue.workers (
                name text PRIMARY KEY, hostname text, last_seen_at timestamptz NOT NULL
            );
            CREATE TABLE queue.claimed (
                id bigint PRIMARY KEY, status text NOT NULL, created_at timestamptz NOT NULL,
                claimed_by text REFERENCES queue.workers ON DELETE SET NULL
            );
            INSERT INTO queue.workers VALUES ('dead', 'a', now() - interval '5 hours'),
                                             ('alive', 'b', now());
            INSERT INTO queue.claimed VALUES (1, 'executing', now() - interval '9 hours', 'dead'),
                                             (2, 'executing', now() - interval '9 hours', 'alive'),
                                             (3, 'dead', now() - interval '9 hours', 'dead');
        """,
        table="queue.claimed",
        orphan="1",
        described={
            "in_flight": ("executing",),
            "crashed": "dead",
            "worker_id": "claimed_by",
            "worker_heartbeat": {
                "table": "queue.workers",
                "key": "name",
                "run_key": "claimed_by",
                "last_seen": "last_seen_at",
            },
        },
    ),
    "composite": Schema(
        made="""
            CREATE TABLE runs (
                "tenantId" int NOT NULL, number int NOT NULL, token text UNIQUE,
                status varchar NOT NULL, "createdAt" timestamptz NOT NULL,
                PRIMARY KEY ("tenantId", number)
            );
            INSERT INTO runs VALUES (7, 1, NULL, 'active', now() - interval '9 hours'),
                                    (7, 2, NULL, 'active', now()),
                                    (8, 1, NULL, 'error', now() - interval '9 hours');
        """,
        table="public.runs",
        orphan='["7", "1"]',
        described={
            "id": ("tenantId", "number"),
            "tenant_id": "tenantId",
            "in_flight": ("active",),
            "crashed": "error",
        },
    ),
    "odd": Schema(
        made="""
            CREATE SCHEMA "my.schema";
            CREATE TYPE "my.schema"."Zu""stand # 1" AS ENUM
                ('läuft', 'running', 'it''s "done"', 'failed');
            CREATE TABLE "my.schema"."job ""runs"", größe" (
                "the ""id"".# \\ ключ" bigint PRIMARY KEY,
                "sta""tus" "my.schema"."Zu""stand # 1" NOT NULL,
                "created at" timestamptz, "last.error" text, "worker'id" text, "heartbeat%" date
            );
            INSERT INTO "my.schema"."job ""runs"", größe"
            VALUES (1, 'running', now() - interval '9 hours'), (2, 'running', now()),
                   (3, 'läuft', now() - interval '9 hours');
        """,
        table='"my.schema"."job ""runs"", größe"',
        orphan="1",
        described={
            "in_flight": ("running",),
            "crashed": "failed",
            "status": 'sta"tus',
            "id": ('the "id".# \\ ключ',),
            "created_at": "created at",
            "error": "last.error",
            "worker_id": "worker'id",
        },
    ),
}
every_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that is to be written, in a working directory without any."""
    monkeypatch.chdir(tmp_path)
    for name in ("ORPHAN_RECOVERY_CONFIG", "ORPHAN_RECOVERY_TARGET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "orphan-recovery.toml"


def make(db: Database, statements: str) -> None:
    with db.connect(autocommit=True) as owner:
        owner.execute(statements.encode())


def correct(file: Path, corrected: dict[str, str]) -> None:
    """As a person does who reads what is to be guessed again."""
    text = file.read_text()
    assert ("GUESS AGAIN: no status" in text) == bool(corrected)
    for was, now in corrected.items():
        assert was in text
        text = text.replace(was, now)
    file.write_text(text)


def contents(db: Database) -> list[dict[str, Any]]:
    """All that has a name, or was ever written to."""
    return [
        *db.do("SELECT oid, relname, relkind, relfilenode FROM pg_class ORDER BY oid"),
        *db.do("SELECT oid, nspname FROM pg_namespace WHERE nspname !~ '^pg_' ORDER BY oid"),
        *db.do("SELECT oid, rolname FROM pg_roles ORDER BY oid"),
        *db.do("SELECT oid, tgname FROM pg_trigger ORDER BY oid"),
    ]


def in_toml(target: Target, name: str) -> Any:
    """What the target has under a key, or under a column's role."""
    if name == "worker_heartbeat":
        return target.worker_heartbeat and target.worker_heartbeat.model_dump()
    return getattr(target if hasattr(target, name) else target.columns, name)


async def look(db: Database, target: Target) -> list[WorkerRun]:
    engine = make_engine(database_url(db.url))
    try:
        async with engine.connect() as connection:
            return await detect(connection, SweepRequest(asked_by="test", target=target))
    finally:
        await engine.dispose()


@every_schema
async def test_the_draft_fits_the_table_and_its_sweep_finds_the_orphan(
    blank: Database, home: Path, schema: Schema
) -> None:
    make(blank, schema.made)
    before = contents(blank)
    done = run("init", "--target", "mine")
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(blank) == before, "nothing in the database changes"
    target = find_target("mine")
    assert target.table == schema.table
    assert target.database_url_env == "ORPHAN_RECOVERY_DATABASE_URL"
    understood = {name: in_toml(target, name) for name in schema.described}
    assert understood == schema.described
    correct(home, schema.corrected)
    target = find_target("mine")
    [orphan] = await look(blank, target)
    assert orphan.id == schema.orphan
    report = await run_sweep(SweepRequest(asked_by="test", target=target, dry_run=True))
    assert (report.error, report.detected) == (None, 1)
    assert contents(blank) == before


@every_schema
def test_each_guess_is_commented(blank: Database, home: Path, schema: Schema) -> None:
    make(blank, schema.made)
    done = run("init", "--target", "mine")
    section = home.read_text()
    assert section in done.stdout, "what was written is shown"
    assert "orphan-recovery doctor --target mine" in done.stdout
    guesses = [line for line in section.splitlines() if " = " in line and line[0] != "#"]
    by_foreign_key = section.partition("[targets.mine.worker_heartbeat]")[2]
    for guess in guesses:
        assert "  # " in guess or guess in by_foreign_key, guess
    if by_foreign_key:
        assert "by the foreign key of claimed_by" in by_foreign_key
    if "heartbeat_at" not in section and not by_foreign_key:
        assert "No heartbeat found" in section


def test_what_cannot_be_a_status_of_a_run_is_asked_about(blank: Database, home: Path) -> None:
    make(blank, SCHEMAS["odd"].made)
    assert run("init", "--target", "mine").returncode == 0
    text = home.read_text()
    assert "# GUESS AGAIN: what is 'läuft'? Add it to in_flight, waiting or terminal." in text
    assert 'it\'s \\"done\\"' not in text, "it is asked about, not guessed"
    assert "what is 'it\\'s \"done\"'?" in text
    assert "# date: not fit" not in text, "heartbeat% is not the role's own name"


JOBS = "CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz)"


@pytest.mark.parametrize("name", ["begun_at", "began_at", "beganAt"])
def test_when_a_run_was_begun_is_found_by_other_words_too(
    blank: Database, home: Path, name: str
) -> None:
    make(blank, JOBS.replace(")", f', "{name}" timestamptz)'))
    assert run("init", "--target", "mine").returncode == 0
    assert find_target("mine").columns.started_at == name


@pytest.mark.parametrize("statuses", [("running", "done"), ("running", "failed", "done")])
def test_what_is_to_be_corrected_comes_first_of_what_is_to_be_done(
    blank: Database, home: Path, statuses: tuple[str, ...]
) -> None:
    make(blank, JOBS)
    for number, status in enumerate(statuses):
        blank.do("INSERT INTO jobs VALUES (%s, %s, now())", number, status)
    said = run("init", "--target", "mine").stdout.removeprefix(home.read_text()).strip()
    first, *commands = said.splitlines()
    if "failed" in statuses:
        assert first == "written to orphan-recovery.toml. Read each guess, then:"
    else:
        assert first == (
            "written to orphan-recovery.toml. Correct the lines that say GUESS AGAIN first, read "
            "each guess, then:"
        )
    assert commands == [
        "  orphan-recovery doctor --target mine    # is it fit to be swept?",
        "  orphan-recovery backtest --target mine  # is the threshold right?",
        "  orphan-recovery sql --target mine       # what `migrate` would do there",
        "  orphan-recovery sweep --target mine --dry-run",
    ]


def test_the_one_table_with_a_key_is_taken(blank: Database, home: Path) -> None:
    make(blank, f"{JOBS}; CREATE TABLE log (id int, state text, created timestamptz)")
    assert run("init", "--target", "mine").returncode == 0
    assert find_target("mine").table == "public.jobs"


def test_the_name_that_was_meant_is_one_that_can_be_given(blank: Database, home: Path) -> None:
    make(blank, 'CREATE SCHEMA "Billing"; ' + JOBS.replace("jobs", '"Billing"."Jobs"'))
    refused = run("init", "--target", "mine", "--table", "billing.jobs").stderr
    [meant] = re.findall(r"did you mean (\S+)\?", refused)
    assert run("init", "--target", "mine", "--table", meant).returncode == 0
    assert find_target("mine").table == "Billing.Jobs"


def test_the_variable_that_is_set_is_the_one_that_is_written(
    blank: Database, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(blank, JOBS)
    both = run("init", "--target", "both", DATABASE_URL=blank.url)
    assert both.returncode == 0
    assert find_target("both").database_url_env == "ORPHAN_RECOVERY_DATABASE_URL"
    general = run(
        "init", "--target", "mine", DATABASE_URL=blank.url, ORPHAN_RECOVERY_DATABASE_URL=""
    )
    assert (general.returncode, general.stderr) == (0, "")
    assert find_target("mine").database_url_env == "DATABASE_URL"
    monkeypatch.delenv("DATABASE_URL", raising=False)
    none = run("init", "--target", "none", ORPHAN_RECOVERY_DATABASE_URL="")
    assert none.returncode == 2
    assert "'ORPHAN_RECOVERY_DATABASE_URL' (database_url_env), which is not set" in none.stderr


def test_a_time_without_a_zone_is_said_to_be_read_as_utc(blank: Database, home: Path) -> None:
    make(
        blank,
        "CREATE TABLE nodes (id int PRIMARY KEY, last_seen timestamp);"
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamp(3),"
        " started_at timestamptz, node_id int REFERENCES nodes)",
    )
    assert run("init", "--target", "mine", "--table", "jobs").returncode == 0
    lines = home.read_text().splitlines()
    naive = "timestamp without time zone, read as UTC"
    assert f'last_seen = "last_seen"  # {naive}' in lines
    assert f'created_at = "created_at"  # {naive.replace("timestamp", "timestamp(3)")}' in lines
    assert 'started_at = "started_at"  # timestamp with time zone' in lines


@pytest.mark.parametrize(
    ("rows", "in_flight", "told"),
    [
        (("PENDING", "RECEIVED", "STARTED", "SUCCESS", "REVOKED"), ("RECEIVED", "STARTED"), None),
        (("STARTED", "SUCCESS", "FAILURE"), ("STARTED",), None),
        (("IDLE", "SUCCESS"), ("RUNNING",), "None reads like that of the rows' own status: IDLE"),
        (("on", "off"), ("running",), "None reads like that of the rows' own status: off, on."),
        ((), ("running",), "There is no row yet to tell it by."),
    ],
    ids=["as Celery has them", "a crash of theirs", "in capitals", "foreign", "none"],
)
def test_what_is_in_flight_is_told_by_the_words_that_are_there(
    blank: Database, home: Path, rows: tuple[str, ...], in_flight: tuple[str, ...], told: str | None
) -> None:
    make(blank, JOBS)
    for number, status in enumerate(rows):
        blank.do("INSERT INTO jobs VALUES (%s, %s, now())", number, status)
    assert run("init", "--target", "mine").returncode == 0
    text = home.read_text()
    target = find_target("mine")
    assert target.in_flight == in_flight
    if told is None:
        assert target.terminal is not None
        assert {"SUCCESS", "REVOKED"} & set(rows) < set(target.terminal)
        assert target.crashed == ("FAILURE" if "FAILURE" in rows else "FAILED")
        assert "which are in the hands" not in text
    else:
        assert f"# GUESS AGAIN: which are in the hands of a worker?\n# {told}" in text
        assert target.crashed == ("FAILED" if "".join(rows).isupper() else "failed")


def test_what_no_role_has_is_named_and_a_foreign_key_names_the_worker(
    blank: Database, home: Path
) -> None:
    make(
        blank,
        "CREATE TABLE nodes (id uuid PRIMARY KEY, last_heartbeat timestamptz);"
        "CREATE TYPE state AS ENUM ('requested', 'rendering', 'aborted');"
        "CREATE TABLE exports (id uuid PRIMARY KEY, state state NOT NULL, node_uuid uuid"
        " REFERENCES nodes, requested_at timestamp, leased_at timestamp, failure jsonb)",
    )
    assert run("init", "--target", "mine", "--table", "public.exports").returncode == 0
    text = home.read_text()
    assert 'worker_id = "node_uuid"' in text
    assert "# GUESS AGAIN: requested_at, leased_at: is one of them created_at, started_at" in text
    assert "# Not used: failure\n" in text
    # No word that may be wrong by chance: it is refused until a person has corrected it.
    assert 'in_flight = ["SAY WHICH"]' in text
    assert 'crashed = "SAY WHAT"' in text
    refused = run("sweep", "--target", "mine", "--dry-run")
    assert refused.returncode == 2
    assert "SAY WHICH" in refused.stderr


def test_a_further_target_is_appended_and_what_is_there_stays(blank: Database, home: Path) -> None:
    make(blank, JOBS)
    there = '# ours, by hand\n[targets.billing]\ntable  =  "public.bills" # as it was\n'
    home.write_text(there)
    assert run("init", "--target", "mine").returncode == 0
    assert home.read_text().startswith(there)
    assert list(tomllib.loads(home.read_text())["targets"]) == ["billing", "mine"]
    assert find_target("billing").table == "public.bills"
    assert find_target("mine").table == "public.jobs"

    whole = home.read_text()
    again = run("init", "--target", "mine")
    assert again.returncode == 2
    assert again.stderr == (
        "orphan-recovery: orphan-recovery.toml has a target 'mine' already: choose another name, "
        "or edit it there\n"
    )
    assert home.read_text() == whole


def test_a_file_that_does_not_end_its_last_line_is_appended_to_all_the_same(
    blank: Database, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(blank, JOBS)
    elsewhere = home.with_name("elsewhere.toml")
    elsewhere.write_text('[targets.billing]\ntable = "bills"')
    variables = {"ORPHAN_RECOVERY_CONFIG": str(elsewhere), "JOBS_URL": blank.url}
    done = run("init", "--target", "mine", "--database-url-env", "JOBS_URL", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert not home.exists(), "the file that the environment names is the one"
    monkeypatch.setenv("ORPHAN_RECOVERY_CONFIG", str(elsewhere))
    assert find_target("billing").table == "bills"
    assert find_target("mine").database_url_env == "JOBS_URL"


def test_a_file_that_is_named_has_to_be_there_so_that_a_slip_is_not_taken_for_no_file(
    blank: Database, home: Path
) -> None:
    make(blank, JOBS)
    new = home.with_name("new.toml")
    done = run("init", "--target", "mine", ORPHAN_RECOVERY_CONFIG=str(new))
    assert done.returncode == 2
    assert "make an empty one first" in done.stderr
    new.touch()
    done = run("init", "--target", "mine", ORPHAN_RECOVERY_CONFIG=str(new))
    assert (done.returncode, done.stderr) == (0, "")
    assert "mine" in tomllib.loads(new.read_text())["targets"]


KEYLESS = "CREATE TABLE log (id int, state text, created timestamptz);"
TWO = f"{JOBS}; CREATE TABLE tasks (id int PRIMARY KEY, state text, created timestamptz);"


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        (TWO + KEYLESS, [], "public.jobs, public.tasks of database"),
        (
            TWO,
            [],
            "may each be a table of runs, by a status, a time of creation and a unique key: ",
        ),
        (TWO, [], "name the one that is, by --table schema.table"),
        ("CREATE TABLE people (id int PRIMARY KEY)", [], "no table of database"),
        (KEYLESS, [], "a unique key (public.log would be, with a key): name the one that is"),
        (JOBS, ["--table", "job"], "--table is 'job', which is not in database"),
        (
            'CREATE SCHEMA "Billing";'
            'CREATE TABLE "Billing"."Jobs" (id int PRIMARY KEY, status text, at timestamptz)',
            ["--table", "billing.jobs"],
            'did you mean "Billing"."Jobs"? give it as schema.table, each name as the catalogue',
        ),
        (JOBS, ["--table", "a.b.c"], "give table or schema.table"),
        (
            f"{JOBS}; CREATE VIEW seen AS SELECT * FROM jobs",
            ["--table", "seen"],
            "--table is 'seen', which is a view: name the table it is made from",
        ),
        (
            "CREATE TABLE people (id int PRIMARY KEY, name text)",
            ["--table", "people"],
            "no column of 'people' looks like a status (it has id, name)",
        ),
        (
            "CREATE TABLE jobs (id int, status text, created_at timestamptz)",
            ["--table", "jobs"],
            "'jobs' has no unique index: give it a primary key",
        ),
        (
            "CREATE TABLE jobs (id int PRIMARY KEY, status text)",
            ["--table", "jobs"],
            "no source of signs of life",
        ),
        (JOBS, ["--target", "My Jobs"], "the target's name is 'My Jobs': give lower-case letters"),
        (JOBS, ["--table", ""], "--table is '': give table or schema.table"),
        (
            JOBS,
            ["--database-url-env", ""],
            "--database-url-env is '': give the name of the variable that holds the address",
        ),
        (JOBS, ["--database-url-env", "UNSET_X"], "'UNSET_X' (database_url_env), which is not set"),
        (
            JOBS,
            ["--database-url-env", "postgresql://me:S3cret@host/db"],
            "give the name of a variable that holds the address, not the address",
        ),
    ],
)
def test_what_cannot_be_drafted_is_one_clear_line_and_no_file(
    blank: Database, home: Path, made: str, arguments: list[str], message: str
) -> None:
    make(blank, made)
    before = contents(blank)
    done = run("init", *([] if "--target" in arguments else ["--target", "mine"]), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("orphan-recovery: ")
    assert done.stderr.count("\n") == 1
    assert "S3cret" not in done.stderr
    assert not home.exists()
    assert contents(blank) == before
