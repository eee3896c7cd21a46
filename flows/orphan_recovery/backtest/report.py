"""What a backtest says to people: a table and a plot in the terminal, Markdown, and one headline.

The hazard is a reader who takes the least number that looks safe and sets it: so what the numbers
do not show is said beside them, and in the headline where there are too few runs to go by.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orphan_recovery.backtest.measure import FEW, AtThreshold, Backtest
from orphan_recovery.target import DEFAULT_TARGET
from orphan_recovery.targets import where
from orphan_recovery.words import counted, iso, span

WIDEST_BAR: Final = 60
_BLOCKS: Final = "▏▎▍▌▋▊▉█"


def headline(tested: Backtest) -> str:
    """One line: what the target's threshold would have crashed, which one none, at what cost."""
    told = _headline(tested)
    if tested.target.name != DEFAULT_TARGET:
        told = f"{tested.target.name}: {told}"
    if by_rule := sum(rule.crashed for rule in tested.rules):
        told += f"; the rules' own thresholds would have crashed {_runs(by_rule)}"
    if 0 < tested.replayed < FEW:
        told += f"; only {_runs(tested.replayed)}, too few to decide by"
    return told


def _headline(tested: Backtest) -> str:
    if not tested.replayed:
        return f"nothing to replay: {_sources(tested)} no run that is known to have lived"
    now, safe = tested.present, tested.least_safe
    crashed = [at for at in tested.at if at.crashed]
    told = f"{now.minutes} min (now) would have crashed {_crashed(now, tested)}"
    shorter = [at for at in crashed if at.minutes < now.minutes]
    if not now.crashed and shorter:
        told += f", {shorter[-1].minutes} min {_crashed(shorter[-1], None)}"
    if safe is None:
        longest = f", and the longest silence was {_span(tested.longest)}" if crashed else ""
        return f"{told}; each of these would have crashed some{longest}"
    if tested.beaten:
        told += f"; of {safe.minutes} min and longer nothing is known to be wrong (a lower bound, "
        told += "since runs beat; `doctor` says what heartbeats and the schedule ask for)"
    elif safe is now:
        told += "; it is the least of these that would have crashed none"
    else:
        told += f"; {safe.minutes} min is the least of these that would have crashed none"
    if safe is now:
        return told
    told += f": recovery would have come {_later(tested.later(safe))}"
    if safe.deaths_later and safe.minutes > now.minutes:
        told += f", and {safe.deaths_later:,} of {tested.deaths:,} deaths would have waited longer"
    return told


def notes(tested: Backtest) -> list[str]:
    """What the numbers do not show, worst first; each a sentence."""
    found, target = [], tested.target
    if tested.replayed < FEW:
        found.append(
            f"Only {_runs(tested.replayed)} replayed: with fewer than {FEW}, decide nothing."
        )
    if target.lock:
        found.append(
            "Workers hold a lock here, and while they do no sweep touches their runs, however "
            "silent: no threshold decides, and more looks silent here than was."
        )
    if not tested.has_ends:
        found.append(
            "The table does not say when a run ended, so only the ledger was read: name the "
            f"column as {where(target, 'columns', 'completed_at')}, if there is one."
        )
    if tested.is_ledger_hidden:
        found.append(
            "This role may not read the ledger: nothing is known of verdicts that were contested, "
            "of runs that escaped one, or of deaths"
            + (
                "."
                if target.crash_is_its_own_status
                else f", and what a sweep marked as {target.crashed!r} is taken for a run that "
                "lived. Ask as a role that may."
            )
        )
    elif not tested.has_ledger:
        found.append(
            "There is no ledger yet: nothing is known of verdicts that were contested, of runs "
            "that escaped one, or of deaths."
        )
    if any(at.perhaps for at in tested.at):
        found.append(
            "Contested runs may have been silent for longer than their verdicts say, up to their "
            "reports: "
            + ", ".join(f"{at.perhaps:,} at {at.minutes} min" for at in tested.at if at.perhaps)
            + ". A threshold with any of them is not called safe."
        )
    if tested.beaten:
        found.append(
            f"{tested.beaten:,} of {_runs(tested.finished)} beat, and each beat wipes out the one "
            "before: for these it is a lower bound. Keep the threshold above three beats and one "
            "interval between sweeps, as `orphan-recovery doctor` says."
        )
    elif tested.finished and not tested.heartbeats and not _elsewhere(tested):
        found.append("Runs do not beat here: their silence is their whole length.")
    if tested.finished and (kept := _elsewhere(tested)):
        found.append(
            f"Signs of life in {' and '.join(kept)} tell of now and not of then, and are left out: "
            "more looks silent here than was."
        )
    if not target.crash_is_its_own_status:
        found.append(
            f"A run that ended as {target.crashed!r} counts as one that lived, unless a sweep "
            "marked it: if something else ends dead runs so, they are among these."
        )
    waited = [at for at in tested.at if at.waiting]
    if waited:
        found.append(
            "Some were silent only while they waited to be started, for a run that waits is in "
            f"flight: {waited[-1].waiting:,} at {waited[-1].minutes} min."
        )
    told = {
        "without a time of their end (of all times)": tested.without_end,
        "with an end in the database's future": tested.end_ahead,
        "without any sign of life": tested.without_sign,
        "whose last sign of life is their end or comes after it": tested.overwritten,
    }
    if any(told.values()):
        left = ", ".join(f"{count:,} {why}" for why, count in told.items() if count)
        found.append(f"Left out, for they show no silence: {left}.")
    return found


