"""What tree verification means, in the plainest Python that is true.

Slow and exact: row by row, node by node, in float64 or in whatever numbers the masses are made of.
The kernels and the torch path behind `tree_verify` have the same names without `_reference`, and
are tested against these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from specrepro.draft_tree import DraftTree


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


def verify_greedy_reference(
    tokens: Sequence[int], parents: Sequence[int], choice: Sequence[int]
) -> list[int]:
    """Follow the target's choice for as long as some child proposes it: the accepted node ids."""
    path, node = [], 0
    while matches := [c for c, p in enumerate(parents) if p == node and tokens[c] == choice[node]]:
        path.append(node := matches[0])
    return path


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


def keep_accepted_reference(slots: list, path: Sequence[int], length: int) -> list:
    """The slots of one sequence that stay: its prefix, then those of the path."""
    return slots[:length] + [slots[length + node] for node in path if node >= 0]
