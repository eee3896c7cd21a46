"""Runs tables as other teams made them: how a test makes one, sweeps it and reads it back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import pytest
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from orphan_recovery import WorkerRun
from orphan_recovery.database import database_url, make_engine
from orphan_recovery.detect import Fleet, detect, look_at_fleet
from orphan_recovery.mark import mark_one
from orphan_recovery.record import note_direct_call
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target
from support import Database

Statement = LiteralString | sql.SQL | sql.Composed


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A runs table as another team made it, its runs, and what a sweep is to make of them."""

    ddl: LiteralString
    runs: LiteralString
    table: LiteralString
    key: LiteralString = "id::text"
    """A run's id, by its row."""
    status: LiteralString = "status"
    target: Target | None = None
    toml: str | None = None
    """The description as a file, instead; the target in it is called ``scene``."""
    setting: LiteralString | None = None
    """What the database is told to have its sessions set."""
    orphans: Mapping[str, str]
    """Id and evidence of every run that is dead."""

    def make(self, db: Database, folder: Path, environment: pytest.MonkeyPatch) -> Target:
        """Create the table with its runs, and read the description."""
        if self.setting:
            set_for_all(db, self.setting)
        db.do(self.ddl)
        db.do(self.runs)
        if self.target is not None:
            return self.target
        assert self.toml is not None
        return configure(folder, environment, self.toml, "scene")

    def rows(self, db: Database) -> dict[str, str]:
        """Every row, whole, by its id; with the transaction that wrote it."""
        found = do(
            db,
            sql.SQL("SELECT {} AS id, xmin::text || ' ' || t::text AS row FROM {} AS t").format(
                sql.SQL(self.key), sql.SQL(self.table)
            ),
        )
        return {row["id"]: row["row"] for row in found}

    def statuses(self, db: Database) -> dict[str, str]:
        found = do(
            db,
            sql.SQL("SELECT {} AS id, ({})::text AS status FROM {}").format(
                sql.SQL(self.key), sql.SQL(self.status), sql.SQL(self.table)
            ),
        )
        return {row["id"]: row["status"] for row in found}


def configure(folder: Path, environment: pytest.MonkeyPatch, toml: str, name: str) -> Target:
    """Describe targets in a real file, which the environment names; give one of them."""
    path = folder / "orphan-recovery.toml"
    path.write_text(toml, encoding="utf-8")
    environment.setenv("ORPHAN_RECOVERY_CONFIG", str(path))
    return find_target(name)


def set_for_all(db: Database, setting: LiteralString) -> None:
    """Every session from now on begins with it, those of a sweep among them."""
    for one in setting.split(";"):
        name = sql.Identifier(db.one("SELECT current_database()"))
        do(db, sql.SQL("ALTER DATABASE {} SET {}").format(name, sql.SQL(one)))


def do(db: Database, statement: Statement, *values: Any) -> list[dict[str, Any]]:
    """As :meth:`Database.do`, for composed statements too."""
    return db.do(statement, *values)  # type: ignore[arg-type]


def request(target: Target, **asked: Any) -> SweepRequest:
    return SweepRequest(**{"target": target, "asked_by": "test", **asked})


async def sweep(target: Target, **asked: Any) -> SweepReport:
    return await run_sweep(request(target, **asked))


async def seen(db: Database, target: Target, **asked: Any) -> list[WorkerRun]:
    """What detection sees now, on a connection of its own."""
    engine = make_engine(database_url(db.url))
    try:
        async with engine.connect() as connection:
            return await detect(connection, request(target, **asked))
    finally:
        await engine.dispose()


async def fleet(db: Database, target: Target, **asked: Any) -> Fleet:
    engine = make_engine(database_url(db.url))
    try:
        async with engine.connect() as connection:
            return await look_at_fleet(connection, request(target, **asked))
    finally:
        await engine.dispose()


def simple(blank: Database, *columns: LiteralString, **described: Any) -> Target:
    """A table ``jobs`` with one run that has been silent for two hours, and some columns more."""
    blank.do(
        "CREATE TABLE jobs (id text PRIMARY KEY, status text NOT NULL, worker_id text, task text,"
        " created_at timestamptz, heartbeat_at timestamptz)"
    )
    for column in columns:
        do(blank, sql.SQL("ALTER TABLE jobs ADD {}").format(sql.SQL(column)))
    add(blank, "run")
    target = Target(**{"name": "simple", "table": "jobs", **described})
    migrate(target)
    return target


def add(
    blank: Database,
    run: str,
    status: str = "running",
    *,
    task: str | None = None,
    worker: str | None = "worker-1",
    age: str = "2 hours",
) -> None:
    blank.do(
        "INSERT INTO jobs (id, status, worker_id, task, created_at)"
        " VALUES (%s, %s, %s, %s, now() - %s::interval)",
        *(run, status, worker, task, age),
    )


def statuses(blank: Database) -> dict[str, str]:
    return {row["id"]: row["status"] for row in blank.do("SELECT id, status FROM jobs")}


async def look(engine: AsyncEngine, asked: SweepRequest) -> list[WorkerRun]:
    async with AsyncSession(engine) as session:
        return await detect(await session.connection(), asked)


async def outcome_of(engine: AsyncEngine, asked: SweepRequest, run: WorkerRun) -> str:
    """Mark one run in a transaction of its own, as a sweep does, and say what became of it."""
    async with AsyncSession(engine) as session, session.begin():
        await note_direct_call(session, asked)
        return (await mark_one(session, asked, run)).outcome


def names_in(plan: dict[str, Any]) -> list[str]:
    """The indexes, and the tables that are read whole, of a plan."""
    own = plan.get("Index Name") or (
        f"the whole of {plan['Relation Name']}" if plan["Node Type"] == "Seq Scan" else None
    )
    below = [name for part in plan.get("Plans", []) for name in names_in(part)]
    return [own, *below] if own else below
