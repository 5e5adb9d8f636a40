"""DreamerV3's numbers: the published sizes and every hyper-parameter, as the Nature paper's reference code has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from worldloom.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE, Range, check_ranges, require


def _size(deter: int) -> dict[str, int]:
    """Return one row of the table: hidden = units = deter / 8, classes = depth = hidden / 16."""
    hidden = deter // 8
    return {"deter": deter, "hidden": hidden, "units": hidden, "classes": hidden // 16, "depth": hidden // 16}


SIZES: dict[str, dict[str, int]] = {
    "size1m": _size(512),
    "size12m": _size(2048),
    "size25m": _size(3072),
    "size50m": _size(4096),
    "size100m": _size(6144),
    "size200m": _size(8192),
    "size400m": _size(12288),
}


MOST_ROWS = 128  # of a window, for whose tokens NE-Dreamer has positions

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        ("deter", "hidden", "units", "depth", "stoch", "blocks", "batch_size", "imagination_length"), COUNT
    ),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "reward_layers", "continue_layers"), COUNT),
    **dict.fromkeys(("policy_layers", "value_layers"), COUNT),
    **dict.fromkeys(("ne_layers", "ne_heads", "ne_width"), COUNT),
    **dict.fromkeys(("barlow_scale", "infonce_scale", "ne_scale", "redundancy"), NOT_NEGATIVE),
    **dict.fromkeys(("free_nats", "dynamics_scale", "representation_scale", "entropy_scale"), NOT_NEGATIVE),
    **dict.fromkeys(("replay_value_scale", "warmup"), NOT_NEGATIVE),
    **dict.fromkeys(("lr", "clip", "eps", "train_ratio"), POSITIVE),
    **dict.fromkeys(("unimix", "policy_unimix", "beta1", "beta2"), SHARE),
    **dict.fromkeys(("lam", "return_low", "return_high"), PROBABILITY),
    **dict.fromkeys(("slow_critic_rate", "return_rate"), Range(0, 1, low_open=True)),
    "classes": Range(1, 256),  # replay keeps class indices in a byte
    "bins": Range(3),
    "batch_length": Range(2),
    "discount_horizon": Range(1, low_open=True),
}


@dataclass(frozen=True, kw_only=True)
class DreamerV3Config:
    """The settings of DreamerV3.

    Defaults are those of the Nature 2025 paper (Hafner et al., https://doi.org/10.1038/s41586-025-08744-2).
    """

    # Networks
    deter: int = 2048  # D, deterministic state
    hidden: int = 256  # width inside the RSSM
    units: int = 256  # width of every MLP
    classes: int = 16  # K, of each categorical
    depth: int = 16  # image channels are depth times (2, 3, 4, 4)
    stoch: int = 32  # S, categoricals
    blocks: int = 8  # groups of the block-diagonal GRU
    encoder_layers: int = 3  # hidden layers of the encoder of vectors
    decoder_layers: int = 3  # hidden layers of the decoder of vectors
    reward_layers: int = 1  # hidden layers of the reward head
    continue_layers: int = 1  # hidden layers of the continue head
    policy_layers: int = 3  # hidden layers of the policy
    value_layers: int = 3  # hidden layers of the critic
    bins: int = 255  # bins of the two-hot heads, an odd number
    unimix: float = 0.01  # uniform share of every latent categorical
    policy_unimix: float = 0.01  # uniform share of discrete policies (the reference's code now ignores its own setting)

    # What features learn from: a decoder's errors, or a comparison with the encoder's tokens, without a decoder
    representation: Literal["decoder", "r2dreamer", "infonce", "ne"] = "decoder"  # ne: NE-Dreamer
    barlow_scale: float = 0.05  # weight of the loss of r2dreamer
    infonce_scale: float = 1.0  # weight of the loss of infonce
    ne_scale: float = 1.0  # weight of the loss of ne
    redundancy: float = 5e-4  # lambda of r2dreamer and ne: weight of correlations between different entries
    ne_layers: int = 2  # blocks of the transformer of ne
    ne_heads: int = 4  # heads of its attention
    ne_width: int = 256  # its width

    # World model
    batch_size: int = 16  # B, windows per update
    batch_length: int = 64  # T, trained rows per window
    replay_context: Literal["stored", "zeros"] = "stored"  # where the first state of a window comes from
    free_nats: float = 1.0  # KL below this costs nothing
    dynamics_scale: float = 1.0  # weight of the KL that trains the prior
    representation_scale: float = 0.1  # weight of the KL that trains the posterior
    # Behaviour
    imagination_length: int = 15  # H, imagined steps from each start
    discount_horizon: float = 333.0  # steps: gamma = 1 - 1 / horizon
    lam: float = 0.95  # lambda of the returns
    entropy_scale: float = 3e-4  # weight of the entropy bonus in the policy loss
    replay_value_scale: float = 0.3  # weight of the critic loss on replayed rows
    slow_critic_rate: float = 0.02  # share of the way to the critic that the slow critic moves per update
    return_rate: float = 0.01  # share of the way that the running percentiles move per update
    return_low: float = 0.05  # lower quantile of the return range
    return_high: float = 0.95  # upper quantile of the return range
    # Optimiser (LaProp with adaptive gradient clipping)
    lr: float = 4e-5  # learning rate of LaProp
    warmup: int = 1000  # updates in which the learning rate grows from 0
    clip: float = 0.3  # limit of a tensor's gradient norm, as a share of its own norm
    beta1: float = 0.9  # decay of the momentum
    beta2: float = 0.999  # decay of the mean of squared gradients
    eps: float = 1e-20  # added to the root of the squared gradients
    train_ratio: float = 512.0  # replayed steps per environment step

    # What trained weights fit: the shapes of parameters, and what the networks compute with them
    network_fields = (
        "deter", "hidden", "units", "classes", "depth", "stoch", "blocks", "encoder_layers", "decoder_layers",
        "reward_layers", "continue_layers", "policy_layers", "value_layers", "bins", "unimix", "policy_unimix",
        "representation", "ne_layers", "ne_heads", "ne_width",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        whole, blocks = self.deter % self.blocks == 0, f"a multiple of blocks={self.blocks}"
        require(self, whole, "deter", blocks)
        require(self, 4 * self.depth % self.blocks == 0, "depth", f"such that 4 depth is {blocks}")
        require(self, self.ne_width % self.ne_heads == 0, "ne_width", f"a multiple of ne_heads={self.ne_heads}")
        fits = self.representation != "ne" or self.batch_length <= MOST_ROWS
        require(self, fits, "batch_length", f"at most {MOST_ROWS} with representation='ne'")
        require(self, self.bins % 2 == 1, "bins", "an odd number")
        require(self, self.return_low < self.return_high, "return_low", f"less than return_high={self.return_high}")

    @property
    def discount(self) -> float:
        """gamma = 1 - 1 / discount_horizon."""
        return 1 - 1 / self.discount_horizon
