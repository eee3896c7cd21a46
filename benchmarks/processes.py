"""Processes: start sides, give the word, read what they did, and watch their transactions."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import make_url

from benchmarks.data import Server

ROOT: Final = Path(__file__).parents[1]
LOOK_SECONDS: Final = 0.02
"""Between two looks at what transactions are open."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one process did."""

    began: float
    """By the clock that all processes of the machine share (``time.monotonic``)."""
    seconds: float
    count: int
    peak_kib: int

    @property
    def rate(self) -> float:
        return self.count / self.seconds


class Process:
    """A side, started and ready; it begins when it is told to."""

    def __init__(self, url: str, *command: str | int, **environment: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed at its end
        self._process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "ORPHAN_RECOVERY_DATABASE_URL": url, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        if self._read() != b"ready\n":
            self._fail()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What it has to tell. Waits for its end; whoever only stays ends by this."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        told = self._read()
        if self._process.wait() or not told:
            self._fail()
        self._errors.close()
        return json.loads(told)

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _fail(self) -> None:
        self._process.wait()
        self._errors.seek(0)
        told = self._errors.read().decode(errors="replace")
        raise RuntimeError(f"{self._process.args!r} failed:\n{told[-3000:]}")


def run(url: str, *command: str | int, **environment: str) -> Ran:
    """One side, by itself."""
    [ran] = run_at_once(url, [command], **environment)
    return ran


def run_at_once(url: str, commands: Sequence[Sequence[str | int]], **environment: str) -> list[Ran]:
    """Several, which begin at the same moment."""
    started = [Process(url, *command, **environment) for command in commands]
    for process in started:
        process.go()
    return [Ran(**process.answer()) for process in started]


class Longest:
    """The longest transaction that was seen, in seconds; good to ``LOOK_SECONDS``."""

    seconds: float = 0.0


@contextmanager
def watched(server: Server, url: str) -> Iterator[Longest]:
    """Watch the transactions of every client of one database."""
    longest, over = Longest(), threading.Event()

    def watch() -> None:
        with server.connect() as admin:
            while not over.is_set():
                row = admin.execute(
                    "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)"
                    " AS seconds FROM pg_stat_activity"
                    " WHERE datname = %s AND backend_type = 'client backend'",
                    [make_url(url).database],
                ).fetchone()
                assert row is not None
                longest.seconds = max(longest.seconds, float(row["seconds"]))
                time.sleep(LOOK_SECONDS)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield longest
    finally:
        over.set()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
