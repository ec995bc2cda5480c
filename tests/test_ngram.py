"""What each drafter reads and drafts, without a target: against plain scans of the text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest

from specrepro.ngram import (
    DRAFTERS,
    Draft,
    LookupConfig,
    Pia,
    PiaConfig,
    PiaReader,
    PromptLookup,
    Rest,
    RestConfig,
    Sam,
    SamConfig,
    SamReader,
    StaticTexts,
    SuffixConfig,
    SuffixDecoding,
    TextDrafter,
    draft_suffix,
    grow,
    replay,
    stack,
)
from specrepro.suffix import SuffixArray, SuffixTree, Text

END = 0


def random_text(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randrange(1, vocab_size + 1) for _ in range(length)]


def repeating_text(rng: random.Random, length: int) -> list[int]:
    """Ten phrases of a large vocabulary over and over, with a slip now and then."""
    phrases, text = [random_text(rng, 12, 90_000) for _ in range(10)], []
    while len(text) < length:
        text += [
            t if rng.random() < 0.97 else rng.randrange(1, 90_000) for t in rng.choice(phrases)
        ]
    return text[:length]


def paths(draft: Draft) -> list[tuple[int, ...]]:
    """The tokens from below the root to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*found[parent], token) if parent >= 0 else ())
    return found


def draft_after(drafter: TextDrafter, text: Sequence[int]) -> Draft:
    drafter.start([list(text[:-1])], [text[-1]])
    return drafter.drafts()[0]


def every_text_drafter(texts: Sequence[Sequence[int]], carries: bool) -> dict[str, TextDrafter]:
    """Each kind of drafter, those with a store holding `texts`."""
    return {
        "PLD": PromptLookup(),
        "PLD, any match": PromptLookup(LookupConfig(require_full=False, occurrence="last")),
        "SAM": Sam(carries=carries),
        "SAM, filled": Sam(SamConfig(max_nodes=12, fills=True), carries=carries),
        "SAM, static": Sam(store=StaticTexts(texts, END), carries=carries),
        "SuffixDecoding": SuffixDecoding(carries=carries),
        "SuffixDecoding, tree": SuffixDecoding(SuffixConfig(is_tree=True), carries=carries),
        "PIA": Pia(carries=carries),
        "REST": Rest(SuffixArray.of(texts)),
    }


NAMES = tuple(every_text_drafter([[1]], carries=False))


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_is_a_tree_of_known_tokens_within_its_size(name: str) -> None:
    rng = random.Random(0)
    store, text = [repeating_text(rng, 200) for _ in range(3)], repeating_text(rng, 400)
    text = store[0][:100] + text
    drafter, known = every_text_drafter(store, True)[name], {END, *text, *sum(store, [])}
    drafter.start([text[:50], text[20:30]], [text[50], text[30]])
    drafted = 0
    for place in range(51, len(text) - 2, 2):
        tree = drafter.propose()
        tree.validate()
        assert tree.tokens.shape[1] <= drafter.max_nodes
        assert tree.tokens[:, 0].tolist() == [text[place - 1], text[place - 21]]
        assert set(tree.tokens.flatten().tolist()) <= known
        for draft in drafter.drafted:
            assert (draft.source == "none") == (len(draft.tokens) == 1)
        drafted += int(tree.num_nodes.sum()) - 2
        drafter.unread = [text[place : place + 2], text[place - 20 : place - 18]]
    assert drafted > 200, f"only {drafted} tokens were drafted"


