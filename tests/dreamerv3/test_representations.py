"""DreamerV3 without a decoder: its losses give the numbers of the authors' code, and agents learn, act and are saved.

tests/data/dreamerv3_representations.npz: what R2-Dreamer's code (NM512/r2dreamer, 546e4fa) and NE-Dreamer's
(corl-team/nedreamer, 11cd3a9) computed in float32 from small random models: features, tokens, actions, parameters of
the head, the unscaled loss and its gradients. `ne_choices` has one choice for an action.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.dreamerv3_models import MIXED, TINY, batch_of, shake, tiny_agent
from worldloom import create_agent, create_world_model
from worldloom.dreamerv3 import DreamerV3Agent, DreamerV3Config, DreamerV3WorldModel
from worldloom.dreamerv3.encoder import Decoder
from worldloom.dreamerv3.representation import Rows, make_representation
from worldloom.families import agent_from_description
from worldloom.testing import check_family

ARRAYS = Path(__file__).resolve().parents[1] / "data" / "dreamerv3_representations.npz"
KINDS = ("r2dreamer", "infonce", "ne")
every_kind = pytest.mark.parametrize("kind", KINDS)

# Beside the authors' code

NAMES = [  # the authors' names of parameters, and ours
    ("prj.w.", "projection."), ("transformer.transformer.layers.", "blocks."), ("transformer.", ""),
    ("pos_embed", "positions"), ("f_embed", "feature_in"), ("a_embed", "action_in"), ("heads_next.0.", "output."),
    ("self_attn.in_proj_", "project."), ("self_attn.out_proj", "mix"), ("linear1", "widen"), ("linear2", "narrow"),
    ("norm1", "read_norm"), ("norm2", "feed_norm"),
]  # fmt: skip


def ours(name, value):
    for theirs, our in NAMES:
        name = name.replace(theirs, our)
    if name == "positions":
        return name, value[0]
    return name, value.T if name == "action_in.weight" else value  # a table of theirs, a matrix of ours


def given_arrays(case):
    with np.load(ARRAYS) as file:
        found = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith(f"{case}/")}
    parts = {"params": {}, "grads": {}, "": {}}
    for name, value in found.items():
        part, _, rest = name.removeprefix(f"{case}/").rpartition("/")
        rest, value = ours(rest, value) if part else (rest, value)
        parts[part][rest] = value
    return parts["params"], parts["grads"], parts[""]


def small_head(kind, features, tokens, actions, classes=()):
    config = DreamerV3Config(**TINY, representation=kind, ne_width=8)
    return make_representation(config, features, tokens, actions, classes)


def off(found, expected):
    """Return the greatest difference, as a share of the expected array's greatest number."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", [*KINDS, "ne_choices"])
def test_losses_and_gradients_are_those_of_the_authors_code(case):
    parameters, gradients, given = given_arrays(case)
    rows = {name: given[name].transpose(0, 1) for name in ("features", "tokens", "actions")}
    sizes = [rows[name].shape[-1] for name in ("features", "tokens", "actions")]
    head = small_head(case.partition("_")[0], *sizes, (3,) if case == "ne_choices" else ())
    known = dict(head.named_parameters())
    assert known.keys() == parameters.keys() == gradients.keys()
    with torch.no_grad():
        for name, value in parameters.items():
            known[name][: len(value)].copy_(value)  # they keep the positions that were read
    features = rows["features"].contiguous().requires_grad_()
    tokens = rows["tokens"].contiguous().requires_grad_()
    loss = head(Rows(features, rows["actions"], torch.zeros(features.shape[:2], dtype=torch.bool), tokens))
    loss.backward()
    assert off(loss.detach(), given["loss"]) < 1e-5
    assert off(features.grad.transpose(0, 1), given["features_grad"]) < 1e-5
    assert tokens.grad is None  # they are what features are compared with, and learn nothing from it
    greatest = max(value.abs().max() for value in gradients.values())
    for name, value in gradients.items():
        found = known[name].grad[: len(value)]
        if value.abs().max() < 1e-6 * greatest:  # a bias that a mean or a softmax takes away: rounding on both sides
            assert found.abs().max() < 1e-6 * greatest, name
        else:
            assert off(found, value) < 1e-5, name


