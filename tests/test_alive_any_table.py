"""Alive on tables of other teams: their words, keys and times, and a table of workers."""

import asyncio
from pathlib import Path
from typing import LiteralString
from uuid import UUID, uuid4

import pytest
from psycopg import sql

from alive.proxy import Proxy
from alive_support import COMMIT, OFTEN, contests, sweep
from orphan_recovery import ConfigurationError
from orphan_recovery.alive import LostBy, RunLost, claim, finish_run, keep_alive
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.targets import find_target
from support import Database, until
from tables_support import configure, do, set_for_all

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


PRESSES = """
[targets.press]
table = "print_jobs"
in_flight = ["working"]
waiting = ["new"]
terminal = ["done", "broken", "lost"]
crashed = "lost"
threshold_minutes = 20

[targets.press.columns]
id = "job"
status = "state"
worker_id = "held_by"
created_at = "made_at"
started_at = "begun_at"
heartbeat_at = "seen_at"
completed_at = "ended_at"
error = "trouble"
output_json = "proof"
"""
PRINT_JOBS = (
    "CREATE TYPE state AS ENUM ('new', 'working', 'done', 'broken', 'lost');"
    "CREATE TABLE print_jobs (job uuid PRIMARY KEY, state state NOT NULL, held_by uuid,"
    " made_at timestamp NOT NULL DEFAULT timezone('UTC', now()), begun_at timestamp,"
    " seen_at timestamp, ended_at timestamp, trouble varchar(20), proof jsonb)"
)


def fresh(db: Database, column: str) -> bool:
    """Whether a naive time is about now, in UTC."""
    return bool(
        db.one(
            f"SELECT abs(extract(epoch FROM now() AT TIME ZONE 'UTC' - {column})) < 5"
            " FROM print_jobs"
        )
    )


