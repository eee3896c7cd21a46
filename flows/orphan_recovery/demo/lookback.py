"""The look back: the verdicts as the ledger has them, the runs left alone, and every claim.

The hazard is a table that tells the story as it was meant. Every cell is read from the ledger, the
runs table, or the process that a run was held by.
"""

from datetime import timedelta

from orphan_recovery.demo.crew import SILENT, Crew, Fate, Part
from orphan_recovery.demo.guarantees import Scene, check_all
from orphan_recovery.demo.processes import DemoFailed
from orphan_recovery.demo.stage import Stage


def look_back(stage: Stage, scene: Scene) -> bool:
    """Show the verdicts and check every claim. True if all of them hold."""
    show = stage.show
    _await_task_runs(stage, scene)
    show.act("What happened, as the ledger has it")
    _show_verdicts(stage, scene)
    show.act("What that shows, checked against the database and Prefect's API")
    checked = check_all(scene)
    for claim in checked:
        show.tick(claim.holds, claim.claim, claim.found)
    broken = [claim.claim for claim in checked if not claim.holds]
    show.console.print()
    if broken:
        told = f"{len(broken)} of {len(checked)} do NOT hold: {' '.join(broken)}"
        show.say(told, style="bold red", indent=0)
    else:
        told = f"All {len(checked)} hold. It took {show.elapsed:.0f} seconds."
        show.say(told, style="bold green", indent=0)
    return not broken


def _show_verdicts(stage: Stage, scene: Scene) -> None:
    runs = scene.facts.runs()
    verdicts = {v.run_id: v for v in scene.facts.verdicts()}
    rows = []
    for part in scene.crew.parts:
        for run_id in part.all_runs:
            verdict, befell = verdicts.get(run_id), _what_befell(scene.crew, part, run_id)
            judged = ("(no verdict)", "", _seconds(runs[run_id].silence))
            if verdict:
                judged = (verdict.outcome, verdict.evidence, _seconds(verdict.silence))
            rows.append((run_id, befell, *judged, runs[run_id].status))
    headers = ("run", "its worker", "outcome", "evidence", "silence", "is now")
    stage.show.table(headers, rows, wrap=("its worker", "evidence"))


def _what_befell(crew: Crew, part: Part, run: str) -> str:
    child = crew.process(part)
    if child.ended_by:
        told = child.ended_by + (" before it began" if run in part.claims else "")
    elif child.process.poll() is not None:
        told = "ended"
    elif part.fate is Fate.FINISHES_FIRST:
        told = "quiet, " + ", ".join(line.partition(" ")[0] for line in child.output)
    else:
        told = ", ".join(which.name for which in child.sent) or "beating"
    return f"{part.worker}: {told}"


def _seconds(span: timedelta) -> str:
    return f"{span.total_seconds():.1f} s"


def _await_task_runs(stage: Stage, scene: Scene) -> None:
    """Prefect records task runs a moment after they ended. If it does not, the claim says so."""
    wanted = len(scene.crew.runs(*SILENT))

    def are_there() -> bool:
        runs = [run for sweep in scene.sweeps for run in scene.orchestrator.task_runs(sweep)]
        ended = [run for run in runs if run.name.startswith("mark-") and run.state == "Completed"]
        return len(ended) >= wanted

    try:
        stage.show.wait_for("Prefect to have recorded the task runs", are_there, seconds=60)
    except DemoFailed:
        stage.show.say("Prefect has not recorded every task run within a minute.")
