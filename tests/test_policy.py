"""Which errors are worth another try, judged on errors that a real server raised."""

import asyncio

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.database import database_url, make_engine
from orphan_recovery.policy import (
    RetryPolicy,
    is_outage,
    is_transient,
    retry_plan,
    sqlstate,
)
from support import Database, free_port


def raising(sqlstate: str) -> str:
    return f"DO $$ BEGIN RAISE 'told to' USING ERRCODE = '{sqlstate}'; END $$"


async def error_of(engine: AsyncEngine, *statements: str) -> DBAPIError:
    try:
        async with engine.connect() as connection:
            for statement in statements:
                await connection.execute(text(statement))
    except DBAPIError as error:
        return error
    raise AssertionError(f"the server raised nothing for {statements}")


@pytest.mark.parametrize(
    "code",
    ["08006", "25P03", "40001", "40P01", "53300", "55P03", "57014", "57P01", "57P02", "57P03"],
)
async def test_what_passes_is_retried(engine: AsyncEngine, code: str) -> None:
    error = await error_of(engine, raising(code))
    assert sqlstate(error) == code
    assert is_transient(error)


@pytest.mark.parametrize("code", ["23514", "42501", "42703", "42P01", "22P02", "P0001", "XX000"])
async def test_what_stays_is_not_retried(engine: AsyncEngine, code: str) -> None:
    error = await error_of(engine, raising(code))
    assert sqlstate(error) == code
    assert not is_transient(error)
    assert not is_outage(error)


async def test_the_real_errors_of_the_kinds_that_matter(engine: AsyncEngine, db: Database) -> None:
    assert not is_transient(await error_of(engine, "SELECT no_such_column FROM worker_runs"))
    assert not is_transient(await error_of(engine, "SELECT * FROM no_such_table"))
    assert is_transient(await error_of(engine, "SET statement_timeout = 20", "SELECT pg_sleep(10)"))
    db.add_run("run", status="crashed")
    truth = await error_of(engine, "UPDATE worker_runs SET status = 'running'")
    assert not is_transient(truth)
    lost = await error_of(engine, "SELECT pg_terminate_backend(pg_backend_pid())")
    assert is_transient(lost)
    assert is_outage(lost)


async def test_a_deadlock_is_retried(engine: AsyncEngine, db: Database) -> None:
    db.add_run("a")
    db.add_run("b")
    take = "UPDATE worker_runs SET task = 'x' WHERE id = "

    async def crosswise(connection: AsyncConnection, first: str, second: str) -> None:
        await connection.execute(text(take + first))
        await both.wait()
        await connection.execute(text(take + second))

    both = asyncio.Barrier(2)
    async with engine.connect() as one, engine.connect() as two:
        results = await asyncio.gather(
            crosswise(one, "'a'", "'b'"), crosswise(two, "'b'", "'a'"), return_exceptions=True
        )
        [error] = [result for result in results if isinstance(result, BaseException)]
    assert isinstance(error, DBAPIError)
    assert (sqlstate(error), is_transient(error), is_outage(error)) == ("40P01", True, False)


async def test_a_refused_connection_is_retried_and_is_an_outage() -> None:
    engine = make_engine(database_url(f"postgresql://127.0.0.1:{free_port()}/nowhere"))
    error = await error_of(engine, "SELECT 1")
    assert is_transient(error)
    assert is_outage(error)


async def test_the_values_of_a_statement_stay_out_of_its_error(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        with pytest.raises(DBAPIError) as raised:
            await connection.execute(text("SELECT no_such_function(:value)"), {"value": "S3cret"})
    assert "no_such_function" in str(raised.value)
    assert "S3cret" not in str(raised.value)


def test_an_unknown_error_is_not_retried() -> None:
    assert not is_transient(ValueError("a bug"))
    assert not is_transient(psycopg.errors.UndefinedColumn("no such column"))
    assert is_transient(ConnectionResetError())


def test_the_plan_follows_the_policy() -> None:
    safe = retry_plan(RetryPolicy.SAFE)
    assert [safe.delay(n) for n in range(1, safe.retries + 1)] == [0.5, 1.0, 2.0, 4.0]
    assert retry_plan() == safe, "the policy of this feature is SAFE"
    assert retry_plan(RetryPolicy.NEVER).retries == 0
    assert retry_plan(RetryPolicy.DANGEROUS).retries == 0
    assert retry_plan(RetryPolicy.DANGEROUS, dangerous_allowed=True) == safe
    assert retry_plan(RetryPolicy.NEVER, dangerous_allowed=True).retries == 0
