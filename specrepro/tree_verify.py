"""The one door to tree verification: attention over a draft tree, the walks that accept, and the cache they leave.

Every drafter's round ends here. The target scores a tree in one pass (`tree_attention`), a walk finds the longest path
the target would itself have produced (`verify_greedy`, `verify_sample`), and `keep_accepted` compacts the cache. Plain
autoregressive decoding takes the same door with a tree of one node, so baseline and method share every line.

Randomness is an argument: the same uniforms give the same verdict whichever backend walks the tree. Lossy acceptance
rules (typical acceptance, thresholds) are not offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specrepro.draft_tree import DraftTree

NO_NODE = -1  # pads paths and emitted tokens


@dataclass(slots=True)
class Verdict:
    """What the target accepted of each tree; a round emits `num_accepted + 1` tokens."""

    path: Tensor  # (B, P) node ids from the root, padded with -1
    num_accepted: Tensor  # (B,) drafted tokens accepted, the root not counted
    tokens: Tensor  # (B, P) tokens emitted this round, the bonus token last, padded with -1
    bonus: Tensor  # (B,) the token the target adds; the root of the next tree


def attention_mask(tree: DraftTree, cache_lengths: Tensor, num_slots: int, window: int | None = None) -> Tensor:
    """(B, N, num_slots) bool: what each node sees when its keys lie in slots `cache_lengths` + node id.

    The committed prefix without any condition, then its own ancestors and itself. A sliding `window` counts positions,
    hence tree depth, not the flattened node index.
    """
    ancestors = tree.ancestor_mask()
    mask = prefix_mask(ancestors, cache_lengths, num_slots)
    if window is not None:
        depths = (ancestors.sum(-1) - 1).clamp_min(0)
        mask = mask & _within_window(depths, cache_lengths, num_slots, window)
    return mask & tree.is_node[:, :, None]


def prefix_mask(ancestors: Tensor, cache_lengths: Tensor, num_slots: int) -> Tensor:
    """(B, n, num_slots) bool: the prefix of `cache_lengths` (B,) slots, then `ancestors` (B, n, m) for the m behind it."""
    slots = torch.arange(num_slots, device=ancestors.device)
    behind = slots - cache_lengths[:, None]  # (B, num_slots)
    m = ancestors.shape[-1]
    places = behind.clamp(0, m - 1)[:, None].expand(-1, ancestors.shape[1], -1)
    is_behind = ((behind >= 0) & (behind < m))[:, None]
    return (behind < 0)[:, None] | (is_behind & ancestors.gather(2, places))


def _within_window(depths: Tensor, cache_lengths: Tensor, num_slots: int, window: int) -> Tensor:
    """(B, N, num_slots) bool: fewer than `window` positions apart, a drafted node's position being prefix + depth."""
    slots = torch.arange(num_slots, device=depths.device)
    behind = slots - cache_lengths[:, None]
    depth_of_slot = depths.gather(1, behind.clamp(0, depths.shape[1] - 1))
    positions = torch.where(behind < 0, slots, cache_lengths[:, None] + depth_of_slot)
    return (cache_lengths[:, None] + depths)[:, :, None] - positions[:, None] < window


