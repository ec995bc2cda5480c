"""A draft tree is its parents: everything derived from them equals a walk from node to root."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from specrepro.draft_tree import PADDING, ROOT, DraftTree, Growth, keep_best, keep_nodes

SIZES = (1, 2, 7, 31, 32, 33, 64, 65, 129)  # around the ends of 32-bit words


def random_parents(num_nodes: int, rng: random.Random) -> list[int]:
    """Any earlier node may be the parent, the last one most often: bushy here, deep there."""
    last_or_any = [(node - 1, rng.randrange(node)) for node in range(1, num_nodes)]
    return [ROOT, *(last if rng.random() < 0.6 else other for last, other in last_or_any)]


def random_trees(num_nodes: int, num_padding: int = 0) -> DraftTree:
    """Four trees; each loses a few nodes more than the one before, down to `num_padding`."""
    rng = random.Random(num_nodes)
    parents = torch.tensor([random_parents(num_nodes, rng) for _ in range(4)])
    for row in range(4):
        parents[row, max(1, num_nodes - num_padding * row // 3) :] = PADDING
    tokens = torch.stack([torch.randperm(1000)[:num_nodes] for _ in range(4)])
    return DraftTree(tokens, parents)


def path_to_root(parents: list[int], node: int) -> list[int]:
    """The node and its ancestors, by the plainest walk there is."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path


def walked_paths(tree: DraftTree) -> list[list[list[int]]]:
    """For each tree and node its path to the root; padding has none."""
    rows = tree.parents.tolist()
    return [
        [[] if p == PADDING else path_to_root(row, n) for n, p in enumerate(row)] for row in rows
    ]


def integers(words: Tensor) -> list[list[int]]:
    """The words of each node joined to one unbounded integer, word 0 lowest."""
    return [
        [sum(w << 32 * i for i, w in enumerate(node)) for node in row] for row in words.tolist()
    ]


