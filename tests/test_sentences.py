"""Errors that a newcomer meets: each says what was wrong, what was expected and what to do."""

import contextlib
import errno
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from launch.failures import sentence
from launch.train import main
from tests.own_families import ROOT
from tests.run_configs import TINY_YAML
from worldloom import create_world_model, load_agent
from worldloom.envs import make_env
from worldloom.nearest import nearest
from worldloom.training import read_episodes

both = pytest.mark.parametrize("preset", ["dreamerv3:size1m", "tdmpc2:1m"])


@pytest.mark.parametrize(
    ("module", "env_id", "extra"),
    [
        ("ale_py", "ALE/Pong-v5", "atari"),
        ("dm_control", "dm_control/walker-walk-v0", "dmc"),
        ("shimmy", "dm_control/walker-walk-v0", "dmc"),
        ("Box2D", "LunarLander-v3", "box2d"),
        ("mujoco", "Ant-v5", "mujoco"),
    ],
)
def test_environments_without_their_package_name_its_extra(module, env_id, extra, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.") and name.count(".") > 2]:
        monkeypatch.delitem(sys.modules, name)  # an environment imports its package only once
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{module} is not installed. Run: pip install 'worldloom\[{extra}\]'"):
        make_env(env_id)


def test_hdf5_and_commands_without_their_packages_name_their_extras(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.hdf5").write_bytes(b"")
    with pytest.raises(ImportError, match=r"h5py is not installed. Run: pip install 'worldloom\[data\]'"):
        list(read_episodes(tmp_path / "a.hdf5"))
    program = "import sys; sys.modules['yaml'] = None; import launch.status"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.stderr == "launch: yaml is not installed. Run: pip install 'worldloom[training]'\n"
    missing = ModuleNotFoundError("No module named 'ray'", name="ray")
    assert sentence(missing) == "ray is not installed. Run: pip install 'worldloom[training]'"


def test_only_near_names_are_suggested():
    keys = ["runtime.kind", "train.total_steps", "runtime"]
    assert nearest("train.totl_steps", keys) == ["train.total_steps"]
    assert nearest("run", keys) == nearest("train.tempo", keys) == []


def refused(tmp_path, capsys, *arguments):
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    with pytest.raises(SystemExit) as end:
        main(["--config", str(tmp_path / "tiny.yaml"), *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_run_directory_that_holds_a_run_is_no_misspelling(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    said = refused(tmp_path, capsys, "--run-dir", str(tmp_path / "run"))
    assert "already holds a run" in said
    assert "Did you mean" not in said


def test_a_run_directory_that_is_a_file_is_refused_without_an_errno(tmp_path, capsys):
    (tmp_path / "file").touch()
    said = refused(tmp_path, capsys, "--run-dir", str(tmp_path / "file"))
    assert said == f"launch.train: {tmp_path}/file is a file, expected a folder. Choose another place.\n"
    assert "lies in a file" in refused(tmp_path, capsys, "--run-dir", str(tmp_path / "file" / "run"))
    assert "disk is full" in sentence(OSError(errno.ENOSPC, "No space left on device", "a"))


@both
def test_a_device_that_is_not_there_is_named(preset, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=r"device is 'cuda', which cannot be used here: .*\. Use cpu\."):
        create_world_model(preset, obs_shape=(4,), action_dim=2, device="cuda")
    create_world_model(preset, obs_shape=(4,), action_dim=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device is 'cuda:3', which cannot be used here"):
        load_agent(tmp_path, device="cuda:3")


@both
@pytest.mark.parametrize(("part", "shape"), [("obs", r"\[B, T, …\]"), ("actions", r"\[B, T, A\]"), ("rewards", "")])
def test_a_batch_without_a_part_is_refused_by_name(preset, part, shape):
    batch = {"obs": torch.zeros(2, 5, 4), "actions": torch.zeros(2, 5, 2), "rewards": torch.zeros(2, 5)}
    del batch[part]
    with pytest.raises(ValueError, match=f"the batch lacks {part} {shape}.*it holds {', '.join(batch)}"):
        create_world_model(preset, obs_shape=(4,), action_dim=2).compute_loss(batch)


@both
def test_channel_last_images_are_refused_with_the_shape_to_use(preset):
    with pytest.raises(ValueError, match=r"obs_shape is \(64, 64, 3\), .*channels last.*obs_shape=\(3, 64, 64\)"):
        create_world_model(preset, obs_shape=(64, 64, 3), action_dim=2)
    with pytest.raises(ValueError, match=r"obs_shape=\(9, 64, 64\)"):  # three frames
        create_world_model(preset, obs_shape=(64, 64, 9), action_dim=2)


EPISODE = {"obs": np.ones((9, 40)), "actions": np.zeros((8, 2)), "rewards": np.ones(8), "dones": np.arange(8) == 7}


def test_broken_npz_files_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **{**EPISODE, "obs": np.random.default_rng(0).normal(size=(9, 40))})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.npz cannot be read: it is no zip file, or is cut short. Expected"):
        list(read_episodes(path))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as made:
        made.writestr("obs.npy", b"\x93NUMPY and nonsense")
    with pytest.raises(ValueError, match=r"a\.npz cannot be read: .*Save it again"):
        list(read_episodes(path))
    for at in range(100, len(whole) - 100, 61):  # whichever byte is damaged, there is no other kind of error
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(ValueError):  # a few bytes do not matter
            list(read_episodes(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"actions": np.zeros((3, 2))}, "actions: 3, rewards: 8, ends: 8, .* Expected as many of each"),
        ({"obs": np.float32(1)}, "observations: 1, actions: 8, episodes: 1. Expected 8 observations, or one more for"),
        ({"rewards": np.ones(2)}, "actions: 8, rewards: 2, ends: 8, .* Expected as many of each"),
    ],
)
def test_npz_files_whose_arrays_do_not_fit_say_how_many_they_hold(change, said, tmp_path):
    np.savez(tmp_path / "a.npz", **{**EPISODE, **change})
    with pytest.raises(ValueError, match=rf"a\.npz holds {said}"):
        list(read_episodes(tmp_path / "a.npz"))