@pytest.mark.parametrize(
    ("kind", "classes", "expected"),
    [("r2dreamer", (), 3_276_800), ("infonce", (), 3_276_800), ("ne", (), 5_646_592), ("ne", (3,), 5_645_824)],
)
def test_parameters_are_as_many_as_the_authors_code_has(kind, classes, expected):
    """Tests size12m with a vector and an image of 64 x 64, whose tokens lie side by side."""
    with torch.device("meta"):
        shapes = {"image": (3, 64, 64), "state": (5,)}
        config = DreamerV3Config(representation=kind)
        model = DreamerV3WorldModel(shapes, 3, config, action_classes=classes)
    assert model.encoder.tokens == 1280
    assert sum(p.numel() for p in model.representation.parameters()) == expected


# NE-Dreamer's transformer


def window(steps=7, batch=3, first=()):
    torch.manual_seed(2)
    is_first = torch.zeros(steps, batch, dtype=torch.bool)
    for place in first:
        is_first[place] = True
    return torch.randn(steps, batch, 6), torch.randn(steps, batch, 2), is_first


def test_a_row_is_predicted_from_the_rows_of_its_episode_before_it():
    head = small_head("ne", 6, 5, 2)
    features, actions, is_first = window(first=[(3, 1)])
    rows = torch.arange(7)
    for at in range(7):
        moved = features.clone()
        moved[at] += 1
        changed = (head.predict(moved, actions, is_first) - head.predict(features, actions, is_first)).abs().sum(-1) > 0
        seen = (rows[:-1] >= at).unsqueeze(1).expand(-1, 3).clone()  # entry t is of row t + 1
        if at < 3:
            seen[3:, 1] = False
        assert torch.equal(changed, seen)


def test_an_episode_in_a_window_is_read_as_one_that_a_window_begins_with():
    head = small_head("ne", 6, 5, 2)
    features, actions, is_first = window(first=[(0, 1), (3, 1)])
    alone = head.predict(features[3:, 1:2], actions[3:, 1:2], is_first[3:, 1:2])
    torch.testing.assert_close(head.predict(features, actions, is_first)[3:, 1:2], alone)
    actions[3, 1] = 9.0  # no action led to the first row of an episode
    torch.testing.assert_close(head.predict(features, actions, is_first)[3:, 1:2], alone)


def test_rows_that_start_an_episode_are_not_predicted():
    head = small_head("ne", 6, 5, 2)
    features, actions, is_first = window(first=[(0, 0), (3, 1)])
    tokens = torch.randn(7, 3, 5)
    loss = head(Rows(features, actions, is_first, tokens))
    tokens[3, 1], tokens[0] = 100.0, 100.0
    torch.testing.assert_close(head(Rows(features, actions, is_first, tokens)), loss)
    tokens[4, 1] = 100.0
    assert head(Rows(features, actions, is_first, tokens)) != loss


@every_kind
def test_tokens_that_never_change_give_finite_gradients(kind):
    head = small_head(kind, 6, 5, 2)
    features, actions, is_first = window()
    features = torch.ones_like(features).requires_grad_()
    head(Rows(features, actions, is_first, torch.ones(7, 3, 5))).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [features, *head.parameters()])


# The world model and the agent


def agent_of(kind, obs_shape=(3,), **fields):
    classes = {"goal": 5} if obs_shape is MIXED else None
    return tiny_agent(obs_shape, 3, obs_classes=classes, representation=kind, ne_width=16, **fields)


@every_kind
@pytest.mark.parametrize("obs_shape", [(3,), MIXED], ids=["vector", "mixed"])
def test_an_agent_learns_without_a_decoder(kind, obs_shape):
    agent = agent_of(kind, obs_shape)
    model = agent.world_model
    assert not [module for module in model.modules() if isinstance(module, Decoder)]
    batch = batch_of(agent)
    losses = [agent.update(batch)[0] for _ in range(15)]
    assert losses[-1]["embedding_loss"] < 0.9 * losses[0]["embedding_loss"]
    assert not [name for name in losses[0] if "reconstruction" in name]
    scales = {
        "embedding_loss": {"r2dreamer": 0.05, "infonce": 1, "ne": 1}[kind], "reward_loss": 1, "continue_loss": 1,
        "dynamics_loss": 1, "representation_loss": 0.1, "policy_loss": 1, "value_loss": 1, "replay_value_loss": 0.3,
    }  # fmt: skip
    assert {name for name in losses[0] if name.endswith("_loss")} == scales.keys()
    total = sum(scale * losses[0][name] for name, scale in scales.items())
    assert losses[0]["loss"] == pytest.approx(total, rel=1e-6)


