"""Serve and trigger: the flow's deployments from one process, and one run of them for a pipeline.

The hazard is a pipeline that goes on although the sweep did not end well, or that cannot say
where to look: the address of the flow run is told first, and only a Completed end is good.
"""

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final

import httpx
from prefect import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runner import Runner
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.urls import url_for

from orphan_recovery.all_targets_flow import recover_all_targets
from orphan_recovery.doctor.schedule import CREDENTIALS, DEFAULT_INTERVAL
from orphan_recovery.flow import recover_orphaned_runs
from orphan_recovery.flow_hold import HELD
from orphan_recovery.names import (
    ALL_FLOW_NAME,
    ALL_TARGETS,
    FLOW_NAME,
    ON_DEMAND,
    SCHEDULED,
    TRIGGERED,
)
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import DEFAULT_TARGET
from orphan_recovery.targets import find_target, load_targets

ANCHOR: Final = datetime(2026, 1, 1, tzinfo=UTC)
POLL_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 5.0
"""How much longer than it was told to a pipeline waits for the server's last answer."""
LEAVING_SECONDS: Final = 20.0
"""How long sweeps may go on once `serve` is told to stop."""
_HELD_IN_WORDS: Final = re.compile(
    r"(?:(?P<target>[a-z][a-z0-9_-]*): )?HELD: .*?\(hold (?P<hold>[0-9a-f-]{36})\)"
)
"""A report's headline, by itself or among those of other targets."""


async def serve_deployments(tell: Callable[[str], None] = print) -> None:
    """Offer the deployments from this process and run what they start, until interrupted.

    One on a schedule for each target, and those that run on demand. On SIGTERM it starts no more
    sweeps, and gives those at work some seconds to end; what runs then still, ends as Cancelled.

    Args:
        tell: called with a line for people once all is offered.

    Raises:
        ConfigurationError: no Prefect API is configured or reachable, or it refused a deployment.
    """
    api = _require_api()
    about: dict[str, Any] = {
        "entrypoint_type": EntrypointType.MODULE_PATH,
        "tags": ["orphan-recovery"],
    }
    meant = _meant_by_default()
    scheduled = [
        await recover_orphaned_runs.ato_deployment(
            name=SCHEDULED if name == meant else f"{SCHEDULED}-{name}",
            parameters={} if name == meant else {"target": name},
            # A fixed anchor and a slug: a restart neither puts the next sweep off nor wakes a
            # schedule that a person paused.
            schedules=[
                DeploymentScheduleCreate(
                    slug="every-five-minutes",
                    schedule=IntervalSchedule(interval=DEFAULT_INTERVAL, anchor_date=ANCHOR),
                )
            ],
            # A second sweep beside a first is harmless but of no use: it is not piled up.
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
            **about,
        )
        for name in load_targets()
    ]
    on_demand = await recover_orphaned_runs.ato_deployment(name=ON_DEMAND, **about)
    every_target = await recover_all_targets.ato_deployment(name=ALL_TARGETS, **about)
    # Not paused on shutdown: the schedule belongs to every process that serves it, and one that
    # stops in a rolling deploy must not silence the others.
    runner = _Runner(pause_on_shutdown=False, limit=None)
    deployments = (*scheduled, on_demand, every_target)
    async with _refused_in_a_line(api, "take the deployments"):
        for deployment in deployments:
            await runner.aadd_deployment(deployment)
    names = ", ".join(f"{offered.flow_name}/{offered.name}" for offered in deployments)
    tell(f"serving {names} for {api}, until interrupted")
    await runner.start()


class _Runner(Runner):
    """Prefect's own, but that it stops in order.

    Prefect's handler of SIGTERM ends the process at once: a sweep is killed, and its flow run is
    taken for one that runs still, so that the next ones by schedule are cancelled.
    """

    _leaving: "asyncio.Task[None] | None" = None

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        """Called amid the event loop's work, wherever that is."""
        if not self.started:
            sys.exit(0)
        asyncio.get_running_loop().call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self._leaving = self._leaving or asyncio.create_task(self._let_them_end())

    async def _let_them_end(self) -> None:
        self._logger.info("told to stop: no more sweeps are started, and those at work may end")
        try:  # by what is Prefect's own: where a later one has other names, it stops all the same
            self._scheduled_run_poller.stopping = True
            for _ in range(round(LEAVING_SECONDS / 0.1)):
                if not self._process_manager.flow_run_ids():
                    break
                await asyncio.sleep(0.1)
        finally:
            await self.astop()


def _meant_by_default() -> str | None:
    try:
        return find_target().name
    except ConfigurationError:  # several, and none of them is meant
        return None