def test_replay_counts_what_the_drafts_have_right() -> None:
    text = [1, 2, 3, 4, 5] * 8
    # a copy ends where the text does: with the root, five tokens behind its end
    assert replay(text[:7], [*text[7:20], 9, 9], Sam()) == [5, 5, 0, 0]
    assert replay(text[:7], text[7:16], Sam()) == [5, 2], "the answer ends inside the copy"
    tree = Draft([7, 1, 2, 3, 4], [-1, 0, 0, 2, 2])
    accepted = [tree.num_accepted(answer) for answer in ([1, 3], [2, 4, 1], [2, 3], [5], [])]
    assert accepted == [1, 2, 2, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_emitted_is_read_once(name: str) -> None:
    text = repeating_text(random.Random(0), 300)
    drafter = every_text_drafter([text[:50]], carries=False)[name]
    drafter.start([text[:120]], text[120:121])
    drafter.unread[0] += text[121:140]
    assert drafter.drafts() == drafter.drafts()


def test_a_batch_of_drafts_is_padded_to_the_largest() -> None:
    tree = stack([Draft.root(5), Draft([7, 1, 2], [-1, 0, 0])])
    assert tree.tokens.tolist() == [[5, 0, 0], [7, 1, 2]]
    assert tree.parents.tolist() == [[-1, -2, -2], [-1, 0, 0]]


def test_a_tree_grows_by_its_most_probable_node() -> None:
    shares = {"": [(0.6, 1, "a"), (0.4, 2, "b")], "a": [(0.5, 3, "aa"), (0.5, 4, "ab")]}

    def successors(state: str, probability: float) -> list[tuple[float, int, str]]:
        return [(probability * p, token, to) for p, token, to in shares.get(state, [])]

    draft = grow(9, "", successors, 4, "test")
    assert (draft.tokens, draft.parents) == ([9, 1, 2, 3], [-1, 0, 0, 1])
    assert draft.score == pytest.approx(0.6 + 0.4 + 0.3)
    assert grow(9, "", successors, 9, "test", max_width=1).tokens == [9, 1, 3]


# --- prompt lookup


def scan(text: list[int], config: LookupConfig) -> list[int]:
    """Prompt lookup by trying every window."""
    L = len(text)
    for n in range(config.max_n, config.min_n - 1, -1):
        starts = [i for i in range(L - n) if text[i : i + n] == text[L - n :]]
        if config.require_full:
            starts = [i for i in starts if i + n + config.num_tokens <= L]
        if starts:
            end = starts[0 if config.occurrence == "first" else -1] + n
            return text[end : end + config.num_tokens]
    return []


@pytest.mark.parametrize("min_n", [1, 2])
@pytest.mark.parametrize(
    ("require_full", "occurrence"), list(product([True, False], ["first", "last"]))
)
def test_prompt_lookup_is_a_scan(require_full: bool, occurrence: str, min_n: int) -> None:
    rng, num_found = random.Random(0), 0
    config = LookupConfig(3, min_n, 4, require_full, occurrence)
    drafter = PromptLookup(config)
    for _ in range(500):
        text = random_text(rng, rng.randint(2, 25), rng.randint(1, 9))
        draft, expected = draft_after(drafter, text), scan(text, config)
        assert draft.tokens == [text[-1], *expected], text
        num_found += bool(expected)
    assert 50 < num_found < 500


def test_prompt_lookup_reads_on() -> None:
    rng, drafter = random.Random(0), PromptLookup()
    text = random_text(rng, 600, 3)
    drafter.start([text[:3]], [text[3]])
    for end in range(4, 600, 5):
        assert drafter.drafts()[0].tokens[1:] == scan(text[:end], LookupConfig())
        drafter.unread = [text[end : end + 5]]


@pytest.mark.parametrize("options", [{"occurrence": "middle"}, {"min_n": 4}, {"num_tokens": 0}])
def test_a_lookup_that_makes_no_sense_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        LookupConfig(**options)


# --- SAM


@pytest.mark.parametrize(("alpha", "size"), [(4.0, 9), (1.5, 4), (0.4, 1)])
def test_sam_copies_as_much_as_the_match_is_long(alpha: float, size: int) -> None:
    text = [1, 2, *range(10, 40), 1, 2]
    draft = draft_after(Sam(SamConfig(alpha=alpha)), text)
    assert draft.tokens == [2, *range(10, 10 + size - 1)]
    assert draft.score == 2
    assert draft_after(Sam(), [*text, 50]).tokens == [50]


def test_a_filled_copy_prefers_the_match_that_fills_it() -> None:
    text = [1, 2, *range(10, 20), 9, 1, 2, 7, 9, 1, 2]
    assert draft_after(Sam(SamConfig(max_nodes=5)), text).tokens == [2, 7, 9, 1, 2]
    filled = draft_after(Sam(SamConfig(max_nodes=9, fills=True)), text)
    assert filled.tokens == [2, *range(10, 18)]
    shorter = draft_after(Sam(SamConfig(max_nodes=30, fills=True)), text)
    assert shorter.tokens == [2, 7, 9, 1, 2], "no match fills it, so the longest is copied"


def test_a_static_match_drafts_the_likeliest_tree() -> None:
    store = StaticTexts([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 4]], END)
    draft = draft_after(Sam(store=store), [1, 5, 6])
    assert draft.source == "static" and draft.score == 2
    assert paths(draft)[1:3] == [(7,), (4,)]  # seen 2 and 1 times
    assert set(paths(draft)) >= {(7, 8), (7, 9), (4, END)}


