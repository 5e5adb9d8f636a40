"""AdamW for several parts of an agent."""

import copy

import pytest
import torch
from torch import nn

from worldloom.adamw import GuardedAdamW, Part


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(3, 4), nn.LayerNorm(4)
        self.linear, self.cell = nn.Linear(4, 4), nn.LSTMCell(4, 4)

    def forward(self, scale):
        hidden, _ = self.cell(self.linear(self.norm(self.embedding(torch.tensor([0, 2])))))
        return scale * (hidden - 1).square().sum()


def nets():
    torch.manual_seed(0)
    return [Net(), Net()]


def plain_steps(parts, clips, decays, rates, scale=1.0):
    """torch's AdamW, one for each part."""
    for net, clip, decay in zip(parts, clips, decays, strict=True):
        named = dict(net.named_parameters())
        decayed = {"linear.weight", "cell.weight_ih", "cell.weight_hh"}
        groups = [
            {"params": [named[name] for name in decayed], "weight_decay": decay},
            {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        for rate in rates:
            optimizer.zero_grad()
            net(scale).backward()
            nn.utils.clip_grad_norm_(net.parameters(), clip)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def test_parts_are_clipped_and_decayed_apart_and_the_rate_grows_from_zero():
    expected, found = nets(), nets()
    plain_steps(expected, (1.0, 1e-3), (0.5, 0.0), [0.0, 0.05, 0.1, 0.1])
    optimizer = GuardedAdamW([Part(found[0], 1.0, 0.5), Part(found[1], 1e-3, 0.0)], 0.1, 2)
    for _ in range(4):
        made, norms = optimizer.step(found[0](1.0) + found[1](1.0))
        assert made
        assert len(norms) == 2
    for a, b in zip(expected, found, strict=True):
        for name, value in a.named_parameters():
            torch.testing.assert_close(dict(b.named_parameters())[name], value)


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been_made(warmup):
    (expected, _), (found, _) = nets(), nets()
    for net, scales in [(expected, [1.0, 2.0, 1.0]), (found, [1.0, 2.0, float("inf"), 1.0])]:
        optimizer = GuardedAdamW([Part(net, 1.0, 0.1)], 0.1, warmup)
        made = [bool(optimizer.step(net(scale))[0]) for scale in scales]
        assert made == [scale < 3 for scale in scales]
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_state_goes_on_and_keeps_the_new_settings():
    first, second = nets()[0], nets()[0]
    optimizer = GuardedAdamW([Part(first, 1.0, 0.1)], 0.1, 5)
    for _ in range(3):
        optimizer.step(first(1.0))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    again = GuardedAdamW([Part(second, 1.0, 0.1)], 0.05, 5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in first.parameters()]
    optimizer.step(first(1.0))
    again.step(second(1.0))
    for start, a, b in zip(before, first.parameters(), second.parameters(), strict=True):  # half the rate
        torch.testing.assert_close((a - start) / 2, b - start, rtol=1e-3, atol=1e-6)
    assert optimizer.adam.param_groups[0]["lr"].item() == pytest.approx(0.06)  # 3 of 5 warm-up steps were made before
