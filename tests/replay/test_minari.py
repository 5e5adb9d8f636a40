"""Datasets that the Minari library wrote, read as episodes for replay."""

import copy
import json
import sys

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from worldloom.spaces import ActionCodec
from worldloom.training import ReplayBuffer, read_episodes, read_minari

JOINTS = spaces.Box(-np.inf, np.inf, (2, 3), np.float32)
NUMBER = spaces.Box(-np.inf, np.inf, (1,), np.float32)
EVERYTHING = spaces.Dict(
    {"joints": JOINTS, "room": spaces.Discrete(20, start=1), "camera": spaces.Box(0, 255, (8, 8, 3), np.uint8)}
)
TORQUES = spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))


def seen(space, length):
    """Observations of steps 0 to `length`: the number of the step, in every entry of every kind."""
    steps = np.arange(length + 1)
    kinds = {
        "joints": np.broadcast_to(steps[:, None, None], (length + 1, 2, 3)).astype(np.float32),
        "room": steps + 1,
        "camera": np.broadcast_to(20 * steps[:, None, None, None], (length + 1, 8, 8, 3)).astype(np.uint8),
    }
    return {key: kinds[key] for key in space.spaces} if isinstance(space, spaces.Dict) else kinds["joints"][:, 0, :1]


def record(folder, monkeypatch, action_space, actions, observation_space=NUMBER, data_format="hdf5", timed_out=False):
    """Record an episode for each row of `actions`, with a reward of ten times the step; return Minari's dataset."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    recorded = []
    for episode in actions:
        last = np.arange(len(episode)) == len(episode) - 1
        rewards = [10.0 * step for step in range(1, len(episode) + 1)]
        flags = {"terminations": list(last & (not timed_out)), "truncations": list(last & timed_out)}
        obs = seen(observation_space, len(episode))
        recorded.append(EpisodeBuffer(observations=obs, actions=np.asarray(episode), rewards=rewards, **flags))
    return minari.create_dataset_from_buffers(
        "tests/steps-v0", recorded, observation_space=observation_space, action_space=action_space,
        data_format=data_format, jpeg_encoding=False, description="d", author="a", author_email="a@b.c",
    )  # fmt: skip


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_rows_arrive_as_in_the_environment(tmp_path, monkeypatch, data_format):
    actions = np.stack([np.linspace([-2, 0], [2, 10], 5)] * 2).astype(np.float32)
    made = record(tmp_path, monkeypatch, TORQUES, actions, data_format=data_format)
    for source in (made, tmp_path / "tests/steps-v0", tmp_path / "tests/steps-v0/data"):
        buffer = ReplayBuffer.from_trajectories(read_minari(source))
        rows = buffer.rows_between(0, 12)
        steps = [0, 1, 2, 3, 4, 5] * 2
        assert rows["obs"][:, 0].tolist() == steps
        assert rows["rewards"].tolist() == [10 * step for step in steps]
        assert rows["actions"][1:6].tolist() == [[x, x] for x in (-1, -0.5, 0, 0.5, 1)]
        assert rows["is_first"].nonzero()[0].tolist() == [0, 6]
        assert rows["terminated"].nonzero()[0].tolist() == [5, 11]
        assert not rows["truncated"].any()
    assert len(list(read_episodes(tmp_path / "tests/steps-v0"))) == 2


def test_time_limits_end_truncated_and_chosen_episodes_are_read_alone(tmp_path, monkeypatch):
    made = record(tmp_path, monkeypatch, TORQUES, np.zeros((3, 4, 2), np.float32), timed_out=True)
    rows = ReplayBuffer.from_trajectories(read_minari(made)).rows_between(0, 15)
    assert rows["truncated"].nonzero()[0].tolist() == [4, 9, 14]
    assert not rows["terminated"].any()
    assert len(list(read_minari(minari.split_dataset(made, sizes=[1, 2])[1]))) == 2


@pytest.mark.parametrize("data_format", ["hdf5", "parquet"])
def test_mappings_of_images_choices_and_numbers_are_read(tmp_path, monkeypatch, data_format):
    choices = spaces.Discrete(4, start=-1)
    made = record(tmp_path, monkeypatch, choices, [[-1, 0, 1, 2, 0]], EVERYTHING, data_format=data_format)
    buffer = ReplayBuffer.from_trajectories(read_minari(made))
    rows = buffer.rows_between(0, 6)
    assert buffer.obs_shape == {"camera": (3, 8, 8), "joints": (6,), "room": ()}
    assert rows["obs/camera"].dtype == np.uint8
    for name, factor in (("camera", 20), ("joints", 1), ("room", 1)):
        assert (rows[f"obs/{name}"].reshape(6, -1) == factor * np.arange(6)[:, None]).all()
    assert rows["actions"][1:].argmax(1).tolist() == [0, 1, 2, 3, 1]
    assert buffer.action_dim == 4


@pytest.mark.parametrize(
    "space",
    [
        TORQUES, spaces.Discrete(5, start=3), spaces.MultiDiscrete([3, 2, 4]), spaces.MultiBinary(3),
        spaces.MultiDiscrete([[3, 2], [4, 2]]), spaces.Box(-1, np.array([[np.inf, 1]], np.float32)),
    ],
)  # fmt: skip
def test_rows_of_actions_are_the_inverse_of_native(space):
    space.seed(0)
    codec = ActionCodec("this", space)
    native = [np.clip(space.sample(), -1, 1) if isinstance(space, spaces.Box) else space.sample() for _ in range(50)]
    rows = codec.rows(np.array(native))
    assert rows.shape == (50, codec.size)
    assert np.abs(rows).max() <= 1
    for row, action in zip(rows, native, strict=True):
        np.testing.assert_allclose(codec.native(row), action, atol=1e-6)


def test_actions_of_another_space_are_refused():
    with pytest.raises(ValueError, match="actions run from 2 to 8, expected Discrete"):
        ActionCodec("this", spaces.Discrete(5, start=3)).rows(np.array([2, 8]))
    with pytest.raises(ValueError, match=r"actions are \(7, 3\), expected L of shape \(2,\)"):
        ActionCodec("this", TORQUES).rows(np.zeros((7, 3)))


@pytest.mark.parametrize("data_format", ["hdf5", "parquet"])
def test_damaged_datasets_are_refused_with_the_episode(tmp_path, monkeypatch, data_format):
    record(tmp_path, monkeypatch, TORQUES, np.zeros((3, 5, 2), np.float32), data_format=data_format)
    path = tmp_path / "tests/steps-v0/data"
    data = path / ("main_data.hdf5" if data_format == "hdf5" else "1/part-0.parquet")
    whole = data.read_bytes()
    for wrong in (whole[: len(whole) // 2], b"no"):
        data.write_bytes(wrong)
        with pytest.raises(ValueError, match="episode . cannot be read"):
            list(read_minari(path))
    data.unlink()
    with pytest.raises(ValueError, match=r"steps-v0/data"):
        list(read_minari(path))


def test_numbers_that_are_not_finite_are_refused_with_the_episode(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "seen", lambda space, length: np.full((length + 1, 1), np.nan, np.float32))
    made = record(tmp_path, monkeypatch, TORQUES, np.zeros((1, 5, 2), np.float32))
    with pytest.raises(ValueError, match="steps-v0: episode 0 cannot be read: .*the observation came with NaN"):
        list(read_minari(made))


def test_metadata_that_would_make_an_environment_is_refused(tmp_path, monkeypatch):
    record(tmp_path, monkeypatch, TORQUES, np.zeros((1, 5, 2), np.float32))
    path = tmp_path / "tests/steps-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    spec = copy.deepcopy(gymnasium.spec("CartPole-v1"))
    spec.entry_point = "os:getcwd"
    without = {k: v for k, v in metadata.items() if k != "action_space"} | {"env_spec": spec.to_json()}
    monkeypatch.setattr(gymnasium, "make", lambda *a, **k: pytest.fail("an environment was made"))
    for wrong, message in [
        (json.dumps(without), "it has no action_space"), ("{", "is no metadata of a Minari dataset"),
        (json.dumps({**metadata, "data_format": "tape"}), "metadata.json is no metadata"), ("[]", "is no metadata"),
        (json.dumps({**metadata, "action_space": '{"type": "Rope"}'}), "metadata.json is no metadata"),
        (json.dumps({**metadata, "minari_version": "9.9"}), "does not support"),
    ]:  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            list(read_minari(tmp_path / "tests/steps-v0"))


def test_what_is_no_dataset_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        list(read_minari(tmp_path / "absent"))
    with pytest.raises(ValueError, match="is no dataset of Minari: it has no data/metadata.json"):
        list(read_minari(tmp_path))
    record(tmp_path, monkeypatch, TORQUES, np.zeros((1, 5, 2), np.float32))
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"minari is not installed. Run: pip install 'worldloom\[data\]'"):
        list(read_minari(tmp_path / "tests/steps-v0"))
