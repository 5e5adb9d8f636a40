import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import environments  # noqa: F401
from worldloom.acting.local import LocalActing
from worldloom.acting.rollout import Lane, Rollout
from worldloom.envs import make_env
from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.chunk import Chunk, ChunkInfo, ChunkKey
from worldloom.spaces import observation_columns
from worldloom.types import ColumnSpec, WindowSpec, action_rows, join_obs


def spec(length, crosses=False, context=1):
    return WindowSpec(length=length, context=context, crosses_episodes=crosses)


def rows(steps, first, tag=0.0, end=None):
    """Rows of one environment: obs = [step, tag], reward = 10 x step, action = -step / 100."""
    steps = np.asarray(steps, np.float32)
    count = len(steps)
    led = ~np.asarray(first, bool)
    columns = {
        "obs": np.stack([steps, np.full(count, tag, np.float32)], 1),
        "actions": (-steps / 100 * led)[:, None],
        "rewards": 10 * steps * led,
        "is_first": ~led,
        "terminated": np.zeros(count, bool),
        "truncated": np.zeros(count, bool),
    }
    if end:
        columns[end][-1] = True
    return columns


def chunk_of(parts, key=(0, 0, 0)):
    columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    lengths = tuple(len(p["rewards"]) for p in parts)
    info = ChunkInfo(ChunkKey(*key), int((~columns["is_first"]).sum()), 0, (), (), 0, 0, "", 0.0, 0.0, "")
    return Chunk(columns, lengths, info)


def buffer(capacity=100, windows=None, **kwargs):
    return ReplayBuffer(capacity, (2,), 1, windows=windows or spec(4), **kwargs)


def reachable(replay):
    """Every window that sampling can give, found by drawing often."""
    batch = replay.draw(4000)
    return {tuple(map(tuple, window)) for window in batch["obs"].astype(int).tolist()}


def test_windows_are_consecutive_rows_with_the_action_and_reward_that_led_there():
    replay = buffer()
    replay.insert(chunk_of([rows(range(8), [1] + [0] * 7, tag=1), rows(range(6), [1] + [0] * 5, tag=2)]))
    batch = replay.draw(500)
    steps = batch["obs"][..., 0]
    assert (np.diff(steps, axis=1) == 1).all()
    assert (np.ptp(batch["obs"][..., 1], axis=1) == 0).all()
    np.testing.assert_allclose(batch["rewards"], 10 * steps)
    np.testing.assert_allclose(batch["actions"][..., 0], -steps / 100, rtol=1e-6)
    assert (batch["is_first"] == (steps == 0)).all()
    assert len(reachable(replay)) == replay.num_windows == 5 + 3


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("key", [(0, 0, 2), (0, 1, 1)], ids=["in an incarnation", "at the start of one"])
def test_no_window_runs_over_a_missing_chunk(key, crosses):
    replay = buffer(windows=spec(4, crosses))
    replay.insert(chunk_of([rows(range(6), [1] + [0] * 5, 1), rows(range(6), [1] + [0] * 5, 2)], (0, 0, 0)))
    replay.insert(chunk_of([rows(range(8, 14), [0] * 6, 1), rows(range(8, 14), [0] * 6, 2)], key))
    batch = replay.draw(2000)
    steps, first = batch["obs"][..., 0], batch["is_first"]
    jumps = np.diff(steps, axis=1) != 1
    assert first[:, 1:][jumps].all()  # where another part follows, an episode starts
    assert jumps.any() == crosses
    assert not batch["actions"][first].any()
    assert not batch["rewards"][first].any()
    assert replay.rows_between(0, 6)["truncated"][-1]  # the episode before the gap ends there, not terminated
    assert replay.accepted().steps == 5 + 5 + 5 + 5


def test_windows_run_on_over_chunk_borders():
    replay = buffer()
    replay.insert(chunk_of([rows([0, 1], [1, 0], 1), rows([0, 1, 2], [1, 0, 0], 2)], (0, 0, 0)))
    assert replay.num_windows == 0
    replay.insert(chunk_of([rows([2, 3], [0, 0], 1), rows([3], [0], 2)], (0, 0, 1)))
    assert reachable(replay) == {tuple((s, tag) for s in range(4)) for tag in (1, 2)}


