"""The device's part of an update, a plan and an act: no host read in it, nothing in it changes from call to call.

That is what lets each be one CUDA graph. Operations are recorded below autograd, backward and optimiser included.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests import diamond_models, dreamerv3_models, storm_models, tdmpc2_models
from worldloom.diamond import DiamondAgent
from worldloom.storm import STORMAgent
from worldloom.tdmpc2 import TDMPC2Agent, TDMPC2WorldModel
from worldloom.tdmpc2.tasks import Task

HOST_READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal",
    "item",
    "repeat_interleave.Tensor",
)


class Recorded(TorchDispatchMode):
    """Every operation with its shapes and its arguments that are not tensors; refuses what reads on the host."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(part in name for part in HOST_READS):
            raise AssertionError(f"{name} reads on the host")
        if not name.startswith("profiler"):
            self.operations.append((name, tree_map(self._described, (args, kwargs or {}))))
        for index in args[1] if name.startswith("aten.index.Tensor") else ():
            assert index is None or index.dtype != torch.bool, "boolean indexing reads on the host"
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _described(value):
        if isinstance(value, torch.Tensor):
            return (tuple(value.shape), value.dtype)
        return "generator" if isinstance(value, torch.Generator) else value


REPRESENTATIONS = ("r2dreamer", "infonce", "ne")  # DreamerV3 without a decoder


def dreamer(kind):
    shapes = {"vectors": (3,), "images": (3, 64, 64), "mixed": dreamerv3_models.MIXED}
    classes = {"goal": 5} if kind == "mixed" else None
    parts = (3,) if kind == "discrete" else ()
    fields = {"representation": kind, "ne_width": 16} if kind in REPRESENTATIONS else {}
    return dreamerv3_models.shake(dreamerv3_models.tiny_agent(shapes.get(kind, (3,)), 3, parts, classes, **fields))


def tdmpc2(kind):
    config = dataclasses.replace(tdmpc2_models.TINY, episodic=kind == "episodic", dropout=0.1)
    if kind == "tasks":
        tasks = [Task(f"task-{i}", 2, 200) for i in range(3)]
        model = TDMPC2WorldModel((3,), 2, dataclasses.replace(config, task_dim=4), tasks=tasks)
    else:
        shape = (9, 64, 64) if kind == "pixels" else (3,)
        model = TDMPC2WorldModel(shape, 3, config, 200, action_classes=(3,) if kind == "discrete" else ())
    return TDMPC2Agent(tdmpc2_models.shake(model), action_classes=model.action_classes)


def storm(kind):
    shapes = {"images": (3, 64, 64), "mixed": {"camera": (3, 64, 64), "state": (3,)}}
    chosen = {"act_on": "prior", "free_nats": 0.0} if kind == "images" else {}
    return storm_models.tiny_agent(shapes.get(kind, (3,)), 3, (3,) if kind == "images" else (), **chosen)


def diamond(kind):
    churn = {"sampler_churn": 1.0, "sampler_order": 2} if kind == "churn" else {}
    return diamond_models.shake(diamond_models.tiny_agent(**churn))


def batch_of(agent):
    if isinstance(agent, STORMAgent):
        return storm_models.batch_of(agent)
    if isinstance(agent, DiamondAgent):
        return diamond_models.batch_of(agent)
    if not isinstance(agent, TDMPC2Agent):
        batch = dreamerv3_models.batch_of(agent)
        batch["is_first"][1, 4] = agent.world_model.decoder is None
        return batch
    batch, model = tdmpc2_models.batch_of(agent.world_model, terminated=True), agent.world_model
    if model.pixels:
        batch["obs"] = torch.randint(256, (8, 4, *model.obs_shape), dtype=torch.uint8)
    if model.action_classes:
        batch["actions"] = torch.eye(3)[torch.randint(3, (8, 4))]
    return {**batch, "task": torch.arange(8) % 3} if model.tasks else batch


KINDS = [
    *[(dreamer, kind) for kind in ("vectors", "images", "mixed", "discrete", *REPRESENTATIONS)],
    *[(storm, kind) for kind in ("vectors", "images", "mixed")],
    *[(tdmpc2, kind) for kind in ("states", "episodic", "pixels", "discrete", "tasks")],
    *[(diamond, kind) for kind in ("published", "churn")],
]
every_kind = pytest.mark.parametrize(("make", "kind"), KINDS)