@pytest.mark.parametrize("num_nodes", SIZES)
def test_ancestors_and_depths_are_those_of_a_walk_to_the_root(num_nodes: int) -> None:
    tree = random_trees(num_nodes, num_padding=num_nodes // 2)
    paths = walked_paths(tree)
    seen = [[mask.nonzero()[:, 0].tolist() for mask in row] for row in tree.ancestor_mask()]
    assert seen == [[sorted(path) for path in row] for row in paths]
    assert tree.depths().tolist() == [[max(len(path) - 1, 0) for path in row] for row in paths]
    assert max(len(path) for row in paths for path in row) > 4 or num_nodes < 31, "all are flat"


@pytest.mark.parametrize("num_nodes", SIZES)
def test_packed_words_hold_the_bits_of_the_ancestors(num_nodes: int) -> None:
    tree = random_trees(num_nodes, num_padding=num_nodes // 2)
    words = tree.packed_ancestors()
    assert words.shape == (4, num_nodes, -(-num_nodes // 32))
    assert 0 <= words.min() and words.max() < 2**32, "a word must be an unsigned 32-bit number"
    walked = [[sum(1 << n for n in path) for path in row] for row in walked_paths(tree)]
    assert integers(words) == walked


def test_the_longest_chain_reaches_its_root() -> None:
    tree = DraftTree.chain(torch.arange(129)[None])
    assert torch.equal(tree.ancestor_mask()[0], torch.ones(129, 129).tril().bool())
    assert tree.depths().tolist() == [list(range(129))]


def test_padding_sees_nothing_and_is_seen_by_nothing() -> None:
    tree = random_trees(33, num_padding=20)
    padding = ~tree.is_node
    assert padding.sum() > 20
    mask = tree.ancestor_mask()
    assert not mask[padding].any() and not mask.transpose(1, 2)[padding].any()
    assert not tree.packed_ancestors()[padding].any() and not tree.depths()[padding].any()
    assert tree.num_nodes.tolist() == (33 - padding.sum(1)).tolist()


def test_a_chain_counts_only_the_real_nodes_of_each_row() -> None:
    tree = DraftTree.chain(torch.arange(8).view(2, 4), lengths=torch.tensor([4, 2]))
    tree.validate()
    assert tree.parents.tolist() == [[ROOT, 0, 1, 2], [ROOT, 0, PADDING, PADDING]]


def test_root_only_is_a_tree_of_the_last_tokens() -> None:
    tree = DraftTree.root_only(torch.tensor([5, 6]))
    tree.validate()
    assert (tree.tokens.tolist(), tree.parents.tolist()) == ([[5], [6]], [[ROOT], [ROOT]])


def test_rows_picks_whole_trees() -> None:
    tree = random_trees(7)
    picked = tree.rows(torch.tensor([3, 1]))
    assert torch.equal(picked.tokens, tree.tokens[[3, 1]])
    assert torch.equal(picked.parents, tree.parents[[3, 1]])


@pytest.mark.parametrize("num_nodes", SIZES)
def test_every_well_formed_tree_is_accepted(num_nodes: int) -> None:
    random_trees(num_nodes, num_padding=num_nodes // 2).validate(vocab_size=1000)


@pytest.mark.parametrize(
    ("parents", "named"),
    [
        ([-1, 2, 1, 0], "node 1 of sequence 1 has token 11 and parent 2"),  # 1 and 2 go in circles
        ([-1, 0, 2, 0], "node 2 of sequence 1 has token 12 and parent 2"),  # its own parent
        ([-1, 0, 3, 0], "node 2 of sequence 1 has token 12 and parent 3"),  # forward
        ([-1, 0, 0, 9], "node 3 of sequence 1 has token 13 and parent 9"),  # no such node
        ([-1, 0, -3, 0], "node 2 of sequence 1 has token 12 and parent -3"),
        ([-1, -2, 0, 0], "node 2 of sequence 1 has token 12 and parent 0"),  # padding before it
        ([-1, 0, -1, 0], "node 2 of sequence 1 has token 12 and parent -1"),  # a second root
        ([0, 0, 0, 0], "node 0 of sequence 1 has token 10 and parent 0"),  # no root
        ([-2, -2, -2, -2], "node 0 of sequence 1 has token 10 and parent -2"),
    ],
)
def test_malformed_parents_are_refused_with_their_value(parents: list[int], named: str) -> None:
    tokens = torch.arange(10, 14).expand(2, 4)
    tree = DraftTree(tokens, torch.tensor([[-1, 0, 1, 1], parents]))
    with pytest.raises(ValueError, match=f"^malformed draft tree: .*{named}$"):
        tree.validate()


@pytest.mark.parametrize("token", [-1, 50])
def test_tokens_outside_the_vocabulary_are_refused_with_their_value(token: int) -> None:
    tree = DraftTree(torch.tensor([[3, 4, token]]), torch.tensor([[-1, 0, 0]]))
    with pytest.raises(ValueError, match=rf"0\.\.49, but node 2 .* token {token} "):
        tree.validate(vocab_size=50)
    tree.validate()
    padded = DraftTree(tree.tokens, torch.tensor([[-1, 0, PADDING]]))
    padded.validate(vocab_size=50)


def test_duplicate_siblings_are_refused_unless_allowed() -> None:
    tree = DraftTree(torch.tensor([[3, 4, 5, 4]]), torch.tensor([[-1, 0, 0, 0]]))
    with pytest.raises(
        ValueError, match="siblings must differ, but node 3 .* token 4 and parent 0"
    ):
        tree.validate()
    tree.validate(allow_duplicates=True)


def test_cousins_and_padding_may_repeat_a_token() -> None:
    tokens, parents = [[3, 4, 5, 7, 7, 0, 0]], [[-1, 0, 0, 1, 2, PADDING, PADDING]]
    DraftTree(torch.tensor(tokens), torch.tensor(parents)).validate()


@pytest.mark.parametrize(("tokens", "parents"), [((2, 3), (2, 4)), ((3,), (3,)), ((2, 0), (2, 0))])
def test_wrong_shapes_are_refused_with_the_shapes(tokens: tuple, parents: tuple) -> None:
    tree = DraftTree(torch.zeros(tokens).long(), torch.zeros(parents).long())
    with pytest.raises(ValueError) as refusal:
        tree.validate()
    assert str(tokens) in str(refusal.value) and str(parents) in str(refusal.value)


def scored_pool(size: int, distinct_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random pools whose scores never rise from parent to child; few steps make many exact ties."""
    rng = random.Random(size)
    tree, scores = random_trees(size), torch.zeros(4, size)
    for row, node in [(row, node) for row in range(4) for node in range(1, size)]:
        step = rng.randrange(distinct_steps) / 8
        scores[row, node] = scores[row, tree.parents[row, node]] - step
    return tree.tokens, tree.parents, scores


@pytest.mark.parametrize("distinct_steps", [1, 2, 1000])  # all tied, many ties, hardly any
@pytest.mark.parametrize(("size", "num_nodes"), [(7, 1), (7, 2), (33, 12), (129, 60), (65, 65)])
def test_keep_best_keeps_the_best_of_the_pool(
    size: int, num_nodes: int, distinct_steps: int
) -> None:
    tokens, parents, scores = scored_pool(size, distinct_steps)
    tree, kept = keep_best(tokens, parents, scores, num_nodes)
    for row, ids in enumerate(kept.tolist()):
        ranked = sorted(range(1, size), key=lambda node: (-scores[row, node].item(), node))
        assert ids == sorted([0, *ranked[: num_nodes - 1]])
    assert torch.equal(tree.tokens, tokens.gather(1, kept))


@pytest.mark.parametrize("distinct_steps", [1, 2, 1000])
@pytest.mark.parametrize("num_nodes", [2, 12, 40])
def test_keep_best_keeps_every_ancestor_and_its_parents_right(
    num_nodes: int, distinct_steps: int
) -> None:
    tokens, parents, scores = scored_pool(64, distinct_steps)
    tree, kept = keep_best(tokens, parents, scores, num_nodes)
    tree.validate()
    for row, ids in enumerate(kept.tolist()):
        whole = [path_to_root(parents[row].tolist(), node) for node in ids]
        assert set().union(*whole) <= set(ids), "an ancestor was lost"
        pruned = [path_to_root(tree.parents[row].tolist(), node) for node in range(num_nodes)]
        assert [[ids[node] for node in path] for path in pruned] == whole


def test_keep_best_gives_the_whole_pool_where_more_is_asked_for() -> None:
    tokens, parents, scores = scored_pool(7, 1000)
    tree, kept = keep_best(tokens, parents, scores, 100)
    assert kept.tolist() == [list(range(7))] * 4
    assert torch.equal(tree.tokens, tokens) and torch.equal(tree.parents, parents)


def test_keep_best_of_no_nodes_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="no room for its root"):
        keep_best(*scored_pool(7, 1000), num_nodes=0)


def grown(widths: list[int], num_children: int, rng: random.Random) -> tuple[Growth, list[dict]]:
    """Two trees grown at random, and of each what a plain walk makes of the same choices.

    A node is a tuple of tokens from below the root; the walk knows each one's score, and of the
    last frontier the nodes expanded so far that it descends from or is.
    """
    growth, scores = Growth(torch.tensor([7, 8])), [{(): 0.0}, {(): 0.0}]
    frontier, expanded = [[()], [()]], [[], []]
    for level, width in enumerate([*widths, 0]):
        tokens = torch.stack([torch.randperm(90)[: len(frontier[0]) * num_children] for _ in "ab"])
        tokens = tokens.view(2, len(frontier[0]), num_children)
        log_probs = -torch.rand(tokens.shape)
        growth.branch(log_probs, tokens)
        candidates = [[], []]
        for row in range(2):
            for node, children, values in zip(
                frontier[row], tokens[row].tolist(), log_probs[row].tolist(), strict=True
            ):
                for token, value in zip(children, values, strict=True):
                    scores[row][(*node, token)] = scores[row][node] + value
                    candidates[row].append((*node, token))
        if level < len(widths):
            places = [rng.sample(range(len(nodes)), width) for nodes in candidates]
            came_from = growth.descend(torch.tensor(places))
            before = frontier
            frontier = [[candidates[row][n] for n in places[row]] for row in range(2)]
            for row in range(2):
                parents = [before[row][n] for n in came_from[row].tolist()]
                assert parents == [node[:-1] for node in frontier[row]]
                expanded[row] += frontier[row]
    walked = [
        {"scores": scores[row], "frontier": frontier[row], "expanded": expanded[row]}
        for row in range(2)
    ]
    return growth, walked


@pytest.mark.parametrize("widths", [[], [1], [3, 2, 4], [2, 5, 5, 1]])
def test_growth_keeps_every_candidate_with_its_parent_score_and_ancestors(
    widths: list[int],
) -> None:
    growth, walked = grown(widths, num_children=5, rng=random.Random(len(widths)))
    tokens, parents, scores = growth.pool()
    for row, walk in enumerate(walked):
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(tokens[row].tolist(), parents[row].tolist(), strict=True):
            paths.append((*paths[parent], token) if parent != ROOT else ())
        assert dict(zip(paths, scores[row].tolist(), strict=True)) == pytest.approx(walk["scores"])
        assert [paths[node] for node in growth.ids[row].tolist()] == walk["frontier"]
        assert growth.tokens[row].tolist() == [
            node[-1] if node else 7 + row for node in walk["frontier"]
        ]
        seen = [[n == node[: len(n)] for n in walk["expanded"]] for node in walk["frontier"]]
        assert growth.ancestors[row].tolist() == seen


def test_keep_nodes_cuts_a_tree_out_of_its_pool() -> None:
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5], [8, 6, 7, 1, 2, 3]])
    parents = torch.tensor([[ROOT, 0, 0, 1, 2, 4]] * 2)
    tree = keep_nodes(tokens, parents, torch.tensor([[0, 2, 4, 5], [0, 1, 2, 3]]))
    tree.validate()
    assert tree.tokens.tolist() == [[9, 2, 4, 5], [8, 6, 7, 1]]
    assert tree.parents.tolist() == [[ROOT, 0, 1, 2], [ROOT, 0, 0, 1]]
