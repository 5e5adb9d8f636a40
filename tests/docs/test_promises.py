"""What the API reference and the landing page promise, in their order, each held word for word.

Beside it: `tests/user_program.py`, one program that uses every public name.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import worldloom
import worldloom.training
from tests.recorded import cartpole_episodes
from worldloom import LatentState, Trajectory, WorldModel, create_world_model, get_config, get_model_info, list_models
from worldloom.training import ReplayBuffer, Trainer, TrainingConfig, train

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "dreamerv3:size1m": {"deter": 32, "hidden": 8, "units": 8, "stoch": 4, "classes": 4},
    "tdmpc2:1m": {"encoder_dim": 16, "mlp_dim": 16, "latent_dim": 16},
}
both = pytest.mark.parametrize("preset", SMALL)


def small(preset, obs_shape=(4,), action_dim=2):
    return create_world_model(preset, obs_shape=obs_shape, action_dim=action_dim, **SMALL[preset])


# create_world_model(model, obs_shape=, action_dim=, device=, **overrides): preset, alias or path


def test_create_world_model_takes_a_preset_an_alias_or_a_path(tmp_path):
    arguments = list(inspect.signature(create_world_model).parameters)
    assert arguments[:4] == ["model", "obs_shape", "action_dim", "device"]
    preset = create_world_model("tdmpc2:5m", obs_shape=(39,), action_dim=4, device="cpu")
    alias = create_world_model("tdmpc", obs_shape=(39,), action_dim=4)
    assert preset.config == alias.config
    changed = create_world_model("tdmpc", obs_shape=(39,), action_dim=4, latent_dim=64, mlp_dim=32)
    assert (changed.config.latent_dim, changed.config.mlp_dim) == (64, 32)
    changed.save_pretrained(tmp_path / "model")
    again = create_world_model(tmp_path / "model")
    obs = torch.randn(2, 39)
    assert torch.equal(again.encode(obs).features, changed.encode(obs).features)


# Aliases; list_models, verbose; get_config, get_model_info; an unknown name lists the nearest


def test_models_are_known_by_name():
    presets = list_models()
    assert all(isinstance(preset, str) for preset in presets)
    promised = [f"dreamerv3:size{n}m" for n in (12, 25, 50, 100, 200)] + [f"tdmpc2:{n}m" for n in (5, 19, 48, 317)]
    assert set(promised) <= set(presets)
    verbose = list_models(verbose=True)
    for preset in promised:
        info = verbose[preset]
        assert info == get_model_info(preset)
        assert info["family"] == preset.partition(":")[0]
        assert info["parameters"].endswith("M")
        assert info["default_obs"] in ("image", "vector")
        assert len(info["description"]) > 20
    sizes = {"dreamer": "size12m", "dreamer-small": "size12m", "dreamer-medium": "size50m", "dreamer-large": "size200m"}
    sizes |= {"tdmpc": "5m", "tdmpc2": "5m", "tdmpc-small": "5m", "tdmpc-medium": "48m", "tdmpc-large": "317m"}
    for alias, size in sizes.items():
        family = "dreamerv3" if alias.startswith("dreamer") else "tdmpc2"
        assert get_config(alias) == get_config(f"{family}:{size}")
    for ask in (get_config, get_model_info, lambda name: create_world_model(name, obs_shape=(3,), action_dim=1)):
        with pytest.raises(ValueError, match="unknown model 'tdmcp'. Did you mean tdmpc"):
            ask("tdmcp")


# The WorldModel protocol for both models


@both
def test_both_models_keep_the_protocol(preset, tmp_path):
    model = small(preset)
    assert isinstance(model, WorldModel)
    obs, action = torch.randn(3, 4), torch.eye(2)[[0, 1, 0]]
    state = model.encode(obs)
    assert isinstance(state, LatentState)
    assert state.batch_size == 3
    assert model.predict(state, action).features.shape == state.features.shape
    assert model.observe(state, action, obs).features.shape == state.features.shape
    assert model.initial_state(3).features.shape == state.features.shape
    decoded = model.decode(state)
    assert decoded["reward"].shape == decoded["continue"].shape == (3, 1)
    assert ((decoded["continue"] >= 0) & (decoded["continue"] <= 1)).all()
    if preset.startswith("tdmpc2"):
        assert decoded["obs"] is None
        assert decoded["q_values"].shape[0] == 3
        assert decoded["action"].shape == (3, 2)
        assert state.stochastic is None
    else:
        assert decoded["obs"].shape == (3, 4)
        assert torch.equal(state.features, torch.cat([state.deterministic, state.stochastic], -1))
    trajectory = model.imagine(state, action.expand(7, 3, 2))
    assert isinstance(trajectory, Trajectory)
    assert len(trajectory.states) == 8
    assert trajectory.rewards.shape == trajectory.continues.shape == (7, 3, 1)
    batch = {
        "obs": torch.randn(2, 6, 4),
        "actions": torch.eye(2)[torch.randint(2, (2, 6))],
        "rewards": torch.ones(2, 6),
    }
    losses = model.compute_loss(batch)
    assert all(value.ndim == 0 for value in losses.values())
    losses["loss"].backward()


# TrainingConfig(total_steps=50000, batch_size=16, sequence_length=50, learning_rate=3e-4, grad_clip=100.0) and more


def test_training_config_has_the_promised_fields_and_defaults(tmp_path):
    config = TrainingConfig()
    promised = {
        "total_steps": 50_000, "batch_size": 16, "sequence_length": 50, "learning_rate": 3e-4, "grad_clip": 100.0
    }  # fmt: skip
    assert {name: getattr(config, name) for name in promised} == promised
    for name in ("weight_decay", "warmup_steps", "log_interval", "eval_interval", "save_interval", "device", "seed"):
        assert hasattr(config, name)
    config.save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 16
    assert TrainingConfig.load(tmp_path / "config.json") == config
    with pytest.raises(ValueError, match="batch_size is -1, expected at least 1"):
        TrainingConfig(batch_size=-1)


# ReplayBuffer(capacity=, obs_shape=, action_dim=): add_episode, sample, save, load, from_trajectories, …


def test_replay_buffer_does_what_is_promised(tmp_path):
    buffer = ReplayBuffer(capacity=10_000, obs_shape=(4,), action_dim=2)
    episodes = cartpole_episodes(5)
    for episode in episodes:
        buffer.add_episode(
            obs=episode["obs"], actions=episode["actions"], rewards=episode["rewards"], dones=episode["dones"]
        )
    assert buffer.num_episodes == 5
    assert len(buffer) == sum(len(episode["obs"]) for episode in episodes)
    batch = buffer.sample(batch_size=3, seq_len=7, device="cpu")
    assert batch["obs"].shape == (3, 7, 4)
    assert batch["actions"].shape == (3, 7, 2)
    assert batch["rewards"].shape == batch["continues"].shape == (3, 7)
    buffer.save(tmp_path / "buffer.npz")
    assert len(ReplayBuffer.load(tmp_path / "buffer.npz")) == len(buffer)
    assert ReplayBuffer.from_trajectories(episodes).num_episodes == 5


WRONG = {
    "dones of another length": ({"dones": np.zeros(3)}, "3 dones; expected L actions"),
    "dones before the end": ({"dones": np.arange(6) == 2}, "dones\\[2\\] is set before the end"),
    "actions out of range": ({"actions": np.full((6, 2), 1.5)}, "actions leave \\[-1, 1\\]"),
    "actions of the wrong width": ({"actions": np.zeros((6, 3))}, "actions are \\(6, 3\\), expected \\(6, 2\\)"),
    "choices that do not exist": ({"actions": np.full(6, 2)}, "expected integers from 0 to 1"),
    "NaN observations": ({"obs": np.full((7, 4), np.nan)}, "obs holds NaN or infinity"),
    "rewards beyond float32": ({"rewards": np.full(6, 1e39)}, "rewards holds NaN or infinity"),
    "infinite rewards": ({"rewards": np.full(6, np.inf)}, "rewards holds NaN or infinity"),
    "observations of another shape": ({"obs": np.zeros((7, 5))}, "'obs' is \\(7, 5\\), expected \\(7, 4\\)"),
    "no steps": ({"obs": np.zeros((1, 4)), "actions": np.zeros((0, 2)), "rewards": [], "dones": []}, "0 actions"),
    "more than fits": (
        {"obs": np.zeros((60, 4)), "actions": np.zeros((59, 2)), "rewards": np.zeros(59), "dones": np.zeros(59)},
        "60 rows at once exceed replay.capacity=50",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_episodes_are_refused_before_the_buffer_changes(case):
    change, words = WRONG[case]
    good = {"obs": np.zeros((7, 4)), "actions": np.zeros((6, 2)), "rewards": np.ones(6), "dones": np.arange(6) == 5}
    buffer = ReplayBuffer(capacity=50, obs_shape=(4,), action_dim=2)
    buffer.add_episode(**good)
    before = buffer.accepted(), buffer.rows_between(0, 7)
    with pytest.raises(ValueError, match=words):
        buffer.add_episode(**{**good, **change})
    assert buffer.accepted() == before[0]
    assert all((buffer.rows_between(0, 7)[name] == value).all() for name, value in before[1].items())
    with pytest.raises(ValueError, match="no complete window of 8: the longest has 7"):
        buffer.sample(batch_size=2, seq_len=8)


# Trainer(model, config, callbacks=[…]).train(buffer), evaluate, save_checkpoint, load_checkpoint; train(…) in one line


@both
def test_a_world_model_trains_alone(preset, tmp_path):
    buffer = ReplayBuffer.from_trajectories(cartpole_episodes(10))
    trainer = Trainer(small(preset), TrainingConfig(total_steps=2, batch_size=2, sequence_length=6), callbacks=[])
    assert trainer.train(buffer)["loss"] > 0
    assert trainer.evaluate(buffer, batches=2)["loss"] > 0
    trainer.save_checkpoint(tmp_path / "checkpoint")
    trainer.load_checkpoint(tmp_path / "checkpoint")
    assert isinstance(create_world_model(tmp_path / "checkpoint"), WorldModel)
    assert train(small(preset), buffer, total_steps=1, sequence_length=6, callbacks=[]).step == 1


def test_directories_without_a_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        create_world_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds neither checkpoints nor a config.json"):
        worldloom.load_agent(tmp_path)


# Typed, standalone


def test_a_users_program_runs_and_is_clean_under_strict_mypy(tmp_path):
    program = ROOT / "tests" / "user_program.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.stdout.endswith("done\n"), ran.stderr
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", program], capture_output=True, text=True, cwd=ROOT, env=environment
    )  # pyproject.toml says strict
    assert checked.returncode == 0, checked.stdout


def test_the_users_program_uses_every_public_name():
    text = (ROOT / "tests" / "user_program.py").read_text()
    for module in (worldloom, worldloom.training):
        for name in module.__all__:
            assert hasattr(module, name)
            assert text.count(name) >= 2, f"{name} is imported but not used"


def test_the_wheel_runs_the_quick_start_without_ray(tmp_path):
    source = tmp_path / "source"  # building leaves files behind
    shutil.copytree(ROOT / "worldloom", source / "worldloom", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("worldloom-*.whl"))) as wheel:
        wheel.extractall(site)
    top = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"worldloom"}
    for name in ("py.typed", "report/published_scores.csv", "report/report.html.j2"):
        assert (site / "worldloom" / name).is_file()
    absent = ("ray", "jsonargparse", "tensorboardX", "rich", "matplotlib", "imageio", "h5py", "yaml")
    program = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import numpy as np, torch, worldloom
assert worldloom.__file__.startswith({str(site)!r}), worldloom.__file__
from worldloom import create_world_model
model = create_world_model("tdmpc2:5m", obs_shape=(39,), action_dim=4)
trajectory = model.imagine(model.encode(torch.randn(1, 39)), torch.rand(15, 1, 4) * 2 - 1)
print(list(trajectory.rewards.shape))
from worldloom.training import LoggingCallback, ReplayBuffer, train
buffer = ReplayBuffer(capacity=1000, obs_shape=(39,), action_dim=4)
buffer.add_episode(obs=np.zeros((9, 39)), actions=np.zeros((8, 4)), rewards=np.ones(8), dones=np.zeros(8))
print(train(model, buffer, total_steps=1, sequence_length=4).step)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == "[15, 1, 1]"
    assert ran.stdout.splitlines()[-1] == "1"
