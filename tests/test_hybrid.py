"""Hybrids keep the target's words, their heads miss nothing, a replay tells what they accept."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from drafter_cases import OTHER_PROMPTS, PROMPT, assert_ragged_batch_decodes_as_each_alone
from scripted_drafters import FixedTree
from test_eagle3 import make_head
from test_losslessness_of_decoding import p_value, small_target  # noqa: F401
from test_ngram_decoding import STORE, looping_target  # noqa: F401
from torch import Tensor

from specrepro import eagle3, hybrid, ngram, target_model
from specrepro.decoding import Autoregressive, Generation, Thinking, decode
from specrepro.draft_tree import PADDING, DraftTree
from specrepro.eagle3 import TreeConfig
from specrepro.hybrid import Hybrid, above, row_by_row
from specrepro.ngram import Draft, Sam, SamConfig, StaticTexts, SuffixDecoding
from specrepro.sessions import NotedSources
from specrepro.target_model import Target

PROMPTS = [[1, 2, 3, 4], [2, 5, 5], [4, 4, 1], [3]]
SAMPLINGS = [{"temperature": 0.0}, {"temperature": 0.6, "seed": 5}]
NUM_NEW = 40


def head_of(target: Target) -> eagle3.Drafter:
    """A head over the whole vocabulary with random weights, right now and then by chance."""
    return eagle3.Drafter(make_head(target, target.vocab_size), target, TreeConfig(2, 3, 8))


def sam(target: Target, carries: bool = False, threshold: float = 4) -> Hybrid:
    return hybrid.sam_hybrid(head_of(target), carries, threshold)


def suffix(target: Target, carries: bool = False) -> Hybrid:
    return hybrid.suffix_hybrid(head_of(target), carries)


MAKERS = {"SAM": sam, "suffix": suffix}


@pytest.fixture(scope="module")
def target(looping_target: Target) -> Target:  # noqa: F811
    return looping_target


def say(target: Target, drafter: object, prompts: list, **options: object) -> list[Generation]:
    return decode(target, drafter, prompts, NUM_NEW, **options)


# --- lossless


@pytest.mark.parametrize("options", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MAKERS)
def test_a_hybrid_says_what_the_target_says(
    name: str, batch: int, options: dict, target: Target
) -> None:
    expected = say(target, Autoregressive(), PROMPTS[:batch], **options)
    noted = NotedSources(MAKERS[name](target, carries=True))
    turns, sources = [], []
    for _ in range(2):
        turns.append(say(target, noted, PROMPTS[:batch], **options))
        sources += [source for own in noted.by_sequence for source in own]
    for generations in turns:
        assert [run.tokens for run in generations] == [run.tokens for run in expected]
    assert sources.count("head") > 1, "the head hardly drafted, so little was switched"
    assert len(sources) - sources.count("head") > 1, "the text side hardly drafted"
    assert sum(sum(run.accepted) for run in turns[1]) > 20 * batch


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_ragged_batch_chooses_row_by_row_and_decodes_as_each_alone(
    temperature: float,
    tiny_target_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = target_model.load(str(tiny_target_folder()), dtype="float32")
    asked = [PROMPT, *OTHER_PROMPTS]
    said = say(target, Autoregressive(), asked, temperature=temperature, seed=[0, 1, 2, 3])
    # two of the sequences are known: they are copied, and the head drafts for the others
    store = StaticTexts([[*asked[i], *said[i].tokens] for i in (0, 1)], 0)
    drafter, mixed = Hybrid(Sam(SamConfig(max_nodes=5), store), head_of(target), 3), []
    propose = drafter.propose

    def noting() -> DraftTree:
        tree = propose()
        tree.validate(target.vocab_size)
        mixed.append(0 < drafter.sources.count("head") < len(drafter.sources))
        return tree

    drafter.propose = noting
    assert_ragged_batch_decodes_as_each_alone(target, drafter, monkeypatch, temperature)
    assert sum(mixed) > 3, "hardly a round in which the sequences chose differently"


def test_whole_sequences_follow_the_target(
    small_target: Target,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("test_losslessness_of_decoding.NUM_RUNS", 3000)
    text = Sam(SamConfig(max_nodes=7), StaticTexts(STORE[:4], 4))
    head = FixedTree([0, 1, 2, 0, 3, 1], [0, 0, 0, 1, 1, 2])
    drafter = NotedSources(Hybrid(text, head, threshold=3))
    p = p_value(small_target, drafter, {"temperature": 0.6}, seed=90_000)
    first = [own[0] for own in drafter.by_sequence if own]
    assert 500 < first.count("head") < len(first) - 500, "one side drafted nearly everything"
    assert p > 1e-3, f"p = {p:.1e}: the sequences are not the target's"


# --- the head after rounds that it sat out


class Watched(Hybrid):
    """Beside the head, one that drafts in every round: both must draft the same bits."""

    def __init__(self, *arguments: object, always: eagle3.Drafter):
        super().__init__(*arguments)
        self.always, self.num_missed, self.runs = always, 0, []
        self.rng = random.Random(0)

    def begin(self, *arguments: Tensor) -> None:
        super().begin(*arguments)
        self.always.begin(*arguments)

    def propose(self) -> DraftTree:
        self.threshold = self.rng.choice((0, 0, math.inf))  # a draft, even an empty one, or none
        expected, tree = self.always.propose(), super().propose()
        if "head" not in self.sources:
            self.num_missed += 1
            return tree
        self.runs.append(self.num_missed)
        self.num_missed = 0
        assert torch.equal(self.head.lengths, self.always.lengths)
        committed = int(self.head.lengths)
        kept = [drafter.cache[:, :, :committed] for drafter in (self.head, self.always)]
        assert torch.equal(*kept), "the keys differ"
        assert torch.equal(tree.tokens, expected.tokens)
        assert torch.equal(tree.parents, expected.parents)
        return tree

    def observe(self, *arguments: object) -> None:
        super().observe(*arguments)
        self.always.observe(*arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_sat_out_rounds_drafts_what_one_that_did_not_drafts(
    dtype: str, tiny_target_folder: Callable[..., Path]
) -> None:
    target = target_model.load(str(tiny_target_folder("llama")), dtype=dtype)
    heads = [head_of(target) for _ in range(2)]
    watched = Watched(Sam(SamConfig(max_nodes=4), carries=True), heads[0], 3, always=heads[1])
    accepted = [max(decode(target, watched, PROMPTS[0], 60).accepted) for _ in range(2)]
    assert accepted[1] == 3, "no round was long"
    assert sum(run > 0 for run in watched.runs) > 9 and max(watched.runs) > 3, watched.runs


# --- which side drafts


class Silent:
    """A head that drafts a star of two, and counts how often it was asked."""

    max_nodes, num_asked = 3, 0

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: object) -> None:
        self.roots = roots

    def propose(self) -> DraftTree:
        self.num_asked += 1
        tokens = torch.stack([self.roots, self.roots * 0, self.roots * 0 + 1], 1)
        return DraftTree(tokens, torch.tensor([[-1, 0, 0]]).repeat(len(tokens), 1))


def begun(drafter: Hybrid, texts: list[list[int]]) -> Hybrid:
    lengths = torch.tensor([len(text) - 1 for text in texts])
    padded = [text[:-1] + [0] * (int(lengths.max()) - len(text) + 1) for text in texts]
    roots = torch.tensor([text[-1] for text in texts])
    drafter.begin(torch.tensor(padded), lengths, roots, None)
    return drafter


@pytest.mark.parametrize(("matched", "source"), [(4, "head"), (5, "own"), (6, "own")])
def test_sam_copies_from_a_match_of_five_tokens_on(matched: int, source: str) -> None:
    said = list(range(10, 70))
    text = [*said, 9, *said[20 - matched : 20]]
    drafter = begun(hybrid.sam_hybrid(Silent()), [text])
    tree = drafter.propose()
    assert (drafter.sources, drafter.head.num_asked) == ([source], source == "head")
    if source == "own":
        assert tree.tokens[0].tolist() == said[19:59], "a copy is 40 nodes, the root among them"


def test_a_static_match_counts_five_less() -> None:
    store = StaticTexts([list(range(10, 70))], 0)
    for matched, source in ((9, "head"), (10, "static")):
        drafter = Hybrid(Sam(hybrid.SAM_CONFIG, store), Silent(), hybrid.SAM_THRESHOLD)
        begun(drafter, [[1, *range(30, 30 + matched)]]).propose()
        assert drafter.sources == [source]


def test_a_suffix_draft_must_expect_what_the_head_drafts_in_levels(target: Target) -> None:
    assert suffix(target).threshold == 3  # depth 2
    # seen twice, and gone on with once: half of what was matched is expected
    for matched, source in ((5, "head"), (6, "local")):
        said = list(range(10, 30))
        drafter = Hybrid(SuffixDecoding(), Silent(), 3)
        begun(drafter, [[*said, 9, *said[8 - matched : 8]]]).propose()
        assert drafter.sources == [source]


class Fixed(ngram.TextDrafter):
    """Drafts the same in every round, whatever was read."""

    def __init__(self, *drafts: Draft):
        super().__init__(lambda: None, 40)
        self.fixed = list(drafts)

    def start(self, prompts: list, roots: list) -> None:
        pass

    def drafts(self) -> list[Draft]:
        return self.fixed


def test_a_draft_that_is_not_taken_widens_no_tree() -> None:
    short, long = Draft.chain([6, 1, 2, 3], 9, "own"), Draft.chain(list(range(30)), 4, "own")
    drafter = begun(Hybrid(Fixed(short, long), Silent(), 5), [[5, 6], [5, 0]])
    tree = drafter.propose()
    assert drafter.sources == ["own", "head"]
    assert tree.tokens.tolist() == [[6, 1, 2, 3], [0, 0, 1, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2], [-1, 0, 0, PADDING]]
    drafter = begun(Hybrid(Fixed(long, long), Silent(), 5), [[5, 0], [5, 0]])
    assert drafter.propose().tokens.shape == (2, 3)


def test_rows_come_from_one_tree_or_the_other() -> None:
    first = DraftTree.chain(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    second = DraftTree.root_only(torch.tensor([7, 8]))
    tree = row_by_row(torch.tensor([False, True]), first, second)
    assert tree.tokens.tolist() == [[7, 0, 0], [4, 5, 6]]
    assert tree.parents.tolist() == [[-1, PADDING, PADDING], [-1, 0, 1]]


# --- replay


def accepted_at(accepted: Sequence[int]) -> dict[int, int]:
    """What each round accepted, by the place in the answer that it drafted for."""
    found, place = {}, 1
    for num_accepted in accepted:
        found[place] = num_accepted
        place += num_accepted + 1
    return found


@pytest.mark.parametrize(
    "options",
    [*SAMPLINGS, {"thinking": Thinking(13, 6, (6, 0, 6))}],
    ids=["greedy", "sampled", "forced"],
)
@pytest.mark.parametrize("name", MAKERS)
def test_a_replay_accepts_what_decoding_did(name: str, options: dict, target: Target) -> None:
    online = MAKERS[name](target, carries=True)
    noted = NotedSources(online)
    offline = {known: MAKERS[name](target, carries=True).text for known in ("record", "profile")}
    for prompt, run in two_turns(target, noted, options):
        known = {
            "record": accepted_at(run.accepted),
            "profile": hybrid.head_acceptance(
                target, head_of(target), prompt, run.tokens, run.forced
            ),
        }
        for source, accepted in known.items():
            rule = above(online.threshold)
            rounds = hybrid.replay(prompt, run.tokens, offline[source], accepted, rule, run.forced)
            assert [one.source for one in rounds] == noted.by_sequence[0]
            found = [one.accepted for one in rounds]
            assert found[:-1] == run.accepted[:-1] and found[-1] <= run.accepted[-1]
    if "thinking" in options:
        assert run.forced, "nothing was forced"


def two_turns(
    target: Target, drafter: NotedSources, options: dict
) -> Iterator[tuple[list[int], Generation]]:
    """Prompt and answer; the second prompt ends like the first answer."""
    said: list[int] = []
    for _ in range(2):
        prompt = [*PROMPTS[0], *said[-6:]]
        run = decode(target, drafter, prompt, NUM_NEW, **options)
        said = run.tokens
        yield prompt, run


def test_no_rule_beats_the_oracle(target: Target) -> None:
    (run,) = say(target, Autoregressive(), PROMPTS[:1], temperature=0.4, seed=8)
    asked = PROMPTS[0], run.tokens
    heads = hybrid.head_acceptance(target, head_of(target), *asked)
    texts = hybrid.text_acceptance(*asked, Sam(hybrid.SAM_CONFIG))
    assert set(heads) == set(texts) == set(range(1, NUM_NEW)) and max(heads.values()) > 0
    best = hybrid.oracle(*asked, Sam(hybrid.SAM_CONFIG), heads)
    assert {one.source for one in best} >= {"own", "head"}
    place = 1
    for one in best:
        assert one.accepted == (heads[place] if one.source == "head" else texts[place].accepted)
        place += one.accepted + 1
    assert len(best) == fewest([heads, {p: one.accepted for p, one in texts.items()}])
    for threshold in range(12):
        rounds = hybrid.replay(*asked, Sam(hybrid.SAM_CONFIG), heads, above(threshold))
        assert hybrid.tau(best, run.tokens) >= hybrid.tau(rounds, run.tokens)


def fewest(sides: list[dict[int, int]]) -> int:
    """The fewest rounds of an answer, by going everywhere that any choices lead."""
    reached, num_rounds = {1}, 0
    while max(reached) < NUM_NEW:
        reached = {place + side[place] + 1 for place in reached for side in sides}
        num_rounds += 1
    return num_rounds


def test_the_longer_draft_is_not_always_the_better_one() -> None:
    """From place 3 the text copies all that is left, from place 4 nobody knows anything."""
    copies = {1: 1, 2: 0, 3: 6, 4: 0, 5: 0, 6: 0, 7: 0, 8: 0, 9: 0}

    class Known(ngram.TextDrafter):
        def __init__(self) -> None:
            super().__init__(lambda: None, 9)

        def start(self, prompts: list, roots: list) -> None:
            self.place, self.unread = 0, [[0]]

        def drafts(self) -> list[Draft]:
            self.place += len(self.unread[0])
            last, num = self.place - 1, copies[self.place]
            return [Draft.chain(list(range(last, last + num + 1)), num, "own")]

    heads = dict.fromkeys(copies, 0) | {1: 2}
    best = hybrid.oracle([5], list(range(10)), Known(), heads)
    assert [(one.source, one.accepted) for one in best] == [("own", 1), ("own", 6)]


def test_a_round_ends_before_what_was_forced() -> None:
    answer, sure = [1, 2, 3, 4, 5, 6, 7, 8], Draft([0, *range(2, 9)], list(range(-1, 7)))
    accepted = [sure.num_accepted(ngram.chosen_from(1, answer, forced)) for forced in ((), (4,))]
    assert accepted == [7, 2]  # two of the copy, and the third as the bonus: then the forced one
    assert ngram.chosen_from(4, answer, (4, 5)) == []
    assert ngram.chosen_from(6, answer, (4, 5)) == [7, 8]
