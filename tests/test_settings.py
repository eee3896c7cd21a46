"""Addresses, requests, secrets: what is accepted, refused by name, and never shown."""

import re
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.exc import ArgumentError

from orphan_recovery import ConfigurationError
from orphan_recovery.database import database_url, describe, shown
from orphan_recovery.redact import redact
from orphan_recovery.request import SweepRequest
from support import Database


@pytest.mark.parametrize(
    "raw",
    [
        "postgresql://u:p@host:5433/name?sslmode=require",
        "postgres://u:p@host:5433/name?sslmode=require",
        "postgresql+asyncpg://u:p@host:5433/name?sslmode=require",
        "  postgresql+psycopg2://u:p@host:5433/name?sslmode=require\n",
    ],
)
def test_addresses_as_people_write_them_are_accepted(raw: str) -> None:
    url = database_url(raw)
    assert url.drivername == "postgresql+psycopg"
    assert (url.host, url.port, url.database) == ("host", 5433, "name")
    assert url.query == {"sslmode": "require"}


def test_the_projects_own_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://host/general")
    monkeypatch.delenv("ORPHAN_RECOVERY_DATABASE_URL", raising=False)
    assert database_url().database == "general"
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", "postgresql://host/own")
    assert database_url().database == "own"
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", "")
    assert database_url().database == "general"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("mysql://u:S3cret@host/name", "names 'mysql': only Postgres"),
        ("sqlite:///file.db", "names 'sqlite': only Postgres"),
        ("host=db password=S3cret dbname=x", "cannot be read"),
        ("postgresql://u:S3cret@host:port/name", "cannot be read"),
        ("", "cannot be read"),
        # What a pattern for addresses would not know for one.
        ("user:S3cret@host/db", "cannot be read"),
        ("postgresql:/user:S3cret@host/db", "cannot be read"),
        ("postgresql//user:S3cret@host/db", "cannot be read"),
        ("postgresql://u@x:S3cret@host:port/db", "cannot be read"),
        ("postgresql://us er:S3cret@host:port/db", "cannot be read"),
        ("postgresql://me:not@S3cret@host/db", "more than one @: percent-encode"),
        ("postgresql://me:no@t/S3cret@host/db", "more than one @: percent-encode"),
        ("postgresql://me:n@o/t?S3cret@host/db", "more than one @: percent-encode"),
        ("postgresql://me:n@ot=/S3cret@host/db", "more than one @: percent-encode"),
    ],
)
def test_other_addresses_are_refused_with_the_way_out_and_without_the_password(
    raw: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as raised:
        database_url(raw)
    assert re.search("postgresql://user:password@host|as %40", str(raised.value))
    assert "S3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("raw", "password", "database"),
    [
        ("postgresql://me:a%40b@host/db", "a@b", "db"),
        ("postgresql://me:a/b=c?@host/db", "a/b=c?", "db"),
        ("postgresql://me:a@host/db?application_name=me@here", "a", "db"),
        ("postgresql://host/my@db", None, "my@db"),
    ],
)
def test_an_address_that_can_be_meant_in_one_way_only_is_understood(
    raw: str, password: str | None, database: str
) -> None:
    url = database_url(raw)
    assert (url.host, url.password, url.database) == ("host", password, database)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ("postgresql://me:S3cret@host:5433/name", "postgresql://me:***@host:5433/name"),
        ("postgres://me:@/name", "postgresql://me@/name"),
        ("postgresql+asyncpg://me@host/name", "postgresql://me@host/name"),
        ("postgresql://host/name?password=S3cret", "postgresql://host/name?password=***"),
        ("postgresql://me@/name?host=%2Ftmp%2Fsocket", "postgresql://me@/name?host=/tmp/socket"),
    ],
)
def test_an_address_is_shown_as_people_write_it_without_its_password(raw: str, told: str) -> None:
    assert shown(database_url(raw)) == told


def test_no_address_names_both_variables_and_the_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ORPHAN_RECOVERY_DATABASE_URL", "DATABASE_URL", "ORPHAN_RECOVERY_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as none:
        database_url()
    assert "set ORPHAN_RECOVERY_DATABASE_URL or DATABASE_URL to" in str(none.value)
    assert str(none.value).endswith(
        f"; there is no orphan-recovery.toml in {tmp_path}, and ORPHAN_RECOVERY_CONFIG names none"
    )
    (tmp_path / "orphan-recovery.toml").touch()
    with pytest.raises(ConfigurationError) as there:
        database_url()
    assert str(there.value).endswith("user:password@host/name")


def test_what_the_server_says_is_one_line_without_a_pointer_to_nothing(db: Database) -> None:
    with pytest.raises(psycopg.Error) as plain:
        db.do("SELECT 1 AS one,\n       'S3cret' = worker FROM worker_runs WHERE true")
    assert describe(plain.value) == (
        'UndefinedColumn: column "worker" does not exist (hint: Perhaps you meant to reference '
        'the column "worker_runs.worker_id") (SQLSTATE 42703)'
    )


def test_a_row_that_the_server_shows_in_detail_is_not_shown(db: Database) -> None:
    with pytest.raises(psycopg.Error) as detailed:
        db.do(
            "INSERT INTO worker_runs (id, status, input_json) VALUES ('run', 'no such', %s)",
            '{"card": "S3cret"}',
        )
    assert "S3cret" in str(detailed.value)
    assert describe(detailed.value) == (
        'CheckViolation: new row for relation "worker_runs" violates check constraint '
        '"worker_runs_status_check" (SQLSTATE 23514)'
    )


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:S3cret@host/db failed",
        "postgresql://me:S3cret@with@at@host/db failed",
        "host=h password=S3cret user=me",
        "host=h password='S3cret with spaces' user=me",
        "postgresql://host/db?user=me&password=S3cret&sslmode=require",
    ],
)
def test_a_password_is_never_shown(text: str) -> None:
    for said in (redact(text), describe(RuntimeError(text)), describe(ArgumentError(text))):
        assert "S3cret" not in said
        assert "***" in said


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"threshold_minutes": 0}, "threshold_minutes is 0"),
        ({"threshold_minutes": "30"}, "threshold_minutes is '30'"),
        ({"tenant": ""}, "tenant is ''"),
        ({"worker": "  "}, "worker is '  '"),
        ({"worker": "a\x00b"}, "worker is"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": -1}, "limit is -1"),
        ({"limit": 2**31}, "limit is 2147483648"),
        ({"reason": ""}, "reason is ''"),
        ({"reason": "half a \ud83d"}, "reason is 'half a "),
    ],
)
def test_a_bad_request_is_refused_by_name(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SweepRequest(**{"threshold_minutes": 30, "asked_by": "test", **asked})  # type: ignore[arg-type]
