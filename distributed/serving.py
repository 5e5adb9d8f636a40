"""The acting server as the coordinator sees it: where it runs, its start, its gauges."""

from __future__ import annotations

from distributed.acting import batching
from distributed.actors.inference import InferenceActor
from distributed.launcher import ActorLost, alive
from distributed.learning import Learning
from distributed.state import State
from worldloom.runs.build import AgentSpec
from worldloom.runs.config import RunConfig


def acts_on_server(config: RunConfig, spec: AgentSpec) -> bool:
    """Resolve runtime.acting: whether a server acts for the env actors."""
    if config.runtime.acting != "auto":
        return config.runtime.acting == "server"
    return spec.plans and spec.device.startswith("cuda") and not config.runtime.sync


class Serving:
    """Starts the acting server, in the learner or in an actor of its own, where env actors do not act themselves."""

    def __init__(self, state: State, learning: Learning) -> None:
        self._state, self._learning = state, learning

    def start(self) -> None:
        """Start the server; it acts once `Learning.publish` has given it weights."""
        state = self._state
        if not acts_on_server(state.config, state.spec):
            return
        how = batching(state.config)
        if state.config.runtime.acting_server == "learner":
            state.server = self._learning.learner
            state.launcher.wait(state.server.serve.remote(how, state.incarnation), "the learner")
            return
        shares, threads = state.shares, {"acting": how.clients, "control": 1}
        state.server = state.launcher.start(
            InferenceActor, "inference", cpus=shares.cpus, gpus=shares.server_gpus, threads=threads
        )
        opened = state.server.open.remote(state.config, state.spec, how, state.incarnation)
        state.launcher.wait(opened, "the acting server")
        state.watch.follow("the acting server", state.server, float("inf"))

    def restart(self) -> None:
        self._state.watch.forget("the acting server")
        self._state.launcher.end(self._state.server)
        self.start()
        self._learning.publish()

    def end(self) -> None:
        if self._state.own_server:
            self._state.launcher.end(self._state.server)


def blame_server(state: State, why: str) -> None:
    """End a server that is silent. Raises ActorLost, unless the server of now has not been asked yet."""
    if alive(state.server) and "died" in why:
        return
    state.launcher.end(state.server)
    raise ActorLost(why)
