"""Windows drawn by age: equal parts of them have the shares that were asked for."""

import numpy as np
import pytest

from tests.dreamerv3_models import tiny_agent
from tests.replay.test_replay import chunk_of, rows
from tests.run_configs import tiny_config
from tests.tdmpc2_models import tiny_model
from worldloom.replay.buffer import ReplayBuffer
from worldloom.runs.build import agent_spec, make_replay, probe_env
from worldloom.runs.config import ReplayConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.tdmpc2 import TDMPC2Agent
from worldloom.types import WindowSpec

SHARES = (0.1, 0.1, 0.1, 0.7)


def buffer(capacity=100, recency=SHARES, length=4, **options):
    windows = WindowSpec(length, 0, crosses_episodes=True, recency=recency)
    return ReplayBuffer(capacity, (2,), 1, windows=windows, **options)


def filled(replay, chunks=10, streams=2):
    """Return chunks of 5 rows of each stream in turn; obs are the step and the stream."""
    for sequence in range(chunks):
        steps = np.arange(5) + 5 * sequence
        replay.insert(chunk_of([rows(steps, steps % 7 == 0, tag) for tag in range(streams)], (0, 0, sequence)))
    return replay


def expected_chances(starts, shares):
    """Return the chance of each start, oldest first, worked out part by part."""
    chances, cuts = {}, [part * len(starts) // len(shares) for part in range(len(shares) + 1)]
    for part, share in enumerate(shares):
        own = starts[cuts[part] : cuts[part + 1]]
        chances |= {start: share / len(own) for start in own}
    return chances


@pytest.mark.parametrize(("capacity", "chunks"), [(100, 10), (64, 23)])  # before and after rows were evicted
def test_each_part_of_the_windows_has_its_share_and_is_uniform(capacity, chunks):
    replay = filled(buffer(capacity), chunks)
    starts = sorted(set(every_start(replay)))
    assert len(starts) == replay.num_windows
    chances = expected_chances(starts, SHARES)
    drawn = replay.draw(60_000)["rows"][:, 0]
    counts = np.array([(drawn == start).sum() for start in starts])
    means = 60_000 * np.array([chances[start] for start in starts])
    assert counts.sum() == 60_000
    assert ((counts - means) ** 2 / means).sum() < len(starts) + 6 * np.sqrt(2 * len(starts))  # chi-square, six sigma


def every_start(replay):
    """Return the numbers of the rows that start a window, found without recency."""
    return replay.draw(4000, seq_len=replay.windows.length, rng=Uniform())["rows"][:, 0].tolist()


class Uniform:
    """Stands in for a generator: takes all parts alike, and every start in turn."""

    def choice(self, values, count, p):
        return np.arange(count) % len(p)

    def integers(self, low, high):
        return low + np.arange(len(low)) // 4 % (high - low)


def test_sequences_of_other_lengths_are_drawn_by_age_too():
    replay = filled(buffer(recency=(0.0, 1.0)), streams=1)
    own, other = replay.draw(500)["rows"][:, 0], replay.draw(500, seq_len=11)["rows"][:, 0]
    assert (own.min(), own.max()) == (23, 46)  # the newer half of 47 starts
    assert (other.min(), other.max()) == (20, 39)


def test_parts_without_windows_give_their_share_to_the_others():
    replay = buffer()
    replay.insert(chunk_of([rows(range(5), [1, 0, 0, 0, 0])]))  # two windows: the second and the fourth part
    drawn = replay.draw(8000)["rows"][:, 0]
    assert (drawn == 1).mean() == pytest.approx(0.7 / 0.8, abs=0.02)
    old = buffer(recency=(1.0, 0.0))
    old.insert(chunk_of([rows(range(4), [1, 0, 0, 0])]))
    assert old.draw(3)["rows"][:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("capacity", [100, 64])
def test_a_restored_buffer_draws_as_the_one_that_goes_on(capacity, tmp_path):
    replay = filled(buffer(capacity, seed=3), 13)
    replay.draw(10)
    replay.save(tmp_path / "replay.npz")
    other = ReplayBuffer.load(tmp_path / "replay.npz")
    assert other.windows.recency == SHARES
    more = np.arange(65, 68)
    for each in (replay, other):
        each.insert(chunk_of([rows(more, more == 0, tag) for tag in range(2)], (0, 0, 13)))
    np.testing.assert_array_equal(replay.draw(200)["rows"], other.draw(200)["rows"])


def test_a_run_draws_by_age_and_resumes_exactly(tmp_path):
    config = tiny_config(replay=ReplayConfig(capacity=2000, recency=[0.0, 0.0, 1.0]))
    trainer = InlineTrainer(config, tmp_path)
    trainer.train()
    drawn = trainer.replay.draw(300)["rows"][:, 0]
    assert drawn.min() > 0.6 * trainer.replay.accepted().rows
    np.testing.assert_array_equal(InlineTrainer(config, tmp_path, resume=True).replay.draw(300)["rows"][:, 0], drawn)


def test_shards_that_are_filled_alike_give_together_the_shares_of_one():
    """A batch comes from a shard in proportion to its windows, here one of two."""
    config = tiny_config("tests.environments:Counting-v0", replay=ReplayConfig(shards=1, recency=list(SHARES)))
    env, agent = probe_env(config), TDMPC2Agent(tiny_model(3, 1))
    shards = [make_replay(config, env, agent_spec(agent), shard) for shard in range(2)]
    for tag, shard in enumerate(shards):
        steps = np.arange(403)
        columns = rows(steps, steps == 0, tag)
        shard.insert(chunk_of([{**columns, "obs": np.repeat(steps[:, None], 3, 1).astype(np.float32)}]))
    ages = np.concatenate([shard.draw(20_000)["obs"][:, 0, 0] for shard in shards]) // 100
    assert np.bincount(ages.astype(int)) / 40_000 == pytest.approx(SHARES, abs=0.01)


def test_shares_that_are_none_are_refused():
    for shares in ([0.5, 0.6], [-0.5, 1.5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match=r"replay.recency is .*, expected shares in .* that sum to 1, or \[\]"):
            ReplayConfig(recency=shares)
        with pytest.raises(ValueError, match="expected shares in"):
            WindowSpec(4, 0, False, recency=tuple(shares))


def test_it_is_refused_where_fresh_windows_come_first():
    config = tiny_config(algorithm="dreamerv3:size1m", agent={}, replay=ReplayConfig(recency=[0.5, 0.5]))
    with pytest.raises(ValueError, match="takes every fresh window once before it draws any other. Leave replay.rec"):
        make_replay(config, probe_env(config), agent_spec(tiny_agent()))
