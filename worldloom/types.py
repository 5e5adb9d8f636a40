"""The nouns and protocols that everything else stands on, and THE time alignment, stated once.

Rows arrive. Row t is what is known on arriving at step t: obs[t], and the actions[t], rewards[t], terminated[t]
and truncated[t] that LED there. On an is_first row no action led here, so action and reward are zero. An episode of
L actions has L + 1 rows, the final observation included. Gymnasium's order is converted in acting/rollout.py
(and in `ReplayBuffer.add_episode` for recorded data), nowhere else.

Letters: B sequences or environments, T steps, H imagined steps, A action size, D deterministic size, S stochastic size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Obs = Tensor | Mapping[str, Tensor]
ObsArray = Array | Mapping[str, Array]
ObsShape = tuple[int, ...] | Mapping[str, tuple[int, ...]]


class Batch(TypedDict):
    """Experience from replay, batch-first: B sequences of T rows (see the alignment above)."""

    obs: Obs  # [B, T, *obs_shape] or a mapping of them; uint8 images or float32 vectors
    actions: Tensor  # [B, T, A] float32, in [-1, 1] or one-hot
    rewards: Tensor  # [B, T] float32, as the environment gave it (no symlog, no clipping)
    continues: NotRequired[Tensor]  # [B, T] float32, 1 - terminated
    is_first: NotRequired[Tensor]  # [B, T] bool, this row starts an episode
    terminated: NotRequired[Tensor]  # [B, T] bool, a true end: the value after it is zero
    truncated: NotRequired[Tensor]  # [B, T] bool, cut short: bootstrap from obs[:, t]
    task: NotRequired[Tensor]  # [B] or [B, T] integers, for multi-task models
    rows: NotRequired[Tensor]  # [B, T] int64, replay's row numbers, for writing columns back


@dataclass(frozen=True)
class LatentState:
    """What a model knows of B environments: `deterministic` [B, D] and, if it has one, `stochastic` [B, S K] flat."""

    deterministic: Tensor
    stochastic: Tensor | None = None
    classes: int = 0  # K of each categorical, where the stochastic part is made of them
    task: Tensor | None = None  # [B] numbers of the tasks, for multi-task models

    @property
    def features(self) -> Tensor:
        """[B, D + S K]: what the heads read."""
        if self.stochastic is None:
            return self.deterministic
        return torch.cat([self.deterministic, self.stochastic], -1)

    @property
    def categorical(self) -> Tensor:
        """[B, S, K]: the stochastic part as a grid. Raises ValueError for a model that has none."""
        if self.stochastic is None or not self.classes:
            raise ValueError("this state has no categorical part, expected that of a model that has one.")
        grid: Tensor = self.stochastic.unflatten(-1, (-1, self.classes))
        return grid

    @property
    def batch_size(self) -> int:
        return self.deterministic.shape[0]

    def to(self, device: torch.device | str) -> LatentState:
        moved = (None if part is None else part.to(device) for part in (self.stochastic, self.task))
        stochastic, task = moved
        return LatentState(self.deterministic.to(device), stochastic, self.classes, task)

    def detach(self) -> LatentState:
        cut = None if self.stochastic is None else self.stochastic.detach()
        return LatentState(self.deterministic.detach(), cut, self.classes, self.task)


@dataclass(frozen=True)
class Trajectory:
    """An imagined rollout of T actions, time-first."""

    states: tuple[LatentState, ...]  # T + 1, the start included
    rewards: Tensor  # [T, B, 1], of the move out of step t
    continues: Tensor  # [T, B, 1], chance in [0, 1] that the episode goes on after that move


@dataclass(frozen=True)
class WindowSpec:
    """How an agent wants its batches drawn from replay."""

    length: int  # rows in a window, context included
    context: int  # leading rows that give context and are not trained on
    crosses_episodes: bool  # may a window run over an is_first row
    online_queue: bool = False  # give every fresh stretch of `length` rows to a batch once, before drawing uniformly

    @property
    def trained(self) -> int:
        """Replayed steps that one window counts for in the train ratio."""
        return self.length - self.context


@dataclass(frozen=True)
class ColumnSpec:
    """An extra replay column that an agent asks for: one entry of `shape` per row."""

    shape: tuple[int, ...]
    dtype: str
    context_only: bool = False  # the agent reads the context rows of a window alone, so batches hold no others


@dataclass(frozen=True)
class Weights:
    """What `act` needs, as one flat buffer. `version` counts publishes and never goes back."""

    version: int
    flat: Array


ActState = Mapping[str, Tensor]
Metrics = dict[str, float]
Precision = Literal["float32", "bfloat16"]


class ModelDescription(TypedDict):
    """What a model is rebuilt from, in JSON's types; a family adds its options as keys of their own."""

    family: str  # the name by which `worldloom.families` finds it, in every process
    obs_shape: list[int] | dict[str, list[int]]
    action_dim: int
    episode_length: int | None  # agent steps
    config: dict[str, Any]  # every field of the family's config


class Description(ModelDescription, total=False):
    """What an agent is rebuilt from."""

    action_classes: list[int]  # the choices of each one-hot part of an action, where there are any


