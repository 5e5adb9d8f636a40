"""Runs that start from a trained agent: a file in the authors' layout, of one task or several, or an agent of ours."""

import contextlib
import dataclasses
import shutil
import uuid

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close

from launch.train import main
from tests.run_configs import dreamer_config, tiny_config
from worldloom import create_world_model, get_config, load_agent
from worldloom.diamond import DiamondConfig, DiamondWorldModel
from worldloom.diamond.actor_critic import ActorCritic
from worldloom.dreamerv3 import DreamerV3Config, DreamerV3WorldModel
from worldloom.dreamerv3.behaviour import Behaviour
from worldloom.families import agent_from_description
from worldloom.locations import locate, write_bytes
from worldloom.runs.agent_state import take_agent, write_agent
from worldloom.runs.build import agent_spec, make_run_agent, probe_env
from worldloom.runs.config import StartConfig, TrainConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.start import _like, keep_network, read_start, with_network_of
from worldloom.storm import STORMConfig, STORMWorldModel
from worldloom.storm.behaviour import Behaviour as STORMBehaviour
from worldloom.tdmpc2 import Task, TDMPC2Agent, TDMPC2Config, TDMPC2WorldModel, save_official
from worldloom.tdmpc2.planner import Planner

SIZES = {"encoder_dim": 16, "mlp_dim": 16, "latent_dim": 16, "num_q": 3}
CHEAP = {"batch_size": 8, "num_samples": 16, "num_elites": 4, "num_pi_trajs": 2, "iterations": 2}
TASKS = (Task("walker-walk", 4), Task("Counting", 2), Task("mw-reach", 3, 100))
STILL = 1e-30  # a learning rate at which float32 weights stay as they are
FROZEN = ("encoder.", "dynamics.", "reward.", "policy.", "q.")  # not the target heads, which follow the others
YAML = """
algorithm: tdmpc2:1m
agent: {batch_size: 8, num_samples: 16, num_elites: 4, num_pi_trajs: 2, iterations: 2, lr: 1.0e-30}
env: {id: "tests.environments:Counting-v0", num_envs: 2}
replay: {capacity: 2000}
train: {total_steps: 120, learning_starts: 60, train_ratio: 12}
runtime: {kind: inline}
eval: {interval: 0, episodes: 1}
checkpoint: {interval: 0}
"""


def trained(obs=3, action=1, tasks=(), **overrides):
    """A model of random weights, none of them zero."""
    torch.manual_seed(0)
    config = TDMPC2Config(**{**SIZES, **CHEAP, "task_dim": 6 if tasks else 0, **overrides})
    model = TDMPC2WorldModel((obs,), action, config, 500, tasks=tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(YAML)
    return str(path)


@pytest.fixture
def official(tmp_path):
    """A file of one task, in the authors' layout."""
    save_official(trained(), tmp_path / "counting-1.pt")
    return tmp_path / "counting-1.pt"


def weights(model):
    return {name: value for name, value in model.state_dict().items() if name.startswith(FROZEN)}


def assert_same_weights(found, expected):
    assert weights(found).keys() == weights(expected).keys()
    for name, value in weights(expected).items():
        assert torch.equal(weights(found)[name], value), name


def begun(config):
    return make_run_agent(config, probe_env(config), "cpu", 0)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


# One task


def test_a_run_starts_from_the_file_and_goes_on_without_it(config, official, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["--config", config, "--from", str(official), "--run-dir", str(run)]) == 0
    assert f"starting from {official}: tdmpc2:1m" in capsys.readouterr().out
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["start"] == {"checkpoint": str(official), "like": None}
    assert {name: saved["agent"][name] for name in SIZES} == SIZES
    assert_same_weights(load_agent(run).world_model, trained())
    assert load_agent(run).world_model.discount == 0.995  # of this environment, which sets no limit; the file had 0.99
    official.unlink()
    shutil.rmtree(run / "start")
    assert main(["--resume", "--run-dir", str(run), "--train.total_steps", "140"]) == 0
    assert_same_weights(load_agent(run).world_model, trained())


def test_optimisers_and_counters_are_new(official):
    agent = begun(tiny_config(agent={**SIZES, **CHEAP}, start=StartConfig(checkpoint=str(official))))
    assert_same_weights(agent.world_model, trained())
    state = agent.state_dict()
    assert state["updates"] == 0
    assert state["scale"] == 1
    assert not state["model_optimizer"]["state"]
    moved = begun(tiny_config(agent={**SIZES, **CHEAP}))
    assert not torch.equal(moved.world_model.encoder[0].weight, agent.world_model.encoder[0].weight)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (TDMPC2Config, TDMPC2WorldModel),
        (DreamerV3Config, DreamerV3WorldModel),
        (STORMConfig, STORMWorldModel),
        (DiamondConfig, DiamondWorldModel),
    ],
)
def test_only_network_fields_shape_parameters(config, model):
    shape = (3, 64, 64) if config is DiamondConfig else (3,)

    def shapes(**changed):
        with torch.device("meta"):
            found = parameters_of(model(shape, 2, config(**changed)))
        return {name: value.shape for name, value in found.items()}

    plain, tried = shapes(), 0
    for field in dataclasses.fields(config):
        if field.name in config.network_fields or field.type not in ("int", "float"):
            continue
        with contextlib.suppress(ValueError):  # values that the config refuses
            assert shapes(**{field.name: field.default * 2 if field.type == "int" else field.default / 2}) == plain
            tried += 1
    assert tried > 8
    shaping = {
        TDMPC2Config: ("latent_dim", "mlp_dim"),
        DreamerV3Config: ("deter", "value_layers"),
        STORMConfig: ("hidden", "agent_layers"),
        DiamondConfig: ("context", "policy_lstm"),
    }
    for name in shaping[config]:
        assert shapes(**{name: 2 * getattr(config(), name)}) != plain


