"""The truth guarantee in whatever order things happen; and that each guard of it is needed.

`stateful_machine` says what may happen, `stateful_deeds` how, in a `stateful_world` of its own,
`stateful_checks` what has to come of it, and `stateful_mutations` how the product looks without
each of its guards.

The examples are the same ones each time. STATEFUL_EXAMPLES=400 makes so many others, with and
without a guard; `--hypothesis-seed` makes them the same again.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import literal
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from orphan_recovery import (
    database,
    describe,
    detect_orphaned_runs,
    mark,
    mark_run_as_crashed,
    policy,
    recover,
    recover_orphaned_runs,
    targets,
    turn,
)
from orphan_recovery.alive import LostBy, RunLost, beat, finish_run
from orphan_recovery.database import database_url, make_engine
from orphan_recovery.describe import runs_table
from orphan_recovery.log import logger
from orphan_recovery.request import SweepRequest
from orphan_recovery.seen import snapshots
from stateful_deeds import WAITING, Found
from stateful_machine import Machine
from stateful_mutations import IN_CODE, IN_DATABASE, TRUTH
from stateful_world import CLOCK, SESSIONS, SHORT, TOML, UNDISTURBED, World
from support import Database, database_of_its_own, until
from tables_support import configure, set_for_all

EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "0"))
AT_MOST = 100
"""Examples until a missing guard has to show."""
STEPS = 15


class Anew(HypothesisProvider):
    """Draws each example anew. Left to itself, Hypothesis spends five in six on variations."""


AVAILABLE_PROVIDERS["anew"] = Anew


class Place:
    """A database with the clock, and an engine whose statements are compiled once."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        with Database(url) as db:
            db.do(CLOCK)
            db.do(UNDISTURBED)
            set_for_all(db, SESSIONS)
        self.url, self.runner, self.engine = url, runner, make_engine(database_url(url))
        self.engine.sync_engine.pool._pre_ping = False  # a third of all round trips


@contextmanager
def _place(server: str, template: str) -> Iterator[Place]:
    with database_of_its_own(server, template) as url, asyncio.Runner() as runner:
        place = Place(url, runner)
        yield place
        runner.run(place.engine.dispose())


