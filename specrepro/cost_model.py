"""What a round would cost on a GPU that is not here: modelled floors, never measured.

A pass reads every weight once and multiplies every token by it, whichever takes longer at the
card's published peaks; attention is the tree kernel's own traffic (`kernel_traffic`), layer by
layer. Launches, synchronisation, norms, the choice of children and the walk are left out, so every
number is a floor, and drafting, which is nearly all launches, is flattered most. Steps in a curve
are those of the attention kernel's tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from specrepro import kernel_launch, kernel_traffic
from specrepro.cost_table import CostTable
from specrepro.kernel_traffic import Card

ITEM_BYTES = 2  # half precision
# the paper's three cards and the H100; published memory rates and dense half-precision peaks
CARDS = {
    "A800": Card("A800 SXM 80 GB", 80, 2.039e12, 312e12),
    "H20": Card("H20", 90, 4.0e12, 148e12),
    "RTX 4090": Card("RTX 4090", 89, 1.008e12, 165e12),
    "H100": Card("H100 SXM", 90, 3.35e12, 989e12),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a target and of the one-layer head that drafts for it."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    draft_vocabulary: int

    def layer_weights(self, input_size: int) -> int:
        """Numbers in a decoder layer whose attention reads `input_size` features."""
        heads = (self.query_heads + 2 * self.kv_heads) * self.head_size
        output = self.query_heads * self.head_size * self.hidden
        return input_size * heads + output + 3 * self.hidden * self.intermediate

    @property
    def target_weights(self) -> int:
        """All that a pass of the target multiplies by."""
        layers = self.num_layers * self.layer_weights(self.hidden)
        return layers + self.hidden * self.vocabulary

    @property
    def head_weights(self) -> int:
        """The same of a level that EAGLE-3's head drafts; its layer reads two features."""
        return self.layer_weights(2 * self.hidden) + self.hidden * self.draft_vocabulary

    def cascade_weights(self, num_layers: int) -> int:
        """The same of the one pass in which FastEagle's cascade drafts all its levels."""
        layers = num_layers * self.layer_weights(self.hidden) + 2 * self.hidden**2
        return layers + self.hidden * self.draft_vocabulary


LLAMA_3_1_8B = Sizes("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 32000)


def pass_seconds(
    card: Card,
    sizes: Sizes,
    weights: int,
    num_layers: int,
    batch: int,
    context: int,
    num_tokens: int,
) -> float:
    """Floor of one pass of `num_tokens` tokens of each sequence behind `context` of them."""
    from_memory = ITEM_BYTES * weights / card.bytes_per_second
    operations = 2 * weights * batch * num_tokens
    products = max(from_memory, operations / card.half_operations_per_second)
    heads = sizes.query_heads, sizes.kv_heads, sizes.head_size
    geometry = kernel_launch.plan(
        batch, num_tokens, *heads, context + num_tokens, ITEM_BYTES, card.architecture
    )
    moved = kernel_traffic.traffic(geometry, [context], num_tokens, *heads, ITEM_BYTES)
    return products + num_layers * batch * kernel_traffic.floor_seconds(card, moved)


def table(
    card: str,
    sizes: Sizes = LLAMA_3_1_8B,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32),
    bucket: int = 256,
    num_buckets: int = 4,
    largest: int = 129,
    widest: int = 10,
    cascade: int = 0,
) -> CostTable:
    """A modelled cost table of every size up to the `largest` tree and the `widest` level.

    Drafting is that of EAGLE-3's head, or, at the start of a round and in it all, that of a
    `cascade` of so many layers.
    """
    if card not in CARDS:
        raise ValueError(f"unknown card {card!r}; choose one of {', '.join(CARDS)}")
    points = [
        {"part": part, "batch": batch, "context": k * bucket, "num_tokens": n, "value": value}
        for batch in batches
        for k in range(1, num_buckets + 1)
        for part, most in (("target", largest), ("level", widest), ("extend", widest))
        for n in range(1, most + 1)
        for own in [_of_part(sizes, part, cascade)]
        for value in [1e3 * pass_seconds(CARDS[card], sizes, *own, batch, k * bucket, n)]
    ]
    points += [
        {"part": "rest", "batch": b, "context": bucket, "num_tokens": 1, "value": 0.0}
        for b in batches
    ]
    header = {"modelled": True, "device": CARDS[card].name, "target": sizes.name}
    return CostTable(header | {"dtype": "bfloat16"}, pd.DataFrame(points))


def _of_part(sizes: Sizes, part: str, cascade: int) -> tuple[int, int]:
    """Weights that are read for a part of a round, and layers that attend."""
    if part == "target":
        return sizes.target_weights, sizes.num_layers
    if part == "extend" and cascade:
        return sizes.cascade_weights(cascade), cascade
    return sizes.head_weights, 1
