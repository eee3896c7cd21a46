"""Pace: no more orphans a second than the target says, in all its sweeps together.

How long a pause lasts at least is the server's own clock's to say; nothing here has to be quick.
"""

import asyncio
from datetime import timedelta
from functools import partial

import pytest

from orphan_recovery import judge, judge_pages
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SHOWN, SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.settings import ConfigurationError
from support import Database

VARIABLE = "ORPHAN_RECOVERY_TARGETS__DEFAULT__ORPHANS_PER_SECOND"
NEARLY = 0.7
"""A pause is shortened by what the slice before took, as its sweep saw it."""


async def sweep(limit: int | None = None) -> SweepReport:
    return await run_sweep(SweepRequest(asked_by="test", limit=limit))


def times(db: Database) -> list[tuple[timedelta, int]]:
    """When verdicts were given, after the first of them, and how many at that time."""
    rows = db.do(
        "SELECT judged_at - min(judged_at) OVER () AS after, count(*) AS verdicts"
        " FROM orphan_recovery.verdicts GROUP BY judged_at ORDER BY judged_at"
    )
    return [(row["after"], row["verdicts"]) for row in rows]


@pytest.mark.parametrize("show", [SHOWN, 0])
async def test_slices_keep_the_pace(
    db: Database, monkeypatch: pytest.MonkeyPatch, show: int
) -> None:
    """Whether their runs are shown one by one, or only counted, which has two lanes otherwise."""
    monkeypatch.setattr(judge, "Progress", partial(judge.Progress, show=show))
    orphans = db.add_orphans(12)
    monkeypatch.setenv(VARIABLE, "40")
    assert (await sweep()).recovered == 12
    given = times(db)
    assert [verdicts for _, verdicts in given] == [2] * 6
    [(first, _), *_, (last, _)] = given
    assert last - first >= NEARLY * timedelta(seconds=5 * 2 / 40)
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


async def test_two_sweeps_at_once_keep_it_together(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphans = db.add_orphans(12)
    monkeypatch.setenv(VARIABLE, "20")
    reports = await asyncio.gather(sweep(), sweep())
    assert sum(report.recovered for report in reports) == 12
    last, _ = times(db)[-1]
    assert last >= NEARLY * timedelta(seconds=11 / 20)
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


async def test_pages_keep_it_too(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.add_orphans(6)
    monkeypatch.setenv(VARIABLE, "20")
    for module in (judge, judge_pages):
        monkeypatch.setattr(module, "PAGE", 2)
    assert (await sweep(limit=6)).recovered == 6
    given = times(db)
    assert [verdicts for _, verdicts in given] == [2] * 3
    assert given[-1][0] >= NEARLY * timedelta(seconds=4 / 20)


async def test_nothing_is_waited_for_after_the_last_page(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a page has no more than a second's worth."""
    pauses = list[float]()
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    db.add_orphans(6)
    monkeypatch.setenv(VARIABLE, "2")
    monkeypatch.setattr("orphan_recovery.judge_pages.asyncio.sleep", noted)
    assert (await sweep(limit=6)).recovered == 6
    assert pauses == [1.0, 1.0]
    assert [verdicts for _, verdicts in times(db)] == [2] * 3


@pytest.mark.parametrize("bad", ["0", "-5", "fast"])
async def test_a_pace_that_is_none_is_refused(
    db: Database, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    db.add_orphans(1)
    monkeypatch.setenv(VARIABLE, bad)
    with pytest.raises(ConfigurationError, match=rf"{VARIABLE} is '{bad}'"):
        await sweep()
    assert db.verdicts() == []
