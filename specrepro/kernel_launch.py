"""How the kernels of tree verification are cut and launched: tiles, splits, grids.

In deterministic mode the splits follow from a row's prefix length alone and the tiles hold at least
64 rows, so that every row is reduced in the same order whatever else is in its tree.

The launchers take plain tensors, check nothing that has to be read back from the device, and launch
grids that depend on shapes only: they can be captured in a CUDA graph. What they are given is
checked by `tree_verify`, the door to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from specrepro import tree_kernel

WORD_BITS = 32  # ancestor bits in a word, and tree keys in a block
FIXED_SPLIT = 256  # slots of a split in deterministic mode, times a whole number for long prefixes
MAX_FIXED_SPLITS = 16  # bounds the partial results, which would outweigh the cache itself
MERGE_ROWS = 16
VOCABULARY_WARPS = 8  # of the walks that read the vocabulary
COUPLED_TILE = 4096  # tokens that the walk of a coupled draw loads at once
RESIDUAL_TILE = 1024  # and the walk by rejection, in float64
TIGHT = (86, 89, 120)  # architectures with 99 KiB of shared memory for a program


@dataclass(frozen=True, slots=True)
class Tiles:
    """How an attention program is cut: `rows` query rows against `slots` cached keys at a time."""

    rows: int
    slots: int
    warps: int
    stages: int


def choose_tiles(
    num_rows: int,
    head_size: int,
    itemsize: int,
    architecture: int | str = 90,
    deterministic: bool = True,
    is_plain: bool = True,
    group: int = 1,
) -> Tiles:
    """The widest tile that spills no registers on sm_90, and next to none elsewhere, no wider than
    the rows need.

    `architecture` is a CUDA capability as in sm_90, or an AMD name as in gfx942. A deterministic
    tile has at least 64 rows: from there on a wider one has more warps doing the same to their own
    rows. Float32, head size 256 and AMD have one tile for every number of rows. The widest takes
    what registers there are: it leaves none for a window, a soft-cap (`is_plain` false), padding up
    to head size 128, or rows divided by a `group` of heads that is no power of two.
    """
    if isinstance(architecture, str):
        rows = 16 if itemsize == 4 else 32 if head_size > 128 else 64
        return Tiles(rows, 32, warps=4, stages=1)
    if itemsize == 4:
        is_tight = head_size > 128 and architecture in TIGHT  # where two stages do not fit
        return Tiles(16, 32, warps=8, stages=1 if is_tight else 2)
    if head_size > 128:
        return Tiles(64, 32, warps=8, stages=2)
    is_hopper = 90 <= architecture < 100
    is_shift = group & (group - 1) == 0
    has_room = head_size == 64 or (head_size == 128 and is_plain and is_shift)
    narrowest, widest = 64 if deterministic else 16, 256 if is_hopper and has_room else 128
    rows = min(max(triton.next_power_of_2(num_rows), narrowest), widest)
    if is_hopper and head_size > 64 and rows == 128:
        # two groups of four warps race for the pipelined keys of wide heads: on an H100, under
        # Triton 3.6, some of their rows were wrong, and others each time; one group's never were
        rows = 64
    return Tiles(rows, 64 if is_hopper else 32, warps=max(rows // 16, 4), stages=2)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A launch of the attention kernel: a function of shapes and the device, never of lengths."""

    tiles: Tiles
    row_blocks: int
    num_splits: int  # of the grid; a row whose prefix needs fewer leaves the others idle
    min_split: int  # slots
    max_splits: int

    def splits_of(self, length: int) -> tuple[int, int]:
        """Slots of a split and number of splits of a prefix, as in `_splits_of`."""
        split_size = self.min_split * max(-(-length // (self.min_split * self.max_splits)), 1)
        return split_size, max(-(-length // split_size), 1)


def plan(
    sequences: int, nodes: int, query_heads: int, kv_heads: int, head_size: int, capacity: int,
    itemsize: int, architecture: int | str = 90, deterministic: bool = True, num_cores: int = 132,
    is_plain: bool = True,
) -> Geometry:  # fmt: skip
    """Tiles and splits of a launch; outside deterministic mode the splits fill the device."""
    group = query_heads // kv_heads
    num_rows = nodes * group
    tiles = choose_tiles(
        num_rows, head_size, itemsize, architecture, deterministic, is_plain, group
    )
    row_blocks = -(-num_rows // tiles.rows)
    min_split, max_splits = FIXED_SPLIT, MAX_FIXED_SPLITS
    if not deterministic:
        min_split = 2 * tiles.slots
        max_splits = max(2 * num_cores // (sequences * kv_heads * row_blocks), 1)
    num_splits = min(max_splits, max(-(-capacity // min_split), 1))
    return Geometry(tiles, row_blocks, num_splits, min_split, max_splits)


def attend(
    q: Tensor,  # (B, N, Hq, D)
    k: Tensor,  # (B, N, Hkv, D)
    v: Tensor,  # (B, N, Hkv, D)
    k_cache: Tensor,  # (B, S, Hkv, D), or pages (num_pages, page_size, Hkv, D)
    v_cache: Tensor,
    cache_lengths: Tensor,  # (B,)
    num_nodes: Tensor,  # (B,)
    words: Tensor,  # (B, N, ceil(N / 32)) uint32 ancestor bits
    depths: Tensor,  # (B, N) int32
    block_table: Tensor | None,  # (B, pages of a sequence) int32
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Launch attention and merge: (B, N, Hq, D), and the log-sum-exp (B, N, Hq) in float32."""
    B, N, Hq, D = q.shape
    Hkv = k.shape[2]
    page_size = k_cache.shape[1]
    num_pages = 1 if block_table is None else block_table.shape[1]
    capacity = page_size * num_pages
    architecture, num_cores = device_of(q)
    geometry = plan(
        B, N, Hq, Hkv, D, capacity, q.element_size(), architecture, deterministic, num_cores,
        is_plain=window is None and softcap is None,
    )  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cache_lengths, num_nodes = cache_lengths.contiguous(), num_nodes.contiguous()
    block_table = None if block_table is None else block_table.contiguous()
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1, (
        "the last dimension of the cache must be dense"
    )
    out = q.new_empty(B, N, Hq, D)
    lse = q.new_empty(B, N, Hq, dtype=torch.float32)
    partial = q.new_empty(B * Hkv, geometry.num_splits, N * (Hq // Hkv), D, dtype=torch.float32)
    best, total = (q.new_empty(partial.shape[:-1], dtype=torch.float32) for _ in range(2))
    shape = {"HKV": Hkv, "G": Hq // Hkv, "D": D, "BLOCK_D": triton.next_power_of_2(D)}
    split = {"min_split": geometry.min_split, "max_splits": geometry.max_splits}
    tree_kernel.tree_attention_kernel[B * Hkv, geometry.row_blocks, geometry.num_splits](
        q, k, v, k_cache, v_cache, cache_lengths if block_table is None else block_table,
        cache_lengths, num_nodes, words, depths, out, lse, partial, best, total,
        N=N, capacity=capacity, page_size=page_size, num_pages=num_pages, **split,
        scale=scale * tree_kernel.LOG2_E.value if softcap is None else scale / softcap,
        cap=1.0 if softcap is None else softcap * tree_kernel.LOG2_E.value, window=window or 0,
        **_strides("q", q, "sequence node head"), **_strides("k", k, "sequence node head"),
        **_strides("v", v, "sequence node head"),
        **_strides("k", k_cache, "page slot cache_head"),
        **_strides("v", v_cache, "page slot cache_head"),
        **shape, BLOCK_M=geometry.tiles.rows, BLOCK_S=geometry.tiles.slots, BLOCK_T=WORD_BITS,
        PAGED=block_table is not None, HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None, PRECISION=dot_precision(q.dtype, architecture),
        num_warps=geometry.tiles.warps, num_stages=geometry.tiles.stages,
    )  # fmt: skip
    if geometry.num_splits > 1:
        tree_kernel.merge_splits_kernel[B * Hkv, triton.cdiv(N * (Hq // Hkv), MERGE_ROWS)](
            partial, best, total, cache_lengths, out, lse, N=N, capacity=capacity,
            num_grid_splits=geometry.num_splits, **split, **shape, BLOCK_R=MERGE_ROWS,
        )  # fmt: skip
    return out, lse


def _strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"{name}_{axis}": tensor.stride(place) for place, axis in enumerate(axes.split())}


def is_interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1, and so run on a CPU."""
    return not isinstance(tree_kernel.tree_attention_kernel, triton.JITFunction)


def device_of(tensor: Tensor) -> tuple[int | str, int]:
    """Architecture and number of multiprocessors; the interpreter plays a Hopper card."""
    if tensor.device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def dot_precision(dtype: torch.dtype, architecture: int | str) -> str:
    """Float32 products keep float32's precision; half-precision ones ignore the setting."""
    return "tf32x3" if dtype == torch.float32 and isinstance(architecture, int) else "ieee"


@dataclass(slots=True)
class Walk:
    """What a walk writes; `path` and `emitted` are (B, N), padded with -1."""

    path: Tensor
    emitted: Tensor
    accepted: Tensor  # (B,)
    bonus: Tensor  # (B,)

    @classmethod
    def empty(cls, tokens: Tensor) -> Walk:
        path, emitted = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
        return cls(path, emitted, *(tokens.new_empty(len(tokens)) for _ in range(2)))


def walk_greedily(tokens: Tensor, parents: Tensor, choice: Tensor) -> Walk:
    """Follow `choice` (B, N) down trees (B, N)."""
    B, N = tokens.shape
    walk = Walk.empty(tokens)
    tree_kernel.greedy_walk_kernel[B,](
        tokens, parents, choice, walk.path, walk.emitted, walk.accepted, walk.bonus, N=N,
        BLOCK_N=triton.next_power_of_2(N),
    )  # fmt: skip
    return walk


def walk_coupled(
    tokens: Tensor, parents: Tensor, target_probs: Tensor, race_times: Tensor, grid: tuple[int, int]
) -> Walk:
    """Race by `target_probs` (B, N, V) and `race_times` (B, N, R + C) on the way down (B, N)."""
    B, N, V = target_probs.shape
    walk, (R, C) = Walk.empty(tokens), grid
    tree_kernel.coupled_walk_kernel[B,](
        tokens, parents, target_probs, race_times, walk.path, walk.emitted, walk.accepted,
        walk.bonus, N=N, V=V, R=R, C=C, BLOCK_N=triton.next_power_of_2(N),
        ROWS=race_tile_rows(R, C), num_warps=VOCABULARY_WARPS,
    )  # fmt: skip
    return walk


def race_tile_rows(R: int, C: int) -> int:
    """Rows of an (R, C) grid that a race loads at once: COUPLED_TILE tokens, or one wider row."""
    return max(1, min(COUPLED_TILE // C, triton.next_power_of_2(R)))


def walk_by_rejection(
    tokens: Tensor, parents: Tensor, target_probs: Tensor, draft_probs: Tensor | None,
    uniforms: Tensor, final_uniforms: Tensor, is_replaced: bool,
) -> Walk:  # fmt: skip
    """Try the children of trees (B, N) in turn; without `draft_probs` they were not drawn."""
    B, N, V = target_probs.shape
    walk = Walk.empty(tokens)
    tree_kernel.residual_walk_kernel[B,](
        tokens, parents, target_probs, target_probs if draft_probs is None else draft_probs,
        uniforms, final_uniforms, walk.path, walk.emitted, walk.accepted, walk.bonus, N=N, V=V,
        SAMPLED=draft_probs is not None, REPLACED=is_replaced, BLOCK_N=triton.next_power_of_2(N),
        BLOCK_V=min(triton.next_power_of_2(V), RESIDUAL_TILE), num_warps=VOCABULARY_WARPS,
    )  # fmt: skip
    return walk


def keep(
    cache: Tensor,  # (layers, B, S, Hkv, D) or (layers, num_pages, page_size, Hkv, D)
    path: Tensor,  # (B, P)
    accepted: Tensor,  # (B,)
    cache_lengths: Tensor,  # (B,)
    block_table: Tensor | None,
) -> None:
    """Move the slots of each accepted path behind its prefix, in place."""
    layers, _, page_size, Hkv, D = cache.shape
    B, P = path.shape
    num_pages = 1 if block_table is None else block_table.shape[1]
    assert cache.stride(-1) == 1, "the last dimension of the cache must be dense"
    accepted, cache_lengths = accepted.contiguous(), cache_lengths.contiguous()
    block_table = None if block_table is None else block_table.contiguous()
    block = min(triton.next_power_of_2(Hkv * D), 1024)
    tree_kernel.keep_accepted_kernel[layers, B, triton.cdiv(Hkv * D, block)](
        cache, path if block_table is None else block_table, path, accepted, cache_lengths, P=P,
        page_size=page_size, num_pages=num_pages, capacity=page_size * num_pages,
        **_strides("stride", cache, "layer page slot head"), HKV=Hkv, D=D, BLOCK=block,
        PAGED=block_table is not None,
    )  # fmt: skip
