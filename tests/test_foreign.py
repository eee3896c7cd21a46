"""Tables that other projects made, with those projects' own workers in them, killed in mid-job.

Each package creates its schema, adds its jobs and runs its workers by its own code, in processes
of their own (``foreign/``). All that recovery is told is ``foreign/orphan-recovery.toml``.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from pgqueuer import Queries
from procrastinate import App, PsycopgConnector

from orphan_recovery import WorkerRun
from orphan_recovery.database import database_url, make_engine
from orphan_recovery.detect import detect
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.targets import find_target
from support import Database, database_of_its_own, until

FOREIGN = Path(__file__).with_name("foreign")
QUICK = 2
"""Jobs of each queue that end at once, beside its long one."""

A_MINUTE_SINCE: LiteralString = "SELECT now() > %s::timestamptz + interval '1 minute'"


@dataclass(frozen=True)
class Package:
    """What a test has to know of a package: where its words are, and how to read them."""

    statuses: LiteralString
    """The key and the status of every job."""
    holding: LiteralString
    """The key of the long job of a queue, while a worker holds it."""
    ended: LiteralString
    """How many jobs of a queue ended well."""
    crashed: str
    evidence: str
    beats: bool = True


PACKAGES = {
    "procrastinate": Package(
        statuses="SELECT id::text AS id, status::text FROM procrastinate_jobs",
        holding=(
            "SELECT id::text AS id FROM procrastinate_jobs"
            " WHERE queue_name = %s AND task_name = 'hold' AND status = 'doing'"
        ),
        ended=(
            "SELECT count(*) FROM procrastinate_jobs WHERE queue_name = %s AND status = 'succeeded'"
        ),
        crashed="failed",
        evidence="worker heartbeat",
    ),
    "pgqueuer": Package(
        statuses="SELECT id::text AS id, status::text FROM pgqueuer",
        holding=(
            "SELECT id::text AS id FROM pgqueuer"
            " WHERE entrypoint = %s || '-hold' AND status = 'picked'"
        ),
        ended=(  # a job that ended well is in its log only
            "SELECT count(*) FROM pgqueuer_log"
            " WHERE starts_with(entrypoint, %s || '-') AND status = 'successful'"
        ),
        crashed="failed",
        evidence="run heartbeat",
    ),
    "apscheduler": Package(
        statuses="SELECT id::text AS id, status FROM django_apscheduler_djangojobexecution",
        holding=(
            "SELECT id::text AS id FROM django_apscheduler_djangojobexecution"
            " WHERE job_id = %s || '-hold' AND status = 'Started execution'"
        ),
        ended=(
            "SELECT count(*) FROM django_apscheduler_djangojobexecution"
            " WHERE starts_with(job_id, %s || '-') AND status = 'Executed'"
        ),
        crashed="Error!",
        evidence="age",
        beats=False,
    ),
}
every_package = pytest.mark.parametrize("name", PACKAGES)


class Worker:
    """A process of a package's own worker, on one queue."""

    def __init__(self, name: str, db: Database, queue: str, folder: Path, *options: str) -> None:
        self.package, self.db, self.queue = PACKAGES[name], db, queue
        self.log = folder / f"{name}-{queue}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command(name, db, "--work", queue, *options), stdout=log, stderr=log
            )

    def await_mid_job(self) -> str:
        """Return the key of its long job once it holds that, and has ended all others."""
        until(self._is_mid_job, f"{self.queue} in mid-job, see {self.log}")
        [job] = self.db.do(self.package.holding, self.queue)
        return str(job["id"])

    def ended(self) -> int:
        return int(self.db.one(self.package.ended, self.queue))

    def kill(self) -> None:
        self.process.kill()  # SIGKILL: no handler, no last word to the database
        self.process.wait()

    def _is_mid_job(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        holds = len(self.db.do(self.package.holding, self.queue)) == 1
        return holds and self.ended() == QUICK


def command(name: str, db: Database, *options: str) -> list[str]:
    return [sys.executable, str(FOREIGN / f"{name}_worker.py"), db.url, *options]


def do(name: str, db: Database, *options: str) -> None:
    subprocess.run(command(name, db, *options), check=True, capture_output=True)


@dataclass(frozen=True)
class Scene:
    """A package's database with a job whose worker is dead, and one whose worker lives."""

    db: Database
    killed: str
    """The key of the dead worker's job."""
    killed_at: datetime
    """The database's time just after."""
    living: str
    worker: Worker
    """The one that lives."""
    go: Path
    """The living worker's job ends when this exists."""

    def statuses(self) -> dict[str, str]:
        rows = self.db.do(self.worker.package.statuses)
        return {str(row["id"]): str(row["status"]) for row in rows}


@pytest.fixture(scope="module")
def scenes(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scene]]:
    """All packages side by side, so that the minute of silence is waited for once."""
    folder = tmp_path_factory.mktemp("foreign")
    go = folder / "go"
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("ORPHAN_RECOVERY_CONFIG", str(FOREIGN / "orphan-recovery.toml"))
        dbs: dict[str, Database] = {}
        for name in PACKAGES:
            url = stack.enter_context(database_of_its_own(server))
            environment.setenv(f"{name.upper()}_DATABASE_URL", url)
            dbs[name] = stack.enter_context(Database(url))
            do(name, dbs[name], "--schema")
            migrate(find_target(name))

        def start(name: str, queue: str) -> Worker:
            options = ["--enqueue", queue, "--quick", str(QUICK)]
            if queue == "living":
                options += ["--until", str(go)]
            worker = Worker(name, dbs[name], queue, folder, *options)
            stack.callback(worker.kill)
            return worker

        dying = {name: start(name, "killed") for name in PACKAGES}
        workers = {name: start(name, "living") for name in PACKAGES if PACKAGES[name].beats}
        killed = {name: worker.await_mid_job() for name, worker in dying.items()}
        for worker in workers.values():
            worker.await_mid_job()
        for worker in dying.values():
            worker.kill()
        killed_at = {name: dbs[name].one("SELECT now()") for name in PACKAGES}
        for name, db in dbs.items():
            is_over = partial(db.one, A_MINUTE_SINCE, killed_at[name])
            until(is_over, "a minute of silence", 90)
        # Where nothing beats only youth shows that a job is alive, so that one begins now.
        workers |= {name: start(name, "living") for name in PACKAGES if name not in workers}
        living = {name: worker.await_mid_job() for name, worker in workers.items()}
        yield {
            name: Scene(dbs[name], killed[name], killed_at[name], living[name], workers[name], go)
            for name in PACKAGES
        }


