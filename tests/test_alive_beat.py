"""Alive: a block beats, whatever its work does and whatever happens to its connection."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from alive.proxy import Proxy
from alive_support import OFTEN, Beats, Workers, await_end, await_line, heartbeat
from orphan_recovery import ConfigurationError
from orphan_recovery.alive import keep_alive
from support import Database, until
from tables_support import configure, set_for_all

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


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
