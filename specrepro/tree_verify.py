"""The one door to tree verification: attention over a draft tree, the walks that accept, and the
cache they leave.

Every drafter's round ends here. The target scores a tree in one pass (`tree_attention`), a walk
finds the longest path the target would itself have produced (`verify_greedy`, `verify_sample`), and
`keep_accepted` compacts the cache. Plain autoregressive decoding takes the same door with a tree of
one node, so baseline and method share every line.

Each operation has a reference in plain Python, a torch path for any device, and Triton kernels
(`tree_kernel`). Backend
"auto" takes the kernels on a GPU and torch elsewhere; "triton" on a CPU runs in Triton's
interpreter, for tests and teaching, and needs TRITON_INTERPRET=1 before the first import.

Randomness is an argument: the same uniforms or race times give the same verdict whichever backend
walks the tree, up to the rounding of a sum. Lossy acceptance rules (typical acceptance, thresholds)
are not offered.

Bad input is a ValueError before anything is launched. What would have to be read back from a GPU
(the tree, the lengths) is checked once a pass, where the tree is packed, and not while a CUDA graph
is captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from specrepro import tree_kernel
from specrepro.draft_tree import DraftTree

NO_NODE = -1  # pads paths and emitted tokens
BACKENDS = ("auto", "triton", "torch")
SAMPLING_MODES = ("coupled", "deterministic", "without_replacement", "with_replacement")
HEAD_SIZES = (64, 80, 96, 128, 256)  # of the kernels; torch takes any
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


def tree_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    tree: DraftTree,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `tree_attention` means: row by row, a float64 softmax over the keys that it sees."""
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    group = q.shape[2] // k.shape[2]
    for b, length in enumerate(cache_lengths.tolist()):
        parents = tree.parents[b].tolist()
        keys = torch.cat([_slots_of(k_cache, block_table, b)[:length], k[b]]).double()
        values = torch.cat([_slots_of(v_cache, block_table, b)[:length], v[b]]).double()
        for node in range(len(parents)):
            seen = _seen_reference(parents, node, length, window)
            if not seen:
                continue
            for head in range(q.shape[2]):
                scores = keys[seen, head // group] @ q[b, node, head].double()
                scores = scores * (scale or q.shape[-1] ** -0.5)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, node, head] = scores.softmax(0) @ values[seen, head // group]
                lse[b, node, head] = scores.logsumexp(0)
    return (out, lse) if return_lse else out


def _slots_of(cache: Tensor, block_table: Tensor | None, sequence: int) -> Tensor:
    return (
        cache[sequence]
        if block_table is None
        else cache[block_table[sequence].long()].flatten(0, 1)
    )


def _seen_reference(parents: list[int], node: int, length: int, window: int | None) -> list[int]:
    """The slots that a node sees, behind a prefix of `length`: none for padding."""
    if parents[node] < -1:
        return []
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    positions = {slot: slot for slot in range(length)}
    positions |= {length + one: length + depth for depth, one in enumerate(reversed(path))}
    own = positions[length + node]
    return [
        slot for slot, position in positions.items() if window is None or own - position < window
    ]


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
    mask: Tensor
    | None = None,  # (B, N, slots) bool from `attention_mask`, shared by layers (torch)
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
    _refuse_shapes(q, k, v, k_cache, v_cache, cache_lengths, tree, block_table)
    takes_kernel = attention_takes_kernels(q, backend)
    if mask is None and packed is None and may_read_back(q):
        tree.validate(allow_duplicates=True)
        refuse_lengths(cache_lengths, q.shape[1], _capacity(k_cache, block_table))
    if takes_kernel:
        _refuse_what_kernels_lack(q)
        packed = packed or pack(tree)
        out, lse = tree_kernel.attend(
            q,
            k,
            v,
            k_cache,
            v_cache,
            cache_lengths,
            packed.num_nodes,
            packed.words,
            packed.depths,
            block_table,
            scale=scale or q.shape[-1] ** -0.5,
            window=window,
            softcap=softcap,
            deterministic=deterministic,
        )
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


def verify_greedy_reference(
    tokens: Sequence[int], parents: Sequence[int], choice: Sequence[int]
) -> list[int]:
    """Follow the target's choice for as long as some child proposes it: the accepted node ids."""
    path, node = [], 0
    while matches := [c for c, p in enumerate(parents) if p == node and tokens[c] == choice[node]]:
        path.append(node := matches[0])
    return path


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
        return _verdict(tree_kernel.walk_greedily(*trees, choice.contiguous()))
    return _walk(tree, lambda nodes: choice.gather(1, nodes[:, None])[:, 0])


def verify_sample_reference(
    tokens: Sequence[int],
    parents: Sequence[int],
    target_probs: Sequence[Sequence[Real]],  # (N, V)
    is_accepted: Callable[
        [int, Real, Real], bool
    ],  # node, numerator, denominator of the probability
    draw_token: Callable[[int, Sequence[Real]], int],  # node, masses in proportion
    *,
    mode: str = "coupled",
    draft_probs: Sequence[Sequence[Real]]
    | None = None,  # (N, V) what each node's children were drawn from
) -> tuple[list[int], list[int]]:
    """The accepted node ids and the emitted tokens of one tree, whatever numbers the masses are
    made of.

    Chance is in the two functions: uniforms make it one walk, and a function that goes both ways
    lists every outcome with its probability.
    """
    path, emitted, node = [], [], 0
    if mode == "coupled":
        while True:
            emitted.append(draw_token(node, target_probs[node]))
            matches = [c for c, p in enumerate(parents) if p == node and tokens[c] == emitted[-1]]
            if not matches:
                return path, emitted
            path.append(node := matches[0])
    left = list(target_probs[0])
    offered = list(draft_probs[0]) if draft_probs is not None else []
    for child in range(1, len(tokens)):
        if parents[child] != node:
            continue
        token = tokens[child]
        if mode == "deterministic":
            offered = [int(other == token) for other in range(len(left))]
        if is_accepted(child, left[token] * sum(offered), offered[token] * sum(left)):
            path.append(node := child)
            emitted.append(token)
            left = list(target_probs[node])
            offered = list(draft_probs[node]) if draft_probs is not None else []
        else:
            taken = [mass * sum(left) / sum(offered) for mass in offered]
            left = [max(mass - other, 0) for mass, other in zip(left, taken, strict=True)]
            if mode == "without_replacement":
                offered[token] = 0
    return path, [*emitted, draw_token(node, left if sum(left) > 0 else target_probs[node])]


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
    _refuse_sampling(
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
        return _verdict(tree_kernel.walk_coupled(*trees, probs, *draws, grid))
    q = None if draft_probs is None else draft_probs.contiguous()
    return _verdict(
        tree_kernel.walk_by_rejection(*trees, probs, q, *draws, mode == "with_replacement")
    )


def _verdict(walk: tree_kernel.Walk) -> Verdict:
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
    left = target_probs[:, 0].double()  # (B, V) mass of the target that no draft has taken
    offered = None if draft_probs is None else draft_probs[:, 0].double()
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


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert each row's (B, V) cumulative distribution at its uniform; never draws zero mass."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # the largest float below the total, so that rounding can never step past the last token with
    # mass
    threshold = torch.minimum(
        uniforms[:, None].to(total) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def vocabulary_grid(vocab_size: int) -> tuple[int, int]:
    """Rows R and columns C of the least-sided grid that holds a vocabulary, C a power of two."""
    columns = 2 ** math.ceil(math.log2(max(vocab_size, 2)) / 2)
    return -(-vocab_size // columns), columns


def race(probs: Tensor, times: Tensor) -> Tensor:
    """Draw a token from each row of `probs` (B, V), scaled or not: the first to arrive wins.

    With independent standard exponentials E, argmin of E / p is distributed as p (the race that
    Gumbel-max runs in logarithms). Two races, among the rows of the vocabulary's grid by their
    masses and among the columns of the winner, need R + C `times` (B, R + C) in place of V. Unlike
    an inverted cumulative distribution, which carries the rounding of every token's mass to every
    draw, a race turns only where two arrivals nearly tie.
    """
    _, _, tokens = _arrivals(probs, times)
    return tokens


def race_lead(probs: Tensor, times: Tensor) -> Tensor:
    """(B,) how far the logarithms of masses must move to turn the race of each row."""
    among_rows, among_columns, _ = _arrivals(probs, times)
    first_two = torch.stack([_two_first(among_rows), _two_first(among_columns)])
    return (first_two[..., 1] / first_two[..., 0]).log().amin(0)


def _two_first(arrivals: Tensor) -> Tensor:
    arrivals = F.pad(arrivals, (0, 1), value=torch.inf)
    return arrivals.topk(2, -1, largest=False).values


def _arrivals(probs: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """When each row (B, R) and each column of the winning row (B, C) arrive, and who wins (B,)."""
    R, C = vocabulary_grid(probs.shape[-1])
    grid = F.pad(probs, (0, R * C - probs.shape[-1])).view(-1, R, C)
    among_rows = times[:, :R] / grid.sum(-1)
    row = among_rows.argmin(-1)
    among_columns = times[:, R:] / grid[torch.arange(len(row), device=row.device), row]
    return among_rows, among_columns, row * C + among_columns.argmin(-1)


def keep_accepted_reference(slots: list, path: Sequence[int], length: int) -> list:
    """The slots of one sequence that stay: its prefix, then those of the path."""
    return slots[:length] + [slots[length + node] for node in path if node != NO_NODE]


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
    if _takes_kernel(backend, cache):
        layers = cache.view(-1, *cache.shape[-4:])
        tree_kernel.keep(
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
    if backend == "triton" and not tensor.is_cuda and not tree_kernel.is_interpreted():
        raise ValueError(
            f"backend 'triton' needs a GPU tensor, not one on {tensor.device}: use "
            "backend='torch', or set TRITON_INTERPRET=1 before Python starts to run the kernels "
            "in Triton's interpreter"
        )
    return backend == "triton" or (backend == "auto" and tensor.is_cuda)


def may_read_back(tensor: Tensor) -> bool:
    """Reading a GPU's values costs a synchronisation, and is forbidden in a CUDA graph."""
    return not tensor.is_cuda or not torch.cuda.is_current_stream_capturing()


def _capacity(cache: Tensor, block_table: Tensor | None) -> int:
    return cache.shape[1] if block_table is None else cache.shape[1] * block_table.shape[1]


def _refuse_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    tree: DraftTree,
    block_table: Tensor | None,
) -> None:
    B, N, Hq, D = q.shape
    Hkv = k.shape[2]
    faults = {
        f"{Hq} query heads cannot share {Hkv} key-value heads": Hq % Hkv != 0,
        f"k and v must be {(B, N, Hkv, D)}": not k.shape == v.shape == (B, N, Hkv, D),
        f"the tree must be {(B, N)}": tree.tokens.shape != (B, N),
        f"cache_lengths must be {(B,)}": cache_lengths.shape != (B,),
        "the caches of keys and values must have one shape": k_cache.shape != v_cache.shape,
        f"the cache must end in {(Hkv, D)}": k_cache.shape[2:] != (Hkv, D),
        f"the cache must hold {B} sequences": block_table is None and k_cache.shape[0] != B,
        f"the block table must be ({B}, pages)": block_table is not None
        and block_table.shape[0] != B,
    }
    for fault, is_there in faults.items():
        if is_there:
            raise ValueError(
                f"{fault}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
                f"cache {tuple(k_cache.shape)} and {tuple(v_cache.shape)}, "
                f"lengths {tuple(cache_lengths.shape)}, tree {tuple(tree.tokens.shape)}"
            )


def refuse_lengths(cache_lengths: Tensor, num_nodes: int, capacity: int) -> None:
    """Raise ValueError where prefixes of these lengths leave no room for a tree behind them."""
    shortest, longest = (int(length) for length in cache_lengths.aminmax())
    if shortest < 0 or longest + num_nodes > capacity:
        raise ValueError(
            f"cache lengths run from {shortest} to {longest}; with {num_nodes} nodes behind "
            f"them they must fit the {capacity} slots of the cache"
        )


def _refuse_what_kernels_lack(q: Tensor) -> None:
    if q.shape[-1] not in HEAD_SIZES:
        raise ValueError(
            f"the kernels have head sizes {', '.join(map(str, HEAD_SIZES))}, not {q.shape[-1]}: "
            "use backend='torch'"
        )
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        raise ValueError(
            "Triton's interpreter cannot multiply bfloat16: use float16, float32 or backend='torch'"
        )


def _refuse_sampling(
    tree: DraftTree,
    target_probs: Tensor | Callable[[Tensor], Tensor],
    uniforms: Tensor | None,
    final_uniforms: Tensor | None,
    mode: str,
    race_times: Tensor | None,
    draft_probs: Tensor | None,
    backend: str,
) -> None:
    if mode not in SAMPLING_MODES:
        raise ValueError(f"unknown sampling mode {mode!r}; choose {', '.join(SAMPLING_MODES)}")
    if callable(target_probs) and (mode != "coupled" or backend == "triton"):
        who = "the kernels need" if mode == "coupled" else f"mode {mode!r} needs"
        raise ValueError(f"{who} target_probs as a tensor (B, N, V), not as a function")
    B, N = tree.tokens.shape
    vocab_size = None if callable(target_probs) else target_probs.shape[-1]
    if mode == "coupled":
        width = None if vocab_size is None else sum(vocabulary_grid(vocab_size))
        _refuse_race_times(race_times, B, N, width)
    else:
        _refuse_uniforms(uniforms, final_uniforms, B, N, mode)
    if (draft_probs is not None) != mode.endswith("_replacement"):
        needs = "needs" if mode.endswith("_replacement") else "takes no"
        raise ValueError(f"mode {mode!r} {needs} draft_probs")
    if not callable(target_probs):
        for name, probs in (("target_probs", target_probs), ("draft_probs", draft_probs)):
            _refuse_probs(name, probs, (B, N, vocab_size))
    if may_read_back(tree.tokens):
        tree.validate(vocab_size, allow_duplicates=mode == "with_replacement")


def _refuse_race_times(race_times: Tensor | None, B: int, N: int, width: int | None) -> None:
    shape = None if race_times is None else tuple(race_times.shape)
    if shape is None or shape[:2] != (B, N) or width not in (None, shape[-1]):
        raise ValueError(
            f"mode 'coupled' needs race_times {(B, N, width or 'R + C')}, exponentials for the"
            f" grid of the vocabulary at each node, not {shape}"
        )


def _refuse_uniforms(
    uniforms: Tensor | None, final_uniforms: Tensor | None, B: int, N: int, mode: str
) -> None:
    needed = {"uniforms": (uniforms, (B, N)), "final_uniforms": (final_uniforms, (B,))}
    for name, (given, shape) in needed.items():
        found = None if given is None else tuple(given.shape)
        if found != shape:
            raise ValueError(f"mode {mode!r} needs {name} {shape}, not {found}")


def _refuse_probs(name: str, probs: Tensor | None, shape: tuple[int, int, int]) -> None:
    if probs is None:
        return
    if probs.shape != shape:
        raise ValueError(f"{name} must be {shape}, not {tuple(probs.shape)}")
    if may_read_back(probs) and not (torch.isfinite(probs).all() and (probs >= 0).all()):
        row, node, token = (~torch.isfinite(probs) | (probs < 0)).nonzero()[0].tolist()
        raise ValueError(
            f"{name} of token {token} at node {node} of sequence {row} is "
            f"{probs[row, node, token].item()}; "
            "probabilities must be finite and not negative"
        )