@runtime_checkable
class WorldModel(Protocol):
    """What every model does; each is an nn.Module. Actions are float32 [.., A] in [-1, 1] or one-hot."""

    obs_shape: Any  # as it was given it: (V,), (C, H, W), or a mapping of shapes
    action_dim: int  # as it was given it

    def encode(self, obs: Obs) -> LatentState:
        """The state after seeing only obs [B, *obs_shape]."""

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        """The state after `action` [B, A], without seeing what came of it."""

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """The state after `action` [B, A] led to `obs` [B, *obs_shape]."""

    def decode(self, state: LatentState) -> dict[str, Any]:
        """`obs` (None without a decoder), `reward` [B, 1] and `continue` [B, 1], a probability."""

    def imagine(self, state: LatentState, actions: Tensor) -> Trajectory:
        """Roll the model forward under `actions` [T, B, A]."""

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars: `loss`, the sum to minimise, and its parts."""

    def initial_state(self, batch_size: int) -> LatentState:
        """The state before anything was seen."""

    def update_targets(self) -> None:
        """Move slow copies of parameters, after each step of an optimiser on `compute_loss`; does nothing where the
        model has none."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors; `create_world_model(directory)` reads them."""


class FreshColumns(Protocol):
    """Replay columns that a learning step made, perhaps still on their way from the device."""

    def arrays(self) -> dict[str, Array]:
        """[B, T, ...] by name. Waits until they are there."""


@runtime_checkable
class Agent(Protocol):
    """A world model that acts and learns.

    `act_state` carries what each environment must remember, one row each; `is_first` resets a row.
    """

    world_model: Any
    behaviour: torch.nn.Module | None  # what acting needs beyond the world model
    batch_size: int  # B, windows per update
    windows: WindowSpec
    columns: Mapping[str, ColumnSpec]  # extra replay columns, empty where none are needed
    random_warmup: bool  # act uniformly at random until learning starts
    pretrain: bool  # replay the warm-up steps at the train ratio too, in one burst when learning starts
    train_ratio: float  # the published one: replayed steps per environment step
    default_precision: Precision  # of learning on a GPU, as published
    plans: bool  # acting is a search with the model, which is worth a GPU
    true_ends_hint: str | None  # what to tell a user whose episodes end truly, where the model has no notion of it
    updates: int  # gradient updates so far
    acting_generator: torch.Generator  # all the randomness of `act`; learning has its own

    def act(
        self, obs: ObsArray, act_state: ActState | None, is_first: Array, explore: bool = True
    ) -> tuple[Array, ActState]:
        """Actions [E, A] for obs [E, *obs_shape] of E environments; act_state None starts all of them."""

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:
        """The entries of `columns` [E, ...] that belong to the rows just acted on."""

    def configure_learning(self, precision: Precision, compiled: bool, capture: bool) -> None:
        """How `learn` and `act` compute: bfloat16 leaves parameters, distributions and losses in float32; compiled runs
        updates through torch.compile; capture makes each call one CUDA graph, where the device is one. Raises
        ValueError for what the model cannot do."""

    def learn(self, batch: Batch) -> FreshColumns:
        """One learning step, which on a GPU is not waited for. Returns replay columns of the trained rows to write
        back (often none). Raises ValueError for a batch of other shapes."""

    def collect(self) -> Metrics:
        """Means of the metrics over the steps since the last call. Waits for the device.

        Raises FloatingPointError where several steps in a row gave numbers that are not finite."""

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """`learn` and `collect` in one: metrics of this step, and its replay columns."""

    def acting_weights(self) -> Array:
        """What `act` needs and nothing more, as one flat float32 array."""

    def load_acting_weights(self, flat: Array) -> None:
        """Take what `acting_weights` gave. Raises ValueError for another model's."""

    def describe(self) -> dict[str, Any]:
        """What `load_agent` and other processes rebuild the agent from: a `Description`, and the family's options."""

    def state_dict(self) -> dict[str, Any]:
        """Everything: parameters, optimisers, scales, generators, and the number of updates as "updates". Tensors,
        arrays, numbers, strings, and lists and dicts of them, which a checkpoint can hold."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""


def is_image(shape: tuple[int, ...]) -> bool:
    """Channel-first images have three axes; everything else is a vector."""
    return len(shape) == 3


def split_obs(obs: Any) -> dict[str, Any]:
    """An observation by replay column: "obs", or "obs/<key>" for each entry of a mapping."""
    return {f"obs/{key}": value for key, value in obs.items()} if isinstance(obs, Mapping) else {"obs": obs}


def join_obs(columns: Mapping[str, Any]) -> Any:
    """The inverse of `split_obs`; columns that belong to no observation are left aside."""
    if "obs" in columns:
        return columns["obs"]
    return {name.removeprefix("obs/"): value for name, value in columns.items() if name.startswith("obs/")}


def action_rows(rng: np.random.Generator, count: int, size: int, classes: Sequence[int]) -> Array:
    """Uniform random actions [count, size]: a one-hot for each of `classes`, or in [-1, 1] where there are none."""
    if classes:
        return np.concatenate([np.eye(n, dtype=np.float32)[rng.integers(n, size=count)] for n in classes], 1)
    return rng.uniform(-1, 1, (count, size)).astype(np.float32)
