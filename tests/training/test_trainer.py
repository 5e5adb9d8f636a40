"""Training from recorded data: the Trainer, its settings, its callbacks, and what they refuse."""

import csv
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from tests.recorded import cartpole_episodes
from worldloom import create_world_model, load_agent
from worldloom.envs import make_env
from worldloom.families import create_agent
from worldloom.training import (
    Callback,
    CallbackError,
    CheckpointCallback,
    CheckpointError,
    EarlyStoppingCallback,
    LoggingCallback,
    ReplayBuffer,
    Trainer,
    TrainingConfig,
    train,
)

DREAMER = {"deter": 64, "hidden": 16, "units": 16, "stoch": 4, "classes": 4}
TDMPC = {"encoder_dim": 16, "mlp_dim": 16, "latent_dim": 16, "episodic": True}
QUICK = TrainingConfig(total_steps=4, batch_size=4, sequence_length=5, log_interval=2, eval_interval=2, eval_batches=2)


def model_of(family, seed=0):
    torch.manual_seed(seed)
    if family == "dreamerv3":
        return create_world_model("dreamerv3:size1m", obs_shape=(4,), action_dim=2, **DREAMER)
    return create_world_model("tdmpc2:1m", obs_shape=(4,), action_dim=2, **TDMPC)


@pytest.fixture(scope="module")
def buffer():
    return ReplayBuffer.from_trajectories(cartpole_episodes(20))


@pytest.fixture(scope="module")
def held_out():
    return ReplayBuffer.from_trajectories(cartpole_episodes(8, seed=1))


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, trainer):
        self.events.append(("begin", trainer.step))

    def on_step(self, trainer, metrics):
        assert math.isfinite(metrics["loss"])
        self.events.append(("step", trainer.step))

    def on_log(self, trainer, metrics):
        self.events.append(("log", trainer.step))

    def on_evaluate(self, trainer, metrics):
        assert all(name.startswith("eval/") for name in metrics)
        self.events.append(("evaluate", trainer.step))

    def on_checkpoint(self, trainer, path):
        assert (path / "trainer.msgpack").is_file()
        self.events.append(("checkpoint", trainer.step))

    def on_train_end(self, trainer):
        self.events.append(("end", trainer.step))


# Learning


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_training_on_200_recorded_episodes_halves_the_held_out_loss(family):
    episodes = cartpole_episodes(200)
    validation = ReplayBuffer.from_trajectories(cartpole_episodes(40, seed=1))
    torch.manual_seed(0)
    options = {"deter": 128, "hidden": 32, "units": 32} if family == "dreamerv3" else {"episodic": True, "mlp_dim": 64}
    preset = "dreamerv3:size1m" if family == "dreamerv3" else "tdmpc2:1m"
    model = create_world_model(preset, obs_shape=(4,), action_dim=2, **options)
    config = TrainingConfig(total_steps=200, sequence_length=10, learning_rate=1e-3)
    trainer = Trainer(model, config, callbacks=[])
    before = trainer.evaluate(validation)["loss"]
    trainer.train(ReplayBuffer.from_trajectories(episodes))
    assert trainer.evaluate(validation)["loss"] < before / 2


def test_train_is_one_line(buffer, capsys):
    trainer = train(model_of("tdmpc2"), buffer, total_steps=2, sequence_length=5, log_interval=1)
    assert trainer.step == 2
    assert "2/2 updates (100%)" in capsys.readouterr().out  # progress without a terminal


def test_the_same_seed_gives_the_same_training_whatever_torch_drew_before(buffer):
    found = []
    for noise in (1, 2):
        trainer = Trainer(model_of("dreamerv3"), QUICK, callbacks=[])
        torch.manual_seed(noise)
        outer = torch.get_rng_state()
        found.append(trainer.train(buffer))
        assert torch.equal(torch.get_rng_state(), outer)
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_a_loaded_checkpoint_goes_on_exactly(family, buffer, tmp_path):
    whole = Trainer(model_of(family), QUICK, callbacks=[])
    whole.train(buffer)
    first = Trainer(model_of(family), TrainingConfig(**{**vars(QUICK), "total_steps": 2}), callbacks=[])
    first.train(buffer)
    first.save_checkpoint(tmp_path / "half")
    second = Trainer(model_of(family, seed=9), QUICK, callbacks=[])
    second.load_checkpoint(tmp_path / "half")
    assert second.step == 2
    second.train(buffer)
    for name, value in whole.model.state_dict().items():
        assert_close(second.model.state_dict()[name], value, rtol=0, atol=0)
    loaded = create_world_model(tmp_path / "half")
    assert_close(loaded.state_dict(), first.model.state_dict(), rtol=0, atol=0)