def tree_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, tree: DraftTree,
    *, scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> Tensor:
    """What `tree_attention` means: a dense masked softmax in float64, one sequence at a time."""
    out = torch.zeros_like(q)
    for b, length in enumerate(cache_lengths.tolist()):
        one = tree.rows(torch.tensor([b]))
        keys = torch.cat([k_cache[b, :length], k[b]]).double()
        values = torch.cat([v_cache[b, :length], v[b]]).double()
        mask = attention_mask(one, cache_lengths[b : b + 1], len(keys), window)[0]
        group = q.shape[2] // keys.shape[1]
        scores = torch.einsum("nhd,shd->hns", q[b].double(), keys.repeat_interleave(group, 1))
        scores = scores * (scale or q.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        out[b] = torch.einsum("hns,shd->nhd", weights, values.repeat_interleave(group, 1)).to(q.dtype)
    return out


def tree_attention(
    q: Tensor,  # (B, N, Hq, D)
    k: Tensor,  # (B, N, Hkv, D)  the tree's own keys
    v: Tensor,  # (B, N, Hkv, D)
    k_cache: Tensor,  # (B, S, Hkv, D)  slots [length, length + N) of each row are overwritten with the tree's own
    v_cache: Tensor,  # (B, S, Hkv, D)
    cache_lengths: Tensor,  # (B,)
    tree: DraftTree,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (B, N, slots) bool from `attention_mask`, so that the layers of a pass can share it
) -> Tensor:
    """Attend from every tree node to the committed prefix, its ancestors and itself: (B, N, Hq, D).

    The tree's keys and values are stored behind the prefix, where `keep_accepted` finds them afterwards.
    """
    B, N, Hq, D = q.shape
    store_tree(k, v, k_cache, v_cache, cache_lengths)
    if mask is None:
        mask = attention_mask(tree, cache_lengths, int(cache_lengths.max()) + N, window)
    num_slots = mask.shape[-1]
    assert num_slots <= k_cache.shape[1], f"{num_slots} slots are needed but the cache has {k_cache.shape[1]}"
    return packed_attention(q, k_cache[:, :num_slots], v_cache[:, :num_slots], mask, scale, softcap)


def store_tree(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor) -> None:
    """Write the tree's keys and values (B, N, Hkv, D) into slots `cache_lengths` + node id of each row."""
    B, N = k.shape[:2]
    rows = torch.arange(B, device=k.device)[:, None]
    slots = cache_lengths[:, None] + torch.arange(N, device=k.device)
    k_cache[rows, slots] = k
    v_cache[rows, slots] = v


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Masked attention with the query heads of one key-value head packed as rows, so that each key is read once.

    q (B, N, Hq, D); k, v (B, S, Hkv, D); mask (B, N, S) bool, or None for causal self-attention of N = S rows.
    """
    B, N, Hq, D = q.shape
    Hkv = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if mask is None and softcap is None:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=Hq != Hkv)
        return out.transpose(1, 2)
    packed = q.view(B, N, Hkv, Hq // Hkv, D).permute(0, 2, 3, 1, 4).reshape(B, Hkv, -1, D)
    if mask is None:
        mask = torch.ones(N, N, dtype=torch.bool, device=q.device).tril().expand(B, N, N)
    rows = mask[:, None].repeat(1, 1, Hq // Hkv, 1)
    # few rows of many sequences: two batched products take half the time of the fused CPU kernel
    if softcap is None and (B < 4 or q.device.type != "cpu"):
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=rows, scale=scale)
    else:
        scores = (packed @ k.transpose(-1, -2)).float() * (scale or D**-0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        # a row that sees nothing (padding) gets zeros, as from the fused kernel
        out = scores.masked_fill_(~rows, -torch.inf).softmax(-1).nan_to_num_(0.0).to(v.dtype) @ v
    return out.view(B, Hkv, Hq // Hkv, N, D).permute(0, 3, 1, 2, 4).reshape(B, N, Hq, D)


def verify_greedy_reference(tokens: list[int], parents: list[int], choice: list[int]) -> list[int]:
    """Follow the target's choice from the root for as long as some child proposes it: the accepted node ids."""
    path, node = [], 0
    while matches := [c for c, p in enumerate(parents) if p == node and tokens[c] == choice[node]]:
        path.append(node := matches[0])
    return path


def verify_greedy(tree: DraftTree, choice: Tensor) -> Verdict:
    """Accept the longest root path whose every token is the target's own `choice` (B, N) at the parent."""
    return _walk(tree, lambda nodes: choice.gather(1, nodes[:, None])[:, 0])


def verify_sample(
    tree: DraftTree,
    target_probs: Tensor | Callable[[Tensor], Tensor],
    uniforms: Tensor,  # (B, N)  the draw made at each node
) -> Verdict:
    """Draw from the target at each visited node and go to the child that was drawn, if there is one.

    `target_probs` is (B, N, V), or a function from visited nodes (B,) to their distributions (B, V): only the nodes on
    the walk are then ever normalised. Lossless for every tree that does not depend on `uniforms`: each emitted token
    is one draw from the target at its own prefix. With uniforms keyed by position, a sampled run repeats the
    autoregressive run of the same seed token for token.
    """
    if isinstance(target_probs, Tensor):
        probs = target_probs
        rows = torch.arange(len(probs), device=probs.device)
        probs_at: Callable[[Tensor], Tensor] = lambda nodes: probs[rows, nodes]  # noqa: E731
    else:
        probs_at = target_probs
    return _walk(tree, lambda nodes: draw(probs_at(nodes), uniforms.gather(1, nodes[:, None])[:, 0]))


def _walk(tree: DraftTree, choose: Callable[[Tensor], Tensor]) -> Verdict:
    """Step down from the roots while a child carries the chosen token; the last choice is the bonus token."""
    B, N = tree.tokens.shape
    nodes = tree.tokens.new_zeros(B)
    is_walking = torch.ones(B, dtype=torch.bool, device=nodes.device)
    path, tokens = [nodes], []
    for _ in range(N):
        chosen = choose(nodes)
        is_child = (tree.parents == nodes[:, None]) & (tree.tokens == chosen[:, None]) & is_walking[:, None]
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


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row (B, V) at its uniform in [0, 1): (B,). Zero mass is never drawn."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # the largest float below the total, so that rounding can never step past the last token with mass
    threshold = torch.minimum(uniforms[:, None].to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def keep_accepted(cache: Tensor, verdict: Verdict, cache_lengths: Tensor) -> Tensor:
    """Move the accepted path's slots behind the prefix, in place, and return the new lengths (B,).

    `cache` is (..., B, S, Hkv, D), every layer's keys and values at once; slots past the new length are left stale.
    """
    B, P = verdict.path.shape
    rows = torch.arange(B, device=cache.device)[:, None]
    target_slots = cache_lengths[:, None] + torch.arange(P, device=cache.device)
    source_slots = torch.where(verdict.path < 0, target_slots, cache_lengths[:, None] + verdict.path)
    if P > 1:
        cache[..., rows, target_slots, :, :] = cache[..., rows, source_slots, :, :]
    return cache_lengths + verdict.num_accepted + 1
