"""The flow that sweeps every target, each as a flow run of its own within one.

The hazard is one broken database that keeps all the others from being swept.
"""

import asyncio
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from orphan_recovery.flow import recover_orphaned_runs
from orphan_recovery.flow_hold import HELD
from orphan_recovery.names import ALL_FLOW_NAME
from orphan_recovery.request import DEFAULT_REASON, MAX_REASON_LENGTH
from orphan_recovery.targets import load_targets
from orphan_recovery.words import counted


@flow(name=ALL_FLOW_NAME, persist_result=False)
async def recover_all_targets(
    dry_run: bool = False,
    reason: Annotated[str, Field(min_length=1, max_length=MAX_REASON_LENGTH)] = DEFAULT_REASON,
    at_once: Annotated[int, Field(ge=1, le=64)] = 1,
) -> State[Any]:
    """Sweep every target in orphan-recovery.toml, each as a flow run of its own.

    A target whose database is broken fails its own flow run, and no other.

    Args:
        dry_run: Only look: list what would be judged and write nothing at all.
        reason: What the error text of each marked run begins with.
        at_once: Targets that are swept side by side. More than one needs a Prefect server that
            runs on Postgres: one on SQLite may stall for a minute.
    """
    targets = load_targets()
    places = asyncio.Semaphore(at_once)

    async def swept(name: str) -> State[Any]:
        sweep = recover_orphaned_runs.with_options(flow_run_name=f"sweep-{name}")
        async with places:
            return await sweep(target=name, dry_run=dry_run, reason=reason, return_state=True)

    states = dict(
        zip(targets, await asyncio.gather(*(swept(name) for name in targets)), strict=True)
    )
    failed = [name for name, state in states.items() if not (state.is_completed() or _held(state))]
    held = [name for name, state in states.items() if _held(state)]
    told = "; ".join(
        f"{name}: {(state.message or str(state.name)).removeprefix(f'{name}: ')}"
        for name, state in states.items()
    )
    every = counted(len(states), "target")
    if failed:
        message = f"{len(failed)} of {every} FAILED ({', '.join(failed)}). {told}"
        return Failed(message=message)
    if held:
        message = f"{len(held)} of {every} HELD ({', '.join(held)}). {told}"
        return Failed(name=HELD, message=message)
    return Completed(message=f"{every} {'looked at' if dry_run else 'swept'}. {told}")


def _held(state: State[Any]) -> bool:
    return state.name == HELD
