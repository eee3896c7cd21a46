"""Alive: whoever lives can prove it cheaply, and whoever cannot is told before it does harm.

Real workers in processes of their own, a real database, and a network between them that fails.
What takes a whole threshold goes on side by side from the beginning, and is looked at last.
"""

import asyncio
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from alive.proxy import Proxy
from conftest import _database
from orphan_recovery import ConfigurationError
from orphan_recovery.alive import (
    LostBy,
    RunLost,
    beater,
    claim,
    claim_sync,
    finish_run,
    finish_run_sync,
    keep_alive,
)
from orphan_recovery.demo.processes import Child, Processes
from orphan_recovery.migrate import migrate
from orphan_recovery.policy import RetryPlan
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.targets import Rule, Target, find_target
from support import Database, until
from tables_support import configure, set_for_all

WORKER = Path(__file__).with_name("alive") / "worker.py"
THRESHOLD = 60
"""Seconds: the least threshold there is."""
OFTEN = 0.2
"""Seconds between beats, where a test has to see several."""


class Beats:
    """Every statement that updates the runs, as the database itself saw it."""

    def __init__(self, db: Database) -> None:
        self._db = db
        db.do(
            "CREATE TABLE beats (at timestamptz, pid int, runs text[]);"
            "CREATE FUNCTION note_beat() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO beats SELECT statement_timestamp(), pg_backend_pid(),"
            " coalesce(array_agg(id ORDER BY id), '{}') FROM written; RETURN NULL; END $$;"
            "CREATE TRIGGER note_beat AFTER UPDATE ON worker_runs"
            " REFERENCING NEW TABLE AS written FOR EACH STATEMENT EXECUTE FUNCTION note_beat()"
        )

    def of(self, run: str) -> int:
        return int(self._db.one("SELECT count(*) FROM beats WHERE %s = ANY (runs)", run))

    def all(self) -> list[dict[str, Any]]:
        return self._db.do(
            "SELECT pid, cardinality(runs) AS runs, extract(epoch FROM at - lag(at)"
            " OVER (ORDER BY at))::float AS pause FROM beats ORDER BY at"
        )

    def pids(self, run: str) -> set[int]:
        rows = self._db.do("SELECT DISTINCT pid FROM beats WHERE %s = ANY (runs)", run)
        return {row["pid"] for row in rows}

    def await_more(self, run: str, count: int = 3) -> None:
        """Return once the run has beaten so many times from now on."""
        before = self.of(run)
        until(lambda: self.of(run) >= before + count, f"{count} beats of {run}", 20)


class Workers(Processes):
    """Worker processes, each with its output."""

    def work(
        self,
        mode: str,
        *runs: str,
        worker: str | None = "worker-1",
        interval: float = OFTEN,
        url: str | None = None,
        target: str | None = None,
        **environment: str,
    ) -> Child:
        """Start one, without waiting for it."""
        command = [sys.executable, str(WORKER), mode, *runs, "--interval", str(interval)]
        command += [] if worker is None else ["--worker", worker]
        command += [] if target is None else ["--target", target]
        if url is not None:
            environment["ORPHAN_RECOVERY_DATABASE_URL"] = url
        return self.start(f"{mode} {runs[0]}", command, environment, may_end=True)

    def holding(self, mode: str, *runs: str, **asked: Any) -> Child:
        """Start one, and return once it holds its runs."""
        child = self.work(mode, *runs, **asked)
        await_line(child, "holding")
        return child


def await_line(child: Child, beginning: str, seconds: float = 30) -> str:
    """Return the line that begins so, once it is there."""
    found: list[str] = []

    def is_there() -> bool:
        found[:] = [line for line in child.output if line.startswith(beginning)]
        return bool(found) or child.process.poll() is not None

    until(is_there, f"{beginning!r} from {child.name}: {child.output[-5:]}", seconds)
    assert found, f"{child.name} ended without {beginning!r}: {child.output[-15:]}"
    return found[0]


def await_end(child: Child, seconds: float = 20) -> None:
    """See that it ends well, in time, and that nothing went wrong unseen."""
    assert child.process.wait(seconds) == 0, child.output[-15:]
    assert "Traceback" not in child.log.read_text()
    assert "never awaited" not in child.log.read_text()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    with Workers(tmp_path) as workers:
        yield workers


@pytest.fixture
def beats(db: Database) -> Beats:
    return Beats(db)


