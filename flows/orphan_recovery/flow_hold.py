"""The hold in Prefect: a state named Held, an event, and a form to release it by.

The hazard is a question that nobody hears, or that stops everything else. So a held flow run of a
deployment is suspended: its process ends, it keeps no place from the next sweep, and resuming it
shows what was seen and asks. A flow run that cannot be suspended ends Failed, by the name Held.
"""

from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from prefect import get_client
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.exceptions import Pause
from prefect.flow_runs import asuspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from orphan_recovery.hold import APPROVED_FOR
from orphan_recovery.report import SweepReport

HELD: Final = "Held"
"""The name of the state, in the UI, in events and in automations."""
EVENT: Final = "orphan-recovery.held"
ASKED_FOR: Final = timedelta(days=7)
"""How long a held flow run can be resumed; the hold itself stays open for as long as it lasts."""
_KEY: Final = "hold"
_LABEL: Final = "orphan-recovery.hold"
"""Of the flow run: which hold it asks about."""


class Answer(RunInput):
    """What the form asks of whoever resumes a held flow run."""

    approve: bool = Field(
        description="Those workers are dead: mark the runs that this hold names as crashed."
    )
    your_name: str = Field(min_length=1, description="For the ledger.")
    for_minutes: int = Field(
        default=int(APPROVED_FOR.total_seconds() // 60),
        ge=1,
        le=7 * 24 * 60,
        description="How long the approval holds, in minutes.",
    )
    note: str = Field(default="", description="Why, for the ledger.")


def hold_of_resumed_run() -> UUID | None:
    """The hold that this flow run asked about before it was suspended."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    told = run.labels.get(_LABEL) if run else None
    return UUID(str(told)) if told else None


def tell_of_hold(report: SweepReport) -> None:
    """Emit the event of a hold, for automations."""
    held = report.held
    assert held is not None  # noqa: S101 - asked by the caller
    target = report.request.target.name
    emit_event(
        event=EVENT,
        resource={
            "prefect.resource.id": f"orphan-recovery.target.{target}",
            "prefect.resource.name": target,
        },
        payload={"hold_id": str(held.hold_id), "runs": held.runs, **held.evidence},
    )


async def ask_in_the_ui(report: SweepReport) -> None:
    """Suspend this flow run under the name Held, with a form that shows what was seen.

    Returns only where a flow run cannot be suspended: one without a deployment, or within another.

    Raises:
        Pause: Prefect's own signal that ends the process; the flow run goes on when it is resumed.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None or run.parent_task_run_id is not None:
        return
    if _KEY in (run.empirical_policy.pause_keys or ()):  # it was resumed once, and is held again
        return
    form = Answer.with_initial_data(description=_shown(report))
    try:
        await _suspend(form)
    except Pause as pause:
        await _call_it_held(run.id, pause.state, report)
        raise


async def answer_of_resumed_run() -> Answer | None:
    """What was answered, if this flow run was held and has been resumed; else None."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or _KEY not in (run.empirical_policy.pause_keys or ()):
        return None
    answer: Answer = await _suspend(Answer)  # it has fired already: this only reads the answer
    return answer


async def _suspend(form: type[Answer]) -> Any:
    seconds = int(ASKED_FOR.total_seconds())
    return await asuspend_flow_run(wait_for_input=form, timeout=seconds, key=_KEY)


async def _call_it_held(flow_run: UUID, suspended: Any, report: SweepReport) -> None:
    """Prefect calls it Suspended; an operator is to read what it is, and why."""
    assert report.held is not None  # noqa: S101 - asked by the caller
    held = suspended.model_copy(update={"name": HELD, "message": report.headline()})
    async with get_client() as client:
        await client.update_flow_run_labels(flow_run, {_LABEL: str(report.held.hold_id)})
        await client.set_flow_run_state(flow_run, held, force=True)


def _shown(report: SweepReport) -> str:
    held = report.held
    assert held is not None  # noqa: S101 - asked by the caller
    lines = [f"**{held.in_words()}.** {held.runs} runs are not marked.", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in held.evidence.items()]
    lines += [
        "",
        "If those workers are dead, approve. If they live, do nothing: the hold is closed by the "
        "first sweep that hears of them.",
    ]
    return "\n".join(lines)
