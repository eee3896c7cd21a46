"""The hold in Prefect: a state named Held, an event, and a form to release it by.

The hazard is a question that nobody hears, or that stops everything else. So the first flow run
that stops at a hold is suspended and asks: its process ends, it keeps no place from the next
sweep, and resuming it shows what was seen. Those that stop there later end Failed, by the name
Held, and ask nobody twice, not even whoever answered that they be left alone: that answer is kept
with the flow run that asked. One that Prefect did not deliver is heeded by the next sweep, and a
question that has become needless is withdrawn by it.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.exceptions import Pause, PrefectHTTPStatusError
from prefect.flow_runs import asuspend_flow_run
from prefect.input import RunInput, keyset_from_base_key
from prefect.input.actions import adelete_flow_run_input
from prefect.states import Cancelled
from pydantic import Field, ValidationError

from orphan_recovery.report import Held, SweepReport
from orphan_recovery.settings import APPROVED_MINUTES, MAX_APPROVED_MINUTES
from orphan_recovery.words import counted

HELD: Final = "Held"
"""The name of the state, in the UI, in events and in automations."""
EVENT: Final = "orphan-recovery.held"
ASKED_FOR: Final = timedelta(days=7)
"""How long a held flow run can be resumed; the hold itself stays open for as long as it lasts."""
MARK_THEM: Final = "mark them crashed"
LEAVE_THEM: Final = "leave them alone"
ENDED: Final = {
    "released": "a person released it and its runs were marked",
    "recovered": "its fleet has recovered",
}
"""In the ledger's word and in ours."""
_KEY: Final = "hold"
_RESPONSE: Final = keyset_from_base_key(f"suspended-{_KEY}")["response"]
"""Where Prefect keeps what was answered."""

_TEXT: Final = r"^[^\x00]*$"
_NOT_BLANK: Final = r"^[^\x00]*[^\s\x00][^\x00]*$"
"""What the ledger can keep: the server refuses the form by these, before anything is resumed."""


class Answer(RunInput):
    """What the form asks of whoever resumes a held flow run."""

    decision: Literal["mark them crashed", "leave them alone"] = Field(
        description="The runs that this hold names: are their workers dead?"
    )
    your_name: str = Field(
        min_length=1, max_length=200, pattern=_NOT_BLANK, description="For the ledger."
    )
    for_minutes: int = Field(
        default=APPROVED_MINUTES,
        ge=1,
        le=MAX_APPROVED_MINUTES,
        description="How long the approval holds, in minutes.",
    )
    note: str = Field(
        default="", max_length=1_000, pattern=_TEXT, description="Why, for the ledger."
    )

    def in_words(self, hold_id: UUID, target: str) -> str:
        """That a person leaves the runs of a hold alone, why, and what releases it all the same."""
        why = f" ({self.note})" if self.note else ""
        return (
            f"{self.your_name} left its runs alone{why}, so nobody is asked again; "
            f"`orphan-recovery approve {hold_id} --target {target}` releases it still"
        )


@dataclass(frozen=True, slots=True)
class Given:
    """An answer that Prefect keeps, until it has been heeded."""

    answer: Answer
    at: datetime
    """By Prefect's clock."""
    flow_run_id: UUID
    """The flow run that asked."""
    hold_id: UUID | None
    """What it asked about; None if it has lost the tag that says so."""

    async def forget(self) -> None:
        """Have it heeded once only: a retry of the flow run is an ordinary sweep."""
        try:
            await adelete_flow_run_input(_RESPONSE, flow_run_id=self.flow_run_id)
        except PrefectHTTPStatusError as error:
            # Another sweep may have heeded, and forgotten, it meanwhile.
            if error.response.status_code != httpx.codes.NOT_FOUND:
                raise


def tell_of_hold(report: SweepReport) -> None:
    """Emit the event of a hold, for automations."""
    held, target = _held(report), report.request.target.name
    emit_event(
        event=EVENT,
        resource={
            "prefect.resource.id": f"orphan-recovery.target.{target}",
            "prefect.resource.name": target,
        },
        payload={"hold_id": str(held.hold_id), "runs": held.runs, **held.evidence},
    )


async def who_asks(report: SweepReport) -> str | None:
    """The name of another flow run that asks about the same hold already; None if there is none."""
    this, tag = this_run(), _tag(_held(report).hold_id)
    async with get_client() as client:
        # One that has been resumed is on its way to heed the answer.
        living = (StateType.PAUSED, StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING)
        found = await _tagged(client, [tag], *living)
    return next((run.name for run in found if this is None or run.id != this.id), None)


async def who_left_them(report: SweepReport) -> Answer | None:
    """What was answered about this hold already, if it was to leave its runs alone.

    Kept for as long as Prefect keeps the flow run that asked, whatever became of that.
    """
    async with get_client() as client:
        for run in await _tagged(client, [_tag(_held(report).hold_id)], *TERMINAL_STATES):
            given = await _answer_to(client, run)
            if given is not None and given.answer.decision == LEAVE_THEM:
                return given.answer
    return None


def can_ask() -> bool:
    """Whether this flow run can be suspended: it is one of a deployment, within no other.

    One that was resumed once cannot be again.
    """
    run = this_run()
    if run is None or run.deployment_id is None or run.parent_task_run_id is not None:
        return False
    return _KEY not in (run.empirical_policy.pause_keys or ())


