"""The table that a sweep prints: the runs it judged, or would judge, one a row.

The hazard is an outcome or a time that is broken where it cannot be read any more. So on a narrow
terminal words stay whole, and what is long without being a word, such as a run's id, is folded.
"""

import sys
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

FOLDED: Final = ("run", "worker", "tenant", "found instead, or error")
"""Columns with words of any length."""
PARTED: Final = ("last sign of life",)
"""Columns with times, which may be parted between day and hour."""
GAP: Final = 2
"""Blanks between two columns."""


def console_here() -> Console:
    """As wide as the terminal; in a pipe so wide that nothing is wrapped."""
    return Console(width=None if sys.stdout.isatty() else 1_000, highlight=False)


def print_table(rows: list[dict[str, str]], console: Console | None = None) -> None:
    """Nothing is cut off, in a pipe nothing is wrapped, and a column with nothing in it goes."""
    if not rows:
        return
    console = console or console_here()
    filled = [name for name in rows[0] if any(row[name] for row in rows)]
    columns = {name: [name, *(row[name] for row in rows)] for name in filled}
    room = console.width - GAP * (len(filled) - 1)
    if sum(max(map(len, cells)) for cells in columns.values()) > room:
        columns |= {name: [cell.replace("T", " ") for cell in columns[name]] for name in PARTED}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
    for name, width in _widths(columns, room).items():
        table.add_column(name, overflow="fold", width=width)
    for cells in list(zip(*columns.values(), strict=True))[1:]:
        table.add_row(*map(Text, cells))  # text: no markup of a run's own
    console.print(table)


def _widths(columns: dict[str, list[str]], room: int) -> dict[str, int]:
    """How wide each column is: as wide as its words, and of what is left the narrowest first."""
    whole = {name: max(map(len, cells)) for name, cells in columns.items()}
    widths = {name: max(map(_longest_word, cells)) for name, cells in columns.items()}
    least = {name: _longest_word(name) if name in FOLDED else widths[name] for name in columns}
    while sum(widths.values()) > room and (wide := [n for n in columns if widths[n] > least[n]]):
        widths[max(wide, key=widths.__getitem__)] -= 1
    spare = room - sum(widths.values())
    for name in sorted(columns, key=lambda name: whole[name] - widths[name]):
        more = max(0, min(whole[name] - widths[name], spare))
        widths[name] += more
        spare -= more
    return widths


def _longest_word(cell: str) -> int:
    return max(map(len, cell.split()), default=0)
