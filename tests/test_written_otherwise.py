"""Keys and workers that their column writes otherwise than they were given are still the same."""

from pathlib import Path
from typing import LiteralString

import pytest

from alive_support import OFTEN
from lock_support import await_locks
from orphan_recovery.alive import claim, finish_run, keep_alive
from orphan_recovery.backtest.measure import backtest_target
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Rule, Target
from support import Database, until
from tables_support import configure, sweep

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")

JOBS = "[targets.jobs]\ntable = 'jobs'\nthreshold_minutes = 1\n"
GIVEN = {"uuid": "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "int": "007"}
KINDS = pytest.mark.parametrize("kind", ["uuid", "int"])


def make(
    blank: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: LiteralString,
    more: str = "",
) -> Target:
    """A table whose key and whose workers are of that kind; and one run, which waits."""
    blank.do(
        "CREATE TABLE jobs (id "
        + kind
        + " PRIMARY KEY, status text NOT NULL, worker_id "
        + kind
        + ", created_at timestamptz, heartbeat_at timestamptz)"
    )
    blank.do(
        "INSERT INTO jobs VALUES (%s, 'queued', NULL, now() - interval '2 hours')", GIVEN[kind]
    )
    blank.do("CREATE TABLE workers (name text PRIMARY KEY, seen timestamptz)")
    target = configure(tmp_path, monkeypatch, JOBS + more, "jobs")
    migrate(target)
    return target


def fresh(db: Database) -> bool:
    return bool(db.one("SELECT heartbeat_at > now() - interval '2 seconds' FROM jobs"))


@KINDS
async def test_a_worker_claims_beats_and_finishes(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: LiteralString
) -> None:
    make(blank, tmp_path, monkeypatch, kind)
    given = GIVEN[kind]
    blank.do("UPDATE jobs SET worker_id = id")  # it was meant for this one
    assert await claim(given, given)
    assert not await claim(given, given), "it is running"
    blank.do("UPDATE jobs SET heartbeat_at = now() - interval '50 seconds'")
    with keep_alive(given, worker_id=given, interval=OFTEN) as alive:
        until(lambda: fresh(blank), "a beat", 20)
        assert alive.lost is None
    await finish_run(given, worker_id=given)
    assert blank.one("SELECT status FROM jobs") == "completed"


@KINDS
async def test_a_sweep_of_that_worker_finds_its_runs(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: LiteralString
) -> None:
    target = make(blank, tmp_path, monkeypatch, kind)
    blank.do("UPDATE jobs SET status = 'running', worker_id = id")
    assert (await sweep(target, worker=GIVEN[kind])).recovered == 1


@KINDS
@pytest.mark.parametrize("lock", ["run", "worker"])
async def test_the_lock_that_a_worker_holds_is_the_one_that_a_sweep_looks_for(
    blank: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: LiteralString,
    lock: str,
) -> None:
    more = f"lock = '{lock}'\nheartbeat_seconds = 0.2\n"
    target = make(blank, tmp_path, monkeypatch, kind, more)
    blank.do("UPDATE jobs SET status = 'running', worker_id = id")
    with keep_alive(GIVEN[kind], worker_id=GIVEN[kind]) as alive:
        await_locks(blank, 1)
        assert (await sweep(target)).detected == 0
        assert alive.lost is None


async def test_a_worker_is_found_by_a_uuid_that_a_text_has_in_capitals(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (
        "[targets.jobs.worker_heartbeat]\ntable = 'workers'\nkey = 'name'\n"
        "run_key = 'worker_id'\nlast_seen = 'seen'\n"
    )
    target = make(blank, tmp_path, monkeypatch, "uuid", more)
    blank.do("INSERT INTO workers VALUES (%s, now())", GIVEN["uuid"])
    blank.do("UPDATE jobs SET status = 'running', worker_id = id")
    assert (await sweep(target)).detected == 0
    blank.do("UPDATE workers SET seen = now() - interval '1 hour'")
    assert (await sweep(target)).recovered == 1


PATTERNS = pytest.mark.parametrize(
    "pattern", [GIVEN["uuid"], "A0EEBC99-*"], ids=["whole", "with a star"]
)


@PATTERNS
async def test_a_rule_matches_a_uuid_that_it_has_in_capitals(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    rule = f"[[targets.jobs.rules]]\nmatch = {{ worker_id = '{pattern}' }}\nnever = true\n"
    target = make(blank, tmp_path, monkeypatch, "uuid", rule)
    blank.do("UPDATE jobs SET status = 'running', worker_id = id")
    report = await sweep(target)
    assert (report.detected, report.as_dict()["exempt"]) == (0, 1)
    # So does what replays it, for a run that ended, and for one that only the ledger knows.
    blank.do("ALTER TABLE jobs ADD completed_at timestamptz")
    blank.do("UPDATE jobs SET status = 'completed', completed_at = now()")
    target = target.model_copy(update={"terminal": ("completed", "failed", "crashed")})
    tested = await backtest_target(target)
    assert (tested.replayed, [rule.runs for rule in tested.rules]) == (0, [1])


async def test_a_rule_matches_whatever_the_case_where_that_is_all_one_to_the_column(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank.do(  # as the extension makes it, which not every server has
        "CREATE TYPE citext;"
        "CREATE FUNCTION citextin(cstring) RETURNS citext LANGUAGE internal IMMUTABLE STRICT"
        " AS 'textin';"
        "CREATE FUNCTION citextout(citext) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT"
        " AS 'textout';"
        "CREATE TYPE citext (INPUT = citextin, OUTPUT = citextout, INTERNALLENGTH = VARIABLE,"
        " STORAGE = extended, CATEGORY = 'S', COLLATABLE = true);"
        "CREATE CAST (citext AS text) WITHOUT FUNCTION AS IMPLICIT;"
        "CREATE CAST (text AS citext) WITHOUT FUNCTION AS ASSIGNMENT"
    )
    target = make(blank, tmp_path, monkeypatch, "int")
    blank.do("ALTER TABLE jobs ADD task citext")
    blank.do("UPDATE jobs SET status = 'running', task = 'replay-É'")
    blank.do(
        "INSERT INTO jobs SELECT 8, status, 8, created_at, NULL, 'nightlY' FROM jobs;"
        "INSERT INTO jobs SELECT 9, status, 9, created_at, NULL, 'daily' FROM jobs WHERE id = 7"
    )
    rules = tuple(Rule(match={"task": task}, never=True) for task in ("Nightly", "REPLAY-*"))
    report = await sweep(target.model_copy(update={"rules": rules}))
    assert (report.recovered, report.as_dict()["exempt"]) == (1, 2)
