"""Runs that an earlier version wrote (commit 8a75929, before the library had rooms) load, act alike and go on."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from launch import train
from worldloom import load_agent
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.runs.verify import verify

ARCHIVE = Path(__file__).resolve().parents[1] / "data" / "runs_before_rooms.tar.xz"  # 120 steps of Pendulum-v1 each


@pytest.fixture(params=["tdmpc2", "dreamerv3"])
def run_dir(request, tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param


def test_an_agent_of_an_earlier_run_acts_as_it_did(run_dir):
    agent, state, first = load_agent(run_dir), None, np.ones(3, bool)
    obs = np.array([[1, 0, 0], [0.6, -0.8, 1.5], [-1, 0, -4]], np.float32)
    for expected in json.loads((run_dir / "actions.json").read_text()):  # of that version
        agent.acting_generator.manual_seed(0)  # which drew in another order after the first numbers
        actions, state = agent.act(obs, state, first, explore=False)
        np.testing.assert_allclose(actions[:, 0], expected, rtol=1e-4, atol=1e-5)
        first = np.zeros(3, bool)


def test_an_earlier_run_goes_on(run_dir, capsys):
    before = read_manifest(newest_checkpoint(run_dir))
    assert verify(run_dir) == []
    assert train.main(["--resume", "--run-dir", str(run_dir), "--train.total_steps", "160"]) == 0
    assert "resumed from step-000000000120: 120 steps" in capsys.readouterr().out
    after = read_manifest(newest_checkpoint(run_dir))
    assert after["limiter"]["env_steps"] == 160
    assert after["limiter"]["updates"] > before["limiter"]["updates"]
    assert after["incarnation"] == before["incarnation"] + 1
    assert verify(run_dir) == []