def test_a_loaded_world_model_learns_its_target_values_too(buffer):
    model = model_of("tdmpc2")
    before = model.target_q.first.weight.clone()
    Trainer(model, QUICK, callbacks=[]).train(buffer)
    moved = (model.target_q.first.weight - before).abs().max()
    assert 0 < moved < (model.q.first.weight - before).abs().max()


def test_the_learning_rate_warms_up_linearly(buffer):
    trainer, rates = Trainer(model_of("tdmpc2"), TrainingConfig(**{**vars(QUICK), "warmup_steps": 4}), []), []

    class Rates(Callback):
        def on_step(self, trainer, metrics):
            rates.append(trainer._learner._optimizer.param_groups[0]["lr"])

    trainer.callbacks.append(Rates())
    trainer.train(buffer)
    assert rates == pytest.approx([3e-4 * share for share in (0.25, 0.5, 0.75, 1.0)])


def test_the_gradient_that_reaches_the_optimiser_is_clipped(buffer):
    model = model_of("tdmpc2")
    trainer = Trainer(model, TrainingConfig(**{**vars(QUICK), "total_steps": 1, "grad_clip": 1e-3}), callbacks=[])
    metrics = trainer.train(buffer)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert metrics["grad_norm"] > 1e-2
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_weight_decay_is_decoupled_from_the_gradient(buffer):
    """One update with decay differs from one without by learning rate x decay x the weights before."""
    rate, decay, found = 1e-2, 0.5, []
    before = {name: p.clone() for name, p in model_of("tdmpc2").named_parameters()}
    for weight_decay in (0.0, decay):
        model, changes = model_of("tdmpc2"), {"total_steps": 1, "learning_rate": rate, "weight_decay": weight_decay}
        Trainer(model, TrainingConfig(**{**vars(QUICK), **changes}), callbacks=[]).train(buffer)
        found.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    assert any(p.grad is not None and before[name].abs().max() > 0.01 for name, p in found[0].items())
    for name, plain in found[0].items():
        shrunk = rate * decay * before[name] if plain.grad is not None else torch.zeros_like(plain)
        assert_close(plain - found[1][name], shrunk, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["dreamerv3:size1m", "tdmpc2:1m"])
def test_an_agent_learns_from_recorded_data_with_its_own_update(preset, tmp_path):
    env = make_env("CartPole-v1")
    small = {**DREAMER, "batch_length": 8} if preset.startswith("dreamer") else TDMPC
    agent = create_agent(preset, env.observation_space, env.action_space, batch_size=4, **small)
    buffer = ReplayBuffer(1000, (4,), 2, windows=agent.windows, columns=agent.columns)
    for episode in cartpole_episodes(20):
        buffer.add_episode(**episode)
    behaviour = agent.behaviour or agent.world_model.policy
    before = [p.clone() for p in behaviour.parameters()]
    trainer = Trainer(agent, QUICK, callbacks=[])
    metrics = trainer.train(buffer)
    assert agent.updates == 4
    assert "policy_loss" in metrics
    assert any((a != b).any() for a, b in zip(before, behaviour.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "agent")
    loaded = load_agent(tmp_path / "agent")
    obs = env.reset()
    expected, _ = agent.act(obs, None, np.ones(1, bool), explore=False)
    agent_again = Trainer(loaded, QUICK, callbacks=[])
    agent_again.load_checkpoint(tmp_path / "agent")
    assert agent_again.step == 4
    assert loaded.updates == 4
    assert loaded.act(obs, None, np.ones(1, bool), explore=False)[0].shape == expected.shape
    with pytest.raises(CheckpointError, match="agent was trained"):
        Trainer(agent.world_model, QUICK, callbacks=[]).load_checkpoint(tmp_path / "agent")


# Events, stops, failures


def test_events_come_in_order(buffer, held_out):
    seen = Recorder()
    metrics = Trainer(model_of("tdmpc2"), QUICK, callbacks=[seen]).train(buffer, held_out)
    assert [name for name, _ in seen.events] == [
        "begin", "step", "step", "log", "evaluate", "step", "step", "log", "evaluate", "end",
    ]  # fmt: skip
    assert {"loss", "eval/loss"} <= metrics.keys()


def test_logs_are_written_to_every_place(buffer, held_out, tmp_path, capsys):
    Trainer(model_of("tdmpc2"), QUICK, callbacks=[LoggingCallback(tmp_path)]).train(buffer, held_out)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["updates"], "eval/loss" in line) for line in lines] == [(2, False), (2, True), (4, False), (4, True)]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["2", "2", "4", "4"]
    assert float(rows[1]["eval/loss"]) == lines[1]["eval/loss"]
    assert rows[0]["eval/loss"] == ""
    assert float(rows[0]["loss"]) == lines[0]["loss"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (line["updates"], pytest.approx(line["loss"])) for line in lines if "loss" in line
    ]
    assert not any("env_steps" in line for line in lines)
    assert "step 4: loss" in capsys.readouterr().out