@every_kind
def test_two_updates_are_the_same_operations_and_read_nothing_on_the_host(make, kind):
    agent = make(kind)
    given = agent.learning.stage(batch_of(agent))
    agent.learning.core(given)  # the first makes the optimisers' states
    seen = []
    for _ in range(2):
        with Recorded() as recorded:
            agent.learning.core(given)
        seen.append(recorded.operations)
    assert len(seen[0]) > 100
    assert seen[0] == seen[1]


def acting_inputs(agent, envs=2):
    shape = agent.world_model.obs_shape
    obs = {k: np.ones((envs, *s), np.uint8 if len(s) == 3 else np.float32) for k, s in
           (shape.items() if isinstance(shape, dict) else {"obs": shape}.items())}  # fmt: skip
    if "goal" in obs:
        obs["goal"] = obs["goal"].astype(np.int64)
    return obs if isinstance(shape, dict) else obs["obs"]


@every_kind
def test_acting_is_the_same_operations_each_time_and_reads_actions_alone(make, kind):
    agent = make(kind)
    more = {"task": np.array([0, 2])} if kind == "tasks" else {}
    state, seen = None, []
    choose = agent._choose

    def recorded_choose(given, **settings):
        with Recorded() as recorded:
            found = choose(given, **settings)
        seen.append(recorded.operations)
        return found

    agent._act._function = recorded_choose
    for _ in range(2):
        _, state = agent.act(acting_inputs(agent), state, np.zeros(2, bool), **more)
    assert len(seen[0]) > 20
    assert seen[0] == seen[1]


@every_kind
def test_the_whole_update_runs_where_nothing_can_be_read(make, kind, monkeypatch):
    """On the meta device, backward and optimiser included: numbers do not exist there, and mixing devices raises."""
    template = make(kind)
    monkeypatch.setattr(torch, "Generator", lambda device: FakeGenerator())
    monkeypatch.setattr(torch.optim, "Adam", PlainAdam)
    monkeypatch.setattr(torch.optim, "AdamW", PlainAdamW)
    with torch.device("meta"):
        agent = rebuilt(template)
        assert agent.device.type == "meta"
        given = {name: value.to("meta") for name, value in template.learning.stage(batch_of(template)).items()}
        found = agent.learning.core(given)
        assert all(value.device.type == "meta" for value in found.values())


class PlainAdam(torch.optim.Adam):
    """There is no fused one on the meta device, and only that one can be told to skip a step."""

    def __init__(self, params, lr, eps=1e-8, **_):
        super().__init__(params, lr=lr, eps=eps, foreach=True)

    def step(self):
        del self.found_inf
        super().step()


class PlainAdamW(torch.optim.AdamW):
    """Stands in for AdamW as `PlainAdam` does for Adam, with a plain number for a learning rate."""

    def __init__(self, params, lr, **_):
        super().__init__(params, foreach=True)

    def step(self):
        del self.found_inf
        super().step()


class FakeGenerator:
    """The meta device has none, and needs none."""

    def manual_seed(self, seed):
        return None


def rebuilt(template):
    """The same agent on the device that is torch's default now."""
    model, described = template.world_model, template.world_model.describe()
    described.pop("family"), described.pop("config")
    if isinstance(template, TDMPC2Agent):
        described["tasks"] = model.tasks
    return type(template)(type(model)(config=model.config, **described), action_classes=model_classes(template))


def model_classes(agent):
    return agent.world_model.action_classes if isinstance(agent, TDMPC2Agent) else agent.action_classes


@pytest.mark.parametrize("make", [dreamer, storm, tdmpc2, diamond])
def test_a_state_of_another_kind_of_device_loads_and_says_so(make, caplog):
    agent = make("vectors")
    batch = batch_of(agent)
    agent.update(batch)
    state = agent.state_dict()
    foreign = {name: torch.arange(16, dtype=torch.uint8) for name in ("generator", "acting_generator")}  # as CUDA's
    agents = [make("vectors") for _ in range(2)]
    for other in agents:
        other.load_state_dict({**state, **foreign})
    assert caplog.text.count("were saved on another kind of device than cpu") == 4
    losses = [other.update(batch)[0]["loss"] for other in agents]
    assert losses[0] == losses[1]  # the same state gives the same seed
