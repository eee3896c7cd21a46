"""What the tests of alive share: real workers, a network that fails, and what the database saw.

Their fixtures are there for every test: ``conftest.py`` names this module as a plugin.
"""

import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from alive.proxy import Proxy
from orphan_recovery.alive import beaters
from orphan_recovery.demo.processes import Child, Processes
from orphan_recovery.policy import RetryPlan
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.target import Rule, Target
from orphan_recovery.targets import find_target
from support import Database, database_of_its_own, until

WORKER = Path(__file__).with_name("alive") / "worker.py"
THRESHOLD = 60
"""Seconds: the least threshold there is."""
OFTEN = 0.2
"""Seconds between beats, where a test has to see several."""
COMMIT = b"COMMIT\0"
"""As it is sent; READ COMMITTED is sent too."""


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


@pytest.fixture
def no_beater_is_left() -> Iterator[None]:
    """What beats in this process ends with the test whose database it beats in."""
    yield
    for one in beaters._beaters.values():
        one.stop()
    beaters._beaters.clear()


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


def terminate(db: Database) -> None:
    assert db.do(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'orphan-recovery'"
    )


def waits(db: Database) -> bool:
    return bool(
        db.one(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


def stall(seconds: float = 1) -> None:
    """Hold up the loop, as work does."""
    threading.Event().wait(seconds)


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
    """A scene that takes longer than the least threshold.

    What takes a whole threshold goes on side by side from the beginning, and is looked at last.
    """

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

    def end(self) -> None:
        """Stop what goes on still, frozen or not."""
        for child in self.children.values():
            with suppress(ProcessLookupError):
                child.process.kill()

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


@pytest.fixture(scope="session")
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
        database_of_its_own(server, template) as url,
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
        minute.end()


@pytest.fixture
def minute(the_minute: Minute, monkeypatch: pytest.MonkeyPatch) -> Minute:
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", the_minute.db.url)
    return the_minute


@pytest.fixture
def the_minute_has_begun(request: pytest.FixtureRequest) -> None:
    """If any of it is asked for at all, so that the other tests go on meanwhile."""
    if any("minute" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("the_minute")
