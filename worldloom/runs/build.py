"""The parts of a run, made from its configuration: environments, agent, replay and limiter."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from worldloom.acting.evaluation import ENVS_AT_ONCE, Evaluation, Evaluator, Player, start_evaluation
from worldloom.contract import check_acting, check_agent
from worldloom.envs import Environment, EnvironmentFailed, VectorEnv, make_env, make_environment
from worldloom.envs.vector import guarded
from worldloom.families import build_config, create_agent
from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.chunk import LIFE_LOST, base_columns
from worldloom.report.subject import Subject
from worldloom.runs.compiling import compiler_cache, drop_damaged_libraries
from worldloom.runs.config import EnvConfig, RunConfig, TrainConfig
from worldloom.runs.learners import check_share
from worldloom.runs.limiter import RateLimiter
from worldloom.runs.start import own_fields, read_start, take_weights
from worldloom.spaces import action_classes, observation_columns, observation_shape
from worldloom.types import Agent, ColumnSpec, Precision, WindowSpec, join_obs

logger = logging.getLogger(__name__)

EVAL_SEED = 1_000_003  # different from the seeds of training


@dataclass(frozen=True)
class EnvSpec:
    """Facts about an environment that an agent needs."""

    observation_space: Any  # as `worldloom.spaces.ObservationCodec` gives it
    action_space: Any  # as `worldloom.spaces.ActionCodec` gives it
    action_dim: int
    episode_length: int | None  # agent steps; None if there is no limit
    marks_lives: bool = False  # whether its rows say where a life was lost


@dataclass(frozen=True)
class AgentSpec:
    """Facts about an agent that replay, limiter and rollouts need."""

    description: dict[str, Any]
    batch_size: int
    windows: WindowSpec
    columns: Mapping[str, ColumnSpec]
    train_ratio: float
    pretrain: bool
    random_warmup: bool
    true_ends_hint: str | None
    plans: bool
    parameters: int
    device: str


def probe_env(config: RunConfig) -> EnvSpec:
    """Make one environment and read its spaces. Raises ValueError, TypeError or EnvironmentFailed."""
    c = config.env
    env = make_environment(c.id, c.action_repeat, None, c.atari, c.dmc, c.frame_stack, c.image_size)
    try:
        _try_out(env)
        return EnvSpec(env.observation_space, env.action_space, env.action_dim, env.episode_length, env.marks_lives)
    finally:
        env.close()


def _try_out(env: Environment) -> None:
    try:
        guarded(env.step_once)
    except (Exception, SystemExit) as error:
        raise EnvironmentFailed(
            f"{env.name} failed in its first step: {type(error).__name__}: {str(error).rstrip('.')}. "
            "Fix the environment first."
        ) from error


def make_run_agent(config: RunConfig, env: EnvSpec, device: str, seed: int) -> Agent:
    """Make an agent that is ready to learn. Raises ValueError or TypeError, naming the environment, if the algorithm
    does not support its spaces."""
    try:
        agent = create_agent(
            config.algorithm,
            env.observation_space,
            env.action_space,
            episode_length=env.episode_length,
            device=device,
            seed=seed,
            **config.agent,
        )
        if config.start.checkpoint is not None:
            take_weights(agent, read_start(config, env))
        _check_contract(agent, env)
        configure_agent(agent, config.train, device)
        return agent
    except (ValueError, TypeError) as error:
        raise type(error)(f"{config.algorithm} on {config.env.id}: {error}") from error


def _check_contract(agent: Agent, env: EnvSpec) -> None:
    """Check the agent against the contract, so that an error in its family shows before the training starts."""
    check_agent(agent, observation_shape(env.observation_space), env.action_dim)
    if env.marks_lives and not getattr(agent, "reads_lost_lives", False):
        raise ValueError("it does not learn from lost lives, but env.atari.life_loss is mark. Set it to end or ignore.")
    columns = observation_columns(env.observation_space)
    nothing = join_obs({name: np.zeros((1, *column.shape), column.dtype) for name, column in columns.items()})
    check_acting(agent, nothing, env.action_dim, action_classes(env.action_space))


def configure_agent(agent: Agent, train: TrainConfig, device: str) -> None:
    """Set the agent's precision, compilation and CUDA graphs as `train` says.

    Raises ValueError for a setting that the agent does not support."""
    cuda = torch.device(device).type == "cuda"
    auto = agent.default_precision if cuda else "float32"
    precision: Precision = auto if train.precision == "auto" else train.precision
    compiled = cuda if train.compile == "auto" else train.compile
    if compiled:
        drop_damaged_libraries(compiler_cache())
    if cuda:  # products of float32 in TF32, as the papers' code computes them
        torch.set_float32_matmul_precision("high")
    agent.configure_learning(precision, compiled and _can_compile(device), bool(train.capture))


def _can_compile(device: str) -> bool:
    """Return True if torch.compile works: on a CPU it needs a C++ compiler. Warns if there is none."""
    if torch.device(device).type != "cpu" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return True
    logger.warning("train.compile is true, but no C++ compiler (g++ or clang++) was found: updates are not compiled.")
    return False


def make_run_env(env: EnvConfig, num_envs: int, seed: int, render_mode: str | None = None) -> VectorEnv:
    return make_env(
        env.id, num_envs, seed, env.action_repeat, render_mode, env.atari, env.dmc, env.frame_stack, env.image_size
    )


class EnvFactory:
    """Makes the environments of a run; some may be built ahead, a few in each call, since building can take long."""

    def __init__(self, env: EnvConfig) -> None:
        self._env = env
        self._ahead: deque[Environment] = deque()
        self.seconds: list[float] = []  # that each environment took

    def build_ahead(self, wanted: int, seconds: float) -> bool:
        """Build at least one environment, and more while `seconds` last; return whether `wanted` are ready."""
        begun = time.monotonic()
        while len(self._ahead) < wanted:
            self._ahead.append(self._build())
            if time.monotonic() - begun > seconds:
                break
        return len(self._ahead) >= wanted

    def _build(self) -> Environment:
        c, begun = self._env, time.monotonic()
        made = guarded(make_environment, c.id, c.action_repeat, None, c.atari, c.dmc, c.frame_stack, c.image_size)
        self.seconds.append(time.monotonic() - begun)
        return made

    def __call__(self) -> Environment:
        return self._ahead.popleft() if self._ahead else self._build()

    def vector(self, num_envs: int, seed: int) -> VectorEnv:
        return VectorEnv(self, num_envs, seed)


class RunEvaluation:
    """One evaluation of a run, a little in each call; the same seed and weights play the same episodes."""

    def __init__(self, config: RunConfig, agent: Player) -> None:
        self._config, self._agent = config, agent
        self._envs = EnvFactory(config.env.for_evaluation())
        self._evaluator: Evaluator | None = None

    def play(self, seconds: float = float("inf")) -> Evaluation | None:
        """Build environments, then play, for about `seconds`; return the result, or None if there is more to do."""
        episodes, seed = self._config.eval.episodes, EVAL_SEED + self._config.train.seed
        if self._evaluator is None:
            if not self._envs.build_ahead(min(episodes, ENVS_AT_ONCE), seconds):
                return None
            make = functools.partial(self._envs.vector, seed=seed)
            self._evaluator = start_evaluation(self._agent, make, episodes, EVAL_SEED)
        return self._evaluator.play(seconds)


def actor_seed(config: RunConfig, actor: int, incarnation: int, lane: int = 0) -> int:
    """Return a seed for the environments of one lane of one incarnation of one actor, different from all others."""
    entropy = [config.train.seed, actor, incarnation, *([lane] if lane else [])]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def agent_spec(agent: Agent) -> AgentSpec:
    modules = [agent.world_model, *([] if agent.behaviour is None else [agent.behaviour])]
    parameters = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    return AgentSpec(
        agent.describe(),
        agent.batch_size,
        agent.windows,
        dict(agent.columns),
        agent.train_ratio,
        agent.pretrain,
        agent.random_warmup,
        agent.true_ends_hint,
        agent.plans,
        parameters,
        str(next(agent.world_model.parameters()).device),
    )


def replay_columns(env: EnvSpec, spec: AgentSpec) -> dict[str, ColumnSpec]:
    """Return every column of a replay row."""
    base = base_columns(observation_columns(env.observation_space), env.action_dim)
    return {**base, **further_columns(env, spec)}


def further_columns(env: EnvSpec, spec: AgentSpec) -> dict[str, ColumnSpec]:
    """Return the columns of a replay row that depend on environment and agent."""
    return {**(LIFE_LOST if env.marks_lives else {}), **spec.columns}


def make_replay(config: RunConfig, env: EnvSpec, spec: AgentSpec, shard: int = 0) -> ReplayBuffer:
    """Make one shard of replay. Raises MemoryError if it does not fit in memory, ValueError if it never holds a
    window: because it or an episode is too short, or because too many environments share it."""
    windows, longest = spec.windows, env.episode_length
    if not windows.crosses_episodes and longest is not None and longest + 1 < windows.length:
        raise ValueError(
            f"{config.env.id} ends its episodes after {longest} steps, but {config.algorithm} learns from windows of "
            f"{windows.length} rows, {windows.length - 1} steps. Lower env.action_repeat, or the field of agent that "
            "sets the length of its windows."
        )
    if windows.online_queue and config.replay.recency:
        raise ValueError(
            f"replay.recency is {config.replay.recency}, but {config.algorithm} takes every fresh window once before "
            "it draws any other. Leave replay.recency empty."
        )
    _check_rows_of_a_stream(config, windows.length)
    observations = observation_columns(env.observation_space)
    return ReplayBuffer(
        config.replay.capacity // config.replay.shards,
        join_obs({name: column.shape for name, column in observations.items()}),
        env.action_dim,
        obs_dtype=join_obs({name: column.dtype for name, column in observations.items()}),
        windows=dataclasses.replace(windows, recency=tuple(config.replay.recency)),
        columns=further_columns(env, spec),
        seed=config.train.seed + shard,
    )


def _check_rows_of_a_stream(config: RunConfig, length: int) -> None:
    """Raise ValueError if an environment's share of replay, or of the steps of the run, is shorter than a window."""
    actors, num_envs = max(config.runtime.env_actors, 1), config.env.num_envs
    if config.runtime.kind == "inline":
        actors = 1
    sharing = -(-actors // config.replay.shards) * num_envs
    who = f"{num_envs} environments of {actors} actors" if actors > 1 else f"{num_envs} environments"
    capacity = config.replay.capacity // config.replay.shards
    if length <= capacity < sharing * length:
        enough = sharing * length * config.replay.shards
        raise ValueError(
            f"replay.capacity is {config.replay.capacity:,}, but {who} share it: {capacity // sharing} rows each, "
            f"where a window has {length}. Raise replay.capacity to {enough:,}, or lower env.num_envs."
        )
    steps = config.train.total_steps
    if steps < num_envs * actors * (length - 1):
        raise ValueError(
            f"train.total_steps is {steps:,}, but {who} share them: {steps // (num_envs * actors)} steps each, where a "
            f"window has {length - 1}. Raise train.total_steps, or lower env.num_envs."
        )


def subject_of(config: RunConfig) -> Subject:
    """Return the facts about the run that its reports need."""
    c = config.env
    return Subject(
        algorithm=config.algorithm,
        env_id=c.id,
        action_repeat=c.action_repeat,
        atari=c.atari,
        dmc=c.dmc,
        total_steps=config.train.total_steps,
        seed=config.train.seed,
        runtime=config.runtime.kind,
    )


def make_limiter(config: RunConfig, spec: AgentSpec) -> RateLimiter:
    ratio = config.train.train_ratio or spec.train_ratio
    per_update = spec.batch_size * spec.windows.trained
    return RateLimiter(ratio, per_update, config.train.learning_starts, spec.pretrain)


def choose_device(name: str) -> str:
    """Return the device; auto takes a GPU if there is one. Raises ValueError for a device that is absent."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device is {name!r}, expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device is {name!r}, but there is no CUDA device here. Use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train.device is {name!r}, but the last CUDA device is cuda:{torch.cuda.device_count() - 1}.")
    return name


def check_device_for_ray(name: str) -> None:
    """Raise ValueError for a GPU by its number: what Ray starts sees only the GPUs that Ray gives it."""
    if name.startswith("cuda:") and name != "cuda:0":
        raise ValueError(
            f"train.device is {name!r}, but Ray chooses the GPU. Use cuda; to choose yourself, set "
            "CUDA_VISIBLE_DEVICES, or train with runtime.kind inline."
        )


def check_config(config: RunConfig) -> None:
    """Check everything that can be checked before anything starts. Raises ValueError or TypeError.

    With Ray the learner may run on another machine, so `cluster.share` checks the cluster's GPUs instead.
    """
    made = build_config(config.algorithm, own_fields(config))
    if (batch_size := getattr(made, "batch_size", None)) is not None:
        check_share(config.runtime.learners, batch_size)
    if config.runtime.kind == "inline":
        choose_device(config.train.device)
    else:
        check_device_for_ray(config.train.device)
