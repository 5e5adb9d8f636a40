"""Agents that leave the house: files of torch.export and ONNX act as the agent does, without worldloom."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.testing import assert_allclose

import worldloom
from tests import diamond_models, dreamerv3_models, storm_models, tdmpc2_models
from tests.dreamerv3_models import MIXED, tiny_agent
from tests.tdmpc2_models import TINY, tiny_model
from worldloom import functional as fn
from worldloom.dreamerv3.actor_critic import DiscretePolicy
from worldloom.program import trace
from worldloom.tdmpc2 import Task, TDMPC2Agent, TDMPC2WorldModel

ROOT = Path(__file__).resolve().parent.parent
ENVS, STEPS = 3, 4
TASKS = (Task("walker-walk", 4), Task("cup-catch", 2), Task("mw-reach", 3, 100))


class Recorded:
    """Keeps every standard number that is drawn while it stands in for torch's functions, by distribution."""

    def __init__(self, monkeypatch):
        self.drawn = []
        for kind, name in (("normal", "randn"), ("uniform", "rand"), ("shift", "randint")):
            monkeypatch.setattr(torch, name, self.keeping(kind, getattr(torch, name)))
        monkeypatch.setattr(fn, "exponential_noise", self.keeping("exponential", fn.exponential_noise))

    def keeping(self, kind, draw):
        def drawing(*args, **kwargs):
            value = draw(*args, **kwargs)
            self.drawn.append((kind, value))
            return value

        return drawing

    def take(self):
        drawn, self.drawn = self.drawn, []
        return drawn


def noise_for(program, drawn):
    """The numbers that `act` drew, as the inputs of a program: those of one distribution and size in their order."""
    left, given = list(drawn), {}
    for name, example in program.inputs.items():
        kind = "shift" if name == "uniform_shift" else name.partition("_")[0]
        if kind in ("normal", "uniform", "exponential", "shift"):
            at = next(i for i, (found, value) in enumerate(left) if (found, value.numel()) == (kind, example.numel()))
            value = left.pop(at)[1].view(example.shape)
            given[name] = (value + 0.5) / 7 if kind == "shift" else value
    return given


def observation(name, example, rng):
    if example.dtype == torch.uint8:
        return rng.integers(256, size=example.shape, dtype=np.uint8)
    if example.dtype == torch.int32:
        return rng.integers(3, size=example.shape, dtype=np.int32)
    return rng.normal(size=example.shape).astype(np.float32)


def check_acts_as(agent, paths, monkeypatch, sample, plan=None, task=None):
    """Every file acts as the agent over several steps, one environment starting anew in the middle."""
    program = agent.acting_program(ENVS, sample, plan)
    runs = [runner(path) for path in paths]
    recorded, rng = Recorded(monkeypatch), np.random.default_rng(0)
    act_state, states = None, [zero_state(program) for _ in runs]
    for step in range(STEPS):
        obs = {n: observation(n, e, rng) for n, e in program.inputs.items() if n == "obs" or n.startswith("obs_")}
        first = np.full(ENVS, step == 0)
        first[1] |= step == 2
        shown = obs["obs"] if "obs" in obs else {name.removeprefix("obs_"): value for name, value in obs.items()}
        numbers = {} if task is None else {"task": task}
        recorded.take()
        expected, act_state = agent.act(shown, act_state, first, explore=sample, **numbers)
        noise = {name: value.numpy() for name, value in noise_for(program, recorded.take()).items()}
        for run, state in zip(runs, states, strict=True):
            inputs = {**obs, **numbers, **noise, **state, "is_first": first}
            found = run({name: inputs[name] for name in program.inputs})
            assert_allclose(found["action"], expected, atol=1e-5, rtol=0)
            state |= {name: found[name.removesuffix("_in") + "_out"] for name in state}
    monkeypatch.undo()


def zero_state(program):
    return {name: value.numpy() for name, value in program.inputs.items() if name.endswith("_in")}


def runner(path):
    if path.suffix == ".onnx":
        onnx.checker.check_model(path)
        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))
    module = torch.export.load(path).module()
    return lambda inputs: {
        name: value.numpy() for name, value in module(**{n: torch.from_numpy(v) for n, v in inputs.items()}).items()
    }


def exported(agent, folder, suffixes=(".pt2", ".onnx"), **options):
    return [worldloom.export(agent, folder / f"actor{suffix}", envs=ENVS, **options) for suffix in suffixes]


def likeliest(monkeypatch):
    """Make DreamerV3's `act` take the mode of every distribution: equal noise for all classes, none for normals."""
    monkeypatch.setattr(fn, "exponential_noise", lambda shape, generator, device: torch.ones(shape))
    monkeypatch.setattr(torch, "randn", lambda *shape, **rest: torch.zeros(shape))


DREAMERS = {
    "vectors": {},
    "images and choices": {"obs_shape": MIXED, "action_dim": 5, "classes": (3, 2)},
    "class indices": {"obs_shape": {"room": (2,), "state": (3,)}, "obs_classes": {"room": 3}},
}