@dataclass(frozen=True)
class Seen:
    """What a look shows before anything is marked."""

    ours: list[WorkerRun]
    own: set[str] | None
    """The jobs that the package itself calls stalled; None where it has no such idea."""
    statuses: dict[str, str]


@pytest.fixture(scope="module")
def seen(scenes: dict[str, Scene]) -> dict[str, Seen]:
    return {
        name: Seen(
            asyncio.run(ours(name, scene.db)), asyncio.run(own(name, scene.db)), scene.statuses()
        )
        for name, scene in scenes.items()
    }


@pytest.fixture(scope="module")
def reports(scenes: dict[str, Scene], seen: dict[str, Seen]) -> dict[str, SweepReport]:
    """A sweep of each target, after the look."""
    return {name: asyncio.run(run_sweep(request(name))) for name in scenes}


def request(name: str) -> SweepRequest:
    return SweepRequest(target=find_target(name), threshold_minutes=1, asked_by="test")


async def ours(name: str, db: Database) -> list[WorkerRun]:
    engine = make_engine(database_url(db.url))
    try:
        async with engine.connect() as connection:
            return await detect(connection, request(name))
    finally:
        await engine.dispose()


async def own(name: str, db: Database) -> set[str] | None:
    """The package's own set of stalled jobs, by its own interface and the same threshold."""
    if name == "procrastinate":
        async with procrastinate(db) as app:
            jobs = await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=60)
            return {str(job.id) for job in jobs}
    if name == "pgqueuer":
        async with await psycopg.AsyncConnection.connect(db.url, autocommit=True) as connection:
            queries = Queries.from_psycopg_connection(connection)
            return {str(job.id) for job in await queries.stale_jobs(timedelta(minutes=1))}
    return None


def procrastinate(db: Database) -> Any:
    """Procrastinate's own interface, open for as long as the block that it is used in."""
    connector = PsycopgConnector(conninfo=db.url, min_size=1, max_size=1)
    return App(connector=connector).open_async()


@every_package
def test_exactly_the_killed_workers_job_is_detected(
    name: str, scenes: dict[str, Scene], seen: dict[str, Seen]
) -> None:
    scene = scenes[name]
    [run] = seen[name].ours
    assert run.id == scene.killed
    assert run.evidence == PACKAGES[name].evidence
    assert run.sign_of_life <= scene.killed_at
    if PACKAGES[name].beats:
        assert run.worker_id is not None
        assert scene.killed_at - run.sign_of_life < timedelta(seconds=10)


@pytest.mark.parametrize("name", ["procrastinate", "pgqueuer"])
def test_the_package_itself_calls_the_same_jobs_stalled(name: str, seen: dict[str, Seen]) -> None:
    assert {run.id for run in seen[name].ours} == seen[name].own


@every_package
def test_the_sweep_marks_that_job_in_the_packages_words_and_no_other(
    name: str,
    scenes: dict[str, Scene],
    seen: dict[str, Seen],
    reports: dict[str, SweepReport],
) -> None:
    report, scene = reports[name], scenes[name]
    assert (report.error, report.detected, report.recovered) == (None, 1, 1)
    before = seen[name].statuses
    assert scene.statuses() == {**before, scene.killed: PACKAGES[name].crashed}
    assert scene.db.outcomes() == {scene.killed: "marked"}
    if name != "apscheduler":
        assert asyncio.run(own(name, scene.db)) == set()


