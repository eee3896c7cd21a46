"""The way to the database: its address, the engine, time-outs, and words for what went wrong.

The hazards are a secret in a log line, and a sweep that waits for ever behind somebody's lock.
Addresses are shown without their password, bound values are kept out of error texts, and every
transaction of our own has a lock and a statement time-out.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import psycopg
from sqlalchemy import (
    URL,
    ColumnElement,
    Interval,
    ScalarSelect,
    Select,
    TypeDecorator,
    column,
    func,
    make_url,
    select,
    table,
    text,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from orphan_recovery.redact import redact
from orphan_recovery.settings import DATABASE_VARIABLES, ConfigurationError, load_settings
from orphan_recovery.targets import no_file_told

if TYPE_CHECKING:
    from orphan_recovery.target import Target

NOW: Final = func.statement_timestamp(type_=TIMESTAMP(timezone=True))
"""The database's time as the statement began: no clock of ours takes part in a verdict."""

Executor = AsyncConnection | AsyncSession
"""What the verbs run on: our own connection, or the session of a caller."""


class Span(TypeDecorator[timedelta]):
    """A length of time as a bound value, in seconds: a day is 24 hours of them, always.

    The driver would send whole days as days, and from a timestamptz the server takes those by the
    calendar of the session's TimeZone: by that a day is 23 hours long, or 25, twice a year.
    """

    impl = Interval
    cache_ok = True

    def process_bind_param(self, value: timedelta | None, dialect: Any) -> Any:  # noqa: ARG002
        return None if value is None else f"{value.total_seconds():.6f} seconds"


CONNECT_TIMEOUT_SECONDS: Final = 10
LOCK_TIMEOUT_MS: Final = 5_000
STATEMENT_TIMEOUT_MS: Final = 60_000
IDLE_TIMEOUT_MS: Final = 60_000
"""A process that freezes within a transaction keeps its locks for no longer."""
POOL_SIZE: Final = 8
"""Connections at most, and so transactions side by side."""

_POSTGRES_NAMES = frozenset({"postgres", "postgresql"})


def database_url(raw: str | None = None) -> URL:
    """The address to use, with psycopg as its driver.

    Args:
        raw: an address as people write them (``postgres://``, ``postgresql://``, or with another
            driver's name); without it, the environment's ``ORPHAN_RECOVERY_DATABASE_URL``, else
            ``DATABASE_URL``.

    Raises:
        ConfigurationError: none is set, it cannot be read, or it is not Postgres.
    """
    if raw is None:
        secret = load_settings().database_url
        if secret is None:
            raise ConfigurationError(
                f"no database: set {' or '.join(DATABASE_VARIABLES)} to the address of the "
                "database that holds the runs, such as postgresql://user:password@host/name"
                + no_file_told()
            )
        raw = secret.get_secret_value()
    try:
        url = make_url(raw.strip())
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database address cannot be read, and is not shown, for it may hold a password: "
            "it should look like postgresql://user:password@host:5432/name, with special "
            "characters in the password percent-encoded"
        ) from None
    kind = url.drivername.partition("+")[0]
    if kind not in _POSTGRES_NAMES:
        raise ConfigurationError(
            f"the database address names {kind!r}: only Postgres is supported, as "
            "postgresql://user:password@host/name"
        )
    # What is before a further one there is the rest of a password. In a query's values it may be.
    beyond = raw.partition("@")[2].partition("=")[0]
    if raw.count("@") > 1 and "@" in f"{beyond}{url.host}{url.database}":
        raise ConfigurationError(
            "the database address, which is not shown, has more than one @: percent-encode those "
            "in the user's name and the password, as %40"
        )
    return url.set(drivername="postgresql+psycopg")


def address(target: "Target") -> URL:
    """The address of a target's database.

    From the variable that its ``database_url_env`` names, or the Prefect Secret block that its
    ``database_url_secret`` names (which asks the Prefect API), else the environment's.

    Raises:
        ConfigurationError: there is none, or it cannot be read. An address is never shown.
    """
    if target.database_url_env:
        raw = os.environ.get(target.database_url_env)
        if not raw:
            raise ConfigurationError(
                f"target {target.name!r} takes its database from the variable "
                f"{target.database_url_env!r} (database_url_env), which is not set: set "
                "it to an address such as postgresql://user:password@host/name"
            )
        return database_url(raw)
    if target.database_url_secret:
        return database_url(_secret(target.name, target.database_url_secret))
    return database_url()


