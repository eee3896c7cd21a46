"""Alive: what is wrong with one run of a process keeps none of the others from beating."""

import logging
from pathlib import Path
from typing import LiteralString

import pytest

from alive_support import OFTEN
from lock_support import await_locks
from orphan_recovery.alive import keep_alive
from orphan_recovery.schema.migrate import migrate
from support import Database, until
from tables_support import configure

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")

JOBS = "[targets.jobs]\ntable = 'jobs'\nthreshold_minutes = 1\n"
GOOD = {"int": "1", "uuid": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "text": "one"}
BAD = {"int": "abc", "uuid": "job-7", "text": "a\x00b"}


def make(blank: Database, kind: LiteralString) -> None:
    blank.do(
        "CREATE TABLE jobs (id " + kind + " PRIMARY KEY, status text NOT NULL, worker_id text,"
        " created_at timestamptz, heartbeat_at timestamptz)"
    )
    blank.do(
        "INSERT INTO jobs VALUES (%s, 'running', 'w', now() - interval '2 hours', now())",
        GOOD[kind],
    )


def await_beat(db: Database) -> None:
    """Return once the good run has beaten from now on."""
    before = db.one("SELECT now()")
    fresh = "SELECT count(*) FROM jobs WHERE heartbeat_at > %s"
    until(lambda: db.one(fresh, before) == 1, "a beat of the good run", 20)


@pytest.mark.parametrize("kind", ["int", "uuid", "text"])
def test_a_key_that_is_none_stops_no_other_beat(
    blank: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: LiteralString,
) -> None:
    """And is told once, by its name, for as long as it is so."""
    make(blank, kind)
    migrate(configure(tmp_path, monkeypatch, JOBS, "jobs"))
    caplog.set_level(logging.INFO, "orphan_recovery")
    with keep_alive(GOOD[kind], worker_id="w", interval=OFTEN) as alive:
        await_beat(blank)
        with keep_alive(BAD[kind], worker_id="w", interval=OFTEN):
            for _ in range(5):
                await_beat(blank)
        assert alive.lost is None
    [told] = [record for record in caplog.records if record.message == "beat_failed"]
    assert told.__dict__["run_id"] == BAD[kind]
    assert told.__dict__["error"]


def test_a_row_whose_trigger_raises_stops_no_other_beat(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(blank, "text")
    migrate(configure(tmp_path, monkeypatch, JOBS, "jobs"))
    blank.do("INSERT INTO jobs SELECT 'bad-' || n, 'running', 'w' FROM generate_series(1, 3) AS n")
    blank.do(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'not this one'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW"
        " WHEN (OLD.id LIKE 'bad-%%') EXECUTE FUNCTION refuse()"
    )
    hold = [keep_alive(f"bad-{n}", worker_id="w", interval=OFTEN) for n in (1, 2, 3)]
    with hold[0], hold[1], hold[2], keep_alive("one", worker_id="w", interval=OFTEN):
        for _ in range(3):
            await_beat(blank)


@pytest.mark.parametrize("lock", ["run", "worker"])
def test_a_key_that_is_none_drops_no_lock(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    make(blank, "int")
    described = f"{JOBS}lock = '{lock}'\nheartbeat_seconds = 0.2\n"
    migrate(configure(tmp_path, monkeypatch, described, "jobs"))
    with keep_alive("1", worker_id="w") as alive:
        await_locks(blank, 1)
        held = blank.one("SELECT min(pid) FROM pg_locks WHERE locktype = 'advisory'")
        with keep_alive("abc", worker_id="v"):
            blank.do("SELECT pg_sleep(1.5)")
            await_locks(blank, 1)
            now = blank.one("SELECT min(pid) FROM pg_locks WHERE locktype = 'advisory'")
        assert (now, alive.lost) == (held, None), "by the same connection"