def as_dict(tested: Backtest) -> dict[str, Any]:
    """The backtest as plain values, ready for JSON. Lengths are in minutes or seconds, by name."""
    safe = tested.least_safe
    return {
        "target": tested.target.name,
        "table": tested.target.table,
        "days": tested.days,
        "as_of": iso(tested.as_of),
        "present_threshold_minutes": tested.target.threshold_minutes,
        "least_safe_minutes": safe and safe.minutes,
        "replayed": tested.replayed,
        "finished": tested.finished,
        "only_in_ledger": tested.only_in_ledger,
        "without_end": tested.without_end,
        "end_ahead": tested.end_ahead,
        "without_sign_of_life": tested.without_sign,
        "overwritten": tested.overwritten,
        "lower_bounds": tested.beaten,
        "longest_silence_seconds": _seconds(tested.longest),
        "deaths": tested.deaths,
        "few": tested.replayed < FEW,
        "read_table": tested.has_ends,
        "read_ledger": tested.has_ledger,
        "thresholds": [
            {
                "threshold_minutes": at.minutes,
                "wrongly_crashed": at.crashed,
                "share": at.crashed / tested.replayed if tested.replayed else None,
                "tasks": [{"task": task.task, "runs": task.runs} for task in at.tasks],
                "only_while_waiting": at.waiting,
                "contested": at.contested,
                "escaped": at.escaped,
                "perhaps": at.perhaps,
                "recovery_later_minutes": tested.later(at),
                "deaths_later": at.deaths_later,
            }
            for at in tested.at
        ],
        "rules": [
            {
                "rule": rule.number,
                "match": rule.name,
                "threshold_minutes": rule.minutes,
                "runs": rule.runs,
                "wrongly_crashed": rule.crashed,
                "longest_silence_seconds": _seconds(rule.longest),
            }
            for rule in tested.rules
        ],
        "notes": notes(tested),
        "message": headline(tested),
    }


def as_rows(tested: Backtest) -> list[dict[str, str]]:
    """One row a threshold, every cell a text: for a table of any kind."""
    return [
        {
            "threshold": f"{at.minutes} min" + (" (now)" if at is tested.present else ""),
            "wrongly crashed": f"{at.crashed:,}",
            "of all": _share(at, tested),
            "recovery comes": _later(tested.later(at)),
            "deaths kept waiting": f"{at.deaths_later:,}",
            "in tasks": _tasks(at),
        }
        for at in tested.at
    ]


def rule_rows(tested: Backtest) -> list[dict[str, str]]:
    """One row a rule."""
    return [
        {
            "rule": f"{rule.number}: {_plain(rule.name)}",
            "threshold": "never" if rule.minutes is None else f"{rule.minutes} min",
            "runs": f"{rule.runs:,}",
            "wrongly crashed": f"{rule.crashed:,}",
            "longest silence": "" if rule.longest is None else span(rule.longest),
        }
        for rule in tested.rules
    ]


def plot(tested: Backtest, width: int = 80, *, ascii_only: bool = False) -> list[str]:
    """A bar for each threshold, as long as it would have crashed many; lines of at most ``width``.

    The longest bar is the most that any of them would have crashed; whatever is not none shows.
    """
    labels = [f"{at.minutes} min" for at in tested.at]
    ends = [f"{at.crashed:,}{_remark(at, tested)}" for at in tested.at]
    margin = _margin(tested)
    most = max(at.crashed for at in tested.at) or 1
    left = [width - margin - len(" │ ") - len(end) for end in ends]
    fits = [int(n * most / at.crashed) for n, at in zip(left, tested.at, strict=True) if at.crashed]
    room = max(8, min([WIDEST_BAR, *fits]))
    lines = []
    for label, at, end in zip(labels, tested.at, ends, strict=True):
        bar = _bar(at.crashed / most, room, ascii_only=ascii_only)
        lines.append(f"{label:>{margin}} {'|' if ascii_only else '│'}{bar and bar + ' '}{end}")
    return lines


def show(tested: Backtest, console: Console) -> None:
    """Everything, for a terminal or a pipe; the headline last."""
    if tested.replayed or tested.deaths:
        rows = [{k: v for k, v in row.items() if k != "in tasks"} for row in as_rows(tested)]
        console.print(_table(rows), end="\n\n")
        console.print(Text(f"Runs that each threshold would have crashed, of {_of_all(tested)}:\n"))
        for line in plot(tested, console.width, ascii_only=console.options.ascii_only):
            console.print(Text(line), no_wrap=True, crop=False)
        console.print()
        if crashed := [at for at in tested.at if at.crashed]:
            console.print(Text("In tasks:\n"))
            for at in crashed:
                label = f"{f'{at.minutes} min':>{_margin(tested)}}  "
                for words in Text(_tasks(at)).wrap(console, max(8, console.width - len(label))):
                    console.print(Text(label).append_text(words))
                    label = " " * len(label)
            console.print()
    if tested.rules:
        console.print(_table(rule_rows(tested)), end="\n\n")
    for note in notes(tested):
        console.print(Text(f"note: {note}"))
    console.print(Text(headline(tested)))


