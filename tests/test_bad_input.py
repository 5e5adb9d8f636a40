"""What models, agents and replay refuse, and that the refusal names what was wrong."""

import dataclasses

import pytest
import torch

from tests.dreamerv3_models import MIXED, batch_of, tiny_agent
from tests.storm_models import tiny_agent as storm_agent
from tests.tdmpc2_models import batch_of as tdmpc2_batch
from tests.tdmpc2_models import tiny_model
from worldloom import create_world_model
from worldloom.envs.suites import AtariConfig
from worldloom.runs.build import agent_spec, make_replay, make_run_agent, probe_env, replay_columns
from worldloom.runs.config import EnvConfig, ReplayConfig, RunConfig
from worldloom.tdmpc2 import TDMPC2Agent
from worldloom.types import ColumnSpec


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"obs": torch.zeros(2, 6, 3)}, r"obs 'obs' is \(2, 6, 3\) and actions \[2, 5, A\]"),
        ({"is_first": torch.zeros(2, 4, dtype=torch.bool)}, r"batch\['is_first'\] is \(2, 4\), expected \(2, 5\)"),
        ({"terminated": torch.zeros(5, dtype=torch.bool)}, r"batch\['terminated'\] is \(5,\), expected \(2, 5\)"),
        ({"rewards": torch.zeros(2, 5, 1)}, r"batch\['rewards'\] is \(2, 5, 1\), expected \(2, 5\)"),
    ],
)
def test_dreamerv3_names_the_part_of_a_batch_that_does_not_fit(changed, message):
    model = tiny_agent().world_model
    batch = {"obs": torch.zeros(2, 5, 3), "actions": torch.zeros(2, 5, 2), "rewards": torch.zeros(2, 5)}
    assert model.compute_loss(batch)["loss"].isfinite()
    with pytest.raises(ValueError, match=message):
        model.compute_loss({**batch, **changed})


def test_images_of_other_integers_are_refused_by_key():
    model = tiny_agent(MIXED, 3, obs_classes={"goal": 5}).world_model
    obs = {
        "camera": torch.zeros(1, 3, 64, 64, dtype=torch.int64),
        "state": torch.zeros(1, 3),
        "goal": torch.ones(1, 2).long(),
    }
    with pytest.raises(ValueError, match=r"image 'camera' is torch.int64 \(1, 3, 64, 64\), expected uint8"):
        model.encode(obs)
    model = create_world_model("tdmpc2:5m", (9, 64, 64), 2)
    with pytest.raises(ValueError, match="expected uint8, or floats"):
        model.encode(torch.zeros(1, 9, 64, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="images are floats up to 255, expected uint8"):
        model.encode(torch.full((1, 9, 64, 64), 255.0))


def test_uint8_and_unit_floats_are_the_same_image():
    image = torch.randint(256, (2, 9, 64, 64), dtype=torch.uint8)
    for model in (
        create_world_model("tdmpc2:5m", (9, 64, 64), 2, augment_eval=False),
        tiny_agent((9, 64, 64)).world_model,
    ):
        torch.manual_seed(0)
        whole = model.encode(image).deterministic
        torch.manual_seed(0)
        assert torch.equal(model.encode(image.float() / 255).deterministic, whole)


def test_an_agent_learns_from_rows_without_ends_but_not_without_its_latents():
    agent = tiny_agent()
    batch = batch_of(agent)  # whose ends are all false
    bare = {k: v for k, v in batch.items() if k not in ("is_first", "terminated", "truncated")}
    assert agent.update(bare)[0] == tiny_agent().update(batch)[0]
    with pytest.raises(ValueError, match="batch lacks deter, stoch, the stored latents"):
        agent.update({k: v for k, v in batch.items() if k not in ("deter", "stoch")})


def test_without_stored_latents_a_window_starts_from_nothing_the_action_before_it_included():
    batch = batch_of(tiny_agent(replay_context="zeros"))
    other = {**batch, "actions": batch["actions"].clone()}
    other["actions"][:, 0] *= -1
    losses = [tiny_agent(replay_context="zeros").update(rows)[0]["loss"] for rows in (batch, other)]
    assert losses[0] == losses[1]
    other["actions"][:, 1] *= -1
    assert tiny_agent(replay_context="zeros").update(other)[0]["loss"] != losses[0]


def test_tdmpc2_refuses_windows_of_another_length_than_its_horizon():
    model = tiny_model()
    with pytest.raises(ValueError, match="the batch has 3 rows, expected 4"):
        TDMPC2Agent(model).update(tdmpc2_batch(model, length=3))


def test_episodes_shorter_than_a_window_are_refused_when_the_replay_is_made():
    config = RunConfig(algorithm="tdmpc2:1m", env=EnvConfig(id="Pendulum-v1", action_repeat=100))
    env = probe_env(config)
    assert env.episode_length == 2
    with pytest.raises(
        ValueError, match="ends its episodes after 2 steps, but tdmpc2:1m learns from windows of 4 rows"
    ):
        make_replay(config, env, agent_spec(TDMPC2Agent(tiny_model(3, 1))))


def test_lost_lives_are_marked_only_for_agents_that_learn_from_them():
    env = EnvConfig(id="ALE/Breakout-v5", action_repeat=4, atari=AtariConfig(life_loss="mark"))
    config = RunConfig(algorithm="dreamerv3:size1m", env=env)
    found = probe_env(config)
    assert found.marks_lives
    with pytest.raises(ValueError, match="does not learn from lost lives, but env.atari.life_loss is mark. Set it to"):
        make_run_agent(config, found, "cpu", 0)
    spec = agent_spec(storm_agent((3, 64, 64), 4, (4,)))
    assert replay_columns(found, spec)["life_lost"] == ColumnSpec((), "bool")
    replay = make_replay(dataclasses.replace(config, replay=ReplayConfig(capacity=100)), found, spec)
    assert "life_lost" in replay.specs


def test_depths_that_do_not_fit_the_blocks_are_refused():
    with pytest.raises(ValueError, match=r"agent\.depth is 1, expected such that 4 depth is a multiple of blocks=8"):
        create_world_model("dreamerv3:size1m", (3, 64, 64), 2, depth=1)


def test_saved_models_know_their_own_classes(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="knows its own action_classes"):
        create_world_model(tmp_path / "model", action_classes=(2,))
