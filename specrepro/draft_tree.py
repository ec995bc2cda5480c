"""Draft trees: candidate continuations of a sequence as tokens and parents, nothing else.

One representation serves every drafter: a chain is a tree with one child per node, and plain
autoregressive decoding is a tree of one node. Depths, ancestor masks and packed bits are derived on
demand and never stored beside the parents.

Shapes everywhere in this package: `B` sequences, `N` tree nodes, `S` cache slots, `V` vocabulary,
`H` hidden size, `Hq` query heads, `Hkv` key-value heads, `D` head size, `P` = at most `N` padded
path entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ROOT, PADDING = -1, -2  # parents of the first node and of nodes that are not there
WORD_BITS = 32


@dataclass(slots=True)
class DraftTree:
    """Candidate continuations; node 0 is the last emitted token and parents precede children."""

    tokens: Tensor  # (B, N) int64
    parents: Tensor  # (B, N) int64; -1 at the root, -2 where there is no node

    @classmethod
    def root_only(cls, tokens: Tensor) -> DraftTree:
        """The tree of plain autoregressive decoding: the last emitted token (B,) and no draft."""
        return cls(tokens[:, None], torch.full_like(tokens[:, None], ROOT))

    @classmethod
    def chain(cls, tokens: Tensor, lengths: Tensor | None = None) -> DraftTree:
        """One child per node: `tokens` (B, N) starts with the root.

        `lengths` (B,) counts the real nodes of each row where they are not all real.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        parents = positions - 1
        if lengths is not None:
            parents = parents.masked_fill(positions >= lengths[:, None], PADDING)
        return cls(tokens, parents)

    @property
    def is_node(self) -> Tensor:
        """(B, N) bool: False at padding."""
        return self.parents != PADDING

    @property
    def num_nodes(self) -> Tensor:
        """(B,) nodes of each tree, the root included."""
        return self.is_node.sum(1)

    def ancestor_mask(self) -> Tensor:
        """(B, N, N) bool: [b, i, j] says that node j is node i or one of its ancestors.

        Padding sees nothing, and nothing sees it.
        """
        N = self.parents.shape[1]
        node_ids = torch.arange(N, device=self.parents.device)
        itself = torch.eye(N, dtype=torch.bool, device=node_ids.device)
        mask = (self.parents[:, :, None] == node_ids) | itself
        # squaring a reachability relation doubles the distance it covers
        covered = 1
        while covered < N - 1:
            reach = mask.float()
            mask, covered = torch.bmm(reach, reach) > 0, covered * 2
        return mask & self.is_node[:, :, None]

    def depths(self) -> Tensor:
        """(B, N) steps below the root; 0 at the root and at padding."""
        return (self.ancestor_mask().sum(-1) - 1).clamp_min(0)

    def packed_ancestors(self) -> Tensor:
        """(B, N, ceil(N / 32)) int64 words of 32 ancestor bits each: bit j % 32 of word j // 32."""
        mask = self.ancestor_mask()
        num_words = -(-mask.shape[-1] // WORD_BITS)
        padded = torch.nn.functional.pad(mask, (0, num_words * WORD_BITS - mask.shape[-1]))
        weights = 2 ** torch.arange(WORD_BITS, device=mask.device)
        return (padded.unflatten(-1, (num_words, WORD_BITS)) * weights).sum(-1)

    def rows(self, keep: Tensor) -> DraftTree:
        """The trees of the sequences `keep` (indices or bool mask over B)."""
        return DraftTree(self.tokens[keep], self.parents[keep])

    def validate(self, vocab_size: int | None = None, allow_duplicates: bool = False) -> None:
        """Raise a ValueError that names the value where this is not a tree in the form above."""
        tokens, parents = self.tokens, self.parents
        if tokens.ndim != 2 or tokens.shape != parents.shape or not tokens.shape[1]:
            raise ValueError(
                "a draft tree needs tokens and parents of one shape (B, N), not"
                f" {tuple(tokens.shape)} and {tuple(parents.shape)}"
            )
        faults = self._faults(vocab_size, allow_duplicates)
        if torch.stack([fault.any() for fault in faults.values()]).any():
            raise ValueError(_describe_fault(self, faults))

    def _faults(self, vocab_size: int | None, allow_duplicates: bool) -> dict[str, Tensor]:
        tokens, parents, is_node = self.tokens, self.parents, self.is_node
        node_ids = torch.arange(parents.shape[1], device=parents.device)
        is_below = node_ids > 0
        resumes = torch.diff(is_node.int(), dim=1, prepend=is_node[:, :1].int()) > 0
        faults = {
            "the root must be node 0 with parent -1": (parents == ROOT) != ~is_below,
            "a parent must come before its child": is_node & is_below & (parents >= node_ids),
            "parents below -2 do not exist": parents < PADDING,
            "padding must come after every node": resumes,
        }
        if vocab_size is not None:
            is_unknown = (tokens < 0) | (tokens >= vocab_size)
            faults[f"token ids must lie in 0..{vocab_size - 1}"] = is_node & is_unknown
        if not allow_duplicates:
            faults["siblings must differ"] = is_node & _repeats_a_sibling(tokens, parents)
        return faults


def _repeats_a_sibling(tokens: Tensor, parents: Tensor) -> Tensor:
    """(B, N) bool: an earlier node has the same parent and token."""
    same_token = tokens[:, :, None] == tokens[:, None, :]
    same_parent = parents[:, :, None] == parents[:, None, :]
    return (same_token & same_parent).tril(-1).any(-1)


def _describe_fault(tree: DraftTree, faults: dict[str, Tensor]) -> str:
    rule, where = next((rule, fault) for rule, fault in faults.items() if fault.any())
    row, node = where.nonzero()[0].tolist()
    token, parent = tree.tokens[row, node].item(), tree.parents[row, node].item()
    return (
        f"malformed draft tree: {rule}, but node {node} of sequence {row}"
        f" has token {token} and parent {parent}"
    )


class Shape(Protocol):
    """Decides what a drafted tree becomes; every drafter that grows trees asks the one it holds."""

    depth: int  # most expansions after the first level
    top_k: int  # children drafted below every expanded node
    num_expanded: int  # most nodes that are expanded in all, the root not counted
    total_tokens: int  # most nodes kept, the root included

    def choose(self, level: int, scores: Tensor) -> Tensor | None:
        """(B, f) places to expand among a level's candidates, given their `scores` (B, n).

        None ends the growth.
        """

    def prune(self, growth: Growth) -> DraftTree:
        """What to keep of all candidates."""


def take_shape(drafter: object, shape: Shape) -> None:
    """Have `drafter` ask `shape` from now on; a ValueError where it asks for none."""
    if not hasattr(drafter, "tree"):
        raise ValueError(f"{type(drafter).__name__} drafts no trees whose shape it asks for")
    drafter.tree = shape


class Growth:
    """A tree while it is drafted: its candidates, level by level, and the frontier to expand next.

    Nodes that are never expanded stay candidates. `ancestors` says for each node of the frontier
    which of the nodes expanded so far it descends from or is: what it attends to behind the prefix.
    """

    def __init__(self, roots: Tensor):
        self.tokens, self.scores = roots[:, None], roots.new_zeros(len(roots), 1, dtype=torch.float)
        self.ids = torch.zeros_like(self.tokens)  # (B, f) of the frontier, in the pool
        self.ancestors = roots.new_zeros(len(roots), 1, 0, dtype=torch.bool)  # (B, f, expanded)
        self._levels = [(self.tokens, torch.full_like(self.tokens, ROOT), self.scores)]
        self._num_children = self._pool_size = 1

    @property
    def candidates(self) -> Tensor:
        """(B, f c) scores of the last level: cumulative log probabilities."""
        return self._levels[-1][2]

    def branch(self, log_probs: Tensor, tokens: Tensor) -> None:
        """Hang c children (B, f, c) below every node of the frontier."""
        self._pool_size = sum(level[0].shape[1] for level in self._levels)
        self._num_children = tokens.shape[2]
        parents = self.ids.repeat_interleave(self._num_children, 1)
        scores = (self.scores[:, :, None] + log_probs).flatten(1)
        self._levels.append((tokens.flatten(1), parents, scores))

    def descend(self, places: Tensor) -> Tensor:
        """Make the candidates at `places` (B, g) of the last level the frontier.

        Returns the places (B, g) of their parents in the frontier before.
        """
        tokens, _, scores = self._levels[-1]
        self.tokens, self.scores = tokens.gather(1, places), scores.gather(1, places)
        self.ids, parents = places + self._pool_size, places // self._num_children
        itself = torch.eye(places.shape[1], dtype=torch.bool, device=places.device)
        inherited = self.ancestors.take_along_dim(parents[:, :, None], 1)
        self.ancestors = torch.cat([inherited, itself.expand(len(places), -1, -1)], -1)
        return parents

    def descents(self, shape: Shape) -> Iterator[tuple[int, Tensor]]:
        """Descend for as long as `shape` chooses nodes: the level, and the parents' places."""
        for level in range(shape.depth):
            places = shape.choose(level, self.candidates)
            if places is None:
                return
            yield level, self.descend(places)

    def pool(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, parents and scores (B, pool) of every candidate, the root first."""
        tokens, parents, scores = (torch.cat(parts, 1) for parts in zip(*self._levels, strict=True))
        return tokens, parents, scores


def keep_best(
    tokens: Tensor, parents: Tensor, scores: Tensor, num_nodes: int
) -> tuple[DraftTree, Tensor]:
    """Prune a pool of nodes to the root and the best others, as EAGLE-2 ranks its candidates again.

    `tokens`, `parents`, `scores` are (B, pool) with the root first and parents before children; a
    child never scores above its parent, and the stable sort breaks ties toward the earlier node: so
    ancestors are always kept. Returns the tree and the pool ids kept (B, nodes), in pool order.
    """
    assert num_nodes >= 1, f"a tree of {num_nodes} nodes has no room for its root"
    ranked = scores[:, 1:].sort(dim=1, descending=True, stable=True).indices + 1
    kept = torch.cat([ranked.new_zeros(len(tokens), 1), ranked[:, : num_nodes - 1]], 1)
    kept = kept.sort(dim=1).values
    return keep_nodes(tokens, parents, kept), kept


def keep_nodes(tokens: Tensor, parents: Tensor, kept: Tensor) -> DraftTree:
    """The tree of the pool ids `kept` (B, nodes), ascending, the root first, ancestors included."""
    new_ids = torch.full_like(parents, PADDING)
    new_ids.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    kept_parents = parents.gather(1, kept)
    remapped = new_ids.gather(1, kept_parents.clamp_min(0))
    remapped = torch.where(kept_parents < 0, kept_parents, remapped)
    return DraftTree(tokens.gather(1, kept), remapped)
