"""Hybrid drafters: what was said before where it is likely to go on, a draft head everywhere else.

SAM[EAGLE-3] follows SAM-Decoding (arXiv:2411.10666) in the sizes of SpecTTS-Bench
(arXiv:2509.04474): a match of five tokens is copied. Suffix[EAGLE-3] follows SuffixDecoding
(arXiv:2411.04975): a draft is taken that expects as many tokens as the head drafts levels.

Reproduced: both rules and their sizes; the head's state after rounds that it sat out is exact: it
takes in every round that the other side drafted before it drafts again.
Not reproduced: the reference's shortcut of dropping all but the last 40 of more than 80 such rows.
Departs: a copy is not padded with token 0 to 40 nodes; in a batch every sequence chooses for
itself, and the head runs where at least one has chosen it.

`replay` tells from recorded ids what any rule would have accepted, and `oracle` what no rule can
beat. What the head would have accepted at every place of an answer takes one pass of the target and
a draft a place (`head_acceptance`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from specrepro import eagle3, ngram
from specrepro.decoding import Drafter, Verdict
from specrepro.draft_tree import PADDING, DraftTree
from specrepro.ngram import Draft, Sam, SamConfig, SuffixConfig, SuffixDecoding, TextDrafter, stack
from specrepro.target_model import Scores, Target

HEAD = "head"  # the source of a round that the text side left to the head
SAM_THRESHOLD = 5  # matched tokens from which the copy is taken
SAM_CONFIG = SamConfig(length_bias=5, fills=True)


class Hybrid:
    """Drafts from text where the score of that draft reaches `threshold`, else with a head.

    The head must bear to observe rounds that it was not asked to draft, as EAGLE's do.
    """

    def __init__(self, text: TextDrafter, head: Drafter, threshold: float):
        self.text, self.head, self.threshold = text, head, threshold

    @property
    def max_nodes(self) -> int:
        return max(self.text.max_nodes, self.head.max_nodes)

    def reset(self) -> None:
        """Forget what was learnt from earlier calls."""
        self.text.reset()

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.text.begin(prompts, lengths, roots, scores)
        self.head.begin(prompts, lengths, roots, scores)

    def propose(self) -> DraftTree:
        drafts = self.text.drafts()
        takes_text = [draft.score >= self.threshold for draft in drafts]
        pairs = list(zip(drafts, takes_text, strict=True))
        self.sources = [draft.source if takes else HEAD for draft, takes in pairs]
        # a draft that is not taken must not widen the tree of the others
        copies = [draft if takes else Draft.root(draft.tokens[0]) for draft, takes in pairs]
        if all(takes_text):
            return stack(copies, self.text.device)
        tree = self.head.propose()
        if not any(takes_text):
            return tree
        device = tree.tokens.device
        return row_by_row(torch.tensor(takes_text, device=device), stack(copies, device), tree)

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.text.observe(verdict, scores)
        self.head.observe(verdict, scores)

    def select(self, rows: Tensor) -> None:
        self.text.select(rows)
        self.head.select(rows)


def row_by_row(takes_first: Tensor, first: DraftTree, second: DraftTree) -> DraftTree:
    """Trees of `first` where `takes_first` (B,) says so, else of `second`."""
    width, is_first = max(first.tokens.shape[1], second.tokens.shape[1]), takes_first[:, None]
    first, second = _widened(first, width), _widened(second, width)
    return DraftTree(
        torch.where(is_first, first.tokens, second.tokens),
        torch.where(is_first, first.parents, second.parents),
    )


def _widened(tree: DraftTree, width: int) -> DraftTree:
    missing = (0, width - tree.tokens.shape[1])
    return DraftTree(F.pad(tree.tokens, missing), F.pad(tree.parents, missing, value=PADDING))


def sam_hybrid(
    head: Drafter, carries: bool = False, threshold: float = SAM_THRESHOLD, shares: bool = False
) -> Hybrid:
    """SAM[head]: copies of 40 tokens behind a match of at least `threshold`."""
    return Hybrid(Sam(SAM_CONFIG, carries=carries, shares=shares), head, threshold)


def suffix_hybrid(
    head: eagle3.Drafter,
    carries: bool = False,
    threshold: float | None = None,
    config: SuffixConfig | None = None,
) -> Hybrid:
    """Suffix[head]: drafts that expect at least as many tokens as the head drafts levels."""
    threshold = head.tree.depth + 1 if threshold is None else threshold
    return Hybrid(SuffixDecoding(config, carries=carries), head, threshold)


# --- replay


@dataclass(frozen=True, slots=True)
class Round:
    """What one replayed round drafted from, and how many tokens of it are the target's."""

    source: str
    accepted: int


