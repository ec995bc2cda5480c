"""A budget of thinking falls on the same token whatever was drafted, and costs a round a word."""

from __future__ import annotations

import pytest
import torch
from scripted_drafters import drafters

from specrepro.decoding import Autoregressive, Generation, Thinking, decode
from specrepro.target_model import Target
from specrepro.tree_verify import Verdict

PROMPTS = [[50, 60, 70], [10, 20, 30, 40], [15, 25, 35, 45, 55, 65], [80]]
NUM_NEW, BUDGET = 24, 9
SAMPLINGS = [{"temperature": 0.0}, {"temperature": 0.6, "seed": 3}]
WORDS = (90, 91, 92)  # what ends thinking; the second is the mark


@pytest.fixture(scope="module")
def target(quick_target: Target) -> Target:
    return quick_target


@pytest.fixture(scope="module")
def free(target: Target) -> list[list[int]]:
    """What the target says when nobody stops it."""
    return [run.tokens for run in decode(target, Autoregressive(), PROMPTS, NUM_NEW)]


def limited(target: Target, drafter: object, thinking: Thinking, **options: object):
    return decode(target, drafter, PROMPTS, NUM_NEW, thinking=thinking, **options)


def spoken_freely(target: Target, drafter: object) -> Generation:
    return decode(target, drafter, PROMPTS, NUM_NEW)[0]


def written_out(target: Target, prompt: list[int], thinking: Thinking) -> list[int]:
    """Greedy words up to the budget, the forced ones, and greedy words behind them."""
    said = decode(target, Autoregressive(), prompt, thinking.budget).tokens + list(thinking.forced)
    left = NUM_NEW - len(said)
    return said + decode(target, Autoregressive(), prompt + said, left).tokens


def test_what_follows_the_budget_is_forced_and_then_free_again(target: Target) -> None:
    thinking = Thinking(BUDGET, WORDS[1], WORDS)
    for prompt, run in zip(PROMPTS, limited(target, Autoregressive(), thinking), strict=True):
        assert run.tokens == written_out(target, prompt, thinking)
        assert run.forced == [BUDGET, BUDGET + 1, BUDGET + 2]


@pytest.mark.parametrize("options", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", list(drafters([])))
def test_the_limit_does_not_depend_on_what_was_drafted(
    name: str, options: dict, target: Target
) -> None:
    thinking = Thinking(BUDGET, WORDS[1], WORDS)
    expected = limited(target, Autoregressive(), thinking, **options)
    known = drafters([run.tokens for run in expected])[name]
    for run, plain in zip(limited(target, known, thinking, **options), expected, strict=True):
        assert (run.tokens, run.forced) == (plain.tokens, plain.forced)
        assert_a_round_per_forced_word(run)


def assert_a_round_per_forced_word(run: Generation) -> None:
    """Tokens by round: none crosses the budget, and each forced word stands alone."""
    place, starts = 1, []
    for num_accepted in run.accepted:
        starts.append(place)
        place += num_accepted + 1
        assert not starts[-1] < BUDGET < place, "a round crosses the budget"
    for forced in run.forced:
        assert run.accepted[starts.index(forced)] == 0
    assert place >= len(run.tokens)


@pytest.mark.parametrize("place", [0, 4, BUDGET - 1])
def test_nothing_is_forced_where_thinking_ended_by_itself(
    place: int, target: Target, free: list[list[int]]
) -> None:
    end = free[0][place]
    assert end not in free[0][:place]
    thinking = Thinking(BUDGET, end, (end,))
    for drafter in (Autoregressive(), drafters(free)["oracle"]):
        run, unlimited = limited(target, drafter, thinking)[0], spoken_freely(target, drafter)
        assert (run.tokens, run.forced) == (free[0], [])
        assert run.accepted == unlimited.accepted, "a round was cut for nothing"


def test_a_mark_behind_the_budget_comes_too_late(target: Target, free: list[list[int]]) -> None:
    end = free[0][BUDGET]
    assert end not in free[0][:BUDGET]
    run = limited(target, drafters(free)["oracle"], Thinking(BUDGET, end, (7, end)))[0]
    assert run.tokens[: BUDGET + 2] == [*free[0][:BUDGET], 7, end]
    assert run.forced == [BUDGET, BUDGET + 1]


def test_a_mark_may_be_token_zero(target: Target, free: list[list[int]]) -> None:
    """Which the room for tokens to come is filled with."""
    assert 0 not in free[0]
    run = limited(target, Autoregressive(), Thinking(BUDGET, 0, (0,)))[0]
    assert run.tokens[: BUDGET + 1] == [*free[0][:BUDGET], 0] and run.forced == [BUDGET]


@pytest.mark.parametrize("budget", [1, NUM_NEW - 1, NUM_NEW, NUM_NEW + 5])
def test_a_budget_at_either_end(budget: int, target: Target, free: list[list[int]]) -> None:
    for drafter in (Autoregressive(), drafters(free)["oracle"]):
        run = limited(target, drafter, Thinking(budget, WORDS[1], WORDS))[0]
        assert run.tokens[:budget] == free[0][:budget]
        assert run.tokens[budget : budget + 3] == list(WORDS)[: NUM_NEW - budget]
        assert run.forced == list(range(budget, min(budget + 3, NUM_NEW)))


def test_the_rest_of_a_batch_goes_on_while_one_is_forced(target: Target) -> None:
    (first, *_), options = decode(target, Autoregressive(), PROMPTS, NUM_NEW), {"seed": 1}
    thinking = Thinking(BUDGET, first.tokens[3], (5, first.tokens[3]))
    together = limited(target, drafters([first.tokens] * 4)["bushy"], thinking, **options)
    assert {bool(run.forced) for run in together} == {True, False}
    for prompt, run in zip(PROMPTS, together, strict=True):
        alone = decode(target, Autoregressive(), prompt, NUM_NEW, thinking=thinking)
        assert (run.tokens, run.forced) == (alone.tokens, alone.forced)


def test_a_verdict_is_cut_and_overruled_as_written() -> None:
    verdict = Verdict(
        path=torch.tensor([[0, 1, 2, -1]] * 4),
        num_accepted=torch.tensor([2, 2, 2, 2]),
        tokens=torch.tensor([[11, 12, 13, -1]] * 4),
        bonus=torch.tensor([13, 13, 13, 13]),
    )
    thinking = Thinking(5, 99, (98, 99))
    tokens = torch.zeros(4, 20, dtype=torch.long)
    tokens[3, 2] = 99  # thinking is over
    found = thinking.overrule(verdict, tokens, torch.tensor([3, 5, 7, 3]))
    assert found.num_accepted.tolist() == [1, 0, 2, 2]
    assert found.tokens.tolist() == [
        [11, 12, -1, -1], [98, -1, -1, -1], [11, 12, 13, -1], [11, 12, 13, -1],
    ]  # fmt: skip
    assert found.path.tolist() == [[0, 1, -1, -1], [0, -1, -1, -1], [0, 1, 2, -1], [0, 1, 2, -1]]
    assert found.bonus.tolist() == [12, 98, 13, 13]


@pytest.mark.parametrize("arguments", [(0, 9, (9,)), (5, 9, (8,))])
def test_a_limit_that_makes_no_sense_is_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="thinking needs"):
        Thinking(*arguments)