def test_checkpoints_keep_the_newest_and_the_best(buffer, held_out, tmp_path):
    keeper = CheckpointCallback(tmp_path, interval=1, keep=2)
    Trainer(model_of("tdmpc2"), QUICK, callbacks=[keeper]).train(buffer, held_out)
    kept = ["best", "best.json", "step-000000003", "step-000000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    best = Trainer(model_of("tdmpc2"), QUICK, callbacks=[])
    best.load_checkpoint(tmp_path / "best")
    assert best.evaluate(held_out)["loss"] == pytest.approx(keeper.best)


def test_a_training_that_goes_on_knows_the_best_and_a_new_one_keeps_its_own(buffer, held_out, tmp_path):
    Trainer(model_of("tdmpc2"), QUICK, [CheckpointCallback(tmp_path, interval=2, keep=2)]).train(buffer, held_out)
    best = json.loads((tmp_path / "best.json").read_text())
    worse = TrainingConfig(**{**vars(QUICK), "total_steps": 6, "learning_rate": 10.0})
    keeper = CheckpointCallback(tmp_path, interval=2, keep=2)
    again = Trainer(model_of("tdmpc2"), worse, [keeper])
    again.load_checkpoint(tmp_path / "step-000000004")
    assert again.train(buffer, held_out)["eval/loss"] > best["value"] == keeper.best
    assert json.loads((tmp_path / "best.json").read_text()) == best
    assert json.loads((tmp_path / "best" / "manifest.json").read_text())
    other = TrainingConfig(**{**vars(QUICK), "total_steps": 2})
    Trainer(model_of("tdmpc2"), other, [CheckpointCallback(tmp_path, interval=1, keep=1)]).train(buffer)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-00000000{n}" for n in (2, 4, 6)]


def test_a_checkpoint_replaces_nothing_but_a_checkpoint(buffer, tmp_path):
    trainer = Trainer(model_of("tdmpc2"), QUICK, [])
    (tmp_path / "mine").mkdir()
    trainer.save_checkpoint(tmp_path / "mine")
    trainer.save_checkpoint(tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"mine holds 'thesis.txt', which is no part of a checkpoint"):
        trainer.save_checkpoint(tmp_path / "mine")
    trainer.save_checkpoint(tmp_path / "all" / "best")
    with pytest.raises(ValueError, match="all holds 'best'"):
        trainer.save_checkpoint(tmp_path / "all")


def test_training_stops_early_when_the_held_out_loss_no_longer_falls(buffer, held_out):
    config = TrainingConfig(**{**vars(QUICK), "total_steps": 50, "learning_rate": 1e-12})
    trainer = Trainer(model_of("tdmpc2"), config, callbacks=[EarlyStoppingCallback(patience=3, min_delta=1e-3)])
    trainer.train(buffer, held_out)
    assert trainer.step == 8  # the first evaluation is the best, three more wait


def test_ctrl_c_ends_after_the_update_and_saves(buffer, tmp_path):
    class Interrupts(Callback):
        def on_step(self, trainer, metrics):
            if trainer.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(
        model_of("tdmpc2"),
        TrainingConfig(**{**vars(QUICK), "total_steps": 1000}),
        callbacks=[Interrupts(), CheckpointCallback(tmp_path)],
    )
    trainer.train(buffer)
    assert trainer.step == 3
    assert (tmp_path / "step-000000003" / "trainer.msgpack").is_file()


@pytest.mark.parametrize("event", ["on_train_begin", "on_step", "on_log", "on_evaluate", "on_checkpoint"])
def test_a_failing_callback_is_named_and_harms_no_checkpoint(event, buffer, held_out, tmp_path):
    seen = Recorder()

    class Broken(Callback):
        pass

    def fail(self, trainer, *rest):
        raise KeyError("mine")

    setattr(Broken, event, fail)
    keeper = CheckpointCallback(tmp_path, interval=1)
    trainer = Trainer(model_of("tdmpc2"), QUICK, callbacks=[seen, keeper, Broken()])
    with pytest.raises(CallbackError, match=f"callback Broken failed in {event} after update .*KeyError: 'mine'"):
        trainer.train(buffer, held_out)
    assert "end" in [name for name, _ in seen.events]
    assert not list(tmp_path.glob("*.partial"))
    for folder in tmp_path.glob("*/"):
        Trainer(model_of("tdmpc2"), QUICK, callbacks=[]).load_checkpoint(folder)


def test_a_save_that_fails_leaves_the_checkpoint_before(buffer, tmp_path, monkeypatch):
    trainer = Trainer(model_of("tdmpc2"), QUICK, callbacks=[])
    trainer.save_checkpoint(tmp_path / "kept")
    monkeypatch.setattr("worldloom.training.trainer.write_msgpack", lambda *_: (_ for _ in ()).throw(OSError("full")))
    trainer.train(buffer)
    with pytest.raises(OSError, match="full"):
        trainer.save_checkpoint(tmp_path / "kept")
    again = Trainer(model_of("tdmpc2"), QUICK, callbacks=[])
    again.load_checkpoint(tmp_path / "kept")
    assert again.step == 0


# Refused


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("total_steps", 0, ValueError), ("batch_size", -1, ValueError), ("sequence_length", 1, ValueError),
        ("learning_rate", 0.0, ValueError), ("learning_rate", math.nan, ValueError), ("grad_clip", -1.0, ValueError),
        ("weight_decay", -0.1, ValueError), ("warmup_steps", -1, ValueError), ("log_interval", 0, ValueError),
        ("total_steps", 1.5, TypeError), ("batch_size", "16", TypeError), ("batch_size", True, TypeError),
        ("device", 3, TypeError),
    ],
)  # fmt: skip
def test_settings_are_checked_by_name(field, value, error):
    with pytest.raises(error, match=f"TrainingConfig.{field} is {value!r}"):
        TrainingConfig(**{field: value})


