"""Report pages: a report as a table, and as an artifact in Prefect.

The hazard is a page that hides what matters: failures come first, and what was not dared and what
is to be done have a heading of their own.
"""

from datetime import timedelta
from typing import Any, Final

from orphan_recovery.report import Held, SweepReport
from orphan_recovery.verdict import Outcome, Verdict
from orphan_recovery.words import counted, iso, span

MOST_ROWS: Final = 200
"""Of a table for people: the report and the ledger have more."""


def as_table(report: SweepReport) -> list[dict[str, str]]:
    """One row a run, failures first, for people: at most ``MOST_ROWS``, every cell a text."""
    entries = report.as_dict()["runs"]
    return [
        {
            "run": entry["run_id"],
            "outcome": entry["outcome"] or "would be judged",
            "worker": entry["worker_id"] or "",
            "tenant": entry["tenant_id"] or "",
            "last sign of life": entry["sign_of_life"],
            "evidence": entry["evidence"],
            "silence": span(timedelta(seconds=entry["silence_seconds"])),
            "found instead, or error": entry["error"] or _found(entry["found"]),
        }
        for entry in entries[:MOST_ROWS]
    ]


def as_markdown(report: SweepReport) -> str:
    """What happened, what was done, what was not dared, and what to do next."""
    request = report.request
    lines = ["# Orphan recovery", "", report.headline() + ".", ""]
    lines += [f"- sweep `{request.sweep_id}`, asked for by {request.asked_by}"]
    lines += [f"- target {_code(request.target.name)}, table {_code(request.target.table)}"]
    lines += [f"- {name}: {_code(str(value))}" for name, value in request.scope.items()]
    if report.seen_by:
        lines.append(
            f"- sweep `{report.seen_by}` looked in its place, after this one had begun, and judged "
            "all that it found: see there what was marked"
        )
    if report.looked_twice:
        lines.append(f"- looked twice, because {report.looked_twice}")
    if report.held:
        lines += ["", "## What was not dared", "", *_what_is_held(report.held)]
    if report.detected and not request.dry_run:
        lines += ["", "| outcome | runs |", "|---|---|"]
        lines += [f"| {o.value} | {report.counts[o]} |" for o in Outcome if report.counts[o]]
    left = [verdict for verdict in report.verdicts if verdict.outcome is not Outcome.MARKED]
    if left:
        lines += ["", "## What was not marked", ""]
        lines += [f"- {_code(v.run.id)} {v.outcome.value}: {_code(_why(v))}" for v in left[:10]]
        more = f"- … and {len(left) - 10} more{', in the ledger' if report.is_closed else ''}"
        lines += [more] if len(left) > 10 else []
    steps = report.next_steps()
    if steps:
        lines += ["", "## What to do next", "", *(f"- {step}" for step in steps)]
    return "\n".join(lines) + "\n"


def _what_is_held(held: Held) -> list[str]:
    saw = held.evidence
    silent = ", ".join(_code(name) for name in held.silent)
    more = saw["silent_workers"] - len(held.silent)
    last = saw["last_sweep_at"]
    up = f"the server has been up since {saw['server_started_at']}"
    return [
        f"Hold `{held.hold_id}` stands since {iso(held.opened_at)}, and keeps "
        f"{counted(held.runs, 'run')} from being marked. What was seen then:",
        "",
        f"- {held.in_words()}{held.since_first}",
        f"- silent: {silent}{f' and {more} more' if more > 0 else ''}",
        f"- {up}{', after a failover' if saw['failed_over'] else ''}",
        f"- the sweep before was at {last}" if last else "- no sweep was before this one",
        f"- the threshold was {counted(saw['threshold_minutes'], 'minute')}, and more than "
        f"{saw['hold_share']:.0%} of the {saw['counted']} is held",
        *(f"- hold `{other}` stands since before" for other in held.others),
    ]


def _why(verdict: Verdict) -> str:
    return verdict.error or _found(verdict.found) or "no such row"


def _code(text: str) -> str:
    """As code in Markdown, so that nothing in a run's own text is taken for markup."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def _found(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
