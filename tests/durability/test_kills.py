"""`kill -9` at any moment: every resume ends with the weights and moments of the run that nobody killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from loaded_python import run_loaded

CAMPAIGN = Path(__file__).with_name("kill_campaign.py")
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "kill-campaign.json"


def campaign(num_kills: int, directory: Path, *, seed: int) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = run_loaded(CAMPAIGN, num_kills, seed, directory, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, int] = json.loads(done.stdout)
    return result


def assert_nothing_lost(result: dict[str, int], num_kills: int) -> None:
    assert result["num_killed_by_time"] + result["num_killed_in_a_call"] >= num_kills
    assert result["num_different"] == 0 and result["num_refused"] == 0, result["problems"]
    assert result["num_finished"] > 0 and min(result["num_killed_by_time"], result["num_killed_in_a_call"]) > num_kills // 4


def test_200_kills_at_random_moments_change_no_bit(tmp_path: Path) -> None:
    assert_nothing_lost(campaign(200, tmp_path, seed=1), 200)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_1000_kills_change_no_bit_and_are_on_file(tmp_path: Path) -> None:
    result = campaign(1000, tmp_path, seed=2)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    assert_nothing_lost(result, 1000)
