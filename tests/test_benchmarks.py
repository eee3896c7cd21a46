"""The benchmarks run, all of them, and tell well-formed figures. No time is judged here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.__main__ import SUBJECTS
from benchmarks.data import Fleet
from benchmarks.results import Goal, Result, as_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def told(server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the small form of all benchmarks wrote."""
    file = tmp_path_factory.mktemp("benchmarks") / "results.json"
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(file), "--only", *SUBJECTS],
        cwd=ROOT,
        env={**os.environ, "BENCH_DATABASE_URL": server},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def test_every_figure_is_a_number_with_its_sides(told: dict[str, Any]) -> None:
    names = [result["name"] for result in told["results"]]
    assert len(names) == len(set(names)) >= len(SUBJECTS)
    for result in told["results"]:
        sides = [side["values"] for side in result["sides"]]
        for values in (result["values"], *sides):
            assert values, result
            assert all(math.isfinite(value) for value in values), result


def test_the_small_form_judges_nothing_and_says_what_it_is(told: dict[str, Any]) -> None:
    assert told["quick"] is True
    assert {result["verdict"] for result in told["results"]} == {""}


def test_there_are_series_to_draw(told: dict[str, Any]) -> None:
    assert set(told["series"]) == {"rates", "detection by rows", "detection by in flight"}
    assert all(len(points) > 1 for points in told["series"].values())


@pytest.mark.parametrize(
    ("goal", "met", "missed"), [(Goal(1.5), 1.5, 1.51), (Goal(0.9, at_least=True), 0.9, 0.89)]
)
def test_a_goal_is_held_against_the_median(goal: Goal, met: float, missed: float) -> None:
    assert Result("a", [met, 0, 9], goal).verdict == "ok"
    assert Result("a", [missed, 0, 9], goal).verdict == "missed"
    assert as_table([Result("a", [met], goal)]).row_count == 1


def test_a_fleet_has_room_for_all_that_is_in_flight() -> None:
    with pytest.raises(AssertionError):
        Fleet(1_000, 10)
