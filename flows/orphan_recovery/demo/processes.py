"""The processes of the demo: each started in a session of its own, all of them ended at the end.

What this can wrongly do is leave something behind, or let something loose on a real database that
the viewer's environment names. So the environment is cut down to a few harmless names before
anything starts, and everything that was started is killed with its whole group, stopped or not.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

KEPT: Final = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "LD_LIBRARY_PATH")
"""What is kept of the viewer's environment: no address, no setting, no proxy."""

TAIL_LINES: Final = 25


class DemoFailed(RuntimeError):  # noqa: N818 - named for what the viewer reads
    """The demo cannot go on. ``log`` is the file that is likely to say why."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@contextmanager
def harmless_environment() -> Iterator[None]:
    """Within it, this process and what it starts see nothing but what is kept, and a plain locale.

    The viewer's DATABASE_URL, PG*, PREFECT_* and ORPHAN_* variables are out of sight.
    """
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({name: before[name] for name in KEPT if name in before})
    os.environ.update(LC_ALL="C", PYTHONUTF8="1", PYTHONUNBUFFERED="1", NO_COLOR="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(eq=False)
class Child:
    """A process of ours, with its output in a file."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    may_end: bool
    """Whether its end is part of the story; the end of any other is a failure."""
    sent: list[signal.Signals] = field(default_factory=list)
    """The signals that it was sent, in order."""

    def send(self, which: signal.Signals) -> None:
        """Send it a signal, and remember that."""
        self.process.send_signal(which)
        self.sent.append(which)

    def kill(self) -> None:
        """Kill it with SIGKILL, and see that it is dead."""
        self.may_end = True
        self.send(signal.SIGKILL)
        self.process.wait(60)

    def tell(self, line: str) -> None:
        """Give it a line on its standard input."""
        assert self.process.stdin is not None  # noqa: S101 - it was started with one
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    @property
    def ended_by(self) -> str | None:
        """The name of the signal that ended it, if one did."""
        code = self.process.returncode
        return signal.Signals(-code).name if code is not None and code < 0 else None

    @property
    def output(self) -> list[str]:
        """The lines it has written so far."""
        text = self.log.read_text(errors="replace")
        return text.splitlines()[: None if text.endswith("\n") else -1]


class Processes:
    """Everything that the demo started, ended when the block ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_all()

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        may_end: bool = False,
    ) -> Child:
        """Start a process in a session, and so a group, of its own.

        Args:
            name: what the viewer knows it by.
            command: the program and its arguments.
            environment: what it sees besides the harmless rest.
            may_end: that its end is no failure.
        """
        log = self._folder / f"{name.replace(' ', '-')}-{len(self._children)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own commands
                command,
                cwd=self._folder,  # no prefect.toml or .env of the viewer's lies there
                env={**os.environ, "TMPDIR": str(self._folder), **environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        child = Child(name, process, log, may_end)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Fail if a process has ended that should not have."""
        for child in self._children:
            if not child.may_end and child.process.poll() is not None:
                how = child.ended_by or f"exit code {child.process.returncode}"
                raise DemoFailed(f"{child.name} ended of itself ({how})", child.log)

    def end_all(self, patience: float = 5) -> None:
        """Ask every process to end, then kill the groups of all, stopped ones too.

        Args:
            patience: seconds that the living have to end of themselves.
        """
        living = [child for child in reversed(self._children) if child.process.poll() is None]
        for child in living:
            child.process.terminate()
        give_up_at = time.monotonic() + patience
        for child in living:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, give_up_at - time.monotonic()))
        for child in living:
            with suppress(ProcessLookupError, PermissionError):  # macOS says so of the dead
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait(60)
        self._children.clear()


def installed(command: str) -> str:
    """The path of a command that was installed beside the Python that runs this.

    Raises:
        DemoFailed: it is not there.
    """
    path = Path(sys.executable).with_name(command)
    if not path.exists():
        raise DemoFailed(f"{path} is not there: install the package with its demo extra")
    return str(path)


def tail(log: Path) -> list[str]:
    """The last lines of a log, if it can be read."""
    try:
        return log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return []
