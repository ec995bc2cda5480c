"""A drafter of trees that needs no training: it knows what will be said, and says so with doubts.

Like every drafter of trees it asks its `tree` for the shape of what it drafts, so that shapes can
be tested on real decoding, with trees whose confidences mean something.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specrepro.cost_table import PARTS, CostTable
from specrepro.draft_tree import DraftTree, Growth, Shape
from specrepro.replay import Trace, _Recorder, _stacked
from specrepro.tree_verify import Verdict, verify_greedy

OFF_TEXT = -1


class Foretelling:
    """Drafts distributions that favour the known continuation, at some places more than at others.

    Off the known text, and where nothing is known, a word is followed by words of its own.
    """

    def __init__(
        self,
        continuations: Sequence[Sequence[int]],
        vocab_size: int,
        tree: Shape | None = None,
        sharpness: float = 2.0,
        seed: int = 0,
    ):
        draws = torch.Generator().manual_seed(seed)
        self.tree, self.vocab_size = tree, vocab_size
        longest = max(map(len, continuations), default=0)
        self.text = torch.full((len(continuations), longest + 64), OFF_TEXT)
        for row, words in enumerate(continuations):
            self.text[row, : len(words)] = torch.tensor(list(words), dtype=torch.long)
        noise = torch.randn(vocab_size, vocab_size, generator=draws) * sharpness
        self.habits = noise.softmax(-1)
        self.trust = torch.rand(self.text.shape, generator=draws) ** 0.5

    @property
    def max_nodes(self) -> int:
        return self.tree.total_tokens

    def begin(self, prompts: Any, lengths: Tensor, roots: Tensor, scores: Any) -> None:
        self.roots, self.places = roots, torch.zeros_like(roots)
        self.rows = torch.arange(len(roots))

    def observe(self, verdict: Verdict, scores: Any) -> None:
        self.roots, self.places = verdict.bonus, self.places + verdict.num_accepted + 1

    def select(self, rows: Tensor) -> None:
        self.roots, self.places, self.rows = (x[rows] for x in (self.roots, self.places, self.rows))

    def verify(self, tree: DraftTree) -> Verdict:
        """What a target that says the text accepts."""
        columns = self.places[:, None] + 1 + tree.depths()
        return verify_greedy(tree, self.text[self.rows[:, None], columns])

    def propose(self) -> DraftTree:
        growth, places = Growth(self.roots), self.places[:, None]
        places = self._branch(growth, places, places)
        for _ in growth.descents(self.tree):
            places = self._branch(growth, places, places.gather(1, growth.ids))
        return self.tree.prune(growth)

    def _branch(self, growth: Growth, pool: Tensor, places: Tensor) -> Tensor:
        """Children of the frontier at `places` (B, f) of the text; the places of the whole pool."""
        following = torch.full_like(places, OFF_TEXT)
        trust = torch.zeros_like(places, dtype=torch.float)
        if len(self.text):
            columns = places.clamp(0, self.text.shape[1] - 2)
            following = self.text[self.rows[:, None], columns + 1]
            trust = self.trust[self.rows[:, None], columns]
        is_known = (places >= 0) & (following >= 0)
        trust = trust * is_known
        probs = self.habits[growth.tokens] * (1 - trust)[..., None]
        probs.scatter_add_(2, following.clamp_min(0)[..., None], trust[..., None])
        best = probs.topk(self.tree.top_k, -1)
        growth.branch(best.values.log(), best.indices)
        stays = is_known[..., None] & (best.indices == following[..., None])
        children = torch.where(stays, places[..., None] + 1, OFF_TEXT)
        return torch.cat([pool, children.flatten(1)], 1)


class Knowing(Foretelling):
    """The same for prompts that it knows, whatever the batch; of others it knows nothing."""

    def __init__(
        self, answers: dict[tuple[int, ...], list[int]], vocab_size: int, tree: Any = None
    ):
        super().__init__([[], *answers.values()], vocab_size, tree)
        self.known = {prompt: row for row, prompt in enumerate(answers, start=1)}

    def begin(self, prompts: Any, lengths: Tensor, roots: Tensor, scores: Any) -> None:
        super().begin(prompts, lengths, roots, scores)
        asked = [row[:n] for row, n in zip(prompts.tolist(), lengths.tolist(), strict=True)]
        self.rows = torch.tensor([self.known.get(tuple(prompt), 0) for prompt in asked])


def honest_traces(num: int, length: int, shape: Shape, seed: int = 0) -> list[Trace]:
    """Texts drawn from the very distributions drafted: confidences that are as good as their word.

    The favoured continuation is said as often as the drafter trusts it; else a habit is followed.
    """
    draws = torch.Generator().manual_seed(seed)
    favoured = torch.randint(5, 90, (num, length + 1), generator=draws)
    drafter = Foretelling(favoured.tolist(), 100)
    drafter.trust = 0.9 * torch.rand(drafter.text.shape, generator=draws) ** 0.5
    said = favoured.clone()
    for place in range(length):
        habit = torch.multinomial(drafter.habits[said[:, place]], 1, generator=draws)[:, 0]
        follows = torch.rand(num, generator=draws) < drafter.trust[:, place]
        said[:, place + 1] = torch.where(follows, favoured[:, place + 1], habit)
    recorder = _Recorder(drafter, shape)
    recorder.begin(None, None, said[:, 0], None)
    for place in range(length):
        recorder.propose()
        drafter.places, drafter.roots = drafter.places + 1, said[:, place + 1]
    common = ("chat", 0.0, 0, "tiny", "float32", 100, shape.depth, shape.top_k)
    names = ("prompts", "temperature", "seed", "target", "dtype", "context", "depth", "top_k")
    return [
        Trace(
            **dict(zip(names, common, strict=True)),
            prompt_id=str(row),
            tokens=words,
            **_stacked(pools),
        )
        for row, (words, pools) in enumerate(zip(said.tolist(), recorder.pools, strict=True))
    ]


def table_of(
    target: Any = None,
    level: Any = None,
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    bucket: int = 64,
    num_buckets: int = 2,
    num_tokens: int = 64,
    width: int = 10,
    **header: Any,
) -> CostTable:
    """A table from formulas: milliseconds `target`(batch, context, n) and `level`(...)."""
    import pandas as pd

    formulas = {
        "target": target or (lambda b, c, n: 10 + 0.2 * b * n),
        "level": level or (lambda b, c, n: 1 + 0.02 * b * n),
        "extend": lambda b, c, n: 1.5,
        "rest": lambda b, c, n: 0.25,
    }
    most = dict.fromkeys(PARTS, 1) | {"target": num_tokens, "level": width}
    points = [
        {"part": part, "batch": b, "context": k * bucket, "num_tokens": n, "value": value}
        for part, formula in formulas.items()
        for b in batches
        for k in range(1, num_buckets + 1)
        for n in range(1, most[part] + 1)
        for value in [formula(b, k * bucket, n)]
    ]
    return CostTable({"device": "formula", "dtype": "float32"} | header, pd.DataFrame(points))