def test_single_episode_windows_never_cross_is_first_and_others_may():
    first = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    steps = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    apart, crossing = buffer(), buffer(windows=spec(4, crosses=True))
    for replay in (apart, crossing):
        replay.insert(chunk_of([rows(steps, first)]))
    assert apart.num_windows == 2 + 3
    assert not apart.draw(500)["is_first"][:, 1:].any()
    assert crossing.num_windows == 8
    assert crossing.draw(500)["is_first"][:, 1:].any()


def brute_force(history, capacity, length, crosses):
    """Every window that a ring of that capacity should hold, from the list of (stream, step, first) as inserted."""
    kept = set(range(max(0, len(history) - capacity), len(history)))
    by_stream = {}
    for number, (stream, step, first) in enumerate(history):
        by_stream.setdefault(stream, []).append((number, step, first))
    windows = set()
    for stream, entries in by_stream.items():
        for i in range(len(entries) - length + 1):
            window = entries[i : i + length]
            if not all(number in kept for number, _, _ in window):
                continue
            if not crosses and any(first for _, _, first in window[1:]):
                continue
            windows.add(tuple((step, stream) for _, step, _ in window))
    return windows


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.tuples(st.lists(st.integers(0, 6), min_size=2, max_size=2), st.integers(1, 9)), max_size=25),
    capacity=st.integers(12, 40),
    length=st.integers(1, 5),
    crosses=st.booleans(),
)
def test_the_ring_holds_exactly_the_windows_that_it_should(data, capacity, length, crosses):
    replay = buffer(capacity, spec(length, crosses, context=0))
    history, position, unique = [], [0, 0], 0
    for sequence, (counts, period) in enumerate(data):
        parts = []
        for stream, count in enumerate(counts):
            steps, firsts = [], []
            for _ in range(count):
                first = position[stream] % period == 0 or position[stream] == 0
                unique += 1
                steps.append(unique)
                firsts.append(first)
                history.append((stream, unique, first))
                position[stream] += 1
            parts.append(rows(steps, firsts, tag=stream))
        replay.insert(chunk_of(parts, (0, 0, sequence)))
    expected = brute_force(history, capacity, length, crosses)
    assert replay.num_windows == len(expected)
    if expected:
        assert reachable(replay) == expected


def test_the_online_queue_gives_every_fresh_row_to_a_batch_once():
    replay = buffer(200, WindowSpec(4, 1, crosses_episodes=True, online_queue=True))
    for sequence in range(8):
        steps = np.arange(5) + 5 * sequence
        replay.insert(chunk_of([rows(steps, steps == 0, tag) for tag in (1, 2)], (0, 0, sequence)))
    batch = replay.draw(20)["obs"].astype(int)
    windows = [(*window[:, 0].tolist(), int(window[0, 1])) for window in batch]
    fresh = {(s, s + 1, s + 2, s + 3, tag) for s in range(0, 40, 4) for tag in (1, 2)}
    assert set(windows) == fresh  # 2 streams of 40 rows are 20 windows end to end
    assert len(set(map(tuple, replay.draw(100)["obs"][:, 0].astype(int).tolist()))) > 40  # then uniform again


def test_draws_are_uniform_over_windows():
    replay = buffer(64)
    replay.insert(chunk_of([rows(range(40), [1] + [0] * 39)]))
    starts = replay.draw(37_000)["obs"][:, 0, 0].astype(int)
    counts = np.bincount(starts, minlength=37)
    assert ((counts - 1000) ** 2 / 1000).sum() < 37 + 6 * np.sqrt(2 * 37)  # chi-square, six sigma


def test_inserting_a_chunk_twice_changes_nothing():
    replay = buffer()
    chunk = chunk_of([rows(range(5), [1, 0, 0, 0, 0])])
    accepted = replay.insert(chunk)
    again = replay.insert(chunk)
    assert (accepted.rows, accepted.steps) == (again.rows, again.steps) == (5, 4)
    assert again.duplicates == 1


