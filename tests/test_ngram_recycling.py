"""Token Recycling and Lookahead keep what the target guessed, and draft exactly that."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specrepro.draft_tree import DraftTree
from specrepro.recycling import (
    DRAFTERS,
    RECYCLING_TREE,
    Lookahead,
    LookaheadConfig,
    Pool,
    RecyclingConfig,
    TokenRecycling,
    Window,
    is_last_writer,
    top_ids,
    without_unknown,
)
from specrepro.target_model import Scores
from specrepro.tree_verify import verify_greedy

VOCAB_SIZE = 300


def scores_of(logits: Tensor) -> Scores:
    nothing = logits.new_empty(*logits.shape[:2], 0)
    return Scores(logits, nothing, nothing)


def begun(drafter: TokenRecycling | Lookahead, prompts: Sequence[Sequence[int]], seed: int = 0):
    """The drafter behind the prefill of prompts of one length; the root is the last token + 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(prompts)
    lengths = torch.full((len(prompts),), tokens.shape[1])
    logits = torch.rand(len(prompts), 1, VOCAB_SIZE, generator=generator)
    drafter.begin(tokens, lengths, tokens[:, -1] + 1, scores_of(logits))
    return drafter, logits


def played_round(drafter: TokenRecycling | Lookahead, rng: torch.Generator) -> tuple:
    """Tree, scores and verdict of a round whose target agrees with every other drafted node."""
    tree = drafter.propose()
    tree.validate(VOCAB_SIZE)
    logits = torch.rand(*tree.tokens.shape, VOCAB_SIZE, generator=rng)
    logits[..., 24:] -= 2  # few tokens, so that they meet again
    for node in range(1, tree.tokens.shape[1], 2):
        for row in range(len(tree.tokens)):
            if tree.is_node[row, node]:
                logits[row, tree.parents[row, node], tree.tokens[row, node]] += 1
    scores = scores_of(logits)
    verdict = verify_greedy(tree, logits.argmax(-1))
    drafter.observe(verdict, scores)
    return tree, scores, verdict


# --- Token Recycling


def test_the_tree_has_the_papers_levels() -> None:
    assert [sum(level) for level in RECYCLING_TREE] == [8, 21, 25, 15, 8, 3]
    assert TokenRecycling().max_nodes == 81


@pytest.mark.parametrize("vocab_size", [9, 64, 512, 513, 600, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_ids_are_those_of_topk(vocab_size: int, dtype: torch.dtype) -> None:
    logits = torch.stack([torch.randperm(vocab_size) for _ in range(20)]).view(4, 5, -1)
    logits = logits.to(dtype)  # bfloat16 makes ties, and whichever of them is taken is right
    ids = top_ids(logits, 8)
    assert all(len(set(row)) == 8 for row in ids.flatten(0, 1).tolist())
    assert torch.equal(logits.gather(-1, ids), logits.topk(8, -1).values)


def test_unknown_nodes_leave_the_tree_and_take_nobody_with_them() -> None:
    tokens = torch.tensor([[5, -1, 7, -1, 9, 4], [5, 6, 7, 8, 9, 4]])
    parents = torch.tensor([[-1, 0, 0, 1, 2, 4], [-1, 0, 0, 1, 2, 4]])
    tree = without_unknown(tokens, parents)
    tree.validate()
    assert tree.tokens.tolist() == [[5, 7, 9, 4, 0, 0], [5, 6, 7, 8, 9, 4]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2, -2, -2], [-1, 0, 0, 1, 2, 4]]


def last_writers(tree: DraftTree, path: Tensor) -> list[set[int]]:
    """Per row, the node that writes last for each token: all in order, then the path in order."""
    winners = []
    for tokens, parents, nodes in zip(
        tree.tokens.tolist(), tree.parents.tolist(), path.tolist(), strict=True
    ):
        real = [n for n, parent in enumerate(parents) if parent >= -1]
        order = real + [n for n in nodes if n >= 0]
        winners.append(set({tokens[n]: n for n in order}.values()))
    return winners


def test_the_matrix_holds_what_the_last_writer_saw() -> None:
    drafter, first = begun(TokenRecycling(), [[3, 4, 5], [6, 7, 8]])
    expected = [{5: first[0, 0]}, {8: first[1, 0]}]
    rng, num_repeated = torch.Generator().manual_seed(1), 0
    for _ in range(8):
        tree, scores, verdict = played_round(drafter, rng)
        mask = is_last_writer(tree, verdict.path)
        for row, winners in enumerate(last_writers(tree, verdict.path)):
            assert set(mask[row].nonzero()[:, 0].tolist()) == winners
            num_repeated += int(tree.num_nodes[row]) - len(winners)
            for node in winners:
                expected[row][int(tree.tokens[row, node])] = scores.logits[row, node]
    for row, seen in enumerate(expected):
        known = (drafter.matrix[row] >= 0).any(1).nonzero()[:, 0].tolist()
        assert known == sorted(seen)
        for token, logits in seen.items():
            assert drafter.matrix[row, token].tolist() == logits.topk(8).indices.tolist()
    assert num_repeated > 20, "tokens never met twice in a tree, so no rule was needed"


def test_a_child_is_the_choice_of_its_rank() -> None:
    drafter, _ = begun(TokenRecycling(), [[3, 4, 5]])
    drafter.roots = torch.tensor([5])
    drafter.matrix[0, :, :] = torch.arange(VOCAB_SIZE)[:, None] * 8 % 97 + torch.arange(8)
    tree = drafter.propose()
    assert tree.tokens.shape == (1, 81)
    ranks: dict[int, int] = {}
    for token, parent in list(zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), strict=True))[
        1:
    ]:
        rank = ranks[parent] = ranks.get(parent, -1) + 1
        assert token == int(drafter.matrix[0, tree.tokens[0, parent], rank])


