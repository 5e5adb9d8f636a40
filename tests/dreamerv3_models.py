"""Small DreamerV3 agents, their batches, and the reference's parity fixture, that the tests share."""

import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from worldloom.dreamerv3 import DreamerV3Agent, DreamerV3Config, DreamerV3WorldModel
from worldloom.dreamerv3.latents import compact
from worldloom.dreamerv3.layers import BlockLinear, Conv, NormSiLU
from worldloom.dreamerv3.rssm import RSSMState


def close(actual, expected, tolerance=1e-6):
    actual = (
        actual.detach().double().flatten()
        if isinstance(actual, torch.Tensor)
        else torch.tensor(actual, dtype=torch.float64)
    )
    assert_close(actual, torch.tensor(expected, dtype=torch.float64).flatten(), rtol=tolerance, atol=tolerance)


# The parity fixture: every kernel and bias is 0.3 sin(i) in the reference's layout, every norm 1 + 0.1 sin(i)


def wave(*shape):
    return 0.3 * torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).reshape(shape).float()


@torch.no_grad()
def fill(module):
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.copy_(wave(layer.in_features, layer.out_features).T)
            layer.bias.copy_(wave(layer.out_features))
        elif isinstance(layer, Conv):
            out, inputs, height, width = layer.weight.shape
            layer.weight.copy_(wave(height, width, inputs, out).permute(3, 2, 0, 1))
            layer.bias.copy_(wave(out))
        elif isinstance(layer, BlockLinear):
            inputs, blocks, out = layer.weight.shape
            layer.weight.copy_(wave(blocks, inputs, out).transpose(0, 1))
            layer.bias.copy_(wave(blocks * out))
        elif isinstance(layer, NormSiLU):
            layer.scale.copy_(1 + wave(len(layer.scale)) / 3)
    return module


H = 0.5 * torch.sin(torch.arange(1.0, 9))[None]
Z = torch.tensor([[[1.0, 0, 0], [0, 0, 1]]])
TOKEN = 0.5 * torch.sin(torch.arange(1.5, 6))[None]
PIXELS = (37 * torch.arange(256) % 256).to(torch.uint8).view(1, 1, 16, 16)

# Agents

TINY = {
    "deter": 32, "hidden": 8, "units": 16, "classes": 4, "depth": 2, "stoch": 4, "blocks": 4, "batch_size": 4,
    "batch_length": 8, "imagination_length": 5, "bins": 255, "lr": 1e-3, "warmup": 0,
}  # fmt: skip
MIXED = {"camera": (3, 64, 64), "state": (3,), "goal": (2,)}


def tiny_agent(obs_shape=(3,), action_dim=2, classes=(), obs_classes=None, **overrides):
    torch.manual_seed(0)
    config = DreamerV3Config(**{**TINY, **overrides})
    model = DreamerV3WorldModel(obs_shape, action_dim, config, obs_classes=obs_classes)
    return DreamerV3Agent(model, seed=0, action_classes=classes)


def batch_of(agent, seed=1, rows=None):
    torch.manual_seed(seed)
    model, batch, length = agent.world_model, agent.batch_size, rows or agent.windows.length

    def observation(key, shape):
        if len(shape) == 3:
            return torch.randint(0, 256, (batch, length, *shape), dtype=torch.uint8)
        if key in model.obs_classes:
            return torch.randint(model.obs_classes[key], (batch, length, *shape), dtype=torch.int32)
        return torch.randn(batch, length, *shape)

    shape = model.obs_shape
    obs = {k: observation(k, s) for k, s in shape.items()} if isinstance(shape, dict) else observation("obs", shape)
    actions = torch.rand(batch, length, model.action_dim) * 2 - 1
    if agent.action_classes:
        parts = actions.split(agent.action_classes, -1)
        actions = torch.cat([F.one_hot(part.argmax(-1), part.shape[-1]).float() for part in parts], -1)
    none = torch.zeros(batch, length, dtype=torch.bool)
    made = {
        "obs": obs,
        "actions": actions,
        "rewards": torch.randn(batch, length),
        "is_first": none.clone(),
        "terminated": none.clone(),
        "truncated": none.clone(),
    }
    if agent.columns:
        state = RSSMState(torch.randn(batch, length, 32), torch.eye(4)[torch.randint(4, (batch, length, 4))])
        made |= compact(state)
    return made


def shake(agent, amount=0.1):
    """Give the zero-initialised outputs values."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in [*agent.world_model.parameters(), *agent.behaviour.parameters()]:
            parameter.add_(amount * torch.randn_like(parameter))
    return agent


def loss_parts(agent, batch):
    """(trained rows, world model losses, imagination) of one update, with gradients and without a step."""
    context = agent.windows.context
    rows = {name: value[:, context:] for name, value in batch.items()}
    noise = agent.learning.draw_noise(*rows["rewards"].shape)
    world = agent.world_model.losses(rows, agent.learning.context(agent.learning.stage(batch)), noise.posterior)
    return rows, world, agent.learning.imagine(world.posterior.states.flatten().detach(), noise)
