"""STORM's numbers: the published size and every hyper-parameter, as the authors' code has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from worldloom.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE, Range, check_ranges, require

SIZES: dict[str, dict[str, Any]] = {
    "18m": {"act_on": "prior"},  # published; named after the parameters that are trained, behaviour included
    "tiny": {
        "hidden": 128,
        "heads": 4,
        "stem_channels": 8,
        "stoch": 16,
        "classes": 16,
        "units": 128,
        "batch_size": 8,
        "batch_length": 32,
        "imagination_starts": 128,
        "imagination_length": 10,
        "train_ratio": 256.0,
    },
}

RANGES: dict[str, Range] = {
    **dict.fromkeys(("hidden", "layers", "heads", "max_length", "stem_channels", "stoch", "units"), COUNT),
    **dict.fromkeys(("vector_layers", "agent_layers", "batch_size", "context", "acting_context"), COUNT),
    **dict.fromkeys(("imagination_length", "imagination_starts"), COUNT),
    **dict.fromkeys(("free_nats", "dynamics_scale", "representation_scale", "entropy_scale"), NOT_NEGATIVE),
    **dict.fromkeys(("world_lr", "agent_lr", "world_eps", "agent_eps", "world_clip", "agent_clip"), POSITIVE),
    "train_ratio": POSITIVE,
    **dict.fromkeys(("dropout", "unimix"), SHARE),
    **dict.fromkeys(("discount", "lam"), PROBABILITY),
    **dict.fromkeys(("return_low", "return_high"), Range(0, 1, low_open=True)),
    **dict.fromkeys(("slow_rate", "return_rate", "norm_rate"), Range(0, 1, low_open=True)),
    "classes": Range(2),
    "bins": Range(3),
    "batch_length": Range(2),
}


@dataclass(frozen=True, kw_only=True)
class STORMConfig:
    """The settings of STORM.

    Defaults are those of the paper (Zhang et al., NeurIPS 2023, https://arxiv.org/abs/2310.09615) and its code; the
    fields that say so differ.
    """

    # Networks
    hidden: int = 512  # D, width of the transformer and of its heads
    layers: int = 2  # blocks of the transformer
    heads: int = 8  # of attention in each block
    max_length: int = 64  # positions that the transformer knows
    dropout: float = 0.1  # in the blocks, while the world model learns
    stem_channels: int = 32  # channels of the first image stage; each further one doubles them
    stoch: int = 32  # S, categoricals
    classes: int = 32  # K, of each categorical
    unimix: float = 0.01  # uniform share of every latent categorical
    units: int = 512  # width of policy and critic, and of what reads and predicts vectors
    vector_layers: int = 2  # hidden layers of what reads and predicts vectors (an extension of ours)
    agent_layers: int = 2  # hidden layers of policy and critic
    bins: int = 255  # bins of the two-hot heads, evenly spaced in symlog space
    norm_rate: float = 0.1  # share of the way that batch norms' running statistics move per update

    # World model
    batch_size: int = 16  # B, windows per update
    batch_length: int = 64  # T, trained rows per window
    free_nats: float = 1.0  # a KL whose mean over the batch is below this costs nothing
    dynamics_scale: float = 0.5  # weight of the KL that trains the prior
    representation_scale: float = 0.1  # weight of the KL that trains the posterior
    # Behaviour
    act_on: Literal["prior", "posterior"] = "posterior"  # latent that the policy reads; published: prior
    acting_context: int = 16  # steps that acting remembers
    context: int = 8  # C, steps that an imagined episode remembers of the real one
    imagination_length: int = 16  # H, imagined steps from each start
    imagination_starts: int = 1024  # N, starts per update: equally many of each window, at most all its trained rows
    discount: float = 0.985  # gamma
    lam: float = 0.95  # lambda of the returns
    returns: Literal["paper", "published"] = "paper"  # "published": as the authors' code mixes values into them
    entropy_scale: float = 3e-4  # weight of the entropy bonus in the policy loss
    slow_rate: float = 0.02  # share of the way to the critic that the slow critic moves per update
    return_rate: float = 0.01  # share of the way that the running percentiles move per update
    return_low: float = 0.05  # lower quantile of the return range
    return_high: float = 0.95  # upper quantile of the return range
    # Optimisers (Adam)
    world_lr: float = 1e-4  # learning rate of the world model
    agent_lr: float = 3e-5  # learning rate of policy and critic
    world_clip: float = 1000.0  # limit of the norm of the world model's gradient
    agent_clip: float = 100.0  # limit of the norm of the gradient of policy and critic
    world_eps: float = 1e-8  # added to the root of the squared gradients of the world model
    agent_eps: float = 1e-5  # added to the root of the squared gradients of policy and critic
    train_ratio: float = 1024.0  # replayed steps per environment step

    # What trained weights fit: the shapes of parameters, and what the networks compute with them
    network_fields = (
        "hidden", "layers", "heads", "max_length", "stem_channels", "stoch", "classes", "unimix", "units",
        "vector_layers", "agent_layers", "bins", "act_on",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        require(self, self.hidden % self.heads == 0, "hidden", f"a multiple of heads={self.heads}")
        require(self, self.bins % 2 == 1, "bins", "an odd number")
        require(self, self.return_low < self.return_high, "return_low", f"less than return_high={self.return_high}")
        positions = f"max_length={self.max_length}, the positions that the transformer knows"
        require(self, self.batch_length <= self.max_length, "batch_length", f"at most {positions}")
        require(self, self.acting_context <= self.max_length, "acting_context", f"at most {positions}")
        fits = self.context + self.imagination_length <= self.max_length
        require(self, fits, "imagination_length", f"with context={self.context} at most {positions}")
