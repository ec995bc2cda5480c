"""Drafting by the target's own dice changes how much is accepted, and never what is said."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from drafter_cases import OTHER_PROMPTS, PROMPT

from specrepro import eagle3, races, target_model
from specrepro.coupled import CoupledDrafter
from specrepro.decoding import Sampling, decode, decode_autoregressively, position_race_times
from specrepro.draft_tree import DraftTree
from specrepro.eagle3 import DraftHead, TreeConfig, head_config
from specrepro.races import race, vocabulary_grid
from specrepro.target_model import Target

SHARP = Sampling(temperature=0.8, top_p=0.98)
TREE = TreeConfig(depth=2, top_k=4, total_tokens=9)
PROMPTS = [PROMPT, *OTHER_PROMPTS]


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


def new_head(target: Target, draft_vocab_size: int) -> DraftHead:
    torch.manual_seed(1)
    head = DraftHead(head_config(target, draft_vocab_size)).requires_grad_(False)
    if hasattr(head, "d2t"):
        head.set_vocabulary(torch.arange(draft_vocab_size) * 2)
    return head


def noted_trees(drafter: eagle3.Drafter) -> list[DraftTree]:
    """What the drafter proposes from now on."""
    trees, propose = [], drafter.propose
    drafter.propose = lambda: trees.append(propose()) or trees[-1]
    return trees


def many_times(num: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return position_race_times([seed], num, vocab_size)[0]


# --- the odds


def odds(probs: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Of guesses for the whole vocabulary."""
    return races.odds(probs, times, torch.arange(probs.shape[-1]), probs.shape[-1])


def test_odds_are_the_wins_of_a_race_among_masses_known_but_for_gumbel_noise():
    probs = torch.tensor([0.05, 0.3, 0.2, 0.0, 0.25, 0.1, 0.1])
    times = many_times(1, len(probs))
    R, C = vocabulary_grid(len(probs))
    rng = torch.Generator().manual_seed(0)
    noise = torch.empty(200_000, R + C).exponential_(generator=rng).log().neg()  # of Gumbel
    grid = torch.nn.functional.pad(probs, (0, R * C - len(probs))).view(R, C)
    rows = (grid.sum(-1) / times[0, :R]).log() + noise[:, :R]
    columns = (grid / times[0, R:]).log()[rows.argmax(-1)] + noise[:, R:]
    winners = rows.argmax(-1) * C + columns.argmax(-1)
    found = winners.bincount(minlength=len(probs)) / len(winners)
    torch.testing.assert_close(odds(probs[None, None], times)[0, 0], found, atol=4e-3, rtol=0)


def test_odds_add_up_to_one_and_leave_out_what_has_no_mass():
    probs = torch.rand(3, 5, 301) * (torch.rand(3, 5, 301) > 0.7)
    probs[:, :, 40:80] = 0  # whole rows of the grid
    probs /= probs.sum(-1, keepdim=True)
    found = odds(probs, many_times(3, 301))
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 5))
    assert (found[probs == 0] == 0).all()
    assert odds(torch.tensor([[[0.0, 1.0, 0.0]]]), many_times(1, 3)).tolist() == [[[0.0, 1.0, 0.0]]]


def test_odds_of_some_tokens_are_those_of_a_vocabulary_where_no_other_has_mass():
    some = torch.tensor([3, 17, 18, 200, 299])
    probs, times = torch.rand(2, 4, len(some)), many_times(2, 301)
    whole = torch.zeros(2, 4, 301).index_copy(-1, some, probs)
    found = races.odds(probs, times, some, 301)
    torch.testing.assert_close(found, odds(whole, times)[..., some])
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4))


def test_no_odds_exceed_one_where_all_mass_is_one_tokens():
    """A child that rounding made likelier than its parent would outlive it in the pruned tree."""
    draws = torch.Generator().manual_seed(0)
    probs = (30 * torch.randn(64, 50, 301, generator=draws)).softmax(-1)
    found = odds(probs, many_times(64, 301))
    assert (found == 1).any() and found.max() <= 1


