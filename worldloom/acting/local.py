"""Acting with a copy of the weights in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from worldloom.acting.rollout import Acted
from worldloom.types import ActState, Agent, Array, Weights, join_obs


class LocalActing:
    """Acts with an agent in this process."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.columns, self.version = agent, agent.columns, 0
        self._act_state: ActState | None = None

    def start(self, seed: int) -> None:
        self.agent.acting_generator.manual_seed(seed)
        self._act_state = None

    def load(self, weights: Weights) -> None:
        """Act with these weights from now on. Raises ValueError if they are older than the present ones."""
        check_version(weights, self.version)
        self.agent.load_acting_weights(weights.flat)
        self.version = weights.version

    def request(self, obs: Mapping[str, Array], is_first: Array) -> Callable[[], Acted]:
        actions, self._act_state = self.agent.act(join_obs(obs), self._act_state, is_first)
        acted = Acted(actions, self.agent.replay_columns(self._act_state), self.version)
        return lambda: acted


def check_version(weights: Weights, version: int) -> None:
    """Raise ValueError if the weights are older than `version`."""
    if weights.version < version:
        raise ValueError(f"weights of version {weights.version} came after version {version}, expected no older one.")
