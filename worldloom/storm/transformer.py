"""STORM's transformer: post-norm blocks with learned positions (Zhang et al. 2023, "World model learning").

It turns tokens up to row t into h_t. A window of replay may hold rows of several episodes; attention and positions stay
within each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from worldloom import functional as fn
from worldloom.gang import Gang
from worldloom.products import Linear

NORM_EPS = 1e-6
HIDDEN = -1e9  # score of what must not be seen; finite, so that a row that sees nothing has no NaN


@dataclass(frozen=True)
class Dropped:
    """Says where dropout leaves out entries of one block: bools, True where it does; None leaves out none."""

    weights: Tensor | None = None  # [B, heads, T, T], of attention
    mixed: Tensor | None = None  # [B, T, D], of attention's output
    fed: Tensor | None = None  # [B, T, D], of the feed-forward layers' output

    def share(self, gang: Gang) -> Dropped:
        """Return a learner's part of it."""
        return Dropped(*(None if x is None else gang.share(x, 0) for x in (self.weights, self.mixed, self.fed)))


NOTHING = Dropped()


def drop(x: Tensor, dropped: Tensor | None, rate: float) -> Tensor:
    """Return x with the dropped entries at zero and the others divided by 1 - rate."""
    return x if dropped is None else x.masked_fill(dropped, 0.0) / (1 - rate)


class Block(nn.Module):
    """Multi-head attention, then two linear layers; each adds to its input before a layer norm."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mix = (Linear(width, width, bias=False) for _ in range(4))
        self.mix_norm, self.feed_norm = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.widen, self.narrow = Linear(width, 2 * width), Linear(2 * width, width)
        self.heads, self.rate = heads, rate

    def forward(self, x: Tensor, allowed: Tensor, dropped: Dropped = NOTHING) -> Tensor:
        """Map x [B, T, D] to [B, T, D]. allowed: bools [..., T, T], True where a row may see another."""
        return self.finish(x, self.attend(*self.project(x), allowed, dropped), dropped)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [B, heads, T, D / heads] each, of x [B, T, D]."""
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, dropped: Dropped = NOTHING) -> Tensor:
        """Return what each query [B, heads, Q, D / heads] reads from keys and values [B, heads, T, D / heads].

        allowed: [..., Q, T]. Returns [B, Q, D], the heads side by side.
        """
        scores = (q / q.shape[-1] ** 0.5) @ k.mT
        weights = drop(scores.float().masked_fill(~allowed, HIDDEN).softmax(-1), dropped.weights, self.rate)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def finish(self, x: Tensor, read: Tensor, dropped: Dropped = NOTHING) -> Tensor:
        """Return the block's output [B, T, D], from its input x and what attention read, [B, T, D] each."""
        x = self.mix_norm(drop(self.mix(read), dropped.mixed, self.rate) + x)
        fed = self.narrow(F.relu(self.widen(x)))
        out: Tensor = self.feed_norm(drop(fed, dropped.fed, self.rate) + x)
        return out


class Transformer(nn.Module):
    """Tokens plus learned positions, a layer norm, and blocks: [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, layers: int, heads: int, length: int, rate: float) -> None:
        super().__init__()
        self.positions = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.blocks = nn.ModuleList([Block(width, heads, rate) for _ in range(layers)])
        self.heads, self.rate = heads, rate

    def forward(self, tokens: Tensor, positions: Tensor, allowed: Tensor, dropped: Sequence[Dropped] = ()) -> Tensor:
        """Return h [B, T, D] of tokens [B, T, D] at `positions`, integers [B, T] or [T].

        allowed: bools [..., T, T], True where a row may see another. dropped: one for each block, or none.
        """
        x = self.embed(tokens, positions)
        for block, left_out in zip(self.blocks, dropped or [NOTHING] * len(self.blocks), strict=True):
            x = block(x, allowed, left_out)
        return x

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the first block's input [B, T, D]."""
        out: Tensor = self.norm(tokens + self.positions(positions))
        return out

    def last(self, memory: Tensor, filled: Tensor) -> Tensor:
        """Return h [B, D] of the last of `filled` [B] tokens, which lie at the left of memory [B, M, D]."""
        place = torch.arange(memory.shape[1], device=memory.device)
        h: Tensor = self(memory, place, place[:, None] >= place)  # what lies behind the last is seen by none of them
        return h.gather(1, (filled - 1).view(-1, 1, 1).expand(-1, 1, h.shape[-1])).squeeze(1)

    def draw_dropped(self, batch: int, steps: int, generator: Generator | None = None) -> list[Dropped]:
        """Draw dropout for tokens [B, T, D], one entry for each block; none if the rate is 0."""
        if not self.rate:
            return []
        width, device = self.positions.embedding_dim, self.positions.weight.device
        shapes = [(batch, self.heads, steps, steps), (batch, steps, width), (batch, steps, width)]
        return [Dropped(*(fn.random_mask(s, self.rate, generator, device) for s in shapes)) for _ in self.blocks]