def as_markdown(tested: Backtest) -> str:
    """The same for a Prefect artifact."""
    target = tested.target
    lines = ["# Which threshold?", "", _escaped(headline(tested)) + ".", ""]
    lines += [f"- target `{target.name}`, table `{_plain(target.table)}`"]
    lines += [f"- the {counted(tested.days, 'day')} before {iso(tested.as_of)}"]
    if tested.replayed or tested.deaths:
        lines += ["", f"Runs that each threshold would have crashed, of {_of_all(tested)}:", ""]
        lines += ["```text", *plot(tested), "```", "", *_markdown_table(as_rows(tested))]
    if tested.rules:
        lines += ["", "## By the rules' own thresholds", "", *_markdown_table(rule_rows(tested))]
    if told := notes(tested):
        lines += ["", "## What the numbers do not show", "", *(f"- {_escaped(n)}" for n in told)]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, str]]) -> Table:
    """Nothing is cut off: what does not fit its column goes on in the next line."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold", justify="left" if name == "rule" else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))
    return table


def _markdown_table(rows: list[dict[str, str]]) -> list[str]:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return lines + [f"| {' | '.join(_escaped(cell) for cell in row.values())} |" for row in rows]


def _bar(share: float, room: int, *, ascii_only: bool) -> str:
    if not share:
        return ""
    if ascii_only:
        return "#" * max(1, round(share * room))
    eighths = max(1, round(share * room * 8))
    whole, rest = divmod(eighths, 8)
    return _BLOCKS[-1] * whole + (_BLOCKS[rest - 1] if rest else "")


def _margin(tested: Backtest) -> int:
    return max(len(f"{at.minutes} min") for at in tested.at)


def _remark(at: AtThreshold, tested: Backtest) -> str:
    told = ["now"] if at is tested.present else []
    if at is tested.least_safe:
        told.append("none known from here on" if tested.beaten else "least that crashes none")
    return f"  ({', '.join(told)})" if told else ""


def _crashed(at: AtThreshold, tested: Backtest | None) -> str:
    of = f" of {_of_all(tested)}" if tested else ""
    if not at.crashed:
        return f"none{of}"
    names = [_task(task.task) for task in at.tasks]
    if names == [_NO_TASK]:
        return f"{at.crashed:,}{of}"
    others = sum(task.runs for task in at.tasks[:3]) < at.crashed
    return f"{at.crashed:,}{of}, in task{'s' if len(names) > 1 else ''} " + _listed(
        [*names[:3], *(["others"] if others else [])]
    )


def _tasks(at: AtThreshold) -> str:
    told = [f"{_task(task.task)} {task.runs:,}" for task in at.tasks]
    if left := at.crashed - sum(task.runs for task in at.tasks):
        told.append(f"others {left:,}")
    return ", ".join(told)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_NO_TASK: Final = "(no task)"


def _task(name: str | None) -> str:
    return _NO_TASK if name is None else _plain(name)


def _plain(text: str) -> str:
    """A run's own text without what would move the cursor or break the line; not too long."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= 60 else plain[:59] + "…"


def _escaped(text: str) -> str:
    """As Markdown that shows it as it is, but for code that is ours."""
    return "".join(f"\\{c}" if c in "\\|*_[]<>#~" else c for c in text)


def _share(at: AtThreshold, tested: Backtest) -> str:
    if not tested.replayed:
        return ""
    share = 100 * at.crashed / tested.replayed
    return "< 0.1%" if 0 < share < 0.05 else f"{share:.1f}%"


def _later(minutes: int) -> str:
    if not minutes:
        return "as now"
    return f"{abs(minutes)} min {'later' if minutes > 0 else 'sooner'}"


def _of_all(tested: Backtest) -> str:
    how = "finished" if tested.finished > tested.only_in_ledger else "lived"
    return f"{_runs(tested.replayed)} that {how}"


def _sources(tested: Backtest) -> str:
    days = "the last day has" if tested.days == 1 else f"the last {tested.days} days have"
    read = [*["the table"] * tested.has_ends, *["the ledger"] * tested.has_ledger]
    return f"{days}, in {_listed(read)}," if read else f"{days}"


def _elsewhere(tested: Backtest) -> list[str]:
    kept = (tested.target.worker_heartbeat, tested.target.run_events)
    return [elsewhere.table for elsewhere in kept if elsewhere]


def _runs(count: int) -> str:
    return f"{count:,} run{'' if count == 1 else 's'}"


def _span(length: timedelta | None) -> str:
    return "unknown" if length is None else span(length)


def _seconds(length: timedelta | None) -> float | None:
    return None if length is None else length.total_seconds()
