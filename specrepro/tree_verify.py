"""The one door to tree verification: attention over a draft tree, the walks that accept, and the
cache they leave.

Every drafter's round ends here. The target scores a tree in one pass (`tree_attention`), a walk
finds the longest path the target would itself have produced (`verify_greedy`, `verify_sample`), and
`keep_accepted` compacts the cache. Plain autoregressive decoding takes the same door with a tree of
one node, so baseline and method share every line.

Each operation has a reference in plain Python (`verify_reference`), a torch path for any device,
and Triton kernels (`tree_kernel`). Backend "auto" takes the kernels on a GPU and torch elsewhere;
"triton" on a CPU runs in Triton's interpreter, for tests and teaching, and needs TRITON_INTERPRET=1
before the first import.

Randomness is an argument: the same uniforms or race times give the same verdict whichever backend
walks the tree, up to the rounding of a sum. Lossy acceptance rules (typical acceptance, thresholds)
are not offered.

Bad input is a ValueError before anything is launched (`verify_checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specrepro import kernel_launch
from specrepro.draft_tree import DraftTree
from specrepro.races import draw, race, vocabulary_grid
from specrepro.verify_checks import (
    HEAD_SIZES,
    capacity_of,
    may_read_back,
    refuse_lengths,
    refuse_options,
    refuse_pages,
    refuse_path,
    refuse_sampling,
    refuse_shapes,
    refuse_what_kernels_lack,
)

NO_NODE = -1  # pads paths and emitted tokens
BACKENDS = ("auto", "triton", "torch")
LARGEST_BELOW_ONE = 1 - 2**-24  # float32
_auto_backend: ContextVar[str] = ContextVar("auto_backend", default="auto")


@dataclass(slots=True)
class Verdict:
    """What the target accepted of each tree; a round emits `num_accepted + 1` tokens."""

    path: Tensor  # (B, P) node ids from the root, padded with -1; a kernel's P is N
    num_accepted: Tensor  # (B,) drafted tokens accepted, the root not counted
    tokens: Tensor  # (B, P) tokens emitted this round, the bonus token last, padded with -1
    bonus: Tensor  # (B,) the token the target adds; the root of the next tree


@dataclass(slots=True)
class PackedTree:
    """A tree as the kernels read it; made once a pass and shared by its layers."""

    words: Tensor  # (B, N, ceil(N / 32)) uint32 ancestor bits
    depths: Tensor  # (B, N) int32
    num_nodes: Tensor  # (B,)


def pack(tree: DraftTree) -> PackedTree:
    """Check a tree and pack its ancestors."""
    if may_read_back(tree.tokens):
        tree.validate(allow_duplicates=True)
    # the cast to int32 keeps the low 32 bits
    words = tree.packed_ancestors().to(torch.int32).view(torch.uint32)
    return PackedTree(words, tree.depths().to(torch.int32), tree.num_nodes)


def attention_mask(
    tree: DraftTree, cache_lengths: Tensor, num_slots: int, window: int | None = None
) -> Tensor:
    """(B, N, num_slots) bool: what each node sees when its keys lie in slots `cache_lengths` + node
    id.

    The committed prefix without any condition, then its own ancestors and itself. A sliding
    `window` counts positions, hence tree depth, not the flattened node index.
    """
    ancestors = tree.ancestor_mask()
    mask = prefix_mask(ancestors, cache_lengths, num_slots)
    if window is not None:
        depths = (ancestors.sum(-1) - 1).clamp_min(0)
        mask = mask & _within_window(depths, cache_lengths, num_slots, window)
    return mask & tree.is_node[:, :, None]


def prefix_mask(ancestors: Tensor, cache_lengths: Tensor, num_slots: int) -> Tensor:
    """(B, n, num_slots) bool: a prefix of `cache_lengths` (B,), then `ancestors` (B, n, m)."""
    slots = torch.arange(num_slots, device=ancestors.device)
    behind = slots - cache_lengths[:, None]  # (B, num_slots)
    m = ancestors.shape[-1]
    places = behind.clamp(0, m - 1)[:, None].expand(-1, ancestors.shape[1], -1)
    is_behind = ((behind >= 0) & (behind < m))[:, None]
    return (behind < 0)[:, None] | (is_behind & ancestors.gather(2, places))


def _within_window(depths: Tensor, cache_lengths: Tensor, num_slots: int, window: int) -> Tensor:
    """(B, N, num_slots) bool: fewer than `window` positions apart; a node's is prefix + depth."""
    slots = torch.arange(num_slots, device=depths.device)
    behind = slots - cache_lengths[:, None]
    depth_of_slot = depths.gather(1, behind.clamp(0, depths.shape[1] - 1))
    positions = torch.where(behind < 0, slots, cache_lengths[:, None] + depth_of_slot)
    return (cache_lengths[:, None] + depths)[:, :, None] - positions[:, None] < window


