"""What the viewer sees: lines, waits that show how long they take, the tables at the end.

The hazard is an output that only its author can read. So a pipe gets plain lines and a fixed
width, a terminal gets a spinner, and a wait that fails names what was waited for.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from orphan_recovery.demo.processes import DemoFailed, tail

PIPE_WIDTH: Final = 100
POLL_SECONDS: Final = 0.05
TELL_EVERY: Final = 15.0
"""Seconds between the first lines of a long wait, where no terminal can show a spinner."""


class Show:
    """The viewer's screen.

    Args:
        console: where to print; None for standard output, a terminal or a pipe.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if console is None and not self.console.is_terminal:
            self.console = Console(highlight=False, width=PIPE_WIDTH)
        self.still_well: Callable[[], None] = lambda: None
        """Called all the time while something is waited for; raises if it is in vain."""
        self._acts = 0
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the show began."""
        return time.monotonic() - self._began

    def act(self, title: str) -> None:
        """Begin the next part of the story."""
        self._acts += 1
        self.console.print()
        self.console.print(Text(f"{self._acts}. {title}", style="bold"))

    def say(self, text: str, style: str = "", indent: int = 3) -> None:
        """One paragraph, wrapped and indented."""
        self._wrapped(Text(text, style=style), " " * indent)

    def line(self, text: str, style: str = "", indent: int = 3) -> None:
        """One line that is to be copied, and so never broken."""
        self.console.print(Text(" " * indent + text, style=style), soft_wrap=True)

    def tick(self, holds: bool, claim: str, found: str) -> None:
        """A claim, whether it holds, and what was found."""
        plain = self.console.options.ascii_only
        mark = ("ok   " if plain else "✓ ") if holds else ("FAIL " if plain else "✗ ")
        self.console.print(Text(f"   {mark}", style="green" if holds else "bold red"), end="")
        told = Text.assemble((claim, "" if holds else "bold red"), " ", (found, "dim"))
        self._wrapped(told, " " * (3 + len(mark)), first="")

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[str]], *, wrap: Sequence[str]
    ) -> None:
        """A table of which only the columns named in ``wrap`` may be broken, between words."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        for header in headers:
            table.add_column(header, no_wrap=header not in wrap)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        with self.console.capture() as drawn:
            self.console.print(table, width=self.console.width - 3)
        for line in ["", *drawn.get().splitlines()]:
            self.console.print(Text.from_ansi(f"   {line}".rstrip()), soft_wrap=True)

    def _wrapped(self, text: Text, indent: str, first: str | None = None) -> None:
        """Without trailing spaces, which a pipe would keep."""
        for line in text.wrap(self.console, self.console.width - len(indent)):
            line.rstrip()
            start = indent if first is None else first
            self.console.print(Text(start).append_text(line), soft_wrap=True)
            first = None

    def wait_for(
        self,
        what: str,
        fact: Callable[[], bool],
        *,
        seconds: float = 120,
        so_far: Callable[[], str] | None = None,
        log: Path | None = None,
    ) -> float:
        """Return once ``fact`` holds.

        Args:
            what: what is waited for, to complete "waiting for ...".
            fact: asked again and again.
            seconds: how long to wait at most, in seconds.
            so_far: a word on how far it has come, asked when it is shown.
            log: the file to look into if it does not hold in time.

        Returns:
            The seconds it took.

        Raises:
            DemoFailed: it did not hold in time.
        """
        began = time.monotonic()
        tell_at = began + 2
        on_screen = self.console.is_terminal
        spinner = "line" if self.console.options.ascii_only else "dots"
        with self.console.status("", spinner=spinner) if on_screen else nullcontext() as status:
            while not fact():
                self.still_well()
                now = time.monotonic()
                if now - began > seconds:
                    told = f" ({so_far()})" if so_far else ""
                    raise DemoFailed(f"waited {seconds:g} seconds in vain for {what}{told}", log)
                if on_screen or now >= tell_at:
                    told = f"waiting for {what}: {now - began:.0f} s"
                    told += f", {so_far()}" if so_far else ""
                    if isinstance(status, Status):
                        status.update(Text(told, style="dim"))
                    else:
                        self.say(f"... {told}", indent=5)
                    tell_at = now + max(TELL_EVERY, now - began)
                time.sleep(POLL_SECONDS)
        return time.monotonic() - began

    def failed(self, message: str, log: Path | None) -> None:
        """Say what went wrong, and the last lines of the log that is likely to say why."""
        self.console.print()
        self.say(f"The demo failed: {message}", style="bold red", indent=0)
        lines = tail(log) if log else []
        if log and lines:
            self.say(f"The last lines of {log.name}:", indent=0)
            for line in lines:
                self.line(line, style="dim")


def clock(span: timedelta) -> str:
    """A span in words, to the second; hours to the minute."""
    minutes, seconds = divmod(int(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return f"{seconds} s"