Takes = Callable[[Draft], bool]  # whether a text draft is taken, before anybody knows what is right


def above(threshold: float) -> Takes:
    """The rule of a `Hybrid`."""
    return lambda draft: draft.score >= threshold


def replay(
    prompt: Sequence[int],
    answer: Sequence[int],
    text: TextDrafter,
    head_accepted: Mapping[int, int],
    takes_text: Takes,
    forced: Collection[int] = (),
) -> list[Round]:
    """The rounds of greedy decoding with a hybrid, from the ids of one answer.

    `head_accepted` has, at every place of the answer where the head may be asked, how much of its
    draft is right: from `head_acceptance`, or from a record of the very same hybrid. Accepts what
    decoding does, but for what a last round accepted beyond the end of the answer. A text drafter
    that carries goes on from turn to turn.
    """
    sources: list[str] = []

    def decide(place: int, draft: Draft, num_right: int) -> int:
        is_text = takes_text(draft)
        sources.append(draft.source if is_text else HEAD)
        return num_right if is_text else head_accepted[place]

    accepted = ngram.replay(prompt, answer, text, forced, decide)
    return [Round(*pair) for pair in zip(sources, accepted, strict=True)]


def oracle(
    prompt: Sequence[int],
    answer: Sequence[int],
    text: TextDrafter,
    head_accepted: Mapping[int, int],
    forced: Collection[int] = (),
) -> list[Round]:
    """The fewest rounds that any switch between the two sides could take: a bound for all rules.

    It knows what both have right at every place; the text side reads the answer token by token.
    """
    from_text = text_acceptance(prompt, answer, text, forced)
    end, num_left, best = len(answer), {}, {}
    for place in range(end - 1, 0, -1):
        sides = (from_text[place], Round(HEAD, head_accepted[place]))
        best[place] = min(sides, key=lambda one: num_left.get(place + one.accepted + 1, 0))  # noqa: B023
        num_left[place] = 1 + num_left.get(place + best[place].accepted + 1, 0)
    rounds, place = [], 1
    while place < end:
        rounds.append(best[place])
        place += best[place].accepted + 1
    return rounds


def text_acceptance(
    prompt: Sequence[int], answer: Sequence[int], text: TextDrafter, forced: Collection[int] = ()
) -> dict[int, Round]:
    """What a text drafter drafts from at every place of an answer, and has right."""
    found: dict[int, Round] = {}

    def decide(place: int, draft: Draft, num_right: int) -> int:
        found[place] = Round(draft.source, num_right)
        return 0

    ngram.replay(prompt, answer, text, forced, decide)
    return found


@torch.inference_mode()
def head_acceptance(
    target: Target,
    head: Drafter,
    prompt: Sequence[int],
    answer: Sequence[int],
    forced: Collection[int] = (),
) -> dict[int, int]:
    """How many drafted tokens a head would have right at every place of a recorded answer.

    The head reads the answer a token a round, with the target's states from one pass over all of
    it; in half precision they may round to other drafts than decoding saw.
    """
    ids = torch.tensor([[*prompt, *answer]], device=target.device)
    states, n = Scores(None, *target.features(ids)), len(prompt)
    length = torch.tensor([n], device=target.device)
    head.begin(ids[:, :n], length, ids[:, n], _at(states, 0, n))
    found = {}
    for place in range(1, len(answer)):
        tree = head.propose()
        draft = Draft(tree.tokens[0].tolist(), tree.parents[0].tolist())
        found[place] = draft.num_accepted(ngram.chosen_from(place, answer, forced))
        word = ids[:, n + place]
        one_token = Verdict(length[:, None] * 0, length * 0, word[:, None], word)
        head.observe(one_token, _at(states, n + place - 1, n + place))
    return found


def _at(states: Scores, start: int, end: int) -> Scores:
    return Scores(None, states.taps[:, start:end], states.hidden[:, start:end])


def tau(rounds: Sequence[Round], answer: Sequence[int]) -> float:
    """Tokens a round; the first token is the prefill's."""
    return (len(answer) - 1) / len(rounds)


def drafters(
    checkpoint: Path | str = eagle3.CHECKPOINT, carries: bool = False, **tree: int
) -> dict[str, Callable[[Target], Hybrid]]:
    """Loaders of both hybrids over an EAGLE-3 head; `tree` overrides its sizes where not 0."""
    load = eagle3.drafters(checkpoint, **tree)["EAGLE-3"]
    return {
        "SAM[EAGLE-3]": lambda target: sam_hybrid(load(target), carries),
        "Suffix[EAGLE-3]": lambda target: suffix_hybrid(load(target), carries),
    }


DRAFTERS = drafters()
