"""The greedy walk, the cache that it leaves, and the door in front of them.

Kernel and torch equal the plain-Python reference; the reference equals brute force over all
root-to-leaf paths.

The kernels broken on purpose, and which test sees it: `test_kernel_mutations.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from tree_cases import language_patched_once_a_launch, random_trees  # noqa: F401

from specrepro import kernel_launch
from specrepro.draft_tree import DraftTree
from specrepro.tree_verify import (
    Verdict,
    keep_accepted,
    verify_greedy,
)
from specrepro.verify_reference import keep_accepted_reference, verify_greedy_reference

BACKENDS = ("triton", "torch")


def accepted_paths(verdict: Verdict) -> list[list[int]]:
    return [
        path[1 : n + 1].tolist()
        for path, n in zip(verdict.path, verdict.num_accepted.tolist(), strict=True)
    ]


def reference_paths(tree: DraftTree, choice: Tensor) -> list[list[int]]:
    rows = zip(tree.tokens.tolist(), tree.parents.tolist(), choice.tolist(), strict=True)
    return [verify_greedy_reference(*row) for row in rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 257])
def test_the_walk_is_the_references(N: int, backend: str) -> None:
    tree, choice = random_trees(16, N, agreement=0.9, seed=N)
    expected = reference_paths(tree, choice)
    verdict = verify_greedy(tree, choice, backend=backend)
    assert accepted_paths(verdict) == expected
    assert max(map(len, expected)) > 3 or N < 60, "no walk went deep, so little was tested"
    for b, path in enumerate(expected):
        nodes = [0, *path]
        assert verdict.tokens[b, : len(nodes)].tolist() == choice[b, nodes].tolist()
        assert (verdict.tokens[b, len(nodes) :] == -1).all()
        assert (verdict.path[b, len(nodes) :] == -1).all()
        assert verdict.bonus[b] == choice[b, nodes[-1]]


def test_the_reference_finds_the_longest_agreeing_path_of_all() -> None:
    tree, choice = random_trees(40, 24, agreement=0.9, seed=0)
    for b, path in enumerate(reference_paths(tree, choice)):
        tokens, parents = tree.tokens[b].tolist(), tree.parents[b].tolist()
        longest = 0
        for leaf in range(len(parents)):
            branch = []
            while parents[leaf] >= 0:
                branch.append(leaf)
                leaf = parents[leaf]
            agrees = [tokens[node] == choice[b, parents[node]] for node in reversed(branch)]
            longest = max(longest, (agrees + [False]).index(False))
        assert len(path) == longest


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_of_the_visited_nodes_serves_as_the_choice(backend: str) -> None:
    tree, choice = random_trees(5, 20, agreement=0.9, seed=4)
    rows = torch.arange(5)
    if backend == "triton":
        with pytest.raises(ValueError, match="as a tensor"):
            verify_greedy(tree, lambda nodes: choice[rows, nodes], backend=backend)
        return
    lazily = verify_greedy(tree, lambda nodes: choice[rows, nodes])
    assert torch.equal(lazily.path, verify_greedy(tree, choice).path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adding_siblings_never_shortens_the_walk(backend: str) -> None:
    # TensorRT-LLM #10343
    tree, choice = random_trees(32, 40, agreement=0.9, seed=8)
    depths = [
        verify_greedy(
            DraftTree(tree.tokens[:, :n], tree.parents[:, :n]), choice[:, :n], backend=backend
        ).num_accepted
        for n in (5, 12, 25, 40)
    ]
    for fewer, more in zip(depths, depths[1:], strict=False):
        assert (more >= fewer).all()
    assert (depths[-1] > depths[0]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_of_one_child_each_is_the_chain(backend: str) -> None:
    # TensorRT-LLM #15842
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    choice = torch.tensor([[6, 7, 0, 9], [6, 7, 8, 9]])
    verdict = verify_greedy(DraftTree.chain(tokens), choice, backend=backend)
    assert accepted_paths(verdict) == [[1, 2], [1, 2, 3]]
    assert verdict.bonus.tolist() == [0, 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_slots_are_the_path_and_nothing_else_moves(backend: str) -> None:
    tree, choice = random_trees(4, 33, agreement=0.95, seed=1)
    verdict = verify_greedy(tree, choice, backend=backend)
    assert verdict.num_accepted.max() > 3
    lengths = torch.tensor([3, 0, 11, 7])
    cache = torch.randn(3, 2, 4, 50, 2, 5)
    before = cache.clone()
    kept = keep_accepted(cache, verdict, lengths, backend=backend)
    assert kept.tolist() == (lengths + verdict.num_accepted + 1).tolist()
    for b, length in enumerate(lengths.tolist()):
        path = verdict.path[b].tolist()
        for after, old in zip(
            cache[:, :, b].flatten(0, 1), before[:, :, b].flatten(0, 1), strict=True
        ):
            expected = torch.stack(keep_accepted_reference(list(old), path, length))
            assert torch.equal(after[: kept[b]], expected)
            assert torch.equal(after[kept[b] :], old[kept[b] :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_slots_are_found_through_scattered_pages_and_head_first_memory(backend: str) -> None:
    tree, choice = random_trees(3, 20, agreement=0.95, seed=2)
    verdict = verify_greedy(tree, choice, backend=backend)
    lengths = torch.tensor([6, 13, 0])
    plain = torch.randn(2, 3, 36, 2, 5)
    # a slice of a wider table, so not contiguous
    table = torch.randperm(30).view(3, 10).int()[:, :9]
    pages = torch.zeros(2, 30, 4, 2, 5)
    pages[:, table.long()] = plain.unflatten(2, (9, 4))
    heads_first = plain.transpose(2, 3).contiguous().transpose(2, 3)
    keep_accepted(pages, verdict, lengths, block_table=table, backend=backend)
    keep_accepted(heads_first, verdict, lengths, backend=backend)
    keep_accepted(plain, verdict, lengths, backend="torch")
    assert torch.equal(pages[:, table.long()].flatten(2, 3), plain)
    assert torch.equal(heads_first, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [-1, 30])
def test_a_page_that_is_not_there_is_refused_before_anything_is_moved(
    page: int, backend: str
) -> None:
    tree, choice = random_trees(3, 20, agreement=0.95, seed=2)
    verdict = verify_greedy(tree, choice, backend=backend)
    table = torch.randperm(30).view(3, 10).int()
    table[1, 3] = page
    pages = torch.randn(2, 30, 4, 2, 5)
    before = pages.clone()
    with pytest.raises(ValueError, match=f"page 3 of sequence 1 is {page}"):
        lengths = torch.tensor([6, 13, 0])
        keep_accepted(pages, verdict, lengths, block_table=table, backend=backend)
    assert torch.equal(pages, before)
    table[:, 9] = page  # where nothing is read, a table may hold anything
    table[1, 3] = 0
    keep_accepted(pages, verdict, lengths, block_table=table, backend=backend)


MALFORMED = [
    ([[-1, 1]], "a parent must come before its child"),
    ([[-1, 2, 1]], "a parent must come before its child"),
    ([[0, 0]], "the root must be node 0"),
    ([[-1, -1]], "the root must be node 0"),
    ([[-1, -3]], "parents below -2 do not exist"),
    ([[-1, -2, 0]], "padding must come after every node"),
    ([[-1, 0, 0]], "siblings must differ"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("parents", "message"), MALFORMED)
def test_malformed_trees_raise_and_never_hang(
    parents: list[list[int]], message: str, backend: str
) -> None:
    parents = torch.tensor(parents)
    tree = DraftTree(torch.full_like(parents, 4), parents)
    with pytest.raises(ValueError, match=message):
        verify_greedy(tree, torch.full_like(parents, 4), backend=backend)


def test_a_kernel_given_a_cycle_ends_all_the_same() -> None:
    tokens, parents = torch.full((1, 3), 4), torch.tensor([[-1, 2, 1]])
    assert kernel_launch.walk_greedily(tokens, parents, tokens).accepted.item() == 0
    parents = torch.tensor([[1, 0, 0]])
    assert kernel_launch.walk_greedily(tokens, parents, tokens).accepted.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_that_disagree_are_named(backend: str) -> None:
    tree, choice = random_trees(2, 4, agreement=0.9, seed=0)
    with pytest.raises(ValueError, match=r"choice is \(2, 3\) but the tree \(2, 4\)"):
        verify_greedy(tree, choice[:, :3], backend=backend)
    verdict = verify_greedy(tree, choice, backend=backend)
    with pytest.raises(ValueError, match="a verdict on 2 sequences does not fit lengths"):
        keep_accepted(torch.zeros(3, 9, 1, 4), verdict, torch.tensor([1, 2, 3]), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 7], "node 3 behind the 7 tokens of sequence 1 lies outside the 10 slots"),
        ([-1, 2], "behind the -1 tokens of sequence 0 lies outside"),
    ],
)
def test_a_path_out_of_the_cache_is_refused_before_anything_moves(
    lengths: list[int], message: str, backend: str
) -> None:
    tree = DraftTree.chain(torch.tensor([[1, 2, 3, 4]] * 2))
    verdict = verify_greedy(tree, torch.tensor([[2, 0, 0, 0], [2, 3, 4, 5]]), backend=backend)
    cache = torch.randn(2, 10, 1, 4)
    before = cache.clone()
    with pytest.raises(ValueError, match=message):
        keep_accepted(cache, verdict, torch.tensor(lengths), backend=backend)
    assert torch.equal(cache, before)


def test_without_gpu_or_interpreter_the_kernel_says_what_to_do() -> None:
    program = (
        "import torch; from specrepro.draft_tree import DraftTree\n"
        "from specrepro.tree_verify import verify_greedy\n"
        "tree = DraftTree.root_only(torch.tensor([3]))\n"
        "print(verify_greedy(tree, torch.tensor([[5]])).bonus.item())\n"
        "verify_greedy(tree, torch.tensor([[5]]), backend='triton')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert run.stdout == "5\n"
    assert "ValueError: backend 'triton' needs a GPU tensor, not one on cpu" in run.stderr
