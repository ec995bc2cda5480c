"""The target drafting for itself: the acceptance length that no head passes without the dice.

At temperature 0 such a drafter is never wrong: a tree that keeps its likeliest path is accepted
down to the last level. Above it the words to come are drawn, and even who knows their distribution
foretells only some of them. What is left between this and a head is what more or better training
could bring in the same tree. It costs a pass of the target for every level, so it tells acceptance
and never speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specrepro.draft_tree import DraftTree, Growth, Shape, keep_nodes
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict


class SelfDrafter:
    """Grows trees by the target's own distributions, over its whole vocabulary."""

    def __init__(self, target: Target, tree: Shape):
        self.target, self.tree = target, tree

    @property
    def max_nodes(self) -> int:
        return max(self.tree.total_tokens, 1 + self.tree.num_expanded)

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        rows = [row[:length] for row, length in zip(prompts, lengths.tolist(), strict=True)]
        self.cache, _ = self.target.prefill(rows, int(lengths.max()) + self.max_nodes)
        self.roots = roots

    def propose(self) -> DraftTree:
        growth = Growth(self.roots)
        expanded = growth.ids  # (B, e) of the pool, ascending
        growth.branch(*self._children(growth, expanded))
        for _ in growth.descents(self.tree):
            expanded = torch.cat([expanded, growth.ids], 1).sort(1).values
            growth.branch(*self._children(growth, expanded))
        self.drafted = self.tree.prune(growth)
        return self.drafted

    def _children(self, growth: Growth, expanded: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities and tokens (B, f, top_k) of the likeliest words below the frontier."""
        tokens, parents, _ = growth.pool()
        logits = self._score(keep_nodes(tokens, parents, expanded)).logits
        places = torch.searchsorted(expanded, growth.ids.contiguous())
        of_frontier = logits.take_along_dim(places[:, :, None], 1)
        return of_frontier.float().log_softmax(-1).topk(self.tree.top_k, -1)

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self._score(self.drafted)
        self.target.keep(self.cache, verdict)
        self.roots = verdict.bonus

    def select(self, rows: Tensor) -> None:
        self.cache, self.roots = self.cache.select(rows), self.roots[rows]

    def _score(self, tree: DraftTree) -> Scores:
        self.target.reserve(self.cache, tree.tokens.shape[1])
        return self.target.verify(self.cache, tree)
