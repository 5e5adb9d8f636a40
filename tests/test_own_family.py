"""A family that stands outside the library: found by its module's name, in every process of a run."""

import importlib
import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch

from tests.own_families import EXAMPLE, MODEL, NAME
from tests.run_configs import tiny_config
from worldloom import create_agent, create_world_model, get_config, get_model_info, list_models, load_agent
from worldloom import family as families
from worldloom.envs import make_env
from worldloom.runs.build import make_run_agent, probe_env
from worldloom.runs.config import TrainConfig
from worldloom.runs.inline import InlineTrainer


def own_config(**sections):
    train = TrainConfig(total_steps=200, learning_starts=100, train_ratio=8)
    return tiny_config(algorithm=MODEL, **{"agent": {}, "train": train, **sections})


def test_a_family_is_found_by_its_modules_name(package, tmp_path):
    model = create_world_model(MODEL, obs_shape=(3,), action_dim=2, units=24)
    assert model.config.units == 24
    assert get_config(NAME).units == 128
    assert get_model_info(MODEL)["family"] == NAME
    model.save_pretrained(tmp_path / "model")
    again = create_world_model(tmp_path / "model")
    assert again.describe() == model.describe()
    obs = torch.randn(4, 3)
    assert torch.equal(again.encode(obs).features, model.encode(obs).features)
    env = make_env("Pendulum-v1", num_envs=2)
    actions, _ = create_agent(MODEL, env.observation_space, env.action_space).act(env.reset(), None, np.ones(2, bool))
    assert actions.shape == (2, 1)


def test_a_run_of_an_own_family_is_loaded_and_resumed(package, tmp_path):
    first = InlineTrainer(own_config(), tmp_path / "run")
    assert first.train()["updates"] > 0
    agent = load_agent(tmp_path / "run")
    assert type(agent).__module__ == NAME
    assert np.array_equal(agent.acting_weights(), first.agent.acting_weights())
    longer = own_config(train=TrainConfig(total_steps=300, learning_starts=100, train_ratio=8))
    resumed = InlineTrainer(longer, tmp_path / "run", resume=True)
    before = resumed.agent.updates
    assert before == first.agent.updates
    assert resumed.train()["env_steps"] == 300
    assert resumed.agent.updates > before


def command(folder, module, *arguments):
    words = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.ray
def test_an_own_family_trains_on_ray_and_the_commands_know_it(package, tmp_path):
    arguments = [
        "--algorithm", MODEL, "--env.id", "tests.environments:Counting-v0", "--env.num_envs", 2,
        "--replay.capacity", 2000,
        "--train.total_steps", 200, "--train.learning_starts", 100, "--train.train_ratio", 8, "--runtime.env_actors", 1,
        "--eval.episodes", 2, "--run-dir", "run",
    ]  # fmt: skip
    ran = command(tmp_path, "launch.train", *arguments)
    assert ran.returncode == 0, ran.stderr
    for module, *rest in [
        ("launch.evaluate", "--episodes", 1),
        ("launch.imagine", "--out", "seen.png", "--steps", 7),
        ("launch.status",),
    ]:
        looked = command(tmp_path, module, "--run-dir", "run", *rest)
        assert looked.returncode == 0, looked.stdout + looked.stderr
    again = command(tmp_path, "launch.train", "--run-dir", "run", "--resume", "--train.total_steps", 240)
    assert again.returncode == 0, again.stdout + again.stderr


def test_what_is_no_family_is_refused_in_a_sentence(package):
    def written(name, text):
        (package / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return f"{name}:tiny"

    for name, error, sentence in [
        ("nowhere.family:tiny", ValueError, "unknown model 'nowhere.family:tiny'.*module:size of a module that can be"),
        (f"{NAME}:huge", ValueError, f"unknown model '{NAME}:huge'. .*Known: {NAME}:small, {NAME}:tiny."),
        (written("family_less", ""), ValueError, "module family_less holds no FAMILY, expected FAMILY = world"),
        (written("family_wrong", "FAMILY = 3"), TypeError, "FAMILY in family_wrong is a int, expected a world"),
        (written("family_poor", "import not_there"), ValueError, "'family_poor' cannot be imported: No module named"),
    ]:  # fmt: skip
        with pytest.raises(error, match=sentence):
            create_world_model(name, obs_shape=(3,), action_dim=1)


def test_a_family_that_gives_others_no_name_to_find_it_by_is_refused(package):
    text = EXAMPLE.read_text().replace('"family": __name__', '"family": "gru"')
    (package / "my_package" / "my_family.py").write_text(text)
    env = make_env("Pendulum-v1")
    with pytest.raises(ValueError, match=f"describes its family as 'gru', expected '{NAME}'"):
        create_agent(MODEL, env.observation_space, env.action_space)


def test_an_installed_family_has_a_short_name(package, monkeypatch):
    point = EntryPoint("gru", f"{NAME}:FAMILY", families.GROUP)
    monkeypatch.setattr(families, "entry_points", lambda group: [point] if group == families.GROUP else [])
    assert {"gru:small", "gru:tiny"} <= set(list_models())
    env = make_env("Pendulum-v1")
    agent = create_agent("gru:tiny", env.observation_space, env.action_space)
    assert agent.describe()["family"] == NAME
    with pytest.raises(ValueError, match="unknown model 'gru:tinny'. Did you mean gru:tiny"):
        get_config("gru:tinny")


LACKING = [
    ('"config": dataclasses.asdict(self.config),', "", "describe() lacks config"),
    ('"updates": self.updates,', "", 'state_dict() has no "updates"'),
    ('"updates": self.updates,', '"updates": self.updates, "planner": self.act,', "['planner'] is a method"),
    ("action.cpu().numpy(),", "10 * action.cpu().numpy(),", "expected entries in [-1, 1]"),
    ("def collect(self)", "def gather(self)", "the agent has no collect; see worldloom.types.Agent"),
    ("def update_targets(self)", "def update_copies(self)", "the model has no update_targets"),
]


@pytest.mark.parametrize(("found", "instead", "sentence"), LACKING)
def test_what_a_family_lacks_is_said_when_a_run_starts(package, tmp_path, found, instead, sentence):
    text = EXAMPLE.read_text()
    assert found in text
    (package / "my_package" / "my_family.py").write_text(text.replace(found, instead))
    with pytest.raises(TypeError) as failure:
        InlineTrainer(own_config(), tmp_path / "run")
    assert sentence in str(failure.value)
    assert str(failure.value).startswith(f"{MODEL} on tests.environments:Counting-v0: ")
    assert not (tmp_path / "run").exists()


def test_starting_a_run_draws_nothing_from_its_agent(package):
    config = own_config()
    env = probe_env(config)
    agent = make_run_agent(config, env, "cpu", 0)
    fresh = create_agent(MODEL, env.observation_space, env.action_space, seed=0)
    assert torch.equal(agent.acting_generator.get_state(), fresh.acting_generator.get_state())
