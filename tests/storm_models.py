"""Small STORM agents, their batches, and the authors' parity fixture, that the tests share."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from worldloom.storm import STORMAgent, STORMConfig, STORMWorldModel

TINY = {
    "hidden": 32, "heads": 4, "max_length": 16, "stem_channels": 2, "stoch": 4, "classes": 4, "units": 16, "bins": 255,
    "batch_size": 4, "batch_length": 6, "context": 3, "acting_context": 5, "imagination_length": 4,
    "imagination_starts": 10,
}  # fmt: skip


def tiny_agent(obs_shape=(3,), action_dim=2, classes=(), **overrides):
    torch.manual_seed(0)
    model = STORMWorldModel(obs_shape, action_dim, STORMConfig(**{**TINY, **overrides}))
    return STORMAgent(model, seed=0, action_classes=classes)


def batch_of(agent, seed=1, rows=None):
    torch.manual_seed(seed)
    model, batch, length = agent.world_model, agent.batch_size, rows or agent.windows.length

    def observation(shape):
        if len(shape) == 3:
            return torch.randint(0, 256, (batch, length, *shape), dtype=torch.uint8)
        return torch.randn(batch, length, *shape)

    shape = model.obs_shape
    actions = torch.rand(batch, length, model.action_dim) * 2 - 1
    if agent.action_classes:
        parts = actions.split(agent.action_classes, -1)
        actions = torch.cat([F.one_hot(part.argmax(-1), part.shape[-1]).float() for part in parts], -1)
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[1, 3], first[2, 0], first[3, -1] = True, True, True
    actions[first] = 0
    return {
        "obs": {k: observation(s) for k, s in shape.items()} if isinstance(shape, dict) else observation(shape),
        "actions": actions,
        "rewards": torch.randn(batch, length) * ~first,
        "is_first": first,
        "terminated": torch.zeros(batch, length, dtype=torch.bool),
        "truncated": torch.zeros(batch, length, dtype=torch.bool),
    }


# The parity fixture: one update of the world model by the authors' code, from perturbed parameters, in float32

FIXTURE = Path(__file__).parent / "data" / "storm_world_update.npz"
FIXTURE_CONFIG = STORMConfig(
    hidden=32, heads=4, max_length=16, stem_channels=4, stoch=8, classes=8, units=24, batch_size=4, batch_length=8,
    acting_context=4, context=4, imagination_length=5, dropout=0.0,
)  # fmt: skip


def our_name(name):
    """Return the name of one of their parameters in our model."""
    stage, rest = {"0": "convs.0", "3": "convs.1", "6": "convs.2", "9": "convs.3"}, name.split(".")
    norms = {"1": "norms.0", "4": "norms.1", "7": "norms.2", "10": "norms.3"}
    if name.startswith("encoder.backbone."):
        return f"encoder.image.{(stage | norms)[rest[2]]}.{rest[3]}"
    if name.startswith("image_decoder.backbone."):
        layers = {"0": "input", "2": "norms.0", "4": "convs.0", "5": "norms.1", "7": "convs.1", "8": "norms.2"}
        layers |= {"10": "convs.2", "11": "norms.3", "13": "output"}
        return f"decoder.image.{layers[rest[2]]}.{rest[3]}"
    for theirs, ours in [
        ("storm_transformer.stem", "stem"),
        ("storm_transformer.position_encoding.pos_emb", "transformer.positions"),
        ("storm_transformer.layer_norm", "transformer.norm"),
        ("storm_transformer.layer_stack", "transformer.blocks"),
        ("slf_attn.w_qs", "query"), ("slf_attn.w_ks", "key"), ("slf_attn.w_vs", "value"), ("slf_attn.fc", "mix"),
        ("slf_attn.layer_norm", "mix_norm"), ("pos_ffn.layer_norm", "feed_norm"), ("pos_ffn.w_1", "widen"),
        ("pos_ffn.w_2", "narrow"), ("dist_head.post_head", "posterior"), ("dist_head.prior_head", "prior"),
        ("reward_decoder.backbone", "reward"), ("reward_decoder.head", "reward.6"),
        ("termination_decoder.backbone", "termination"), ("termination_decoder.head.0", "termination.6"),
    ]:  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def fixture():
    """Return their arrays by name, and our model with their parameters."""
    with np.load(FIXTURE) as loaded:
        arrays = {name: torch.from_numpy(loaded[name]) for name in loaded}
    model = STORMWorldModel((3, 64, 64), 6, FIXTURE_CONFIG)
    names = [name for name in arrays if name.startswith("world/") and not name.endswith("num_batches_tracked")]
    model.load_state_dict({our_name(name.removeprefix("world/")): arrays[name] for name in names})
    return arrays, model


def fixture_batch(arrays):
    """Their batch as our rows, which arrive: a row more, whose observation nobody reads."""
    actions = F.pad(F.one_hot(arrays["action"].long(), 6).float(), (0, 0, 1, 0))
    return {
        "obs": torch.cat([arrays["obs"], torch.full_like(arrays["obs"][:, :1], 255)], 1),
        "actions": actions,
        "rewards": F.pad(arrays["reward"], (1, 0)),
        "terminated": F.pad(arrays["termination"], (1, 0)).bool(),
    }
