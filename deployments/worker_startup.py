"""A worker that recovers what others lost before it takes work of its own. An example.

Any number of workers may do this at once, and none is kept from starting by it: neither a bad
run nor a lost database raises.
"""

import asyncio
import logging

from orphan_recovery import recover_orphaned_runs
from orphan_recovery.log import EventFormatter

log = logging.getLogger("worker")


async def start() -> None:
    report = await recover_orphaned_runs()
    log.log(
        logging.ERROR if report["error"] or report["failed"] else logging.INFO,
        "recovery at start: %s",
        report["message"],
    )
    await take_runs()


async def take_runs() -> None:
    """Your worker goes here."""
    log.info("ready for runs")


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.setFormatter(EventFormatter())  # what an event is about is in its fields
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    asyncio.run(start())
