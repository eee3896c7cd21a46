"""Postgres servers that a test may restart, stop, crash and fail over."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import make_url, select
from sqlalchemy.dialects import postgresql

from orphan_recovery.database import server_started
from orphan_recovery.embedded import embedded_postgres
from support import Database, until

_STARTED = select(server_started()).compile(
    dialect=postgresql.dialect(),  # type: ignore[no-untyped-call]
    compile_kwargs={"literal_binds": True},
)
"""As a sweep asks it, with its values written out."""


@contextmanager
def own_server() -> Iterator["Server"]:
    """An embedded server, whatever the others use; stopped at the end."""
    with embedded_postgres() as url:
        server = Server(url)
        server.restart()  # from here on it is not the process that the wheel knows and stops
        yield server
        server.stop()


class Server:
    """A Postgres server that a test may do anything to, and the programs that it came with."""

    def __init__(self, url: str, data: Path | None = None) -> None:
        self.url = url
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT setting FROM pg_config WHERE name = 'BINDIR'")
            self._programs = Path(str((row.fetchone() or [""])[0]))
            there = connection.execute("SHOW data_directory").fetchone()
        self.data = data or Path(str((there or [""])[0]))

    def run(self, program: str, *arguments: str) -> None:
        """As whoever owns the data: the server refuses to run as root."""
        owner = self.data.stat()
        user, group = (owner.st_uid, owner.st_gid) if os.geteuid() == 0 else (None, None)
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            user=user,
            group=group,
            cwd=self.data,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # no pipe: what it starts would keep it open
            stderr=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, (program, arguments)

    def control(self, what: str, *arguments: str) -> None:
        self.run("pg_ctl", what, "-w", "-D", str(self.data), *arguments)

    def restart(self) -> None:
        """Every connection is lost."""
        self.control("restart", "-m", "fast", "-l", str(self.data / "log"))

    def stop(self) -> None:
        self.control("stop", "-m", "fast")

    def start(self) -> None:
        socket = make_url(self.url).query["host"]
        self.control("start", "-l", str(self.data / "log"), "-o", f'-h "" -k {socket}')

    def await_age(self, age: timedelta) -> None:
        """Return once a sweep takes it to have been up for so long.

        It was started by then, but its processes begin a little later, on a busy machine by
        seconds, and a sweep goes by them too.
        """

        def old_enough() -> bool:
            with psycopg.connect(self.url) as connection:
                asked = f"SELECT now() - ({_STARTED}) >= %s".encode()
                return bool((connection.execute(asked, [age]).fetchone() or [False])[0])

        until(old_enough, f"a server that has been up for {age}")

    @contextmanager
    def coming_back(self) -> Iterator[None]:
        """Ends once its log says anew that it is ready; nobody is to knock before."""

        def ready() -> int:
            return (self.data / "log").read_text().count("is ready to accept connections")

        before = ready()
        yield
        until(lambda: ready() > before, "the server to be back")

    def standby(self) -> "Server":
        """A second server that follows this one, in a folder beside its own."""
        data = self.data.with_name("standby")
        data.mkdir(mode=0o700)
        os.chown(data, self.data.stat().st_uid, self.data.stat().st_gid)
        socket = str(make_url(self.url).query["host"])
        follow = ("-h", socket, "-U", "postgres", "-R", "-c", "fast")
        self.run("pg_basebackup", *follow, "-D", str(data))
        for lock in data.glob(".s.PGSQL.*.lock"):  # the socket is kept in the folder of the data
            lock.unlink()
        self.run(
            *("pg_ctl", "start", "-w", "-D", str(data), "-l", str(data / "log")),
            *("-o", f'-h "" -k {data}'),
        )
        url = make_url(self.url).update_query_dict({"host": str(data)})
        return Server(url.render_as_string(hide_password=False), data)


class Restarted(Database):
    """A database whose server may be restarted: its connection comes back."""

    def do(self, statement: Any, *values: Any) -> list[dict[str, Any]]:
        if self._connection.closed:
            self._connection = self.connect(autocommit=True)
        try:
            return super().do(statement, *values)
        except psycopg.OperationalError:
            if not self._connection.closed:
                raise
            self._connection = self.connect(autocommit=True)
            return super().do(statement, *values)
