"""The guarantees: each claim of the demo, checked against the database and Prefect's API.

What this can wrongly do is pass on nothing: a claim about all of no runs holds. So each check says
how many it looked at, and compares with the crew and not with what the sweep said it did.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from orphan_recovery.demo.crew import ORPHANED, SILENT, Crew, Fate
from orphan_recovery.demo.facts import Facts, Judged
from orphan_recovery.demo.orchestrator import FlowRun, Orchestrator
from orphan_recovery.demo.show import clock


@dataclass(frozen=True)
class Scene:
    """Where to look."""

    facts: Facts
    orchestrator: Orchestrator
    crew: Crew
    sweeps: tuple[FlowRun, ...]
    """The flow runs that were triggered, in order."""
    threshold: timedelta
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """A claim, whether it holds, and what was found."""

    claim: str
    holds: bool
    found: str


def check_all(scene: Scene) -> list[Checked]:
    """Check every claim. One that cannot even be checked does not hold."""
    checked = []
    for check in CHECKS:
        try:
            checked.append(check(scene))
        except Exception as error:
            claim = (check.__doc__ or check.__name__).strip()
            checked.append(Checked(claim, False, f"{type(error).__name__}: {error}"))
    return checked


def no_orphan_is_lost(scene: Scene) -> Checked:
    """No orphan is lost."""
    killed = [scene.crew.process(part) for part in scene.crew.having(Fate.KILLED)]
    by_sigkill = [child for child in killed if child.ended_by == "SIGKILL"]
    orphans = scene.crew.runs(*ORPHANED)
    runs, marked = scene.facts.runs(), _outcomes(scene, "marked")
    crashed = [r for r in orphans if runs[r].status == "crashed" and r in marked]
    return Checked(
        "No orphan is lost.",
        len(crashed) == len(orphans) > 0 and len(by_sigkill) == len(killed) > 0,
        f"{len(by_sigkill)} workers were killed with SIGKILL and "
        f"{len(scene.crew.having(Fate.FROZEN))} was frozen; {len(crashed)} of their "
        f"{len(orphans)} runs are crashed, each by a verdict.",
    )


def the_living_are_left_alone(scene: Scene) -> Checked:
    """A run that beats is left alone, however old it is."""
    part, child = scene.crew.one(Fate.LIVES)
    [run] = (scene.facts.runs()[run_id] for run_id in part.all_runs)
    verdicts = [v for v in scene.facts.verdicts() if v.run_id == run.id]
    lives = child.process.poll() is None and run.silence < scene.threshold
    return Checked(
        "A run that beats is left alone, however old it is.",
        lives and run.status == "running" and not verdicts and run.age > timedelta(hours=1),
        f"{run.id} was created {clock(run.age)} ago, beat {run.silence.total_seconds():.1f} s "
        f"ago and is {run.status}; verdicts on it: {len(verdicts)}.",
    )


def what_finished_first_stands(scene: Scene) -> Checked:
    """A run that finishes while the sweep waits for its row keeps its result."""
    part, child = scene.crew.one(Fate.FINISHES_FIRST)
    [run] = (scene.facts.runs()[run_id] for run_id in part.all_runs)
    outcomes = [v.outcome for v in scene.facts.verdicts() if v.run_id == run.id]
    return Checked(
        "A run that finishes while the sweep waits for its row keeps its result.",
        run.status == "completed"
        and run.output_json is not None
        and run.error is None
        and outcomes == ["finished_first"]
        and f"finished {run.id}" in child.output,
        f"{run.id} is {run.status} with output {json.dumps(run.output_json)}; its outcome is "
        f"{_listed(outcomes)}.",
    )


def the_late_are_refused(scene: Scene) -> Checked:
    """A terminal run never changes, not even by its own worker."""
    part, child = scene.crew.one(Fate.FROZEN)
    [run] = (scene.facts.runs()[run_id] for run_id in part.all_runs)
    told = f"refused {run.id}: TRUTH_VIOLATION"
    refusals = [line for line in child.output if line.startswith(told)]
    return Checked(
        "A terminal run never changes, not even by its own worker.",
        len(refusals) == 1 and run.status == "crashed" and run.output_json is None,
        f"{part.worker}, thawed, was {_listed(refusals) if refusals else 'not refused'}. "
        f"{run.id} is {run.status}.",
    )


def each_has_one_verdict(scene: Scene) -> Checked:
    """Each orphan gets one verdict, however many sweeps there are."""
    silent = scene.crew.runs(*SILENT)
    verdicts = Counter(v.run_id for v in scene.facts.verdicts())
    detected = [_detected(scene, sweep) for sweep in scene.sweeps]
    return Checked(
        "Each orphan gets one verdict, however many sweeps there are.",
        len(detected) == 2 and detected == [len(silent), 0] and verdicts == Counter(silent),
        f"The sweeps detected {' and '.join(map(str, detected))} orphans; the ledger has "
        f"{verdicts.total()} verdicts on {len(verdicts)} runs.",
    )


def each_verdict_has_its_evidence(scene: Scene) -> Checked:
    """Each verdict carries its evidence."""
    asked_by = scene.sweeps[0].id
    runs, started = scene.facts.runs(), {r for p in scene.crew.parts for r in p.runs}

    def is_complete(v: Judged) -> bool:
        run = runs[v.run_id]
        return (
            v.silence >= v.threshold == scene.threshold
            and v.evidence == ("run heartbeat" if v.run_id in started else "age")
            and v.worker_id == run.worker_id
            and (v.outcome != "marked" or v.silence == v.judged_at - v.sign_of_life)
            and (v.outcome != "marked" or v.sign_of_life == run.sign_of_life)
            and v.during_sweep  # judged in the database's time
            and asked_by in v.asked_by
            and v.reason == scene.reason
            and bool(v.rule)
        )

    verdicts = scene.facts.verdicts()
    complete = [v for v in verdicts if is_complete(v)]
    return Checked(
        "Each verdict carries its evidence.",
        len(complete) == len(verdicts) > 0,
        f"{len(complete)} of {len(verdicts)} have the last sign of life and where it came from, "
        f"a silence no shorter than {clock(scene.threshold)}, the time of the database, the "
        "sweep, who asked for it and why.",
    )


def each_has_its_task_run(scene: Scene) -> Checked:
    """Each orphan has a task run of its own in Prefect."""
    wanted = {f"mark-{run_id}" for run_id in scene.crew.runs(*SILENT)}
    runs = [run for sweep in scene.sweeps for run in scene.orchestrator.task_runs(sweep)]
    marks = [run for run in runs if run.name.startswith("mark-")]
    completed = {run.name for run in marks if run.state == "Completed"}
    states = [sweep.state for sweep in scene.sweeps]
    return Checked(
        "Each orphan has a task run of its own in Prefect.",
        completed == wanted
        and len(marks) == len(wanted) > 0
        and states == ["Completed"] * len(scene.sweeps),
        f"{len(completed & wanted)} of {len(wanted)} are there by name and Completed, of "
        f"{len(marks)} in all; the flow runs {' and '.join(s.name for s in scene.sweeps)} ended "
        f"{_listed(sorted(set(states)))}.",
    )


def the_ledger_is_append_only(scene: Scene) -> Checked:
    """The ledger cannot be edited."""
    before = scene.facts.verdicts()
    refusals = [
        scene.facts.refusal_of("UPDATE orphan_recovery.verdicts SET outcome = 'failed'"),
        scene.facts.refusal_of("DELETE FROM orphan_recovery.verdicts"),
        scene.facts.refusal_of("TRUNCATE orphan_recovery.verdicts"),
    ]
    told = [refusal for refusal in refusals if refusal and "LEDGER_VIOLATION" in refusal]
    return Checked(
        "The ledger cannot be edited.",
        len(told) == len(refusals) and scene.facts.verdicts() == before != [],
        f"{len(told)} of {len(refusals)} attempts were refused: {_listed(told[:1])}.",
    )


CHECKS: Sequence[Callable[[Scene], Checked]] = (
    no_orphan_is_lost,
    the_living_are_left_alone,
    what_finished_first_stands,
    the_late_are_refused,
    each_has_one_verdict,
    each_verdict_has_its_evidence,
    each_has_its_task_run,
    the_ledger_is_append_only,
)


def _outcomes(scene: Scene, outcome: str) -> set[str]:
    return {v.run_id for v in scene.facts.verdicts() if v.outcome == outcome}


def _detected(scene: Scene, flow_run: FlowRun) -> int | None:
    """What the ledger says that the sweep of this flow run detected, once it is closed."""
    mine = [s for s in scene.facts.sweeps() if flow_run.id in s.asked_by]
    return mine[0].detected if len(mine) == 1 and mine[0].ended_as == "completed" else None


def _listed(texts: Sequence[str]) -> str:
    return "; ".join(texts) or "(nothing)"
