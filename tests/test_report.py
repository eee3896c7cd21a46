"""The report in words: the headline says what is, the next steps what to do, and neither twice."""

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from orphan_recovery.detect import Fleet
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import Held, SweepReport
from orphan_recovery.report_pages import as_markdown
from orphan_recovery.request import SweepRequest
from orphan_recovery.target import Target
from orphan_recovery.verdict import Outcome, Verdict
from support import Database

README = Path(__file__).parent.parent / "README.md"


def report(*, dry_run: bool = False, ahead: int = 0, undatable: int = 0) -> SweepReport:
    """Of a sweep that saw three runs in flight, one of which has beaten."""
    request = SweepRequest(asked_by="test", target=Target(name="billing"), dry_run=dry_run)
    told = SweepReport(request)
    told.fleet = Fleet(
        seen_at=datetime.now(UTC),
        in_flight=3,
        orphans=1,
        beating=1,
        exempt=0,
        undatable=undatable,
        ahead=ahead,
        ahead_workers=["w1", "w2"] if ahead else [],
    )
    return told


def doubted() -> SweepReport:
    told = report(dry_run=True)
    told.doubted = "the server was started 2 s ago"
    return told


def held_already() -> SweepReport:
    told = report(dry_run=True)
    evidence = {"silent_workers": 1, "some_silent_workers": ["w1"]}
    told.stands = Held(UUID(int=7), datetime.now(UTC), evidence, runs=1, is_new=False)
    return told


def postponed() -> SweepReport:
    told = report()
    told.postponed = "the server was started 2 s ago"
    return told


def hidden() -> SweepReport:
    told = report()
    told.hides_rows = True
    return told


def contested() -> SweepReport:
    told = report()
    told.marked_lately, told.contested_lately = 20, 1
    return told


@pytest.mark.parametrize(
    ("told", "headline", "quoted", "step"),
    [
        (
            doubted(),
            "a sweep would not believe that at once, because the server was started 2 s ago",
            "a sweep would not believe that at once",
            "See whether the workers of these runs live.",
        ),
        (
            held_already(),
            "a sweep would be HELD: 1 orphaned run not marked (hold "
            "00000000-0000-0000-0000-000000000007, which nobody has released)",
            "a sweep would be HELD: …",
            "release their runs with `orphan-recovery approve "
            "00000000-0000-0000-0000-000000000007 --target billing`",
        ),
        (
            postponed(),
            "1 orphaned run that has beaten is left to the next sweep, because the server was "
            "started 2 s ago",
            "left to the next sweep, because …",
            "Let the next sweep come",
        ),
        (
            contested(),
            "1 of 20 verdicts of the last 30 days were contested by a worker that lived",
            "were contested by a worker that lived",
            "`orphan-recovery summary --target billing` names them",
        ),
        (
            hidden(),
            "row security may hide runs of worker_runs from this role",
            "row security may hide runs",
            "a policy that shows it every row",
        ),
        (
            report(undatable=2),
            "2 in flight without any sign of life cannot be judged",
            "in flight without any sign of life",
            "`orphan-recovery doctor --target billing`",
        ),
        (
            report(ahead=2),
            "2 in flight with a sign of life in the database's future cannot be judged "
            "(worker w1, w2)",
            "sign of life in the database's future",
            "Set the clock of those hosts right",
        ),
    ],
    ids=["dry run", "held already", "postponed", "contested", "hidden", "undatable", "ahead"],
)
def test_a_warning_is_what_is_in_the_headline_and_what_to_do_below_it(
    told: SweepReport, headline: str, quoted: str, step: str
) -> None:
    assert told.headline().endswith(f"; {headline}")
    assert f"| `{quoted}` |" in README.read_text()
    assert quoted.removesuffix(" …") in headline
    [next_step] = told.next_steps()
    assert step in next_step
    assert headline not in next_step
    assert next_step.endswith(".")


def test_where_nothing_is_amiss_nothing_is_to_be_done() -> None:
    assert report().next_steps() == []