def remember(memory: Tensor, filled: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Append a token [B, D] to the `filled` [B] ones in memory [B, M, D]; a full memory loses its oldest.

    Returns the new memory and counts.
    """
    size = memory.shape[1]
    place = fn.one_hot(filled.clamp(max=size - 1), size).unsqueeze(-1)
    moved = torch.where((filled == size).view(-1, 1, 1), memory.roll(-1, 1), memory)
    return torch.where(place, token.unsqueeze(1), moved), (filled + 1).clamp(max=size)


def segments(first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where episodes lie in windows whose rows start one where first [B, T] is True.

    Returns the number of each row's episode in its window [B, T], the position in it [B, T], and which rows a row may
    see, bools [B, 1, T, T]: itself and earlier ones of its episode.
    """
    place = torch.arange(first.shape[1], device=first.device)
    number = first.long().cumsum(1)
    start = (place * first).cummax(1).values
    same = number.unsqueeze(2) == number.unsqueeze(1)
    return number, place - start, (same & (place[:, None] >= place)).unsqueeze(1)


def contexts(tokens: Tensor, number: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the last tokens [N, length, D] of each start's own episode, the start's token included.

    tokens: [B, T, D]; number: [B, T], of episodes, as `segments` gives it; starts: [N] indices into B T rows. Where an
    episode has fewer tokens, these lie at the right; the places at the left that hold none are counted, [N] int64.
    """
    steps = tokens.shape[1]
    row, place = starts // steps, starts % steps
    places = place[:, None] + torch.arange(1 - length, 1, device=tokens.device)  # [N, C]
    chosen = places.clamp(min=0) + (row * steps)[:, None]
    numbers = number.flatten()
    own = (places >= 0) & (numbers[chosen] == numbers[starts][:, None])
    return tokens.flatten(0, 1)[chosen], length - own.sum(1)


class Cache:
    """The transformer over N growing sequences: keys and values of each block are kept, one step is added at a time.

    tokens [N, C, D] are seen first, all but the first `padding` [N] of each sequence; `hidden` [N, D] is the newest h.
    Room for `steps` more is made at once, and written in place. Without gradient and dropout.
    """

    def __init__(self, transformer: Transformer, tokens: Tensor, padding: Tensor, steps: int) -> None:
        self._transformer, self._used = transformer, tokens.shape[1]
        place = torch.arange(self._used + steps, device=tokens.device)
        self._position = (place - padding[:, None]).clamp(min=0)  # [N, C + steps]
        self._real = (place >= padding[:, None])[:, None, None]  # [N, 1, 1, C + steps]
        seen = place[: self._used]
        allowed = (seen[:, None] >= seen) & self._real[..., : self._used]
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        x = transformer.embed(tokens, self._position[:, : self._used])
        for block in self._blocks():
            q, k, v = block.project(x)
            room = k.new_zeros(*k.shape[:2], steps, k.shape[-1])
            self._keys.append(torch.cat([k, room], 2))
            self._values.append(torch.cat([v, room], 2))
            x = block.finish(x, block.attend(q, k, v, allowed))
        self.hidden: Tensor = x[:, -1]

    def _blocks(self) -> list[Block]:
        return [block for block in self._transformer.blocks if isinstance(block, Block)]

    def append(self, token: Tensor) -> Tensor:
        """Add a token [N, D]; return h [N, D] after it."""
        slot, end = self._used, self._used + 1
        x = self._transformer.embed(token.unsqueeze(1), self._position[:, slot:end])
        for block, keys, values in zip(self._blocks(), self._keys, self._values, strict=True):
            q, k, v = block.project(x)
            keys[:, :, slot:end], values[:, :, slot:end] = k, v
            x = block.finish(x, block.attend(q, keys[:, :, :end], values[:, :, :end], self._real[..., :end]))
        self._used, self.hidden = end, x[:, 0]
        return self.hidden
