"""The plain parts of training, and the in-process trainer."""

import dataclasses
import json
import signal
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.run_configs import TINY_AGENT, TINY_DREAMER, diverging, dreamer_config, tiny_config
from worldloom import load_agent
from worldloom.acting.evaluation import evaluate
from worldloom.encoding import pack, unpack
from worldloom.envs import EnvironmentFailed, make_env
from worldloom.files import CheckpointError
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.report.sinks import MetricsLogger
from worldloom.runs.agent_state import rescue_agent, take_agent
from worldloom.runs.config import (
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    ReplayConfig,
    TrainConfig,
)
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.limiter import Every, RateLimiter
from worldloom.runs.verify import verify

# Clocks


@pytest.mark.parametrize(
    ("ratio", "said"), [(8, "1 update every 4 steps"), (32, "1 update a step"), (64, "2 updates a step")]
)
def test_the_train_ratio_is_said_in_updates(ratio, said):
    assert said in RateLimiter(ratio, 32, 0, pretrain=False).describe()


def test_rate_limiter_owes_updates_in_proportion_to_steps():
    limiter = RateLimiter(train_ratio=512, replayed_per_update=1024, learning_starts=100, pretrain=False)
    limiter.env_steps = 99
    assert limiter.updates_due() == 0
    limiter.env_steps = 103
    assert limiter.updates_due() == 1
    limiter.env_steps, limiter.updates = 300, 99
    assert limiter.updates_due() == 1
    assert limiter.steps_ahead() == 2


def test_steps_on_the_way_count_as_collected_ahead():
    limiter = RateLimiter(train_ratio=512, replayed_per_update=1024, learning_starts=100, pretrain=False)
    limiter.env_steps = 99
    assert limiter.steps_ahead(50) == 0  # learning has not started
    limiter.env_steps, limiter.updates = 300, 99
    assert limiter.steps_ahead() == 2
    assert limiter.steps_ahead(50) == 52


def test_a_ratio_that_changes_at_a_resume_holds_for_what_follows():
    before = RateLimiter(train_ratio=64, replayed_per_update=1024, learning_starts=100, pretrain=False)
    before.env_steps, before.updates = 100_100, 6250
    state = before.state_dict()
    same = RateLimiter(train_ratio=64, replayed_per_update=1024, learning_starts=100, pretrain=False)
    same.load_state_dict(state)
    assert same.state_dict() == state
    for ratio in (512, 8):
        after = RateLimiter(train_ratio=ratio, replayed_per_update=1024, learning_starts=50, pretrain=False)
        after.load_state_dict(state)
        assert after.updates_due() == 0
        assert after.steps_ahead() == 0
        after.env_steps += 1024
        assert after.updates_due() == ratio
        again = RateLimiter(train_ratio=ratio, replayed_per_update=1024, learning_starts=50, pretrain=False)
        again.load_state_dict(after.state_dict())
        assert again.updates_due() == ratio


def test_a_later_start_of_learning_at_a_resume_waits_no_longer_than_that():
    before = RateLimiter(train_ratio=64, replayed_per_update=64, learning_starts=1000, pretrain=False)
    before.env_steps, before.updates = 5000, 4000
    after = RateLimiter(train_ratio=64, replayed_per_update=64, learning_starts=10_000, pretrain=False)
    after.load_state_dict(before.state_dict())
    after.env_steps = 9_999
    assert after.updates_due() == 0
    after.env_steps = 10_100
    assert after.updates_due() == 100


def test_pretraining_replays_the_warm_up_in_one_burst():
    limiter = RateLimiter(train_ratio=768, replayed_per_update=768, learning_starts=1000, pretrain=True)
    limiter.env_steps = 1000
    assert limiter.updates_due() == 1000


