"""Alive: cheap proof of life for a worker, and a fence for one that cannot give it.

    from orphan_recovery.alive import claim, keep_alive

    if await claim(run_id, worker_id):
        async with keep_alive(run_id, worker_id=worker_id) as alive:
            result = await work(alive)
            await alive.finish(output=result)

What it can wrongly do is beat for work that is dead: a thread of its own goes on beating while the
work hangs. So it proves that the process lives and reaches the database, not that the work gets
on; give work that may hang a time-out of its own.

Works in any worker, synchronous or not, without Prefect. See :mod:`orphan_recovery.alive.keep`.
"""

from orphan_recovery.alive.keep import Alive, keep_alive
from orphan_recovery.alive.lost import LostBy, RunLost
from orphan_recovery.alive.write import claim, claim_sync, finish_run, finish_run_sync

__all__ = [
    "Alive",
    "LostBy",
    "RunLost",
    "claim",
    "claim_sync",
    "finish_run",
    "finish_run_sync",
    "keep_alive",
]
