"""The cost of drafting is taken from real rounds behind a real context."""

from __future__ import annotations

import itertools

import torch

from specrepro import drafting_cost, ngram, recycling


def ticking():
    """A clock that goes on by a millisecond whenever it is read."""
    counter = itertools.count()
    return lambda: 1e-3 * next(counter)


def test_a_round_is_its_proposing_and_its_observing() -> None:
    kinds = {"PLD": ngram.PromptLookup, "Recycling": recycling.TokenRecycling}
    table = drafting_cost.drafting_cost(120, 9, "float32", kinds, ticking())
    assert set(table["value"].round(9)) == {2.0} and set(table["repeats"]) == {9}
    assert table.set_index(["method", "text"]).loc[("PLD", "loop"), "limit"] == 0.3
    assert set(table["text"]) == {"answers", "loop"} and set(table["prefix"]) == {120}


def test_the_target_says_the_text() -> None:
    text, accepted = drafting_cost.LOOP * 30, []

    class Noting(ngram.PromptLookup):
        def observe(self, verdict, scores) -> None:
            accepted.append(int(verdict.num_accepted))
            super().observe(verdict, scores)

    logits = itertools.repeat(torch.zeros(1, 11, 10))
    found = drafting_cost.milliseconds(Noting(), text, 60, logits, 6)
    assert len(found) == 6 and accepted == [10] * 6, "in a loop every draft is right"


def test_every_drafter_that_needs_no_model_is_timed() -> None:
    assert {"PLD", "SAM", "SuffixDecoding", "PIA", "Recycling", "Lookahead"} <= set(
        drafting_cost.DRAFTERS
    )
    assert set(drafting_cost.LIMITS) <= set(drafting_cost.DRAFTERS)
