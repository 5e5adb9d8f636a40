"""The DIAMOND agent: a recurrent policy acts on frames, and learns in imagination from the diffusion world model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from worldloom import functional as fn
from worldloom.capture import Captured, Tensors
from worldloom.diamond.actor_critic import ActorCritic
from worldloom.diamond.learning import DiamondLearning
from worldloom.diamond.rows import as_frames
from worldloom.diamond.world_model import DiamondWorldModel
from worldloom.generators import restore_generator
from worldloom.learner import Learner
from worldloom.nets import flatten, load_flat
from worldloom.staging import Columns
from worldloom.types import ActState, Array, Batch, ColumnSpec, Metrics, ObsArray, Precision, WindowSpec


class DiamondAgent:
    """An agent for one image and one choice of actions; `worldloom.types.Agent` describes the methods.

    action_classes: the number of choices, as a tuple of one. Raises ValueError for other actions.
    """

    random_warmup = True
    pretrain = True
    true_ends_hint = None
    columns: Mapping[str, ColumnSpec] = MappingProxyType({})
    plans = False
    default_precision: Precision = "float32"

    def __init__(self, model: DiamondWorldModel, seed: int = 0, action_classes: tuple[int, ...] = ()) -> None:
        if tuple(action_classes) != (model.action_dim,):
            found = f"{len(action_classes)} choices at once" if action_classes else "continuous actions"
            raise ValueError(f"DIAMOND takes one choice of actions (Discrete), and this environment has {found}.")
        self.world_model, self.action_classes, self.device = model, tuple(action_classes), model.device
        self.config = c = model.config
        self.batch_size, self.train_ratio = c.batch_size, c.train_ratio
        self.windows = WindowSpec(c.window, context=0, crosses_episodes=True)  # an episode may be shorter than a window
        self.behaviour = ActorCritic(model.obs_shape, model.action_dim, model.config).to(self.device)
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._act = Captured(self._choose, self.device, self.acting_generator)
        self.learning = DiamondLearning(model, self.behaviour, seed + 1)
        self._learner = Learner(self.learning, self.device)

    @property
    def updates(self) -> int:
        return self._learner.updates

    def configure_learning(self, precision: Precision, compiled: bool, capture: bool = True) -> None:
        """Set precision, compilation and CUDA graphs of `learn` and `act`; see `DiamondLearning.configure`."""
        self._learner.captured.enabled = self._act.enabled = capture and self.device.type == "cuda"
        self.learning.configure(precision, compiled)

    @torch.inference_mode()
    def act(
        self, obs: ObsArray, act_state: ActState | None, is_first: Array, explore: bool = True
    ) -> tuple[Array, ActState]:
        """Return one-hot actions [E, A] for obs [E, C, S, S], drawn from the policy, and the new act_state.

        explore: an environment takes a uniform action instead, with chance `epsilon`. Raises ValueError for obs of
        another shape, or an act_state of another number of rows.
        """
        shown = self.world_model.check_image("act", obs, 1)
        hidden, cell = self.behaviour.lstm.initial(len(shown))
        act_state = act_state or {"hidden": hidden, "cell": cell}
        if len(act_state["hidden"]) != len(shown):
            wrong = f"act_state has {len(act_state['hidden'])} rows and obs {len(shown)}"
            raise ValueError(f"act: {wrong}. Keep one act_state for each vector of environments.")
        found = self._act({"obs": shown, "is_first": torch.as_tensor(is_first), **act_state}, explore=explore)
        kept = {name: found[name].clone() for name in ("hidden", "cell")}  # the next call fills the same buffers
        return found["action"].cpu().numpy(), kept

    def _choose(self, given: Tensors, explore: bool) -> Tensors:
        """Return the LSTM's state after these frames, and drawn actions; runs on the device alone."""
        policy, kept = self.behaviour, (~given["is_first"]).float().unsqueeze(1)
        features = policy.encode(as_frames(given["obs"]))
        hidden, cell = policy.lstm(features, (given["hidden"] * kept, given["cell"] * kept))
        probs = policy.log_probs(hidden).exp()
        if explore:
            coin = torch.rand(len(probs), 1, generator=self.acting_generator, device=self.device)
            probs = torch.where(coin < self.config.epsilon, 1 / self.world_model.action_dim, probs)
        noise = fn.exponential_noise(probs.shape, self.acting_generator, self.device)
        return {"hidden": hidden, "cell": cell, "action": fn.draw_one_hot(probs, noise)}

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:  # noqa: ARG002 - the protocol's argument
        """Return {}: acting makes nothing for replay to store."""
        return {}

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """Make one update: one step of each part, in one backward pass.

        An update with a loss or gradient that is not finite changes nothing. Raises FloatingPointError after several of
        them in a row, ValueError for a batch of other keys or shapes.
        """
        columns = self.learn(batch)
        return self.collect(), columns.arrays()

    def learn(self, batch: Batch) -> Columns:
        """Make an update without waiting for the device; the returned columns are empty."""
        return self._learner.learn(batch)

    def collect(self) -> Metrics:
        """Return means since the last call. Waits for the device. Raises FloatingPointError as `update`."""
        return self._learner.collect()

    def acting_weights(self) -> Array:
        return flatten(list(self.behaviour.parameters()))

    def load_acting_weights(self, flat: Array) -> None:
        load_flat(list(self.behaviour.parameters()), flat)

    def describe(self) -> dict[str, Any]:
        return {**self.world_model.describe(), "action_classes": list(self.action_classes)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.world_model.state_dict(),
            "behaviour": self.behaviour.state_dict(),
            **self.learning.state_dict(),
            "updates": self.updates,
            "acting_generator": self.acting_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.world_model.load_state_dict(state["model"])
        self.behaviour.load_state_dict(state["behaviour"])
        self.learning.load_state_dict(state)
        restore_generator(self.acting_generator, state["acting_generator"])
        self._learner.resume(int(state["updates"]))