@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.floats(0.1, 3000), st.integers(1, 2048))
def test_rate_limiter_keeps_its_ratio_within_one_update(chunks, ratio, per_update):
    limiter = RateLimiter(ratio, per_update, learning_starts=50, pretrain=False)
    for steps in chunks:
        limiter.env_steps += steps
        limiter.updates += limiter.updates_due()
        assert limiter.updates_due() == 0
        owed = limiter.counted_steps * ratio / per_update
        assert owed - 1 < limiter.updates <= owed + 1e-6


def test_a_resumed_rate_limiter_owes_no_burst():
    limiter = RateLimiter(512, 1024, 100, pretrain=False)
    limiter.env_steps, limiter.updates = 5000, 2450
    resumed = RateLimiter(512, 1024, 100, pretrain=False)
    resumed.load_state_dict(limiter.state_dict())
    assert resumed.updates_due() == 0


def test_every_is_due_once_per_interval_also_after_a_resume():
    clock = Every(100, start=250)
    assert [step for step in range(240, 560, 20) if clock.due(step)] == [300, 400, 500]
    assert not Every(0).due(10**9)


# Codec


def test_codec_round_trip_keeps_values_types_and_shapes():
    value = {
        "array": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "tensor": torch.randn(3, 2).to(torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "nested": {0: [1, 2.5, None, "text", b"raw"]},
        "big": 2**127 + 5,
        "rng": np.random.default_rng(0).bit_generator.state,
    }
    back = unpack(pack(value))
    for key in ("array", "flags", "empty"):
        np.testing.assert_array_equal(back[key], value[key])
        assert back[key].dtype == value[key].dtype
        back[key][...] = 0  # writable
    for key in ("tensor", "scalar"):
        assert back[key].dtype == value[key].dtype
        assert torch.equal(back[key], value[key])
    assert back["nested"] == value["nested"]
    assert back["big"] == value["big"]
    assert back["rng"] == value["rng"]


def test_codec_refuses_objects_and_damaged_data():
    with pytest.raises(TypeError, match="object cannot be saved"):
        pack({"a": object()})
    with pytest.raises(ValueError, match="not a complete"):
        unpack(pack({"a": np.zeros(100)})[:50])


# The in-process trainer


def read_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.pages
def test_inline_run_trains_evaluates_and_leaves_a_run_directory(tmp_path):
    config = tiny_config(eval=EvalConfig(interval=150, episodes=3), checkpoint=CheckpointConfig(interval=100, keep=2))
    summary = InlineTrainer(config, tmp_path).train()
    assert summary["status"] == "completed"
    assert summary["env_steps"] >= 300
    assert summary["updates"] == summary["env_steps"] * 12 // 24  # 8 windows of 3 trained rows an update
    assert summary["train_ratio_actual"] == pytest.approx(12, rel=0.01)
    assert summary["eval_return_mean"] == 280  # 10 + 20 + … + 70
    assert summary["eval_episodes"] == 3
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    lines = read_metrics(tmp_path)
    assert {"env_steps", "updates", "wall_seconds"} <= lines[0].keys()
    learning = [line for line in lines if "learner/loss" in line]
    assert learning
    words = [line.pop("limited_by") for line in lines if "limited_by" in line]
    assert set(words) <= {"warm-up", "environments", "learner"}
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert sum("eval/return_mean" in line for line in lines) == 2
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(("interval", "steps"), [(0, 300), (150, 150)])
def test_ctrl_c_ends_an_evaluation_and_a_resume_goes_on(monkeypatch, capsys, tmp_path, interval, steps):
    """An evaluation may take minutes: it is said that it runs, and the first Ctrl-C is enough."""
    slices = []

    def play(self, seconds):
        slices.append(seconds)
        if len(slices) == 3:
            signal.raise_signal(signal.SIGINT)
        assert len(slices) <= 3, "the evaluation goes on after Ctrl-C"

    config = tiny_config(eval=EvalConfig(interval=interval, episodes=3))
    with monkeypatch.context() as patched:
        patched.setattr("worldloom.runs.inline.RunEvaluation.play", play)
        patched.setattr("worldloom.runs.inline.SAID_AFTER", -1.0)
        summary = InlineTrainer(config, tmp_path).train()
    assert (summary["status"], summary["eval_return_mean"]) == ("interrupted", None)
    assert steps <= summary["env_steps"] < steps + 16
    assert capsys.readouterr().out.count("evaluating over 3 episodes") == 1
    summary = InlineTrainer(config, tmp_path, resume=True).train()
    assert (summary["status"], summary["eval_return_mean"]) == ("completed", 280)


@pytest.mark.parametrize(
    ("env", "context"), [("Counting", "stored"), ("Counting", "zeros"), ("Screen", "stored"), ("Mixed", "stored")]
)
@pytest.mark.pages
def test_dreamerv3_trains_on_vectors_images_and_mappings(env, context, tmp_path):
    config = dreamer_config(env, agent={**TINY_DREAMER, "replay_context": context})
    trainer = InlineTrainer(config, tmp_path)
    summary = trainer.train()
    assert summary["updates"] == (summary["env_steps"] - 100) // 8
    assert summary["train_ratio_actual"] == pytest.approx(4, rel=0.03)
    columns = trainer.replay.specs.keys()
    assert ({"deter", "stoch"} <= columns) == (context == "stored")
    agent, env = load_agent(tmp_path), make_env(config.env.id, num_envs=2)
    actions, _ = agent.act(env.reset(), None, np.ones(2, bool))
    assert actions.shape == (2, env.action_dim)
    np.testing.assert_array_equal(agent.acting_weights(), trainer.agent.acting_weights())


def test_dreamerv3_resumes_with_its_latents_in_replay(tmp_path):
    first = InlineTrainer(dreamer_config(), tmp_path)
    first.train()
    second = InlineTrainer(dreamer_config(), tmp_path, resume=True)
    a, b = first.replay.draw(16), second.replay.draw(16)
    assert a["deter"].any()
    assert all((a[name] == b[name]).all() for name in a)


def test_a_run_that_diverges_stops_and_leaves_the_last_good_checkpoint(tmp_path):
    config = dreamer_config(
        train=TrainConfig(total_steps=400, learning_starts=150, train_ratio=4),
        checkpoint=CheckpointConfig(interval=100),
    )
    trainer = InlineTrainer(diverging(config), tmp_path)
    with pytest.raises(FloatingPointError, match="--resume"):
        trainer.train()
    good = newest_checkpoint(tmp_path)
    assert good.name == "step-000000000100"
    resumed = InlineTrainer(config, tmp_path, resume=True)  # with the lower learning rate
    summary = resumed.train()
    assert summary["status"] == "completed"
    assert all(torch.isfinite(p).all() for p in resumed.agent.world_model.parameters())


def crowded(**sections):
    """16 environments, each of which makes few of the steps."""
    env = EnvConfig(id="tests.environments:Counting-v0", num_envs=16)
    return dataclasses.replace(dreamer_config(**sections), env=env)


def test_learning_waits_for_a_complete_window(tmp_path):
    config = crowded(train=TrainConfig(total_steps=400, learning_starts=20, train_ratio=4))
    trainer = InlineTrainer(config, tmp_path)
    assert trainer.train()["status"] == "completed"
    assert trainer.agent.updates == (400 - 20) * 4 // 32  # what was owed for the steps of the wait, too


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"replay": ReplayConfig(capacity=100)},
            "16 environments share it: 6 rows each, where a window has 9. Raise .* to 144, or",
        ),
        (
            {"train": TrainConfig(total_steps=120, learning_starts=20, train_ratio=4)},
            "train.total_steps is 120, but 16 environments share them: 7 steps each, where a window has 8",
        ),
    ],
)
def test_what_never_gives_a_window_is_refused_by_name(sections, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        InlineTrainer(crowded(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_seed_gives_one_run(tmp_path):
    def weights(name, seed):
        config = tiny_config(train=TrainConfig(total_steps=200, learning_starts=100, train_ratio=12, seed=seed))
        trainer = InlineTrainer(config, tmp_path / name)
        trainer.run.dir.mkdir(exist_ok=True)
        trainer.train()
        return trainer.agent.acting_weights()

    for name in "abc":
        (tmp_path / name).mkdir()
    a, b, c = weights("a", 1), weights("b", 1), weights("c", 2)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_resume_goes_on_with_replay_counters_and_optimisers(tmp_path):
    first = InlineTrainer(tiny_config(), tmp_path)
    first.train()
    longer = dataclasses.replace(tiny_config(), train=TrainConfig(total_steps=400, learning_starts=100, train_ratio=12))
    second = InlineTrainer(longer, tmp_path, resume=True)
    assert second.replay.accepted() == first.replay.accepted()
    assert second.run.limiter.updates == first.agent.updates == second.agent.updates
    assert second.run.limiter.updates_due() == 0
    a, b = first.agent.state_dict(), second.agent.state_dict()
    for key in ("model_optimizer", "policy_optimizer"):
        for index, state in a[key]["state"].items():
            assert all(torch.equal(state[n], b[key]["state"][index][n]) for n in state)
    for batch_a, batch_b in zip([first.replay.draw(8)], [second.replay.draw(8)], strict=True):
        assert all((batch_a[name] == batch_b[name]).all() for name in batch_a)
    summary = second.train()
    assert summary["env_steps"] >= 400
    assert summary["updates"] == summary["env_steps"] // 2
    assert summary["episodes"] >= first.run.recorder.counters["episodes"] + 10


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    InlineTrainer(tiny_config(), tmp_path).train()
    other = tiny_config(agent={**TINY_AGENT, "mlp_dim": 24})
    with pytest.raises(CheckpointError, match=r"config.mlp_dim is 16 there, 24 here"):
        InlineTrainer(other, tmp_path, resume=True)


def test_a_run_that_its_environment_ends_keeps_what_was_accepted(tmp_path):
    trainer = InlineTrainer(tiny_config("tests.environments:AlwaysFaulty-v0"), tmp_path)
    with pytest.raises(EnvironmentFailed, match="the simulator exploded"):
        trainer.train()
    resumed = InlineTrainer(tiny_config("tests.environments:AlwaysFaulty-v0"), tmp_path, resume=True)
    assert resumed.replay.accepted() == trainer.replay.accepted()
    assert resumed.replay.accepted().rows > 0


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path):
    config = tiny_config(checkpoint=CheckpointConfig(interval=140, keep=3))
    InlineTrainer(config, tmp_path).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert [int(name[-12:]) // 140 for name in names] == [1, 2, 2]  # at 140, 280 and the end at 300


def test_a_damaged_manifest_is_named_and_does_not_end_a_healthy_run(tmp_path):
    config = tiny_config(checkpoint=CheckpointConfig(interval=140, keep=3))
    InlineTrainer(config, tmp_path).train()
    oldest, *_ = sorted((tmp_path / "checkpoints").glob("step-*"))
    for damage in (b"", b"{", b"[]", b"\xff\xfe", b'{"format": "2", "rows": []}', b"{}"):
        (oldest / "manifest.json").write_bytes(damage)
        with pytest.raises(CheckpointError, match=f"{oldest.name} has no readable manifest"):
            read_manifest(oldest)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=440))
    summary = InlineTrainer(longer, tmp_path, resume=True).train()
    assert summary["status"] == "completed"
    assert summary["checkpoints_failed"] == 0
    assert verify(tmp_path) == []


def test_an_agent_is_rescued_where_there_is_room(tmp_path, monkeypatch):
    agent = InlineTrainer(tiny_config(), tmp_path / "run").agent
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
    here, there = (rescue_agent(folder, take_agent(agent)) for folder in (tmp_path / "run", tmp_path / "gone"))
    assert here.parent.parent == tmp_path / "run"
    assert there.parent.parent == tmp_path / "other"
    for folder in (here, there):
        assert np.array_equal(load_agent(folder).acting_weights(), agent.acting_weights())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert rescue_agent(tmp_path / "gone", take_agent(agent)) is None


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path):
    InlineTrainer(tiny_config(), tmp_path).train()
    good = newest_checkpoint(tmp_path)
    partial = good.with_name("step-000000999999.partial")
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    (good.with_name("step-000000999998")).mkdir()
    assert newest_checkpoint(tmp_path) == good