def test_who_sees_the_dice_names_the_winner_more_often_than_who_names_the_likeliest():
    """With the best of guesses three likely words cover their mass, and three lucky ones more."""
    rng = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(2000, 1, 300, generator=rng)).softmax(-1)
    times = many_times(2000, 300)
    drawn = race(probs[:, 0], times)[:, None]
    lucky = (odds(probs, times)[:, 0].topk(3).indices == drawn).any(1).float().mean()
    likely = (probs[:, 0].topk(3).indices == drawn).any(1).float().mean()
    assert abs(likely - probs.topk(3).values.sum(-1).mean()) < 0.03
    assert lucky > likely + 0.3


# --- the drafter


@pytest.mark.parametrize("draft_vocab_size", [40, 10**6])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.9, "top_k": 50}])
def test_it_says_what_the_target_says_in_any_batch(target, draft_vocab_size, options):
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 5} | options
    drafter = CoupledDrafter(new_head(target, draft_vocab_size), target, TREE)
    plain = decode_autoregressively(target, PROMPTS, **options)
    own = decode(target, drafter, PROMPTS, **options)
    assert [one.tokens for one in own] == [one.tokens for one in plain]
    assert sum(sum(one.accepted) for one in own) > 0


def test_greedy_it_drafts_what_eagle3_drafts_also_after_a_sampled_run(target):
    head, drafted = new_head(target, 40), []
    for kind in (eagle3.Drafter, CoupledDrafter):
        drafter = kind(head, target, TREE)
        decode(target, drafter, PROMPT, max_new_tokens=5, temperature=1.0)
        trees = noted_trees(drafter)
        decode(target, drafter, PROMPT, max_new_tokens=12)
        drafted.append(trees)
    assert len(drafted[0]) > 5
    for one, other in zip(*drafted, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)


def test_the_times_foreseen_are_those_that_decide(target):
    """At every depth and in a batch whose sequences end one by one."""
    depths_seen = set()

    class Watching(CoupledDrafter):
        def observe(self, verdict, scores):
            for depth in range(verdict.path.shape[1]):
                is_there = verdict.path[:, depth] >= 0
                rows = torch.arange(len(is_there))[is_there]
                probs = SHARP.probs(scores.logits[rows, verdict.path[rows, depth]])
                drawn = race(probs, self.times_at(depth)[rows])
                assert torch.equal(drawn, verdict.tokens[rows, depth])
                depths_seen.update([depth] if len(rows) else [])
            super().observe(verdict, scores)

    drafter = Watching(new_head(target, 10**6), target, TREE)
    said = decode(target, drafter, PROMPTS, max_new_tokens=110, seed=12, **asdict(SHARP))
    assert {0, 1} <= depths_seen and len({len(one.tokens) for one in said}) > 1


def test_a_tree_deeper_than_the_tokens_that_are_left_is_no_error(target):
    deep = TreeConfig(depth=6, top_k=2, total_tokens=4)
    drafter = CoupledDrafter(new_head(target, 40), target, deep)
    options = {"max_new_tokens": 3, "temperature": 1.0, "ignore_stop": True}
    plain = decode_autoregressively(target, PROMPT, **options)
    assert decode(target, drafter, PROMPT, **options).tokens == plain.tokens


def test_every_level_is_drafted_by_the_dice_of_its_own_position(target):
    asked = []

    class Asking(CoupledDrafter):
        def foresee(self, times_at, sampling):
            super().foresee(lambda depth: asked.append(depth) or times_at(depth), sampling)

    drafter = Asking(new_head(target, 40), target, TREE)
    said = decode(target, drafter, PROMPT, max_new_tokens=9, temperature=1.0, ignore_stop=True)
    assert asked == [0, 1, 2] * said.num_passes


def test_it_drafts_nothing_that_the_sampling_rules_out(target):
    """What top-k keeps for the target it keeps for the head: with one word left, the same tree."""
    head, trees = new_head(target, 10**6), []
    for kind in (eagle3.Drafter, CoupledDrafter):
        drafter = kind(head, target, TreeConfig(depth=2, top_k=1, total_tokens=4))
        trees.append(noted_trees(drafter))
        decode(target, drafter, PROMPT, max_new_tokens=8, temperature=1.0, top_k=1)
    for chosen, foreseen in zip(*trees, strict=True):
        assert torch.equal(chosen.tokens, foreseen.tokens)
