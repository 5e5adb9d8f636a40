"""DIAMOND's imagination and what policy and critic learn from it, against the authors' code.

`tests/data/diamond_imagination.npz`: three rollouts of five steps in four lanes that all start anew, from the
parameters of the other arrays, with the noise of every draw, and an update of policy and critic after each. Lane 1 ends
on its last step. `blocks` are the frames before, of 4 × 4 blocks; `grad/` and `after/` hold at most 60 numbers of each
gradient of the first update, and of each parameter after the third.
"""

import pytest
import torch
from torch.testing import assert_close

from tests.diamond.test_parity import CLOSE, CONFIG, loaded, ours
from tests.diamond_models import arrays, off, thin
from worldloom import functional as fn
from worldloom.adamw import GuardedAdamW, Part
from worldloom.diamond.actor_critic import ActorCritic, behaviour_losses
from worldloom.diamond.layers import Halving, UNet
from worldloom.diamond.learning import DiamondLearning, ImaginationNoise
from worldloom.diamond.rows import Rows, as_frames
from worldloom.diamond.world_model import DiamondWorldModel

WARMUP = 2  # of their recorded updates
MOST = 60  # numbers of a gradient or parameter
MOVED = 100  # times as far apart may be what follows from a frame with another grey level


def part_of(given, start):
    return {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}


@pytest.fixture
def learning():
    model = DiamondWorldModel((3, 16, 16), 5, CONFIG)
    model.denoiser.unet = UNet([(8, 2, False), (32, 1, True)], 16)
    model.reward_end.levels = Halving([(8, 2, False), (8, 1, True)], 16)
    loaded("denoiser", model.denoiser)
    loaded("reward_end", model.reward_end)
    policy, _ = loaded("policy", ActorCritic((3, 16, 16), 5, CONFIG))
    return DiamondLearning(model, policy, 0)


def start_of(given):
    """Return rows that end where the lanes start, and the noise of the rollout."""
    frames = given["blocks"].repeat_interleave(4, -1).repeat_interleave(4, -2)
    frames = torch.cat([torch.zeros_like(frames[:, :1]), frames], 1)  # a row more, from which nothing starts
    actions = torch.nn.functional.pad(given["context_actions"].long(), (2, 0))
    never = torch.zeros(actions.shape, dtype=torch.bool)
    rows = Rows(as_frames(frames), actions, torch.zeros(actions.shape), never, never, never)
    frame = given["noise_frame_sixteenths"].float().unsqueeze(1) / 16
    draws = [given[f"noise_{name}"] for name in ("action", "reward", "end")]
    return rows, ImaginationNoise(torch.full((4,), 0.5), frame, *draws)


def levels_apart(found, expected):
    """Return how many grey levels differ: they are cut, not rounded, so 1e-7 may cost one in a pixel of a thousand."""
    apart = ((found + 1) / 2 * 255 - expected).abs()
    assert apart.max() < 1.01
    assert (apart > 0.01).float().mean() <= 1e-3
    return int((apart > 0.01).sum())


def test_imagined_rollouts_their_losses_and_three_updates_are_the_authors(learning):
    given, policy = arrays("imagination"), learning.behaviour
    optimizer = GuardedAdamW([Part(policy, CONFIG.clip_policy, 0.0)], CONFIG.lr, WARMUP)
    before, close = {name: value.clone() for name, value in policy.named_parameters()}, CLOSE
    for number in (1, 2, 3):
        theirs = part_of(given, f"rollout{number}/")
        imagined = learning.imagine(*start_of(theirs))
        if levels_apart(imagined.frames, theirs["frames"].transpose(0, 1)):
            close = MOVED * CLOSE
        assert torch.equal(imagined.actions, fn.one_hot(theirs["actions"].long().T, 5).float())
        assert torch.equal(imagined.rewards, theirs["rewards"].float().T)
        assert torch.equal(imagined.ends, theirs["ends"].float().T)
        assert imagined.ends.nonzero().tolist() == [[4, 1]]
        with torch.no_grad():
            hidden, _ = policy.unroll(imagined.frames, imagined.memory)
            assert off(policy.log_probs(hidden[:-1]), theirs["logits"].log_softmax(-1).transpose(0, 1)) < close
            assert off(policy.value(hidden), torch.cat([theirs["values"], theirs["bootstrap"][:, -1:]], 1).T) < close
        losses, _ = behaviour_losses(policy, imagined, CONFIG)
        for name, value in losses.items():
            assert_close(value.detach(), theirs[name], rtol=close, atol=close / 10)
        made, (norm,) = optimizer.step(sum(losses.values()))
        assert made
        assert_close(norm, theirs["grad_norm"], rtol=close, atol=0)
        if number == 1:
            for name, expected in part_of(given, "grad/").items():
                found = dict(policy.named_parameters())[ours("policy", name)].grad
                assert off(thin(found, MOST), expected) < close, name
    for name, expected in part_of(given, "after/").items():
        found = dict(policy.named_parameters())[ours("policy", name)]
        assert_close(thin(found, MOST), expected, rtol=0, atol=min(1000 * close, 1) * CONFIG.lr)
        assert not torch.equal(found, before[ours("policy", name)])
