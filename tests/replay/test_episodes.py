"""Recorded episodes: buffers made from them, sequences of any length, files of other libraries."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from tests.recorded import cartpole_episodes
from worldloom.training import ReplayBuffer, read_episodes
from worldloom.types import WindowSpec


def counting(length, begin=0):
    """obs counts up from `begin`; the action that led to it is a two-thousandth of it, the reward ten times it."""
    obs = np.arange(begin, begin + length + 1, dtype=np.float32)[:, None]
    dones = np.arange(length) == length - 1
    return {"obs": obs, "actions": obs[1:] / 2000, "rewards": 10 * obs[1:, 0], "dones": dones}


def same_rows(a, b):
    end = a.accepted().rows
    begin = end - len(a)
    first, second = a.rows_between(begin, end), b.rows_between(begin, end)
    return first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


# Sequences of any length


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("capacity", [25, 200])
def test_sequences_of_any_length_are_drawn_uniformly(crosses, capacity):
    buffer = ReplayBuffer(capacity, (1,), 1, windows=WindowSpec(4, 0, crosses))
    for number, length in enumerate([3, 9, 5, 14]):  # 35 rows: the smaller ring wraps
        buffer.add_episode(**counting(length, 100 * number))
    rows = buffer.rows_between(max(35 - capacity, 0), 35)
    for length in (1, 2, 6, 15):
        breaks = rows["is_first"].astype(int)
        valid = [i for i in range(len(breaks) - length + 1) if crosses or not breaks[i + 1 : i + length].any()]
        drawn = buffer.sample(4000, length, rng=np.random.default_rng(0))
        assert drawn["obs"].shape == (4000, length, 1)
        starts = {float(rows["obs"][i, 0]): 0 for i in valid}
        for start in drawn["obs"][:, 0, 0].tolist():
            starts[start] += 1
        assert len(starts) == len(valid)
        assert min(starts.values()) > 0.5 * 4000 / len(valid)
        steps = torch.arange(length)
        if not crosses:
            assert (drawn["obs"][..., 0] == drawn["obs"][:, :1, 0] + steps).all()
            assert (drawn["rewards"] == torch.where(drawn["is_first"], 0, 10 * drawn["obs"][..., 0])).all()
    buffer.add_episode(**counting(20, 900))
    assert crosses or (buffer.sample(50, 15)["obs"] >= 900).any()  # what was known of lengths is found anew


def test_lengths_that_no_episode_has_are_refused_with_the_longest():
    buffer = ReplayBuffer(200, (1,), 1)
    buffer.add_episode(**counting(9))
    buffer.add_episode(**counting(4))
    with pytest.raises(ValueError, match="no complete window of 11: the longest has 10"):
        buffer.sample(4, 11)
    with pytest.raises(ValueError, match="no complete window of 50"):
        buffer.sample(4)
    with pytest.raises(ValueError, match="seq_len is 0"):
        buffer.sample(4, 0)
    with pytest.raises(ValueError, match="batch_size is -1"):
        buffer.sample(-1, 4)
    with pytest.raises(ValueError, match="the longest has 0"):
        ReplayBuffer(200, (1,), 1).sample(4, 2)


def test_a_buffer_may_be_smaller_than_the_default_sequence():
    buffer = ReplayBuffer(capacity=10, obs_shape=(1,), action_dim=1)
    buffer.add_episode(**counting(5))
    assert buffer.sample(batch_size=3, seq_len=6, device="cpu")["obs"].shape == (3, 6, 1)


@pytest.mark.parametrize(
    "sizes", [{"capacity": 0}, {"capacity": -5}, {"action_dim": 0}, {"obs_shape": (0,)}, {"obs_shape": (-1, 3)}]
)
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="expected .*at least 1"):
        ReplayBuffer(**{"capacity": 10, "obs_shape": (1,), "action_dim": 1, **sizes})


# Discrete actions


def test_integer_actions_become_one_hot():
    episode = cartpole_episodes(1)[0]
    buffer = ReplayBuffer(1000, (4,), 2)
    buffer.add_episode(**episode)
    rows = buffer.rows_between(1, len(buffer))
    assert (rows["actions"].argmax(1) == episode["actions"]).all()
    assert (rows["actions"].sum(1) == 1).all()
    for wrong in (2, -1):
        bad = {**episode, "actions": np.where(np.arange(len(episode["actions"])) == 0, wrong, episode["actions"])}
        with pytest.raises(ValueError, match="expected integers from 0 to 1"):
            buffer.add_episode(**bad)
    assert buffer.num_episodes == 1


# Files


@pytest.mark.parametrize("capacity", [12, 200])
def test_a_saved_buffer_draws_as_before(capacity, tmp_path):
    buffer = ReplayBuffer(capacity, (1,), 1, windows=WindowSpec(3, 0, False), seed=3)
    for number in range(4):
        buffer.add_episode(**counting(5, 100 * number))
    buffer.sample(7)
    buffer.save(tmp_path / "data.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]
    again = ReplayBuffer.load(tmp_path / "data.bin")
    assert same_rows(buffer, again)
    assert (again.num_episodes, len(again), again.windows) == (4, len(buffer), buffer.windows)
    assert (buffer.sample(50)["obs"] == again.sample(50)["obs"]).all()
    assert (buffer.sample(50, 2)["obs"] == again.sample(50, 2)["obs"]).all()
    again.add_episode(**counting(5, 900))
    assert again.num_episodes == 5


def test_an_empty_buffer_is_saved_and_loaded(tmp_path):
    ReplayBuffer(100, obs_shape=(4,), action_dim=2).save(tmp_path / "empty.npz")
    again = ReplayBuffer.load(tmp_path / "empty.npz")
    assert again.accepted().rows == 0
    again.add_episode(obs=np.zeros((6, 4)), actions=np.zeros((5, 2)), rewards=np.zeros(5), dones=np.zeros(5))
    assert again.accepted().rows == 6


def test_mappings_of_observations_are_saved(tmp_path):
    buffer = ReplayBuffer(50, {"image": (3, 4, 4), "joints": (2,)}, 1)
    assert buffer.specs["obs/image"].dtype == "uint8"
    obs = {"image": np.full((6, 3, 4, 4), 7, np.uint8), "joints": np.ones((6, 2))}
    buffer.add_episode(obs=obs, actions=np.zeros((5, 1)), rewards=np.ones(5), dones=np.zeros(5))
    buffer.save(tmp_path / "a.npz")
    assert same_rows(buffer, ReplayBuffer.load(tmp_path / "a.npz"))


def test_files_that_are_no_buffer_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.savez(tmp_path / "pickled.npz", about=np.array([{"a": 1}], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    buffer = ReplayBuffer(200, (1,), 1)
    buffer.add_episode(**counting(100))
    buffer.save(tmp_path / "cut.npz")
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("other", "pickled", "text", "cut"):
        with pytest.raises(ValueError, match=f"{name}.npz is no replay buffer"):
            ReplayBuffer.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        ReplayBuffer.load(tmp_path / "absent.npz")


# From other libraries


def test_trajectories_of_every_naming_give_the_same_buffer():
    plain = [counting(5), counting(7, 100)]
    minari = [
        SimpleNamespace(
            id=number, observations=e["obs"], actions=e["actions"], rewards=e["rewards"], terminations=e["dones"],
            truncations=np.zeros_like(e["dones"]), infos={},
        )
        for number, e in enumerate(plain)
    ]  # fmt: skip
    flags = [{**e, "dones": True} for e in plain]
    buffers = [ReplayBuffer.from_trajectories(given, capacity=50) for given in (plain, minari, flags)]
    assert buffers[0].num_episodes == 2
    assert len(buffers[0]) == 6 + 8
    assert same_rows(buffers[0], buffers[1])
    assert same_rows(buffers[0], buffers[2])
    assert buffers[0].rows_between(0, 14)["terminated"].nonzero()[0].tolist() == [5, 13]


def test_time_limits_of_trajectories_end_truncated():
    episode = {**counting(5), "dones": np.zeros(5), "truncations": np.arange(5) == 4}
    rows = ReplayBuffer.from_trajectories([episode]).rows_between(0, 6)
    assert rows["truncated"].tolist() == [False] * 5 + [True]
    assert not rows["terminated"].any()


def test_actions_of_another_range_are_scaled():
    episode = {**counting(5), "actions": np.linspace(-2, 2, 5)[:, None]}
    with pytest.raises(ValueError, match=r"episode 0: add_episode: actions leave \[-1, 1\]"):
        ReplayBuffer.from_trajectories([episode])
    rows = ReplayBuffer.from_trajectories([episode], action_range=(-2, 2)).rows_between(1, 6)
    assert rows["actions"][:, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    with pytest.raises(ValueError, match="expected low < high"):
        ReplayBuffer.from_trajectories([episode], action_range=(2, 2))


def test_bad_trajectories_are_named():
    with pytest.raises(ValueError, match="episode 1 has no rewards, expected one of rewards, reward"):
        ReplayBuffer.from_trajectories([counting(5), {k: v for k, v in counting(5).items() if k != "rewards"}])
    with pytest.raises(ValueError, match="episode 1: add_episode: obs holds NaN"):
        ReplayBuffer.from_trajectories([counting(5), {**counting(5), "obs": np.full((6, 1), np.nan)}])
    with pytest.raises(ValueError, match="no episodes were given"):
        ReplayBuffer.from_trajectories([])


def d4rl(episodes, **extra):
    joined = {
        "observations": np.concatenate([e["obs"][:-1] for e in episodes]),
        "actions": np.concatenate([e["actions"] for e in episodes]),
        "rewards": np.concatenate([e["rewards"] for e in episodes]),
        "terminals": np.concatenate([e["dones"] for e in episodes]),
    }
    return {**joined, **extra}


def test_flat_files_are_cut_at_their_ends(tmp_path):
    episodes = [counting(5), counting(7, 100)]
    following = np.concatenate([e["obs"][1:] for e in episodes])
    np.savez(tmp_path / "flat.npz", **d4rl(episodes, next_observations=following))
    found = ReplayBuffer.from_trajectories(read_episodes(tmp_path / "flat.npz"), capacity=50)
    assert same_rows(found, ReplayBuffer.from_trajectories(episodes, capacity=50))
    np.savez(tmp_path / "short.npz", **d4rl(episodes, timeouts=np.arange(12) == 2))
    parts = list(read_episodes(tmp_path / "short.npz"))
    assert [len(part["actions"]) for part in parts] == [3, 2, 7]
    assert parts[0]["truncations"].tolist() == [False, False, True]


def test_flat_files_may_hold_the_last_observation_of_each_episode(tmp_path):
    episodes = [counting(5), counting(7, 100), counting(2, 200)]
    episodes[2]["dones"][-1] = False  # what remains is an episode, too
    np.savez(tmp_path / "flat.npz", **{**d4rl(episodes), "observations": np.concatenate([e["obs"] for e in episodes])})
    found = ReplayBuffer.from_trajectories(read_episodes(tmp_path / "flat.npz"), capacity=50)
    assert same_rows(found, ReplayBuffer.from_trajectories(episodes, capacity=50))


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("observations", 15, "observations: 15, actions: 12, episodes: 2. Expected 12 .* for each episode: 14"),
        ("terminals", 14, "actions: 12, rewards: 12, ends: 14, timeouts: 12. Expected as many of each"),
        ("rewards", 11, "actions: 12, rewards: 11"),
        ("next_observations", 11, "next observations: 11"),
    ],
)
def test_flat_files_of_other_lengths_are_refused(tmp_path, name, rows, words):
    columns = d4rl([counting(5), counting(7, 100)])
    np.savez(tmp_path / "flat.npz", **{**columns, name: np.zeros((rows, 1) if "obs" in name else rows)})
    with pytest.raises(ValueError, match=words):
        list(read_episodes(tmp_path / "flat.npz"))


def test_floats_that_a_column_of_integers_would_change_are_refused():
    images = np.random.default_rng(0).random((6, 3, 8, 8), np.float32)
    with pytest.raises(ValueError, match=r"episode 0: obs holds float32 from 0\S* to 0\S*, which replay"):
        ReplayBuffer.from_trajectories([{**counting(5), "obs": images}])
    kept = ReplayBuffer.from_trajectories([{**counting(5), "obs": images}], obs_dtype="float32")
    assert np.array_equal(kept.draw(1, 6)["obs"][0], images)
    whole = ReplayBuffer.from_trajectories([{**counting(5), "obs": np.floor(images * 256)}])
    assert np.array_equal(whole.draw(1, 6)["obs"][0], np.floor(images * 256))
    with pytest.raises(ValueError, match="obs holds int64 from -3 to 200"):
        ReplayBuffer.from_trajectories(
            [{**counting(5), "obs": np.repeat([-3, 200], [1, 5]).reshape(6, 1, 1, 1) * np.ones((3, 8, 8), int)}]
        )


def test_hdf5_files_of_minari_and_d4rl_are_read(tmp_path):
    episodes = [counting(3, 100 * number) for number in range(11)]  # episode_10 sorts after episode_9
    with h5py.File(tmp_path / "minari.hdf5", "w") as file:
        for number, e in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            group["observations"], group["actions"], group["rewards"] = e["obs"], e["actions"], e["rewards"]
            group["terminations"], group["truncations"] = e["dones"], np.zeros(3, bool)
            group.create_group("infos")["x"] = np.zeros(3)
    with h5py.File(tmp_path / "d4rl.h5", "w") as file:
        for name, value in d4rl(episodes, next_observations=np.concatenate([e["obs"][1:] for e in episodes])).items():
            file[name] = value
        file["episode_returns"] = np.zeros(11)  # no episode
    wanted = ReplayBuffer.from_trajectories(episodes, capacity=60)
    for name in ("minari.hdf5", "d4rl.h5"):
        assert same_rows(wanted, ReplayBuffer.from_trajectories(read_episodes(tmp_path / name), capacity=60))


def test_hdf5_mappings_of_observations_are_read(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        group = file.create_group("episode_0")
        group.create_group("observations").update({"x": np.ones((4, 2)), "y": np.zeros((4, 3))})
        group["actions"], group["rewards"] = np.zeros((3, 1)), np.ones(3)
        group["terminations"], group["truncations"] = np.zeros(3), np.zeros(3)
    assert ReplayBuffer.from_trajectories(read_episodes(tmp_path / "a.hdf5")).obs_shape == {"x": (2,), "y": (3,)}


def test_a_directory_holds_an_episode_a_file(tmp_path):
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", **counting(4, 100 * number))
    found = ReplayBuffer.from_trajectories(read_episodes(tmp_path), capacity=20)
    assert same_rows(found, ReplayBuffer.from_trajectories([counting(4, 100 * n) for n in range(3)], capacity=20))


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "b.npz").write_text("no")
    (tmp_path / "c.hdf5").write_text("no")
    np.savez(tmp_path / "d.npz", x=np.ones(2))
    np.savez(tmp_path / "e.npz", observations=np.array([{}], dtype=object))
    (tmp_path / "f.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:-30])
    for name, message in [
        ("a.csv", "ends in '.csv', expected"), ("b.npz", "cannot be read"), ("c.hdf5", "cannot be read"),
        ("d.npz", "holds \\['x'\\], expected at least observations"), ("e.npz", "cannot be read"),
        ("f.npz", "cannot be read: it is no zip file, or is cut short"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            list(read_episodes(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_episodes(tmp_path / "absent.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .npz file"):
        list(read_episodes(tmp_path / "empty"))