@pytest.mark.parametrize(("bias", "source"), [(0, "static"), (1, "own")])
def test_a_static_match_must_be_longer_by_the_bias(bias: int, source: str) -> None:
    config, store = SamConfig(length_bias=bias), StaticTexts([[4, 5, 6, 7]], END)
    reader = SamReader(config, store)
    reader.begin([5, 6, 9, 4, 5])
    reader.read([6])
    assert reader.own.match[1] == 2 and reader.static[1] == 3
    assert reader.draft().source == source
    assert reader.match_length == 3 - bias


# --- SuffixDecoding


def best_path(text: list[int], config: SuffixConfig) -> tuple[list[int], float]:
    """The best-scored path of any matched suffix, from the counts of all substrings."""
    D, vocabulary = config.max_depth, sorted(set(text))
    counts = Counter(
        tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, min(len(text), i + D) + 1)
    )
    best, best_score = [], 0.0
    for m in range(1, min(D, len(text)) + 1):
        path, score, p = tuple(text[-m:]), 0.0, 1.0
        budget = min(config.max_tokens, int(config.alpha * m + config.offset + 1e-6))
        while len(path) - m < budget:
            token = max(vocabulary, key=lambda t, path=path: (counts[*path, t], -t))
            p *= counts[*path, token] / counts[path]
            if p < max(config.min_probability, 1e-9):
                break
            path, score = (*path, token), score + p
        if score >= best_score:
            best, best_score = list(path[m:]), score
    return best, best_score


@pytest.mark.parametrize("alpha", [1.0, 2.5])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_suffix_decoding_finds_the_best_scored_path(alpha: float, offset: float) -> None:
    rng, num_long = random.Random(0), 0
    for _ in range(150):
        config = SuffixConfig(rng.choice([4, 9]), rng.choice([3, 9]), alpha, offset, 0.2)
        text = random_text(rng, rng.randint(2, 40), rng.randint(1, 4))
        draft = draft_after(SuffixDecoding(config), text)
        path, score = best_path(text, config)
        assert draft.score == pytest.approx(score), text
        assert draft.tokens[1:] == path
        num_long += len(path) > 2
    assert num_long > 15


def test_a_suffix_tree_draft_expects_no_less_than_the_path() -> None:
    rng, num_bushy = random.Random(0), 0
    for _ in range(200):
        text = random_text(rng, 40, 3)
        path, tree = (
            draft_after(SuffixDecoding(SuffixConfig(8, 8, 2.0, is_tree=is_tree)), text)
            for is_tree in (False, True)
        )
        assert tree.score >= path.score - 1e-9
        assert len(set(paths(tree))) == len(tree.tokens)
        num_bushy += len(set(tree.parents)) < len(tree.parents)
    assert num_bushy > 50


def test_the_global_tree_drafts_where_it_expects_more_than_the_local_one() -> None:
    drafter = SuffixDecoding(carries=True)
    first = replay([1, 2], [3, 4, 5, 6, 7, 8], drafter)
    assert sum(first) == 0
    drafter.start([[9, 3, 4]], [5])
    (draft,) = drafter.drafts()
    # the last round's tokens were never read: the answer ends for the tree with the 7
    assert (draft.tokens, draft.source) == ([5, 6, 7], "global")
    drafter.reset()
    drafter.start([[1]], [3])
    drafter.unread = [[3, 4, 5, 6, 3, 4, 5]]
    (draft,) = drafter.drafts()
    assert (draft.tokens[1], draft.source) == (6, "local"), "a tie goes to the local tree"


def test_old_answers_leave_the_global_tree() -> None:
    drafter = SuffixDecoding(SuffixConfig(max_texts=1), carries=True)
    for prompt, answer in (([1], [10, 11, 12, 13, 14]), ([2], [20, 21, 22, 23, 24])):
        replay(prompt, answer, drafter)
    drafter.start([[3]], [21])
    assert drafter.drafts()[0].tokens == [21, 22]
    drafter.start([[3]], [11])
    assert drafter.drafts()[0].tokens == [11]
    empty = SuffixTree(drafter.config.max_depth)
    drafter.store.evict(0)
    assert drafter.store.tree.root.children == empty.root.children == {}


def test_a_draft_needs_a_suffix_that_went_on() -> None:
    tree, text = SuffixTree(8), Text()
    for token in [1, 2, 3, 4]:
        tree.append(text, token)
    draft = draft_suffix(tree, text.tokens, SuffixConfig(), "local")
    assert (draft.tokens, draft.source, draft.score) == ([4], "none", 0.0)


# --- REST