def test_an_interrupted_episode_ends_truncated_and_the_next_starts_first():
    replay = buffer(windows=spec(4, crosses=True))
    replay.insert(chunk_of([rows(range(3), [1, 0, 0])], (7, 0, 0)))
    replay.insert(chunk_of([rows(range(3), [1, 0, 0])], (7, 1, 0)))
    batch = replay.draw(200)
    seam = batch["is_first"][:, 1:]
    assert seam.any()
    assert batch["truncated"][:, :-1][seam].all()
    assert not batch["terminated"].any()
    late = replay.insert(chunk_of([rows(range(3, 5), [0, 0])], (7, 0, 1)))  # from the incarnation that is gone
    assert late.duplicates == 1


def test_write_back_replaces_rows_and_skips_evicted_ones():
    replay = buffer(8, spec(3), columns={"latent": ColumnSpec((2,), "float32")})
    part = {**rows(range(8), [1] + [0] * 7), "latent": np.zeros((8, 2), np.float32)}
    replay.insert(chunk_of([part]))
    batch = replay.draw(50)
    assert (batch["rows"] == batch["obs"][..., 0]).all()
    replay.insert(chunk_of([{name: value[4:6] for name, value in part.items()}], (0, 0, 1)))  # evicts rows 0 and 1
    marks = np.repeat(batch["obs"][..., :1] + 100, 2, axis=-1)
    assert replay.write_back(batch["rows"], {"latent": marks}) == int((batch["rows"] < 2).sum())
    after = replay.draw(200)
    written = np.isin(after["rows"], batch["rows"])
    assert written.any()
    np.testing.assert_array_equal(after["latent"][written][:, 0], after["rows"][written] + 100)
    replay.write_back(np.array([[5, 6, 7]]), {"latent": np.full((1, 2, 2), -1.0)})  # of the last two rows
    last = replay.draw(200)
    assert (last["latent"][np.isin(last["rows"], (6, 7))] == -1).all()
    assert (last["latent"][last["rows"] == 5] != -1).all()


def test_recorded_episodes_line_up_actions_with_their_outcome(caplog):
    replay = buffer()
    obs = np.stack([np.arange(6), np.zeros(6)], 1)
    actions, rewards = np.arange(5)[:, None] / 10, np.arange(5) * 10.0
    replay.add_episode(obs=obs, actions=actions, rewards=rewards, dones=[0, 0, 0, 0, 1])
    assert (len(replay), replay.num_episodes) == (6, 1)
    batch = replay.draw(100)
    led = ~batch["is_first"]
    np.testing.assert_allclose(batch["rewards"][led], 10 * (batch["obs"][..., 0][led] - 1))
    np.testing.assert_allclose(batch["actions"][..., 0][led], (batch["obs"][..., 0][led] - 1) / 10, rtol=1e-6)
    assert (batch["terminated"] == (batch["obs"][..., 0] == 5)).all()
    assert (batch["continues"] == 1 - batch["terminated"]).all()

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            replay.add_episode(obs=obs[:5], actions=actions, rewards=rewards, dones=[0, 0, 0, 0, 1])
    assert sum("after the last action" in message for message in caplog.messages) == 1
    assert len(replay) == 6 + 5 + 5
    assert replay.num_episodes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dones": [0, 0]}, "2 dones"),
        ({"obs": np.zeros((9, 2))}, "9 observations"),
        ({"obs": np.zeros((6, 3))}, r"'obs' is \(6, 3\), expected \(6, 2\)"),
        ({"actions": np.zeros((5, 2))}, r"actions are \(5, 2\), expected \(5, 1\)"),
        ({"actions": np.full((5, 1), 2.0)}, r"leave \[-1, 1\]"),
        ({"rewards": [0, np.nan, 0, 0, 0]}, "rewards holds NaN"),
        ({"dones": [0, 1, 0, 0, 0]}, r"dones\[1\] is set before the end"),
    ],
)
def test_bad_episodes_are_refused_before_anything_changes(change, message):
    replay = buffer()
    good = {"obs": np.zeros((6, 2)), "actions": np.zeros((5, 1)), "rewards": np.zeros(5), "dones": np.zeros(5)}
    with pytest.raises(ValueError, match=message):
        replay.add_episode(**{**good, **change})
    assert len(replay) == 0


