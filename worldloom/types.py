"""The data types and protocols that all modules share, and the one time alignment of the library.

Rows arrive. Row t is what is known on arriving at step t: obs[t], and the actions[t], rewards[t], terminated[t]
and truncated[t] that LED there. On an is_first row no action led here, so action and reward are zero. An episode of
L actions has L + 1 rows, the final observation included. Gymnasium's order is converted in acting/rollout.py
(and in `ReplayBuffer.add_episode` for recorded data), nowhere else.

Letters: B sequences or environments, T steps, H imagined steps, A action size, D deterministic size, S stochastic size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldloom.ranges import are_shares

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
    life_lost: NotRequired[Tensor]  # [B, T] bool, a life was lost in a game that goes on, where the environment says so
    task: NotRequired[Tensor]  # [B] or [B, T] integers, for multi-task models
    rows: NotRequired[Tensor]  # [B, T] int64, replay's row numbers, for writing columns back


@dataclass(frozen=True)
class LatentState:
    """A model's state of B environments: `deterministic` [B, D] and, in some models, `stochastic` [B, S K], flat.

    `features` is what heads read. `memory` holds what else must be remembered, tensors [B, ...] by name, the same names
    from every method of a model: STORM's last tokens, DIAMOND's last frames and actions.
    """

    deterministic: Tensor
    stochastic: Tensor | None = None
    classes: int = 0  # K of each categorical, where the stochastic part is made of them
    task: Tensor | None = None  # [B] task numbers, for multi-task models
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # [B, ...] each: what else a model must remember

    @property
    def features(self) -> Tensor:
        """The input of the heads, [B, D + S K]."""
        if self.stochastic is None:
            return self.deterministic
        return torch.cat([self.deterministic, self.stochastic], -1)

    @property
    def categorical(self) -> Tensor:
        """The stochastic part as a grid [B, S, K]. Raises ValueError for a model without one."""
        if self.stochastic is None or not self.classes:
            raise ValueError("this state has no categorical part, expected one of a model with categorical latents.")
        grid: Tensor = self.stochastic.unflatten(-1, (-1, self.classes))
        return grid

    @property
    def batch_size(self) -> int:
        """The number of environments, B."""
        return self.deterministic.shape[0]

    def to(self, device: torch.device | str) -> LatentState:
        """Return the state on another device."""
        return self._with(lambda part: part.to(device))

    def detach(self) -> LatentState:
        """Return the state without its history of gradients."""
        return self._with(Tensor.detach)

    def _with(self, change: Callable[[Tensor], Tensor]) -> LatentState:
        stochastic, task = (None if part is None else change(part) for part in (self.stochastic, self.task))
        memory = {name: change(part) for name, part in self.memory.items()}
        return LatentState(change(self.deterministic), stochastic, self.classes, task, memory)


@dataclass(frozen=True)
class Trajectory:
    """An imagined rollout of T actions, time-first."""

    states: tuple[LatentState, ...]  # T + 1, the start included
    rewards: Tensor  # [T, B, 1], of the move out of step t
    continues: Tensor  # [T, B, 1], chance in [0, 1] that the episode goes on after that move


@dataclass(frozen=True)
class WindowSpec:
    """The windows of replay that an agent's batches are made of."""

    length: int  # rows in a window, context included
    context: int  # leading rows that give context and are not trained on
    crosses_episodes: bool  # whether a window may run over an is_first row
    online_queue: bool = False  # give every fresh stretch of `length` rows to a batch once, before drawing uniformly
    # the share of a batch that comes from each of so many equal parts of the windows, the oldest first; () for uniform
    recency: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "recency", tuple(self.recency))  # a list where it was read from a file
        if self.recency and not are_shares(self.recency):
            raise ValueError(f"recency is {list(self.recency)}, expected shares in [0, 1] that sum to 1, or none.")

    @property
    def trained(self) -> int:
        """The replayed steps of one window, as the train ratio counts them."""
        return self.length - self.context


@dataclass(frozen=True)
class ColumnSpec:
    """An extra replay column that an agent asks for: one entry of `shape` per row."""

    shape: tuple[int, ...]
    dtype: str
    context_only: bool = False  # the agent reads this column in context rows only, so batches hold no other rows


@dataclass(frozen=True)
class Weights:
    """The parameters that `act` needs, as one flat buffer [P]. `version` counts publications and never decreases."""

    version: int
    flat: Array


ActState = Mapping[str, Tensor]
Metrics = dict[str, float]
Precision = Literal["float32", "bfloat16"]


class ModelDescription(TypedDict):
    """The data that rebuild a model, in JSON's types; a family adds its options under keys of their own."""

    family: str  # the name by which `worldloom.families` finds it, in every process
    obs_shape: list[int] | dict[str, list[int]]
    action_dim: int
    episode_length: int | None  # agent steps
    config: dict[str, Any]  # every field of the family's config