def test_rest_drafts_what_most_often_followed_the_longest_known_suffix() -> None:
    store = SuffixArray.of([[70_001, 70_002, 70_003]] * 3 + [[70_001, 70_002, 5], [70_002, 8]])
    draft = draft_after(Rest(store), [1, 70_001, 70_002])
    assert draft.score == 2
    assert paths(draft) == [(), (5,), (70_003,)]
    few = draft_after(Rest(store, RestConfig(num_draft=1)), [1, 70_001, 70_002])
    assert few.tokens == [70_002, 70_003]
    assert draft_after(Rest(store), [1, 70_002]).tokens == [70_002], "one id alone is no match"
    assert draft_after(Rest(store), [70_001, 70_002, 5]).tokens == [5], "nothing followed"


def test_rest_refuses_a_datastore_that_is_not_sorted_far_enough() -> None:
    with pytest.raises(ValueError, match="build it with depth=16"):
        Rest(SuffixArray.of([[1, 2]], depth=4))


# --- PIA


def test_pia_counts_what_followed_each_token() -> None:
    rng, config = random.Random(0), PiaConfig(branch_length=3)
    prompt, answer = random_text(rng, 30, 4), random_text(rng, 40, 4)
    reader = PiaReader(config)
    reader.begin(prompt)
    for start in range(0, 40, 4):
        reader.read(answer[start : start + 4])
    known, stream = prompt[:-1], [prompt[-1], *answer]
    # branches of the answer count once they are full: the last four tokens lead none yet
    expected = {
        True: branches(known, range(len(known) - 1)),
        False: branches(stream, range(len(stream) - 4)),
    }
    found = {True: Counter(), False: Counter()}
    for token, trie in reader.tries.items():
        level = [((token,), trie)]
        for path, branch in level:
            found[True][path] += branch.in_prompt * (branch is not trie)
            found[False][path] += branch.in_answers * (branch is not trie)
            level += [((*path, t), child) for t, child in branch.children.items()]
    assert {key: +counts for key, counts in found.items()} == expected


def branches(tokens: list[int], places: range) -> Counter:
    """How often each path of two to five tokens starts at `places`."""
    return Counter(
        tuple(tokens[i:end]) for i in places for end in range(i + 2, min(len(tokens), i + 5) + 1)
    )


def test_pia_asks_for_two_tokens_before_one() -> None:
    prompt = [5, 6, *range(10, 30), 7, 6, *range(40, 60), 5]
    draft = draft_after(Pia(), [*prompt, 6])
    assert draft.tokens == [6, *range(10, 22)], "the pair has enough, so 6 alone is not asked"
    other = draft_after(Pia(), [*prompt, 9, 6])
    assert {path[0] for path in paths(other)[1:]} == {10, 40}


def test_pia_keeps_the_most_frequent_and_room_for_answers() -> None:
    rng, config = random.Random(0), PiaConfig(decoding_length=9, min_output_nodes=4)
    reader = PiaReader(config)
    reader.begin([t for i in range(40) for t in (1, 100 + i % 20)])
    reader.read([t for i in range(40) for t in (1, 200 + rng.randrange(5))])
    reader.read([1])
    draft = reader.draft()
    assert len(draft.tokens) == 9
    from_answers = [t for t in draft.tokens[1:] if t >= 200]
    assert from_answers, "answers have no room, though four nodes are theirs"
    assert sum(t in range(100, 200) for t in draft.tokens) > 0


def test_pia_forgets_the_prompt_with_the_turn_and_keeps_the_answer() -> None:
    drafter = Pia(carries=True)
    replay([50, 51, 52, 53], [10, 11, 12, 13, 14, 15], drafter)
    assert draft_after(drafter, [1, 50, 51]).tokens == [51]
    assert draft_after(drafter, [1, 10, 11]).tokens[:3] == [11, 12, 13]


def test_a_trie_that_grew_too_large_is_squeezed_at_the_next_turn() -> None:
    config, rng = PiaConfig(max_output_nodes=20), random.Random(0)
    reader = PiaReader(config)
    reader.begin([1, 2, 3])
    often = [9, 8, 9, 8, 9, 8] * 5
    reader.read(often + [t for _ in range(30) for t in (9, rng.randrange(100, 999))] + [1] * 14)
    reader.begin([1, 2, 3])
    assert set(reader.tries[9].children) <= {8, 9} | set(range(100, 999))
    assert all(branch.in_answers > 0.5 for branch in reader.tries[9].children.values())
    assert 8 in reader.tries[9].children
    assert len(reader.tries[9].children) < 15


def test_the_table_names_the_drafters_of_the_paper() -> None:
    assert set(DRAFTERS) == {"PLD", "SAM", "SuffixDecoding", "PIA"}
    assert all(loader(None).max_nodes > 1 for loader in DRAFTERS.values())
