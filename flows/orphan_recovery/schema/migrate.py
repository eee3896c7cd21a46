"""Migrate: bring the schema up to date, or take it away again.

The hazard is a migration that harms what is there: a table rewritten under load, an index built
under a lock, a queue of queries behind a DDL statement that waits. So an existing table is
adopted (missing columns are added, nothing is rewritten), indexes are built concurrently, and a
lock that cannot be had within seconds is given up with a clear error, to be tried again.
"""

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, create_engine, exists, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from orphan_recovery.catalog import ColumnFacts, Relation, look_up
from orphan_recovery.database import CONNECT_TIMEOUT_SECONDS, address, describe
from orphan_recovery.describe import describe_runs
from orphan_recovery.ledger import SCHEMA, sweeps
from orphan_recovery.policy import sqlstate
from orphan_recovery.runs import RunsTable
from orphan_recovery.schema.ddl import Change, changes, undoing
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import DEFAULT_TABLE, Target, split_table
from orphan_recovery.targets import find_target

LOCK_TIMEOUT_MS: Final = 5_000
WAIT_SECONDS: Final = 60
_ADVISORY_KEY: Final = 0x6F727068  # "orph"
VERSION_TABLE: Final = "schema_version"


@dataclass(frozen=True, slots=True)
class Migration:
    """What a migration did."""

    before: str
    after: str
    """The revisions that the database was and is at, such as ``ledger_0001, runs_0001``; none."""
    done: tuple[str, ...]
    """What it made or took away, in words; empty if there was nothing to do."""


def migrate(target: Target | None = None, url: URL | None = None) -> Migration:
    """Bring a target's database up to date. Commits. Again and again without harm.

    The ledger; the default table, if that is the target (created, or the one that is there
    adopted); the indexes, unless ``index`` is false: of what is in flight, for detection, and of
    crashed runs, where a crash has a status and a time of its own; the truth trigger, where it is
    wanted. A table that is described in the file of targets gets these indexes and this trigger,
    and is not changed otherwise.

    Args:
        target: which; without it, the one that is meant by default.
        url: its database; without it, the target's own address.

    Returns:
        What was done.

    Raises:
        ConfigurationError: the address or the target cannot be used, the table that is there
            cannot be adopted, the role lacks a right, or a lock was not to be had in time.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    target = target or find_target()

    def step(connection: Connection, config: Config) -> list[str]:
        if target.is_default_table:
            _, as_it_will_be = default_table(connection, target)
        else:
            as_it_will_be = describe_runs(connection, target)
        changes(connection, as_it_will_be)  # or a refusal, before anything is made
        for branch in _branches(target):
            command.upgrade(config, f"{branch}@head")
        made = changes(connection, describe_runs(connection, target))
        connection.commit()
        _execute(connection, made)
        return [change.why for change in made]

    return _run(target, url, step)


def unmigrate(target: Target | None = None, url: URL | None = None) -> Migration:
    """Take away what :func:`migrate` made, or what is left of it. Commits.

    An adopted runs table and its rows stay. A table that was created here is dropped only when
    it is empty, and the ledger only when it is empty. Where the owner has dropped the schema, the
    table's indexes are left, and go; where there is no such table, there is nothing to do.

    Args:
        target: which; without it, the one that is meant by default.
        url: its database; without it, the target's own address.

    Returns:
        What was taken away.

    Raises:
        ConfigurationError: what is still there would be lost, or the role lacks a right; the
            message says what to do.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    target = target or find_target()

    def step(connection: Connection, config: Config) -> list[str]:
        there = revisions(connection)
        if there and connection.scalar(select(exists().select_from(sweeps))):
            raise ConfigurationError(
                "the ledger holds sweeps, which a downgrade would destroy: keep a copy, drop the "
                f"schema yourself with DROP SCHEMA {SCHEMA} CASCADE, and run this again, for what "
                "is left on the table"
            )
        if look_up(connection, *split_table(target.table)) is None and not there:
            return []
        runs = describe_runs(connection, target)
        guarded = text(GUARDED_TABLES)
        if others := list(connection.scalars(guarded, {"own": runs.relation.oid})):
            raise ConfigurationError(
                f"the truth trigger also guards {', '.join(others)}: take it from there first, "
                "with `orphan-recovery migrate --down --target …`"
            )
        undone = undoing(connection, runs)
        connection.commit()
        _execute(connection, undone)
        for branch in reversed(_branches(target)) if there else ():
            command.downgrade(config, f"{branch}@base")
        if there and not revisions(connection):  # leave nothing behind
            connection.execute(text(f"DROP TABLE {SCHEMA}.{VERSION_TABLE}"))
            connection.execute(text(f"DROP SCHEMA {SCHEMA}"))
        connection.commit()
        return [change.why for change in undone]

    return _run(target, url, step)


