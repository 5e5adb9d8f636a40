"""Checkpoints whose files were damaged, at random: only equal state is loaded, or an error that names the file."""

import dataclasses
import json
import logging
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.run_configs import tiny_config
from worldloom import load_agent
from worldloom.encoding import pack
from worldloom.files import CheckpointError, checksum
from worldloom.manifest import checkpoints, newest_checkpoint, read_manifest
from worldloom.report.page import read_metrics
from worldloom.runs.config import CheckpointConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.verify import verify

CONFIG = tiny_config(checkpoint=CheckpointConfig(interval=150, keep=2))
FUZZ = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with two checkpoints, the second of which has two files of rows."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    InlineTrainer(CONFIG, folder).train()
    assert len(checkpoints(folder)) == len(read_manifest(newest_checkpoint(folder))["rows"][0]) == 2
    return folder


@pytest.fixture(scope="module")
def states(run_dir, tmp_path_factory):
    """Return what the older and the newer checkpoint hold."""
    older = tmp_path_factory.mktemp("run") / "older"
    shutil.copytree(run_dir, older)
    shutil.rmtree(newest_checkpoint(older))
    return [resumed(older), resumed(run_dir)]


def resumed(run_dir):
    """Return agent, replay and counts of a run that goes on, and the rows that it lost."""
    trainer = InlineTrainer(CONFIG, run_dir, resume=True)
    replay, rows = trainer.replay, len(trainer.replay)
    end = replay.accepted().rows
    run = trainer.run
    run.recorder.close()
    trainer.rollout.close()
    return {
        "agent": checksum(pack(trainer.agent.state_dict())),
        "limiter": run.limiter.state_dict(),
        "replay": checksum(pack([replay.state_dict(), replay.rows_between(end - rows, end)])),
        "lost": run.recorder.counters["rows_lost"],
    }


def outcome(function, *arguments):
    """Return a function's result, or the text of a CheckpointError, the only error that it may raise."""
    try:
        return function(*arguments), None
    except CheckpointError as error:
        return None, str(error)


def files_of(folder):
    """The files of a checkpoint, those of its rows first."""
    rows = [folder.parent / "rows" / name for shard in read_manifest(folder)["rows"] for name in shard]
    return [*rows, *sorted(path for path in folder.rglob("*") if path.is_file())]


def damage(path, other, how, where):
    data = path.read_bytes()
    at = int(where * (len(data) - 1))
    if how == "flip":
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:at], "empty": b"", "longer": data + b"\0", "swap": other.read_bytes()}[how])


@FUZZ
@given(
    file=st.integers(0, 100),
    other=st.integers(0, 100),
    how=st.sampled_from(["flip", "flip", "flip", "cut", "empty", "gone", "longer", "swap"]),
    where=st.floats(0, 1),
)
def test_damage_is_found_and_only_equal_state_is_loaded(run_dir, states, tmp_path, file, other, how, where):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_dir, copy)
    files = files_of(newest_checkpoint(copy))
    path, rows = files[file % len(files)], len(read_manifest(newest_checkpoint(copy))["rows"][0])
    before = path.read_bytes()
    damage(path, files[other % len(files)], how, where)
    if path.is_file() and path.read_bytes().strip() == before.strip():  # space around JSON means nothing
        return
    found, error = outcome(verify, copy)
    if path.name == "manifest.json" and how == "gone":  # without it, there is no checkpoint
        assert found == []
    else:
        assert path.name in (error or "\n".join(found))
    found, error = outcome(resumed, copy)
    if error:
        assert path.name in error
        return
    if file % len(files) < rows:
        first, last = map(int, path.stem.split("-")[1:])
        assert found == {**states[1], "replay": found["replay"], "lost": last - first}
        assert found["replay"] != states[1]["replay"]
    else:
        assert found == states[0]
        assert len(checkpoints(copy)) == 1  # the damaged one was set aside


@FUZZ
@given(
    file=st.integers(0, 100),
    how=st.sampled_from(["flip", "flip", "flip", "flip", "cut", "empty", "gone"]),
    where=st.floats(0, 1),
)
def test_a_checkpoint_without_checksums_fails_with_the_name_of_the_file(run_dir, tmp_path, file, how, where):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_dir, copy)
    shutil.rmtree(checkpoints(copy)[0])
    folder = newest_checkpoint(copy)
    manifest = read_manifest(folder)
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    files = files_of(folder)
    path = files[file % len(files)]
    damage(path, path, how, where)
    _, error = outcome(resumed, copy)
    assert any(text in (error or path.name) for text in (path.name, "is of another model", "holds no checkpoint"))


def test_a_damaged_agent_falls_back_to_the_checkpoint_before_and_says_so(run_dir, states, tmp_path, caplog):
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    older, newest = checkpoints(tmp_path)
    weights = load_agent(older / "agent").acting_weights()
    path = newest / "agent" / "model.safetensors"
    damage(path, path, "flip", 0.7)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(load_agent(tmp_path).acting_weights(), weights)
    assert f"{newest} is damaged (agent/model.safetensors has checksum" in caplog.text
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, total_steps=320))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"env_steps": 301, "upd')  # a line that a kill cut
    trainer = InlineTrainer(longer, tmp_path, resume=True)
    assert trainer.run.limiter.env_steps == 150
    assert trainer.train()["status"] == "completed"
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000000000300-1", "step-000000000320"]
    assert verify(tmp_path) == []
    kept = [line["env_steps"] for line in read_metrics(tmp_path)]
    assert kept == sorted(kept)  # the steps from 150 to 300, which were made twice, count once
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(kept) < len(written) - 1
    assert [json.loads(line)["resumed_at"] for line in written if "resumed_at" in line] == [150]


def test_earlier_checkpoints_that_cannot_be_deleted_cost_no_new_one(tmp_path, monkeypatch, caplog):
    """A store may refuse to delete while it takes what is written."""

    def refuse(folder):
        raise OSError("503 SlowDown")

    config = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(interval=100, keep=1))
    with monkeypatch.context() as patched:
        patched.setattr("worldloom.runs.checkpoint.remove_folder", refuse)
        summary = InlineTrainer(config, tmp_path).train()
    assert (summary["status"], summary["checkpoints_failed"]) == ("completed", 0)
    assert "earlier checkpoints cannot be deleted (503 SlowDown)" in caplog.text
    assert newest_checkpoint(tmp_path).name.startswith("step-000000000300")
    assert verify(tmp_path) == []


def test_where_no_checkpoint_is_whole_the_files_are_named(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    for folder in checkpoints(tmp_path):
        (folder / "learner.msgpack").unlink()
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    with pytest.raises(CheckpointError, match=r"step-000000000150 is damaged, too: learner\.msgpack"):
        InlineTrainer(CONFIG, tmp_path, resume=True)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == before  # a failed resume changes nothing