@every_kind
def test_the_loss_reaches_encoder_and_recurrent_state_through_the_features_alone(kind):
    agent = shake(agent_of(kind))
    model = agent.world_model
    rows = {name: value[:, 1:] for name, value in batch_of(agent).items()}
    found = model.losses(rows, model.rssm.initial(4), model.draw_noise(8, 4))
    found.parts["embedding_loss"].backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"encoder", "rssm", "representation"}
    assert "decoder" in {name.split(".")[0] for name, _ in tiny_agent().world_model.named_parameters()}


@every_kind
def test_states_are_decoded_to_rewards_alone_and_imagined_as_before(kind):
    model = agent_of(kind).world_model
    state = model.encode(torch.randn(2, 3))
    decoded = model.decode(state)
    assert decoded["obs"] is None
    assert decoded["reward"].shape == decoded["continue"].shape == (2, 1)
    trajectory = model.imagine(state, torch.randn(15, 2, 3))
    assert trajectory.rewards.shape == trajectory.continues.shape == (15, 2, 1)
    losses = model.compute_loss({k: v for k, v in batch_of(agent_of(kind)).items() if k not in ("deter", "stoch")})
    assert {"loss", "kl_loss", "embedding_loss", "reward_loss", "continue_loss"} <= losses.keys()


@every_kind
def test_the_contract_of_a_family_holds(kind):
    fields = {**TINY, "representation": kind, "ne_width": 16}
    choice = spaces.Discrete(3) if kind == "ne" else spaces.MultiDiscrete([3, 2])
    assert not [line for line in check_family("dreamerv3:size1m", action_space=choice, **fields) if line.wrong]


@every_kind
def test_a_state_dict_resumes_bit_exactly(kind):
    straight = shake(agent_of(kind))
    straight.update(batch_of(straight))
    state = copy.deepcopy(straight.state_dict())
    expected = [straight.update(batch_of(straight, seed))[0] for seed in (2, 3)]
    resumed = agent_of(kind)
    resumed.load_state_dict(state)
    assert [resumed.update(batch_of(resumed, seed))[0] for seed in (2, 3)] == expected


@every_kind
def test_bfloat16_stays_near_float32(kind):
    wide, narrow = (shake(agent_of(kind)) for _ in range(2))
    narrow.configure_learning("bfloat16", compiled=False)
    batch = batch_of(wide)
    expected, found = wide.update(batch)[0], narrow.update(batch)[0]
    assert found["embedding_loss"] == pytest.approx(expected["embedding_loss"], rel=0.05)


def test_a_saved_model_without_a_decoder_loads(tmp_path):
    env = {"observation_space": spaces.Box(-1, 1, (3,)), "action_space": spaces.Discrete(3)}
    agent = create_agent("dreamerv3:size1m", **env, **TINY, representation="ne", ne_width=16)
    assert agent.world_model.action_classes == (3,)
    agent.world_model.save_pretrained(tmp_path)
    again = create_world_model(tmp_path)
    assert again.config.representation == "ne"
    for name, value in agent.world_model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert agent_from_description(agent.describe()).describe() == agent.describe()


def test_descriptions_from_before_there_was_a_choice_have_a_decoder(tmp_path):
    model = tiny_agent().world_model
    described = model.describe()
    new = {"representation", "barlow_scale", "infonce_scale", "ne_scale", "redundancy", "ne_layers", "ne_heads"}
    described["config"] = {k: v for k, v in described["config"].items() if k not in new | {"ne_width"}}
    del described["action_classes"]
    agent = agent_from_description(described)
    agent.world_model.load_state_dict(model.state_dict())
    assert agent.world_model.decoder is not None


def test_bad_settings_are_refused():
    box = spaces.Box(-1, 1, (3,))
    with pytest.raises(ValueError, match=r"agent.representation is 'r2', expected 'decoder' or 'r2dreamer' or"):
        create_agent("dreamerv3:size1m", box, box, representation="r2")
    with pytest.raises(ValueError, match=r"agent.batch_length is 129, expected at most 128 with representation='ne'"):
        create_agent("dreamerv3:size1m", box, box, representation="ne", batch_length=129)
    with pytest.raises(ValueError, match=r"agent.ne_width is 30, expected a multiple of ne_heads=4"):
        create_agent("dreamerv3:size1m", box, box, representation="ne", ne_width=30)
    model = DreamerV3WorldModel((3,), 3, DreamerV3Config(**TINY, representation="ne"))
    with pytest.raises(ValueError, match=r"embeds actions of action_classes=\(\), but the agent chooses among \(3,\)"):
        DreamerV3Agent(model, action_classes=(3,))
    with pytest.raises(ValueError, match="at most 128 rows, not 129"):
        small_head("ne", 6, 5, 2).predict(*window(steps=129))
