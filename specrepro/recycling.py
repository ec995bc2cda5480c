"""Drafters that nobody trained, from the target's own guesses: Token Recycling and Lookahead.

What the target predicted at the nodes of the last trees makes the next one: beside the tokens that
it chose, the best few after each token (Token Recycling), or whole n-grams that it guessed ahead of
the text (Lookahead decoding). Text alone does not tell what they draft, so there is no replay.

Reproduced: both methods' state, its update and the default sizes.
Not reproduced: how they accept; the shared verification does that, so both are lossless at any
temperature. Departures stand with each class.

How long state lives is the same as for the drafters of `ngram`: one call of `decode`, or with
`carries=True` until `reset()`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specrepro.decoding import Drafter, Verdict, most_probable
from specrepro.draft_tree import PADDING, ROOT, DraftTree
from specrepro.ngram import Draft, stack
from specrepro.target_model import Scores, Target

# --- Token Recycling (arXiv:2408.08696)

# children of each node of a level, in order, zeros at the end left out: 8, 21, 25, 15, 8, 3 nodes
RECYCLING_TREE = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1),
    (2, 0, 0, 1),
)


@dataclass(frozen=True, slots=True)
class RecyclingConfig:
    """Token Recycling's sizes (version 2.2.2 of the released tree)."""

    num_candidates: int = 8  # kept after each token
    tree: tuple[tuple[int, ...], ...] = RECYCLING_TREE

    def __post_init__(self) -> None:
        most = max(map(max, self.tree))
        if most > self.num_candidates:
            raise ValueError(f"{most} children but {self.num_candidates} candidates for them")


