"""A real Postgres for every test, each with a database of its own; a real Prefect server once."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from orphan_recovery.database import database_url, make_engine
from orphan_recovery.embedded import embedded_postgres
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from support import Database, database_of_its_own, free_port

pytest_plugins = ["alive_support", "targets_support"]

LONGEST = (
    *("test_automations", "test_hold_in_prefect", "test_benchmarks", "test_slices"),
    *("test_stateful", "test_doubt", "test_foreign", "test_alive_beat", "test_trigger"),
)
"""The files that take longer than a minute."""


def pytest_configure(config: pytest.Config) -> None:
    """Several files at a time are begun in the order of collection.

    Else those with the fewest tests came last, and of them the longest was alone at the end.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that short ones are left for the end."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a Postgres server: TEST_DATABASE_URL, or an embedded one."""
    own = os.environ.get("TEST_DATABASE_URL")
    if own:
        yield own
    else:
        with embedded_postgres() as url:
            yield url


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with the schema, from which each test's own is copied."""
    with database_of_its_own(server) as url:
        migrate(Target(), database_url(url))
        name = make_url(url).database
        assert name
        yield name


@pytest.fixture
def blank(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """An empty database; the environment names it."""
    with database_of_its_own(server) as url, Database(url) as database:
        monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", url)
        yield database


@pytest.fixture
def db(server: str, template: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A database with the schema and no rows; the environment names it."""
    with database_of_its_own(server, template) as url, Database(url) as database:
        monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", url)
        yield database


@pytest.fixture
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    """An engine of a caller's, on the test's own database: ``blank`` if it asks for that."""
    own = request.getfixturevalue("blank" if "blank" in request.fixturenames else "db")
    engine = make_engine(database_url(own.url))
    yield engine
    await engine.dispose()


@pytest.fixture
async def session(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session:
        yield session


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a real Prefect server, as other processes see it."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    api = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_UI_API_URL": "/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [str(Path(sys.executable).with_name("prefect")), "server", "start"]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log
        )
    try:
        _await_health(api, process, home / "server.log")
        yield api
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def prefect(prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of this test, and of what it starts, uses the Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect-home"))
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    return prefect_api


def _await_health(api: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up_at = time.monotonic() + 180
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{api}/health", timeout=2):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the Prefect server did not come up:\n{log.read_text()[-3000:]}")