def test_a_damaged_rows_file_is_named(tmp_path):
    InlineTrainer(tiny_config(), tmp_path).train()
    rows = next((tmp_path / "checkpoints" / "rows").iterdir())
    rows.write_bytes(rows.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rows.name):
        InlineTrainer(tiny_config(), tmp_path, resume=True)


@pytest.mark.parametrize("harm", ["cut", "missing"])
@pytest.mark.parametrize("family", ["tdmpc2", "dreamerv3"])
def test_a_run_goes_on_without_the_rows_of_a_damaged_file(family, harm, tmp_path, capsys):
    parts = {
        "replay": ReplayConfig(capacity=400),
        "train": TrainConfig(total_steps=500, learning_starts=100, train_ratio=4),
        "checkpoint": CheckpointConfig(interval=100, compress=True),
    }
    config = tiny_config(**parts) if family == "tdmpc2" else dreamer_config(**parts)
    InlineTrainer(config, tmp_path).train()
    files = sorted((tmp_path / "checkpoints" / "rows").iterdir())
    assert len(files) >= 4
    first, last = (int(part) for part in files[1].stem.split("-")[1:])
    if harm == "cut":
        files[1].write_bytes(files[1].read_bytes()[:100])
    else:
        files[1].unlink()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=700))
    trainer = InlineTrainer(longer, tmp_path, resume=True)
    assert f"{last - first} rows of replay are lost" in capsys.readouterr().out
    end = trainer.replay.accepted().rows
    held = trainer.replay.rows_between(end - len(trainer.replay), end)
    count = held["obs"][:, 0]
    for origin in np.unique(held["origin"], axis=0):  # no window runs over the gap: a seam lies there
        mine = (held["origin"] == origin).all(1)
        together = ~held["is_first"][mine][1:]
        np.testing.assert_array_equal(np.diff(count[mine])[together], 1)
        assert (held["terminated"] | held["truncated"])[mine][:-1][~together].all()
    summary = trainer.train()
    assert summary["env_steps"] >= 700
    assert summary["rows_lost"] == last - first
    assert verify(tmp_path) == []
    again = InlineTrainer(longer, tmp_path, resume=True).replay  # what was moved is written anew, under new names
    assert again.accepted() == trainer.replay.accepted()


