"""The indexes behind the drafters say what a search through the text itself says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from specrepro.suffix import (
    SEPARATOR,
    Branch,
    Node,
    SuffixArray,
    SuffixAutomaton,
    SuffixTree,
    Text,
    frequent_prefixes,
    longest,
    most_frequent,
)


def random_text(rng: random.Random, most: int, vocab_size: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(rng.randint(1, most))]


def substrings(text: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    for start in range(len(text)):
        for end in range(start + 1, min(len(text), start + most) + 1):
            yield tuple(text[start:end])


def earlier_ending(text: list[int]) -> tuple[int, int]:
    """Length and first end of the longest suffix that ends earlier too, by trying all."""
    for length in range(len(text) - 1, 0, -1):
        for end in range(length, len(text)):
            if text[end - length : end] == text[-length:]:
                return length, end
    return 0, 0


@pytest.mark.parametrize(("held", "most", "found"), [(3, 5, 3), (0, 5, 0), (9, 5, 5), (1, 0, 0)])
def test_longest_is_the_last_that_holds(held: int, most: int, found: int) -> None:
    assert longest(lambda m: m <= held, most) == found


# --- automaton


def test_the_match_is_the_longest_suffix_seen_before_and_its_first_end() -> None:
    rng, num_matched = random.Random(0), 0
    for _ in range(10_000):
        text, automaton = random_text(rng, 10, rng.randint(1, 4)), SuffixAutomaton()
        for i, token in enumerate(text):
            automaton.append(token)
            state, length = automaton.match
            assert (length, automaton.end[state]) == earlier_ending(text[: i + 1]), text[: i + 1]
            num_matched += length > 2
    assert num_matched > 5_000, "few texts repeated themselves"


@pytest.mark.parametrize("vocab_size", [1, 2, 50])
def test_an_automaton_is_linear_in_its_text(vocab_size: int) -> None:
    rng = random.Random(0)
    automaton = SuffixAutomaton(rng.randrange(vocab_size) for _ in range(2000))
    assert len(automaton.next) <= 2 * 2000
    assert sum(map(len, automaton.next)) <= 3 * 2000


def test_a_foreign_text_is_followed_to_its_longest_known_suffix() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text, other = random_text(rng, 30, 3), random_text(rng, 30, 4)
        automaton, known = SuffixAutomaton(text), Counter(substrings(text, 30))
        counts, place = automaton.counts(), (0, 0)
        for i, token in enumerate(other):
            place = automaton.follow(*place, token)
            suffixes = [tuple(other[j : i + 1]) for j in range(i + 1)]
            expected = next((s for s in suffixes if s in known), ())
            assert place[1] == len(expected)
            if expected:
                assert counts[place[0]] == known[expected]


def test_an_ancestor_has_been_followed_by_enough() -> None:
    text = [1, 2, 3, 9, 9, 9, 2, 3, 7, 1, 2, 3, 7, 1, 2, 3]
    automaton = SuffixAutomaton(text)
    state, length = automaton.match
    assert (length, automaton.end[state]) == (6, 12)  # [2, 3, 7, 1, 2, 3]: four tokens followed it
    assert automaton.end[automaton.ancestor(state, 4)] == 12
    assert automaton.end[automaton.ancestor(state, 5)] == 3  # [1, 2, 3] at the very beginning
    assert automaton.ancestor(state, 14) == 0


# --- tree


def counts_of(tree: SuffixTree) -> dict[tuple[int, ...], int]:
    """Every string of the tree and its count; checks the shape on the way."""
    counts = {}

    def visit(node: Node, before: list[int]) -> None:
        for token, child in node.children.items():
            assert child.parent is node and child.first == token
            edge = child.edge
            assert len(edge) == child.length > 0
            assert len(node.children) > 1 or child.count != node.count, "not compressed"
            ends = range(1, len(edge) + 1)
            counts.update({tuple(before + edge[:end]): child.count for end in ends})
            visit(child, before + edge)
        if node is not tree.root and node.children:
            most = max(node.children, key=lambda t: (node.children[t].count, -t))
            assert node.favourite() is node.children[most]

    visit(tree.root, [])
    return counts


def shape_of(node: Node) -> tuple:
    """Edges, counts and children in the order of their tokens, whatever texts hold the edges."""
    children = sorted(node.children.items())
    return node.edge, node.count, [(token, shape_of(child)) for token, child in children]


def num_nodes(node: Node) -> int:
    return 1 + sum(map(num_nodes, node.children.values()))


def add(tree: SuffixTree, tokens: Sequence[int]) -> Text:
    text = Text()
    for token in tokens:
        tree.append(text, token)
    return text


@pytest.mark.parametrize("max_depth", [1, 2, 3, 8])
def test_a_tree_counts_the_substrings_of_its_texts_as_they_come_grow_and_go(max_depth: int) -> None:
    rng = random.Random(max_depth)
    for _ in range(150):
        tree, texts, vocab_size = SuffixTree(max_depth), [], rng.choice([1, 2, 3, 6])
        for step in range(rng.randint(1, 60)):
            if not texts or rng.random() < 0.1:
                texts.append(Text())
            if rng.random() < 0.05:
                tree.remove(texts.pop(rng.randrange(len(texts))))
            elif texts:
                tree.append(rng.choice(texts), rng.randrange(vocab_size))
            if step % 7 == 0:
                counts_of(tree)
        expected = Counter(s for text in texts for s in substrings(text.tokens, max_depth))
        assert counts_of(tree) == expected


def test_a_text_that_came_and_went_leaves_the_tree_as_it_was() -> None:
    rng = random.Random(0)
    for _ in range(200):
        tree = SuffixTree(6)
        for _ in range(3):
            add(tree, random_text(rng, 40, 3))
        before = shape_of(tree.root)
        passing = add(tree, random_text(rng, 40, 3))
        assert shape_of(tree.root) != before
        tree.remove(passing)
        assert shape_of(tree.root) == before


def test_a_removed_text_is_not_kept_alive() -> None:
    rng, tree = random.Random(0), SuffixTree(6)
    kept, passing = [random_text(rng, 40, 2) for _ in range(2)]
    gone = add(tree, passing)
    add(tree, kept)
    tree.remove(gone)

    def edges(node: Node) -> Iterator[list[int]]:
        yield node.text
        for child in node.children.values():
            yield from edges(child)

    assert not any(text is gone.tokens for text in edges(tree.root))


@pytest.mark.parametrize("vocab_size", [1, 2, 50])
def test_a_tree_is_linear_in_its_texts(vocab_size: int) -> None:
    rng, tree = random.Random(0), SuffixTree(64)
    add(tree, [rng.randrange(vocab_size) for _ in range(1000)])
    assert num_nodes(tree.root) <= 2 * 1000


def test_a_string_is_found_where_it_ends() -> None:
    rng, tree = random.Random(0), SuffixTree(5)
    text = random_text(rng, 60, 3) + [0, 1, 2]
    add(tree, text)
    known = set(substrings(text, 5))
    for query in (random_text(rng, 5, 3) for _ in range(500)):
        found = tree.find(query)
        assert (found is not None) == (tuple(query) in known)
        if found is not None:
            node, behind = found
            assert node.edge[:behind] == query[len(query) - behind :][:behind] or behind == 0


def test_the_longest_continued_suffix_is_that_of_a_search() -> None:
    rng = random.Random(0)
    for _ in range(300):
        tree, text = SuffixTree(6), random_text(rng, 40, 3)
        add(tree, text)
        known = set(substrings(text, 6))
        lengths = range(1, min(5, len(text)) + 1)
        held = [m for m in lengths if any((*text[-m:], t) in known for t in range(3))]
        assert tree.longest_continued(text) == max(held, default=0)


# --- array


def test_an_array_finds_every_occurrence_and_no_other() -> None:
    rng = random.Random(0)
    for _ in range(200):
        texts = [random_text(rng, 25, 3) for _ in range(rng.randint(1, 4))]
        array, query = SuffixArray.of(texts, depth=5), random_text(rng, 5, 3)
        joined = [t for text in texts for t in (*text, SEPARATOR)]
        n = len(query)
        expected = [i + n for i in range(len(joined)) if joined[i : i + n] == query]
        assert sorted(array.search(query)) == expected


def test_what_follows_ends_with_the_text() -> None:
    array = SuffixArray.of([[5, 6, 9], [5, 6, 7, 8]], depth=2)
    rows = array.continuations(np.sort(array.search([5, 6])), 3)
    assert rows.tolist() == [[9, SEPARATOR, SEPARATOR], [7, 8, SEPARATOR]]


def test_ids_beyond_16_bits_survive_the_index_and_the_file(tmp_path: Path) -> None:
    text = [65_536, 151_935, 1, 70_000, 65_536, 151_935, 128_000]
    SuffixArray.of([text]).save(tmp_path / "store.npz")
    array = SuffixArray.load(tmp_path / "store.npz")
    rows = array.continuations(np.sort(array.search([65_536, 151_935])), 1)
    assert rows.tolist() == [[1], [128_000]]
    # as 16-bit ids these would be 0 and 1, and 70,000 would be 4,464
    assert not len(array.search([0])) and not len(array.search([4_464]))


def test_the_most_frequent_prefixes_are_those_of_a_count() -> None:
    rng = random.Random(0)
    for _ in range(200):
        texts = [random_text(rng, 4, 3) for _ in range(rng.randint(1, 30))]
        rows = np.array([text + [SEPARATOR] * (4 - len(text)) for text in texts])
        tokens, parents = frequent_prefixes(rows, 6)
        paths = [()]
        for token, parent in zip(tokens, parents, strict=True):
            paths.append((*paths[parent], token))
        counts = Counter(tuple(t[:end]) for t in texts for end in range(1, len(t) + 1))
        best = sorted(counts.values(), reverse=True)[:6]
        assert len(set(paths)) == len(paths)
        assert sorted((counts[path] for path in paths[1:]), reverse=True) == best


# --- trie


def test_a_trie_gives_its_heaviest_nodes_and_their_ancestors() -> None:
    rng, trie, counts = random.Random(0), Branch(), Counter()
    for _ in range(100):
        text = random_text(rng, 4, 4)
        trie.insert(text, in_prompt=False)
        counts.update(tuple(text[:end]) for end in range(1, len(text) + 1))
    found = most_frequent(trie, lambda branch: branch.in_answers, 12)
    expected = [count for _, count in counts.most_common(12)]
    assert [branch.in_answers for branch in found] == expected


def test_a_trie_forgets_the_prompt_and_what_came_once() -> None:
    trie = Branch()
    trie.insert([1, 2], in_prompt=True)
    for _ in range(4):
        trie.insert([1, 3], in_prompt=False)
    trie.insert([4], in_prompt=False)
    assert trie.forget_prompt() == 3
    assert set(trie.children) == {1, 4} and set(trie.children[1].children) == {3}
    trie.squeeze()
    assert set(trie.children) == {1} and trie.children[1].in_answers == 2


# --- several texts, and many tokens at once


def ends_elsewhere(texts: list[list[int]], place: int) -> int:
    """Tokens of the longest suffix of a text that ends anywhere else, by trying all."""
    text = texts[place]
    for length in range(len(text), 0, -1):
        for other, tokens in enumerate(texts):
            ends = range(length, len(tokens) + (other != place))
            if any(tokens[end - length : end] == text[-length:] for end in ends):
                return length
    return 0


def test_texts_that_grow_side_by_side_find_each_other() -> None:
    rng, num_foreign = random.Random(0), 0
    for _ in range(1_500):
        automaton, texts = SuffixAutomaton(), [[]]
        for _ in range(rng.randint(1, 14)):
            if rng.random() < 0.25:
                assert automaton.new_text() == len(texts)
                texts.append([])
            place, token = rng.randrange(len(texts)), rng.randrange(3)
            automaton.append(token, place)
            texts[place].append(token)
            state, length = automaton.match_of(place)
            assert length == ends_elsewhere(texts, place), texts
            home, end = automaton.home[state], automaton.end[state]
            assert texts[home][end - length : end] == texts[place][-length:] or not length
            followed = automaton.ancestor(state, 1)
            assert not followed or automaton.following(followed, 2)
            num_foreign += home != place and length > 1
        assert automaton.texts == texts
        assert len(automaton.next) <= 2 * sum(map(len, texts)) + 1
    assert num_foreign > 500, "hardly a match was in another text"


def grown(node: Node) -> tuple:
    """Edges, counts, favourites and children in the order in which they came."""
    children = [(token, grown(child)) for token, child in node.children.items()]
    favourite = node.favourite().first if node.count and node.children else None
    return node.edge, node.count, favourite, children


@pytest.mark.parametrize("max_depth", [1, 2, 5, 20])
def test_tokens_taken_in_at_once_leave_the_tree_that_one_by_one_leaves(max_depth: int) -> None:
    """Down to the order of children, which decides between equals when a tree is drafted."""
    rng, num_long = random.Random(max_depth), 0
    for _ in range(150):
        trees, texts = (SuffixTree(max_depth), SuffixTree(max_depth)), ([], [])
        vocab_size = rng.choice([1, 2, 3, 6])
        for _ in range(rng.randint(1, 20)):
            if not texts[0] or rng.random() < 0.15:
                for own in texts:
                    own.append(Text())
            place = rng.randrange(len(texts[0]))
            if rng.random() < 0.06:
                for tree, own in zip(trees, texts, strict=True):
                    tree.remove(own.pop(place))
                continue
            run = random_text(rng, 4, vocab_size) * rng.choice([1, 1, 3, 8])
            trees[0].extend(texts[0][place], run)
            for token in run:
                trees[1].append(texts[1][place], token)
            assert grown(trees[0].root) == grown(trees[1].root)
            ends = [[node.edge for node in own[place].ends] for own in texts]
            assert ends[0] == ends[1] and len(ends[0]) <= max_depth
            num_long += len(run) > max_depth
    assert num_long > 20 or max_depth == 20


def test_a_suffix_is_placed_without_a_search_where_a_text_ends_in_it() -> None:
    rng = random.Random(0)
    for _ in range(200):
        tree, others = SuffixTree(6), [random_text(rng, 30, 2) for _ in range(2)]
        for other in others:
            add(tree, other)
        text = add(tree, random_text(rng, 30, 2))
        context = [0, 1, *text.tokens]
        assert tree.longest_continued(context, text) == tree.longest_continued(context)
        for length in range(1, min(6, len(context)) + 1):
            assert tree.place_of(context, length, text) == tree.place_of(context, length)
