"""Doctor: one line for each thing that can be wrong, each asked of the database, none written."""

import json
import re
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from sqlalchemy import make_url

from cli_support import run
from orphan_recovery.doctor import fleet
from orphan_recovery.doctor.examine import examine
from orphan_recovery.doctor.finding import Finding, Level
from orphan_recovery.doctor.schedule import look_up_schedule
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Columns, Elsewhere, Rule, Target
from prefect_support import Api, client_of, deploy
from support import Database, free_port

ALL_LINES = [
    *("configuration", "server", "table", "columns", "privileges", "statuses", "index"),
    *("truth trigger", "ledger", "clocks", "threshold", "contests", "last sweep", "Prefect"),
]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Prefect API is named, neither here nor to what is started from here."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with temporary_settings({PREFECT_HOME: tmp_path}, restore_defaults={PREFECT_API_URL}):
        yield


@pytest.fixture
async def well(db: Database) -> Database:
    """The default table with runs that beat every few seconds, just swept."""
    for number in range(6):
        db.add_run(f"run-{number}", worker=f"w{number}", beat=f"{number + 1} seconds")
    db.add_run("ended", status="completed")
    report = await run_sweep(SweepRequest(asked_by="test", target=Target()))
    assert (report.error, report.detected) == (None, 0)
    return db


@pytest.fixture
def other(db: Database) -> Iterator[Database]:
    """The test's database as a role sees it that may do anything, and owns nothing."""
    name, password = f"other-{make_url(db.url).database}", "its-own"
    identifier = psycopg.sql.Identifier(name)

    def do(statement: str) -> None:
        composed = psycopg.sql.SQL(statement).format(identifier, password)
        db.do(composed)  # type: ignore[arg-type]

    do("CREATE ROLE {} LOGIN PASSWORD {}")
    do("GRANT USAGE ON SCHEMA orphan_recovery TO {}")
    do("GRANT ALL ON ALL TABLES IN SCHEMA public, orphan_recovery TO {}")
    url = make_url(db.url).set(username=name, password=password)
    with Database(url.render_as_string(hide_password=False)) as seen:
        yield seen
    do("DROP OWNED BY {}")
    do("DROP ROLE {}")


class Said(NamedTuple):
    level: Level
    about: str
    told: str
    way_out: str


def amiss(findings: list[Finding], *, prefect: bool = False) -> list[Said]:
    """What is not well; without Prefect's line, unless it is asked for."""
    return [
        Said(f.level, f.about, f.told, f.way_out or "")
        for f in findings
        if f.level is not Level.OK and (prefect or f.about != "Prefect")
    ]


def of_prefect(findings: list[Finding]) -> list[Said]:
    """While Prefect is asked the runs of ``well`` fall silent."""
    return [said for said in amiss(findings, prefect=True) if said.about == "Prefect"]


def contents(db: Database) -> list[dict[str, Any]]:
    """All that a look could have changed: every row, and everything with a name."""
    return [
        *db.do("SELECT to_jsonb(r) AS row FROM worker_runs r ORDER BY id"),
        *db.do("SELECT to_jsonb(s) AS row FROM orphan_recovery.sweeps s ORDER BY sweep_id"),
        *db.do("SELECT to_jsonb(v) AS row FROM orphan_recovery.verdicts v ORDER BY 1"),
        *db.do("SELECT oid, relname, relfilenode, relacl::text FROM pg_class ORDER BY oid"),
        *db.do("SELECT oid, tgname, tgenabled FROM pg_trigger ORDER BY oid"),
        *db.do("SELECT oid, rolname FROM pg_roles ORDER BY oid"),
    ]