@pytest.fixture
def proxy(db: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between whatever is started from now on and the database."""
    with Proxy(db.url) as proxy:
        monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", proxy.url)
        yield proxy


@pytest.fixture(autouse=True)
def no_beater_is_left() -> Iterator[None]:
    """What beats in this process ends with the test whose database it beats in."""
    yield
    for one in beater._beaters.values():
        one.stop()
    beater._beaters.clear()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same retries, without the waiting between them."""
    monkeypatch.setattr(RetryPlan, "delay", lambda _self, retry: 0.01 * retry)


def heartbeat(db: Database, run: str) -> Any:
    return db.one("SELECT heartbeat_at FROM worker_runs WHERE id = %s", run)


def row_of(db: Database, run: str) -> Any:
    """The whole row; with the transaction that wrote it."""
    return db.one("SELECT xmin::text || t::text FROM worker_runs t WHERE id = %s", run)


def complete(db: Database, run: str) -> None:
    """Another finishes the run."""
    db.do(
        "UPDATE worker_runs SET status = 'completed', success = true, completed_at = now()"
        " WHERE id = %s",
        run,
    )


def contests(db: Database) -> list[dict[str, Any]]:
    return db.do("SELECT * FROM orphan_recovery.contests ORDER BY run_id")


async def sweep(target: Target | None = None, minutes: int | None = None) -> None:
    """A real one, of whatever is silent."""
    asked = SweepRequest(target=target or find_target(), threshold_minutes=minutes, asked_by="test")
    assert (await run_sweep(asked)).error is None


def silence(db: Database, run: str, ago: str = "2 hours") -> None:
    """Let the run look as if it had never beaten."""
    db.do(
        "UPDATE worker_runs SET created_at = now() - %s::interval, started_at = NULL,"
        " heartbeat_at = NULL WHERE id = %s",
        *(ago, run),
    )


def pause_at(db: Database, condition: str, key: int = 1) -> None:
    """From now on, whoever writes a row like that waits, with the row locked, for a lock."""
    db.do(
        "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM pg_advisory_xact_lock({key}); RETURN NEW; END $$;"
        f"CREATE TRIGGER pause AFTER UPDATE ON worker_runs FOR EACH ROW WHEN ({condition})"
        " EXECUTE FUNCTION pause()"
    )


# The minute


class Minute:
    """A scene that takes longer than the least threshold."""

    def __init__(self, db: Database, workers: Workers, proxies: dict[str, Proxy]) -> None:
        self.db, self.workers, self.proxies = db, workers, proxies
        self.children: dict[str, Child] = {}
        self.fenced_target = Target(
            threshold_minutes=1, rules=(Rule(match={"task": "spared"}, never=True),)
        )

    def begin(self) -> None:
        db, workers = self.db, self.workers
        self.begun_at = time.monotonic()
        self.beats = Beats(db)
        for run in (*LONG_RUNS, "done"):
            db.add_run(run, age="1 second")
        complete(db, "done")
        db.do(
            "INSERT INTO worker_runs (id, status, worker_id, task, created_at) SELECT"
            " 'fleet-' || n, 'running', 'worker-1', 'spared', now()"
            " FROM generate_series(1, 300) AS n"
        )
        db.do("UPDATE worker_runs SET task = id WHERE id = ANY (%s)", ["spared", "never", "longer"])
        away, hung = self.proxies["away"].url, self.proxies["hung"].url
        fleet = [f"fleet-{n}" for n in range(1, 301)]
        self.children = {
            "swallowed": workers.work(
                "hold_async", "swallowed", "never", "longer", interval=1, url=away
            ),
            "stopped": workers.work("stop", "stopped", interval=1, url=away),
            "cancelled": workers.work("stop_async", "cancelled", interval=20, url=away),
            "hung": workers.work("hold", "hung", interval=1, url=hung),
            "frozen": workers.work("hold_async", "frozen"),
            "spared": workers.work("hold", "spared"),
            "fleet": workers.work("hold", *fleet, interval=1),
        }
        for child in self.children.values():
            await_line(child, "holding", 60)
        self.held_at = db.one("SELECT clock_timestamp()")
        for run in LONG_RUNS:
            until(partial(self.has_beaten, run), f"a beat of {run}")
        self.proxies["away"].swallow()
        self.swallowed_at = time.monotonic()
        self.proxies["hung"].swallow_open()
        for name in ("frozen", "spared"):
            self.children[name].send(signal.SIGSTOP)
        for mode in ("quick", "quick_async"):
            self.children[mode] = workers.work(mode, "done")

    def has_beaten(self, run: str) -> bool:
        return heartbeat(self.db, run) is not None

    def await_silence(self) -> None:
        """Return once those that were frozen are orphans."""
        until(
            lambda: self.db.one(
                "SELECT bool_and(heartbeat_at <= now() - interval '1 minute') FROM worker_runs"
                " WHERE id IN ('frozen', 'spared')"
            ),
            "a minute of silence",
            THRESHOLD + 30,
        )


LONG_RUNS = (
    *("swallowed", "never", "longer", "stopped", "cancelled"),
    *("hung", "frozen", "spared"),
)


@pytest.fixture(scope="module")
def the_minute(
    server: str, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Minute]:
    folder = tmp_path_factory.mktemp("minute")
    (folder / "orphan-recovery.toml").write_text(
        textwrap.dedent(
            """
            [targets.default]
            threshold_minutes = 1
            [[targets.default.rules]]
            match = { task = "never" }
            never = true
            [[targets.default.rules]]
            match = { task = "longer" }
            threshold_minutes = 2
            """
        )
    )
    with (
        _database(server, template) as url,
        Database(url) as db,
        Proxy(url) as away,
        Proxy(url) as hung,
        pytest.MonkeyPatch.context() as environment,
        Workers(folder) as workers,
    ):
        environment.setenv("ORPHAN_RECOVERY_DATABASE_URL", url)
        environment.setenv("ORPHAN_RECOVERY_CONFIG", str(folder / "orphan-recovery.toml"))
        minute = Minute(db, workers, {"away": away, "hung": hung})
        minute.begin()
        environment.undo()  # what comes in between has a world of its own
        yield minute
        for child in minute.children.values():
            with suppress(ProcessLookupError):
                child.process.kill()


@pytest.fixture
def minute(the_minute: Minute, monkeypatch: pytest.MonkeyPatch) -> Minute:
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", the_minute.db.url)
    return the_minute


@pytest.fixture(scope="module", autouse=True)
def _the_minute_begins_first(request: pytest.FixtureRequest) -> None:
    """If any of it is asked for, so that all else goes on meanwhile."""
    if any("minute" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("the_minute")


# Beating


@pytest.mark.parametrize("mode", ["hold", "hold_async"])
def test_a_block_beats_at_once_and_on_and_no_more_when_it_has_ended(
    db: Database, beats: Beats, workers: Workers, mode: str
) -> None:
    db.add_run("run")
    child = workers.holding(mode, "run")
    beats.await_more("run", 4)
    assert db.one("SELECT heartbeat_at > now() - interval '2 seconds' FROM worker_runs")
    child.tell("end")
    await_line(child, "released")
    seen = beats.of("run")
    db.do("SELECT pg_sleep(%s)", 4 * OFTEN)
    assert beats.of("run") - seen <= 1, "one may have been under way"
    child.tell("end")
    await_end(child)


def test_the_first_beat_does_not_wait_for_the_interval(
    db: Database, beats: Beats, workers: Workers
) -> None:
    db.add_run("run")
    workers.holding("hold", "run", interval=20)
    until(lambda: beats.of("run") == 1, "the first beat", 5)


@pytest.mark.parametrize("mode", ["hold", "hold_async"])
@pytest.mark.parametrize(("order", "answer"), [("sleep", "slept"), ("compute", "computed")])
def test_work_that_blocks_whatever_there_is_to_block_still_beats(
    db: Database, beats: Beats, workers: Workers, mode: str, order: str, answer: str
) -> None:
    db.add_run("run")
    child = workers.holding(mode, "run")
    beats.await_more("run", 2)
    before, begun = heartbeat(db, "run"), beats.of("run")
    child.tell(f"{order} 1.5")
    await_line(child, answer)
    assert beats.of("run") - begun >= 4
    passed = db.one("SELECT heartbeat_at - %s FROM worker_runs", before)
    assert passed.total_seconds() > 1.1, "in the database's time"


def test_the_time_of_a_beat_is_the_databases(db: Database, workers: Workers) -> None:
    """And is stored as the column stores it: this one is naive."""
    db.do("DROP TRIGGER prevent_worker_run_mutation ON worker_runs")
    db.do("ALTER TABLE worker_runs ALTER heartbeat_at TYPE timestamp")
    set_for_all(db, "TimeZone = 'Asia/Kolkata'")
    db.add_run("run")
    workers.holding("hold", "run")
    until(lambda: heartbeat(db, "run") is not None, "a beat")
    assert (
        db.one(
            "SELECT abs(extract(epoch FROM clock_timestamp() - heartbeat_at AT TIME ZONE 'UTC'))"
            " FROM worker_runs"
        )
        < 5
    )


def test_a_row_that_somebody_holds_keeps_no_other_from_beating(
    db: Database, beats: Beats, workers: Workers
) -> None:
    db.add_run("held")
    db.add_run("free")
    child = workers.holding("hold", "held", "free")
    beats.await_more("held", 1)
    with db.connect() as other:
        other.execute("SELECT 1 FROM worker_runs WHERE id = 'held' FOR UPDATE")
        before = beats.of("held")
        beats.await_more("free", 4)
        assert beats.of("held") == before
    beats.await_more("held", 2)
    assert not any(line.startswith("lost") for line in child.output)


def test_a_beat_that_is_cut_off_is_tried_again_within_the_interval(
    db: Database, beats: Beats, workers: Workers
) -> None:
    """And the work does not hear of it."""
    db.add_run("run")
    with db.connect() as other:
        other.execute("LOCK TABLE worker_runs IN EXCLUSIVE MODE")
        child = workers.holding("hold", "run", interval=10)
        db.await_lock_wait()
        assert db.one(
            "SELECT bool_and(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'orphan-recovery'"
        )
    until(lambda: beats.of("run") >= 1, "the beat's second try", 6)
    child.tell("check run")
    await_line(child, "check run: well")
    assert "beat_failed" in child.log.read_text()


def test_a_connection_that_was_lost_between_two_beats_costs_none(
    db: Database, beats: Beats, workers: Workers
) -> None:
    db.add_run("run")
    child = workers.holding("hold_async", "run", interval=1)
    for _ in range(3):
        beats.await_more("run", 1)
        db.do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'orphan-recovery'"
        )
    beats.await_more("run", 1)
    assert max(beat["pause"] for beat in beats.all()[1:]) < 2.5
    assert not any(line.startswith("lost") for line in child.output)


def test_beats_go_on_when_a_database_that_was_away_is_back(
    db: Database, beats: Beats, workers: Workers, proxy: Proxy
) -> None:
    db.add_run("run")
    child = workers.holding("hold_async", "run")
    beats.await_more("run", 2)
    for _ in range(2):
        proxy.cut()
        until(lambda: "beat_failed" in child.log.read_text(), "a beat that fails", 10)
        seen = beats.of("run")
        db.do("SELECT pg_sleep(1)")
        assert beats.of("run") <= seen + 1
        proxy.mend()
        beats.await_more("run", 3)
    child.tell("check run")
    await_line(child, "check run: well")
    assert child.log.read_text().count("beat_failed") == 2, "said once, not by every try"


def test_a_master_and_the_child_it_forked_each_beat_for_their_own(
    db: Database, beats: Beats, workers: Workers
) -> None:
    db.add_run("master")
    db.add_run("child")
    process = workers.holding("fork", "master", "child")
    beats.await_more("master", 2)
    process.tell("fork")
    await_line(process, "child holding")
    beats.await_more("child")
    beats.await_more("master")
    assert len(beats.pids("master")) == 1, "it kept its connection"
    assert beats.pids("master").isdisjoint(beats.pids("child"))
    process.tell("let the child end")
    await_line(process, "child ended with 0")
    beats.await_more("master")
    seen = beats.of("child")
    beats.await_more("master")
    assert (beats.of("child"), len(beats.pids("master"))) == (seen, 1)
    process.tell("end")
    await_end(process)


@pytest.mark.parametrize("interval", [0.2, 20])
def test_an_interpreter_that_ends_while_it_holds_a_run_just_ends(
    db: Database, beats: Beats, workers: Workers, interval: float
) -> None:
    db.add_run("run")
    child = workers.holding("leave", "run", interval=interval)
    until(lambda: beats.of("run") > 0, "a beat")
    child.tell("end")
    await_end(child, 5)
    assert child.output == ["holding"]


def test_an_end_by_sys_exit_in_a_block_is_just_that(db: Database, tmp_path: Path) -> None:
    db.add_run("run")
    code = (
        "import sys; from orphan_recovery.alive import keep_alive\n"
        "with keep_alive('run', cancel=True): sys.exit(3)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=20, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, b"", b"")


# What cannot be used


@pytest.mark.parametrize("interval", [20.5, 600, -1, 0])
async def test_an_interval_that_cannot_be_used_is_refused_by_name(
    db: Database, monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    monkeypatch.setenv("ORPHAN_THRESHOLD_MINUTES", "1")
    db.add_run("run")
    refusal = rf"every {interval:g} seconds .*'default'"
    with pytest.raises(ConfigurationError, match=refusal):
        async with keep_alive("run", interval=interval):
            pass
    with pytest.raises(ConfigurationError, match=refusal), keep_alive("run", interval=interval):
        pass


async def test_three_beats_have_to_fit_into_the_shortest_threshold_of_any_rule(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(
        tmp_path,
        monkeypatch,
        "[targets.default]\nthreshold_minutes = 30\nheartbeat_seconds = 41\n"
        "[[targets.default.rules]]\nmatch = { task = 'quick' }\nthreshold_minutes = 2\n",
        "default",
    )
    db.add_run("run")
    with pytest.raises(ConfigurationError, match=r"41 seconds does not go with .* 120 seconds"):
        async with keep_alive("run"):
            pytest.fail("the block was entered")
    async with keep_alive("run", interval=40):
        pass


NO_PLACE = """
[targets.bare]
table = "worker_runs"
columns = { created_at = "created_at", heartbeat_at = false }
"""


async def test_a_target_without_a_place_for_a_beat_is_refused_on_entering(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path, monkeypatch, NO_PLACE, "bare")
    db.add_run("run")
    with pytest.raises(ConfigurationError, match="no place for a beat: name a column"):
        async with keep_alive("run", target="bare"):
            pass
    with (
        pytest.raises(ConfigurationError, match="no place for a beat: name a column"),
        keep_alive("run", target="bare"),
    ):
        pass


def test_a_target_without_a_place_for_a_beat_is_said_in_the_log(
    db: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    configure(tmp_path, monkeypatch, NO_PLACE, "bare")
    db.add_run("run")
    with suppress(ConfigurationError), keep_alive("run", target="bare"):
        until(lambda: "beat_failed" in caplog.messages, "the log's word", 10)
        [told] = [vars(r)["error"] for r in caplog.records if r.message == "beat_failed"]
        assert "no place for a beat: name a column as heartbeat_at" in told


# Losing a run


def test_each_way_to_lose_a_run_is_told_and_the_run_beats_no_more(
    db: Database, beats: Beats, workers: Workers
) -> None:
    ways = {"gone": "vanished", "ended": "finished", "taken": "changed_hands", "dead": "marked"}
    for run in (*ways, "kept"):
        db.add_run(run)
    child = workers.holding("hold", *ways, "kept")
    beats.await_more("kept", 2)
    complete(db, "ended")
    db.do("UPDATE worker_runs SET worker_id = 'worker-2' WHERE id = 'taken'")
    db.do("UPDATE worker_runs SET status = 'crashed' WHERE id = 'dead'")  # by a person
    db.do("DELETE FROM worker_runs WHERE id = 'gone'")
    for run, by in ways.items():
        await_line(child, f"lost {run} {by} ")
        child.tell(f"check {run}")
        await_line(child, f"check {run}: lost by {by}")
    rows = [row_of(db, run) for run in ("ended", "taken", "dead")]
    beats.await_more("kept")
    assert [row_of(db, run) for run in ("ended", "taken", "dead")] == rows
    child.tell("check kept")
    await_line(child, "check kept: well")
    for run, by in ways.items():
        child.tell(f"finish {run}")
        await_line(child, f"finish {run}: lost by {by}, contested False")
    assert [row_of(db, run) for run in ("ended", "taken", "dead")] == rows
    child.tell("finish kept")
    await_line(child, "finish kept: well")
    assert (db.status("kept"), contests(db)) == ("completed", [])


async def test_a_worker_that_was_frozen_while_a_sweep_marked_its_run_is_told_and_contests_it_once(
    db: Database, beats: Beats, workers: Workers
) -> None:
    db.add_run("run")
    child = workers.holding("hold_async", "run")
    await asyncio.to_thread(beats.await_more, "run", 1)
    child.send(signal.SIGSTOP)
    silence(db, "run")
    await sweep()
    assert db.outcomes() == {"run": "marked"}
    marked = row_of(db, "run")
    child.tell("check run")
    child.send(signal.SIGCONT)
    await asyncio.to_thread(await_line, child, "lost run marked")
    for _ in range(2):
        child.tell("finish run")
    await asyncio.to_thread(
        until, lambda: child.output.count(MARKED_AND_CONTESTED) == 2, "two refusals"
    )
    [contest] = contests(db)
    assert contest["sweep_id"] == db.verdicts()[0]["sweep_id"]
    told = {name: contest[name] for name in ("target", "worker_id", "reported_status")}
    assert told == {"target": "default", "worker_id": "worker-1", "reported_status": "completed"}
    assert row_of(db, "run") == marked
    assert "verdict_contested" in child.log.read_text()


MARKED_AND_CONTESTED = "finish run: lost by marked, contested True"


async def test_what_is_lost_says_what_was_found_instead(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    async with keep_alive("run", worker_id="worker-1", interval=OFTEN) as alive:
        await asyncio.to_thread(alive.is_lost.wait, 10)
        assert alive.lost is not None
        assert (alive.run_id, alive.lost.run_id, alive.lost.by) == ("run", "run", LostBy.FINISHED)
        assert alive.lost.found["status"] == "completed"
        assert "run run is lost (finished): status completed" in str(alive.lost)
        with pytest.raises(RunLost) as raised:
            alive.check()
        assert raised.value is alive.lost


async def test_without_a_worker_a_run_that_changes_hands_is_not_lost(db: Database) -> None:
    db.add_run("run")
    async with keep_alive("run", interval=OFTEN) as alive:
        db.do("UPDATE worker_runs SET worker_id = 'worker-2'")
        before = db.one("SELECT now()")
        await asyncio.to_thread(
            until, lambda: (heartbeat(db, "run") or before) > before, "a beat after it"
        )
        alive.check()


async def test_two_workers_of_one_process_lose_a_run_to_each_other(
    db: Database, beats: Beats
) -> None:
    """Though one statement beats for both."""
    db.add_run("run", worker="worker-1")
    async with keep_alive("run", worker_id="worker-1", interval=2) as first:
        await asyncio.to_thread(beats.await_more, "run", 1)
        db.do("UPDATE worker_runs SET worker_id = 'worker-2'")
        async with keep_alive("run", worker_id="worker-2", interval=2) as second:
            assert await asyncio.to_thread(first.is_lost.wait, 5), "the first was never told"
            assert first.lost is not None
            assert (first.lost.by, second.lost) == (LostBy.CHANGED_HANDS, None)


async def test_a_run_that_the_block_itself_has_finished_is_not_lost(
    db: Database, beats: Beats
) -> None:
    """What follows its finish, such as cleaning up, is not stopped."""
    db.add_run("run")
    db.add_run("other")
    asked: dict[str, Any] = {"worker_id": "worker-1", "interval": OFTEN}
    async with keep_alive("other", **asked), keep_alive("run", cancel=True, **asked) as alive:
        await alive.finish(output={"rows": 1})
        await asyncio.to_thread(beats.await_more, "other")
        assert alive.lost is None
    assert db.status("run") == "completed"


async def test_its_own_result_whose_acknowledgement_is_late_is_no_loss_of_the_block(
    db: Database, beats: Beats, proxy: Proxy
) -> None:
    """It stands written while it is tried again, and the block goes on beating meanwhile."""
    db.add_run("run")
    db.add_run("other")
    asked: dict[str, Any] = {"worker_id": "worker-1", "interval": OFTEN}
    async with keep_alive("other", **asked), keep_alive("run", cancel=True, **asked) as alive:
        await asyncio.to_thread(beats.await_more, "other", 1)
        proxy.lose_reply_to(COMMIT, after=b"output_json")
        await alive.finish(output={"rows": 1})
        assert proxy.has_lost_a_reply.is_set()
        await asyncio.to_thread(beats.await_more, "other", 2)
        assert alive.lost is None
    assert db.status("run") == "completed"


async def test_a_loop_that_was_closed_under_its_block_costs_the_other_runs_no_beat(
    db: Database, beats: Beats
) -> None:
    db.add_run("abandoned")
    db.add_run("run")
    complete(db, "abandoned")
    async with keep_alive("run", interval=OFTEN):

        def abandon() -> None:
            loop = asyncio.new_event_loop()
            block = keep_alive("abandoned", interval=OFTEN)
            loop.run_until_complete(block.__aenter__())
            loop.close()

        await asyncio.to_thread(abandon)
        await asyncio.to_thread(beats.await_more, "run", 5)


# Stopping a block


async def test_a_lost_block_is_cancelled_and_raises_what_happened(db: Database) -> None:
    db.add_run("run")
    task = asyncio.current_task()
    assert task is not None

    async def work() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN):
            complete(db, "run")
            await asyncio.wait_for(asyncio.Event().wait(), 20)

    with pytest.raises(RunLost, match=r"run run is lost \(finished\)"):
        await work()
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_a_block_that_ends_before_it_could_be_cancelled_is_not_cancelled_later(
    db: Database,
) -> None:
    db.add_run("run")
    complete(db, "run")
    task = asyncio.current_task()
    assert task is not None
    async with keep_alive("run", cancel=True, interval=OFTEN) as alive:
        until(alive.is_lost.is_set, "the loss")
        stall(0.3)  # its cancellation is on its way to the loop, which has no time for it
    await asyncio.sleep(0.1)
    assert task.cancelling() == 0


def test_a_lost_block_of_pure_python_is_interrupted(db: Database, workers: Workers) -> None:
    db.add_run("run")
    child = workers.holding("stop", "run")
    complete(db, "run")
    await_line(child, "stopped run finished")
    await_line(child, "went on after True")
    await_end(child)


async def test_without_cancel_a_lost_block_goes_on(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    async with keep_alive("run", interval=OFTEN) as alive:
        assert await asyncio.to_thread(alive.is_lost.wait, 10)
        await asyncio.sleep(2 * OFTEN)
    with keep_alive("run", interval=OFTEN) as alive:
        assert alive.is_lost.wait(10)


async def test_a_cancellation_by_somebody_else_is_not_swallowed(db: Database, beats: Beats) -> None:
    db.add_run("run")

    async def work() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.to_thread(beats.await_more, "run", 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_cancellation_that_comes_on_top_of_a_loss_is_not_swallowed(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    cleaning_up = asyncio.Event()

    async def work() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN):
            try:
                await asyncio.Event().wait()
            finally:
                cleaning_up.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.wait_for(cleaning_up.wait(), 10)
    task.cancel("by a deploy")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_time_out_around_a_lost_block_and_one_within_stay_what_they_are(
    db: Database,
) -> None:
    db.add_run("run")
    db.add_run("lost")
    complete(db, "lost")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3), keep_alive("run", cancel=True):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        async with keep_alive("run", cancel=True), asyncio.timeout(0.3):
            await asyncio.Event().wait()
    with pytest.raises(RunLost):
        async with asyncio.timeout(20), keep_alive("lost", cancel=True):
            await asyncio.Event().wait()
    with pytest.raises(RunLost):
        async with keep_alive("lost", cancel=True), asyncio.timeout(20):
            await asyncio.Event().wait()


async def test_an_exception_of_the_work_is_not_replaced(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    task = asyncio.current_task()
    assert task is not None

    async def fail_when_stopped() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN):
            try:
                await asyncio.Event().wait()
            finally:
                _ = 1 / 0

    async def fail_before() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN) as alive:
            until(alive.is_lost.is_set, "the loss")  # the loop has no time to cancel it
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        await fail_when_stopped()
    assert task.cancelling() == 0
    with pytest.raises(ZeroDivisionError):
        await fail_before()
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_an_exception_of_work_that_is_interrupted_is_not_replaced(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with keep_alive("run", cancel=True, interval=OFTEN):
                try:
                    while True:
                        pass
                finally:
                    _ = 1 / 0
        except BaseException as error:
            raised.append(error)

    await asyncio.to_thread(work)
    [error] = raised
    assert isinstance(error, ZeroDivisionError)


async def test_of_nested_blocks_the_one_whose_run_is_lost_says_so(db: Database) -> None:
    async def lose(*runs: str) -> RunLost:
        names = {name: f"{name}-{uuid4()}" for name in ("outer", "inner")}
        for name in names.values():
            db.add_run(name)
        passed: list[str] = []

        async def work() -> None:
            async with keep_alive(names["outer"], cancel=True, interval=OFTEN):
                try:
                    async with keep_alive(names["inner"], cancel=True, interval=OFTEN):
                        for run in runs:
                            complete(db, names[run])
                        await asyncio.wait_for(asyncio.Event().wait(), 20)
                finally:
                    passed.append("the inner block")

        with pytest.raises(RunLost) as raised:
            await work()
        assert passed == ["the inner block"]
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert raised.value.run_id in [names[run] for run in runs]
        return raised.value

    await lose("outer")
    await lose("inner")
    await lose("outer", "inner")


async def test_a_lost_block_around_a_task_group_stops_the_group(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    stopped: list[str] = []

    async def part() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append("part")
            raise

    async def work() -> None:
        async with keep_alive("run", cancel=True), asyncio.TaskGroup() as group:
            group.create_task(part())
            group.create_task(part())

    with pytest.raises(RunLost):
        await work()
    assert stopped == ["part", "part"]


async def test_a_lost_block_in_a_task_of_a_group_fails_the_group(db: Database) -> None:
    db.add_run("run")
    db.add_run("lost")
    complete(db, "lost")

    async def work(run: str) -> None:
        async with keep_alive(run, cancel=True):
            await asyncio.Event().wait()

    async def work_on_both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(work("run"))
            group.create_task(work("lost"))

    with pytest.raises(ExceptionGroup) as raised:
        await work_on_both()
    [error] = raised.value.exceptions
    assert isinstance(error, RunLost)
    assert error.run_id == "lost"


async def test_a_block_that_is_lost_while_it_is_entered_says_so(db: Database) -> None:
    """The loop is held up meanwhile, as loops are."""
    db.add_run("run")
    complete(db, "run")
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(stall)
    with pytest.raises(RunLost):
        async with keep_alive("run", cancel=True, interval=OFTEN):
            await asyncio.wait_for(asyncio.Event().wait(), 20)
    assert task.cancelling() == 0


def stall(seconds: float = 1) -> None:
    """Hold up the loop, as work does."""
    threading.Event().wait(seconds)


async def test_a_block_whose_task_is_cancelled_while_it_enters_beats_for_nobody(
    db: Database, beats: Beats
) -> None:
    """A run that is kept alive by nobody's block would never be found again."""
    db.add_run("run")
    db.add_run("other")

    async def work() -> None:
        async with keep_alive("run", interval=OFTEN):
            await asyncio.Event().wait()

    async with keep_alive("other", interval=OFTEN):
        task = asyncio.create_task(work())
        await asyncio.sleep(0)  # it is entering now
        stall(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(beats.await_more, "other", 2)
        seen = beats.of("run")
        await asyncio.to_thread(beats.await_more, "other", 3)
        assert beats.of("run") == seen


# Finishing


async def test_a_result_is_written_whole(db: Database) -> None:
    db.add_run("well")
    db.add_run("ill")
    db.add_run("sync")
    await finish_run("well", worker_id="worker-1", output={"rows": [1, 2]})
    await finish_run("ill", worker_id="worker-1", status="failed", error="no disk: 100% full")
    await asyncio.to_thread(finish_run_sync, "sync", output="text")
    names = ("status", "success", "output_json", "error")
    rows = {
        row["id"]: tuple(row[name] for name in names)
        for row in db.do("SELECT * FROM worker_runs WHERE completed_at > now() - interval '1 min'")
    }
    assert rows == {
        "well": ("completed", True, {"rows": [1, 2]}, None),
        "ill": ("failed", False, None, "no disk: 100% full"),
        "sync": ("completed", True, "text", None),
    }


async def test_a_run_that_failed_was_no_success_whatever_else_is_told(db: Database) -> None:
    db.add_run("run")
    await finish_run("run", status="failed")
    assert db.do("SELECT status, success FROM worker_runs") == [
        {"status": "failed", "success": False}
    ]


async def test_only_a_run_in_flight_of_its_own_is_finished(db: Database) -> None:
    db.add_run("mine")
    db.add_run("taken", worker="worker-2")
    db.add_run("nobodys", worker=None)
    db.add_run("ended")
    db.add_run("waiting", status="queued")
    complete(db, "ended")
    before = db.do("SELECT t::text FROM worker_runs t ORDER BY id")
    expected = {
        "taken": LostBy.CHANGED_HANDS,
        "nobodys": LostBy.CHANGED_HANDS,
        "ended": LostBy.FINISHED,
        "no such run": LostBy.VANISHED,
    }
    for run, by in expected.items():
        with pytest.raises(RunLost) as raised:
            await finish_run(run, worker_id="worker-1", output={})
        assert (raised.value.by, raised.value.contested) == (by, False)
    assert db.do("SELECT t::text FROM worker_runs t ORDER BY id") == before
    await finish_run("mine", worker_id="worker-1")
    await finish_run("taken")  # whoever holds it
    await finish_run("waiting", worker_id="worker-1")
    assert [db.status(run) for run in ("mine", "taken", "waiting")] == ["completed"] * 3


async def test_a_run_is_finished_once_and_a_second_report_of_the_same_worker_is_told(
    db: Database,
) -> None:
    db.add_run("run")
    await finish_run("run", worker_id="worker-1", output={"rows": 1})
    row = row_of(db, "run")
    with pytest.raises(RunLost) as raised:
        await finish_run("run", worker_id="worker-1", output={"rows": 2})
    assert raised.value.by is LostBy.FINISHED
    assert row_of(db, "run") == row


@pytest.mark.parametrize("status", ["running", "queued"])
async def test_a_status_that_ends_nothing_is_refused(db: Database, status: str) -> None:
    db.add_run("run")
    with pytest.raises(ConfigurationError, match=status):
        await finish_run("run", status=status)
    assert db.status("run") == "running"


COMMIT = b"COMMIT\0"
"""As it is sent; READ COMMITTED is sent too."""


async def test_a_result_whose_acknowledgement_was_lost_is_written_and_is_no_loss(
    db: Database, beats: Beats, proxy: Proxy, impatient: None
) -> None:
    db.add_run("run")
    proxy.lose_reply_to(COMMIT)
    await finish_run("run", worker_id="worker-1", output={"rows": 1})
    assert proxy.has_lost_a_reply.is_set()
    assert (db.status("run"), beats.of("run")) == ("completed", 1)


async def test_a_claim_whose_acknowledgement_was_lost_is_won(
    db: Database, beats: Beats, proxy: Proxy, impatient: None
) -> None:
    db.add_run("run", status="queued", worker=None)
    proxy.lose_reply_to(COMMIT)
    assert await claim("run", "worker-1") is True
    assert proxy.has_lost_a_reply.is_set()
    assert (db.status("run"), beats.of("run")) == ("running", 1)


async def test_a_retried_result_does_not_take_anothers_for_its_own(
    db: Database, proxy: Proxy, impatient: None
) -> None:
    """Its first try never arrived; until the second, another worker had the run, and ended it."""
    db.add_run("run")
    pause_at(db, "NEW.status = 'completed'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1"))
        await asyncio.to_thread(db.await_lock_wait)
        with db.connect() as other:
            taking = asyncio.ensure_future(
                asyncio.to_thread(
                    other.execute,
                    "UPDATE worker_runs SET worker_id = 'worker-2', status = 'failed'",
                )
            )
            await asyncio.to_thread(db.await_lock_wait, 2)
            terminate(db)
            await taking
            other.commit()
    with pytest.raises(RunLost) as raised:
        await finishing
    assert raised.value.by is LostBy.FINISHED
    assert raised.value.found["worker_id"] == "worker-2"


def terminate(db: Database) -> None:
    assert db.do(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'orphan-recovery'"
    )


async def test_a_finish_waits_for_a_row_that_is_held_and_tries_again(
    db: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 300)
    db.add_run("run")
    with db.connect() as other:
        other.execute("SELECT 1 FROM worker_runs FOR UPDATE")
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1"))
        await asyncio.to_thread(db.await_lock_wait)
        await asyncio.to_thread(until, lambda: not waits(db), "the end of its patience")
        await asyncio.to_thread(db.await_lock_wait)
    await finishing
    assert db.status("run") == "completed"


def waits(db: Database) -> bool:
    return bool(
        db.one(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


async def test_a_finish_that_is_before_the_mark_stands(db: Database) -> None:
    db.add_run("run")
    pause_at(db, "NEW.status = 'completed'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1", output=1))
        await asyncio.to_thread(db.await_lock_wait)
        marking = asyncio.ensure_future(sweep())
        await asyncio.to_thread(db.await_lock_wait, 2)
    await finishing
    await marking
    assert (db.status("run"), db.outcomes()) == ("completed", {"run": "finished_first"})
    assert contests(db) == []


async def test_a_finish_that_is_behind_the_mark_contests_it(db: Database) -> None:
    db.add_run("run")
    pause_at(db, "NEW.status = 'crashed'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        marking = asyncio.ensure_future(sweep())
        await asyncio.to_thread(db.await_lock_wait)
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1", output=1))
        await asyncio.to_thread(db.await_lock_wait, 2)
    await marking
    with pytest.raises(RunLost) as raised:
        await finishing
    assert (raised.value.by, raised.value.contested) == (LostBy.MARKED, True)
    assert (db.status("run"), db.outcomes()) == ("crashed", {"run": "marked"})
    assert [contest["run_id"] for contest in contests(db)] == ["run"]


async def test_a_run_that_a_person_ended_is_lost_and_contests_nothing(db: Database) -> None:
    db.add_run("run")
    db.do("UPDATE worker_runs SET status = 'crashed', error = 'ended by hand'")
    with pytest.raises(RunLost) as raised:
        await finish_run("run", worker_id="worker-1")
    assert (raised.value.by, raised.value.contested) == (LostBy.MARKED, False)
    assert raised.value.found["error"] == "ended by hand"


async def test_without_a_ledger_the_loss_is_told_all_the_same(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    db.add_run("run")
    db.do("UPDATE worker_runs SET status = 'crashed'")
    db.do("DROP SCHEMA orphan_recovery CASCADE")
    with pytest.raises(RunLost) as raised:
        await finish_run("run", worker_id="worker-1")
    assert (raised.value.by, raised.value.contested) == (LostBy.MARKED, False)
    assert "contest_not_recorded" in caplog.messages


async def test_a_finish_that_is_given_up_leaves_the_run_as_it_is(db: Database) -> None:
    db.add_run("run")
    with db.connect() as other:
        other.execute("SELECT 1 FROM worker_runs FOR UPDATE")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await finish_run("run", worker_id="worker-1")
    await asyncio.to_thread(until, lambda: not waits(db), "the end of its statement")
    assert db.status("run") == "running"


# Claiming


async def test_a_run_is_claimed_with_a_sign_of_life_and_only_if_nobody_holds_it(
    db: Database,
) -> None:
    db.add_run("free", status="queued", worker=None)
    db.add_run("mine", status="queued")
    db.add_run("held")
    db.add_run("promised", status="queued", worker="worker-2")
    db.add_run("ended")
    complete(db, "ended")
    before = db.do("SELECT t::text FROM worker_runs t WHERE id NOT IN ('free', 'mine') ORDER BY id")
    assert await claim("free", "worker-1") is True
    assert await asyncio.to_thread(claim_sync, "mine", "worker-1") is True
    for run in ("held", "promised", "ended", "no such run"):
        assert await claim(run, "worker-1") is False, run
    assert await claim("held", "worker-9") is False
    after = db.do("SELECT t::text FROM worker_runs t WHERE id NOT IN ('free', 'mine') ORDER BY id")
    assert after == before
    assert db.do(
        "SELECT id, status, worker_id, started_at > now() - interval '1 min' AS started,"
        " heartbeat_at = started_at AS beat FROM worker_runs WHERE id IN ('free', 'mine')"
        " ORDER BY id"
    ) == [
        {"id": r, "status": "running", "worker_id": "worker-1", "started": True, "beat": True}
        for r in ("free", "mine")
    ]


@pytest.mark.parametrize(("first", "second"), [("worker-1", "worker-2"), ("worker-2", "worker-1")])
async def test_of_two_claims_at_once_the_first_wins(db: Database, first: str, second: str) -> None:
    db.add_run("run", status="queued", worker=None)
    pause_at(db, f"NEW.worker_id = '{first}'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        one = asyncio.ensure_future(claim("run", first))
        await asyncio.to_thread(db.await_lock_wait)
        other = asyncio.ensure_future(claim("run", second))
        await asyncio.to_thread(db.await_lock_wait, 2)
    assert (await one, await other) == (True, False)
    assert db.one("SELECT worker_id FROM worker_runs") == first


async def test_a_claim_that_is_cut_off_leaves_the_run_to_the_other(
    db: Database, impatient: None
) -> None:
    db.add_run("run", status="queued", worker=None)
    pause_at(db, "NEW.worker_id = 'worker-1'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        cut_off = asyncio.ensure_future(claim("run", "worker-1"))
        await asyncio.to_thread(db.await_lock_wait)
        other = asyncio.ensure_future(claim("run", "worker-2"))
        await asyncio.to_thread(db.await_lock_wait, 2)
        assert db.do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname ="
            " current_database() AND wait_event = 'advisory'"
        )
        assert (await cut_off, await other) == (False, True)


async def test_of_many_claims_at_once_one_wins(db: Database) -> None:
    for turn in range(10):
        run = db.add_run(f"run-{turn}", status="queued", worker=None)
        won = await asyncio.gather(*(claim(run, f"worker-{n}") for n in range(12)))
        assert won.count(True) == 1
        holder = db.one("SELECT worker_id FROM worker_runs WHERE id = %s", run)
        assert holder == f"worker-{won.index(True)}"


async def test_a_claim_that_cannot_be_told_or_meant_is_refused(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.add_run("run", status="queued", worker=None)
    with pytest.raises(ConfigurationError, match=r"status is 'busy', which .*in_flight"):
        await claim("run", "worker-1", status="busy")
    configure(
        tmp_path,
        monkeypatch,
        "[targets.several]\ntable = 'worker_runs'\nin_flight = ['queued', 'held']\n"
        "[targets.bare]\ntable = 'worker_runs'\ncolumns = { worker_id = false }\n",
        "bare",
    )
    with pytest.raises(ConfigurationError, match=r"several\.in_flight has several statuses"):
        await claim("run", "worker-1", target="several")
    with pytest.raises(ConfigurationError, match="has no column for worker_id"):
        await claim("run", "worker-1", target="bare")


# Tables of other teams

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


# The minute, looked at


def test_quick_blocks_that_are_lost_at_their_end_leave_nothing_behind(minute: Minute) -> None:
    for mode in ("quick", "quick_async"):
        told = await_line(minute.children[mode], "quick ", 120)
        counts = {name: int(number) for name, number in re.findall(r"'(\w+)': (\d+)", told)}
        assert counts["lost"] > 100, told
        assert counts["well"] > 100, told
        strays = [line for line in minute.children[mode].output if line.startswith("stray ")]
        assert counts["stray"] == 0, (mode, told, strays[:5])
        await_end(minute.children[mode])


def test_all_runs_of_a_process_share_a_connection_and_a_statement_a_beat(minute: Minute) -> None:
    db = minute.db
    until(lambda: minute.beats.of("fleet-1") >= 30, "thirty beats of the fleet", 60)
    rows = db.do(
        "SELECT pid, cardinality(runs) AS runs, extract(epoch FROM at - lag(at) OVER (ORDER BY"
        " at))::float AS pause FROM beats WHERE 'fleet-1' = ANY (runs) AND at > %s ORDER BY at",
        minute.held_at,
    )
    assert {row["runs"] for row in rows} == {300}
    [pid] = {row["pid"] for row in rows}
    others = db.do(
        "SELECT pid, runs FROM beats WHERE runs && %s AND pid <> %s", ["fleet-2", "fleet-300"], pid
    )
    assert others == [], "no other statement beats for any of them"
    pauses = sorted(row["pause"] for row in rows[1:])
    assert pauses[0] >= 0.88
    assert pauses[0] < 0.97, "some come early"
    assert pauses[-1] - pauses[0] > 0.05, "and some late"
    connections = db.do(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'orphan-recovery' AND query_start > now() - interval '3 seconds'"
    )
    # The fleet's, and that of the worker whose connection once hung.
    assert pid in {row["pid"] for row in connections}
    assert len(connections) == 2, connections


def test_a_connection_that_hangs_is_given_up_and_beats_go_on_over_another(minute: Minute) -> None:
    db = minute.db
    until(
        lambda: db.one(
            "SELECT heartbeat_at > now() - interval '3 seconds' FROM worker_runs WHERE id = 'hung'"
        ),
        "a beat over a new connection",
        20,
    )
    minute.children["hung"].tell("check hung")
    await_line(minute.children["hung"], "check hung: well")


def test_a_worker_whose_beats_do_not_come_through_is_told_within_the_threshold(
    minute: Minute,
) -> None:
    """Though its statement hangs, and whatever it does; by then it may have been marked."""
    lines = [
        await_line(minute.children["swallowed"], "lost swallowed unproven", THRESHOLD + 20),
        await_line(minute.children["cancelled"], "stopped cancelled unproven", 20),
        await_line(minute.children["stopped"], "stopped stopped unproven", 20),
    ]
    for line in lines:
        told_at = float(line.rpartition(" ")[2])
        assert minute.begun_at + THRESHOLD < told_at < minute.swallowed_at + THRESHOLD + 2, line
    for name in ("cancelled", "stopped"):
        await_line(minute.children[name], "went on after True")
    child = minute.children["swallowed"]
    for run, by in (("swallowed", "lost by unproven"), ("never", "well")):
        child.tell(f"check {run}")
        await_line(child, f"check {run}: {by}")
    for line in child.output:  # a rule gives this one two minutes, which may be over by now
        if line.startswith("lost longer unproven"):
            assert float(line.rpartition(" ")[2]) > minute.begun_at + 2 * THRESHOLD


def test_an_interpreter_ends_though_its_beat_hangs(minute: Minute) -> None:
    for name in ("cancelled", "stopped"):
        await_end(minute.children[name])
    child = minute.children["swallowed"]
    child.tell("end")
    await_line(child, "released")
    child.tell("end")
    await_end(child, 12)


async def test_a_worker_that_was_frozen_for_a_threshold_is_told_before_its_finish(
    minute: Minute,
) -> None:
    db, frozen, spared = minute.db, minute.children["frozen"], minute.children["spared"]
    await asyncio.to_thread(minute.await_silence)
    await sweep(minute.fenced_target)
    assert db.outcomes()["frozen"] == "marked"
    assert "spared" not in db.outcomes()
    rows = {run: row_of(db, run) for run in ("frozen", "spared")}
    frozen.send(signal.SIGCONT)
    spared.send(signal.SIGCONT)
    await asyncio.to_thread(await_line, frozen, "lost frozen ", 5)
    await asyncio.to_thread(await_line, spared, "lost spared unproven", 5)
    for _ in range(2):
        frozen.tell("finish frozen")
    refusal = "finish frozen: lost by marked, contested True"
    await asyncio.to_thread(until, lambda: frozen.output.count(refusal) == 2, "two refusals")
    assert [contest["run_id"] for contest in contests(db)] == ["frozen"]
    assert {run: row_of(db, run) for run in rows} == rows, "no beat revived what is lost"
    for child in (frozen, spared):
        child.tell("end")
        child.tell("end")
        await asyncio.to_thread(await_end, child)
