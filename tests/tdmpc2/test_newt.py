"""Newt's checkpoints, beside numbers that its authors' code (commit 75def92) computed with small models.

tests/data/newt.tar.xz: two checkpoints, of four tasks and of one, and the inputs, random numbers and outputs of each.
"""

import tarfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from launch.train import main
from worldloom import create_world_model, load_agent
from worldloom.tdmpc2 import Task, TDMPC2Agent, load_official, save_official
from worldloom.tdmpc2.official.mmbench import MMBENCH
from worldloom.tdmpc2.official.newt import ENCODER, MASKS, POLICY, READS_ACTIONS
from worldloom.tdmpc2.planner import PlanNoise

ARCHIVE = Path(__file__).resolve().parents[1] / "data" / "newt.tar.xz"
TASKS = (
    Task("a", 5, discount=0.99), Task("b", 1, discount=0.98), Task("c", 3, discount=0.95), Task("d", 2, discount=0.99)
)  # fmt: skip
PLANNING = {"iterations": 3, "num_samples": 12, "num_elites": 4, "num_pi_trajs": 2}
CASES = {
    "multitask": {"tasks": TASKS, "overrides": PLANNING},
    "single": {"obs_shape": (4,), "overrides": {**PLANNING, "discount": 0.99}},
}


class FourNumbers(gym.Env):
    """Observes what the model of one task does, without the zeros that its file fills observations up with."""

    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self._steps += 1
        return self.observation_space.sample(), 0.0, False, self._steps == 20, {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("newt")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(made, filter="data")
    return made


@pytest.fixture(params=CASES)
def case(request, folder):
    """A model, what their code computed, and the task numbers; a model of one task has neither unused entry."""
    model = load_official(folder / f"{request.param}.pt", **CASES[request.param])
    with np.load(folder / f"{request.param}.npz") as file:
        found = {name: torch.from_numpy(file[name]) for name in file.files}
    actions = ("actions", "eps", "sample", "mean_action", "plan", "mean", "noise")
    unused = {n for n in found if n.startswith(actions) and not n.endswith(("heads", "choice"))}
    found |= {name: found[name][..., : model.action_dim] for name in unused}
    found["obs"] = found["obs"][..., : model.obs_shape[0]]
    return model, found, torch.arange(4) if model.tasks else None


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.squeeze(-1) if theirs.ndim > ours.ndim else theirs, rtol=1e-4, atol=1e-5)


def test_every_network_gives_the_authors_numbers(case):
    model, theirs, task = case
    z, size = model.latent(theirs["obs"][0], task), model.config.latent_dim
    close(z[..., :size], theirs["z"])
    close(model.next_latent(z, theirs["actions"])[..., :size], theirs["next"])
    close(model.predict_reward(z, theirs["actions"]), theirs["reward"])
    close(model.values(z, theirs["actions"]), theirs["q"])
    model.q.load_state_dict(model.target_q.state_dict())
    close(model.values(z, theirs["actions"]), theirs["target"])
    sample = model.policy.sample(z, theirs["eps"], model.action_mask(task))
    close(sample.action, theirs["sample"])
    close(sample.mean_action, theirs["mean_action"])


def test_plans_give_the_authors_actions(case):
    model, theirs, task = case
    planner, previous = TDMPC2Agent(model).planner, torch.zeros_like(theirs["mean0"])
    for step, explore in enumerate((True, False)):
        noise = PlanNoise(**{name: theirs[f"noise{step}/{name}"] for name in PlanNoise.__dataclass_fields__})
        z = model.latent(theirs["obs"][step], task)
        with torch.no_grad():
            action, previous = planner.plan(z, previous, noise, explore, task)
        close(action, theirs[f"plan{step}"])
        close(previous, theirs[f"mean{step}"])


def test_given_embeddings_keep_their_norm_and_are_not_learned(folder):
    model = load_official(folder / "multitask.pt", **CASES["multitask"], device="cpu")
    before = model.task_embedding.weight.clone()
    assert before.norm(dim=1).min() > 5
    agent = TDMPC2Agent(model)
    rng = torch.Generator().manual_seed(0)
    weights = model.dynamics[0].weight.clone()
    agent.update(
        {
            "obs": torch.randn(4, 4, 10, generator=rng), "actions": torch.rand(4, 4, 5, generator=rng),
            "rewards": torch.rand(4, 4, generator=rng), "task": torch.arange(4),
        }
    )  # fmt: skip
    assert torch.equal(model.task_embedding.weight, before)
    assert not torch.equal(model.dynamics[0].weight, weights)


def test_a_model_acts_saves_and_loads(folder, tmp_path):
    model = create_world_model(folder / "multitask.pt", obs_shape=(10,), action_dim=5, tasks=TASKS)
    model.save_pretrained(tmp_path / "saved")
    obs, first = np.ones((2, 7), np.float32), np.ones(2, bool)  # task c observes seven numbers
    acts = [load_agent(tmp_path / "saved") for _ in range(2)] + [TDMPC2Agent(model)]
    actions = [agent.act(obs, None, first, explore=False, task=np.array([2, 2]))[0] for agent in acts]
    assert (actions[0] == actions[1]).all()
    assert np.abs(actions[0][:, :3]).min() > 0
    assert (actions[0][:, 3:] == 0).all()
    with pytest.raises(ValueError, match="has given task embeddings, which layout C cannot express"):
        save_official(model, tmp_path / "no.pt")