class Description(ModelDescription, total=False):
    """The data that rebuild an agent."""

    action_classes: list[int]  # the choices of each one-hot part of an action, where there are any


@runtime_checkable
class WorldModel(Protocol):
    """The methods of every model; each model is an nn.Module. Actions are float32 [..., A] in [-1, 1] or one-hot."""

    obs_shape: Any  # as the constructor takes it: (V,), (C, H, W), or a mapping of shapes
    action_dim: int  # A, as the constructor takes it

    def encode(self, obs: Obs) -> LatentState:
        """Return the state after seeing only obs [B, *obs_shape]."""

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        """Return the predicted state after `action` [B, A], which no observation has corrected."""

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """Return the state after `action` [B, A] led to `obs` [B, *obs_shape]."""

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Return `obs` (None without a decoder), `reward` [B, 1] and `continue` [B, 1], a probability."""

    def imagine(self, state: LatentState, actions: Tensor) -> Trajectory:
        """Roll the model forward under `actions` [T, B, A]."""

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalars: `loss`, the sum to minimise, and its parts. Raises ValueError for a batch of other shapes."""

    def initial_state(self, batch_size: int) -> LatentState:
        """Return the state of `batch_size` environments before any observation."""

    def update_targets(self) -> None:
        """Move slow copies of parameters; call it after each step of an optimiser on `compute_loss`. Does nothing if
        the model has none."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors; `create_world_model(directory)` reads them."""


class FreshColumns(Protocol):
    """Replay columns that a learning step made, perhaps still on their way from the device."""

    def arrays(self) -> dict[str, Array]:
        """Return arrays [B, T, ...] by name. Waits until they have arrived."""


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
    train_ratio: float  # replayed steps per environment step, as published
    default_precision: Precision  # of learning on a GPU, as published
    plans: bool  # whether acting is a search with the model, which is worth a GPU
    true_ends_hint: str | None  # advice for a user whose episodes have true ends, if the model ignores them
    updates: int  # gradient updates so far
    acting_generator: torch.Generator  # source of everything random in `act`; learning has its own

    def act(
        self, obs: ObsArray, act_state: ActState | None, is_first: Array, explore: bool = True
    ) -> tuple[Array, ActState]:
        """Return actions [E, A] for obs [E, *obs_shape] of E environments, and the new act_state; None starts all."""

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:
        """Return the entries of `columns` [E, ...] that belong to the rows just acted on."""

    def configure_learning(self, precision: Precision, compiled: bool, capture: bool) -> None:
        """Set how `learn` and `act` compute. bfloat16 leaves parameters, distributions and losses in float32; compiled
        runs updates through torch.compile; capture makes each call one CUDA graph, on CUDA devices. Raises ValueError
        for a setting that the model does not support."""

    def learn(self, batch: Batch) -> FreshColumns:
        """Make one update, for which the host does not wait on a GPU; return replay columns of the trained rows to
        write back (often none). Raises ValueError for a batch of other shapes."""

    def collect(self) -> Metrics:
        """Return means of the metrics over the updates since the last call. Waits for the device.

        Raises FloatingPointError if several updates in a row gave numbers that are not finite."""

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """Call `learn` and `collect`: return the metrics of this update, and its replay columns."""

    def acting_weights(self) -> Array:
        """Return the parameters that `act` needs, and no others, as one flat float32 array [P]."""

    def load_acting_weights(self, flat: Array) -> None:
        """Load what `acting_weights` returned. Raises ValueError for the weights of another model."""

    def describe(self) -> dict[str, Any]:
        """Return the data that rebuild the agent, here or elsewhere: a `Description`, and the family's options."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything: parameters, optimisers, scales, generators, and the number of updates as "updates". All of
        it is what a checkpoint can hold: tensors, arrays, numbers, strings, and lists and dicts of them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`; the agent then continues exactly from there."""


def is_image(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is that of a channel-first image, with three axes; everything else is a vector."""
    return len(shape) == 3


def split_obs(obs: Any) -> dict[str, Any]:
    """Return an observation by replay column: "obs", or "obs/<key>" for each entry of a mapping."""
    return {f"obs/{key}": value for key, value in obs.items()} if isinstance(obs, Mapping) else {"obs": obs}


def join_obs(columns: Mapping[str, Any]) -> Any:
    """Return the observation in replay columns, the inverse of `split_obs`; other columns are ignored."""
    if "obs" in columns:
        return columns["obs"]
    return {name.removeprefix("obs/"): value for name, value in columns.items() if name.startswith("obs/")}


def action_rows(rng: np.random.Generator, count: int, size: int, classes: Sequence[int]) -> Array:
    """Draw uniform random actions [count, size]: a one-hot for each of `classes`, or in [-1, 1] without classes."""
    if classes:
        return np.concatenate([np.eye(n, dtype=np.float32)[rng.integers(n, size=count)] for n in classes], 1)
    return rng.uniform(-1, 1, (count, size)).astype(np.float32)
