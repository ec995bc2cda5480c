"""Trees of adjacent positions are one tree, and the target judges it as it judges each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from tree_cases import random_parents

from specrepro import target_model
from specrepro.draft_tree import ROOT, DraftTree
from specrepro.forest import UNSCORED, Forest, Judgement, forest, judge
from specrepro.target_model import Target


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


def trees_below(roots: Tensor, num_nodes: int, seed: int) -> DraftTree:
    """Random trees (len(roots), num_nodes) of few different words, so that they say much alike."""
    rng = torch.Generator().manual_seed(seed)
    tokens, parents = [], []
    for root in roots.flatten().tolist():
        nodes = [(root, ROOT)]
        while len(nodes) < num_nodes:
            parent = int(torch.randint(len(nodes), (1,), generator=rng))
            node = (int(torch.randint(5, 10, (1,), generator=rng)), parent)
            nodes += [node] if node not in nodes else []
        tokens.append([token for token, _ in nodes])
        parents.append([parent for _, parent in nodes])
    return DraftTree(torch.tensor(tokens), torch.tensor(parents))


def path_to(tree: DraftTree, row: int, node: int) -> list[int]:
    """Words from the root to a node, both included."""
    parent = int(tree.parents[row, node])
    return [*(path_to(tree, row, parent) if parent >= 0 else []), int(tree.tokens[row, node])]


def test_every_inner_node_says_in_the_forest_what_it_said_in_its_tree():
    """And what hangs below nothing is not there, unless the sequence itself says it."""
    trunk = torch.randint(5, 10, (2, 7), generator=torch.Generator().manual_seed(0))
    roots = torch.tensor([[0, 2, 3], [1, 4, 6]])
    is_real = torch.tensor([[True, True, True], [True, True, False]])
    trees = [trees_below(trunk.gather(1, roots), 6, seed) for seed in (1, 2)]
    whole, places = forest(trunk, roots, is_real, trees)
    whole.validate()  # siblings differ, parents come first
    assert places.shape == (2, 2, 3, 6) and (places[1, :, 2] == UNSCORED).all()
    reached = [set(range(7)), set(range(7))]
    for b, s, p, node in torch.cartesian_prod(*map(torch.arange, places.shape)).tolist():
        if not is_real[b, p]:
            continue
        tree, place = 3 * b + p, int(places[b, s, p, node])
        assert (place == UNSCORED) == (node > 0 and node not in trees[s].parents[tree])
        if place != UNSCORED:
            wanted = trunk[b, : roots[b, p]].tolist() + path_to(trees[s], tree, node)
            assert path_to(whole, b, place) == wanted
            reached[b].add(place)
    assert [len(places) for places in reached] == whole.num_nodes.tolist(), "no node for nothing"
    assert whole.num_nodes.max() > 9, "all trees said what the sequences say"


def test_what_trees_and_sequence_say_alike_is_one_node():
    trunk = torch.tensor([[50, 60, 70]])
    says_it_too = DraftTree(
        torch.tensor([[50, 60, 70, 9, 8, 7]]), torch.tensor([[-1, 0, 1, 2, 0, 4]])
    )
    one, once = forest(trunk, torch.tensor([[0]]), torch.ones(1, 1).bool(), [says_it_too])
    both, twice = forest(trunk, torch.tensor([[0]]), torch.ones(1, 1).bool(), [says_it_too] * 2)
    assert once[0, 0, 0].tolist() == [0, 1, 2, UNSCORED, 3, UNSCORED]
    assert one.tokens.tolist() == both.tokens.tolist() == [[50, 60, 70, 8]]
    assert torch.equal(twice[:, :1], once) and torch.equal(twice[:, 1:], once)


def test_a_tree_that_is_its_root_alone_adds_nothing_whatever_its_padding():
    alone = DraftTree(torch.tensor([[50, 0, 0]]), torch.tensor([[-1, -2, -2]]))
    one, places = forest(
        torch.tensor([[50, 60]]), torch.tensor([[0]]), torch.ones(1, 1).bool(), [alone]
    )
    assert one.tokens.tolist() == [[50, 60]]
    assert places[0, 0, 0].tolist() == [0, UNSCORED, UNSCORED]


def test_ancestors_that_are_climbed_are_those_of_any_tree():
    parents = random_parents(3, 70, seed=0, padding=5)
    parents[0] = torch.arange(70) - 1  # a chain
    tokens = torch.zeros_like(parents)
    climbed = Forest(tokens, parents)
    assert torch.equal(climbed.ancestor_mask(), DraftTree(tokens, parents).ancestor_mask())
    assert climbed.depths()[0, -1] == 69


def logits_after(target: Target, words: list[int]) -> Tensor:
    return target.logits(target.features(torch.tensor([words]))[1])[0, -1]


def assert_judged_alone(
    target: Target, prefix: list[int], tree: DraftTree, row: int, judged: Judgement
) -> None:
    """Each node's probability and choice are those of a pass over its own path."""
    for node in range(tree.tokens.shape[1]):
        path = path_to(tree, row, node)
        logits = logits_after(target, prefix + path)
        if node in tree.parents[row]:
            assert judged.choices[row, node] == logits.argmax()
        if node:
            before = logits_after(target, prefix + path[:-1]).log_softmax(-1)
            expected = before[path[-1]].exp()
            torch.testing.assert_close(judged.probs[row, node], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("b", [1, 4])  # from four on, attention on a CPU takes another way
def test_trees_of_all_rows_are_judged_as_each_path_alone(target, b):
    tokens = torch.randint(5, 100, (b, 14), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[1, 2, 6, 7], [2, 3, 10, 11], [0, 1, 4, 5], [3, 4, 8, 9]])[:b]
    is_row = torch.ones_like(rows).bool()
    is_row[-1, 3] = b == 1
    trees = [trees_below(tokens.gather(1, rows + 1), 5, seed) for seed in (4, 5)]
    found = judge(target, tokens, rows, is_row, trees)
    for row in range(4) if b == 1 else (0, 3, 4 * b - 4, 4 * b - 2):
        sequence, place = divmod(row, 4)
        prefix = tokens[sequence, : rows[sequence, place] + 1].tolist()
        for tree, judged in zip(trees, found, strict=True):
            assert_judged_alone(target, prefix, tree, row, judged)


def test_the_indicator_marks_the_targets_own_words():
    tree = DraftTree(torch.tensor([[9, 5, 6, 7]]), torch.tensor([[-1, 0, 0, 1]]))
    judged = Judgement(torch.rand(1, 4), torch.tensor([[6, 7, 8, 9]]))
    assert judged.indicator(tree)[0, 1:].tolist() == [0, 1, 1]