def own_variable() -> str:
    """Of the variables that name a database by themselves the one that is set, else the first."""
    return next(filter(_is_set, DATABASE_VARIABLES), DATABASE_VARIABLES[0])


def _is_set(variable: str) -> bool:
    """Whether it has a value; ours are read whatever their case."""
    return any(value and name.upper() == variable for name, value in os.environ.items())


def named_address(target: "Target") -> str:
    """Where :func:`address` takes it from, for people: the variable, or the Secret block."""
    if target.database_url_secret:
        return f"the Prefect Secret block {target.database_url_secret!r}"
    return target.database_url_env or own_variable()


def _secret(target: str, block: str) -> str:
    from prefect.blocks.system import Secret
    from prefect.settings import get_current_settings

    asked = (
        f"target {target!r} takes its database from the Prefect Secret block {block!r} "
        "(database_url_secret), "
    )
    if not get_current_settings().api.url:  # Prefect would start a server of its own
        raise ConfigurationError(f"{asked}but no Prefect API is named: set PREFECT_API_URL")
    try:
        secret: Any = Secret.load(block, _sync=True)  # type: ignore[call-arg]
    except Exception as error:
        raise ConfigurationError(
            f"{asked}which cannot be loaded ({describe(error)}): create it in Prefect's UI, and "
            "see whether PREFECT_API_URL names that server"
        ) from None
    return str(secret.get())


def where_address_is(target: "Target", told: str) -> str | None:
    """Whose address it is, and where that is kept: for who has several. Never a part of it.

    Args:
        target: the target that was asked for.
        told: what went wrong, by :func:`describe`.

    Returns:
        A sentence, or two; None where no address is set.
    """
    kept = named_address(target)
    if not target.database_url_secret and not (os.environ.get(kept) or _is_set(kept)):
        return None
    way_out = " See whether it is right, and whether its server is up." * is_unreachable(told)
    return f"Target {target.name!r} takes its address from {kept}.{way_out}"


def is_unreachable(told: str) -> bool:
    """Whether it went wrong, as :func:`describe` told, for a database that could not be reached or
    entered, or was lost: mostly the driver has no SQLSTATE for that."""
    code = told.partition("(SQLSTATE ")[2]
    return told.startswith("OperationalError: ") and (not code or code.startswith(("08", "57P")))


def server_started() -> ColumnElement[datetime]:
    """Since when the server has had its sessions: since it was started, or has come up again after
    a crash of one of its processes, which ends them all.

    Of the latter the checkpointer's start tells, to privileged roles; and to everybody that its
    statistics began anew, as they also do when somebody resets them: a doubt too many, no harm.
    """
    crew: Select[Any] = (
        select(func.max(column("backend_start")))
        .select_from(table("pg_stat_activity", schema="pg_catalog"))
        .where(column("backend_type") == "checkpointer")
    )
    aware = TIMESTAMP(timezone=True)
    started = func.pg_postmaster_start_time(type_=aware)
    reset: Select[Any] = select(column("stats_reset")).select_from(
        table("pg_stat_bgwriter", schema="pg_catalog")
    )
    return func.greatest(started, crew.scalar_subquery(), reset.scalar_subquery(), type_=aware)


def this_database() -> ScalarSelect[Any]:
    """The oid of the database at hand, by which ``pg_locks`` names it."""
    databases = table("pg_database", schema="pg_catalog")
    named: Select[Any] = select(column("oid")).select_from(databases)
    return named.where(column("datname") == func.current_database()).scalar_subquery()


