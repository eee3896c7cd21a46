"""The story: real workers take runs, die, freeze and come back; two sweeps judge what is left.

The hazard is a story that depends on timing. Each step waits for a fact, in the database or over
Prefect's API, and names it if it does not come; nothing sleeps and hopes.
"""

import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Final

from orphan_recovery.database import database_url, describe
from orphan_recovery.demo.crew import CREW, SILENT, Crew, Fate, hire
from orphan_recovery.demo.ending import Ending
from orphan_recovery.demo.facts import Facts
from orphan_recovery.demo.guarantees import Scene
from orphan_recovery.demo.lookback import look_back
from orphan_recovery.demo.orchestrator import Orchestrator
from orphan_recovery.demo.playground import stay
from orphan_recovery.demo.processes import Child, DemoFailed, Processes, harmless_environment
from orphan_recovery.demo.show import Show, clock
from orphan_recovery.demo.stage import Stage
from orphan_recovery.demo.worker import Order
from orphan_recovery.embedded import embedded_postgres
from orphan_recovery.names import ON_DEMAND, SCHEDULED
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target

THRESHOLD: Final = timedelta(minutes=1)
REASON: Final = "demo: no sign of life from its worker"


def tell_story(*, leave_ui_up: bool) -> int:
    """Run the demo from its beginning to its end, and leave nothing behind.

    Args:
        leave_ui_up: stay afterwards, with Prefect's UI, the schedule and fresh orphans, until
            interrupted.

    Returns:
        The exit code: 0 if every claim held, 1 if one did not or the demo could not go on, 130 if
        it was interrupted.
    """
    show = Show()
    folder = Path(tempfile.mkdtemp(prefix="orphan-demo-"))
    try:
        with Ending() as ending, harmless_environment():
            return _tell(show, ending, folder, leave_ui_up)
    except KeyboardInterrupt:
        show.say("Interrupted; everything was taken down.", indent=0)
        return 130
    except DemoFailed as failure:
        show.failed(str(failure), failure.log)
    except Exception as error:
        show.failed(describe(error), None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1


def _tell(show: Show, ending: Ending, folder: Path, leave_ui_up: bool) -> int:
    show.say(
        "This kills real worker processes in mid-run and recovers what they leave, with a Postgres "
        "and a Prefect server of its own. It takes about a minute and a half, most of which is "
        f"the threshold: {clock(THRESHOLD)} of silence.",
        indent=0,
    )
    show.act("A database")
    with ExitStack() as started:
        with ending.held_back():
            url = started.enter_context(embedded_postgres())
        processes = started.enter_context(Processes(folder))
        facts = started.enter_context(Facts(url))
        orchestrator = started.enter_context(closing(Orchestrator(processes, folder, url)))
        started.enter_context(ending.undisturbed_after())
        show.still_well = processes.check
        revision = migrate(Target(), database_url(url)).after
        show.say(
            f"Postgres {facts.server_version()} is up, with the schema at revision {revision}."
        )
        stage = Stage(show, processes, facts, orchestrator, url)
        crew = workers_take_runs(stage)
        things_go_wrong(stage, crew)
        prefect_comes_up(stage, default_threshold=THRESHOLD if leave_ui_up else None)
        a_minute_passes(stage, crew)
        a_run_is_about_to_finish(stage, crew)
        the_sweep_judges(stage, crew)
        the_frozen_worker_comes_back(stage, crew)
        a_second_sweep_finds_nothing(stage)
        triggered = tuple(orchestrator.sweeps_on_demand())
        all_hold = look_back(stage, Scene(facts, orchestrator, crew, triggered, THRESHOLD, REASON))
        if leave_ui_up:
            stay(stage, THRESHOLD)
        return 0 if all_hold else 1


def workers_take_runs(stage: Stage) -> Crew:
    """Start the workers, and see every run in flight and beating."""
    stage.show.act("Workers take runs")
    crew = hire(stage.processes, stage.facts, CREW, stage.database_url)
    stage.show.wait_for("every worker to beat", lambda: crew.all_beat(stage.facts))
    stage.show.say(
        f"{len(crew.children)} processes hold {len(stage.facts.runs())} runs and set "
        "heartbeat_at = now() every second."
    )
    return crew


def things_go_wrong(stage: Stage, crew: Crew) -> None:
    """Let each worker meet its fate, as far as that lies before the sweep."""
    show = stage.show
    show.act("Things go wrong")
    killed = crew.having(Fate.KILLED)
    for part in killed:
        crew.process(part).kill()
    frozen, frozen_process = crew.one(Fate.FROZEN)
    frozen_process.send(signal.SIGSTOP)
    quiet, quiet_process = crew.one(Fate.FINISHES_FIRST)
    quiet_process.tell(Order.BE_QUIET)
    well, _ = crew.one(Fate.LIVES)
    age = stage.facts.runs()[well.runs[0]].age
    for part in killed:
        held = f"held {' and '.join(part.runs)}"
        held += f", and {' and '.join(part.claims)} not yet begun" if part.claims else ""
        show.say(f"{part.worker} was ended by {crew.process(part).ended_by}. It {held}.")
    show.say(f"{frozen.worker} was frozen with SIGSTOP, like a paused machine.")
    show.say(f"{quiet.worker} works on, but its beats no longer come through.")
    show.say(f"{well.worker} is well, and beats; its run was created {clock(age)} ago.")


def prefect_comes_up(stage: Stage, *, default_threshold: timedelta | None) -> None:
    """Start the server, and the process that serves the deployments."""
    show, orchestrator = stage.show, stage.orchestrator
    show.act("Prefect comes up in the meantime")
    server = orchestrator.start_server()
    took = show.wait_for("the Prefect server", orchestrator.answers, seconds=300, log=server.log)
    show.say(f"A server answers at {orchestrator.address} after {took:.0f} s.")
    served = orchestrator.serve(default_threshold)
    took = show.wait_for(
        "`orphan-recovery serve` to offer its deployments",
        # Paused, so that there is no sweep but the ones that the viewer is shown.
        lambda: orchestrator.pause_schedule() and orchestrator.deployment(ON_DEMAND) is not None,
        seconds=300,
        log=served.log,
    )
    show.say(
        f"`orphan-recovery serve` offers {ON_DEMAND} and {SCHEDULED} (paused for now) after "
        f"{took:.0f} s."
    )


def a_minute_passes(stage: Stage, crew: Crew) -> None:
    """Wait until every silent run has been silent for longer than the threshold."""
    show, facts, silent = stage.show, stage.facts, crew.runs(*SILENT)
    show.act(f"Silence reaches the threshold of {clock(THRESHOLD)}")

    def so_far() -> str:
        last = facts.last_heard_of(silent)
        return f"{last.id} silent for {clock(last.silence)}"

    show.wait_for(
        "the threshold",
        lambda: facts.last_heard_of(silent).silence > THRESHOLD,
        seconds=THRESHOLD.total_seconds() + 120,
        so_far=so_far,
    )
    show.say(
        f"{len(silent)} runs are silent, each for at least "
        f"{clock(facts.last_heard_of(silent).silence)} by the database's clock."
    )


def a_run_is_about_to_finish(stage: Stage, crew: Crew) -> None:
    """Let a worker stall between its last word on a run and the COMMIT."""
    part, child = crew.one(Fate.FINISHES_FIRST)
    child.tell(Order.FINISH_AND_STALL)
    stage.show.wait_for(
        f"{part.worker} to stall before its COMMIT",
        lambda: stage.facts.stalls_before_commit(part.worker),
        log=child.log,
    )
    stage.show.say(
        f"{part.worker} has just written the result of {part.runs[0]} and is stopped before its "
        "COMMIT: it holds the row's lock, and to everyone else the run still looks dead."
    )


def the_sweep_judges(stage: Stage, crew: Crew) -> None:
    """Sweep, and let the run finish while its mark waits for the row."""
    show, facts = stage.show, stage.facts
    show.act("A sweep, as a deploy pipeline triggers it")
    part, child = crew.one(Fate.FINISHES_FIRST)
    sweep = _trigger(stage)
    pass_on = _passing_on(show, sweep)

    def waits() -> bool:
        pass_on()
        if sweep.process.poll() is not None:
            raise DemoFailed(f"the sweep did not wait for the row of {part.runs[0]}", sweep.log)
        return facts.sweep_waits_for(part.worker)

    show.wait_for(f"the mark of {part.runs[0]} to wait for its row", waits, seconds=300)
    child.send(signal.SIGCONT)
    show.say(
        f"The mark of {part.runs[0]} waits for the row's lock; now {part.worker} goes on "
        "(SIGCONT) and commits."
    )
    _see_to_its_end(show, sweep, pass_on)


def the_frozen_worker_comes_back(stage: Stage, crew: Crew) -> None:
    """Thaw the worker whose run was marked meanwhile. It reports a result, and is refused."""
    part, child = crew.one(Fate.FROZEN)
    stage.show.act(f"{part.worker} thaws, and reports its result as if nothing had been")
    child.tell(Order.FINISH)  # its work is done by the time it runs again
    child.send(signal.SIGCONT)
    stage.show.wait_for(f"{part.worker} to report", lambda: bool(child.output), log=child.log)
    for line in child.output:
        stage.show.say(line)


def a_second_sweep_finds_nothing(stage: Stage) -> None:
    """Sweep again: there is nothing left to judge."""
    stage.show.act("A second sweep")
    sweep = _trigger(stage)
    _see_to_its_end(stage.show, sweep, _passing_on(stage.show, sweep))


def _trigger(stage: Stage) -> Child:
    minutes = int(THRESHOLD.total_seconds() // 60)
    options = ["--wait", "--threshold-minutes", str(minutes), "--reason", REASON]
    stage.show.line(f"$ orphan-recovery trigger {shlex.join(options)}", style="bold")
    return stage.orchestrator.trigger(*options)


def _passing_on(show: Show, child: Child) -> Callable[[], None]:
    """What, when called, shows the lines that the process has written since."""
    shown = 0

    def pass_on() -> None:
        nonlocal shown
        for line in child.output[shown:]:
            (show.line if "://" in line else show.say)(line)
            shown += 1

    return pass_on


def _see_to_its_end(show: Show, sweep: Child, pass_on: Callable[[], None]) -> None:
    def ended() -> bool:
        pass_on()
        return sweep.process.poll() is not None

    show.wait_for("the sweep to end", ended, seconds=300, log=sweep.log)
    pass_on()
    if sweep.process.returncode != 0:
        raise DemoFailed(f"the sweep's exit code is {sweep.process.returncode}", sweep.log)