def tree_attention(
    q: Tensor,  # (B, N, Hq, D)
    k: Tensor,  # (B, N, Hkv, D)  the tree's own keys
    v: Tensor,  # (B, N, Hkv, D)
    k_cache: Tensor,  # (B, S, Hkv, D), or pages (num_pages, page_size, Hkv, D)
    v_cache: Tensor,  # likewise; the tree's own overwrite slots [length, length + N)
    cache_lengths: Tensor,  # (B,)
    tree: DraftTree,
    *,
    block_table: Tensor | None = None,  # (B, n) int32 pages of each sequence, in order
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    mask: Tensor | None = None,  # (B, N, slots) from `attention_mask`, shared by layers (torch)
    packed: PackedTree | None = None,  # from `pack`, shared by layers (triton)
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every tree node to the committed prefix, its ancestors and itself: (B, N, Hq, D).

    With `return_lse` also the log-sum-exp (B, N, Hq). The tree's keys and values are stored behind
    the prefix, where `keep_accepted` finds them afterwards. `deterministic` (triton) reduces every
    row in an order that depends on its prefix length alone; torch gives no such promise. Slots past
    the prefix are never read and may hold NaN, except by torch under a shared `mask`, whose rows
    then need a cache that was zeroed once.
    """
    refuse_shapes(q, k, v, k_cache, v_cache, cache_lengths, tree, block_table)
    refuse_options(window, softcap)
    takes_kernel = attention_takes_kernels(q, backend)
    if mask is None and packed is None and may_read_back(q):
        tree.validate(allow_duplicates=True)
        refuse_lengths(cache_lengths, q.shape[1], capacity_of(k_cache, block_table))
        if block_table is not None:
            refuse_pages(block_table, cache_lengths, q.shape[1], k_cache)
    if takes_kernel:
        refuse_what_kernels_lack(q)
        packed = packed or pack(tree)
        out, lse = kernel_launch.attend(
            q, k, v, k_cache, v_cache, cache_lengths, packed.num_nodes, packed.words,
            packed.depths, block_table, scale=scale or q.shape[-1] ** -0.5, window=window,
            softcap=softcap, deterministic=deterministic,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    store_tree(k, v, k_cache, v_cache, cache_lengths, block_table)
    num_slots = int(cache_lengths.max()) + q.shape[1] if mask is None else mask.shape[-1]
    keys, values = (_first_slots(cache, block_table, num_slots) for cache in (k_cache, v_cache))
    if mask is None:
        mask = attention_mask(tree, cache_lengths, num_slots, window)
        _blank_unused((keys, values), cache_lengths + tree.num_nodes)
    out = packed_attention(q, keys, values, mask, scale, softcap)
    return (out, _log_sum_exp(q, keys, mask, scale, softcap)) if return_lse else out


def store_tree(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Write the tree's keys and values (B, N, Hkv, D) into slots `cache_lengths` + node id."""
    slots = cache_lengths[:, None] + torch.arange(k.shape[1], device=k.device)
    places = _places(slots, k_cache, block_table)
    k_cache[places] = k
    v_cache[places] = v


def _places(slots: Tensor, cache: Tensor, block_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices of `slots` (B, n) into the batch and slots, or pages and offsets, of a cache."""
    if block_table is None:
        return torch.arange(len(slots), device=slots.device)[:, None], slots
    page_size = cache.shape[-3]
    return block_table.long().gather(1, slots // page_size), slots % page_size


def _first_slots(cache: Tensor, block_table: Tensor | None, num_slots: int) -> Tensor:
    """(B, num_slots, Hkv, D): a view of a contiguous cache, a copy of a paged one."""
    if block_table is None:
        return cache[:, :num_slots]
    pages = block_table[:, : -(-num_slots // cache.shape[1])].long()
    return cache[pages].flatten(1, 2)[:, :num_slots]


def _blank_unused(caches: tuple[Tensor, Tensor], used: Tensor) -> None:
    """Zero the slots from `used` (B,) on: a weight of 0 does not silence a NaN."""
    slots = torch.arange(caches[0].shape[1], device=used.device)
    rows, places = (slots >= used[:, None]).nonzero(as_tuple=True)
    if len(rows):
        for cache in caches:
            cache[rows, places] = 0


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Masked attention with the query heads of one key-value head packed as rows, so that each key
    is read once.

    q (B, N, Hq, D); k, v (B, S, Hkv, D); mask (B, N, S) bool, or None for causal self-attention of
    N = S rows.
    """
    B, N, Hq, D = q.shape
    Hkv = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if mask is None and softcap is None:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=Hq != Hkv
        )
        return out.transpose(1, 2)
    packed = _pack_heads(q, Hkv)
    if mask is None:
        mask = torch.ones(N, N, dtype=torch.bool, device=q.device).tril().expand(B, N, N)
    rows = mask[:, None].repeat(1, 1, Hq // Hkv, 1)
    # few rows of many sequences: two batched products take half the time of the fused CPU kernel
    if softcap is None and (B < 4 or q.device.type != "cpu"):
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=rows, scale=scale)
    else:
        # a row that sees nothing (padding) gets zeros, as from the fused kernel
        weights = _masked_scores(packed, k, rows, scale, softcap).softmax(-1).nan_to_num_(0.0)
        out = weights.to(v.dtype) @ v
    return out.view(B, Hkv, Hq // Hkv, N, D).permute(0, 3, 1, 2, 4).reshape(B, N, Hq, D)


def _pack_heads(q: Tensor, num_kv_heads: int) -> Tensor:
    """(B, N, Hq, D) as (B, Hkv, G N, D)."""
    B, N, Hq, D = q.shape
    packed = q.reshape(B, N, num_kv_heads, Hq // num_kv_heads, D).permute(0, 2, 3, 1, 4)
    return packed.reshape(B, num_kv_heads, -1, D)


def _masked_scores(
    packed: Tensor, k: Tensor, rows: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    scores = (packed @ k.transpose(-1, -2)).float() * (scale or packed.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill_(~rows, -torch.inf)


def _log_sum_exp(
    q: Tensor, k: Tensor, mask: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """(B, N, Hq) float32; -inf for a row that sees nothing."""
    B, N, Hq, _ = q.shape
    Hkv = k.shape[2]
    rows = mask[:, None].repeat(1, 1, Hq // Hkv, 1)
    packed = _pack_heads(q, Hkv)
    scores = _masked_scores(packed.float(), k.transpose(1, 2).float(), rows, scale, softcap)
    lse = scores.logsumexp(-1)
    return lse.view(B, Hkv, Hq // Hkv, N).permute(0, 3, 1, 2).reshape(B, N, Hq)


def verify_greedy(
    tree: DraftTree,
    choice: Tensor | Callable[[Tensor], Tensor],  # (B, N)  the target's own token at each node
    *,
    backend: str = "auto",
) -> Verdict:
    """Accept the longest root path whose every token is the target's own choice at the parent.

    A function from visited nodes (B,) to choices (B,) in place of the tensor spares the argmax of
    every other node, which in half precision on a CPU takes longer than the whole target pass.
    """
    takes_kernel = _takes_kernel(backend, tree.tokens)
    if may_read_back(tree.tokens):
        tree.validate()
    if callable(choice):
        if backend == "triton":
            raise ValueError(
                "the kernel takes the target's choice as a tensor (B, N), not a function"
            )
        return _walk(tree, choice)
    if choice.shape != tree.tokens.shape:
        raise ValueError(
            f"the target's choice is {tuple(choice.shape)} but the tree {tuple(tree.tokens.shape)}"
        )
    if takes_kernel:
        trees = tree.tokens.contiguous(), tree.parents.contiguous()
        return _verdict(kernel_launch.walk_greedily(*trees, choice.long().contiguous()))
    return _walk(tree, lambda nodes: choice.gather(1, nodes[:, None])[:, 0])


def verify_sample(
    tree: DraftTree,
    target_probs: Tensor | Callable[[Tensor], Tensor],  # (B, N, V)
    uniforms: Tensor | None = None,  # (B, N)  one per node, for all modes but "coupled"
    final_uniforms: Tensor | None = None,  # (B,)  the last draw, which adds the bonus token
    *,
    mode: str = "coupled",
    race_times: Tensor | None = None,  # (B, N, R + C) exponentials at each node, for "coupled"
    draft_probs: Tensor | None = None,  # (B, N, V)  what each node's children were drawn from
    backend: str = "auto",
) -> Verdict:
    """Emit a path of the tree and a token behind it, distributed as the target's own continuation.

    "coupled": draw from the target at each visited node (`race`) and go to the child that was
    drawn. `target_probs` may then be a function from visited nodes (B,) to their distributions
    (B, V): only those are ever normalised. With race times keyed by position, a sampled run repeats
    the autoregressive run of the same seed token for token.
    "deterministic": children that were chosen, not drawn; each is accepted with its mass of what is
    left of the target.
    "without_replacement", "with_replacement": children drawn from `draft_probs` of their parent, in
    the order of their ids; a rejected one leaves the residual max(p - q, 0). Drawn with
    replacement, siblings may repeat. All need a tree that does not depend on the randomness; the
    last two need `draft_probs` exactly as the children were drawn.
    """
    refuse_sampling(
        tree, target_probs, uniforms, final_uniforms, mode, race_times, draft_probs, backend
    )
    takes_kernel = _takes_kernel(backend, tree.tokens)
    if takes_kernel and not callable(target_probs):
        randomness = (race_times,) if mode == "coupled" else (uniforms, final_uniforms)
        return _sample_by_kernel(tree, target_probs, draft_probs, randomness, mode)
    if mode != "coupled":
        return _walk_by_rejection(tree, target_probs, uniforms, final_uniforms, mode, draft_probs)
    rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
    probs_at = target_probs if callable(target_probs) else lambda n: target_probs[rows, n]
    return _walk(tree, lambda nodes: race(probs_at(nodes), race_times[rows, nodes]))


def _sample_by_kernel(
    tree: DraftTree,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    randomness: Sequence[Tensor],
    mode: str,
) -> Verdict:
    trees = tree.tokens.contiguous(), tree.parents.contiguous()
    probs = target_probs.contiguous()
    draws = [one.float().contiguous() for one in randomness]
    if mode == "coupled":
        grid = vocabulary_grid(probs.shape[-1])
        return _verdict(kernel_launch.walk_coupled(*trees, probs, *draws, grid))
    q = None if draft_probs is None else draft_probs.contiguous()
    return _verdict(
        kernel_launch.walk_by_rejection(*trees, probs, q, *draws, mode == "with_replacement")
    )


def _verdict(walk: kernel_launch.Walk) -> Verdict:
    return Verdict(walk.path, walk.accepted, walk.emitted, walk.bonus)


def _walk(tree: DraftTree, choose: Callable[[Tensor], Tensor]) -> Verdict:
    """Step down while a child carries the chosen token; the last choice is the bonus token."""
    B, N = tree.tokens.shape
    nodes = tree.tokens.new_zeros(B)
    is_walking = torch.ones(B, dtype=torch.bool, device=nodes.device)
    path, tokens = [nodes], []
    for _ in range(N):
        chosen = choose(nodes)
        is_child = (tree.parents == nodes[:, None]) & (tree.tokens == chosen[:, None])
        is_child &= is_walking[:, None]
        tokens.append(chosen.masked_fill(~is_walking, NO_NODE))
        found, child = is_child.max(1)
        is_walking = found
        if not is_walking.any():
            break
        nodes = torch.where(found, child, nodes)
        path.append(child.masked_fill(~found, NO_NODE))
    path, tokens = torch.stack(path, 1), torch.stack(tokens, 1)
    num_accepted = (path >= 0).sum(1) - 1
    return Verdict(path, num_accepted, tokens, tokens.gather(1, num_accepted[:, None])[:, 0])


def _walk_by_rejection(
    tree: DraftTree,
    target_probs: Tensor,
    uniforms: Tensor,
    final_uniforms: Tensor,
    mode: str,
    draft_probs: Tensor | None,
) -> Verdict:
    """Try each node where a sequence stands at its parent; parents come first: one sweep."""
    B, N = tree.tokens.shape
    rows = torch.arange(B, device=uniforms.device)
    uniforms = uniforms.double().clamp_max(LARGEST_BELOW_ONE)
    nodes, num_accepted = tree.tokens.new_zeros(B), tree.tokens.new_zeros(B)
    path, emitted = torch.full_like(tree.tokens, NO_NODE), torch.full_like(tree.tokens, NO_NODE)
    path[:, 0] = 0
    # (B, V) mass of the target that no draft has taken; copies, since both are written to
    left = target_probs[:, 0].to(torch.float64, copy=True)
    offered = None if draft_probs is None else draft_probs[:, 0].to(torch.float64, copy=True)
    for child in range(1, N):
        is_tried = tree.parents[:, child] == nodes
        if not is_tried.any():
            continue
        token, mass = tree.tokens[:, child].clamp_min(0), left.sum(1)
        proposed, unseen = (1, 1) if offered is None else (offered[rows, token], offered.sum(1))
        is_accepted = is_tried & (uniforms[:, child] * proposed * mass < left[rows, token] * unseen)
        is_rejected = is_tried & ~is_accepted
        if offered is None:
            left[rows[is_rejected], token[is_rejected]] = 0
        else:
            residual = (left - (mass / unseen)[:, None] * offered).clamp_min(0)
            left = torch.where(is_rejected[:, None], residual, left)
            if mode == "without_replacement":
                offered[rows[is_rejected], token[is_rejected]] = 0
            offered = torch.where(is_accepted[:, None], draft_probs[:, child], offered)
        left = torch.where(is_accepted[:, None], target_probs[:, child], left)
        went = rows[is_accepted]
        emitted[went, num_accepted[went]] = token[went]
        num_accepted = num_accepted + is_accepted
        path[went, num_accepted[went]] = child
        nodes = torch.where(is_accepted, child, nodes)
    # only rounding can reject every draft and leave nothing: then the draft was the target
    left = torch.where(left.sum(1, keepdim=True) > 0, left, target_probs[rows, nodes].double())
    bonus = draw(left, final_uniforms.double().clamp_max(LARGEST_BELOW_ONE))
    emitted[rows, num_accepted] = bonus
    P = int(num_accepted.max()) + 1
    return Verdict(path[:, :P], num_accepted, emitted[:, :P], bonus)


def keep_accepted(
    cache: Tensor,  # (..., B, S, Hkv, D) of every layer, or (..., num_pages, page_size, Hkv, D)
    verdict: Verdict,
    cache_lengths: Tensor,  # (B,)
    *,
    block_table: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Move the accepted path's slots behind the prefix, in place, and return the new lengths (B,).

    Slots past the new length are left stale.
    """
    B, P = verdict.path.shape
    if cache_lengths.shape != (B,) or (block_table is None and cache.shape[-4] != B):
        raise ValueError(
            f"a verdict on {B} sequences does not fit lengths {tuple(cache_lengths.shape)} "
            f"and a cache {tuple(cache.shape)}"
        )
    takes_kernel = _takes_kernel(backend, cache)
    if may_read_back(cache):
        refuse_path(verdict.path, cache_lengths, capacity_of(cache, block_table))
        if block_table is not None:
            num_slots = verdict.path.amax(1, keepdim=True) + 1
            refuse_pages(block_table, cache_lengths, num_slots, cache)
    if takes_kernel:
        layers = cache.view(-1, *cache.shape[-4:])
        kernel_launch.keep(
            layers, verdict.path.contiguous(), verdict.num_accepted, cache_lengths, block_table
        )
    elif P > 1:
        is_node = verdict.path >= 0
        steps = torch.arange(P, device=cache.device).expand_as(is_node)
        # a step that was not taken copies the root onto itself
        target_slots = cache_lengths[:, None] + steps.where(is_node, 0)
        source_slots = cache_lengths[:, None] + verdict.path.where(is_node, 0)
        sources, targets = (
            _places(slots, cache, block_table) for slots in (source_slots, target_slots)
        )
        cache[(..., *targets, slice(None), slice(None))] = cache[
            (..., *sources, slice(None), slice(None))
        ]
    return cache_lengths + verdict.num_accepted + 1


@contextmanager
def using(backend: str) -> Iterator[None]:
    """What "auto" means inside the block; `using("triton")` sends whole decodes to the kernels."""
    token = _auto_backend.set(_known(backend))
    try:
        yield
    finally:
        _auto_backend.reset(token)


def takes_kernels(tensor: Tensor) -> bool:
    """Whether operations on `tensor` take the kernels when nothing else is asked for."""
    return _takes_kernel("auto", tensor)


def attention_takes_kernels(q: Tensor, backend: str = "auto") -> bool:
    """Likewise for attention, where "auto" leaves head sizes that the kernels lack to torch."""
    is_asked_for = _resolved(backend) != "auto"
    return _takes_kernel(backend, q) and (is_asked_for or q.shape[-1] in HEAD_SIZES)


def _resolved(backend: str) -> str:
    return _auto_backend.get() if _known(backend) == "auto" else backend


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose {', '.join(BACKENDS)}")
    return backend


def _takes_kernel(backend: str, tensor: Tensor) -> bool:
    backend = _resolved(backend)
    if backend == "triton" and not tensor.is_cuda and not kernel_launch.is_interpreted():
        raise ValueError(
            f"backend 'triton' needs a GPU tensor, not one on {tensor.device}: use "
            "backend='torch', or set TRITON_INTERPRET=1 before Python starts to run the kernels "
            "in Triton's interpreter"
        )
    return backend == "triton" or (backend == "auto" and tensor.is_cuda)