def test_bad_chunks_and_sizes_are_refused():
    replay = buffer()
    part = rows(range(3), [1, 0, 0])
    with pytest.raises(ValueError, match=r"expected .*rewards"):
        replay.insert(chunk_of([{n: v for n, v in part.items() if n != "truncated"}]))
    with pytest.raises(ValueError, match="no complete window of 4"):
        replay.draw(2)
    with pytest.raises(ValueError, match=r"replay.capacity is 3, expected at least one window of 4"):
        buffer(3)
    with pytest.raises(MemoryError, match=r"replay.capacity=1,000,000,000,000 rows needs .* Lower replay.capacity"):
        buffer(10**12)


def test_saved_replay_draws_the_same_batches():
    def filled():
        replay = buffer(50, spec(4), seed=3)
        for sequence in range(9):
            part = [rows(np.arange(6) + 6 * sequence, np.arange(6) + 6 * sequence == 0, tag) for tag in (1, 2)]
            replay.insert(chunk_of(part, (0, 0, sequence)))
        return replay

    original = filled()
    original.draw(10)
    state = original.state_dict()
    total = state["rows"]
    segments = [original.rows_between(total - 50, total - 20), original.rows_between(total - 20, total)]
    restored = buffer(50, spec(4), seed=99)
    restored.load_state_dict(state, segments, sum(len(s["rewards"]) for s in segments))
    assert restored.accepted() == original.accepted()
    for _ in range(3):
        a, b = original.draw(16), restored.draw(16)
        assert all((a[name] == b[name]).all() for name in a)
    more = [rows(np.arange(54, 60), [False] * 6, tag) for tag in (1, 2)]
    for replay in (original, restored):
        replay.insert(chunk_of(more, (0, 0, 9)))
    assert reachable(original) == reachable(restored)


class Echo:
    """An agent that acts with obs[0] / 100, so that every action names the observation it was chosen at."""

    def __init__(self):
        self.columns = {"mark": ColumnSpec((1,), "float32")}
        self.acting_generator = torch.Generator()

    def act(self, obs, act_state, is_first, explore=True):
        return obs[:, :1] / 100, {"obs": obs}

    def replay_columns(self, act_state):
        return {"mark": act_state["obs"][:, :1] + 0.5}


@pytest.mark.parametrize("true_end", [True, False])
def test_rollout_to_replay_keeps_the_time_alignment_end_to_end(true_end):
    env = make_env("tests.environments:Counting-v0", num_envs=3, seed=5)
    for one in env._envs:
        one._env.unwrapped.true_end = true_end
    rollout = Rollout([Lane(env, LocalActing(Echo()))], seed=0)
    replay = ReplayBuffer(1000, (3,), 1, windows=spec(8), columns=Echo().columns)
    lengths, returns, steps = [], [], 0
    for _ in range(12):
        chunk = rollout.collect(5)
        lengths += chunk.info.episode_lengths
        returns += chunk.info.returns
        steps += chunk.info.steps
        assert chunk.info.true_ends == (len(chunk.info.returns) if true_end else 0)
        replay.insert(chunk)
    assert replay.accepted().steps == steps == 12 * 5 * 3 - 3  # the last rows are held back
    assert set(lengths) == {7}
    assert set(returns) == {280.0}
    batch = replay.draw(500)  # windows of 8 rows are whole episodes of 7 actions
    count = batch["obs"][..., 0]
    np.testing.assert_array_equal(count, np.broadcast_to(np.arange(8.0), (500, 8)))
    np.testing.assert_array_equal(batch["rewards"], 10 * count)
    np.testing.assert_allclose(batch["actions"][:, 1:, 0], (count[:, 1:] - 1) / 100, rtol=1e-6)
    np.testing.assert_allclose(batch["obs"][:, 1:, 1], 2 * (count[:, 1:] - 1) / 100, rtol=1e-5)  # as executed
    np.testing.assert_array_equal(batch["mark"][:, :-1, 0], count[:, :-1] + 0.5)
    last = np.broadcast_to(np.arange(8) == 7, (500, 8))
    np.testing.assert_array_equal(batch["terminated" if true_end else "truncated"], last)
    assert not batch["truncated" if true_end else "terminated"].any()
    assert (batch["actions"][:, 0] == 0).all()


