"""DIAMOND's three networks give the numbers of the authors' code: outputs, losses, gradients and sampled frames."""

import dataclasses

import pytest
import torch

from tests.diamond_models import arrays, off, thin
from worldloom import functional as fn
from worldloom.diamond import SIZES, DiamondConfig
from worldloom.diamond.actor_critic import ActorCritic, Imagined, behaviour_losses
from worldloom.diamond.denoiser import Denoiser, DenoisingNoise, sigma_schedule
from worldloom.diamond.layers import Halving, UNet
from worldloom.diamond.reward_end import RewardEnd
from worldloom.diamond.rows import as_context

CONFIG = DiamondConfig(
    cond=16, channels=8, reward_cond=16, reward_channels=8, reward_levels=2, reward_lstm=16, policy_channels=8,
    policy_levels=4, policy_lstm=16, horizon=5,
)  # fmt: skip
CLOSE = 1e-5  # of an array's greatest number
LEVEL = 2 / 255  # one grey level: they are cut, not rounded, so a difference of 1e-7 may cost one

SHARED = [(".norm.norm.", ".norm."), (".resblocks.", ".")]
NAMES = {  # the authors' names of parameters, and ours
    "denoiser": [
        ("inner_model.", ""), ("noise_emb.weight", "noise_emb"), ("act_emb.0", "act_emb"), *SHARED,
        ("norm_out.norm.", "norm_out."), ("mid_blocks", "middle"), ("d_blocks", "down.blocks"), ("u_blocks", "up"),
        ("downsamples.1.conv", "down.downsamples.0"), ("upsamples.1.conv", "upsamples.0.1"),
    ],
    "reward_end": [
        ("encoder.", ""), *SHARED, ("_l0", ""), ("blocks.2", "last"), ("blocks.", "levels.blocks."),
        ("downsamples.1.conv", "levels.downsamples.0"),
    ],
    "policy": [
        ("encoder.encoder", "encoder"), ("f.0.norm", "norm"), ("f.2", "conv"), ("skip_projection", "skip"),
        ("_linear", ""),
    ],
}  # fmt: skip


def ours(part, name):
    for theirs, our in NAMES[part]:
        name = name.replace(theirs, our)
    return name


def loaded(part, model):
    given = arrays(part)
    parameters = {ours(part, name[7:]): value for name, value in given.items() if name.startswith("params/")}
    model.load_state_dict(parameters)
    return model, given


def check_gradients(part, model, given):
    found = dict(model.named_parameters())
    names = [name for name in given if name.startswith("grads/")]
    assert {ours(part, name[6:]) for name in names} == found.keys()
    for name in names:
        assert off(thin(found[ours(part, name[6:])].grad), given[name]) < CLOSE, name


@pytest.fixture
def denoiser():
    model = Denoiser((3, 16, 16), 5, CONFIG)
    model.unet = UNet([(8, 2, False), (32, 1, True)], 16)
    return loaded("denoiser", model)


@pytest.mark.parametrize(
    ("actions", "side", "size", "expected"),
    [
        (6, 64, "atari", (4_406_083, 5_901_120, 3_230_663)),
        (18, 64, "atari", (4_406_851, 5_902_656, 3_236_819)),
        (3, 16, "tiny", (81_227, 316_064, 84_844)),
    ],
)
def test_parameters_are_as_many_as_the_authors_code_has(actions, side, size, expected):
    parts = [
        part((3, side, side), actions, DiamondConfig(**SIZES[size])) for part in (Denoiser, RewardEnd, ActorCritic)
    ]
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == expected


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        (0.002, (1.7149757, 0.2572521, 0.7352854, -0.3009876)),
        (0.2830817, (1.5427852, 0.3181798, 0.5950465, -0.2213952)),
        (1.0, (0.8638684, 0.4509526, 0.1865672, 0.0107722)),
        (5.0, (0.1986538, 0.4975274, 0.0098658, 0.4028086)),
        (20.0, (0.0499788, 0.4998438, 0.0006245, 0.7489612)),
    ],
)
def test_coefficients_of_a_noise_level(sigma, expected):
    given = Denoiser((3, 16, 16), 5, CONFIG).coefficients(torch.tensor([sigma]))
    found = [x.item() for x in (given.c_in, given.c_out, given.c_skip, given.c_noise)]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


@torch.no_grad()
def test_denoised_frames_at_three_noise_levels(denoiser):
    model, given = denoiser
    context, actions, noisy, sigma = given["frames"][:, :4], given["actions"][:, :4], given["noisy"], given["sigma"]
    coefficients = model.coefficients(sigma)
    assert off(model.raw(context, actions, noisy, coefficients), given["raw"]) < CLOSE
    odd = model.raw(context[..., :14, :15], actions, noisy[..., :14, :15], coefficients)
    assert off(odd, given["raw_odd"]) < CLOSE  # padded right and below
    levels = (model.denoise(context, actions, noisy, sigma) + 1) / 2 * 255
    different = (levels - given["quantised"]).abs()
    assert different.max() < 1.01
    assert (different > 0.01).float().mean() < 1e-3


