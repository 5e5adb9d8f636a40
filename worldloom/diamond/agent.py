"""The DIAMOND agent: a recurrent policy acts on frames, and learns in imagination from the diffusion world model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from worldloom import functional as fn
from worldloom.arguments import check_act_state
from worldloom.capture import Tensors
from worldloom.diamond.actor_critic import ActorCritic
from worldloom.diamond.learning import DiamondLearning
from worldloom.diamond.rows import as_frames
from worldloom.diamond.world_model import DiamondWorldModel
from worldloom.imagining import ImaginingAgent
from worldloom.nets import flatten, load_flat
from worldloom.types import ActState, Array, ColumnSpec, ObsArray, Precision, WindowSpec


class DiamondAgent(ImaginingAgent):
    """An agent for one image and one choice of actions; `worldloom.types.Agent` describes the methods.

    action_classes: the number of choices, as a tuple of one. Raises ValueError for other actions.
    """

    random_warmup = True
    pretrain = True
    columns: Mapping[str, ColumnSpec] = MappingProxyType({})
    default_precision: Precision = "float32"
    world_model: DiamondWorldModel
    behaviour: ActorCritic
    learning: DiamondLearning

    def __init__(self, model: DiamondWorldModel, seed: int = 0, action_classes: tuple[int, ...] = ()) -> None:
        if tuple(action_classes) != (model.action_dim,):
            found = f"{len(action_classes)} choices at once" if action_classes else "continuous actions"
            raise ValueError(f"DIAMOND takes one choice of actions (Discrete), and this environment has {found}.")
        self.config = c = model.config
        self.batch_size, self.train_ratio = c.batch_size, c.train_ratio
        self.windows = WindowSpec(c.window, context=0, crosses_episodes=True)  # an episode may be shorter than a window
        behaviour = ActorCritic(model.obs_shape, model.action_dim, c).to(model.device)
        super().__init__(model, behaviour, DiamondLearning(model, behaviour, seed + 1), action_classes, seed)

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
        check_act_state(act_state, len(shown))
        found = self._act({"obs": shown, "is_first": torch.as_tensor(is_first), **act_state}, explore=explore)
        kept = {name: found[name].clone() for name in ("hidden", "cell")}  # the next call fills the same buffers
        return found["action"].cpu().numpy(), kept

    def _choose(self, given: Tensors, explore: bool = True) -> Tensors:
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

    def acting_weights(self) -> Array:
        return flatten(list(self.behaviour.parameters()))

    def load_acting_weights(self, flat: Array) -> None:
        load_flat(list(self.behaviour.parameters()), flat)
