"""The Triton kernels of tree verification: attention over a draft tree, the walks, the cache they
leave.

Attention reads each cached key and value once for all query heads that share it and all nodes of
the tree: the `G` heads x `N` nodes of one key-value head are packed as the rows of one tile. The
cached prefix is cut into splits, each attended by its own program with no mask but the length
bound; the program of the last split goes on into the tree's own keys, under packed ancestor bits,
and stores them behind the prefix. A second kernel merges the splits in order; no kernel uses
atomics.

In deterministic mode the splits follow from a row's prefix length alone and the tiles hold at least
64 rows, so that every row is reduced in the same order whatever else is in its tree.

The launchers take plain tensors, check nothing that has to be read back from the device, and launch
grids that depend on shapes only: they can be captured in a CUDA graph. What they are given is
checked by `tree_verify`, the door to them. The last section counts the bytes and operations of
these loops.

Not done here: backward passes, quantised caches, multi-head latent attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD_BITS = 32  # ancestor bits in a word, and tree keys in a block
FIXED_SPLIT = 256  # slots of a split in deterministic mode, times a whole number for long prefixes
MAX_FIXED_SPLITS = 16  # bounds the partial results, which would outweigh the cache itself
MERGE_ROWS = 16
VOCABULARY_WARPS = 8  # of the walks that read the vocabulary
COUPLED_TILE = 4096  # tokens that the walk of a coupled draw loads at once
RESIDUAL_TILE = 1024  # and the walk by rejection, in float64
LARGEST_BELOW_ONE = tl.constexpr(1 - 2**-24)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
NOBODY = tl.constexpr(-3)  # a node without children


@triton.jit
def _splits_of(length, min_split, max_splits):
    """Slots of a split and number of splits of a prefix; an empty one has one empty split."""
    split_size = min_split * tl.maximum(tl.cdiv(length, min_split * max_splits), 1)
    return split_size, tl.maximum(tl.cdiv(length, split_size), 1)


@triton.jit
def _slots_of_split(
    split, split_size, length, window, HAS_WINDOW: tl.constexpr, BLOCK_S: tl.constexpr
):
    start = split * split_size
    stop = tl.minimum(start + split_size, length)
    if HAS_WINDOW:
        # the root sees furthest back; whole blocks are left out, alike for every tree
        start = tl.maximum(start, tl.maximum(length - window + 1, 0) // BLOCK_S * BLOCK_S)
    return start, stop


@triton.jit
def _find_slots(table_ptr, sequence, slots, is_used, page_size, num_pages, PAGED: tl.constexpr):
    """Page and place of slots of a sequence; a contiguous cache has one page for each sequence."""
    page, place = sequence, slots
    if PAGED:
        at = table_ptr + sequence * num_pages + slots // page_size
        page = tl.load(at, mask=is_used, other=0).to(tl.int64)
        place = slots % page_size
    return page, place.to(tl.int64)


@triton.jit
def _load_vectors(ptr, at, is_there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors of D numbers at the offsets `at`; zeros where there are none, whatever lies there."""
    dims = tl.arange(0, BLOCK_D)
    mask = is_there[:, None] & (dims < D)[None, :]
    return tl.load(ptr + at[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _store_vectors(ptr, at, vectors, is_there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = is_there[:, None] & (dims < D)[None, :]
    tl.store(ptr + at[:, None] + dims[None, :], vectors.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scores(q, keys, scale, cap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Query-key products in units of log2; `scale` and `cap` come prepared by the launcher."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        # tanh by way of a power that cannot overflow
        decay = tl.exp2(tl.abs(scores) * (-2 * LOG2_E))
        magnitude = (1 - decay) / (1 + decay)
        scores = cap * tl.where(scores < 0, -magnitude, magnitude)
    return scores


@triton.jit
def _nothing_seen(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Maximum, sum and accumulator of a streaming softmax that has yet to begin."""
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    return best, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)


@triton.jit
def _absorb(scores, values, best, total, acc, PRECISION: tl.constexpr):
    """One step of the streaming softmax in base 2; a row that has seen nothing keeps sum 0."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    # -inf minus -inf is NaN
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return new_best, total, acc


@triton.jit
def _attend_block(
    q, keys, values, is_seen, scale, cap, best, total, acc,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scores = _scores(q, keys, scale, cap, HAS_SOFTCAP, PRECISION)
    scores = tl.where(is_seen, scores, float("-inf"))
    return _absorb(scores, values, best, total, acc, PRECISION)


@triton.jit
def _ancestors(words_ptr, sequence, nodes, is_row, first, N, BLOCK_T: tl.constexpr):
    """Which of the nodes from `first` on are ancestors: one word of bits for each row."""
    at = (sequence * N + nodes) * tl.cdiv(N, BLOCK_T) + first // BLOCK_T
    words = tl.load(words_ptr + at, mask=is_row, other=0)
    return (words[:, None] >> tl.arange(0, BLOCK_T)[None, :].to(tl.uint32)) & 1 != 0


@triton.jit(do_not_specialize=["N", "capacity", "num_pages", "min_split", "max_splits", "window"])
def tree_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, table_ptr, lengths_ptr, num_nodes_ptr,
    words_ptr, depths_ptr, out_ptr, lse_ptr, partial_ptr, best_ptr, total_ptr,
    N, capacity, page_size, num_pages, min_split, max_splits, scale, cap, window,
    q_sequence, q_node, q_head, k_sequence, k_node, k_head, v_sequence, v_node, v_head,
    k_page, k_slot, k_cache_head, v_page, v_slot, v_cache_head,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, PAGED: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one split of one key-value head's keys, seen by BLOCK_M of its query rows."""
    sequence = (tl.program_id(0) // HKV).to(tl.int64)
    head = (tl.program_id(0) % HKV).to(tl.int64)
    split = tl.program_id(2)
    length = tl.minimum(tl.load(lengths_ptr + sequence).to(tl.int32), capacity)
    split_size, num_splits = _splits_of(length, min_split, max_splits)
    if split >= num_splits:
        return
    num_nodes = tl.load(num_nodes_ptr + sequence).to(tl.int32)
    # a node's heads lie side by side, so that a node added to the tree moves no other row
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    nodes = rows // G
    is_row = nodes < num_nodes
    q_at = sequence * q_sequence + nodes * q_node + (head * G + rows % G) * q_head
    q = _load_vectors(q_ptr, q_at, is_row, D, BLOCK_D)
    if HAS_WINDOW:
        # a depth counts positions behind the prefix, whose slots have negative ones
        depths = tl.load(depths_ptr + sequence * N + nodes, mask=is_row, other=0)
        first_seen = depths - window + 1

    best, total, acc = _nothing_seen(BLOCK_M, BLOCK_D)
    # from here on the pointers are those of one key-value head
    k_cache_ptr += head * k_cache_head
    v_cache_ptr += head * v_cache_head
    start, stop = _slots_of_split(split, split_size, length, window, HAS_WINDOW, BLOCK_S)
    for first in range(start, stop, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        is_used = slots < stop
        page, place = _find_slots(table_ptr, sequence, slots, is_used, page_size, num_pages, PAGED)
        keys = _load_vectors(k_cache_ptr, page * k_page + place * k_slot, is_used, D, BLOCK_D)
        values = _load_vectors(v_cache_ptr, page * v_page + place * v_slot, is_used, D, BLOCK_D)
        is_seen = is_used[None, :]
        if HAS_WINDOW:
            is_seen = is_seen & (slots[None, :] - length >= first_seen[:, None])
        best, total, acc = _attend_block(
            q, keys, values, is_seen, scale, cap, best, total, acc, HAS_SOFTCAP, PRECISION
        )

    if split == num_splits - 1:
        k_ptr += sequence * k_sequence + head * k_head
        v_ptr += sequence * v_sequence + head * v_head
        for first in range(0, num_nodes, BLOCK_T):
            drafted = first + tl.arange(0, BLOCK_T)
            is_drafted = drafted < num_nodes
            keys = _load_vectors(k_ptr, drafted * k_node, is_drafted, D, BLOCK_D)
            values = _load_vectors(v_ptr, drafted * v_node, is_drafted, D, BLOCK_D)
            if tl.program_id(1) == 0:
                slots = length + drafted
                is_room = is_drafted & (slots < capacity)
                page, place = _find_slots(
                    table_ptr, sequence, slots, is_room, page_size, num_pages, PAGED
                )
                at = page * k_page + place * k_slot
                _store_vectors(k_cache_ptr, at, keys, is_room, D, BLOCK_D)
                at = page * v_page + place * v_slot
                _store_vectors(v_cache_ptr, at, values, is_room, D, BLOCK_D)
            is_seen = _ancestors(words_ptr, sequence, nodes, is_row, first, N, BLOCK_T)
            if HAS_WINDOW:
                key_depths = tl.load(depths_ptr + sequence * N + drafted, mask=is_drafted, other=0)
                is_seen = is_seen & (key_depths[None, :] >= first_seen[:, None])
            best, total, acc = _attend_block(
                q, keys, values, is_seen, scale, cap, best, total, acc, HAS_SOFTCAP, PRECISION
            )

    num_rows = N * G
    total = tl.where(is_row, total, 0.0)
    if num_splits == 1:
        at = (sequence * N + nodes) * (HKV * G) + head * G + rows % G
        _finish(out_ptr, lse_ptr, at, rows < num_rows, best, total, acc, D, BLOCK_D)
    else:
        at = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + split) * num_rows + rows
        tl.store(best_ptr + at, tl.where(is_row, best, float("-inf")), mask=rows < num_rows)
        tl.store(total_ptr + at, total, mask=rows < num_rows)
        _store_vectors(partial_ptr, at * D, acc, is_row, D, BLOCK_D)


@triton.jit
def _finish(out_ptr, lse_ptr, at, is_row, best, total, acc, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Divide by the sum; a row that saw nothing gets 0 and a log-sum-exp of -inf."""
    saw = total > 0
    divisor = tl.where(saw, total, 1.0)
    out = tl.where(saw[:, None], acc / divisor[:, None], 0.0)
    _store_vectors(out_ptr, at * D, out, is_row, D, BLOCK_D)
    lse = tl.where(saw, (best + tl.log2(divisor)) * LN_2, float("-inf"))
    tl.store(lse_ptr + at, lse, mask=is_row)


@triton.jit(do_not_specialize=["N", "capacity", "num_grid_splits", "min_split", "max_splits"])
def merge_splits_kernel(
    partial_ptr, best_ptr, total_ptr, lengths_ptr, out_ptr, lse_ptr,
    N, capacity, num_grid_splits, min_split, max_splits,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R query rows of one key-value head, their splits added up in order."""
    sequence = (tl.program_id(0) // HKV).to(tl.int64)
    head = (tl.program_id(0) % HKV).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + sequence).to(tl.int32), capacity)
    _, num_splits = _splits_of(length, min_split, max_splits)
    # a lone split has written its rows itself
    if num_splits == 1:
        return
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    num_rows = N * G
    is_row = rows < num_rows
    best, total, acc = _nothing_seen(BLOCK_R, BLOCK_D)
    for split in range(0, num_splits):
        at = (tl.program_id(0).to(tl.int64) * num_grid_splits + split) * num_rows + rows
        split_best = tl.load(best_ptr + at, mask=is_row, other=float("-inf"))
        split_total = tl.load(total_ptr + at, mask=is_row, other=0.0)
        # what a split that saw nothing left in its accumulator was never meant to be read
        split_acc = _load_vectors(partial_ptr, at * D, split_total > 0, D, BLOCK_D)
        new_best = tl.maximum(best, split_best)
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        fade, split_fade = tl.exp2(best - shift), tl.exp2(split_best - shift)
        total = total * fade + split_total * split_fade
        acc = acc * fade[:, None] + split_acc * split_fade[:, None]
        best = new_best
    at = (sequence * N + rows // G) * (HKV * G) + head * G + rows % G
    _finish(out_ptr, lse_ptr, at, is_row, best, total, acc, D, BLOCK_D)


@triton.jit
def _load_tree(tokens_ptr, parents_ptr, row, N, BLOCK_N: tl.constexpr):
    """Tokens and parents of one tree; a lane past its end has parent -2, which no node has."""
    node_ids = tl.arange(0, BLOCK_N)
    tokens = tl.load(tokens_ptr + row + node_ids, mask=node_ids < N, other=-1)
    parents = tl.load(parents_ptr + row + node_ids, mask=node_ids < N, other=-2)
    return tokens, parents


@triton.jit
def _child_with(tokens, parents, parent, token, N, BLOCK_N: tl.constexpr):
    """The child of `parent` that carries `token`, or N; ids only grow, so every walk ends."""
    node_ids = tl.arange(0, BLOCK_N)
    is_it = (parents == parent) & (tokens == token) & (node_ids > parent)
    return tl.min(tl.where(is_it, node_ids, N), 0)


@triton.jit
def _next_child(parents, parent, after, N, BLOCK_N: tl.constexpr):
    """The first child of `parent` behind node `after`, or N."""
    node_ids = tl.arange(0, BLOCK_N)
    return tl.min(tl.where((parents == parent) & (node_ids > after), node_ids, N), 0)


@triton.jit
def _finish_walk(accepted_ptr, bonus_ptr, depth, chosen):
    tl.store(accepted_ptr + tl.program_id(0), depth)
    tl.store(bonus_ptr + tl.program_id(0), chosen)


@triton.jit(do_not_specialize=["N"])
def greedy_walk_kernel(
    tokens_ptr, parents_ptr, choice_ptr, path_ptr, emitted_ptr, accepted_ptr, bonus_ptr, N,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program walks one tree. A tree fits in one block, so a step down is a single compare."""
    row = tl.program_id(0).to(tl.int64) * N
    tokens, parents = _load_tree(tokens_ptr, parents_ptr, row, N, BLOCK_N)
    depth = 0
    node = 0
    chosen = tl.full((), 0, tl.int64)
    while node < N:
        chosen = tl.load(choice_ptr + row + node)
        tl.store(path_ptr + row + depth, node)
        tl.store(emitted_ptr + row + depth, chosen)
        depth += 1
        node = _child_with(tokens, parents, node, chosen, N, BLOCK_N)
    _finish_walk(accepted_ptr, bonus_ptr, depth - 1, chosen)


@triton.jit
def _arrival(times, mass):
    """Who has no mass never arrives."""
    return tl.where(mass > 0, times / tl.where(mass > 0, mass, 1.0), float("inf"))


@triton.jit
def _winning_row(p_ptr, times_ptr, V, R, ROWS: tl.constexpr, C: tl.constexpr):
    """The row of the vocabulary's (R, C) grid that arrives first, each by its mass."""
    best = tl.full((), float("inf"), tl.float32)
    winner = 0
    for first in range(0, R, ROWS):
        rows = first + tl.arange(0, ROWS)
        ids = rows[:, None] * C + tl.arange(0, C)[None, :]
        mass = tl.sum(tl.load(p_ptr + ids, mask=ids < V, other=0.0).to(tl.float32), 1)
        arrival = _arrival(tl.load(times_ptr + rows, mask=rows < R, other=1.0), mass)
        earliest = tl.min(arrival, 0)
        winner = tl.where(earliest < best, first + tl.argmin(arrival, 0), winner)
        best = tl.minimum(best, earliest)
    return winner


@triton.jit
def _race(p_ptr, times_ptr, V, R, ROWS: tl.constexpr, C: tl.constexpr):
    """The token that wins: first the rows race, then the columns of the row that won."""
    first, columns = _winning_row(p_ptr, times_ptr, V, R, ROWS, C) * C, tl.arange(0, C)
    mass = tl.load(p_ptr + first + columns, mask=first + columns < V, other=0.0).to(tl.float32)
    return first + tl.argmin(_arrival(tl.load(times_ptr + R + columns), mass), 0)


@triton.jit(do_not_specialize=["N", "V", "R"])
def coupled_walk_kernel(
    tokens_ptr, parents_ptr, p_ptr, times_ptr, path_ptr, emitted_ptr, accepted_ptr, bonus_ptr,
    N, V, R, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program walks one tree: a race at each node, then on to the child that won it."""
    row = tl.program_id(0).to(tl.int64) * N
    tokens, parents = _load_tree(tokens_ptr, parents_ptr, row, N, BLOCK_N)
    depth = 0
    node = 0
    chosen = 0
    while node < N:
        at = row + node
        chosen = _race(p_ptr + at * V, times_ptr + at * (R + C), V, R, ROWS, C)
        tl.store(path_ptr + row + depth, node)
        tl.store(emitted_ptr + row + depth, chosen)
        depth += 1
        node = _child_with(tokens, parents, node, chosen, N, BLOCK_N)
    _finish_walk(accepted_ptr, bonus_ptr, depth - 1, chosen)


@triton.jit
def _total_mass(probs_ptr, V, BLOCK_V: tl.constexpr):
    """The sum of one distribution in float64."""
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, V, BLOCK_V):
        ids = first + tl.arange(0, BLOCK_V)
        total += tl.sum(tl.load(probs_ptr + ids, mask=ids < V, other=0.0).to(tl.float64), 0)
    return total


@triton.jit
def _masses(p_ptr, q_ptr, V, SAMPLED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of the target, and of the drafts' distribution where there is one."""
    of_drafts = tl.full((), 1.0, tl.float64)
    if SAMPLED:
        of_drafts = _total_mass(q_ptr, V, BLOCK_V)
    return _total_mass(p_ptr, V, BLOCK_V), of_drafts


@triton.jit
def _residual(
    p_ptr, q_ptr, tokens_ptr, first, spent, parents, tried_of, N, V,
    SAMPLED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Target mass in float64 of one block of tokens, less what the rejected drafts have taken.

    Sampled drafts take `spent` times their distribution (however many were tried, one factor is
    enough: max(max(p - a q, 0) - b q, 0) = max(p - (a + b) q, 0)); certain drafts, the children of
    `tried_of`, take their token's whole mass.
    """
    ids = first + tl.arange(0, BLOCK_V)
    mass = tl.load(p_ptr + ids, mask=ids < V, other=0.0).to(tl.float64)
    if SAMPLED:
        taken = spent * tl.load(q_ptr + ids, mask=ids < V, other=0.0).to(tl.float64)
        mass = tl.maximum(mass - taken, 0.0)
    else:
        tried = _next_child(parents, tried_of, 0, N, BLOCK_N)
        while tried < N:
            mass = tl.where(ids == tl.load(tokens_ptr + tried), 0.0, mass)
            tried = _next_child(parents, tried_of, tried, N, BLOCK_N)
    return ids, mass


@triton.jit
def _residual_mass(
    p_ptr, q_ptr, tokens_ptr, spent, parents, tried_of, N, V,
    SAMPLED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, V, BLOCK_V):
        _, mass = _residual(
            p_ptr, q_ptr, tokens_ptr, first, spent, parents, tried_of, N, V,
            SAMPLED, BLOCK_N, BLOCK_V,
        )  # fmt: skip
        total += tl.sum(mass, 0)
    return total


@triton.jit
def _draw(
    p_ptr, q_ptr, tokens_ptr, threshold, spent, parents, tried_of, N, V,
    SAMPLED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The first token whose cumulative mass exceeds the threshold; never one without mass."""
    running = tl.full((), 0.0, tl.float64)
    drawn = V
    last = 0
    first = 0
    while (first < V) & (drawn == V):
        ids, mass = _residual(
            p_ptr, q_ptr, tokens_ptr, first, spent, parents, tried_of, N, V,
            SAMPLED, BLOCK_N, BLOCK_V,
        )  # fmt: skip
        cumulative = running + tl.cumsum(mass, 0)
        drawn = tl.min(tl.where((cumulative > threshold) & (mass > 0), ids, V), 0)
        last = tl.maximum(last, tl.max(tl.where(mass > 0, ids, 0), 0))
        running += tl.sum(mass, 0)
        first += BLOCK_V
    return tl.where(drawn < V, drawn, last)


@triton.jit
def _load_uniform(ptr):
    return tl.minimum(tl.load(ptr), LARGEST_BELOW_ONE).to(tl.float64)


@triton.jit(do_not_specialize=["N", "V"])
def residual_walk_kernel(
    tokens_ptr, parents_ptr, p_ptr, q_ptr, uniforms_ptr, finals_ptr, path_ptr, emitted_ptr,
    accepted_ptr, bonus_ptr, N, V,
    SAMPLED: tl.constexpr, REPLACED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program walks one tree, trying children in draw order on what is left of the target."""
    row = tl.program_id(0).to(tl.int64) * N
    _, parents = _load_tree(tokens_ptr, parents_ptr, row, N, BLOCK_N)
    tokens_ptr += row
    tl.store(path_ptr + row, 0)
    depth = 0
    node = 0
    # the distributions at the node where the walk stands, and what is left of their mass
    p, q = p_ptr + row * V, q_ptr + row * V
    mass, unseen = _masses(p, q, V, SAMPLED, BLOCK_V)
    spent = tl.full((), 0.0, tl.float64)
    child = _next_child(parents, node, 0, N, BLOCK_N)
    while child < N:
        token = tl.load(tokens_ptr + child)
        wanted = tl.load(p + token).to(tl.float64)
        proposed = tl.full((), 1.0, tl.float64)
        if SAMPLED:
            proposed = tl.load(q + token).to(tl.float64)
            wanted = tl.maximum(wanted - spent * proposed, 0.0)
        # strictly below: a token without mass is refused even at uniform 0
        if _load_uniform(uniforms_ptr + row + child) * proposed * mass < wanted * unseen:
            tl.store(emitted_ptr + row + depth, token)
            depth += 1
            tl.store(path_ptr + row + depth, child)
            node = child
            p, q = p_ptr + (row + node) * V, q_ptr + (row + node) * V
            mass, unseen = _masses(p, q, V, SAMPLED, BLOCK_V)
            spent = tl.full((), 0.0, tl.float64)
        elif SAMPLED:
            spent += mass / unseen
            if not REPLACED:
                unseen -= proposed
            mass = _residual_mass(
                p, q, tokens_ptr, spent, parents, node, N, V, True, BLOCK_N, BLOCK_V
            )
        else:
            mass -= wanted
        child = _next_child(parents, node, child, N, BLOCK_N)
    if not SAMPLED:
        # what the draw adds up, where a difference keeps the rounding of all it was taken from
        mass = _residual_mass(p, q, tokens_ptr, spent, parents, node, N, V, False, BLOCK_N, BLOCK_V)
    tried_of = node
    # only rounding can reject every draft and leave nothing: then the draft was the target
    if mass <= 0:
        spent = tl.full((), 0.0, tl.float64)
        tried_of = NOBODY
        mass = _total_mass(p, V, BLOCK_V)
    threshold = _load_uniform(finals_ptr + tl.program_id(0)) * mass
    chosen = _draw(
        p, q, tokens_ptr, threshold, spent, parents, tried_of, N, V, SAMPLED, BLOCK_N, BLOCK_V
    )
    tl.store(emitted_ptr + row + depth, chosen)
    _finish_walk(accepted_ptr, bonus_ptr, depth, chosen)


@triton.jit(do_not_specialize=["P", "num_pages", "capacity"])
def keep_accepted_kernel(
    cache_ptr, table_ptr, path_ptr, accepted_ptr, lengths_ptr, P, page_size, num_pages, capacity,
    stride_layer, stride_page, stride_slot, stride_head,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK lanes of one layer's keys or values of one sequence, moved slot by slot.

    A path only grows, so a slot is read before it can be overwritten.
    """
    sequence = tl.program_id(1).to(tl.int64)
    lanes = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_lane = lanes < HKV * D
    within = (
        tl.program_id(0).to(tl.int64) * stride_layer
        + (lanes // D).to(tl.int64) * stride_head
        + lanes % D
    )
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    accepted = tl.load(accepted_ptr + sequence).to(tl.int32)
    for step in range(1, accepted + 1):
        node = tl.load(path_ptr + sequence * P + step).to(tl.int32)
        source, target = length + node, length + step
        if (node != step) & (source < capacity):
            page, place = _find_slots(
                table_ptr, sequence, source, True, page_size, num_pages, PAGED
            )
            at = page * stride_page + place * stride_slot
            moved = tl.load(cache_ptr + at + within, mask=is_lane)
            page, place = _find_slots(
                table_ptr, sequence, target, True, page_size, num_pages, PAGED
            )
            at = page * stride_page + place * stride_slot
            tl.store(cache_ptr + at + within, moved, mask=is_lane)


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
) -> Tiles:
    """The widest tile that spills no registers on sm_90, and next to none elsewhere, no wider than
    the rows need.

    `architecture` is a CUDA capability as in sm_90, or an AMD name as in gfx942. A deterministic
    tile has at least 64 rows: from there on a wider one has more warps doing the same to their own
    rows. Float32, head size 256 and AMD have one tile for every number of rows. The widest takes
    what registers there are: it leaves none for a window, a soft-cap (`is_plain` false) or padding
    up to head size 128.
    """
    if isinstance(architecture, str):
        rows = 16 if itemsize == 4 else 32 if head_size > 128 else 64
        return Tiles(rows, 32, warps=4, stages=1)
    if itemsize == 4:
        return Tiles(16, 32, warps=8, stages=2)
    if head_size > 128:
        return Tiles(64, 32, warps=8, stages=2)
    is_hopper = 90 <= architecture < 100
    has_room = head_size == 64 or (head_size == 128 and is_plain)
    narrowest, widest = 64 if deterministic else 16, 256 if is_hopper and has_room else 128
    rows = min(max(triton.next_power_of_2(num_rows), narrowest), widest)
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
    num_rows = nodes * (query_heads // kv_heads)
    tiles = choose_tiles(num_rows, head_size, itemsize, architecture, deterministic, is_plain)
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
    tree_attention_kernel[B * Hkv, geometry.row_blocks, geometry.num_splits](
        q, k, v, k_cache, v_cache, cache_lengths if block_table is None else block_table,
        cache_lengths, num_nodes, words, depths, out, lse, partial, best, total,
        N=N, capacity=capacity, page_size=page_size, num_pages=num_pages, **split,
        scale=scale * LOG2_E.value if softcap is None else scale / softcap,
        cap=1.0 if softcap is None else softcap * LOG2_E.value, window=window or 0,
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
        merge_splits_kernel[B * Hkv, triton.cdiv(N * (Hq // Hkv), MERGE_ROWS)](
            partial, best, total, cache_lengths, out, lse, N=N, capacity=capacity,
            num_grid_splits=geometry.num_splits, **split, **shape, BLOCK_R=MERGE_ROWS,
        )  # fmt: skip
    return out, lse


def _strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"{name}_{axis}": tensor.stride(place) for place, axis in enumerate(axes.split())}


def is_interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1, and so run on a CPU."""
    return not isinstance(tree_attention_kernel, triton.JITFunction)


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
    greedy_walk_kernel[B,](
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
    coupled_walk_kernel[B,](
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
    residual_walk_kernel[B,](
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
    keep_accepted_kernel[layers, B, triton.cdiv(Hkv * D, block)](
        cache, path if block_table is None else block_table, path, accepted, cache_lengths, P=P,
        page_size=page_size, num_pages=num_pages, capacity=page_size * num_pages,
        **_strides("stride", cache, "layer page slot head"), HKV=Hkv, D=D, BLOCK=block,
        PAGED=block_table is not None,
    )  # fmt: skip


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


if __name__ == "__main__":
    import runpy

    # timing needs the door and the target, which this module may not import
    runpy.run_module("specrepro.kernel_timings", run_name="__main__")