def test_denoising_loss_and_gradients_and_frames_of_another_episode_count_as_grey(denoiser):
    model, given = denoiser
    frames, episode = given["frames"].clone(), torch.zeros(3, 6, dtype=torch.long)
    assert not frames[1, :2].any()  # where the authors pad
    actions = torch.cat([torch.zeros(3, 1, dtype=torch.long), given["actions"][:, :-1]], 1)  # rows arrive
    frames[1, :2], actions[1, :3] = torch.rand(2, 3, 16, 16), torch.tensor([4, 3, 2])
    episode[1, 2:] = 1
    noise = DenoisingNoise(torch.zeros(3), given["level"], given["offset"], given["pixels"])
    loss = model.loss(frames, actions, episode, noise)
    loss.backward()
    assert off(loss.detach(), given["loss"]) < CLOSE
    check_gradients("denoiser", model, given)


@pytest.mark.parametrize(
    ("name", "changes"), [("euler", {}), ("heun", {"sampler_order": 2}), ("churn", {"sampler_churn": 1.0})]
)
def test_sampled_frames_at_every_noise_level(denoiser, name, changes):
    model, given = denoiser
    model.config = dataclasses.replace(CONFIG, **changes)
    path = torch.stack(model.sample(given["frames"][:, :4], given["actions"][:, :4], given[f"{name}_noise"]))
    assert path.shape == (4, 3, 3, 16, 16)
    different = (path - given[name]).abs()
    assert different.max() < 1.01 * LEVEL
    assert (different > CLOSE * given[name].abs().max()).float().mean() < 1e-3
    if name != "heun":
        assert (different[-1] < 1e-5).all()
        levels = (path[-1] + 1) / 2 * 255
        assert (levels - levels.round()).abs().max() < 1e-3  # the last step gives grey levels


def test_noise_levels_of_the_sampler():
    given = arrays("denoiser")
    for steps, name in [(3, "sigmas"), (10, "sigmas_10")]:
        assert off(torch.tensor(sigma_schedule(steps, 2e-3, 5.0, 7.0)), given[name]) < 1e-6


def test_rewards_and_ends_and_their_losses_and_gradients():
    model = RewardEnd((3, 16, 16), 5, CONFIG)
    model.levels = Halving([(8, 2, False), (8, 1, True)], 16)
    model, given = loaded("reward_end", model)
    frames, moves, real = given["frames"], given["actions"][:, :-1], given["mask"][:, :-1]
    never = torch.zeros_like(real)
    hidden, memory = model.unroll(frames, moves, never)
    outcome = model.outcome(hidden)
    for name, value in [
        ("hx", memory[0]),
        ("cx", memory[1]),
        ("logits_reward", outcome.reward),
        ("logits_end", outcome.end),
    ]:
        assert off(value, given[name]) < CLOSE, name
    frames[2, 5] = given["final"]  # what the episode ends on
    losses = model.outcome(model.unroll(frames, moves, never)[0]).losses(
        given["rewards"][:, :-1], given["end"][:, :-1], real
    )
    sum(losses).backward()
    for name, value in zip(("reward_loss", "end_loss"), losses, strict=True):
        assert off(value.detach(), given[name]) < CLOSE, name
    check_gradients("reward_end", model, given)


def test_policy_and_critic_and_their_losses_and_gradients():
    model, given = loaded("policy", ActorCritic((3, 16, 16), 5, CONFIG))
    chosen, memory = fn.one_hot(given["actions"], 5).float(), (given["hx"], given["cx"])
    imagined = Imagined(memory, given["frames"], chosen, given["rewards"], torch.zeros_like(given["rewards"]))
    with torch.no_grad():
        hidden, _ = model.unroll(imagined.frames, memory)
        values = model.value(hidden)
        assert off(model.log_probs(hidden[:-1]), given["logits"].log_softmax(-1).transpose(0, 1)) < CLOSE
        assert off(values, given["values"].T) < CLOSE
        assert off(imagined.returns(values[1:], 0.985, 0.95), given["returns"].T) < CLOSE
    losses, _ = behaviour_losses(model, imagined, CONFIG)
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert off(value.detach(), given[name]) < CLOSE, name
    check_gradients("policy", model, given)


@pytest.mark.parametrize(("lam", "name"), [(0.95, "returns"), (0.0, "returns_lambda0")])
def test_returns_where_lanes_end_and_are_cut(lam, name):
    given = arrays("returns")
    rewards, end, cut, values = (given[key].float().T for key in ("rew", "end", "trunc", "bootstrap"))
    found = fn.lambda_return(rewards.sign(), 0.985 * (1 - end), values, lam * (1 - cut))
    assert off(found.T, given[name]) < CLOSE


def test_context_of_another_episode_is_grey_and_its_moves_are_action_0():
    frames, actions = torch.ones(1, 4, 1, 1, 1), torch.tensor([[1, 2, 3, 4]])
    seen, moves = as_context(frames, actions, torch.tensor([[0, 0, 1, 1]]), torch.tensor([1]))
    assert seen.flatten().tolist() == [0, 0, 1, 1]
    assert moves.tolist() == [[0, 0, 3, 4]]
    assert as_context(frames, actions[:, :3], torch.tensor([[0, 0, 1, 1]]), torch.tensor([1]))[1].tolist() == [
        [0, 0, 3]
    ]
