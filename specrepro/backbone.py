"""Which words of the distributions of consecutive positions become nodes of a draft tree.

The distributions are given before the tree is: no node's children depend on the node. Both shapes
are a `draft_tree.Shape`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specrepro.draft_tree import DraftTree, Growth, keep_best


@dataclass(frozen=True, slots=True)
class Backbone:
    """Backbone expansion: candidates of every depth below the best one of the depth before."""

    num_levels: int = 7  # one a layer
    top_k: int = 8  # ours; 56 nodes, where EAGLE-3 sends 59

    def __post_init__(self) -> None:
        if self.num_levels < 1 or self.top_k < 1:
            raise ValueError(f"a backbone needs num_levels >= 1 and top_k >= 1, not {self}")

    @property
    def depth(self) -> int:
        """Expansions after the first level."""
        return self.num_levels - 1

    @property
    def num_expanded(self) -> int:
        """The backbone's own nodes but the last."""
        return self.depth

    @property
    def total_tokens(self) -> int:
        """N k nodes and the root."""
        return 1 + self.num_levels * self.top_k

    def choose(self, level: int, scores: Tensor) -> Tensor:
        """(B, 1) the most probable candidate of a level, wherever it stands among the drawn."""
        return scores.argmax(1, keepdim=True)

    def prune(self, growth: Growth) -> DraftTree:
        """All of it."""
        tokens, parents, _ = growth.pool()
        return DraftTree(tokens, parents)


@dataclass(frozen=True, slots=True)
class BestFirst:
    """The most probable nodes of the whole tree that the distributions span; an extension.

    Exact among the `top_k` words of each depth: no node among the best has a parent that is not.
    """

    num_levels: int
    top_k: int
    total_tokens: int

    @classmethod
    def like(cls, backbone: Backbone) -> BestFirst:
        """As many nodes as a backbone has, of the same words."""
        return cls(backbone.num_levels, backbone.top_k, backbone.total_tokens)

    @property
    def depth(self) -> int:
        """Expansions after the first level."""
        return self.num_levels - 1

    @property
    def num_expanded(self) -> int:
        """At most, the root not counted."""
        return self.depth * (self.total_tokens - 1)

    def choose(self, level: int, scores: Tensor) -> Tensor:
        """(B, f) all candidates that may still be among the best."""
        return scores.topk(min(scores.shape[1], self.total_tokens - 1), 1).indices

    def prune(self, growth: Growth) -> DraftTree:
        """The best of the pool."""
        return keep_best(*growth.pool(), self.total_tokens)[0]
