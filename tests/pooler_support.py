"""A real PgBouncer before the test's own database.

It is no Python package: where no executable of that name is on PATH, whoever asks for it is
skipped, and says so.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from support import free_port, until


@contextmanager
def pooler(database_url: str, mode: str, *settings: str) -> Iterator[str]:
    """Start one, and yield the database's address through it.

    Args:
        database_url: what is behind it.
        mode: for how long a client keeps a session: ``session`` or ``transaction``.
        settings: further lines of its configuration.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    program = shutil.which("pgbouncer", path=path)
    if program is None:
        pytest.skip("no pgbouncer executable on PATH: install PgBouncer to run this")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ini = Path(folder) / "pgbouncer.ini"
        ini.write_text(_ini(database_url, port, mode, settings))
        log = Path(folder) / "log"
        as_whom = ["-u", _whom(database_url)] if os.geteuid() == 0 else []
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, *as_whom, str(ini)], stdout=output, stderr=output, cwd=folder
            )
        try:
            url = make_url(database_url)
            query = {name: value for name, value in url.query.items() if name != "host"}
            through = url.set(host="127.0.0.1", port=port, query={**query, "sslmode": "disable"})
            address = through.render_as_string(hide_password=False)

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                with suppress(psycopg.OperationalError):
                    psycopg.connect(address, connect_timeout=2).close()
                    return True
                return False

            until(answers, "PgBouncer to answer", 20)
            yield address
        finally:
            process.kill()
            process.wait(20)


def _whom(database_url: str) -> str:
    """It refuses to be root: then it is whoever may open the server's socket, if that is a file."""
    host = str(make_url(database_url).query.get("host") or "")
    return pwd.getpwuid(Path(host).stat().st_uid).pw_name if host.startswith("/") else "nobody"


def _ini(database_url: str, port: int, mode: str, settings: tuple[str, ...]) -> str:
    url = make_url(database_url)
    behind = {
        "host": str(url.query.get("host") or url.host or "127.0.0.1"),
        "port": str(url.port or 5432),
        "user": url.username or "postgres",
        "password": url.password or "",
    }
    told = " ".join(f"{key}={_quoted(value)}" for key, value in behind.items() if value)
    lines = [
        *("[databases]", f"* = {told}", "[pgbouncer]"),
        *("listen_addr = 127.0.0.1", f"listen_port = {port}", "unix_socket_dir ="),
        *("auth_type = any", f"pool_mode = {mode}", "max_client_conn = 100"),
        *settings,
    ]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
