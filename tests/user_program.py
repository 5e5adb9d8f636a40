"""A program as a user writes it, with every public name of worldloom and worldloom.training.

Tests run it, and check it with mypy --strict.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from worldloom import (
    Agent,
    Batch,
    Family,
    LatentState,
    ModelCard,
    ModelInfo,
    Trajectory,
    WindowSpec,
    WorldModel,
    create_agent,
    create_world_model,
    export,
    from_hub,
    get_config,
    get_model_info,
    list_models,
    load_agent,
    push_to_hub,
    register_model,
    save_agent,
)
from worldloom.envs import VectorEnv, make_env
from worldloom.imagination import OpenLoop, open_loop
from worldloom.tdmpc2 import TDMPC2Agent, TDMPC2Config, TDMPC2WorldModel
from worldloom.training import (
    Callback,
    CallbackError,
    CheckpointCallback,
    CheckpointError,
    EarlyStoppingCallback,
    LoggingCallback,
    ProgressCallback,
    ReplayBuffer,
    Trainer,
    TrainingConfig,
    read_episodes,
    read_lerobot,
    read_minari,
    train,
)

SMALL: dict[str, Any] = {"mlp_dim": 16, "encoder_dim": 16, "latent_dim": 16, "num_samples": 32, "num_elites": 4}


class Loudest(Callback):
    """Keeps the largest loss."""

    worst: float = 0.0

    def on_step(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self.worst = max(self.worst, metrics["loss"])


def models() -> WorldModel:
    presets: list[str] = list_models()
    infos: dict[str, ModelInfo] = list_models(verbose=True)
    info: ModelInfo = get_model_info("tdmpc")
    assert presets == list(infos)
    assert info["parameters"] == "5M"
    config = get_config("tdmpc2:1m", **SMALL)
    assert isinstance(config, TDMPC2Config)
    if "mine:1m" not in presets:
        register_model("mine", Family(TDMPC2Config, {"1m": SMALL}, "1m", TDMPC2WorldModel, TDMPC2Agent))
    model: WorldModel = create_world_model("mine", obs_shape=(3,), action_dim=1)
    state: LatentState = model.encode(torch.randn(2, 3))
    state = model.observe(model.predict(state, torch.zeros(2, 1)), torch.zeros(2, 1), torch.randn(2, 3))
    state = model.initial_state(2).to("cpu").detach() if state.batch_size == 2 else state
    assert state.features.shape == state.deterministic.shape
    assert state.stochastic is None
    decoded: dict[str, Any] = model.decode(state)
    assert decoded["reward"].shape == (2, 1)
    trajectory: Trajectory = model.imagine(state, torch.zeros(4, 2, 1))
    assert trajectory.rewards.shape == trajectory.continues.shape == (4, 2, 1)
    assert len(trajectory.states) == 5
    return model


def offline(model: WorldModel, folder: Path) -> None:
    episodes = [
        {"obs": np.zeros((8, 3)), "actions": np.zeros((7, 1)), "rewards": np.ones(7), "dones": np.arange(7) == 6}
        for _ in range(4)
    ]
    np.savez(folder / "episode.npz", **episodes[0])
    buffer: ReplayBuffer = ReplayBuffer(capacity=100, obs_shape=(3,), action_dim=1)
    for episode in episodes:
        buffer.add_episode(**episode)
    held_out = ReplayBuffer.from_trajectories(read_episodes(folder / "episode.npz"), windows=WindowSpec(4, 0, False))
    for read in (read_minari, read_lerobot):
        with contextlib.suppress(FileNotFoundError):
            next(read(folder / "absent"))
    batch: Batch = buffer.sample(batch_size=4, seq_len=5, device="cpu")
    losses: dict[str, torch.Tensor] = model.compute_loss(batch)
    assert losses["loss"].ndim == 0
    buffer.save(folder / "buffer.npz")
    assert ReplayBuffer.load(folder / "buffer.npz").num_episodes == buffer.num_episodes == 4
    assert len(buffer) == 32
    config = TrainingConfig(
        total_steps=4, batch_size=4, sequence_length=5, log_interval=2, eval_interval=2, device="cpu"
    )
    config.save(folder / "training.json")
    callbacks: list[Callback] = [
        Loudest(), LoggingCallback(folder / "logs"), CheckpointCallback(folder / "checkpoints"),
        EarlyStoppingCallback(patience=100), ProgressCallback(),
    ]  # fmt: skip
    trainer = Trainer(model, TrainingConfig.load(folder / "training.json"), callbacks=callbacks)
    metrics: dict[str, float] = trainer.train(buffer, held_out)
    assert metrics["eval/loss"] == trainer.evaluate(held_out)["loss"]
    saved: Path = trainer.save_checkpoint(folder / "last")
    trainer.load_checkpoint(saved)
    try:
        trainer.load_checkpoint(folder)
    except CheckpointError as error:
        print("refused:", error)
    try:
        train(model, buffer, total_steps=1, sequence_length=5, callbacks=[Failing()])
    except CallbackError as error:
        print("reported:", error)
    model.save_pretrained(folder / "model")
    create_world_model(folder / "model")


class Failing(Callback):
    def on_train_begin(self, trainer: Trainer) -> None:
        raise RuntimeError(f"at step {trainer.step}")


def acting(folder: Path) -> None:
    env: VectorEnv = make_env("Pendulum-v1", num_envs=2, action_repeat=2)
    box: gymnasium.Space[Any] = env.observation_space
    agent: Agent = create_agent("tdmpc2:1m", box, env.action_space, **SMALL)
    obs, act_state, is_first = env.reset(), None, np.ones(2, bool)
    rows = []
    for _ in range(8):
        actions, act_state = agent.act(obs, act_state, is_first, explore=False)
        step = env.step(actions)
        assert isinstance(step.obs, np.ndarray)  # of other tasks it is a mapping
        rows.append((step.obs[0], actions[0], step.rewards[0]))
        obs, is_first = step.obs, step.is_first
    seen, moves, rewards = (np.stack(column) for column in zip(*rows, strict=True))
    loop: OpenLoop = open_loop(agent.world_model, seen, moves, rewards)
    assert loop.predicted_rewards.shape == (3,)
    Trainer(agent, TrainingConfig(total_steps=1), callbacks=[]).save_checkpoint(folder / "agent")
    assert load_agent(folder / "agent", num_samples=32).updates == 0
    written: Path = export(agent, folder / "policy.pt2", plan=False)
    assert written.is_file()
    card = ModelCard(algorithm="tdmpc2:1m", task="Pendulum-v1", return_mean=-140.0, episodes=10, licence="cc-by-4.0")
    assert save_agent(agent, folder / "shared", card=card) == folder / "shared"
    try:
        print("pushed:", push_to_hub(agent, "two/many/names", card=card))
    except ValueError as error:
        print("refused:", error)
    try:
        from_hub("two/many/names")
    except ValueError as error:
        print("refused:", error)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    offline(models(), folder)
    acting(folder)
    print("done")
