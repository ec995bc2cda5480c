"""Draft trees at many positions of known sequences, judged by the target in one pass.

To train on what the target thinks of a tree, trees are drafted at positions of a sequence whose
words are given. All of them are branches of one tree, whose trunk is the sequence itself: so the
target scores them as it scores any tree, and what several say alike it scores once. A node that
nothing hangs below is not scored at all, since its probability is read off its parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specrepro.decoding import most_probable
from specrepro.draft_tree import PADDING, ROOT, DraftTree
from specrepro.target_model import Target

UNSCORED = -1  # place of a node that the target need not see


@dataclass(slots=True)
class Forest(DraftTree):
    """A tree of hundreds of nodes and as many levels: its ancestors are climbed, not squared."""

    def ancestor_mask(self) -> Tensor:
        """(B, N, N) bool, as of any tree."""
        node_ids = torch.arange(self.parents.shape[1], device=self.parents.device)
        mask = (node_ids[:, None] == node_ids).expand(len(self.parents), -1, -1)
        above = self.parents  # 1, 2, 4, ... steps above each node
        while (is_there := above >= 0).any():
            up = above.clamp_min(0)
            mask = mask | (mask.take_along_dim(up[:, :, None], 1) & is_there[:, :, None])
            above = above.gather(1, up).where(is_there, ROOT)
        return mask & self.is_node[:, :, None]


def forest(
    trunk: Tensor,  # (b, L)  consecutive words of each sequence
    roots: Tensor,  # (b, P)  which of them the trees are rooted at
    is_real: Tensor,  # (b, P) bool: there is a tree
    trees: Sequence[DraftTree],  # each (b P, N)
) -> tuple[Forest, Tensor]:
    """One tree for each sequence of its trunk and all of `trees`, and where each node went.

    The places are (b, len(trees), P, N), `UNSCORED` where nothing hangs below a node.
    """
    b, P = roots.shape
    tokens, parents = _by_position(trees, b)
    grafted = []
    for i in range(b):
        wanted = is_real[i].expand(len(trees), -1).flatten().tolist()
        branches = zip(
            roots[i].repeat(len(trees)).tolist(),
            tokens[i].flatten(0, 1).tolist(),
            parents[i].flatten(0, 1).tolist(),
            strict=True,
        )
        real = (one for one, is_wanted in zip(branches, wanted, strict=True) if is_wanted)
        grafted.append(_graft(trunk[i].tolist(), real))
    places = torch.full_like(parents, UNSCORED)
    mask = is_real[:, None, :, None].expand_as(places)
    found = [place for _, own in grafted for place in own]
    places.masked_scatter_(mask, torch.tensor(found, device=places.device))
    return _padded([nodes for nodes, _ in grafted], trunk.device), places


def _graft(
    trunk: Sequence[int], branches: Iterable[tuple[int, Sequence[int], Sequence[int]]]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Nodes (parent, token) of one sequence's tree, and the places of its branches' nodes.

    Each branch is the place of its root in the trunk, its tokens and its parents.
    """
    ids = {(place - 1, token): place for place, token in enumerate(trunk)}
    places: list[int] = []
    for root, tokens, parents in branches:
        own, inner = [root], set(parents)
        for node in range(1, len(tokens)):
            if node not in inner:  # padding too, which has no parent
                own.append(UNSCORED)
                continue
            key = own[parents[node]], tokens[node]
            own.append(ids.setdefault(key, len(ids)))
        places += own
    return list(ids), places


def _padded(trees: Sequence[list[tuple[int, int]]], device: torch.device) -> Forest:
    """Lists of nodes (parent, token) as one batch."""
    size = max(map(len, trees))
    padded = [nodes + [(PADDING, 0)] * (size - len(nodes)) for nodes in trees]
    parents, tokens = torch.tensor(padded, device=device).unbind(-1)
    return Forest(tokens, parents)


@dataclass(slots=True)
class Judgement:
    """What the target thinks of trees (B, N)."""

    probs: Tensor  # (B, N) of each node after its path, at temperature 1; of no meaning at roots
    choices: Tensor  # (B, N) its own greedy choice after each node; of no meaning at leaves

    def indicator(self, tree: DraftTree) -> Tensor:
        """(B, N) 1 where a node is the target's own choice, else 0: `probs` at temperature 0."""
        return (self.choices.gather(1, tree.parents.clamp_min(0)) == tree.tokens).float()


@torch.no_grad()
def judge(
    target: Target, tokens: Tensor, rows: Tensor, is_row: Tensor, trees: Sequence[DraftTree]
) -> list[Judgement]:
    """Judge each of `trees` (b P, N), which stand behind the `rows` (b, P) of sequences (b, n).

    A tree's root is the token after its row. What is said of trees where `is_row` (b, P) is False
    means nothing.
    """
    roots, n = rows + 1, tokens.shape[1]
    first, last = int(roots.where(is_row, n).min()), int(roots.where(is_row, 0).max())
    tree, places = forest(tokens[:, first : last + 1], roots - first, is_row, trees)
    cache, _ = target.prefill(tokens[:, :first].tolist(), first + tree.tokens.shape[1])
    probs, choices = _read(target.verify(cache, tree).logits, places, trees)
    pairs = zip(probs.unbind(1), choices.unbind(1), strict=True)
    return [Judgement(*(part.flatten(0, 1) for part in pair)) for pair in pairs]


def _read(logits: Tensor, places: Tensor, trees: Sequence[DraftTree]) -> tuple[Tensor, Tensor]:
    """Probability of each node and the target's choice after it, both like `places` (b, S, P, N).

    `logits` (b, nodes, V) are of the forest that `places` point into.
    """
    tokens, parents = _by_position(trees, len(logits))
    above = places.gather(-1, parents.clamp_min(0)).clamp_min(0)
    probs, choices = torch.zeros_like(tokens, dtype=torch.float), torch.zeros_like(tokens)
    for i, narrow in enumerate(logits):
        wide = narrow.float()  # sequence by sequence: it takes most of the memory
        own = wide[above[i], tokens[i]] - wide.logsumexp(-1)[above[i]]
        probs[i], choices[i] = own.exp(), most_probable(wide)[places[i].clamp_min(0)]
    return probs, choices


def _by_position(trees: Sequence[DraftTree], b: int) -> tuple[Tensor, Tensor]:
    """Tokens and parents (b, len(trees), P, N) of trees (b P, N) each."""
    parts = [(tree.tokens, tree.parents) for tree in trees]
    tokens, parents = (
        torch.stack([part.unflatten(0, (b, -1)) for part in one], 1)
        for one in zip(*parts, strict=True)
    )
    return tokens, parents