def rewritten(folder, tmp_path, change, name="multitask"):
    whole = torch.load(folder / f"{name}.pt", weights_only=True)
    change(whole["model"])
    torch.save(whole, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def test_names_from_several_gpus_are_read(folder, tmp_path):
    def prefix(state):
        for name in list(state):
            state["module." + name] = state.pop(name)

    plain = load_official(folder / "multitask.pt", tasks=TASKS).state_dict()
    found = load_official(rewritten(folder, tmp_path, prefix), tasks=TASKS).state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_mmbench_are_the_tasks_of_200_embeddings(folder, tmp_path):
    def widen(state):
        state["_task_emb.weight"] = torch.randn(200, 6)
        masks = [[float(n < min(task.action_dim, 5)) for n in range(5)] for task in MMBENCH]
        state["_action_masks"] = torch.tensor(masks)

    with pytest.raises(ValueError, match="action_dim is 5, but task 'quadruped-walk' has 12"):
        load_official(rewritten(folder, tmp_path, widen))
    assert len({task.name for task in MMBENCH}) == len(MMBENCH) == 200
    assert MMBENCH[0] == Task("walker-stand", 6)
    assert MMBENCH[37] == Task("mw-assembly", 4, 100)
    assert MMBENCH[-1] == Task("atari-yars-revenge", 3, 1000, 0.99)


def test_files_that_do_not_fit_are_refused(folder, tmp_path):
    def without_head(state):
        del state["_Qs.online._Qs.0.1.bias"]

    def other_head(state):
        state["_Qs.target._Qs.1.2.bias"] = torch.zeros(3)

    def other_mask(state):
        del state["_task_emb.weight"]

    for change, message in [
        (without_head, r"the value heads' tensors _Qs.params.1.bias are missing or of different shapes"),
        (other_head, r"the value heads' tensors _target_Qs_params.2.bias are missing"),
        (other_mask, "_action_masks is not that of one task, expected ones, then zeros, the same in all rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_official(rewritten(folder, tmp_path, change), tasks=TASKS)
    with pytest.raises(ValueError, match="knows 4 tasks, which are not mt30, mt80 or MMBench"):
        load_official(folder / "multitask.pt")
    with pytest.raises(ValueError, match="masks actions differently"):
        load_official(folder / "multitask.pt", tasks=[Task(n, 5) for n in "abcd"])
    assert load_official(folder / "single.pt").obs_shape == (10,)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*READS_ACTIONS[:2], *POLICY, ENCODER, MASKS, "_Qs.online._Qs.0.0.weight"])
def test_a_tensor_of_another_shape_is_refused_by_name(folder, tmp_path, case, name):
    for shape in ((), (1,), (3, 3)):
        changed = rewritten(folder, tmp_path, lambda state, shape=shape: state.update({name: torch.ones(shape)}), case)
        with pytest.raises(ValueError, match=r"changed.pt"):
            load_official(changed, tasks=CASES[case].get("tasks", ()))


PRESET = """
algorithm: tdmpc2:1m
agent: {batch_size: 4, num_samples: 12, num_elites: 4, num_pi_trajs: 2, iterations: 2, lr: 1.0e-30}
env: {id: "tests.tdmpc2.test_newt:FourNumbers", num_envs: 1}
train: {total_steps: 60, learning_starts: 30, train_ratio: 3}
runtime: {kind: inline, learner_threads: 1}
eval: {interval: 0, episodes: 1}
"""


def test_a_file_of_one_task_acts_and_starts_a_run_without_the_zeros(folder, tmp_path):
    obs, first = np.random.default_rng(0).normal(size=(2, 10)).astype(np.float32), np.ones(2, bool)
    obs[:, 4:] = 0
    short = load_agent(folder / "single.pt", obs_shape=(4,), **PLANNING)
    expected, _ = load_agent(folder / "single.pt", **PLANNING).act(obs, None, first, explore=False)
    found, _ = short.act(obs[:, :4], None, first, explore=False)
    assert found == pytest.approx(expected, abs=1e-5)
    short.world_model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="obs_shape is for a file"):
        load_agent(tmp_path / "saved", obs_shape=(4,))
    preset, run = tmp_path / "preset.yaml", tmp_path / "run"
    preset.write_text(PRESET)
    assert main(["--config", str(preset), "--from", str(folder / "single.pt"), "--run-dir", str(run)]) == 0
    trained = load_agent(run).world_model
    assert trained.obs_shape == (4,)
    assert torch.equal(trained.encoder[0].weight, short.world_model.encoder[0].weight)  # the learning rate is 1e-30