def test_settings_are_saved_as_json(tmp_path):
    config = TrainingConfig(total_steps=7, learning_rate=1e-4)
    config.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["total_steps"] == 7
    assert TrainingConfig.load(tmp_path / "a.json") == config
    (tmp_path / "b.json").write_text('{"learning_rat": 1}')
    with pytest.raises(ValueError, match="'learning_rat'.*Did you mean 'learning_rate'"):
        TrainingConfig.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        TrainingConfig.load(tmp_path / "c.json")


def test_callbacks_are_checked_before_anything_is_trained():
    class Misspelt(Callback):
        def on_steps(self, trainer):
            pass

    model = model_of("tdmpc2")
    with pytest.raises(ValueError, match="Misspelt has on_steps, which is no event. Did you mean on_step"):
        Trainer(model, QUICK, callbacks=[Misspelt()])
    with pytest.raises(TypeError, match="the class LoggingCallback"):
        Trainer(model, QUICK, callbacks=[LoggingCallback])
    with pytest.raises(TypeError, match="a function"):
        Trainer(model, QUICK, callbacks=[lambda trainer: None])
    with pytest.raises(TypeError, match="model is a str"):
        Trainer("tdmpc2:1m")
    with pytest.raises(ValueError, match="patience is 0"):
        EarlyStoppingCallback(patience=0)
    with pytest.raises(ValueError, match="keep 0"):
        CheckpointCallback("runs", keep=0)


def test_buffers_that_do_not_fit_are_refused_before_anything_is_trained(buffer):
    trainer = Trainer(model_of("tdmpc2"), QUICK, callbacks=[])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    other = ReplayBuffer(100, (3,), 2)
    with pytest.raises(ValueError, match=r"buffer has obs_shape=\(3,\), but the model has obs_shape=\(4,\)"):
        trainer.train(other)
    with pytest.raises(ValueError, match="obs_shape"):
        trainer.train(buffer, other)
    with pytest.raises(ValueError, match="no complete window of 5"):
        trainer.train(ReplayBuffer(100, (4,), 2))
    long = Trainer(trainer.model, TrainingConfig(sequence_length=400), callbacks=[])
    with pytest.raises(ValueError, match="no complete window of 400: the longest has"):
        long.train(buffer)
    with pytest.raises(ValueError, match="batches is 0"):
        trainer.evaluate(buffer, batches=0)
    assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


def test_a_loss_that_is_nan_changes_no_parameter(buffer):
    trainer = Trainer(model_of("tdmpc2"), QUICK, callbacks=[])
    losses = trainer.model.compute_loss
    trainer.model.compute_loss = lambda batch: {n: v * torch.nan for n, v in losses(batch).items()}
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="update 0: loss, .*learning_rate"):
        trainer.train(buffer)
    assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    trainer = Trainer(model_of("tdmpc2"), QUICK, callbacks=[])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        trainer.load_checkpoint(tmp_path)
    Trainer(model_of("dreamerv3"), QUICK, callbacks=[]).save_checkpoint(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another model"):
        trainer.load_checkpoint(tmp_path / "other")
    trainer.save_checkpoint(tmp_path / "cut")
    file = tmp_path / "cut" / "trainer.msgpack"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cut is damaged: trainer.msgpack has checksum"):
        trainer.load_checkpoint(tmp_path / "cut")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.msgpack", "training.json", "manifest.json"])
def test_a_checkpoint_that_changed_on_the_disk_is_refused_by_name(name, tmp_path):
    trainer = Trainer(model_of("tdmpc2"), QUICK, callbacks=[])
    path = trainer.save_checkpoint(tmp_path / "saved") / name
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(CheckpointError, match=name):
        trainer.load_checkpoint(tmp_path / "saved")