class Choices(Echo):
    """Random choices, no extra columns."""

    def __init__(self):
        super().__init__()
        self.columns = {}

    def act(self, obs, act_state, is_first, explore=True):
        assert set(obs) == {"camera", "phase", "state", "touch"}
        return action_rows(np.random.default_rng(int(obs["phase"].sum())), len(is_first), 5, (2, 3)), {}

    def replay_columns(self, act_state):
        return {}


def test_mappings_of_observations_keep_the_time_alignment_end_to_end():
    env = make_env("tests.environments:Mixed-v0", num_envs=3)
    columns = observation_columns(env.observation_space)
    shapes, dtypes = (join_obs({n: getattr(c, part) for n, c in columns.items()}) for part in ("shape", "dtype"))
    replay = ReplayBuffer(1000, shapes, 5, obs_dtype=dtypes, windows=spec(7))
    rollout = Rollout([Lane(env, LocalActing(Choices()))], seed=0)
    for _ in range(5):
        replay.insert(rollout.collect(7))
    batch = replay.sample(200)  # windows of 7 rows are whole episodes of 6 actions
    count = np.broadcast_to(np.arange(7), (200, 7))
    obs, actions = batch["obs"], batch["actions"].numpy()
    np.testing.assert_array_equal(obs["phase"], count)
    np.testing.assert_array_equal(obs["camera"][:, :, 2, 5, 63], 20 * count)
    np.testing.assert_array_equal(obs["state"][..., 3], 1.5 * count)
    np.testing.assert_array_equal(obs["touch"][..., 0], count % 2)
    np.testing.assert_array_equal(batch["rewards"], 10 * actions[..., 1] + actions[..., 3] + 2 * actions[..., 4])


def test_recorded_episodes_of_mappings_are_checked_by_key():
    replay = ReplayBuffer(100, {"a": (2,), "b": ()}, 1, windows=spec(3))
    rest = {"actions": np.zeros((2, 1)), "rewards": np.array([1.0, 2.0]), "dones": np.array([False, True])}
    replay.add_episode(obs={"a": np.ones((3, 2)), "b": np.arange(3.0)}, **rest)
    assert replay.sample(1)["obs"]["b"].tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="3 and 2 observations, 2 actions"):
        replay.add_episode(obs={"a": np.ones((3, 2)), "b": np.arange(2.0)}, **rest)
    with pytest.raises(ValueError, match=r"obs/b holds NaN"):
        replay.add_episode(obs={"a": np.ones((3, 2)), "b": np.full(3, np.nan)}, **rest)
    with pytest.raises(ValueError, match=r"columns .*expected .*'obs/b'"):
        replay.add_episode(obs={"a": np.ones((3, 2))}, **rest)


def test_an_environment_that_raises_cuts_its_episode_short():
    import gymnasium

    from worldloom.envs import Environment, VectorEnv

    make = lambda: Environment(gymnasium.make("Faulty-v0", period=5, length=100, disable_env_checker=True))  # noqa: E731
    rollout = Rollout([Lane(VectorEnv(make, 1, 0), LocalActing(Echo()))], seed=0)
    chunk = rollout.collect(6)
    assert chunk.info.failures == 1
    assert chunk.columns["obs"][:, 0].tolist() == [0, 1, 2, 3, 4, 0]
    assert chunk.columns["truncated"].tolist() == [False] * 4 + [True, False]
    assert chunk.columns["is_first"].tolist() == [True] + [False] * 4 + [True]
    assert not chunk.columns["terminated"].any()