def parameters_of(model):
    """Every parameter of a model and, where it has one, of its behaviour."""
    behaviour = {}
    if isinstance(model, DreamerV3WorldModel):
        behaviour = Behaviour(model, ()).state_dict()
    if isinstance(model, STORMWorldModel):
        behaviour = STORMBehaviour(model.config, model.action_dim, ()).state_dict()
    if isinstance(model, DiamondWorldModel):
        behaviour = ActorCritic(model.obs_shape, model.action_dim, model.config).state_dict()
    return {**model.state_dict(), **{f"behaviour.{name}": value for name, value in behaviour.items()}}


def test_a_trained_agent_acts_by_itself_from_the_first_step(official, tmp_path):
    fresh = tiny_config(agent={**SIZES, **CHEAP})
    started = dataclasses.replace(fresh, start=StartConfig(checkpoint=str(official)))
    for made, expected in ((fresh, True), (started, False)):
        trainer = InlineTrainer(made, tmp_path / str(expected))
        assert agent_spec(trainer.agent).random_warmup
        assert trainer.run.random_actions == expected


def test_learning_goes_on_from_the_weights_of_the_file(config, official, tmp_path):
    assert (
        main(["--config", config, "--from", str(official), "--run-dir", str(tmp_path / "run"), "--agent.lr", "3e-4"])
        == 0
    )
    found, expected = load_agent(tmp_path / "run").world_model, trained()
    distance = max((weights(found)[name] - value).abs().max().item() for name, value in weights(expected).items())
    assert 0 < distance < 0.05  # a few updates at 3e-4, where two random models differ by more than 0.3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--agent.latent_dim", "32"],
            "agent.latent_dim is 32, but 16 in {file}, whose network this run has. Leave it out",
        ),
        (["--agent.episodic", "true"], "agent.episodic is True, but False in {file}"),
        (["--algorithm", "dreamerv3:size1m", "--agent", "{{}}"], "holds a model of tdmpc2. Give --algorithm tdmpc2."),
        (["--like", "walker-walk"], "start.like is 'walker-walk', but {file} holds a model of a single task"),
        (["--env.id", "CartPole-v1"], "{file} reads observations (3,), but CartPole-v1 has (4,)"),
        (["--from", "absent.pt"], "absent.pt"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(config, official, arguments, words, capsys):
    arguments = [word.format() for word in arguments]
    said = refusal(capsys, "--config", config, "--from", str(official), *arguments)
    assert words.format(file=official) in said, said
    assert "Traceback" not in said


def test_like_without_from_is_refused(config, capsys):
    assert "start.like is 'walker-walk', expected null without --from" in refusal(
        capsys, "--config", config, "--like", "walker-walk"
    )


def test_the_preset_of_the_files_size_is_named():
    model = create_world_model("tdmpc2:19m", obs_shape=(3,), action_dim=1, device="meta")
    adopted = with_network_of(tiny_config(agent={"batch_size": 8}), model.describe(), "a.pt")
    assert (adopted.algorithm, adopted.agent) == ("tdmpc2:19m", {"batch_size": 8})
    other = with_network_of(tiny_config(agent={}), {**model.describe(), "config": {**SIZES, "lr": 1.0}}, "a.pt")
    assert (other.algorithm, other.agent) == ("tdmpc2:1m", SIZES)  # whose other fields are the preset's


def test_a_resumed_run_keeps_its_network_and_its_start(config, official, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["--config", config, "--from", str(official), "--run-dir", str(run)]
    assert main(command) == 0
    longer = [*command, "--resume", "auto", "--train.total_steps", "130"]  # as a job repeats its command
    assert main(longer) == 0
    assert {n: v for n, v in yaml.safe_load((run / "config.yaml").read_text())["agent"].items() if n in SIZES} == SIZES
    said = refusal(capsys, "--resume", "--run-dir", str(run), "--agent.latent_dim", "32")
    assert "agent.latent_dim is 32, but 16 in this run" in said
    said = refusal(capsys, "--resume", "--run-dir", str(run), "--from", "other.pt")
    assert f"start.checkpoint is 'other.pt', but '{official}' in this run" in said
    plain = tiny_config()
    assert keep_network(plain, plain) is plain


# Several tasks


def test_a_model_of_one_task_gives_the_outputs_of_the_model_of_several():
    wide = trained(obs=5, action=4, tasks=TASKS)
    narrow = wide.for_task("new", "Counting", (3,), 2, 200)
    assert [task.name for task in narrow.tasks] == ["new"]
    assert narrow.discounts(torch.zeros(1, dtype=torch.int64)) == pytest.approx(0.975)
    obs, action = torch.randn(6, 3), torch.rand(6, 2) * 2 - 1
    task, filled = torch.full((6,), 1), torch.cat([action, torch.zeros(6, 2)], 1)
    with torch.no_grad():
        z, full = narrow.encode(obs).deterministic, wide.encode(obs, task).deterministic
        assert_close(z, full)
        assert_close(narrow.next_latent(z, action), wide.next_latent(full, filled))
        assert_close(narrow.predict_reward(z, action), wide.predict_reward(full, filled))
        assert_close(narrow.values(z, action), wide.values(full, filled))
        assert_close(narrow.target_q(torch.cat([z, action], -1)), wide.target_q(torch.cat([full, filled], -1)))
        for noise in (None, torch.randn(6, 4)):
            few = None if noise is None else noise[:, :2]
            assert_close(narrow.policy_action(z, few), wide.policy_action(full, noise, task)[:, :2])
        first, rest = Planner(narrow), Planner(wide)
        noise = rest.draw_noise(6)
        cut = {name: getattr(noise, name)[..., :2] for name in ("policy", "samples", "terminal", "explore")}
        wide.task_embedding.discounts[1] = narrow.task_embedding.discounts[0]
        action, plan = first.plan(z, torch.zeros(6, 3, 2), dataclasses.replace(noise, **cut), True, task * 0)
        action_of_all, plan_of_all = rest.plan(full, torch.zeros(6, 3, 4), noise, True, task)
        assert_close(action, action_of_all[:, :2])
        assert_close(plan, plan_of_all[..., :2])


def test_a_model_of_one_task_needs_no_task_numbers():
    model = trained(obs=5, action=4, tasks=TASKS).for_task("new", "walker-walk", (3,), 2, None)
    agent = TDMPC2Agent(model)
    assert agent.columns == {}
    actions, _ = agent.act(np.ones((2, 3), np.float32), None, np.ones(2, bool))
    assert actions.shape == (2, 2)
    before = model.task_embedding.weight.clone()
    batch = {"obs": torch.randn(8, 4, 3), "actions": torch.rand(8, 4, 2), "rewards": torch.randn(8, 4)}
    assert agent.update(batch)[0]["loss"] > 0
    assert not torch.equal(model.task_embedding.weight, before)  # the embedding learns, too
    assert model.compute_loss(batch)["loss"].isfinite()
    assert model.imagine(model.initial_state(2), torch.zeros(3, 2, 2)).rewards.isfinite().all()


def test_tasks_that_are_too_large_or_unknown_are_refused():
    model = trained(obs=5, action=4, tasks=TASKS)
    for shape, action in (((6,), 4), ((5,), 5), ((1, 40, 40), 2)):
        with pytest.raises(ValueError, match="but this model reads up to 5 numbers and acts with up to 4 dimensions"):
            model.for_task("new", "walker-walk", shape, action, None)
    with pytest.raises(
        ValueError, match="there is no task 'run' to start from, expected one of: walker-walk, Counting"
    ):
        model.for_task("new", "run", (3,), 1, None)


def multitask(tmp_path):
    """A directory of a model of three tasks; Counting is one of them, of an environment of other sizes."""
    trained(obs=5, action=4, tasks=TASKS).save_pretrained(tmp_path / "three")
    return tmp_path / "three"


def test_a_run_fine_tunes_a_model_of_several_tasks_on_a_new_one(config, tmp_path, capsys):
    source, run = multitask(tmp_path), tmp_path / "run"
    command = ["--config", config, "--from", str(source), "--like", "mw-reach", "--run-dir", str(run)]
    assert main(command) == 0
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["start"]["like"] == "mw-reach"
    assert [task["name"] for task in saved["agent"]["tasks"]] == ["tests.environments:Counting-v0"]
    model, wide = load_agent(run).world_model, trained(obs=5, action=4, tasks=TASKS)
    assert_same_weights(model, wide.for_task("new", "mw-reach", (3,), 1, None))
    assert torch.equal(model.task_embedding.weight[0], wide.task_embedding.weight[2])
    shutil.rmtree(source)
    assert main(["--resume", "--run-dir", str(run), "--train.total_steps", "140"]) == 0


def test_a_model_of_one_task_starts_another_task_with_that_ones_length(tmp_path):
    wide = trained(obs=5, action=4, tasks=TASKS)
    wide.for_task("old-task", "mw-reach", (3,), 1, 100).save_pretrained(tmp_path / "old")
    config = tiny_config(agent=CHEAP, start=StartConfig(checkpoint=str(tmp_path / "old")))
    env = dataclasses.replace(probe_env(config), episode_length=None)
    start = read_start(config, env)
    assert [(task["name"], task["episode_length"]) for task in start.description["tasks"]] == [(config.env.id, None)]
    made = agent_from_description(start.description).world_model
    assert made.task_embedding.discounts.tolist() == pytest.approx([made.config.discount_max])
    assert torch.equal(start.model["task_embedding.weight"][0], wide.task_embedding.weight[2])
    unknown = dataclasses.replace(config, start=StartConfig(checkpoint=str(tmp_path / "old"), like="walker-walk"))
    with pytest.raises(ValueError, match=r"knows 1 task, but none is called 'walker-walk'"):
        read_start(unknown, env)


def test_a_start_is_found_by_its_name_in_the_storage_and_at_a_url(config, official, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLDLOOM_STORAGE", str(tmp_path / "store"))
    assert main(["--config", config, "--from", str(official), "--name", "first"]) == 0
    assert main(["--config", config, "--from", "first", "--name", "second"]) == 0
    assert yaml.safe_load((tmp_path / "store" / "second" / "config.yaml").read_text())["start"]["checkpoint"] == "first"
    published = locate(f"memory://{uuid.uuid4().hex}/walker-walk-1.pt")
    write_bytes(published, official.read_bytes())
    assert_same_weights(load_agent(str(published)).world_model, load_agent(official).world_model)
    capsys.readouterr()


def test_a_task_of_the_models_own_is_found_by_its_name(tmp_path):
    source, config = multitask(tmp_path), tiny_config(agent=CHEAP)
    named = dataclasses.replace(config, env=dataclasses.replace(config.env, id="tests.environments:Counting-v0"))
    start = dataclasses.replace(named, start=StartConfig(checkpoint=str(source)))
    with pytest.raises(
        ValueError, match=r"knows 3 tasks, but none is called 'tests\.environments:Counting'. Give --like"
    ):
        read_start(start, probe_env(start))
    own = dataclasses.replace(start, start=StartConfig(checkpoint=str(source), like="Counting"))
    embedding = read_start(own, probe_env(own)).model["task_embedding.weight"]
    assert torch.equal(embedding[0], trained(obs=5, action=4, tasks=TASKS).task_embedding.weight[1])


def test_names_of_tasks_are_those_of_papers():
    tasks = [Task("cup-catch", 2), Task("finger-turn-easy", 2)]
    config = tiny_config("dm_control/ball_in_cup-catch-v0", start=StartConfig(checkpoint="FILE"))
    assert _like(config, trained(tasks=tasks, action=2), "FILE") == "cup-catch"
    turning = dataclasses.replace(config, env=dataclasses.replace(config.env, id="dm_control/finger-turn_easy-v0"))
    assert _like(turning, trained(tasks=tasks, action=2), "FILE") == "finger-turn-easy"


def test_given_embeddings_stay_as_they_are_in_a_run_of_their_own(tmp_path):
    model = trained(obs=5, action=4, tasks=TASKS, given_tasks=True)
    with torch.no_grad():
        model.task_embedding.weight.mul_(20)  # of any norm
    model.save_pretrained(tmp_path / "three")
    config = tiny_config(agent=CHEAP, start=StartConfig(checkpoint=str(tmp_path / "three"), like="mw-reach"))
    start = read_start(config, probe_env(config))
    agent = begun(with_network_of(config, start.description, "three"))
    weight = agent.world_model.task_embedding.weight
    assert torch.equal(weight[0], model.task_embedding.weight[2])
    assert not weight.requires_grad


def test_files_of_other_task_sets_are_read_with_their_tasks(config, tmp_path):
    save_official(trained(obs=5, action=4, tasks=TASKS), tmp_path / "three.pt")
    tasks = yaml.safe_dump([dataclasses.asdict(task) for task in TASKS], default_flow_style=True).strip()
    command = ["--config", config, "--from", str(tmp_path / "three.pt"), "--like", "Counting", "--agent.tasks", tasks]
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    assert [task.name for task in load_agent(tmp_path / "run").world_model.tasks] == ["tests.environments:Counting-v0"]


# Agents of ours


def test_a_run_starts_from_another_run_of_ours(config, official, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["--config", config, "--from", str(official), "--run-dir", str(first)]) == 0
    command = ["--config", config, "--from", str(first), "--run-dir", str(second), "--train.seed", "5"]
    assert main(command) == 0
    assert_same_weights(load_agent(second).world_model, trained())
    assert yaml.safe_load((second / "config.yaml").read_text())["agent"]["lr"] == STILL  # the preset's, not the run's


def test_dreamerv3_starts_with_its_world_model_and_behaviour(tmp_path):
    few = TrainConfig(total_steps=140, learning_starts=100, train_ratio=4)
    first = InlineTrainer(dreamer_config(train=few), tmp_path / "first")
    first.train()
    config = dreamer_config(agent={"batch_size": 8, "lr": 1e-5}, start=StartConfig(checkpoint=str(tmp_path / "first")))
    start = read_start(config, probe_env(config))
    agent = begun(with_network_of(config, start.description, "first"))
    assert agent.updates == 0
    for name, value in first.agent.behaviour.state_dict().items():
        assert torch.equal(agent.behaviour.state_dict()[name], value), name
    network = {name: getattr(first.agent.config, name) for name in DreamerV3Config.network_fields}
    assert agent.config == DreamerV3Config(**network, batch_size=8, lr=1e-5)  # all else is this run's


@pytest.mark.parametrize("algorithm", ["storm:tiny", "diamond:tiny"])
def test_a_small_agent_starts_a_run_of_its_own_size(algorithm, tmp_path):
    fields = {"batch_size": 2, "train_ratio": 1.0, "policy_lstm": 32} if "diamond" in algorithm else {"hidden": 64}
    config = tiny_config("tests.environments:Screen-v0", algorithm=algorithm, agent=fields)
    first = make_run_agent(config, probe_env(config), "cpu", 1)
    for name, buffer in first.world_model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.5)
    first_folder = tmp_path / "first"
    write_agent(first_folder, take_agent(first))
    started = dataclasses.replace(config, agent={}, start=StartConfig(checkpoint=str(first_folder / "agent")))
    fitted = with_network_of(started, first.describe(), "it")
    assert fitted.algorithm == algorithm
    assert fitted.agent == {name: value for name, value in fields.items() if name in first.config.network_fields}
    second = make_run_agent(fitted, probe_env(config), "cpu", 2)
    assert second.config.batch_size == get_config(algorithm).batch_size
    for mine, theirs in zip(
        first.world_model.state_dict().values(), second.world_model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert np.array_equal(first.acting_weights(), second.acting_weights())
