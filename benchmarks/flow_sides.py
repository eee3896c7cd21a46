"""The sides that need Prefect, each in a process of its own that waits for the word to go.

    python -m benchmarks.flow_sides recover _ N    N: above so many orphans, slices; 0: as ever
    python -m benchmarks.flow_sides empty N _      N empty tasks
    python -m benchmarks.flow_sides targets N _    every target, N at once

The hazard is an empty flow that is dearer than it need be: it is built the way the product's is
(async tasks, side by side, as many at once, the same retries), which is the cheapest there is.
"""

import asyncio
import sys
from inspect import signature
from typing import Any, Final

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from benchmarks.sides import THRESHOLD_MINUTES, serve
from orphan_recovery.all_targets_flow import recover_all_targets
from orphan_recovery.flow import TASKS_AT_ONCE, recover_orphaned_runs
from orphan_recovery.policy import retry_plan

CAN_SLICE: Final = "task_each_up_to" in signature(recover_orphaned_runs.fn).parameters


def recover(_: int, task_each_up_to: int) -> int:
    """The product's flow."""
    options: dict[str, Any] = {"task_each_up_to": task_each_up_to} if task_each_up_to else {}

    async def recovered() -> State[Any]:
        return await recover_orphaned_runs(
            threshold_minutes=THRESHOLD_MINUTES, return_state=True, **options
        )

    state = asyncio.run(recovered())
    if not state.is_completed():
        raise SystemExit(f"{state.name}: {state.message}")
    return 0


def targets(at_once: int, _: int) -> int:
    """The product's flow of all targets."""

    async def swept() -> State[Any]:
        return await recover_all_targets(at_once=at_once, return_state=True)

    state = asyncio.run(swept())
    if not state.is_completed():
        raise SystemExit(f"{state.name}: {state.message}")
    return 0


async def _worth_retrying(*_: Any) -> bool:
    return False


_PLAN: Final = retry_plan()


@task(
    name="empty",
    retries=_PLAN.retries,
    retry_delay_seconds=exponential_backoff(_PLAN.backoff_factor),
    retry_jitter_factor=_PLAN.jitter,
    retry_condition_fn=_worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def nothing() -> None:
    """Does nothing."""


@flow(name="empty-tasks", persist_result=False)
async def empty_tasks(number: int) -> State[Any]:
    """So many empty tasks, side by side."""
    at_once = asyncio.Semaphore(TASKS_AT_ONCE)

    async def one() -> State[Any]:
        async with at_once:
            return await nothing(return_state=True)  # type: ignore[misc, no-any-return]

    await asyncio.gather(*(one() for _ in range(number)))
    return Completed(message="done")


def empty(number: int, _: int) -> int:
    asyncio.run(_ended(number))
    return number


async def _ended(number: int) -> None:
    await empty_tasks(number, return_state=True)


if __name__ == "__main__":
    side = {"recover": recover, "empty": empty, "targets": targets}[sys.argv[1]]
    serve(lambda: side(*map(int, sys.argv[2:])))