GUARDED_TABLES: Final = """
SELECT t.tgrelid::regclass::text FROM pg_trigger t
WHERE t.tgfoid = to_regprocedure('orphan_recovery.prevent_worker_run_mutation()')
  AND t.tgrelid <> :own ORDER BY 1
"""


def revisions(connection: Connection) -> tuple[str, ...]:
    """The revisions that the database is at; none if it has no schema of ours."""
    options = {"version_table": VERSION_TABLE, "version_table_schema": SCHEMA}
    context = MigrationContext.configure(connection, opts=options)
    return tuple(sorted(context.get_current_heads()))


def newest_revisions(target: Target) -> tuple[str, ...]:
    """The revisions that this version of the package brings for a target."""
    script = ScriptDirectory.from_config(_config())
    return tuple(sorted(script.get_revision(f"{b}@head").revision for b in _branches(target)))


def unknown_revisions(there: tuple[str, ...]) -> list[str]:
    """Those of ``there`` that this version of the package does not know: a newer one made them."""
    known = {one.revision for one in ScriptDirectory.from_config(_config()).walk_revisions()}
    return [name for name in there if name not in known]


def ledger_sql() -> str:
    """The statements that make the ledger in a database that has none, for a DBA to read."""
    config, written = _config(), io.StringIO()
    config.output_buffer = written
    command.upgrade(config, "ledger@head", sql=True)
    statements = re.sub(r" RETURNING \S+;", ";", written.getvalue())
    return f"CREATE SCHEMA {SCHEMA};\n\n" + re.sub(r"\n{3,}", "\n\n", statements).strip()


def default_table(connection: Connection, target: Target) -> tuple[list[str], RunsTable]:
    """How the default table is made, or the one that is there completed; and what it then is.

    Reads only.

    Raises:
        ConfigurationError: the one that is there cannot be adopted.
    """
    script = ScriptDirectory.from_config(_config()).get_revision("runs@head").module
    found = look_up(connection, None, DEFAULT_TABLE)
    types = script.adopted_types(connection) if found else None
    own = {"id": "text", "status": "text", **script.ADDITIONS}
    key = types["id"] if types else "text"
    added = {
        name: _facts(name, kind.format(key=key).split(" DEFAULT")[0])
        for name, kind in own.items()
        if name not in (types or ())
    }
    relation = Relation(
        oid=found.oid if found else 0,
        schema=found.schema if found else str(connection.dialect.default_schema_name),
        name=DEFAULT_TABLE,
        kind=found.kind if found else "r",
        columns={**found.columns, **added} if found else added,
        unique=found.unique if found else (frozenset({"id"}),),
        checks=found.checks if found else {},
        shows_places=found.shows_places if found else True,
    )
    return script.statements(types), describe_runs(connection, target, relation)


def _facts(name: str, declared: str) -> ColumnFacts:
    kind, category = {
        "text": ("text", "S"),
        "jsonb": ("jsonb", "U"),
        "boolean": ("bool", "B"),
        "timestamptz": ("timestamptz", "D"),
        "integer": ("int4", "N"),
    }.get(declared, (declared, "U"))
    return ColumnFacts(
        name=name,
        declared=declared,
        cast_name=f"pg_catalog.{kind}",
        kind=kind,
        category=category,
        length=None,
        labels=(),
        is_domain=False,
        is_generated=False,
    )


def _branches(target: Target) -> tuple[str, ...]:
    # The runs first: a table that cannot be adopted is refused before anything is made.
    return ("runs", "ledger") if target.is_default_table else ("ledger",)


