"""The table on a terminal: words stay whole, ids are folded, and nothing is lost."""

import io
import os
import pty
import subprocess

import pytest
from rich.console import Console

from cli_support import COMMAND
from orphan_recovery.cli.table import print_table
from support import Database

RUN = "0b6c0b2e-7f3e-4d5c-9d1a-5f0f6f0f2a11"
ROW = {
    "run": RUN,
    "outcome": "would be judged",
    "worker": "worker-7f9c6d5b8-x2x4z",
    "tenant": "acme",
    "last sign of life": "2026-11-26T21:10:30Z",
    "evidence": "worker heartbeat",
    "silence": "31 d 1 h",
    "found instead, or error": "",
}
MISSED = {
    **ROW,
    "run": "run-1",
    "outcome": "finished_first",
    "found instead, or error": "status completed, worker_id worker-7f9c6d5b8-x2x4z",
}


def printed(rows: list[dict[str, str]], width: int) -> list[str]:
    told = io.StringIO()
    print_table(rows, Console(width=width, file=told))
    return [line.rstrip() for line in told.getvalue().splitlines() if line.strip()]


def read_down(lines: list[str]) -> dict[str, str]:
    """Each column's cells of all lines, one below the other, without what parts them."""
    ruler = next(line for line in lines if set(line) == {"─"} or "─" in line)
    starts = [0]
    header = lines[: lines.index(ruler)]
    width = max(map(len, lines))
    blank = [
        all(len(line) <= at or line[at] == " " for line in lines if line != ruler)
        for at in range(width)
    ]
    starts += [at + 1 for at in range(width - 1) if blank[at] and not blank[at + 1]]
    ends = [*starts[1:], width]
    cells = {}
    for start, end in zip(starts, ends, strict=True):
        name = " ".join(line[start:end].strip() for line in header).strip()
        cells[name] = [line[start:end].strip() for line in lines[lines.index(ruler) + 1 :]]
    return {name: " ".join(filter(None, column)) for name, column in cells.items()}


@pytest.mark.parametrize("rows", [[ROW], [MISSED]], ids=["dry run", "missed"])
def test_on_80_columns_words_stay_whole_and_ids_are_folded(rows: list[dict[str, str]]) -> None:
    lines = printed(rows, 80)
    assert max(map(len, lines)) <= 80
    [row] = rows
    told = read_down(lines)
    for name in ("outcome", "last sign of life", "evidence", "silence"):
        assert told[name] == row[name].replace("T", " "), "whole words"
    for name in ("run", "worker", "tenant", "found instead, or error"):
        if row[name]:
            assert told[name].replace(" ", "") == row[name].replace(" ", ""), "nothing is lost"


def test_in_a_pipe_nothing_is_wrapped() -> None:
    [_, _, first, second] = printed([ROW, MISSED], 1_000)
    for line, row in ((first, ROW), (second, MISSED)):
        assert [cell for cell in row.values() if cell not in line] == []


def test_a_terminal_of_80_columns_gets_such_a_table(db: Database) -> None:
    db.add_run(RUN, worker="worker-7f9c6d5b8-x2x4z", tenant="acme", age="6 days", beat="5 days")
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        with os.fdopen(theirs, "wb", buffering=0) as stdout:
            subprocess.run(
                [str(COMMAND), "sweep", "--dry-run"],
                env={**os.environ, "COLUMNS": "80", "TERM": "dumb"},
                stdout=stdout,
                check=True,
            )
        shown = terminal.read(100_000).decode()
    table = shown.partition("dry run:")[0].splitlines()
    assert max(map(len, table)) <= 80
    told = read_down([line.rstrip() for line in table if line.strip()])
    assert told["outcome"] == "would be judged"
    assert told["evidence"] == "run heartbeat"
    assert told["run"].replace(" ", "") == RUN