@contextmanager
def _world(place: Place, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[World]:
    patch.setenv("ORPHAN_RECOVERY_DATABASE_URL", place.url)
    target = configure(folder, patch, TOML, "default")
    patch.setattr(targets, "load_targets", cache(targets.load_targets))
    patch.setattr(describe, "_known", WeakKeyDictionary())
    patch.setattr(policy, "retry_plan", lambda: policy.RetryPlan(0, 0, 0))
    patch.setattr(database, "LOCK_TIMEOUT_MS", SHORT)
    patch.setattr(turn, "_since", lambda _: timedelta(0))  # as the world's clock has it
    patch.setattr(logger, "disabled", True)
    with Database(place.url) as db, World(db, place.engine, target, place.runner) as world:
        patch.setattr(recover, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": world.wait}))
        yield world


@pytest.fixture(scope="module")
def place(server: str, template: str) -> Iterator[Place]:
    with _place(server, template) as place:
        yield place


@pytest.fixture
def world(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with _world(place, tmp_path, monkeypatch) as world:
        yield world


@pytest.fixture
def another_world(
    server: str, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """For who changes the database itself."""
    with _place(server, template) as place, _world(place, tmp_path, monkeypatch) as world:
        yield world


def explore(there: World, examples: int) -> None:
    class Here(Machine):
        world = there

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            derandomize=not EXAMPLES,
            backend="anew",
            database=None,
            deadline=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def tell(there: World) -> None:
    class Here(Machine):
        world = there

    Here().a_story_with_everything()


def test_the_story_goes_well(world: World) -> None:
    tell(world)


def test_the_truth_guarantee_holds_whatever_happens_in_whatever_order(world: World) -> None:
    explore(world, EXAMPLES or 20)


@pytest.mark.parametrize("name", IN_CODE)
def test_without_this_guard_the_truth_guarantee_is_broken(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    IN_CODE[name](monkeypatch, world.db)
    with is_found(world):
        explore(world, EXAMPLES or AT_MOST)


@pytest.mark.parametrize("name", IN_DATABASE)
def test_without_this_guard_of_the_database_it_is_broken_too(
    another_world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """For most of these it takes no luck: a story that has everything comes first."""
    IN_DATABASE[name](monkeypatch, another_world.db)
    with is_found(another_world):
        tell(another_world)
        explore(another_world, EXAMPLES or AT_MOST)


@contextmanager
def is_found(world: World) -> Iterator[None]:
    world.stops_at_once = True
    with suppress(Found):
        yield
    assert world.violation is not None, f"nothing went wrong in {world.examples} examples"


async def test_there_is_a_mutation_for_each_guard(db: Database, engine: AsyncEngine) -> None:
    asked = SweepRequest(asked_by="test")
    async with engine.connect() as connection:
        table = await runs_table(connection, asked.target)
    of_mark = mark.guards(table, asked, snapshots())
    wanted = {f"a mark without: {guard}" for guard in of_mark}
    for what in ("beat", "result"):
        guards = beat.guards(table, literal("worker-1"))
        wanted |= {f"a {what} without: {guard}" for guard in guards}
    triggers = db.do(
        "SELECT relname, tgname, tgtype FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid"
        " WHERE NOT tgisinternal"
    )
    assert TRUTH in {trigger["tgname"] for trigger in triggers}
    for trigger in triggers:
        table_name = "terminal rows" if trigger["tgname"] == TRUTH else trigger["relname"]
        update = "change" if trigger["tgname"] == TRUTH else "are edited"
        events = {16: update, 8: "are deleted", 32: "are truncated"}  # as pg_trigger has them
        wanted |= {f"{table_name} {how}" for bit, how in events.items() if trigger["tgtype"] & bit}
    assert wanted <= {*IN_CODE, *IN_DATABASE}


# What the machine found, step by step.


async def test_a_result_from_somebody_else_contests_no_verdict(db: Database) -> None:
    """Who had lost the run before it was marked says nothing about whether its holder lived."""
    db.add_run("run", worker="worker-1")
    await recover_orphaned_runs()
    with pytest.raises(RunLost) as lost:
        await finish_run("run", worker_id="worker-2")
    assert lost.value.by is LostBy.MARKED
    assert lost.value.contested is False
    assert db.do("SELECT * FROM orphan_recovery.contests") == []
    with pytest.raises(RunLost) as lost:
        await finish_run("run", worker_id="worker-1")
    assert lost.value.contested is True


async def test_a_try_that_the_server_refused_was_not_heard(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock time-out is an answer: whatever stands there afterwards is somebody else's."""
    monkeypatch.setattr(database, "LOCK_TIMEOUT_MS", 50)
    db.add_run("run")
    with db.connect() as person:
        person.execute("UPDATE worker_runs SET status = 'completed', output_json = '1'")
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1", output=2))
        await asyncio.to_thread(db.await_lock_wait)
        await asyncio.to_thread(until, lambda: not db.one(WAITING), "the lock time-out")
        person.commit()
    with pytest.raises(RunLost) as lost:
        await finishing
    assert lost.value.by is LostBy.FINISHED


async def test_two_tries_of_one_sweep_at_once_are_worth_another(
    db: Database, engine: AsyncEngine
) -> None:
    """The first left the run alone, the second would not have, and the first commits first."""
    db.add_run("run")
    db.add_run("other")
    async with AsyncSession(engine) as one, AsyncSession(engine) as two:
        runs = {run.id: run for run in await detect_orphaned_runs(one)}
        await mark_run_as_crashed(one, runs["other"])
        await one.commit()  # the sweep is in the ledger
        db.do("UPDATE worker_runs SET worker_id = 'worker-2' WHERE id = 'run'")
        assert await mark_run_as_crashed(one, runs["run"]) is False
        db.do("UPDATE worker_runs SET worker_id = 'worker-1' WHERE id = 'run'")
        second = asyncio.ensure_future(mark_run_as_crashed(two, runs["run"]))
        await asyncio.to_thread(db.await_lock_wait)
        await one.commit()
        with pytest.raises(DBAPIError) as raised:
            await second
        assert policy.is_transient(raised.value)
        await two.rollback()
        assert await mark_run_as_crashed(two, runs["run"]) is False
    assert db.outcomes() == {"other": "marked", "run": "changed_hands"}
