"""The invariants of a run, each broken on purpose."""

import re
import shutil

import pytest

from launch import status
from tests.run_configs import dreamer_config, tiny_config
from worldloom.files import CheckpointError, read_msgpack, write_msgpack
from worldloom.manifest import newest_checkpoint, read_manifest, write_manifest
from worldloom.runs.config import TrainConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.verify import verify


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified")
    InlineTrainer(tiny_config(), folder).train()
    return folder


def change(run_dir, tmp_path, name, edit):
    """A copy of the run with one file of its checkpoint edited, and the checksums to it."""

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    folder = newest_checkpoint(copy)
    manifest = read_manifest(folder)
    path = folder / (f"../rows/{manifest['rows'][0][0]}" if name == "rows" else name)
    value = manifest if name == "manifest.json" else read_msgpack(path)
    edit(value)
    if value is not manifest:
        manifest["files"][f"../rows/{path.name}" if name == "rows" else name] = write_msgpack(path, value)
    write_manifest(folder, manifest)
    return copy


def set_at(*keys, value):
    def edit(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return edit


def lose_an_end(rows):
    rows["terminated"][rows["terminated"].nonzero()[0][0]] = False


def go_on_after_an_end(rows):
    rows["is_first"][rows["is_first"].nonzero()[0][3]] = False


def end_twice(rows):
    rows["truncated"][rows["terminated"].nonzero()[0][0]] = True


def reward_a_start(rows):
    rows["rewards"][rows["is_first"].nonzero()[0][2]] = 1.0


@pytest.mark.parametrize(
    "config", [tiny_config(), dreamer_config(train=TrainConfig(total_steps=200, train_ratio=4, learning_starts=100))]
)
def test_a_run_without_faults_keeps_them_all(config, tmp_path):
    InlineTrainer(config, tmp_path).train()
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("manifest.json", set_at("limiter", "env_steps", value=299), "I1: 299 steps are reported, but replay accepted"),
        ("replay-0.msgpack", set_at("steps", value=10), "I1: replay counts 10 steps, but its rows hold 30"),
        ("replay-0.msgpack", set_at("sequence", value=[[0, 0, 1], [0, 0, 2]]), "I2: an actor has two last chunks"),
        ("rows", lose_an_end, "I3: actor 0, environment .: an episode starts where the one before has no end"),
        ("rows", go_on_after_an_end, "I3: actor 0, environment .: an episode goes on after its end"),
        ("rows", end_twice, "I3: actor 0, environment .: a row is both terminated and truncated"),
        ("rows", reward_a_start, "I3: actor 0, environment .: a start has an action or a reward"),
        ("manifest.json", set_at("limiter", "updates", value=160), "I4: 160 updates were made, but the train ratio"),
        ("learner.msgpack", set_at("updates", value=7), "I6: the learner made 7 updates, the manifest counts 150"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(run_dir, name, edit, words, tmp_path):
    broken = "\n".join(verify(change(run_dir, tmp_path, name, edit)))

    assert re.search(words, broken), broken


def test_the_status_command_verifies(run_dir, tmp_path, capsys):
    from launch.arguments import dump_config

    (run_dir / "config.yaml").write_text(dump_config(tiny_config()))
    assert status.main(["--run-dir", str(run_dir), "--verify"]) == 0
    assert "invariants            hold" in capsys.readouterr().out
    bad = change(run_dir, tmp_path, "learner.msgpack", set_at("updates", value=7))
    assert status.main(["--run-dir", str(bad), "--verify"]) == 1
    assert "broken                I6" in capsys.readouterr().out
    with pytest.raises(CheckpointError):
        verify(tmp_path)