@pytest.mark.parametrize("case", DREAMERS)
def test_dreamerv3_exports_act_with_given_noise_as_the_agent(case, tmp_path, monkeypatch):
    agent = dreamerv3_models.shake(tiny_agent(**DREAMERS[case]))
    suffixes = (".pt2",) if case == "class indices" else (".pt2", ".onnx")
    check_acts_as(agent, exported(agent, tmp_path, suffixes, sample=True), monkeypatch, sample=True)


@pytest.mark.parametrize("case", ["vectors", "images and choices"])
def test_dreamerv3_exports_take_modes_by_default(case, tmp_path, monkeypatch):
    agent = dreamerv3_models.shake(tiny_agent(**DREAMERS[case]))
    paths = exported(agent, tmp_path, (".pt2",) if case == "vectors" else (".onnx",))
    likeliest(monkeypatch)
    with monkeypatch.context() as inner:
        check_acts_as(agent, paths, inner, sample=False)
    assert isinstance(agent.behaviour.policy, DiscretePolicy) == (case == "images and choices")


IMAGINERS = {
    "storm, vectors": lambda: storm_models.tiny_agent((3,), 2, (), act_on="posterior"),
    "storm, images on the prior": lambda: storm_models.tiny_agent((3, 48, 48), 3, (3,), act_on="prior"),
    "storm, mixed": lambda: storm_models.tiny_agent({"camera": (3, 48, 48), "state": (3,)}, 5, (3, 2)),
    "diamond": lambda: diamond_models.shake(diamond_models.tiny_agent(epsilon=0.5), 0.2),
}


def imaginer(case):
    """An agent whose latents and actions depend on what it sees."""
    agent = IMAGINERS[case]()
    with torch.no_grad():
        for name, parameter in agent.world_model.named_parameters():
            if name.startswith(("posterior", "prior")):
                parameter.mul_(5)
        for name, buffer in agent.world_model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return agent


QUICK = ("storm, images on the prior", "diamond")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in IMAGINERS])
def test_agents_that_learn_in_imagination_export_with_given_noise_and_with_modes(case, tmp_path, monkeypatch):
    agent = imaginer(case)
    suffixes = (".onnx",) if case in QUICK else (".pt2", ".onnx")
    check_acts_as(agent, exported(agent, tmp_path, suffixes, sample=True), monkeypatch, sample=True)
    paths = exported(agent, tmp_path, (".pt2",))
    likeliest(monkeypatch)
    with monkeypatch.context() as inner:
        check_acts_as(agent, paths, inner, sample=False)


def test_exports_of_imagining_agents_hold_what_acting_needs_alone():
    for case in ("storm, images on the prior", "diamond"):
        agent = imaginer(case)
        held = sum(value.numel() for value in agent.acting_program(1, True).module.state_dict().values())
        assert held == agent.acting_weights().size
        with pytest.raises(ValueError, match="plan is True, but (STORM|DIAMOND) acts with its policy"):
            worldloom.export(agent, "actor.pt2", plan=True)


def tasks_agent():
    torch.manual_seed(0)
    model = TDMPC2WorldModel((3,), 4, dataclasses.replace(TINY, task_dim=5, iterations=1), tasks=TASKS)
    tdmpc2_models.shake(model)
    with torch.no_grad():
        model.task_embedding.weight[1] = 3.0  # a norm above 1, which looking it up scales to 1
    return TDMPC2Agent(model)


def pixels_agent():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, latent_dim=32, num_samples=8, num_elites=4, num_pi_trajs=2, iterations=1)
    return TDMPC2Agent(tdmpc2_models.shake(TDMPC2WorldModel((3, 40, 40), 2, config)))


def choices_agent():
    torch.manual_seed(0)
    model = TDMPC2WorldModel((3,), 5, dataclasses.replace(TINY, iterations=1), action_classes=(3, 2))
    return TDMPC2Agent(tdmpc2_models.shake(model), action_classes=(3, 2))


def states_agent(**overrides):
    return TDMPC2Agent(tdmpc2_models.shake(tiny_model(**overrides)))


@pytest.mark.parametrize("sample", [False, True])
def test_tdmpc2_exports_plan_as_the_agent_and_go_on_from_their_own_plan(sample, tmp_path, monkeypatch):
    agent = states_agent(iterations=2)
    check_acts_as(agent, exported(agent, tmp_path, sample=sample), monkeypatch, sample)


def test_tdmpc2_exports_plan_past_no_predicted_end(tmp_path, monkeypatch):
    """Tests torch.export alone: sequences that end at once have equal values, which ONNX puts in another order."""
    agent = states_agent(episodic=True, iterations=2)
    check_acts_as(agent, exported(agent, tmp_path, (".pt2",)), monkeypatch, sample=False)


@pytest.mark.parametrize("made", [tasks_agent, choices_agent])
def test_tdmpc2_exports_plan_for_tasks_and_choices(made, tmp_path, monkeypatch):
    agent = made()
    task = np.array([1, 0, 2]) if made is tasks_agent else None
    check_acts_as(agent, exported(agent, tmp_path), monkeypatch, sample=False, task=task)


