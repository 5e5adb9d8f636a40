"""The DIAMOND agent: a recurrent policy acts on frames, and learns in imagination from the diffusion world model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldloom import functional as fn
from worldloom.capture import Tensors
from worldloom.diamond.acting import ActStep, act_step
from worldloom.diamond.actor_critic import ActorCritic
from worldloom.diamond.learning import DiamondLearning
from worldloom.diamond.world_model import DiamondWorldModel
from worldloom.imagining import ImaginingAgent
from worldloom.program import Program, refuse_plan, step_program
from worldloom.types import ActState, Array, ColumnSpec, ObsArray, Precision, WindowSpec


class DiamondAgent(ImaginingAgent):
    """An agent for one image and one choice of actions; `worldloom.types.Agent` describes the methods.

    action_classes: the number of choices, as a tuple of one. Raises ValueError for other actions.
    """

    random_warmup = True
    pretrain = True
    columns: Mapping[str, ColumnSpec] = {}
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
        super().__init__(model, behaviour, DiamondLearning, action_classes, seed)

    @torch.inference_mode()
    def act(
        self, obs: ObsArray, act_state: ActState | None, is_first: Array, explore: bool = True
    ) -> tuple[Array, ActState]:
        """Return one-hot actions [E, A] for obs [E, C, S, S], drawn from the policy or, to explore, uniformly with
        chance `epsilon`, and the new act_state. Raises ValueError for another shape or number of rows."""
        shown = self.world_model.check_image("act", obs, 1)
        given = {"obs/obs": shown, "is_first": torch.as_tensor(is_first), **self._previous(act_state, len(shown))}
        kept = self._act.own(self._act(given, explore=explore))
        return kept.pop("action").cpu().numpy(), kept

    def _choose(self, given: Tensors, explore: bool = True) -> Tensors:
        """Return the LSTM's state after these frames, and drawn actions; runs on the device alone."""
        rows, generator = len(given["hidden"]), self.acting_generator
        shape, device = (rows, 1), self.device
        coin = torch.rand(shape, generator=generator, device=device) if explore else torch.ones(shape, device=device)
        noise = {"uniform_explore": coin}
        noise["exponential_action"] = fn.exponential_noise((rows, self.world_model.action_dim), generator, device)
        return act_step(self.behaviour, {**given, **noise}, self.config.epsilon)

    def _fresh(self, envs: int) -> dict[str, Tensor]:
        return dict(zip(("hidden", "cell"), self.behaviour.lstm.initial(envs), strict=True))

    def _acting_tensors(self) -> list[Tensor]:
        return list(self.behaviour.parameters())

    def acting_program(self, envs: int, sample: bool, plan: bool | None = None) -> Program:
        """Return acting as a function of tensors, for `worldloom.export`. Raises ValueError for plan=True."""
        refuse_plan(plan, "DIAMOND")
        step, size = ActStep(self.behaviour, self.config.epsilon), self.world_model.action_dim
        noise = {"uniform_explore": torch.ones(envs, 1), "exponential_action": torch.ones(envs, size)}
        return step_program(step, self.world_model.obs_shape, envs, self._fresh(envs), noise, sample)