def test_the_mark_tells_why_where_the_package_has_a_column_for_it(
    scenes: dict[str, Scene], reports: dict[str, SweepReport]
) -> None:
    scene = scenes["apscheduler"]
    told = scene.db.one(
        "SELECT exception FROM django_apscheduler_djangojobexecution WHERE id = %s::bigint",
        scene.killed,
    )
    assert "no sign of life" in told


@every_package
def test_a_second_sweep_finds_nothing(
    name: str, scenes: dict[str, Scene], reports: dict[str, SweepReport]
) -> None:
    again = asyncio.run(run_sweep(request(name)))
    assert (again.error, again.detected) == (None, 0)


@every_package
def test_the_living_worker_ends_its_job_unharmed(
    name: str, scenes: dict[str, Scene], reports: dict[str, SweepReport]
) -> None:
    scene = scenes[name]
    [held] = scene.db.do(PACKAGES[name].holding, "living") or [{"id": "ended"}]
    assert held["id"] in (scene.living, "ended")
    scene.go.touch()
    until(lambda: scene.worker.ended() == QUICK + 1, f"the living worker of {name} to end its job")
    assert scene.worker.process.poll() is None
    assert scene.statuses()[scene.killed] == PACKAGES[name].crashed


@pytest.fixture
def configured(blank: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """An empty database, which every target names."""
    monkeypatch.setenv("ORPHAN_RECOVERY_CONFIG", str(FOREIGN / "orphan-recovery.toml"))
    for name in PACKAGES:
        monkeypatch.setenv(f"{name.upper()}_DATABASE_URL", blank.url)
    return blank


async def test_a_job_whose_worker_is_no_longer_in_the_workers_table_is_not_silently_lost(
    configured: Database, tmp_path: Path
) -> None:
    """Any worker of Procrastinate removes at its start the rows of those that are silent."""
    do("procrastinate", configured, "--schema")
    migrate(find_target("procrastinate"))
    worker = Worker("procrastinate", configured, "killed", tmp_path, "--enqueue", "killed")
    job = await asyncio.to_thread(worker.await_mid_job)
    await asyncio.to_thread(worker.kill)
    async with procrastinate(configured) as app:
        await app.job_manager.prune_stalled_workers(seconds_since_heartbeat=0)
    [row] = configured.do(
        "SELECT id::text AS id, status::text, worker_id FROM procrastinate_jobs"
        " WHERE status = 'doing'"
    )
    assert row == {"id": job, "status": "doing", "worker_id": None}

    assert (await run_sweep(request("procrastinate"))).detected == 0, "it began a moment ago"
    configured.do("UPDATE procrastinate_events SET at = at - interval '2 minutes'")
    report = await run_sweep(request("procrastinate"))
    assert report.recovered == 1
    assert configured.outcomes() == {job: "marked"}
    assert configured.verdicts()[0]["evidence"] == "age"


def test_an_execution_that_began_late_looks_as_old_as_it_was_due(
    configured: Database, tmp_path: Path
) -> None:
    """Why the threshold there is longer than any delay: the row has no other time."""
    do("apscheduler", configured, "--schema")
    migrate(find_target("apscheduler"))
    due = str(configured.one("SELECT now() - interval '2 minutes'"))
    options = ("--enqueue", "late", "--due", due)
    worker = Worker("apscheduler", configured, "late", tmp_path, *options)
    try:
        job = worker.await_mid_job()
        [run] = asyncio.run(ours("apscheduler", configured))
    finally:
        worker.kill()
    assert (run.id, run.evidence) == (job, "age")
    assert run.silence >= timedelta(minutes=2)


async def test_the_mark_gives_back_the_dead_jobs_place_under_a_concurrency_limit(
    configured: Database, tmp_path: Path
) -> None:
    """PgQueuer counts whatever has an owner, also what has failed."""
    do("pgqueuer", configured, "--schema")
    migrate(find_target("pgqueuer"))
    limited = ("--limit", "1", "--enqueue", "only")
    worker = Worker("pgqueuer", configured, "only", tmp_path, *limited)
    await asyncio.to_thread(worker.await_mid_job)
    await asyncio.to_thread(worker.kill)
    configured.do(
        "UPDATE pgqueuer SET (created, updated, heartbeat) ="
        " (SELECT past, past, past FROM (SELECT now() - interval '2 minutes' AS past))"
    )
    assert (await run_sweep(request("pgqueuer"))).recovered == 1

    worker = Worker("pgqueuer", configured, "only", tmp_path, *limited)
    try:
        held = PACKAGES["pgqueuer"].holding
        until(lambda: bool(configured.do(held, "only")), "the next job to begin", 5)
    finally:
        worker.kill()