def test_recycling_repeats_itself_exactly() -> None:
    runs = []
    for _ in range(2):
        drafter, _ = begun(TokenRecycling(), [[3, 4, 5], [6, 7, 8]])
        rng = torch.Generator().manual_seed(1)
        runs.append([played_round(drafter, rng)[0].tokens for _ in range(5)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_the_matrix_stays_with_its_sequence_until_it_is_reset() -> None:
    drafter, _ = begun(TokenRecycling(carries=True), [[3, 4, 5], [6, 7, 8]])
    drafter.select(torch.tensor([1]))
    rng = torch.Generator().manual_seed(1)
    played_round(drafter, rng)
    first, second = drafter.matrix.clone()
    assert (first >= 0).any(1).sum() == 1 < (second >= 0).any(1).sum()
    begun(drafter, [[3, 4, 50], [6, 7, 80], [1, 1, 1]], seed=2)
    grown = drafter.matrix.clone()
    assert len(grown) == 3
    grown[0, 50], grown[1, 80] = first[50], second[80]
    assert torch.equal(grown[0], first) and torch.equal(grown[1], second)
    drafter.reset()
    begun(drafter, [[3, 4, 5]])
    assert (drafter.matrix >= 0).any(-1).sum() == 1
    begun(drafter := TokenRecycling(), [[3, 4, 5]])
    begun(drafter, [[3, 4, 6]])
    assert (drafter.matrix >= 0).any(-1).sum() == 1, "nothing is carried unless asked for"


def test_a_smaller_tree_is_a_matter_of_configuration() -> None:
    drafter, _ = begun(TokenRecycling(RecyclingConfig(2, ((2,), (1, 1)))), [[3, 4, 5]])
    drafter.roots = torch.tensor([5])
    assert drafter.max_nodes == 5 and drafter.matrix.shape == (1, VOCAB_SIZE, 2)
    assert drafter.propose().tokens.shape == (1, 3)
    with pytest.raises(ValueError, match="3 children"):
        RecyclingConfig(2, ((3,),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positive", [0, 3, 7, 8, 40])
def test_the_best_ids_do_not_depend_on_their_sign(positive: int, dtype: torch.dtype) -> None:
    """Bits of halves are ordered as the halves are only while enough of them are positive."""
    generator = torch.Generator().manual_seed(positive)
    logits = -torch.rand(6, 1000, generator=generator).add(0.1).mul(50)
    places = torch.stack([torch.randperm(1000, generator=generator)[:positive] for _ in logits])
    logits.scatter_(1, places, torch.rand(6, positive, generator=generator) * 9 + 1)
    logits = logits.to(dtype)
    ids = top_ids(logits, 8)
    assert torch.equal(logits.gather(-1, ids), logits.topk(8, -1).values)


def test_sequences_that_share_write_one_matrix_and_the_last_goes_first() -> None:
    drafter, first = begun(TokenRecycling(shares=True), [[3, 4, 5], [6, 7, 5], [1, 2, 9]])
    assert drafter.matrix.shape == (1, VOCAB_SIZE, 8)
    expected = {5: first[1, 0], 9: first[2, 0]}
    rng, num_contested = torch.Generator().manual_seed(1), 0
    for _ in range(6):
        tree, scores, verdict = played_round(drafter, rng)
        for row, winners in enumerate(last_writers(tree, verdict.path)):
            for node in winners:
                token = int(tree.tokens[row, node])
                num_contested += row > 0 and token in expected
                expected[token] = scores.logits[row, node]
    for token, logits in expected.items():
        assert drafter.matrix[0, token].tolist() == logits.topk(8).indices.tolist()
    assert (drafter.matrix[0] >= 0).any(1).sum() == len(expected)
    assert num_contested > 20


def test_what_was_learnt_can_be_put_back() -> None:
    drafter, _ = begun(TokenRecycling(carries=True), [[3, 4, 5]])
    assert drafter.state().keys() == {"matrix"}
    before, kept = drafter.state(), drafter.matrix.clone()
    begun(drafter, [[3, 4, 6]], seed=3)
    played_round(drafter, torch.Generator().manual_seed(1))
    assert torch.equal(before["matrix"], kept), "a later call changed it"
    drafter.restore(before)
    assert torch.equal(drafter.matrix, kept)
    drafter.restore({})
    assert drafter.matrix is None and drafter.state() == {}


# --- Lookahead


def successor(path: Sequence[int]) -> int:
    """A target whose next token depends on all tokens before."""
    return sum(token * 7**place for place, token in enumerate(reversed(path[-6:]))) % 23


def told(window: Window, text: list[int]) -> list[int]:
    """What that target says at the cells that the window asks about."""
    draft = window.draft()
    paths: list[list[int]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else text[:-1]), token])
    return [successor(paths[node]) for node in window.nodes]


def test_a_window_is_the_jacobi_iteration_written_out() -> None:
    config = LookaheadConfig(level=4, window=3)
    text, pool = [1, 2, 3, 4, 5], Pool(7)
    window = Window(config, pool, text, successor(text))
    text.append(successor(text))
    rows = [list(window.rows[0])]
    assert len(rows[0]) == 4
    for _ in range(6):
        chain = [text[-1], *rows[0]]
        cells = range(1, len(chain)) if len(rows) == 1 else range(len(chain))
        said = [
            successor([*text[:-1], *chain[: i + 1], *(row[i] for row in rows[1:])]) for i in cells
        ]
        assert told(window, text) == said
        text.append(successor(text))
        window.observe(said, text[-1])
        if len(rows) < 3:
            rows = [row[1:] for row in rows] + [said if len(rows) == 1 else said[1:]]
        else:
            for i in range(3):
                assert (rows[1][i], rows[2][i], said[i]) in pool.guesses[chain[i]]
            rows = [rows[1][1:], rows[2], said]
        assert window.rows == rows
    assert list(map(len, rows)) == [2, 3, 3]


def test_a_pool_keeps_the_last_guesses() -> None:
    pool = Pool(2)
    for guess in [(1, 1), (2, 2), (1, 1), (1, 1)]:
        pool.add(9, guess)
    assert pool.guesses == {9: [(2, 2), (1, 1)]}
    pool.add(9, (3, 3))
    assert pool.guesses == {9: [(1, 1), (3, 3)]}


def test_a_full_match_is_accepted_in_full() -> None:
    drafter, _ = begun(Lookahead(LookaheadConfig(level=4, window=3)), [[5, 5, 5]])
    for row in range(2):
        drafter.windows[0].observe([8] * (4 if row == 0 else 4), 6)
    drafter.pools[0].add(6, (10, 11, 12))
    tree = drafter.propose()
    choice = torch.full_like(tree.tokens, 99)
    node = 0
    for token in (10, 11, 12):
        below = [n for n, p in enumerate(tree.parents[0].tolist()) if p == node]
        choice[0, node] = token
        node = next(n for n in below if tree.tokens[0, n] == token)
    verdict = verify_greedy(tree, choice)
    assert verdict.num_accepted.tolist() == [3]
    assert verdict.tokens[0, :4].tolist() == [10, 11, 12, 99]


@pytest.mark.parametrize(("level", "window"), [(3, 1), (5, 7), (9, 1)])
def test_a_lookahead_tree_stays_within_its_size(level: int, window: int) -> None:
    config = LookaheadConfig(level, window, num_guesses=1)
    drafter, _ = begun(Lookahead(config), [random.Random(0).choices(range(200), k=40)] * 2)
    rng, largest = torch.Generator().manual_seed(0), 0
    for _ in range(12):
        drafter.pools[0].guesses = {t: [(t,) * (level - 1)] for t in range(VOCAB_SIZE)}
        tree, _, _ = played_round(drafter, rng)
        largest = max(largest, int(tree.num_nodes.max()))
    assert drafter.max_nodes - level < largest <= drafter.max_nodes


def test_the_pool_is_carried_and_the_window_is_not() -> None:
    drafter, _ = begun(Lookahead(carries=True), [[5, 6, 7]])
    drafter.pools[0].add(1, (2, 3, 4, 5))
    begun(drafter, [[5, 6, 7], [5, 6, 8]])
    assert drafter.pools[0].guesses and not drafter.pools[1].guesses
    assert not drafter.windows[0].is_full
    drafter.reset()
    begun(drafter, [[5, 6, 7]])
    assert not drafter.pools[0].guesses


def test_the_pool_may_start_with_the_prompt() -> None:
    config = LookaheadConfig(level=3, pool_from_prompt=True)
    drafter, _ = begun(Lookahead(config), [[5, 6, 7, 8]])
    assert drafter.pools[0].guesses == {5: [(6, 7)], 6: [(7, 8)]}


def test_a_window_too_low_to_guess_is_refused() -> None:
    with pytest.raises(ValueError, match="level >= 3"):
        LookaheadConfig(level=2)


def test_the_table_names_both() -> None:
    assert {name: loader(None).max_nodes for name, loader in DRAFTERS.items()} == {
        "Recycling": 81, "Lookahead": 56,
    }  # fmt: skip