def policy_alone(agent):
    agent.world_model.config = dataclasses.replace(agent.config, mpc=False)
    return agent


@pytest.mark.parametrize("sample", [False, True])
def test_the_policy_prior_is_exported_alone(sample, tmp_path, monkeypatch):
    agent = states_agent()
    paths = exported(agent, tmp_path, sample=sample, plan=False)
    program = agent.acting_program(ENVS, sample, plan=False)
    assert list(program.inputs) == ["obs", *(["normal_action"] if sample else [])]
    held = {name.split(".")[1] for name in program.module.state_dict()}
    assert held == {"encoder", "policy"}
    check_acts_as(policy_alone(agent), paths, monkeypatch, sample)


def test_exports_of_image_agents_leave_images_where_they_are_unless_they_sample(tmp_path, monkeypatch):
    agent = pixels_agent()
    check_acts_as(agent, exported(agent, tmp_path, (".pt2",), sample=True), monkeypatch, sample=True)
    assert "uniform_shift" not in agent.acting_program(ENVS, False, None).inputs
    agent.world_model.config = dataclasses.replace(agent.config, augment_eval=False)
    check_acts_as(agent, exported(agent, tmp_path, (".onnx",)), monkeypatch, sample=False)


def test_exporting_leaves_the_agent_as_it_was(tmp_path):
    agent = tasks_agent()
    before = {name: value.clone() for name, value in agent.world_model.state_dict().items()}
    exported(agent, tmp_path, (".pt2",), plan=False)
    after = agent.world_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert agent.world_model.training
    assert all(p.requires_grad for p in agent.world_model.policy.parameters())


def images_agent():
    return dreamerv3_models.shake(tiny_agent(**DREAMERS["images and choices"]))


def indices_agent():
    return dreamerv3_models.shake(tiny_agent(**DREAMERS["class indices"]))


@pytest.mark.parametrize(
    ("made", "parts", "options"),
    [
        (choices_agent, (3, 2), {}),
        (tasks_agent, (), {}),
        (images_agent, (3, 2), {}),
        (states_agent, (), {"plan": False}),  # a policy without state asks for nothing but observations
        (indices_agent, (), {}),
    ],
)
def test_the_example_acts_with_numpy_and_onnxruntime_alone(made, parts, options, tmp_path):
    path = worldloom.export(made(), tmp_path / "actor.onnx", envs=2, **options)
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "worldloom", "gymnasium")))
sys.argv = ["act_with_onnx.py", {str(path)!r}]
runpy.run_path({str(ROOT / "examples" / "act_with_onnx.py")!r})
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    actions = np.array([json.loads(line) for line in ran.stdout.splitlines()])
    assert actions.shape[:2] == (5, 2)
    assert np.isfinite(actions).all()
    if parts:
        assert (actions.sum(-1) == len(parts)).all()
        assert actions.shape[2] == sum(parts)


def test_a_file_describes_itself(tmp_path):
    agent = states_agent()
    paths = exported(agent, tmp_path, plan=False)
    extra = {"worldloom.json": ""}
    torch.export.load(paths[0], extra_files=extra)
    (kept,) = [p.value for p in onnx.load(paths[1]).metadata_props if p.key == "worldloom"]
    for text in (extra["worldloom.json"], kept):
        about = json.loads(text)
        assert about["inputs"] == {"obs": ["float32", ENVS, 3]}
        assert about["agent"]["config"]["horizon"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"actor.pt2", "actor.onnx"}  # weights included


def test_the_traced_program_draws_nothing_itself():
    """Checks that all randomness comes in as inputs, so that a robot's log repeats its actions."""
    for agent in (dreamerv3_models.shake(tiny_agent()), states_agent()):
        traced = trace(agent.acting_program(1, True, None))
        called = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
        assert not [name for name in called if "rand" in name or "exponential" in name or "bernoulli" in name]


def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path, monkeypatch):
    agent = states_agent()
    with pytest.raises(ValueError, match=r"actor\.pth ends in '\.pth', expected \.pt2 \(torch\.export\) or \.onnx"):
        worldloom.export(agent, tmp_path / "actor.pth")
    with pytest.raises(ValueError, match="envs is 0, expected at least 1"):
        worldloom.export(agent, tmp_path / "actor.pt2", envs=0)
    with pytest.raises(ValueError, match="plan is True, but DreamerV3 acts with its policy"):
        worldloom.export(tiny_agent(), tmp_path / "actor.pt2", plan=True)
    with pytest.raises(ValueError, match="TDMPC2WorldModel has no acting_program, so it cannot be exported"):
        worldloom.export(agent.world_model, tmp_path / "actor.pt2")
    twins = tiny_agent(obs_shape={"a b": (2,), "a_b": (2,)})
    with pytest.raises(ValueError, match=r"\['a b', 'a_b'\] differ in signs only"):
        worldloom.export(twins, tmp_path / "actor.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is not installed. Run: pip install 'worldloom\[export\]'"):
        worldloom.export(agent, tmp_path / "actor.onnx")
    assert not list(tmp_path.iterdir())