async def test_what_failed_is_told_with_its_cause_and_where_to_read_of_the_rest(
    db: Database,
) -> None:
    for run in ("a", "b"):
        db.add_run(run)
    db.poison("a", "b")
    told = await run_sweep(SweepRequest(asked_by="test", target=Target()))
    assert "2 FAILED (a by RaiseException: poisoned row a" in told.headline()
    [step] = told.next_steps()
    assert step.startswith("2 could not be marked, and stay orphans: the table of verdicts and the")
    told.is_closed = False
    assert told.next_steps()[0].startswith(
        "2 could not be marked, and stay orphans: the table of verdicts says why"
    ), "the ledger knows nothing of it"
    assert ", in the ledger" not in as_markdown(told)


async def test_a_sweep_that_was_cut_off_before_it_judged_says_what_it_had_seen(
    db: Database, impatient: None
) -> None:
    for run in ("a", "b"):
        db.add_run(run)
    db.do(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$;"
        "CREATE TRIGGER full_disk BEFORE UPDATE ON worker_runs FOR EACH ROW"
        " EXECUTE FUNCTION full_disk()"
    )
    told = (await run_sweep(SweepRequest(asked_by="test", target=Target()))).headline()
    assert told.startswith("stopped before its end: ")
    assert "until then 2 orphaned runs seen, and none judged (threshold 30 minutes, 2 in" in told


def test_a_script_is_told_the_warnings_and_what_to_do_as_people_are() -> None:
    told = report(ahead=2, undatable=2)
    as_dict = told.as_dict()
    assert as_dict["warnings"] == [warning for warning, _ in told.warnings()]
    assert len(as_dict["warnings"]) == 2
    assert as_dict["next_steps"] == told.next_steps()
    nothing = report().as_dict()
    assert (nothing["warnings"], nothing["next_steps"]) == ([], [])


async def test_a_row_that_stays_locked_is_told_in_plain_words(
    db: Database, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 50)
    db.add_run("a")
    with db.connect() as holder:
        holder.execute("SELECT FROM worker_runs WHERE id = 'a' FOR UPDATE")
        told = await run_sweep(SweepRequest(asked_by="test", target=Target()))
    assert "1 FAILED (a is locked, or what its mark needs is, by another transaction)" in (
        told.headline()
    )
    [verdict] = told.verdicts
    assert "(SQLSTATE 55P03)" in (verdict.error or ""), "the ledger has the server's own word"


def test_when_the_first_fell_silent_is_told_only_where_the_last_did_so_later() -> None:
    saw = {
        "silent_workers": 12,
        "workers": 12,
        "counted": "workers",
        "silent_since": "2026-11-27T03:00:00Z",
        "first_silent_since": "2026-11-27T03:00:00Z",
        "some_silent_workers": ["w1"],
        "server_started_at": "2026-11-26T03:00:00Z",
        "failed_over": False,
        "last_sweep_at": None,
        "threshold_minutes": 30,
        "hold_share": 0.5,
    }
    told = report()
    told.held = Held(uuid4(), datetime.now(UTC), saw, runs=12, is_new=True)
    shown = as_markdown(told)
    assert "- 12 of 12 workers look dead since 2026-11-27T03:00:00Z\n" in shown
    assert "- no sweep was before this one\n" in shown
    saw |= {"first_silent_since": "2026-11-27T02:00:00Z", "last_sweep_at": "2026-11-27T03:01:00Z"}
    shown = as_markdown(told)
    assert "dead since 2026-11-27T03:00:00Z, the first of them since 2026-11-27T02:00:00Z" in shown
    assert "- the sweep before was at 2026-11-27T03:01:00Z\n" in shown


def test_a_right_that_the_role_lacks_is_told_where_only_runs_failed() -> None:
    told = report()
    run: Any = SimpleNamespace(id="a")
    error = "InsufficientPrivilege: permission denied for table jobs (SQLSTATE 42501)"
    told.judged([Verdict(run=run, outcome=Outcome.FAILED, error=error)])
    assert any("orphan-recovery sql --target billing" in step for step in told.next_steps())