def _levels(tree: Sequence[Sequence[int]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Parent node ids and ranks among siblings, level by level."""
    levels, first, size = [], 0, 1
    for counts in tree:
        pairs = [(first + i, rank) for i, count in enumerate(counts) for rank in range(count)]
        parents, ranks = torch.tensor(pairs, device=device).unbind(1)
        levels.append((parents, ranks))
        first, size = first + size, len(pairs)
    return levels


def top_ids(logits: Tensor, k: int, depth: int = 64) -> Tensor:
    """The k best tokens (..., k) of logits (..., V), best first; `depth` is a multiple of 8.

    Tokens a fixed stride apart form `V // depth` groups, and the k with the highest maxima hold
    the best; `topk` over all tokens would take a CPU longer than the rest of the round.
    """
    V, stride = logits.shape[-1], logits.shape[-1] // depth
    if stride <= k:
        return logits.float().topk(k, -1).indices
    groups = _best_groups(logits[..., : depth * stride], k, stride)[..., None]
    inside = (groups + stride * torch.arange(depth, device=logits.device)).flatten(-2)
    beyond = torch.arange(depth * stride, V, device=logits.device)
    ids = torch.cat([inside, beyond.expand(*logits.shape[:-1], -1)], -1)
    places = logits.gather(-1, ids).float().topk(k, -1).indices
    return ids.gather(-1, places)


def _best_groups(logits: Tensor, k: int, stride: int) -> Tensor:
    """The k groups (..., k) of logits (..., depth * stride) with the highest maxima.

    Read as whole numbers, the bits of two halves are ordered as the halves are, unless both are
    negative: a CPU compares numbers in half the time, and where k maxima are positive none of the
    others counts.
    """
    if logits.element_size() == 2 and logits.device.type == "cpu":
        maxima = _maxima(logits.view(torch.int16), stride).view(logits.dtype)
        best = maxima.float().topk(k, -1)
        if (best.values > 0).all():
            return best.indices
    return _maxima(logits, stride).float().topk(k, -1).indices


def _maxima(x: Tensor, stride: int) -> Tensor:
    """(..., stride) maxima of elements that are multiples of `stride` apart, in two steps.

    A CPU takes longer over one step, whose many rows do not fit its cache.
    """
    return x.unflatten(-1, (8, -1)).amax(-2).unflatten(-1, (-1, stride)).amax(-2)


class TokenRecycling:
    """Token Recycling: the target's own second choices, kept after each token, make the next tree.

    What is carried: a matrix (V, 8) per sequence of the best ids that last followed each token, in
    the order that the target gave them. The paper's is one matrix for all (`shares`) and never
    reset.
    Departs: a token not seen yet has no candidates, where the reference drafts token 0. Where
    tokens repeat in a tree, the deepest on the accepted path is written, else the last node; the
    reference leaves that to the order of the device's writes. Of sequences that share, the last
    goes first.
    """

    def __init__(
        self, config: RecyclingConfig | None = None, carries: bool = False, shares: bool = False
    ):
        self.config, self.carries, self.shares = config or RecyclingConfig(), carries, shares
        self.max_nodes = 1 + sum(map(sum, self.config.tree))
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt from earlier calls."""
        self.matrix: Tensor | None = None  # (B, V, k) int32, -1 where nothing is known

    def state(self) -> dict[str, Tensor]:
        """What `reset` would forget; later calls do not change it."""
        return {} if self.matrix is None else {"matrix": self.matrix}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Know what was known when `state` was taken."""
        self.matrix = state.get("matrix")

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        if not self.carries:
            self.reset()
        B, vocab_size = len(roots), scores.logits.shape[-1]
        k, num_matrices = self.config.num_candidates, 1 if self.shares else B
        nothing = roots.new_empty(0, vocab_size, k)
        old = nothing if self.matrix is None else self.matrix.to(roots.device)
        new = roots.new_full((max(num_matrices - len(old), 0), vocab_size, k), -1)
        self.matrix = torch.cat([old, new]).int()
        self.levels = _levels(self.config.tree, roots.device)
        rows = torch.arange(B, device=roots.device)
        self.roots, self.rows = roots, torch.zeros_like(rows) if self.shares else rows
        last = DraftTree.root_only(prompts.gather(1, lengths[:, None] - 1)[:, 0])
        self._keep(last, torch.zeros_like(last.tokens), scores)

    def propose(self) -> DraftTree:
        tokens, parents = self.roots[:, None], torch.full_like(self.roots[:1], ROOT)
        for level_parents, ranks in self.levels:
            before = tokens[:, level_parents]
            drafted = self.matrix[self.rows[:, None], before.clamp_min(0), ranks].long()
            tokens = torch.cat([tokens, drafted.where(before >= 0, -1)], 1)
            parents = torch.cat([parents, level_parents])
        self.tree = without_unknown(tokens, parents.expand_as(tokens))
        return self.tree

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self._keep(self.tree, verdict.path, scores)
        self.roots = verdict.bonus

    def select(self, rows: Tensor) -> None:
        self.roots, self.rows = self.roots[rows], self.rows[rows]

    def _keep(self, tree: DraftTree, path: Tensor, scores: Scores) -> None:
        """Write the best ids at each token's last writer."""
        row, node = is_last_writer(tree, path, self.shares).nonzero(as_tuple=True)
        best = top_ids(scores.logits, self.config.num_candidates).int()
        self.matrix[self.rows[row], tree.tokens[row, node]] = best[row, node]


def without_unknown(tokens: Tensor, parents: Tensor) -> DraftTree:
    """The tree of the nodes with a token, of (B, N) nodes of which some have -1; all below do."""
    is_node = tokens >= 0
    if is_node.all():
        return DraftTree(tokens, parents)
    order = (~is_node).int().argsort(dim=1, stable=True)[:, : int(is_node.sum(1).max())]
    new_ids = is_node.cumsum(1) - 1
    parents = parents.gather(1, order)
    parents = new_ids.gather(1, parents.clamp_min(0)).where(parents >= 0, ROOT)
    is_kept = is_node.gather(1, order)
    return DraftTree(tokens.gather(1, order).clamp_min(0), parents.where(is_kept, PADDING))


def is_last_writer(tree: DraftTree, path: Tensor, shares: bool = False) -> Tensor:
    """(B, N) bool: the one node of its token that counts, on the accepted path where one is.

    With `shares`, of all rows' nodes together, the last row's going first.
    """
    B, N = tree.tokens.shape
    order = torch.arange(N, device=path.device).repeat(B, 1)
    on_path = torch.zeros_like(tree.is_node).scatter(1, path.clamp_min(0), True)
    order, tokens, is_node = order + N * on_path, tree.tokens, tree.is_node
    if shares:
        order = order + 2 * N * torch.arange(B, device=path.device)[:, None]
        order, tokens, is_node = (x.reshape(1, -1) for x in (order, tokens, is_node))
    same = (tokens[:, :, None] == tokens[:, None]) & is_node[:, None]
    last = torch.where(same, order[:, None], -1).amax(2)
    return ((order == last) & is_node).view(B, N)


# --- Lookahead decoding (arXiv:2402.02057)


@dataclass(frozen=True, slots=True)
class LookaheadConfig:
    """Lookahead decoding's sizes for a 7B target, as SpecTTS-Bench runs it."""

    level: int = 5  # N: tokens of an n-gram
    window: int = 7  # W: columns that grow n-grams side by side
    num_guesses: int = 7  # G: n-grams kept after a token, and drafted
    pool_from_prompt: bool = False  # start with the n-grams of the prompt
    seed: int = 10  # of the first row, tokens of the prompt drawn at random

    def __post_init__(self) -> None:
        if self.level < 3 or self.window < 1 or self.num_guesses < 1:
            raise ValueError(f"needs level >= 3, window >= 1 and num_guesses >= 1, not {self}")

    @property
    def max_nodes(self) -> int:
        """Of a full window with its guesses, or of a wider one on the way there."""
        N, W = self.level, self.window
        filling = max(n * (W + N - 1 - n) for n in range(1, N - 1))
        return max(filling, (N - 1) * (W + self.num_guesses))


class Pool:
    """The last n-grams seen after each token, the newest at the end."""

    def __init__(self, num_guesses: int):
        self.num_guesses = num_guesses
        self.guesses: dict[int, list[tuple[int, ...]]] = {}

    def add(self, token: int, following: tuple[int, ...]) -> None:
        guesses = self.guesses.setdefault(token, [])
        if following in guesses:
            guesses.remove(following)
        guesses.append(following)
        del guesses[: -self.num_guesses]


class Window:
    """The Jacobi window of one sequence: rows of guesses, each a token further ahead.

    Row 0 follows the root as a chain. The tokens of a column in the rows above follow that chain's
    token in the column, so the window and its mask are branches of a draft tree: a cell sees the
    chain up to its column, then its own column, and no two branches with one prefix are needed.
    """

    def __init__(self, config: LookaheadConfig, pool: Pool, prompt: list[int], root: int):
        self.config, self.pool, self.root = config, pool, root
        rng, length = random.Random(config.seed), config.window + config.level - 3
        self.rows = [[rng.choice(prompt) for _ in range(length)]]
        if config.pool_from_prompt:
            for start in range(len(prompt) - config.level + 1):
                first, *following = prompt[start : start + config.level]
                pool.add(first, tuple(following))

    @property
    def is_full(self) -> bool:
        return len(self.rows) == self.config.level - 1

    def draft(self) -> Draft:
        """Window and guesses as one tree; `self.nodes` are those whose successors come next."""
        draft, self.ids = Draft.root(self.root), {}
        chain = [0]
        for token in self.rows[0]:
            chain.append(self._child(draft, chain[-1], token))
        tops = chain[1:] if len(self.rows) == 1 else chain
        for row in self.rows[1:]:
            tops = [self._child(draft, n, token) for n, token in zip(tops, row, strict=True)]
        self.nodes = tops
        for guess in self.pool.guesses.get(self.root, []) if self.is_full else []:
            node = 0
            for token in guess:
                node = self._child(draft, node, token)
            draft.source = "pool"
        return draft

    def observe(self, predicted: list[int], root: int) -> None:
        """Take in the target's choices at `self.nodes`, and the root of the next tree."""
        if not self.is_full:
            cut = predicted if len(self.rows) == 1 else predicted[1:]
            self.rows = [*(row[1:] for row in self.rows), cut]
        else:
            columns = zip([self.root, *self.rows[0]], *self.rows[1:], predicted, strict=True)
            for first, *following in columns:
                self.pool.add(first, tuple(following))
            self.rows = [self.rows[1][1:], *self.rows[2:], predicted]
        self.root = root

    def _child(self, draft: Draft, parent: int, token: int) -> int:
        """The node of `token` below `parent`, shared by all branches with that prefix."""
        if (parent, token) not in self.ids:
            self.ids[parent, token] = len(draft.tokens)
            draft.tokens.append(token)
            draft.parents.append(parent)
        return self.ids[parent, token]


class Lookahead:
    """Lookahead decoding: n-grams that the target itself guessed ahead of the text.

    What is carried: the pool of n-grams; the window starts anew with each call.
    The window's nodes are verified like any others: one that happens to be right is accepted too.
    Departs: a guess that matches in full is accepted in full, where the reference counts one token
    less.
    """

    def __init__(self, config: LookaheadConfig | None = None, carries: bool = False):
        self.config, self.carries = config or LookaheadConfig(), carries
        self.max_nodes = self.config.max_nodes
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt from earlier calls."""
        self.pools: list[Pool] = []

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        if not self.carries:
            self.reset()
        num_missing = max(len(roots) - len(self.pools), 0)
        self.pools += [Pool(self.config.num_guesses) for _ in range(num_missing)]
        self.device = roots.device
        texts = zip(prompts.tolist(), lengths.tolist(), roots.tolist(), strict=True)
        self.windows = [
            Window(self.config, pool, prompt[:length], root)
            for pool, (prompt, length, root) in zip(self.pools, texts, strict=False)
        ]

    def propose(self) -> DraftTree:
        return stack([window.draft() for window in self.windows], self.device)

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        for row, (window, root) in enumerate(
            zip(self.windows, verdict.bonus.tolist(), strict=True)
        ):
            predicted = most_probable(scores.logits[row, window.nodes]).tolist()
            window.observe(predicted, root)

    def select(self, rows: Tensor) -> None:
        self.windows = [self.windows[i] for i in rows.tolist()]


DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "Recycling": lambda target: TokenRecycling(),
    "Lookahead": lambda target: Lookahead(),
}
