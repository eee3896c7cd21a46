"""Migrate: bring the schema up to date, or take it away again.

The hazard is a migration that harms what is there: a table rewritten under load, an index built
under a lock, a queue of queries behind a DDL statement that waits. So an existing table is
adopted (missing columns are added, nothing is rewritten), indexes are built concurrently, and a
lock that cannot be had within seconds is given up with a clear error, to be tried again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, create_engine, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from orphan_recovery.database import CONNECT_TIMEOUT_SECONDS, database_url
from orphan_recovery.ledger import SCHEMA
from orphan_recovery.policy import sqlstate
from orphan_recovery.settings import ConfigurationError

LOCK_TIMEOUT_MS: Final = 5_000
WAIT_SECONDS: Final = 60
_ADVISORY_KEY: Final = 0x6F727068  # "orph"
VERSION_TABLE: Final = "schema_version"


def migrate(url: URL | None = None, revision: str = "head") -> tuple[str | None, str | None]:
    """Apply the schema, up to ``revision``. Commits. Again and again without harm.

    Args:
        url: the database; without it, the environment's.
        revision: how far, as Alembic names it.

    Returns:
        The revision before and the revision after; None stands for no schema at all.

    Raises:
        ConfigurationError: the address cannot be used, the table that is there cannot be
            adopted, or a lock was not to be had in time.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    return _run(url, lambda config: command.upgrade(config, revision))


def unmigrate(url: URL | None = None, revision: str = "base") -> tuple[str | None, str | None]:
    """Take the schema away, down to ``revision``. Commits.

    An adopted runs table and its rows stay. A table that was created here is dropped only when
    it is empty, and the ledger only when it is empty.

    Returns:
        The revision before and the revision after.

    Raises:
        ConfigurationError: what is still there would be lost; the message says what to do.
    """

    def step(config: Config) -> None:
        command.downgrade(config, revision)
        connection = config.attributes["connection"]
        if current_revision(connection) is None:  # leave nothing behind
            connection.execute(text(f"DROP TABLE {SCHEMA}.{VERSION_TABLE}"))
            connection.execute(text(f"DROP SCHEMA {SCHEMA}"))
        connection.commit()

    return _run(url, step)


def current_revision(connection: Connection) -> str | None:
    """The revision that the database is at, or None if it has no schema of ours."""
    options = {"version_table": VERSION_TABLE, "version_table_schema": SCHEMA}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def newest_revision() -> str:
    """The revision that this version of the package brings."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None  # noqa: S101 - the package ships at least one
    return head


def _run(url: URL | None, step: Callable[[Config], None]) -> tuple[str | None, str | None]:
    engine = create_engine(
        url or database_url(),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={
            "application_name": "orphan-recovery migrate",
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        },
    )
    try:
        with engine.connect() as connection, _alone(connection):
            before = current_revision(connection)
            connection.commit()
            config = _config()
            config.attributes["connection"] = connection
            connection.execute(select(func.set_config("lock_timeout", str(LOCK_TIMEOUT_MS), False)))
            connection.commit()
            step(config)
            after = current_revision(connection)
            connection.commit()
            return before, after
    except DBAPIError as error:
        if sqlstate(error) == "55P03":
            raise ConfigurationError(
                f"a lock on the runs table was not to be had within {LOCK_TIMEOUT_MS // 1000} "
                "seconds, so that no query has to queue behind the migration: nothing is half "
                "done; run it again, at a quieter time if need be"
            ) from error
        raise
    finally:
        engine.dispose()


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