async def test_where_all_is_well_each_line_says_so(
    prefect: str, well: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Api(prefect)
    api.forget_deployments()
    deploy(client_of(prefect, tmp_path / "client"))
    well.do("UPDATE worker_runs SET heartbeat_at = now() WHERE status = 'running'")
    try:
        with temporary_settings({PREFECT_API_URL: prefect}):
            findings = await examine(Target())
        assert amiss(findings, prefect=True) == []
        assert [finding.about for finding in findings] == ALL_LINES
        told = {finding.about: finding.told for finding in findings}
        assert "public.worker_runs" in told["table"]
        assert "heartbeat_at timestamp with time zone" in told["columns"]
        assert told["statuses"] == "completed: 1, running: 6"
        assert "worker_runs_in_flight" in told["index"]
        assert "estimated from 6 workers that beat" in told["threshold"]
        assert "a sweep comes every 5 min" in told["threshold"]
        assert "all-targets, on-demand, scheduled; every 5 min" in told["Prefect"]
        done = run("doctor")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("14 ok, 0 warning, 0 failure\n")

        # However few of them the API gives at once.
        asked = partialmethod(SyncPrefectClient.read_deployments, limit=1)
        with monkeypatch.context() as few, temporary_settings({PREFECT_API_URL: prefect}):
            few.setattr(SyncPrefectClient, "read_deployments", asked)
            assert look_up_schedule(Target()).told == told["Prefect"]

        # Each ailment of the schedule, from here on.
        scheduled = api.deployment("scheduled")
        path = f"/deployments/{scheduled['id']}/schedules/{scheduled['schedules'][0]['id']}"
        api.call("PATCH", path, {"active": False}).raise_for_status()
        with temporary_settings({PREFECT_API_URL: prefect}):
            [paused] = of_prefect(await examine(Target()))
        assert (paused.level, paused.about) == (Level.WARNING, "Prefect")
        assert "none has an interval schedule that is active" in paused.told
        assert "resume the schedule" in paused.way_out

        with temporary_settings({PREFECT_API_URL: prefect}):
            other = Target(name="billing")
            prefect_line = (await examine(other))[-1]
        assert (prefect_line.about, prefect_line.level) == ("Prefect", Level.WARNING)
        assert "all-targets" in prefect_line.told, "that one sweeps every target"
        assert "scheduled" not in prefect_line.told, "that one sweeps another"
    finally:
        api.forget_deployments()
    with temporary_settings({PREFECT_API_URL: prefect}):
        [none] = of_prefect(await examine(Target()))
    assert (none.level, none.about) == (Level.WARNING, "Prefect")
    assert "no deployment that sweeps this target" in none.told
    assert "prefect --no-prompt deploy --all" in none.way_out


async def test_without_a_prefect_api_only_the_schedule_is_unknown(
    well: Database, nowhere: None
) -> None:
    [line] = amiss(await examine(Target()), prefect=True)
    assert (line.level, line.about) == (Level.WARNING, "Prefect")
    assert "no Prefect API is named" in line.told
    assert "set PREFECT_API_URL" in line.way_out


async def test_a_prefect_api_that_does_not_answer_is_a_warning(well: Database) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        [line] = of_prefect(await examine(Target()))
    assert line.level is Level.WARNING
    assert f"the Prefect API at {url} cannot be asked" in line.told
    assert "PREFECT_API_URL is right" in line.way_out


AGE_LEDGER = (
    "ALTER TABLE orphan_recovery.sweeps DISABLE TRIGGER USER",
    "UPDATE orphan_recovery.sweeps SET ended_at = ended_at - interval '40 minutes'",
    "ALTER TABLE orphan_recovery.sweeps ENABLE TRIGGER USER",
)
FORGET_COMPLETED = (
    AGE_LEDGER[0],
    "DELETE FROM orphan_recovery.sweeps WHERE ended_as = 'completed'",
    AGE_LEDGER[2],
)
FORGET_LEDGER = (AGE_LEDGER[0], "DELETE FROM orphan_recovery.sweeps", AGE_LEDGER[2])


@pytest.mark.parametrize(
    ("done", "known", "level", "about", "told", "way_out"),
    [
        (
            ["DROP TABLE worker_runs"],
            {},
            Level.FAILURE,
            "table",
            "table 'worker_runs' is not in database",
            "run `orphan-recovery migrate`",
        ),
        (
            [
                "ALTER TABLE worker_runs DROP CONSTRAINT worker_runs_status_check",
                "INSERT INTO worker_runs (id, status) VALUES ('a', 'paused'), ('b', 'paused')",
            ],
            {},
            Level.WARNING,
            "statuses",
            "the target does not know: 'paused': 2",
            "add each to in_flight, waiting or terminal",
        ),
        (
            ["DROP INDEX worker_runs_in_flight"],
            {},
            Level.WARNING,
            "index",
            "no index serves detection: every sweep reads the whole of worker_runs",
            "`orphan-recovery migrate --target default`, or as the owner: CREATE INDEX",
        ),
        (
            [
                "DROP INDEX worker_runs_in_flight",
                "CREATE INDEX by_age ON worker_runs (created_at)",
            ],
            {},
            Level.WARNING,
            "index",
            "no index serves detection",
            "CREATE INDEX CONCURRENTLY",
        ),
        (
            ["DROP TRIGGER prevent_worker_run_mutation ON worker_runs"],
            {},
            Level.FAILURE,
            "truth trigger",
            "missing, disabled",
            "`orphan-recovery migrate --target default`",
        ),
        (
            ["ALTER TABLE worker_runs DISABLE TRIGGER USER"],
            {},
            Level.FAILURE,
            "truth trigger",
            "missing, disabled",
            "`orphan-recovery migrate --target default`",
        ),
        (
            ["DELETE FROM orphan_recovery.schema_version WHERE version_num = 'ledger_0001'"],
            {},
            Level.FAILURE,
            "ledger",
            "lacks ledger_0001",
            "`orphan-recovery migrate --target default`",
        ),
        (
            [
                "UPDATE orphan_recovery.schema_version SET version_num = 'ledger_0099'"
                " WHERE version_num = 'ledger_0001'"
            ],
            {},
            Level.FAILURE,
            "ledger",
            "at ledger_0099, which this version does not know",
            "install that version again",
        ),
        (
            ["UPDATE worker_runs SET heartbeat_at = now() + interval '1 hour' WHERE id = 'run-5'"],
            {},
            Level.FAILURE,
            "clocks",
            "1 run in flight with a sign of life in the database's future (w5)",
            "set those hosts' clocks right",
        ),
        (
            [
                "INSERT INTO worker_runs (id, status, created_at)"
                " VALUES ('x', 'running', '-infinity')"
            ],
            {},
            Level.WARNING,
            "clocks",
            "1 in flight without any sign of life, never swept: x",
            "give the runs a time of creation",
        ),
        (
            ["UPDATE worker_runs SET heartbeat_at = now() - interval '6 minutes'"],
            {},
            Level.FAILURE,
            "threshold",
            "the shortest threshold is 30 min, a sweep comes every 5 min, and a beat every 12 min",
            "set the threshold to at least 42 minutes (3 beats and one interval between sweeps), or"
            " let runs beat, or sweep, more often; if workers beat more often than that, say so in",
        ),
        (
            [],
            {"heartbeat_seconds": 600},
            Level.FAILURE,
            "threshold",
            "a beat every 10 min (as heartbeat_seconds says): too short",
            "set the threshold to at least 35 minutes (3 beats and one interval between sweeps)",
        ),
        (
            [],
            {
                "rules": (Rule(match={"task": "quick-*"}, threshold_minutes=5),),
                "heartbeat_seconds": 10,
            },
            Level.FAILURE,
            "threshold",
            "the shortest threshold is 5 min",
            "set the threshold to at least 6 minutes",
        ),
        (
            ["UPDATE worker_runs SET heartbeat_at = NULL, created_at = now()"],
            {},
            Level.WARNING,
            "threshold",
            "no worker beat just now",
            "heartbeat_seconds",
        ),
        (
            ["UPDATE worker_runs SET heartbeat_at = now() - interval '1 minute' WHERE id ^@ 'run'"],
            {},
            Level.WARNING,
            "threshold",
            "right after a restart of the server that cannot be measured",
            "targets.default.heartbeat_seconds: a sweep then gives",
        ),
        (
            [
                "INSERT INTO orphan_recovery.verdicts (sweep_id, run_id, target, outcome,"
                " status_seen, sign_of_life, evidence, silence, threshold, rule, reason, judged_at)"
                " SELECT sweep_id, 'late', 'default', 'marked', 'running', now(), 'age', '1 hour',"
                " '1 hour', 'rule', 'reason', now() FROM orphan_recovery.sweeps",
                "INSERT INTO orphan_recovery.contests SELECT sweep_id, 'late', 'default', 'w1',"
                " 'completed', now() FROM orphan_recovery.sweeps",
            ],
            {},
            Level.WARNING,
            "contests",
            "1 of 1 verdicts of the last 30 days were contested by a worker that lived: more than",
            "give them a longer threshold",
        ),
        (
            FORGET_LEDGER,
            {},
            Level.WARNING,
            "last sweep",
            "no sweep of this target has ended well yet",
            "orphan-recovery sweep --target default --dry-run",
        ),
        (
            ["CREATE TABLE child () INHERITS (worker_runs)"],
            {},
            Level.WARNING,
            "table",
            "other tables inherit from it",
            "see that no key is in two of them",
        ),
        (
            [
                "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by,"
                " reason, threshold, scope, version, opened_at, ended_at, ended_as, error)"
                " SELECT gen_random_uuid(), 'default', 'worker_runs', 'test', 'test', '30 min',"
                " '{}', '0', now() + n * interval '1 ms', now() + n * interval '1 ms', how,"
                " CASE how WHEN 'failed' THEN 'no room left' END"
                " FROM unnest(ARRAY['held', 'failed', 'died', 'direct'])"
                " WITH ORDINALITY AS s(how, n)"
            ],
            {},
            Level.WARNING,
            "last sweep",
            "of those since, 1 died, 1 failed; the last because no room left",
            "mend that cause; its verdicts are under sweep",
        ),
        (
            [
                "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by,"
                " reason, threshold, scope, version, opened_at)"
                " SELECT gen_random_uuid(), 'default', 'worker_runs', 'test', 'test', '30 min',"
                " '{}', '0', now() - age"
                " FROM unnest(ARRAY['1 second', '2 minutes']::interval[]) AS age",
                AGE_LEDGER[0],
                "UPDATE orphan_recovery.sweeps SET opened_at = opened_at - interval '1 hour'"
                " WHERE ended_at IS NOT NULL",
                AGE_LEDGER[2],
            ],
            {},
            Level.WARNING,
            "last sweep",
            "of those since, 1 open still, or cut off",
            "see whether the schedule",
        ),
        (
            AGE_LEDGER,
            {},
            Level.WARNING,
            "last sweep",
            "the last sweep that ended well was 40 min",
            "see whether the schedule",
        ),
    ],
)
async def test_each_ailment_is_one_line_with_its_level_and_the_way_out(
    well: Database,
    nowhere: None,
    done: list[Any],
    known: dict[str, Any],
    level: Level,
    about: str,
    told: str,
    way_out: str,
) -> None:
    assert amiss(await examine(Target())) == []
    for statement in done:
        well.do(statement)
    [line] = amiss(await examine(Target(**known)))
    assert (line.level, line.about) == (level, about)
    assert told in line.told
    assert way_out in (line.way_out or line.told)


async def test_why_the_last_sweep_marked_not_all_is_told_with_where_its_verdicts_are(
    well: Database, nowhere: None
) -> None:
    well.add_run("orphan", worker="w9")
    well.poison("orphan")
    report = await run_sweep(SweepRequest(asked_by="test", target=Target()))
    assert (report.failed, report.error) == (1, None)
    [line] = amiss(await examine(Target()))
    assert line.about == "last sweep"
    assert "; of those since, 1 failed; the last because 1 run could not be marked (" in line.told
    assert line.told.endswith(": poisoned row orphan (SQLSTATE P0001))")
    sweep_id = report.request.sweep_id
    assert line.way_out == f"mend that cause; its verdicts are under sweep {sweep_id}"
    for statement in FORGET_COMPLETED:
        well.do(statement)
    [line] = amiss(await examine(Target()))
    assert line.told.startswith(
        "no sweep of this target has ended well yet; of those so far, 1 failed; the last because 1"
    )


async def test_signs_of_life_in_the_future_name_ten_workers_at_most(
    well: Database, nowhere: None
) -> None:
    for number in range(12):
        well.add_run(f"ahead-{number}", worker=f"fast-{number:02}", beat="-1 hour")
    [line] = amiss(await examine(Target()))
    assert "12 runs" in line.told
    assert re.findall("fast-..", line.told) == [f"fast-{number:02}" for number in range(10)]


PARTITIONED = (
    'CREATE TABLE "my jobs" (id bigint, status text, created_at timestamptz,'
    " PRIMARY KEY (id, created_at)) PARTITION BY RANGE (created_at)",
    "CREATE TABLE jobs_1 PARTITION OF \"my jobs\" FOR VALUES FROM ('2000-01-01') TO ('2026-01-01')",
    'CREATE TABLE jobs_2 PARTITION OF "my jobs" DEFAULT',
)
PLAIN = ('CREATE TABLE "my jobs" (id bigint PRIMARY KEY, status text, created_at timestamptz)',)
BROKEN = (
    "CREATE FUNCTION fails(bigint) RETURNS int IMMUTABLE LANGUAGE plpgsql AS"
    " $$ BEGIN RAISE 'build fails'; END $$",
    "INSERT INTO \"my jobs\" VALUES (1, 'done', now())",
    'CREATE INDEX CONCURRENTLY "my jobs_in_flight" ON "my jobs" (fails(id))',
)


@pytest.mark.parametrize(
    ("made", "key"),
    [(PLAIN, ("id",)), (PLAIN + BROKEN, ("id",)), (PARTITIONED, ("id", "created_at"))],
    ids=["none", "invalid", "partitioned"],
)
async def test_the_index_that_is_printed_is_the_cure(
    blank: Database, nowhere: None, made: tuple[Any, ...], key: tuple[str, ...]
) -> None:
    target = Target(name="mine", table="my jobs", in_flight=("it's on",), columns=Columns(id=key))
    for statement in made:
        try:
            blank.do(statement)
        except psycopg.errors.RaiseException:  # an interrupted build leaves an invalid index
            assert statement == BROKEN[-1]
    [line] = [line for line in amiss(await examine(target)) if line.about == "index"]
    assert line.level is Level.WARNING
    printed: Any = line.way_out.partition("as the owner: ")[2]
    for statement in printed.split(";"):
        blank.do(statement)
    [cured] = [line for line in await examine(target) if line.about == "index"]
    assert (cured.level, cured.told) == (
        Level.OK,
        "detection is served by " + ", ".join(indexes(blank)),
    )


def indexes(db: Database) -> list[str]:
    """The leaves' indexes, or the table's own, of those that are partial."""
    rows = db.do(
        "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " WHERE i.indpred IS NOT NULL AND c.relkind = 'i' ORDER BY 1"
    )
    return [row["relname"] for row in rows]


async def test_an_index_of_the_status_itself_serves_too(well: Database, nowhere: None) -> None:
    well.do("DROP INDEX worker_runs_in_flight")
    well.do("CREATE INDEX by_status ON worker_runs (status)")
    assert amiss(await examine(Target())) == []


async def test_a_ledger_that_is_not_there_is_one_failure(blank: Database, nowhere: None) -> None:
    blank.do("CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz)")
    lines = amiss(await examine(Target(name="mine", table="jobs")))
    [failure] = [line for line in lines if line.level is Level.FAILURE]
    assert failure.about == "ledger"
    assert "lacks ledger_0001" in failure.told
    assert "`orphan-recovery migrate --target mine`" in failure.way_out


@pytest.mark.parametrize(
    ("taken", "about", "told"),
    [
        ("UPDATE (status, error) ON worker_runs", "privileges", "lacks UPDATE (status), UPDATE ("),
        ("SELECT ON worker_runs", "privileges", "lacks SELECT"),
        ("INSERT ON orphan_recovery.verdicts", "ledger", "INSERT on orphan_recovery.verdicts"),
        ("UPDATE ON orphan_recovery.sweeps", "ledger", "UPDATE on orphan_recovery.sweeps"),
    ],
)
async def test_a_role_that_lacks_a_right_is_told_which(
    well: Database,
    other: Database,
    nowhere: None,
    monkeypatch: pytest.MonkeyPatch,
    taken: str,
    about: str,
    told: str,
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", other.url)
    assert amiss(await examine(Target())) == []
    who = psycopg.sql.Identifier(str(make_url(other.url).username))
    if "(" in taken:  # a right on the whole table covers its columns
        well.do(psycopg.sql.SQL("REVOKE UPDATE ON worker_runs FROM {}").format(who))  # type: ignore[arg-type]
        grant = "GRANT UPDATE (success, completed_at) ON worker_runs TO {}"
        well.do(psycopg.sql.SQL(grant).format(who))  # type: ignore[arg-type]
    else:
        well.do(psycopg.sql.SQL(f"REVOKE {taken} FROM {{}}").format(who))  # type: ignore[arg-type]
    lines = amiss(await examine(Target()))
    assert (lines[0].level, lines[0].about) == (Level.FAILURE, about)
    assert told in lines[0].told
    assert "orphan-recovery sql --target default" in lines[0].way_out
    if not taken.startswith("SELECT"):
        assert len(lines) == 1
    else:  # a question that could not be asked is a failure, not an omission
        [_, unasked] = lines
        assert (unasked.level, unasked.about) == (Level.FAILURE, "privileges")
        which = "could not be asked, of statuses, queue, index, clocks, threshold: Insufficient"
        assert unasked.told.startswith(which)
        assert "lacks a right: `orphan-recovery sql --target default`" in unasked.way_out


async def test_a_role_that_may_not_look_into_the_ledger_is_told_so_once_and_who_may(
    well: Database, other: Database, nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", other.url)
    who = psycopg.sql.Identifier(str(make_url(other.url).username))
    revoke = psycopg.sql.SQL("REVOKE USAGE ON SCHEMA orphan_recovery FROM {}").format(who)
    well.do(revoke)  # type: ignore[arg-type]
    [line] = amiss(await examine(Target()))
    assert (line.level, line.about) == (Level.FAILURE, "privileges")
    told = "could not be asked, of truth trigger, ledger, hold, contests, last sweep: InsufficientP"
    assert line.told.startswith(told)
    assert "lacks a right: `orphan-recovery sql --target default`" in line.way_out
    as_that_role = run("sql")
    assert (as_that_role.returncode, as_that_role.stdout) == (2, "")
    assert as_that_role.stderr.endswith(
        "have the tables' owner run this command, with an address of the owner's in "
        "ORPHAN_RECOVERY_DATABASE_URL\n"
    )


async def test_row_security_that_hides_rows_is_a_failure(
    well: Database, other: Database, nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    well.do("ALTER TABLE worker_runs ENABLE ROW LEVEL SECURITY")
    well.do("CREATE POLICY mine ON worker_runs USING (tenant_id = 'tenant-1')")
    assert amiss(await examine(Target())) == [], "its owner sees every row"
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", other.url)
    [line] = amiss(await examine(Target()))
    assert (line.level, line.about) == (Level.FAILURE, "privileges")
    assert "row security may hide rows of worker_runs from this role" in line.told
    assert "BYPASSRLS" in line.way_out
    well.do("CREATE POLICY every ON worker_runs USING (true)")
    assert amiss(await examine(Target())) == []


async def test_that_recovery_is_switched_off_is_a_warning(
    well: Database, nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORPHAN_RECOVERY_ENABLED", "false")
    [line] = amiss(await examine(Target()))
    assert (line.level, line.about) == (Level.WARNING, "configuration")
    assert line.told.startswith("recovery is switched off by ORPHAN_RECOVERY_ENABLED")


async def test_an_unreachable_database_is_one_failure_without_the_password(
    nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://me:S3cret@127.0.0.1:{free_port()}/runs"
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", url)
    [line] = amiss(await examine(Target()))
    assert (line.level, line.about) == (Level.FAILURE, "database")
    assert "OperationalError" in line.told
    assert "the network" in line.way_out
    assert "S3cret" not in line.told
    monkeypatch.delenv("ORPHAN_RECOVERY_DATABASE_URL")
    monkeypatch.delenv("DATABASE_URL", raising=False)
    [line] = amiss(await examine(Target()))
    assert (line.level, line.about) == (Level.FAILURE, "database")
    assert "set ORPHAN_RECOVERY_DATABASE_URL" in line.told


async def test_it_writes_nothing_and_needs_no_right_to_write(
    well: Database, other: Database, nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = psycopg.sql.Identifier(str(make_url(other.url).username))
    for statement in (
        "REVOKE ALL ON ALL TABLES IN SCHEMA public, orphan_recovery FROM {}",
        "GRANT SELECT ON ALL TABLES IN SCHEMA public, orphan_recovery TO {}",
        "ALTER ROLE {} SET default_transaction_read_only = on",
    ):
        well.do(psycopg.sql.SQL(statement).format(who))  # type: ignore[arg-type]
    well.add_run("orphan")
    before = contents(well)
    as_owner = await examine(Target())
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", other.url)
    as_reader = await examine(Target())
    assert contents(well) == before
    assert [line.about for line in as_reader] == [line.about for line in as_owner] == ALL_LINES
    assert {line.about for line in amiss(as_reader)} == {"privileges", "ledger"}


async def test_workers_that_beat_in_a_table_of_their_own_are_a_sample_too(
    blank: Database, nowhere: None
) -> None:
    blank.do("CREATE TABLE workers (id int PRIMARY KEY, seen timestamptz)")
    blank.do(
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz, error text,"
        " completed_at timestamptz, worker_id int)"
    )
    blank.do(
        "INSERT INTO workers SELECT n, now() - interval '9 minutes' FROM generate_series(1, 5) n"
    )
    blank.do(
        "INSERT INTO jobs SELECT n, 'running', now() - interval '1 day', NULL, NULL, n"
        " FROM generate_series(1, 5) n"
    )
    target = Target(
        name="mine",
        table="jobs",
        worker_heartbeat=Elsewhere(
            table="workers", key="id", run_key="worker_id", last_seen="seen"
        ),
    )
    migrate(target)
    failures = [line for line in amiss(await examine(target)) if line.level is Level.FAILURE]
    assert [line.about for line in failures] == ["threshold"]
    assert re.search(r"a beat every 18 min.*estimated from 5 workers that beat\)", failures[0].told)


async def test_what_the_table_cannot_tell_is_a_warning(blank: Database, nowhere: None) -> None:
    blank.do("CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz)")
    target = Target(name="mine", table="jobs")
    migrate(target)
    lines = amiss(await examine(target))
    assert {line.level for line in lines} == {Level.WARNING}
    told = [f"{line.about}: {line.told}" for line in lines]
    assert told[:2] == [
        "columns: no column for error, completed_at: a marked run will not say so in its row",
        "columns: no column for worker_id: that a run changed hands is not seen",
    ]
    assert [line.about for line in lines[2:]] == ["truth trigger", "threshold", "last sweep"]
    assert "runs do not beat, so that age is taken for silence" in told[3]


JOBS = (
    "CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz, worker_id text,"
    " started_at timestamptz, error text, completed_at timestamptz)"
)
FINISHED = (
    "INSERT INTO jobs (id, status, created_at, completed_at, worker_id)"
    " SELECT n, 'completed', now() - CASE WHEN n <= %s THEN interval '50 minutes'"
    " ELSE interval '1 minute' END, now(), 'w' FROM generate_series(1, %s) AS n"
)
EVENTS = Elsewhere(table="events", key="job", run_key="id", last_seen="at")


async def about(what: str, target: Target) -> list[Finding]:
    return [finding for finding in await examine(target) if finding.about == what]


@pytest.mark.parametrize(
    ("slow", "runs", "level", "told"),
    [
        (21, 25, Level.FAILURE, "21"),
        (6, 100, Level.FAILURE, "6"),
        (5, 100, Level.WARNING, "5"),
        (0, 25, Level.WARNING, "none"),
        (9, 10, Level.WARNING, "9"),  # of so few nothing is decided
        (0, 0, Level.WARNING, None),
    ],
)
async def test_where_runs_do_not_beat_those_that_finished_are_held_against_the_threshold(
    blank: Database, nowhere: None, slow: int, runs: int, level: Level, told: str | None
) -> None:
    blank.do(JOBS)
    blank.do(FINISHED, slow, runs)
    [line] = await about("threshold", Target(name="mine", table="jobs"))
    assert line.level is level
    said = line.told.partition("; runs do not beat, so that age is taken for silence")[2]
    would_have = f"; of {runs} runs that finished in the last 30 days it would have crashed {told}"
    assert said == (would_have if told else "")
    assert "`orphan-recovery backtest --target mine` says how many runs" in (line.way_out or "")


async def test_a_threshold_that_takes_long_to_replay_is_left_to_the_backtest(
    blank: Database, nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "REPLAY_MS", 1)
    blank.do(JOBS)
    blank.do(FINISHED, 50_000, 50_000)
    [line] = await about("threshold", Target(name="mine", table="jobs"))
    assert line.level is Level.WARNING
    assert line.told.endswith("; runs do not beat, so that age is taken for silence")


async def test_what_events_told_then_nobody_knows_so_that_no_threshold_is_refused(
    blank: Database, nowhere: None
) -> None:
    blank.do(JOBS)
    blank.do(FINISHED, 25, 25)
    blank.do("CREATE TABLE events (job int, at timestamptz)")
    [line] = await about("threshold", Target(name="mine", table="jobs", run_events=EVENTS))
    assert line.level is Level.WARNING
    assert "finished" not in line.told


CHECKED = "ALTER TABLE jobs ADD CHECK (status IN ('running', 'failed, too', 'it''s failed'))"


@pytest.mark.parametrize(
    ("made", "crashed", "known"),
    [
        ([], "failed", False),
        (["INSERT INTO jobs VALUES (2, 'failed', now())"], "failed", True),
        (["DELETE FROM jobs"], "failed", True),
        ([CHECKED.replace("it''s ", "")], "failed", True),
        (["ALTER TABLE jobs ADD CHECK (status <> 'failed, twice')"], "failed", False),
        ([CHECKED], "it's failed", True),
        (["ALTER TABLE jobs ADD CHECK (error <> 'failed')"], "failed", False),
        (
            [
                "CREATE DOMAIN state AS text CHECK (VALUE IN ('running', 'failed'))",
                "ALTER TABLE jobs ALTER status TYPE state",
            ],
            "failed",
            True,
        ),
        (
            [
                "CREATE TABLE states (name text PRIMARY KEY)",
                "INSERT INTO states VALUES ('running')",
                "ALTER TABLE jobs ADD FOREIGN KEY (status) REFERENCES states",
            ],
            "failed",
            True,
        ),
        (
            [
                "ALTER TABLE jobs ALTER status TYPE int USING 1",
                "ALTER TABLE jobs ADD CHECK (status < 99)",
            ],
            "9",
            False,
        ),
        (
            [
                "ALTER TABLE jobs ALTER status TYPE int USING 1",
                "ALTER TABLE jobs ADD CHECK (status IN (1, 9, 2))",
            ],
            "9",
            True,
        ),
    ],
)
async def test_a_status_that_nothing_of_the_table_knows_is_asked_about_before_a_mark_writes_it(
    blank: Database, nowhere: None, made: list[Any], crashed: str, known: bool
) -> None:
    blank.do(JOBS)
    blank.do("INSERT INTO jobs VALUES (1, 'running', now())")
    for statement in made:
        blank.do(statement)
    in_flight = ("1",) if crashed == "9" else ("running",)
    target = Target(name="mine", table="jobs", in_flight=in_flight, crashed=crashed)
    lines = [line for line in await about("statuses", target) if line.level is Level.WARNING]
    lines = [line for line in lines if "that a mark writes" in line.told]
    if known:
        assert lines == []
    else:
        [line] = lines
        assert line.told.startswith(f"no row has the status {crashed!r} that a mark writes")
        assert "targets.mine.crashed be what it calls" in (line.way_out or "")


@pytest.mark.parametrize(
    ("key", "kept", "level", "told"),
    [
        ("int", (1, 2), Level.OK, "2 of 2 runs in flight that point to 'events' find a time there"),
        ("int", (1,), Level.OK, "1 of 2 runs in flight that point to"),
        ("int", (7,), Level.WARNING, "0 of 2 runs in flight that point to 'events' find a time"),
        ("text", (1,), Level.WARNING, "run_key 'id' is integer, and key 'job' of 'events' text"),
        ("text", (7,), Level.FAILURE, "only their age is known; run_key 'id' is integer, and key"),
    ],
)
async def test_whether_runs_find_their_events_is_a_line_of_its_own(
    blank: Database,
    nowhere: None,
    key: str,
    kept: tuple[int, ...],
    level: Level,
    told: str,
) -> None:
    blank.do(JOBS)
    blank.do("INSERT INTO jobs SELECT n, 'running', now() FROM generate_series(1, 2) AS n")
    blank.do("INSERT INTO jobs VALUES (3, 'completed', now())")
    blank.do("CREATE TABLE events (job int, at timestamptz)")
    blank.do("INSERT INTO events SELECT n, now() FROM unnest(%s::int[]) AS n", list(kept))
    if key == "text":
        blank.do("ALTER TABLE events ALTER job TYPE text")
    [line] = await about("run_events", Target(name="mine", table="jobs", run_events=EVENTS))
    assert (line.level, line.about) == (level, "run_events")
    assert told in line.told
    if level is not Level.OK:
        assert "run_events names the columns that belong together" in (line.way_out or "")


async def test_of_workers_only_the_runs_that_name_one_are_counted(
    blank: Database, nowhere: None
) -> None:
    blank.do(JOBS)
    blank.do("CREATE TABLE workers (id text PRIMARY KEY, seen timestamptz)")
    kept = Elsewhere(table="workers", key="id", run_key="worker_id", last_seen="seen")
    target = Target(name="mine", table="jobs", worker_heartbeat=kept)
    blank.do("INSERT INTO jobs VALUES (1, 'queued', now(), NULL)")
    [line] = await about("worker_heartbeat", target)
    assert (line.level, line.told) == (Level.OK, "no run in flight points to 'workers'")
    blank.do("INSERT INTO jobs VALUES (2, 'running', now(), 'gone')")
    [line] = await about("worker_heartbeat", target)
    assert line.level is Level.WARNING
    assert "0 of 1 runs in flight that point to 'workers'" in line.told
    assert "so that only their age is known; their key is not there" in line.told


async def test_a_backlog_that_would_be_marked_is_a_warning_and_a_rule_is_the_way_out(
    well: Database, nowhere: None
) -> None:
    for number in range(3):
        well.add_run(f"waits-{number}", status="queued", worker=None)
    well.do("UPDATE worker_runs SET started_at = NULL WHERE worker_id IS NULL")
    well.add_run("just queued", status="queued", worker=None, age="1 minute")
    well.add_run("begun", status="queued", worker="w1")
    [line] = [line for line in amiss(await examine(Target())) if line.about == "queue"]
    assert line.level is Level.WARNING
    assert line.told.endswith("silent for their threshold, and would be marked: queued: 3")
    assert 'match = { status = "queued" } and a longer threshold_minutes, or never' in line.way_out
    for so in ({"never": True}, {"threshold_minutes": 240}):
        rule = Rule(match={"status": "queued"}, **so)
        assert await about("queue", Target(rules=(rule,))) == []


async def test_where_no_worker_is_kept_nobody_knows_what_was_begun(
    blank: Database, nowhere: None
) -> None:
    blank.do("CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz)")
    blank.do("INSERT INTO jobs VALUES (1, 'running', now() - interval '2 hours')")
    assert await about("queue", Target(name="mine", table="jobs")) == []


@pytest.mark.parametrize("later", [("completed", "crashed"), None], ids=["alike", "unlike"])
async def test_a_truth_trigger_that_is_not_asked_for_any_more_is_said_with_what_drops_it(
    blank: Database, nowhere: None, later: tuple[str, ...] | None
) -> None:
    blank.do(JOBS)
    was = Target(name="mine", table="jobs", terminal=("completed", "crashed"), truth_trigger=True)
    migrate(was)
    assert [line.level for line in await about("truth trigger", was)] == [Level.OK]
    target = Target(name="mine", table="jobs", terminal=later)
    migrate(target)
    [line] = await about("truth trigger", target)
    assert line.level is Level.WARNING
    assert "terminal rows are immutable, though" in line.told
    assert "targets.mine.truth_trigger does not ask for that" in line.told
    way_out = line.way_out or ""
    assert way_out.startswith("set it to true; or, as the owner: DROP TRIGGER")
    drop: Any = way_out.partition("as the owner: ")[2]
    blank.do(drop)
    [line] = await about("truth trigger", target)
    assert "nothing keeps a late worker from overwriting" in line.told


def test_the_exit_code_is_1_exactly_when_something_fails(
    db: Database, nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    warned = run("doctor")
    assert (warned.returncode, warned.stderr) == (0, "")
    lines = warned.stdout.splitlines()
    assert lines[0].startswith("ok       configuration: target 'default'")
    assert [line for line in lines if line.startswith("warning  last sweep: no sweep")]
    assert [line for line in lines if line.startswith("          → set PREFECT_API_URL")]
    assert lines[-1] == "11 ok, 3 warning, 0 failure"

    db.do("ALTER TABLE worker_runs DISABLE TRIGGER USER")
    failed = run("doctor", "--json")
    assert (failed.returncode, failed.stderr) == (1, "")
    told = json.loads(failed.stdout)
    assert [line["about"] for line in told] == ALL_LINES
    assert {frozenset(line) for line in told} == {frozenset(("level", "about", "told", "way_out"))}
    assert [line["about"] for line in told if line["level"] == "failure"] == ["truth trigger"]
    for line in told:
        assert (line["way_out"] is None) == (line["level"] == "ok")
