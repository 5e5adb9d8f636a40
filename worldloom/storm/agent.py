"""The STORM agent: it keeps the last tokens to act, and learns world model, policy and critic in one update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from worldloom.arguments import check_act_state
from worldloom.capture import Tensors
from worldloom.imagining import ImaginingAgent
from worldloom.nets import flatten, load_flat
from worldloom.observations import as_mapping
from worldloom.storm.behaviour import Behaviour
from worldloom.storm.learning import STORMLearning
from worldloom.storm.world_model import STORMWorldModel
from worldloom.types import ActState, Array, ColumnSpec, Metrics, ObsArray, Precision, WindowSpec


class STORMAgent(ImaginingAgent):
    """An agent with a short memory of tokens for each environment; `worldloom.types.Agent` describes the methods.

    action_classes: the choices of each one-hot part of an action; () for continuous actions.
    """

    random_warmup = True
    pretrain = False
    reads_lost_lives = True
    columns: Mapping[str, ColumnSpec] = {}
    default_precision: Precision = "bfloat16"
    world_model: STORMWorldModel
    behaviour: Behaviour
    learning: STORMLearning

    def __init__(self, model: STORMWorldModel, seed: int = 0, action_classes: tuple[int, ...] = ()) -> None:
        self.config = c = model.config
        self.batch_size, self.train_ratio = c.batch_size, c.train_ratio
        # the row before those that are trained gives the latent that the first token is made of
        self.windows = WindowSpec(c.batch_length + 1, context=1, crosses_episodes=True)
        behaviour = Behaviour(c, model.action_dim, tuple(action_classes)).to(model.bins.device)
        super().__init__(model, behaviour, STORMLearning(model, behaviour, seed + 1), action_classes, seed)

    # Acting

    @torch.inference_mode()
    def act(
        self,
        obs: ObsArray,
        act_state: ActState | None,
        is_first: Array,
        explore: bool = True,  # noqa: ARG002 - the reference samples in evaluation too
    ) -> tuple[Array, ActState]:
        """Return actions [E, A] for obs [E, *obs_shape], one-hot or drawn from the normal and not clipped, and the new
        act_state. Raises ValueError for obs of other keys or shapes, or an act_state of another number of rows."""
        shown = {name: torch.as_tensor(value) for name, value in as_mapping(obs).items()}
        shown = self.world_model.as_mapping(shown, "act", 1)
        envs = len(next(iter(shown.values())))
        given = {f"obs/{name}": value for name, value in shown.items()}
        given |= {"is_first": torch.as_tensor(is_first), **self._previous(act_state, envs)}
        kept = {name: value.clone() for name, value in self._act(given).items()}  # the next call fills the same buffers
        return kept["action"].cpu().numpy(), kept

    def _choose(self, given: Tensors) -> Tensors:
        """Return the memory after these observations, and a drawn action; runs on the device alone."""
        model, first, generator = self.world_model, given["is_first"], self.acting_generator
        rows = len(first)
        obs = {name: given[f"obs/{name}"] for name in as_mapping(model.obs_shape)}
        _, seen = model.see(obs, model.draw_noise(rows, generator=generator))
        memory, filled, h = model.advance(given["memory"], given["filled"], given["stoch"], given["action"], first)
        z = seen
        if self.config.act_on == "prior":  # the action does not depend on what is seen now, as published
            z = model.draw(model.log_probs(model.prior(h)), model.draw_noise(rows, generator=generator))
        policy = self.behaviour.policy
        action = policy.sample(torch.cat([z, h], -1), policy.draw_noise((rows,), generator, self.device))
        return {"memory": memory, "filled": filled, "stoch": seen, "action": action}

    def _previous(self, act_state: ActState | None, envs: int) -> dict[str, Tensor]:
        if act_state is None:
            c = self.config
            memory, filled = self.world_model.empty_memory(envs)
            stoch = torch.zeros(envs, c.stoch * c.classes, device=self.device)
            action = torch.zeros(envs, self.world_model.action_dim, device=self.device)
            return {"memory": memory, "filled": filled, "stoch": stoch, "action": action}
        check_act_state(act_state, envs)
        return dict(act_state)

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:  # noqa: ARG002 - the protocol's argument
        """Return {}: acting makes nothing for replay to store."""
        return {}

    # Learning

    def collect(self) -> Metrics:
        """Return means since the last call. Waits for the device. Raises FloatingPointError as `update`."""
        return {**super().collect(), "update_norm": self.learning.world_optimizer.update_norm().item()}

    # Exchange

    def _acting_tensors(self) -> list[Tensor]:
        """Return parameters, and the statistics of batch norms, that acting needs."""
        model = self.world_model
        modules: list[nn.Module] = [model.encoder, model.posterior, model.stem, model.transformer, model.prior]
        modules.append(self.behaviour.policy)
        return [t.detach() for module in modules for t in [*module.parameters(), *module.buffers()]]

    def acting_weights(self) -> Array:
        return flatten(self._acting_tensors())

    def load_acting_weights(self, flat: Array) -> None:
        load_flat(self._acting_tensors(), flat)