def make_engine(url: URL, connections: int = POOL_SIZE) -> AsyncEngine:
    """An engine of our own; nothing connects before it is used. Dispose of it when done.

    Args:
        url: the database.
        connections: at most so many, and so transactions side by side.

    Raises:
        ConfigurationError: the address has an option that cannot be used, such as a plugin.
    """
    try:
        return _engine(url, connections)
    except ArgumentError as error:
        raise ConfigurationError(
            f"the database address has an option that cannot be used ({describe(error)}): "
            "take it out"
        ) from None


def _engine(url: URL, connections: int) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
        use_native_hstore=False,  # no such values here, and one question less to the server
        connect_args={
            "application_name": "orphan-recovery",
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "client_encoding": "utf8",  # whatever the role's own: else texts may come as bytes
            # A connection whose other end is gone is told within about half a minute.
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            # Never a generic plan: only a plan for the values at hand can use the partial
            # index. It also keeps transaction poolers such as PgBouncer happy.
            "prepare_threshold": None,
        },
    )


# No parallel workers: a sweep is a guest on the server, and fifty may look at once. The driver
# reads times and spans in these styles only, and keys come back as they went. Should a column get
# its time zone while somebody takes it for one without, what is written to it still is UTC.
_LIMITS: Final = text(
    """
    SELECT set_config('lock_timeout', :lock, true),
           set_config('statement_timeout', :statement, true),
           set_config('idle_in_transaction_session_timeout', :idle, true),
           set_config('max_parallel_workers_per_gather', '0', true),
           set_config('datestyle', 'ISO', true),
           set_config('intervalstyle', 'postgres', true),
           set_config('timezone', 'UTC', true),
           set_config('extra_float_digits', '1', true),
           set_config('array_nulls', 'on', true)
    """
)
"""As text, so that who only waits for another sweep builds no statement from parts."""


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction of our own, with time-outs that end with it.

    Commits when the block ends well, rolls back when it raises. It always runs READ COMMITTED,
    which lets the mark see a row as it stands once its lock is held.
    """
    limits = {
        "lock": str(LOCK_TIMEOUT_MS),
        "statement": str(STATEMENT_TIMEOUT_MS),
        "idle": str(IDLE_TIMEOUT_MS),
    }
    async with engine.begin() as connection:
        await connection.execute(_LIMITS, limits)
        yield connection


async def set_lock_timeout(db: Executor, milliseconds: int) -> None:
    """How long a statement waits for a lock, until the transaction ends. Does not commit."""
    await db.execute(select(func.set_config("lock_timeout", str(milliseconds), True)))


def shown(url: URL) -> str:
    """An address for people: as they write it, without its password and the driver that we add,
    and readable where a socket's path is in it."""
    plain = URL.create(
        url.get_backend_name(),
        username=url.username,
        password=url.password or None,  # where there is none, no stars say that there is
        host=url.host,
        port=url.port,
        database=url.database,
        query=url.query,
    )
    return redact(unquote(plain.render_as_string(hide_password=True)))


def describe(error: BaseException) -> str:
    """One line that says what went wrong, safe to log, store and show.

    It has the error's class, the server's own message and SQLSTATE where there is one, and never
    a password, the values of a statement, or a line of it. What the server says in detail is left
    out, for it may be a whole row.
    """
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    message = str(cause)
    if isinstance(cause, psycopg.Error) and cause.diag.message_primary:
        hint = cause.diag.message_hint
        message = cause.diag.message_primary + (f" (hint: {hint.rstrip('.')})" if hint else "")
    message = " ".join(message.split()) or "no message"
    code = getattr(cause, "sqlstate", None)
    suffix = f" (SQLSTATE {code})" if isinstance(code, str) else ""
    return redact(f"{type(cause).__name__}: {message[:600]}{suffix}")


def missing_right(told: str, target: str | None = None) -> str | None:
    """What to do about a right that the database role lacks.

    Args:
        told: what went wrong, by :func:`describe`.
        target: the target's name, where one is known.

    Returns:
        None if it went wrong for another reason.
    """
    if "(SQLSTATE 42501)" not in told:
        return None
    command = "orphan-recovery sql" + (f" --target {target}" if target else "")
    return (
        f"This database role lacks a right: `{command}`, run as one that has it, prints a role "
        "with all that a sweep needs; the tables' owner has to run what it prints."
    )