def _execute(connection: Connection, made: list[Change]) -> None:
    for change in made:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)  # noqa: S101 - the only driver there is
        driver.autocommit = change.alone
        try:
            for statement in change.statements:
                # A concurrent build waits for the transactions that are open when it starts. It
                # holds nobody up meanwhile, so it may wait longer than for a lock.
                concurrent = ("CREATE INDEX CONCURRENTLY ", "DROP INDEX CONCURRENTLY ")
                patient = statement.as_string(None).startswith(concurrent)
                wait = WAIT_SECONDS * 1_000 if patient else LOCK_TIMEOUT_MS
                driver.execute(f"SET lock_timeout = {wait}")
                driver.execute(statement)
            if not change.alone:
                driver.commit()
        finally:
            if change.alone:
                driver.execute(f"SET lock_timeout = {LOCK_TIMEOUT_MS}")
            else:
                driver.rollback()
            driver.autocommit = False


_PATIENT: Final = text(
    "SELECT set_config(name, '0', false) FROM pg_settings"
    " WHERE name IN ('statement_timeout', 'transaction_timeout')"
)
"""Whatever limits the role or the database has: an index takes as long as the table is large."""


def _run(
    target: Target, url: URL | None, step: Callable[[Connection, Config], list[str]]
) -> Migration:
    engine = create_engine(
        url or address(target),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={
            "application_name": "orphan-recovery migrate",
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "client_encoding": "utf8",  # whatever the role's own: else texts may come as bytes
        },
    )
    try:
        with engine.connect() as connection, _alone(connection):
            connection.execute(_PATIENT)
            connection.commit()
            before = revisions(connection)
            connection.commit()
            _require_known(before, target)
            config = _config()
            config.attributes["connection"] = connection
            connection.execute(select(func.set_config("lock_timeout", str(LOCK_TIMEOUT_MS), False)))
            connection.commit()
            done = step(connection, config)
            after = revisions(connection)
            connection.commit()
    except (DBAPIError, psycopg.Error) as error:
        if sqlstate(error) == "55P03":
            raise ConfigurationError(
                f"a lock on the runs table was not to be had within {LOCK_TIMEOUT_MS // 1000} "
                f"seconds ({WAIT_SECONDS} for an index that is built beside everybody's work), so "
                "that no query has to queue behind the migration: what was made before it stands, "
                "nothing is half done; run it again, at a quieter time if need be"
            ) from error
        if sqlstate(error) == "42501":
            raise ConfigurationError(
                f"{describe(error)}: run it as the owner of the tables, with the right to create "
                "a schema; what was done before it stands, nothing is half done"
            ) from error
        raise
    finally:
        engine.dispose()
    changed = [f"revision {name}" for name in sorted({*before} ^ {*after})]
    return Migration(", ".join(before) or "none", ", ".join(after) or "none", (*changed, *done))


def _require_known(there: tuple[str, ...], target: Target) -> None:
    """What a newer version left here, this one can neither go on from nor undo."""
    if unknown := unknown_revisions(there):
        raise ConfigurationError(
            f"the database is at revision {', '.join(unknown)}, which this version does not know: "
            f"it brings {', '.join(newest_revisions(target))}. A newer version of orphan-recovery "
            "was here: install that one again; nothing was changed"
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """One migration at a time, also when ten containers start at once.

    The lock is asked for again and again rather than waited for: a session that waits holds a
    snapshot, for which another's concurrent index build would wait in turn, for ever.
    """
    give_up_at = time.monotonic() + WAIT_SECONDS
    lock, unlock = "SELECT pg_try_advisory_lock(:key)", "SELECT pg_advisory_unlock(:key)"
    while not connection.scalar(text(lock), {"key": _ADVISORY_KEY}):
        connection.commit()
        if time.monotonic() > give_up_at:
            raise ConfigurationError(
                f"another migration has been running for {WAIT_SECONDS} seconds: wait for its "
                "end, or look for application_name 'orphan-recovery migrate' in "
                "pg_stat_activity, and run it again"
            )
        time.sleep(0.5)
    connection.commit()
    try:
        yield
    finally:
        if not connection.invalidated and not connection.closed:
            connection.rollback()
            connection.execute(text(unlock), {"key": _ADVISORY_KEY})
            connection.commit()
