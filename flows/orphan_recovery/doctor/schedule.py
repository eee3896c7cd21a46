"""Schedule: how often a target is swept, as the Prefect API tells it. Reads only."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from orphan_recovery.database import describe
from orphan_recovery.names import ALL_FLOW_NAME, ALL_TARGETS, FLOW_NAME
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target
from orphan_recovery.words import counted, span

CREDENTIALS: Final = (
    "set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY for Prefect Cloud, to what it asks for"
)
"""What to do about a Prefect API that answers 401 or 403."""
DEFAULT_INTERVAL: Final = timedelta(minutes=5)
"""Between sweeps, where nobody can be asked: what prefect.yaml says."""
OVERDUE: Final = timedelta(minutes=1)
"""After which a flow run that is still Scheduled is late, whatever its server calls it."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is known of a target's sweeps by schedule."""

    told: str
    every: timedelta | None = None
    """None where nothing is known, or nothing is scheduled."""
    way_out: str | None = None
    """What to do, where something is amiss."""


def look_up_schedule(target: Target) -> Schedule:
    """Ask the Prefect API which deployments sweep ``target``, and how often."""
    from prefect.settings import get_current_settings

    api = get_current_settings().api.url
    if not api:
        return Schedule(
            "no Prefect API is named, so no schedule is known",
            way_out="set PREFECT_API_URL, unless sweeps come from cron or from workers' start-ups",
        )
    try:
        deployments = _deployments(target)
        names = {deployment.id: deployment.name for deployment in deployments}
        late = _late(list(names)) if names else []
    except Exception as error:  # whatever the client makes of a server that is not there
        told = f"the Prefect API at {api} cannot be asked"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return Schedule(f"{told}: HTTP {status}", way_out=CREDENTIALS)
        told += f": {describe(error)}"
        return Schedule(told, way_out="see whether the server runs, and PREFECT_API_URL is right")
    if not deployments:
        return Schedule(
            f"the Prefect API at {api} has no deployment that sweeps this target",
            way_out="`prefect --no-prompt deploy --all`, for another target than the default one "
            "after adding it to prefect.yaml (it shows how); or `orphan-recovery serve`",
        )
    known = _by_interval(target, api, deployments)
    if not late:
        return known
    of = ", ".join(sorted({names[run.deployment_id] for run in late}))
    are = f"{counted(len(late), 'flow run')} of {of} {'is' if len(late) == 1 else 'are'} late"
    way_out = "see whether `prefect worker start` or `orphan-recovery serve` is up"
    return Schedule(
        f"{known.told}; {are}: nothing picks {'it' if len(late) == 1 else 'them'} up",
        known.every,
        f"{way_out}; {known.way_out}" if known.way_out else way_out,
    )


def _by_interval(target: Target, api: str, deployments: list[Any]) -> Schedule:
    names = ", ".join(sorted(deployment.name for deployment in deployments))
    intervals = [
        schedule.schedule.interval
        for deployment in deployments
        if not deployment.paused
        for schedule in deployment.schedules
        if schedule.active and hasattr(schedule.schedule, "interval")
    ]
    if not intervals and any(
        schedule.active
        for deployment in deployments
        if not deployment.paused
        for schedule in deployment.schedules
    ):
        return Schedule(f"deployments at {api}: {names}; on a schedule that is no interval")
    if not intervals:
        return Schedule(
            f"deployments at {api}: {names}; none has an interval schedule that is active",
            way_out="resume the schedule of its deployment in Prefect's UI; or, where there is "
            f"none, add one with the parameter target {target.name!r} to prefect.yaml (it shows "
            "how) and deploy it, or use `orphan-recovery serve`",
        )
    return Schedule(f"deployments at {api}: {names}; every {span(min(intervals))}", min(intervals))


def _late(deployment_ids: list[Any]) -> list[Any]:
    """Flow runs that were due, and that nobody has begun; a hundred at most."""
    from prefect import get_client
    from prefect.client.schemas import filters

    due = filters.FlowRunFilter(
        deployment_id=filters.FlowRunFilterDeploymentId(any_=deployment_ids),
        state=filters.FlowRunFilterState(
            name=filters.FlowRunFilterStateName(any_=["Late", "Scheduled"])
        ),
        expected_start_time=filters.FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=due, limit=100)
    since = datetime.now(UTC) - OVERDUE
    return [
        run
        for run in found
        if run.state_name == "Late" or (run.expected_start_time or since) < since
    ]


def _deployments(target: Target) -> list[Any]:
    from prefect import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import DeploymentSort

    flows = FlowFilter(name=FlowFilterName(any_=[FLOW_NAME, ALL_FLOW_NAME]))
    found: list[Any] = []
    with get_client(sync_client=True) as client:
        while page := client.read_deployments(  # the API gives them by the page
            flow_filter=flows, sort=DeploymentSort.CREATED_DESC, offset=len(found)
        ):
            found += page
    try:
        meant = find_target().name
    except ConfigurationError:  # several, and none of them is meant
        meant = None
    return [
        deployment
        for deployment in found
        if deployment.parameters.get("target") == target.name
        or (deployment.parameters.get("target") is None and target.name == meant)
        or deployment.name == ALL_TARGETS
    ]
