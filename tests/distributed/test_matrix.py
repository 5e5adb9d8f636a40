"""The Ray runtime for every number of env actors, way of acting, model and number of replay shards."""

import dataclasses

import numpy as np
import pytest

from distributed.coordinator import Coordinator
from distributed.launcher import Launcher
from distributed.shards import Shards
from tests.distributed.ray_runs import accepted as accepted_by
from tests.distributed.ray_runs import matrix_config, run
from worldloom.files import CheckpointError, read_msgpack
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.replay.buffer import Acceptance
from worldloom.runs.build import probe_env
from worldloom.runs.config import CheckpointConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster")]


def all_rows(run_dir):
    """Every row of every shard of the newest checkpoint, by column."""
    folder = newest_checkpoint(run_dir)
    names = [name for shard in read_manifest(folder)["rows"] for name in shard]
    segments = [read_msgpack(folder.parent / "rows" / name) for name in names]
    return {name: np.concatenate([segment[name] for segment in segments]) for name in segments[0]}


def files(folder):
    """Every file's bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(summary, accepted, config, run_dir):
    """Counts agree, the ratio holds, and every row is what Counting gives, with its action where it belongs."""
    actors, total = config.runtime.env_actors, config.train.total_steps
    assert summary["status"] == "completed"
    assert total <= summary["env_steps"] == accepted.steps < total + 2 * (max(actors, 1) + 1)
    assert accepted.duplicates == summary["actor_restarts"] == summary["env_steps_discarded"] == 0
    owed = summary["env_steps"] // 2 if config.algorithm.startswith("tdmpc2") else (summary["env_steps"] - 100) // 8
    assert summary["updates"] == owed
    assert summary["episodes"] == accepted.episodes
    assert summary["eval_return_mean"] == 280
    assert verify(run_dir) == []
    rows = all_rows(run_dir)
    count, led = rows["obs"][:, 0], ~rows["is_first"]
    np.testing.assert_array_equal(rows["rewards"], 10 * count)
    executed = np.clip(2 * rows["actions"][led][:, 0], -2, 2)
    np.testing.assert_allclose(rows["obs"][:, 1][led], executed, rtol=1e-5, atol=1e-6)
    return rows


QUICK = {
    ("tdmpc2", 0, "server"),
    ("tdmpc2", 2, "local"),
    ("tdmpc2", 8, "server"),
    ("dreamerv3", 1, "server"),
}  # the others take their turn with the slow tests


@pytest.mark.parametrize(
    ("family", "actors", "acting"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for family in ("tdmpc2", "dreamerv3")
        for actors in (0, 1, 2, 8)
        for acting in ("local", "server")
        for case in [(family, actors, acting)]
    ],
)
def test_any_number_of_env_actors_trains_to_the_end(family, actors, acting, tmp_path):
    config = matrix_config(family, actors, acting=acting)
    summary, accepted = run(config, tmp_path)
    rows = check(summary, accepted, config, tmp_path)
    assert 2 <= len(np.unique(rows["origin"], axis=0)) <= 2 * max(actors, 1)  # some may come up too late to take part
    if family == "dreamerv3":  # latents came back with the actions
        assert rows["deter"][~rows["is_first"] & ~rows["terminated"]].any(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tdmpc2", "dreamerv3"])
def test_an_actor_of_its_own_can_act_for_all(family, tmp_path):
    config = matrix_config(family, 2, acting="server", acting_server="actor")
    summary, accepted = run(config, tmp_path)
    check(summary, accepted, config, tmp_path)


@pytest.mark.parametrize("family", ["tdmpc2", pytest.param("dreamerv3", marks=pytest.mark.slow)])
def test_three_shards_of_replay_are_one(family, tmp_path):
    config = matrix_config(family, 3, shards=3)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(interval=100, compress=True))
    coordinator = Coordinator(config, tmp_path)
    try:
        coordinator.start(resume=False)
        while any(collector.node is None for collector in coordinator.parts.collecting.collectors):
            coordinator.parts.take_ready(timeout=10)  # so that each of them takes part
        summary, accepted = coordinator.train(), accepted_by(coordinator)
    finally:
        coordinator.close()
    check(summary, accepted, config, tmp_path)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=400))
    fewer = dataclasses.replace(longer, replay=dataclasses.replace(longer.replay, shards=1))
    inline = dataclasses.replace(fewer, runtime=dataclasses.replace(fewer.runtime, kind="inline"))
    before = files(tmp_path)
    for refused in (lambda: run(fewer, tmp_path, resume=True), lambda: InlineTrainer(inline, tmp_path, resume=True)):
        with pytest.raises(CheckpointError, match="has 3 replay shards, expected 1. Go on with --runtime.kind ray --r"):
            refused()
    assert files(tmp_path) == before
    manifest = read_manifest(newest_checkpoint(tmp_path))
    coordinator = Coordinator(longer, tmp_path)
    try:
        coordinator.start(resume=True)
        assert coordinator.run.limiter.state_dict() == manifest["limiter"]
        assert accepted_by(coordinator) == accepted
        assert coordinator.parts.replay.state_dict() == manifest["replay"]
        summary = coordinator.train()
        after = accepted_by(coordinator)
    finally:
        coordinator.close()
    assert summary["env_steps"] == after.steps >= 400
    assert after.rows > accepted.rows
    assert verify(tmp_path) == []
    shards = read_manifest(newest_checkpoint(tmp_path))["rows"]
    assert [len(shard) > 0 for shard in shards] == [True] * 3
    actors = [{int(a) for name in shard for a in origins(tmp_path, name)} for shard in shards]
    assert actors == [{0}, {1}, {2}]


def origins(run_dir, name):
    return read_msgpack(run_dir / "checkpoints" / "rows" / name)["origin"][:, 0]


def test_batches_come_from_shards_in_proportion_to_their_windows(tmp_path):
    config = matrix_config("tdmpc2", 3, shards=3)
    shards = Shards(Launcher("unused"), config, probe_env(config), tmp_path)
    before = shards.state_dict()
    shards.accepted = [Acceptance(0, 0, 0, 0, 0, windows) for windows in (300, 0, 100)]
    drawn = [shards.draw() for _ in range(4000)]
    assert drawn.count(1) == 0
    assert drawn.count(0) == pytest.approx(3000, abs=150)  # 5 standard deviations
    shards.load_state_dict(before)
    assert [shards.draw() for _ in range(50)] == drawn[:50]
