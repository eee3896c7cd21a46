"""The flow that replays thresholds, for a report that a schedule renews. Nothing imports it.

The hazard is a report that looks fresh and is not: what cannot be read fails the flow run, and
makes no artifact.
"""

from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field
from sqlalchemy.exc import DBAPIError

from orphan_recovery.backtest.measure import (
    DEFAULT_DAYS,
    MAX_DAYS,
    MOST_THRESHOLDS,
    backtest_target,
)
from orphan_recovery.backtest.report import as_dict, as_markdown, as_rows, headline
from orphan_recovery.database import describe
from orphan_recovery.names import BACKTEST_FLOW_NAME
from orphan_recovery.policy import retrying
from orphan_recovery.settings import MAX_THRESHOLD_MINUTES
from orphan_recovery.target import DEFAULT_TARGET
from orphan_recovery.targets import find_target

KEY = "orphan-recovery-backtest"


@flow(name=BACKTEST_FLOW_NAME, persist_result=False)
async def backtest_thresholds(
    target: Annotated[str, Field(min_length=1)] | None = None,
    thresholds: Annotated[
        list[Annotated[int, Field(ge=1, le=MAX_THRESHOLD_MINUTES)]],
        Field(min_length=1, max_length=MOST_THRESHOLDS),
    ]
    | None = None,
    days: Annotated[int, Field(ge=1, le=MAX_DAYS)] = DEFAULT_DAYS,
) -> State[Any]:
    """Say which threshold would have crashed runs that lived, and which one none. Reads only.

    Args:
        target: Which table, by its name in orphan-recovery.toml. Leave at None for the one that
            is meant by default.
        thresholds: Minutes of silence to replay. Leave at None for a ladder from 1 to 240. The
            target's own is always added.
        days: Only runs that ended, and verdicts that were given, in so many days.
    """
    meant = find_target(target)
    try:
        async for attempt in retrying():
            with attempt:
                tested = await backtest_target(meant, thresholds, days)
    except (DBAPIError, OSError) as error:  # its own text is the whole statement
        return Failed(message=describe(error))
    told = headline(tested)
    get_run_logger().info(told)
    key = KEY if meant.name == DEFAULT_TARGET else f"{KEY}-{meant.name.replace('_', '-')}"
    await acreate_markdown_artifact(key=key, markdown=as_markdown(tested))
    await acreate_table_artifact(key=f"{key}-table", table=as_rows(tested), description=told)
    return Completed(message=told, data=as_dict(tested))
