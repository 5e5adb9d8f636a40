"""Losses for DreamerV3's features where there is no decoder: they compare with the encoder's tokens, without gradient.

R2-Dreamer (Morihira et al. 2026, ICLR) makes a projection of the features agree with the tokens of their own row, entry
by entry; its InfoNCE variant tells these tokens from those of all other rows. NE-Dreamer (Bredis et al. 2026) predicts
the tokens of the next row with a transformer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom import products
from worldloom.dreamerv3.config import MOST_ROWS, DreamerV3Config
from worldloom.dreamerv3.layers import Linear, init_kernel
from worldloom.gang import ALONE, Gang
from worldloom.nets import float32_products


@dataclass(frozen=True)
class Rows:
    """Filtered rows, time-first: what a representation is learned from."""

    features: Tensor  # [T, B, D + S K], of the posterior
    actions: Tensor  # [T, B, A], that led to each row
    is_first: Tensor  # [T, B] bool
    tokens: Tensor  # [T, B, E], of the encoder


class Projection(products.Linear):
    """A linear map without bias, [..., inputs] to [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        init_kernel(self.weight, inputs)


class Representation(nn.Module, ABC):
    """The loss of features [T, B, features] beside tokens [T, B, tokens], without a decoder."""

    def __init__(self, features: int, tokens: int, scale: float) -> None:
        super().__init__()
        self.projection, self.scale = Projection(features, tokens), scale

    def forward(self, rows: Rows, gang: Gang = ALONE) -> Tensor:
        """Return the loss, a scalar, unscaled. It compares the rows of all learners of the gang."""
        predicted = self.predict(rows.features, rows.actions, rows.is_first).float().flatten(0, 1)
        tokens, counted = self.targets(rows)
        with float32_products(predicted.device):
            return self.loss(predicted, tokens.detach().float().flatten(0, 1), counted, gang)

    def predict(self, features: Tensor, actions: Tensor, is_first: Tensor) -> Tensor:  # noqa: ARG002
        """Return what the features say of the tokens; [T, B, E]."""
        projected: Tensor = self.projection(features)
        return projected

    def targets(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Return the tokens that `predict` is about, and which of its rows count: [N, 1] of 0 and 1, None for all."""
        return rows.tokens, None

    @abstractmethod
    def loss(self, predicted: Tensor, tokens: Tensor, counted: Tensor | None, gang: Gang) -> Tensor:
        """Return the loss of predicted [N, E] beside tokens [N, E] without gradient, both of this learner's rows."""


class RedundancyReduction(Representation):
    """R2-Dreamer. redundancy: the weight of correlations between different entries, lambda."""

    def __init__(self, features: int, tokens: int, scale: float, redundancy: float) -> None:
        super().__init__(features, tokens, scale)
        self.redundancy = redundancy

    def loss(self, predicted: Tensor, tokens: Tensor, counted: Tensor | None, gang: Gang) -> Tensor:
        whole = None if counted is None else gang.whole(counted)
        return self.compare(gang.whole(predicted), gang.whole(tokens), whole)

    def compare(self, predicted: Tensor, tokens: Tensor, counted: Tensor | None) -> Tensor:
        """Return the loss of the rows of all learners, [N, E] each."""
        return fn.redundancy_reduction(predicted, tokens, self.redundancy, counted)


class Contrast(Representation):
    """The InfoNCE variant of R2-Dreamer's authors: products of projection and tokens are logits, without temperature.

    A row's negatives are the tokens of all other rows of the whole batch.
    """

    def loss(self, predicted: Tensor, tokens: Tensor, counted: Tensor | None, gang: Gang) -> Tensor:  # noqa: ARG002
        return self.compare(predicted, tokens, gang.whole(tokens))

    def compare(self, predicted: Tensor, own: Tensor, tokens: Tensor) -> Tensor:
        """Return the mean loss of a learner's rows [N, E] with their own tokens [N, E], among those of all learners
        [size N, E]."""
        return ((predicted @ tokens.mT).logsumexp(-1) - (predicted * own).sum(-1)).mean()


class NextEmbedding(RedundancyReduction):
    """NE-Dreamer: a causal transformer over (features, action) of each row predicts the tokens of the next row.

    Rows at which an episode starts are not predicted. Attention stays within an episode, whose positions count from its
    first row in the window: the authors' windows never hold two episodes. An action is the one that led to its row, as
    the authors' code gives it. choices: whether an action is one choice, which is embedded without norm.
    """

    def __init__(self, features: int, tokens: int, action_dim: int, choices: bool, config: DreamerV3Config) -> None:
        c, width = config, config.ne_width
        super().__init__(features, tokens, c.ne_scale, c.redundancy)
        self.feature_in = Linear(tokens, width)
        self.action_in: nn.Module
        if choices:
            self.action_in = products.Linear(action_dim, width, bias=False)
            nn.init.normal_(self.action_in.weight)
        else:
            self.action_in = nn.Sequential(Linear(action_dim, width), nn.LayerNorm(width), nn.GELU())
        self.positions = nn.Parameter(0.02 * torch.randn(2 * MOST_ROWS, width))
        self.blocks = nn.ModuleList([Block(width, c.ne_heads) for _ in range(c.ne_layers)])
        self.output = nn.Sequential(nn.LayerNorm(width), Linear(width, width), nn.GELU(), Linear(width, tokens))

    def predict(self, features: Tensor, actions: Tensor, is_first: Tensor) -> Tensor:
        """Return tokens [T - 1, B, E] of rows 1 to T - 1, each from the rows of its episode before it.

        Raises ValueError for more than 128 rows.
        """
        if len(features) > MOST_ROWS:
            raise ValueError(
                f"representation 'ne' reads windows of at most {MOST_ROWS} rows, not {len(features)}. Cut them."
            )
        seen = features[:-1].transpose(0, 1)
        first = is_first[:-1].T
        action = (actions[:-1] * (~is_first[:-1]).unsqueeze(-1)).transpose(0, 1)
        pairs = torch.stack([self.feature_in(self.projection(seen)), self.action_in(action)], 2)  # [B, T - 1, 2, W]
        position, allowed = self._places(first)
        x = (pairs + F.embedding(position, self.positions)).flatten(1, 2)
        for block in self.blocks:
            x = block(x, allowed)
        predicted: Tensor = self.output(x[:, 1::2])  # at the actions
        return predicted.transpose(0, 1)

    def _places(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions of features and actions [B, T, 2], and what each may see, bools [B, 1, 2 T, 2 T].

        first: [B, T], whether a row starts an episode.
        """
        place = torch.arange(first.shape[1], device=first.device)
        start = (place * first).cummax(1).values
        position = 2 * (place - start).unsqueeze(-1) + torch.arange(2, device=first.device)
        episode = first.long().cumsum(1).repeat_interleave(2, 1)
        order = torch.arange(episode.shape[1], device=first.device)
        allowed = (episode.unsqueeze(2) == episode.unsqueeze(1)) & (order[:, None] >= order)
        return position, allowed.unsqueeze(1)

    def targets(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        return rows.tokens[1:], (~rows.is_first[1:]).float().view(-1, 1)


class Block(nn.Module):
    """Attention, then two linear layers with GELU; each reads a layer norm of x and adds to x: [B, T, W] to same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.read_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.mix = products.Linear(width, 3 * width), Linear(width, width)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.widen, self.narrow = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Return x after the block. allowed: bools [B, 1, T, T], True where a row may see another."""
        q, k, v = self.project(self.read_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT).float() / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        x = x + self.mix((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        fed: Tensor = self.narrow(F.gelu(self.widen(self.feed_norm(x))))
        return x + fed


def make_representation(
    config: DreamerV3Config, features: int, tokens: int, action_dim: int, action_classes: Sequence[int]
) -> Representation | None:
    """Return what `config.representation` names; None for "decoder"."""
    match config.representation:
        case "r2dreamer":
            return RedundancyReduction(features, tokens, config.barlow_scale, config.redundancy)
        case "infonce":
            return Contrast(features, tokens, config.infonce_scale)
        case "ne":
            return NextEmbedding(features, tokens, action_dim, len(action_classes) == 1, config)
    return None