async def trigger_sweep(
    parameters: dict[str, Any],
    *,
    every_target: bool = False,
    wait: bool,
    timeout_seconds: float,
    tell: Callable[[str], None],
) -> FlowRun:
    """Start the on-demand deployment.

    Args:
        parameters: of the flow; what is left out takes the deployment's own value.
        every_target: start the flow that sweeps all targets instead.
        wait: stay until the flow run has ended.
        timeout_seconds: how long to wait at most, in seconds; the flow run goes on all the same.
        tell: called with a line for people: the flow run's address, then each state it enters.

    Returns:
        The flow run as it last was.

    Raises:
        ConfigurationError: no Prefect API is configured or reachable, it has no such deployment,
            or it refused the parameters.
        WaitingFailed: the API was lost while waiting.
    """
    api = _require_api()
    deployment = f"{FLOW_NAME}/{ON_DEMAND}"
    if every_target:
        deployment = f"{ALL_FLOW_NAME}/{ALL_TARGETS}"
    async with _refused_in_a_line(api, f"start {deployment!r}"):
        try:
            run = await arun_deployment(
                deployment, parameters=parameters, timeout=0, as_subflow=False, tags=[TRIGGERED]
            )
        except ObjectNotFound:
            if not await _is_api():
                raise
            raise ConfigurationError(
                f"there is no deployment {deployment!r} at {api}: run `prefect --no-prompt deploy "
                "--all` or `orphan-recovery serve`"
            ) from None
    tell(f"flow run {run.name}: {url_for(run) or run.id}")
    if not wait:
        return run
    try:
        return await _follow(run, timeout_seconds, tell)
    except (PrefectHTTPStatusError, httpx.TransportError, TimeoutError) as error:
        raise WaitingFailed(
            f"the Prefect API at {api} was lost while waiting ({_detail(error)}); flow run "
            f"{run.name} goes on all the same: look there, or trigger again"
        ) from None


def releases(message: str) -> list[str]:
    """The commands that release what a held flow run's message names: copied, they run as they
    are."""
    return [
        f"orphan-recovery approve {found['hold']} --target {found['target'] or DEFAULT_TARGET}"
        for found in _HELD_IN_WORDS.finditer(message)
    ]


async def where_summary_is(run: FlowRun) -> str | None:
    """The address of the artifact that says what was done, and what is to be done next.

    None where the flow run left none, as one that failed before it began to sweep, or where the
    Prefect API cannot be asked any more.
    """
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    try:
        async with asyncio.timeout(ANSWER_SECONDS), get_client() as client:
            left = await client.read_artifacts(flow_run_filter=mine)
    except (PrefectHTTPStatusError, httpx.TransportError, TimeoutError):
        return None
    found = next((one for one in left if (one.key or "").endswith("-summary")), None)
    if found is None:
        return None
    page = url_for(run)  # of artifacts Prefect builds no addresses; they are beside its flow runs
    return f"{page.partition('/runs/')[0]}/artifacts/artifact/{found.id}" if page else found.key


class WaitingFailed(ConnectionError):  # noqa: N818 - named for what a pipeline reads
    """A sweep was started, and how it ends is not known here."""


async def _follow(run: FlowRun, timeout_seconds: float, tell: Callable[[str], None]) -> FlowRun:
    give_up_at = time.monotonic() + timeout_seconds
    told = None
    # Prefect's client tries again for minutes, where the server is not there any more.
    async with asyncio.timeout(timeout_seconds + ANSWER_SECONDS), get_client() as client:
        while True:
            run = await client.read_flow_run(run.id)
            if run.state_name != told:
                told = run.state_name
                tell(f"{told}{': ' + run.state.message if run.state and run.state.message else ''}")
            held = run.state and run.state.name == HELD
            if held or (run.state and run.state.is_final()) or time.monotonic() > give_up_at:
                return run
            await asyncio.sleep(min(POLL_SECONDS, max(0, give_up_at - time.monotonic())))


def _require_api() -> str:
    """Without an address Prefect would start a server of its own, that nobody else sees."""
    api = get_current_settings().api.url
    if not api:
        raise ConfigurationError(
            "no Prefect API: set PREFECT_API_URL, such as http://127.0.0.1:4200/api for "
            "`prefect server start`"
        )
    return api


@asynccontextmanager
async def _refused_in_a_line(api: str, doing: str) -> AsyncIterator[None]:
    """Raise what comes of an API that is not there, or that refuses, as a ConfigurationError."""
    try:
        yield
    except httpx.TransportError as error:
        raise ConfigurationError(
            f"the Prefect API at {api} cannot be reached ({type(error).__name__}): see whether "
            "the server runs, and whether PREFECT_API_URL is right"
        ) from None
    except (ObjectNotFound, PrefectHTTPStatusError) as error:
        refused = error if isinstance(error, PrefectHTTPStatusError) else error.http_exc
        if not await _is_api():
            raise ConfigurationError(
                f"{api} is no Prefect API: does PREFECT_API_URL end in /api?"
            ) from None
        raise ConfigurationError(f"{api} refused to {doing}: {_detail(refused)}") from None


async def _is_api() -> bool:
    """Whether a Prefect server answers there; yes also where that cannot be told."""
    async with get_client() as client:
        error = await client.api_healthcheck()
    status = error.response.status_code if isinstance(error, PrefectHTTPStatusError) else None
    return status != httpx.codes.NOT_FOUND


def _detail(error: Exception) -> str:
    if not isinstance(error, PrefectHTTPStatusError):
        return type(error).__name__
    status = f"HTTP {error.response.status_code}"
    if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return f"{status}: {CREDENTIALS}"
    try:
        detail = error.response.json()
        kinds = ("detail", "exception_detail", "exception_message")
        return str(next((detail[kind] for kind in kinds if detail.get(kind)), detail))
    except (ValueError, AttributeError):
        return status