def test_compressed_rows_are_smaller_and_the_same(tmp_path):
    sizes = {}
    for compress in (False, True):
        config = dreamer_config("Screen", checkpoint=CheckpointConfig(interval=100, compress=compress))
        config = dataclasses.replace(config, train=TrainConfig(total_steps=200, learning_starts=100, train_ratio=1))
        folder = tmp_path / str(compress)
        trainer = InlineTrainer(config, folder)
        trainer.train()
        sizes[compress] = sum(path.stat().st_size for path in (folder / "checkpoints" / "rows").iterdir())
        loaded = InlineTrainer(config, folder, resume=True).replay
        mine, theirs = (r.rows_between(0, r.accepted().rows) for r in (trainer.replay, loaded))
        for name in mine:
            if name not in trainer.replay.extra_columns:  # written back since
                np.testing.assert_array_equal(mine[name], theirs[name])
    assert sizes[True] < 0.2 * sizes[False]


def test_a_full_disk_ends_no_run_and_leaves_no_half_file(tmp_path):
    """The kernel refuses to let any file grow beyond a size, as a full disk would."""
    import resource

    steps = TrainConfig(total_steps=500, learning_starts=100, train_ratio=4)
    config = tiny_config(checkpoint=CheckpointConfig(interval=100), train=steps)
    trainer = InlineTrainer(config, tmp_path)
    limits, save, seen = resource.getrlimit(resource.RLIMIT_FSIZE), trainer.save, []

    def save_on_a_full_disk():
        full = 200 <= trainer.run.limiter.env_steps < 400
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]) if full else limits)
        try:
            save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((tmp_path / "checkpoints").rglob("*.partial"))
        seen.append((full, newest_checkpoint(tmp_path).name, verify(tmp_path)))

    trainer.save = save_on_a_full_disk
    summary = trainer.train()
    assert [full for full, *_ in seen] == [False, True, True, False, False]
    assert all(broken == [] for *_, broken in seen)
    assert len({name for _, name, _ in seen[:3]}) == 1
    assert summary["checkpoints_failed"] == 2
    assert not list((tmp_path / "checkpoints").rglob("*.partial"))
    stop = dataclasses.replace(config, checkpoint=CheckpointConfig(interval=100, on_error="stop"))
    trainer = InlineTrainer(stop, tmp_path / "stop")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="no checkpoint could be written at step 1"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_metrics_that_cannot_be_written_cost_lines_and_not_the_run(tmp_path, caplog):
    """TensorBoard's writing thread dies of a full disk, and its queue would then block."""
    import resource

    logger = MetricsLogger(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        for step in range(400):
            logger.write(step, step, 0.0, {f"metric/{n}": 1.0 for n in range(20)})
            time.sleep(0.001)
        logger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics.jsonl cannot be written" in caplog.text
    assert "TensorBoard events cannot be written" in caplog.text


def test_rows_are_written_once_and_dropped_with_their_checkpoints(tmp_path):
    config = tiny_config(
        replay=ReplayConfig(capacity=150),
        train=TrainConfig(total_steps=600, learning_starts=100, train_ratio=1),
        checkpoint=CheckpointConfig(interval=100, keep=1),
    )
    trainer = InlineTrainer(config, tmp_path)
    trainer.train()
    files = sorted(path.stem.split("-") for path in (tmp_path / "checkpoints" / "rows").iterdir())
    spans = [(int(a), int(b)) for _, a, b in files]
    rows = trainer.replay.accepted().rows
    assert spans[-1][1] == rows
    assert spans[0][1] > rows - 150
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    InlineTrainer(config, tmp_path, resume=True)


def test_a_trained_agent_loads_and_acts_in_five_lines(tmp_path):
    trainer = InlineTrainer(tiny_config(), tmp_path)
    trainer.train()
    agent = load_agent(tmp_path)
    env = make_env("tests.environments:Counting-v0", num_envs=2)
    obs, act_state, is_first = env.reset(), None, np.ones(2, bool)
    for _ in range(10):
        actions, act_state = agent.act(obs, act_state, is_first, explore=False)
        step = env.step(actions)
        obs, is_first = step.obs, step.is_first
    np.testing.assert_array_equal(agent.acting_weights(), trainer.agent.acting_weights())


def test_evaluation_counts_whole_episodes_and_changes_no_generator(tmp_path):
    agent = InlineTrainer(tiny_config(), tmp_path).agent
    before = agent.acting_generator.get_state()
    make = lambda count: make_env("tests.environments:Counting-v0", count, 3)  # noqa: E731
    result = evaluate(agent, make, episodes=21, seed=5)
    assert result.returns == (280.0,) * 21
    assert result.lengths == (7,) * 21
    assert torch.equal(agent.acting_generator.get_state(), before)