async def test_a_status_that_is_a_number_may_be_given_as_one(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank.do(
        "CREATE TABLE mails (id int PRIMARY KEY, status smallint NOT NULL, worker_id text,"
        " created_at timestamptz NOT NULL DEFAULT now())"
    )
    blank.do("INSERT INTO mails (id, status) VALUES (1, 0)")
    described = (
        "[targets.mail]\ntable = 'mails'\nin_flight = [1, 2]\nwaiting = [0]\nterminal = [3, 9]\n"
        "crashed = 9\n"
    )
    configure(tmp_path, monkeypatch, described, "mail")
    assert await claim("1", "w", status=2)
    await finish_run("1", worker_id="w", status=3)
    assert blank.one("SELECT status FROM mails") == 3


async def test_a_lost_acknowledgement_is_told_by_a_status_that_its_column_writes_otherwise(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """As 1.0 where it was given as 1: an earlier try was heard all the same."""
    blank.do(
        "CREATE TABLE mails (id int PRIMARY KEY, status numeric(3, 1) NOT NULL, worker_id text,"
        " created_at timestamptz NOT NULL DEFAULT now())"
    )
    blank.do("INSERT INTO mails (id, status) VALUES (1, 0)")
    described = (
        "[targets.mail]\ntable = 'mails'\nin_flight = [1]\nwaiting = [0]\nterminal = [3, 9]\n"
        "crashed = 9\n"
    )
    configure(tmp_path, monkeypatch, described, "mail")
    with Proxy(blank.url) as proxy:
        monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", proxy.url)
        proxy.lose_reply_to(COMMIT)
        assert await claim("1", "w")
        assert proxy.has_lost_a_reply.is_set()
        proxy.has_lost_a_reply.clear()
        proxy.lose_reply_to(COMMIT)
        await finish_run("1", worker_id="w", status=3)
        assert proxy.has_lost_a_reply.is_set()
    assert blank.one("SELECT status FROM mails") == 3


async def test_a_table_with_words_keys_and_naive_times_of_its_own(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_for_all(blank, "TimeZone = 'Asia/Kolkata'")
    with Database(blank.url) as db:
        db.do(PRINT_JOBS)
        target = configure(tmp_path, monkeypatch, PRESSES, "press")
        migrate(target)
        job, press, other = uuid4(), uuid4(), uuid4()
        db.do("INSERT INTO print_jobs (job, state) VALUES (%s, 'new')", job)
        shown = str(job).upper()  # as a caller may write it
        assert await claim(shown, str(press)) is True
        assert await claim(shown, str(other)) is False
        assert db.do("SELECT state::text, held_by FROM print_jobs") == [
            {"state": "working", "held_by": press}
        ]
        assert fresh(db, "begun_at")
        assert fresh(db, "seen_at")
        db.do("UPDATE print_jobs SET seen_at = NULL")
        async with keep_alive(shown, worker_id=str(press), interval=OFTEN) as alive:
            await asyncio.to_thread(
                until, lambda: db.one("SELECT seen_at FROM print_jobs") is not None, "a beat", 10
            )
            assert fresh(db, "seen_at")
            with pytest.raises(RunLost) as raised:
                await finish_run(shown, worker_id=str(other), status="done")
            assert raised.value.by is LostBy.CHANGED_HANDS
            await alive.finish(status="broken", output={"pages": 3}, error="out of paper " * 5)
        assert fresh(db, "ended_at")
        assert db.do("SELECT state::text, proof, trouble FROM print_jobs") == [
            {"state": "broken", "proof": {"pages": 3}, "trouble": ("out of paper " * 5)[:20]}
        ]


async def test_a_late_result_is_contested_however_its_key_is_written(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has the key as the database writes it."""
    blank.do(PRINT_JOBS)
    target = configure(tmp_path, monkeypatch, PRESSES, "press")
    migrate(target)
    job = UUID("abcdef00-0000-4000-8000-000000000001")
    blank.do(
        "INSERT INTO print_jobs (job, state, made_at) VALUES (%s, 'working', '2020-01-01')", job
    )
    await sweep(target)
    assert blank.outcomes() == {str(job): "marked"}
    for written in (str(job), str(job).upper(), job.hex, job.urn.removeprefix("urn:uuid:")):
        with pytest.raises(RunLost) as raised:
            await finish_run(written, status="done")
        assert (raised.value.by, raised.value.contested) == (LostBy.MARKED, True), written
    assert [contest["run_id"] for contest in contests(blank)] == [str(job)]


QUEUE = """
[targets.queue]
table = "jobs"
in_flight = ["running"]
terminal = ["done", "failed"]
crashed = "failed"
"""
LATER: LiteralString = (
    "SELECT now() > max(judged_at) + interval '1.1 s' FROM orphan_recovery.verdicts"
)


async def a_marked_job(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    """In a table whose queue has one word for what crashed and for what failed."""
    do(
        blank,
        sql.SQL(
            "CREATE TABLE jobs (id int PRIMARY KEY, status text NOT NULL, worker_id text,"
            " created_at timestamptz DEFAULT now(), {} timestamptz)"
        ).format(sql.Identifier(column)),
    )
    target = configure(tmp_path, monkeypatch, QUEUE, "queue")
    migrate(target)
    blank.do("INSERT INTO jobs VALUES (1, 'running', 'w', now() - interval '3 hours')")
    await sweep(target)
    assert blank.outcomes() == {"1": "marked"}


@pytest.mark.parametrize("shown_by", ["started_at", "heartbeat_at", "completed_at"])
async def test_a_run_that_was_tried_again_in_its_own_row_and_failed_by_itself_contests_nothing(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown_by: str
) -> None:
    """Its worker, which is back, reports once more: the verdict on the try before is none of it."""
    await a_marked_job(blank, tmp_path, monkeypatch, shown_by)
    again = sql.SQL("UPDATE jobs SET status = 'running', {} = {}")
    value = "NULL" if shown_by == "completed_at" else "now()"
    do(blank, again.format(sql.Identifier(shown_by), sql.SQL(value)))
    await asyncio.to_thread(until, lambda: blank.one(LATER), "more than a moment to be over")
    await finish_run("1", worker_id="w", status="failed")
    with pytest.raises(RunLost) as raised:
        await finish_run("1", worker_id="w", status="failed")
    assert (raised.value.contested, contests(blank)) == (False, [])


async def test_a_late_result_is_contested_though_the_run_was_tried_again_and_marked_again(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is a verdict's still, if not that on the worker which reports."""
    await a_marked_job(blank, tmp_path, monkeypatch, "completed_at")
    await asyncio.to_thread(until, lambda: blank.one(LATER), "more than a moment to be over")
    blank.do("UPDATE jobs SET status = 'running', worker_id = 'other'")
    await sweep(find_target("queue"))
    with pytest.raises(RunLost) as raised:
        await finish_run("1", worker_id="w", status="done")
    assert raised.value.contested
    [first, _] = blank.verdicts()
    assert [contest["sweep_id"] for contest in contests(blank)] == [first["sweep_id"]]


async def test_a_late_result_is_contested_whatever_was_written_to_the_run_that_stands_crashed(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger's own time of its end, or a beat that does not ask whether it has ended."""
    blank.do(
        "CREATE FUNCTION end_now() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.completed_at := clock_timestamp(); RETURN NEW; END $$"
    )
    await a_marked_job(blank, tmp_path, monkeypatch, "completed_at")
    blank.do("ALTER TABLE jobs ADD heartbeat_at timestamptz")
    blank.do("CREATE TRIGGER ends BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION end_now()")
    blank.do("UPDATE jobs SET status = 'running', worker_id = 'other'")
    await sweep(find_target("queue"))
    blank.do("DROP TRIGGER ends ON jobs")
    assert blank.one(
        "SELECT j.completed_at > v.judged_at FROM jobs j, orphan_recovery.verdicts v"
        " WHERE v.worker_id = 'other'"
    )
    blank.do("UPDATE jobs SET heartbeat_at = now()")
    with pytest.raises(RunLost) as raised:
        await finish_run("1", worker_id="other", status="done")
    assert raised.value.contested


async def test_a_status_that_the_target_does_not_know_is_refused(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is neither in flight nor terminal would be nobody's."""
    blank.do(PRINT_JOBS.replace("state state", "state text"))
    target = configure(tmp_path, monkeypatch, PRESSES, "press")
    migrate(target)
    job = uuid4()
    blank.do("INSERT INTO print_jobs (job, state) VALUES (%s, 'working')", job)
    with pytest.raises(ConfigurationError, match="completed"):
        await finish_run(str(job))
    assert blank.one("SELECT state FROM print_jobs") == "working"


PARTS = """
[targets.parts]
table = "parts"
in_flight = ["queued", "running"]
crashed = "crashed"
columns = { id = ["shop", "number"] }
"""


async def test_a_key_of_several_columns(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank.do(
        "CREATE TABLE parts (shop text, number bigint, status text NOT NULL, worker_id text,"
        " created_at timestamptz DEFAULT now(), heartbeat_at timestamptz,"
        " PRIMARY KEY (shop, number))"
    )
    target = configure(tmp_path, monkeypatch, PARTS, "parts")
    migrate(target)
    blank.do("INSERT INTO parts VALUES ('a\"b', 7, 'queued'), ('a\"b', 8, 'queued')")
    key = r'["a\"b", "7"]'
    assert await claim(key, "worker-1") is True
    assert await claim(key, "worker-2") is False
    async with keep_alive(key, worker_id="worker-1", interval=OFTEN) as alive:
        before = blank.one("SELECT now()")
        await asyncio.to_thread(
            until,
            lambda: blank.one("SELECT heartbeat_at > %s FROM parts WHERE number = 7", before),
            "a beat",
            10,
        )
        await alive.finish()
    rows = blank.do("SELECT number, status, worker_id FROM parts ORDER BY number")
    assert [tuple(row.values()) for row in rows] == [
        (7, "completed", "worker-1"),
        (8, "queued", None),
    ]
    blank.do("UPDATE parts SET created_at = '2020-01-01' WHERE number = 8")
    await sweep(target)
    for written in (r'["a\"b", "8"]', r'["a\"b","8"]'):
        with pytest.raises(RunLost) as raised:
            await finish_run(written)
        assert (raised.value.by, raised.value.contested) == (LostBy.MARKED, True), written
    assert len(contests(blank)) == 1


MINED = """
[targets.mine]
table = "jobs"
in_flight = ["running"]
crashed = "crashed"
[targets.mine.worker_heartbeat]
table = "miners"
key = "name"
run_key = "worker_id"
last_seen = "seen_at"
"""


async def test_where_only_workers_beat_the_workers_row_beats_and_the_runs_do_not(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank.do(
        "CREATE TABLE jobs (id int PRIMARY KEY, status text NOT NULL, worker_id text,"
        " created_at timestamptz DEFAULT now());"
        "CREATE TABLE miners (name text PRIMARY KEY, seen_at timestamp);"
        "INSERT INTO miners VALUES ('miner-1'), ('miner-2'), ('miner-3');"
        "INSERT INTO jobs SELECT n, 'running', 'miner-1' FROM generate_series(1, 50) AS n;"
        "INSERT INTO jobs VALUES (51, 'running', 'miner-2'), (52, 'done', 'miner-3');"
        "CREATE TABLE writes (miner text);"
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO writes VALUES (NEW.name); RETURN NEW; END $$;"
        "CREATE TRIGGER note AFTER UPDATE ON miners FOR EACH ROW EXECUTE FUNCTION note()"
    )
    configure(tmp_path, monkeypatch, MINED, "mine")
    set_for_all(blank, "TimeZone = 'Asia/Kolkata'")
    before = blank.do("SELECT xmin, t::text FROM jobs t ORDER BY id")
    held = [keep_alive(str(n), worker_id="miner-1", interval=1) for n in range(1, 53)]
    alives = await asyncio.gather(*(block.__aenter__() for block in held))
    taken, ended = alives[50], alives[51]
    for alive in (taken, ended):
        assert await asyncio.to_thread(alive.is_lost.wait, 10)
    writes = blank.do("SELECT miner, count(*) FROM writes GROUP BY miner")
    assert [row["miner"] for row in writes] == ["miner-1"]
    blank.do("TRUNCATE writes")
    await asyncio.to_thread(
        until, lambda: blank.one("SELECT count(*) FROM writes") >= 3, "three beats", 10
    )
    assert blank.one("SELECT count(*) FROM writes") <= 4, "one write for all of its runs"
    assert blank.one(
        "SELECT abs(extract(epoch FROM now() AT TIME ZONE 'UTC' - seen_at)) < 5 FROM miners"
        " WHERE name = 'miner-1'"
    )
    assert blank.do("SELECT xmin, t::text FROM jobs t ORDER BY id") == before
    assert [alive.lost for alive in alives[:50]] == [None] * 50
    assert taken.lost is not None
    assert ended.lost is not None
    assert (taken.lost.by, ended.lost.by) == (LostBy.CHANGED_HANDS, LostBy.FINISHED)
    for block in held:
        await block.__aexit__(None, None, None)
