"""What tree attention moves and computes, counted from the kernels' own loops, and the floors that
follow on a card.

Counts are exact for the kernels; floors are *modelled* from published peaks, never measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from specrepro.kernel_launch import WORD_BITS, Geometry


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one call of tree attention loads, stores and computes, padding included.

    Every load is counted, whether or not a cache on the way holds what an earlier one brought.
    """

    kv_bytes: int  # keys and values loaded, cached and drafted
    scratch_bytes: int  # partial results, written by splits and read by the merge
    other_bytes: int  # queries, outputs, the drafted keys and values stored, ancestor words
    operations: int  # of the two matrix products

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.scratch_bytes + self.other_bytes


def traffic(
    geometry: Geometry, lengths: list[int], nodes: int, query_heads: int, kv_heads: int,
    head_size: int, itemsize: int, *, packs_heads: bool = True,
) -> Traffic:  # fmt: skip
    """Count the loops of the attention kernels for prefixes of `lengths`, program by program.

    Without packed heads (a `geometry` planned for as many key-value heads as query heads) each
    query head reads its keys and values for itself; the drafted ones are still stored once.
    """
    readers = kv_heads if packs_heads else query_heads
    num_rows = nodes * (query_heads // readers)
    vector = head_size * itemsize
    kv_bytes = scratch_bytes = other_bytes = multiplied = 0
    for length in lengths:
        split_size, num_splits = geometry.splits_of(length)
        for split in range(num_splits):
            start = split * split_size
            stop = min(start + split_size, length)
            kv_bytes += geometry.row_blocks * 2 * max(stop - start, 0) * vector
            multiplied += -(-max(stop - start, 0) // geometry.tiles.slots) * geometry.tiles.slots
            other_bytes += num_rows * vector
        kv_bytes += geometry.row_blocks * 2 * nodes * vector
        multiplied += -(-nodes // WORD_BITS) * WORD_BITS
        other_bytes += num_rows * (vector + 4)
        other_bytes += num_rows * 4 * -(-nodes // WORD_BITS)
        if num_splits > 1:
            scratch_bytes += 2 * num_splits * num_rows * 4 * (head_size + 2)
    padded = triton.next_power_of_2(head_size)
    operations = 4 * multiplied * geometry.row_blocks * geometry.tiles.rows * padded
    stored = 2 * len(lengths) * nodes * kv_heads * vector
    return Traffic(
        readers * kv_bytes,
        readers * scratch_bytes,
        readers * other_bytes + stored,
        readers * operations,
    )


def minimum_traffic(
    lengths: list[int], nodes: int, query_heads: int, kv_heads: int, head_size: int, itemsize: int
) -> Traffic:
    """Every key and value once per key-value head, every query and output once, no padding."""
    seen = sum(lengths) + len(lengths) * nodes
    rows = len(lengths) * nodes * query_heads
    vector = head_size * itemsize
    kv_bytes = 2 * seen * kv_heads * vector
    other_bytes = 2 * rows * vector + 2 * len(lengths) * nodes * kv_heads * vector
    pairs = sum((length + nodes) * nodes * query_heads for length in lengths)
    return Traffic(kv_bytes, 0, other_bytes, 4 * pairs * head_size)


def dense_mask_traffic(
    lengths: list[int], nodes: int, query_heads: int, kv_heads: int, head_size: int, itemsize: int,
    *, packs_heads: bool,
) -> Traffic:  # fmt: skip
    """A fused attention that is given the mask of (nodes, slots) and pads a batch to its longest.

    Without packed heads each query head reads its keys, values and mask for itself.
    """
    slots = (max(lengths) + nodes) * len(lengths)
    readers = kv_heads if packs_heads else query_heads
    rows = len(lengths) * nodes * query_heads
    vector = head_size * itemsize
    mask_bytes = (max(lengths) + nodes) * itemsize * rows
    other_bytes = 2 * rows * vector + mask_bytes + 2 * len(lengths) * nodes * kv_heads * vector
    operations = 4 * (max(lengths) + nodes) * rows * head_size
    return Traffic(2 * slots * readers * vector, 0, other_bytes, operations)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's published peaks; what follows from them is modelled, not measured."""

    name: str
    architecture: int
    bytes_per_second: float
    half_operations_per_second: float  # dense, float32 accumulation

    def operations_per_second(self, itemsize: int) -> float:
        """In float32 a product is three in TF32, each at half the rate of half precision."""
        return self.half_operations_per_second / (1 if itemsize == 2 else 6)


CARDS = (
    Card("A100 SXM 80 GB", 80, 2.039e12, 312e12),
    Card("H100 SXM", 90, 3.35e12, 989e12),
    Card("RTX 4090", 89, 1.008e12, 165e12),
)


def floor_seconds(card: Card, moved: Traffic, itemsize: int = 2) -> float:
    """The roofline: no call can be faster than its bytes or its operations, whichever take longer.

    Scratch is left out: it stays in the second-level cache at the sizes of a draft tree.
    """
    from_memory = (moved.kv_bytes + moved.other_bytes) / card.bytes_per_second
    return max(from_memory, moved.operations / card.operations_per_second(itemsize))
