"""The Triton kernels of tree verification: attention over a draft tree, the walks, the cache they
leave.

Attention reads each cached key and value once for all query heads that share it and all nodes of
the tree: the `G` heads x `N` nodes of one key-value head are packed as the rows of one tile. The
cached prefix is cut into splits, each attended by its own program with no mask but the length
bound; the program of the last split goes on into the tree's own keys, under packed ancestor bits,
and stores them behind the prefix. A second kernel merges the splits in order; no kernel uses
atomics.

How they are cut and launched is `kernel_launch`'s business; `tree_verify` is the door to them.

    python -m specrepro.tree_kernel [rows.csv]     times them (`kernel_timings`)

Not done here: backward passes, quantised caches, multi-head latent attention.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

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


if __name__ == "__main__":
    import runpy

    # timing needs the door and the target, which this module may not import
    runpy.run_module("specrepro.kernel_timings", run_name="__main__")
