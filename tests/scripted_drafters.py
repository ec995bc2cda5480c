"""Drafters that know what the target will say and propose as much of it as a test wants."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from specrepro.draft_tree import PADDING, ROOT, DraftTree
from specrepro.target_model import Scores
from specrepro.tree_verify import Verdict


def said_by_generate(
    folder: str, prompts: Sequence[Sequence[int]], num_new: int
) -> list[list[int]]:
    """What `transformers.generate` says greedily after each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    said = [
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=num_new)[0]
        for prompt in prompts
    ]
    return [ids[len(prompt) :].tolist() for ids, prompt in zip(said, prompts, strict=True)]


class Scripted:
    """Grows trees that hold the known continuation of each sequence as often as `agreement` says.

    `is_bushy` hangs each node below any earlier one and varies the size from round to round, so
    that the trees of a batch are ragged; without it trees are chains of `num_nodes`.
    """

    def __init__(
        self,
        continuations: Sequence[Sequence[int]],
        num_nodes: int = 5,
        agreement: float = 1.0,
        is_bushy: bool = False,
        vocab_size: int = 100,
    ):
        self.continuations, self.vocab_size = continuations, vocab_size
        self.max_nodes, self.agreement, self.is_bushy = num_nodes, agreement, is_bushy

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.rng = random.Random(0)
        self.rows = list(range(len(roots)))
        self.emitted = [[root] for root in roots.tolist()]

    def propose(self) -> DraftTree:
        trees = [self._grow(row) for row in self.rows]
        missing = [self.max_nodes - len(tokens) for tokens, _ in trees]
        tokens = [t + [0] * m for (t, _), m in zip(trees, missing, strict=True)]
        parents = [p + [PADDING] * m for (_, p), m in zip(trees, missing, strict=True)]
        tree = DraftTree(torch.tensor(tokens), torch.tensor(parents))
        tree.validate(self.vocab_size)
        return tree

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        for row, tokens in zip(self.rows, verdict.tokens.tolist(), strict=True):
            self.emitted[row] += [token for token in tokens if token >= 0]

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]

    def size(self) -> int:
        """The nodes of the next tree, the root included."""
        return self.rng.randint(1, self.max_nodes) if self.is_bushy else self.max_nodes

    def _grow(self, row: int) -> tuple[list[int], list[int]]:
        ahead = self.continuations[row][len(self.emitted[row]) :]
        tokens, parents, agreed = [self.emitted[row][-1]], [ROOT], {0: 0}  # depth of right nodes
        for node in range(1, self.size()):
            parent = self.rng.randrange(node) if self.is_bushy else node - 1
            taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
            depth = agreed.get(parent, len(ahead))
            right = ahead[depth] if depth < len(ahead) else None
            if right is not None and right not in taken and self.rng.random() < self.agreement:
                agreed[node] = depth + 1
                tokens.append(right)
            else:
                tokens.append(self._any_token_but(taken | {right}))
            parents.append(parent)
        return tokens, parents

    def _any_token_but(self, excluded: set[int | None]) -> int:
        return self.rng.choice([t for t in range(self.vocab_size) if t not in excluded])


class Empty(Scripted):
    """Room for a draft in every tree, and nothing in it but the root."""

    def size(self) -> int:
        return 1


def drafters(continuations: Sequence[Sequence[int]]) -> dict[str, Scripted]:
    """Every kind of drafter there may be, from always right to always wrong, by name."""
    unknown = [[] for _ in continuations]
    return {
        "oracle": Scripted(continuations),
        "chain": Scripted(continuations, agreement=0.7),
        "bushy": Scripted(continuations, num_nodes=9, agreement=0.8, is_bushy=True),
        "random": Scripted(unknown, num_nodes=12, is_bushy=True),
        "adversary": Scripted(continuations, num_nodes=7, agreement=0.0, is_bushy=True),
        "empty": Empty(continuations),
    }


class FixedTree:
    """Hangs the same drafted nodes below the root in every round, whatever was said before."""

    def __init__(self, tokens: Sequence[int], parents: Sequence[int]):
        self.tokens, self.parents = torch.tensor([0, *tokens]), torch.tensor([ROOT, *parents])
        self.max_nodes = len(self.tokens)

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.roots = roots

    def propose(self) -> DraftTree:
        tokens = self.tokens.repeat(len(self.roots), 1)
        tokens[:, 0] = self.roots
        return DraftTree(tokens, self.parents.repeat(len(self.roots), 1))

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.roots = verdict.bonus

    def select(self, rows: Tensor) -> None:
        self.roots = self.roots[rows]