async def ask_in_the_ui(report: SweepReport) -> None:
    """Suspend this flow run under the name Held, with a form that shows what was seen.

    Raises:
        Pause: Prefect's own signal that ends the process; the flow run goes on when it is resumed.
    """
    run = this_run()
    assert run is not None  # noqa: S101 - asked by the caller
    async with get_client() as client:  # first: a question that nobody can match is lost
        await client.update_flow_run(run.id, tags=[*run.tags, _tag(_held(report).hold_id)])
    form = Answer.with_initial_data(description=_shown(report))
    try:
        await asuspend_flow_run(
            wait_for_input=form, timeout=int(ASKED_FOR.total_seconds()), key=_KEY
        )
    except Pause as pause:
        await _call_it_held(run.id, pause.state, report)
        raise


async def answer_to_this_run() -> Given | None:
    """What was answered to this flow run, if it was held and nobody has heeded the answer yet."""
    run = this_run()
    if run is None or _KEY not in (run.empirical_policy.pause_keys or ()):
        return None
    async with get_client() as client:
        return await _answer_to(client, run)


async def undelivered_answers(hold_ids: Sequence[UUID]) -> AsyncIterator[Given]:
    """Which of these holds were released by resuming a flow run that then did not heed it.

    Prefect cancels a flow run that is resumed while another sweep of its deployment runs, since
    at most one does at a time; it may also have been killed, have met a database that was not
    there, or have found recovery switched off.
    """
    async with get_client() as client:
        for hold_id in hold_ids:
            for run in await _tagged(client, [_tag(hold_id)], *TERMINAL_STATES):
                given = await _answer_to(client, run)
                if given is not None and given.answer.decision == MARK_THEM:
                    yield given


async def withdraw_questions(ended: dict[UUID, str]) -> None:
    """Cancel the flow runs that still ask about holds that have ended.

    Args:
        ended: such holds, and as what each ended, by the ledger's word.
    """
    if not ended:
        return
    by_tag = {_tag(hold_id): how for hold_id, how in ended.items()}
    async with get_client() as client:
        for run in await _tagged(client, list(by_tag), StateType.PAUSED):
            [tag] = by_tag.keys() & set(run.tags)  # it can ask but once
            told = f"no answer is needed any more: {tag} has ended: {ENDED[by_tag[tag]]}"
            await client.set_flow_run_state(run.id, Cancelled(message=told), force=True)
            get_run_logger().info("flow run %s is cancelled: %s", run.name, told)


def this_run() -> FlowRun | None:
    """The flow run that this is; None outside of one."""
    context = FlowRunContext.get()
    return context.flow_run if context else None


def _held(report: SweepReport) -> Held:
    assert report.held is not None  # noqa: S101 - asked by the caller
    return report.held


def _tag(hold_id: UUID) -> str:
    return f"hold {hold_id}"


def _hold_of(run: FlowRun) -> UUID | None:
    named = [tag.removeprefix("hold ") for tag in run.tags if tag.startswith("hold ")]
    return UUID(named[0]) if named else None


async def _tagged(client: PrefectClient, tags: list[str], *types: StateType) -> list[FlowRun]:
    """The flow runs in one of these types of state that have one of these tags."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))
    wanted = FlowRunFilter(tags=FlowRunFilterTags(any_=tags), state=state)
    return await client.read_flow_runs(flow_run_filter=wanted)


async def _answer_to(client: PrefectClient, run: FlowRun) -> Given | None:
    """What was answered to a flow run that asked, if anything was."""
    kept = await client.filter_flow_run_input(run.id, _RESPONSE, limit=1, exclude_keys=set())
    for told in kept:
        try:
            answer = Answer.model_validate(told.decoded_value)
        except ValidationError:  # not by our form, or by an earlier one: nothing to act upon
            get_run_logger().warning("what flow run %s was answered is no answer", run.name)
            continue
        assert told.created is not None  # noqa: S101 - the server says so of whatever it keeps
        return Given(answer, told.created, run.id, _hold_of(run))
    return None


async def _call_it_held(flow_run: UUID, suspended: Any, report: SweepReport) -> None:
    """Prefect calls it Suspended; an operator is to read what it is, and why."""
    held = suspended.model_copy(update={"name": HELD, "message": report.headline()})
    async with get_client() as client:
        await client.set_flow_run_state(flow_run, held, force=True)


def _shown(report: SweepReport) -> str:
    """What to do, then what was seen; for a person who was woken."""
    held, target = _held(report), report.request.target.name
    saw = held.evidence
    some = ", ".join(f"`{name}`" for name in saw["some_silent_workers"])
    more = saw["silent_workers"] - len(saw["some_silent_workers"])
    last = saw["last_sweep_at"]
    return "\n\n".join(
        (
            f"**See whether they live before you answer; nothing is lost by waiting.** Choose "
            f"“{MARK_THEM}” only if they are dead. If they live, choose “{LEAVE_THEM}”, or close "
            "this: the hold ends with the first sweep that hears of them.",
            f"{held.in_words()}{held.since_first}. "
            f"{counted(held.runs, 'run')} {'is' if held.runs == 1 else 'are'} not marked.",
            f"Silent: {some}{f' and {more} more' if more else ''}.",
            f"The server has been up since {saw['server_started_at']}"
            + (", after a failover" if saw["failed_over"] else "")
            + (f"; the sweep before was at {last}." if last else "; no sweep was before this one."),
            f"The same on the command line: `orphan-recovery approve {held.hold_id} --target "
            f"{target}`.",
        )
    )
