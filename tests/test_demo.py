"""The demo's own hazards: a claim that cannot fail, a process left behind, a borrowed address."""

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console

from orphan_recovery.demo.crew import CREW, Crew, Fate, hire
from orphan_recovery.demo.facts import Facts
from orphan_recovery.demo.guarantees import CHECKS, Scene, check_all
from orphan_recovery.demo.orchestrator import Orchestrator
from orphan_recovery.demo.processes import DemoFailed, Processes, harmless_environment
from orphan_recovery.demo.show import Show
from support import Database, until


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as processes:
        yield processes


@pytest.fixture
def facts(db: Database) -> Iterator[Facts]:
    with Facts(db.url) as facts:
        yield facts


@pytest.fixture
def crew(processes: Processes, facts: Facts, db: Database) -> Crew:
    """All workers of the demo, beating."""
    crew = hire(processes, facts, CREW, db.url)
    until(lambda: crew.all_beat(facts), "every worker to beat")
    return crew


def test_no_claim_holds_where_nothing_was_recovered(
    crew: Crew, processes: Processes, facts: Facts, db: Database, tmp_path: Path
) -> None:
    for part in crew.having(Fate.KILLED, Fate.LIVES):
        crew.process(part).kill()
    nowhere = Orchestrator(processes, tmp_path, db.url)
    checked = check_all(Scene(facts, nowhere, crew, (), timedelta(minutes=1), "a reason"))
    assert len(checked) == len(CHECKS)
    assert [claim.claim for claim in checked if claim.holds] == []


def test_nothing_that_was_started_is_left_behind_not_even_if_it_is_frozen(
    crew: Crew, processes: Processes
) -> None:
    crew.one(Fate.FROZEN)[1].send(signal.SIGSTOP)
    processes.end_all(patience=0.5)
    for child in crew.children.values():
        with pytest.raises(ProcessLookupError):
            os.kill(child.process.pid, 0)


def test_the_death_of_a_process_that_should_live_is_told_with_its_log(
    crew: Crew, processes: Processes
) -> None:
    _, child = crew.one(Fate.LIVES)
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait(30)
    with pytest.raises(DemoFailed, match=r"worker-6 ended of itself \(SIGKILL\)") as failure:
        processes.check()
    assert failure.value.log == child.log


def test_a_wait_that_is_in_vain_names_what_was_waited_for() -> None:
    show = Show(Console(quiet=True))
    with pytest.raises(DemoFailed, match=r"in vain for the moon \(half way\)"):
        show.wait_for("the moon", lambda: False, seconds=0, so_far=lambda: "half way")


def test_nothing_of_the_viewers_environment_reaches_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewers = ("DATABASE_URL", "ORPHAN_THRESHOLD_MINUTES", "PREFECT_API_URL", "PGOPTIONS")
    for name in viewers:
        monkeypatch.setenv(name, "theirs")
    before = dict(os.environ)
    with harmless_environment():
        assert "theirs" not in os.environ.values()
        assert "PATH" in os.environ
    assert dict(os.environ) == before
