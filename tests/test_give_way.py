"""Give way: while others write to the server, a sweep takes small slices with long pauses.

The others are a thread with a connection of its own that writes as fast as it can.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from itertools import pairwise

import pytest

from orphan_recovery import judge, lane
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from support import Database, until


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of ten; of two where a sweep gives way, and then a tenth of a second between them."""
    monkeypatch.setattr(judge, "Progress", partial(judge.Progress, size=10, show=0))
    monkeypatch.setattr(judge, "SHORT", 0.0)  # they do not grow
    monkeypatch.setattr(judge, "SMALL_SLICE", 2)
    monkeypatch.setattr(judge, "SHARE", 0.001)
    monkeypatch.setattr(judge, "LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(lane, "BUSY", 50.0)


class Others:
    """A session that writes as fast as it can, from ``start`` to ``stop``."""

    def __init__(self, db: Database) -> None:
        self._db, self._begun, self._ended = db, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write)
        db.do("CREATE TABLE other_work (n int)")

    def start(self) -> None:
        self._thread.start()
        assert self._begun.wait(30)

    def stop(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _write(self) -> None:
        with self._db.connect(autocommit=True) as session:
            session.execute("SET synchronous_commit = off")
            while not self._ended.is_set():
                session.execute("INSERT INTO other_work VALUES (1)")
                self._begun.set()


@pytest.fixture
def others(db: Database) -> Iterator[Others]:
    it = Others(db)
    yield it
    it.stop()


async def sweep() -> SweepReport:
    return await run_sweep(SweepRequest(asked_by="test"))


def slices(db: Database) -> list[tuple[timedelta, int]]:
    """When each slice was taken, after the first of them, and what it marked."""
    rows = db.do(
        "SELECT judged_at - min(judged_at) OVER () AS after, count(*) AS marked"
        " FROM orphan_recovery.verdicts GROUP BY judged_at ORDER BY judged_at"
    )
    return [(row["after"], row["marked"]) for row in rows]


def gave_way(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message == "sweep_gives_way"]


async def test_a_sweep_gives_way_to_others(
    db: Database,
    others: Others,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(lane, "BUSY", 10.0)
    orphans = db.add_orphans(100)
    others.start()
    async with asyncio.timeout(60):  # and as soon as the one lane is through, so is the other
        assert (await sweep()).recovered == 100
    # What others write is seen between two slices: the first are as large as ever.
    small = [after for after, marked in slices(db) if marked == 2]
    assert len(small) >= 20
    # Nor was the other lane kept out yet, if it was being entered just then.
    gaps = [later - before for before, later in pairwise(small[2:])]
    assert min(gaps) >= timedelta(seconds=0.1), "and in one lane"
    [event] = gave_way(caplog)
    assert event.__dict__["target"] == "default"
    assert event.__dict__["writes_per_second"] > 10
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


async def test_a_sweep_does_not_give_way_to_itself(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "BUSY", 20.0)
    monkeypatch.setattr(judge, "LANES", 1)
    db.add_orphans(400)
    assert (await sweep()).recovered == 400
    taken = slices(db)
    assert len(taken) / taken[-1][0].total_seconds() > 20.0, "it was too slow to show anything"
    # All but a few of forty: the server's own autovacuum may write now and then.
    assert [marked for _, marked in taken].count(10) >= 36


async def test_it_does_so_for_a_while_and_no_longer(
    db: Database, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it cannot wait for ever."""
    monkeypatch.setattr(lane, "BUSY", 10.0)
    monkeypatch.setattr(lane, "MOST_SECONDS", 0.35)
    monkeypatch.setattr(judge, "LANES", 1)
    db.add_orphans(100)
    others.start()
    assert (await sweep()).recovered == 100
    sizes = [marked for _, marked in slices(db)]
    assert 1 <= sizes.count(2) <= 6
    assert sizes.count(10) >= 8, "then it is at full speed again"


async def test_a_pace_that_is_set_is_kept_whatever_others_do(
    db: Database,
    others: Others,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("ORPHAN_RECOVERY_TARGETS__DEFAULT__ORPHANS_PER_SECOND", "1000000")
    db.add_orphans(50)
    others.start()
    assert (await sweep()).recovered == 50
    assert [marked for _, marked in slices(db)] == [10] * 5
    assert gave_way(caplog) == []


async def test_when_the_others_are_through_it_is_at_full_speed_again(
    db: Database, others: Others
) -> None:
    """And the lane that was kept out of it meanwhile is in it again."""
    orphans = db.add_orphans(120)
    others.start()
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.to_thread(until, lambda: len(slices(db)) >= 5, "slices beside others")
    others.stop()
    assert (await sweeping).recovered == 120
    sizes = [marked for _, marked in slices(db)]
    assert sizes.count(10) >= 5
    assert db.outcomes() == dict.fromkeys(orphans, "marked")
