"""The playground: Prefect's UI, the schedule and fresh orphans, left up for the viewer to try.

The hazard is a viewer who clicks and sees nothing happen: so there are orphans again whenever the
last ones were judged, and what was judged is told here too.
"""

import itertools
from datetime import timedelta

from orphan_recovery.demo.crew import Fate, Part, hire
from orphan_recovery.demo.processes import installed
from orphan_recovery.demo.show import clock
from orphan_recovery.demo.stage import Stage
from orphan_recovery.names import ON_DEMAND, SCHEDULED

ORPHANS = 5


def stay(stage: Stage, threshold: timedelta) -> None:
    """Make orphans, and more once they were judged, until interrupted. Returns then."""
    try:
        stage.show.wait_for("the schedule to go on", stage.orchestrator.resume_schedule)
        _say_what_there_is(stage)
        for number in itertools.count(1):
            _make_orphans_and_await_verdicts(stage, threshold, number)
    except KeyboardInterrupt:
        stage.show.console.print()
        stage.show.say("Taking everything down.", indent=0)


def _say_what_there_is(stage: Stage) -> None:
    show, prefect = stage.show, stage.orchestrator
    show.act("Now it is yours; press Ctrl-C to take everything down")
    show.say("Prefect's UI, and in it the deployment to click on (Run, then Quick run):")
    show.line(prefect.address, style="bold", indent=6)
    show.line(prefect.page_of(ON_DEMAND), style="bold", indent=6)
    show.say(f"The deployment {SCHEDULED} sweeps every five minutes from now on. The database:")
    show.line(f"psql '{stage.database_url}'", style="bold", indent=6)
    show.say("The command line, in another terminal:")
    show.line(f"export PREFECT_API_URL={prefect.address}/api", style="bold", indent=6)
    show.line(f"export DATABASE_URL='{stage.database_url}'", style="bold", indent=6)
    look = f"{installed('orphan-recovery')} sweep --dry-run --threshold-minutes 1"
    show.line(look, style="bold", indent=6)
    show.console.print()


def _make_orphans_and_await_verdicts(stage: Stage, threshold: timedelta, number: int) -> None:
    show, facts = stage.show, stage.facts
    parts = [
        Part(f"worker-{number}-{i}", Fate.KILLED, (f"task-{number}-{i}",))
        for i in range(1, ORPHANS + 1)
    ]
    crew = hire(stage.processes, facts, parts, stage.database_url)
    show.wait_for("fresh workers to beat", lambda: crew.all_beat(facts))
    for part in parts:
        crew.process(part).kill()
    mine = crew.runs(Fate.KILLED)
    show.say(f"{len(parts)} workers killed; {mine[0]} to {mine[-1]} fall silent.")
    show.wait_for(
        f"{mine[0]} to {mine[-1]} to be silent for {clock(threshold)}",
        lambda: facts.last_heard_of(mine).silence > threshold or not _in_flight(stage, mine),
        seconds=threshold.total_seconds() + 120,
        so_far=lambda: f"silent for {clock(facts.last_heard_of(mine).silence)}",
    )
    show.say(f"{mine[0]} to {mine[-1]} are orphans: click Run, or wait for the schedule.")
    show.wait_for("a sweep", lambda: not _in_flight(stage, mine), seconds=float("inf"))
    verdicts = [v for v in facts.verdicts() if v.run_id in mine]
    for asked_by in sorted({v.asked_by for v in verdicts}):
        marked = [v.run_id for v in verdicts if v.asked_by == asked_by]
        show.say(f"{len(marked)} marked by {asked_by}.")


def _in_flight(stage: Stage, run_ids: list[str]) -> list[str]:
    runs = stage.facts.runs()
    return [run_id for run_id in run_ids if runs[run_id].status in ("queued", "running")]
