"""The loop emits what it should and counts what it did: limits, stops, batches, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scripted_drafters import Scripted, drafters, said_by_generate
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specrepro import target_model
from specrepro.decoding import (
    Autoregressive,
    Generation,
    Sampling,
    decode,
    decode_autoregressively,
    fill_gaps,
    position_race_times,
)
from specrepro.target_model import Target

PROMPTS = [[10, 20, 30, 40], [50, 60, 70], [15, 25, 35, 45, 55, 65], [80]]
NUM_NEW = 26
SAMPLED = {"temperature": 1.0, "seed": 5}
DRAFTERS = tuple(drafters([]))


@pytest.fixture(scope="module")
def target(tiny_target_folder: Callable[..., Path]) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32")


@pytest.fixture(scope="module")
def words(target: Target) -> list[list[int]]:
    """What the target says greedily after each prompt."""
    return tokens_of(decode_autoregressively(target, PROMPTS, max_new_tokens=NUM_NEW))


def tokens_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


def place_of_a_new_word(words: list[int]) -> int:
    """Where a token first occurs, neither first nor last in a run of an oracle of five nodes."""
    return next(i for i in range(6, NUM_NEW) if words[i] not in words[:i] and i % 5 in (2, 3))


@pytest.fixture(scope="module")
def stopping_target(
    tiny_target_folder: Callable[..., Path], words: list[list[int]]
) -> tuple[Target, list[list[int]]]:
    """The same weights ending at a token of the first sequence, and what `generate` then says."""
    stop = words[0][place_of_a_new_word(words[0])]
    folder = str(tiny_target_folder("llama", eos_token_id=stop))
    ended = said_by_generate(folder, PROMPTS, NUM_NEW)
    return target_model.load(folder, dtype="float32"), ended


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_stop_token_inside_a_run_ends_it_where_generate_ends(
    name: str, stopping_target: tuple[Target, list[list[int]]], words: list[list[int]]
) -> None:
    target, ended = stopping_target
    generations = decode(target, drafters(words)[name], PROMPTS, max_new_tokens=NUM_NEW)
    assert tokens_of(generations) == ended
    assert len(ended[0]) == place_of_a_new_word(words[0]) + 1 and len(set(map(len, ended))) > 1
    if name == "oracle":
        assert 1 + sum(a + 1 for a in generations[0].accepted) > len(ended[0]), "not inside a run"


def test_stop_tokens_can_be_ignored(
    stopping_target: tuple[Target, list[list[int]]], words: list[list[int]]
) -> None:
    target, _ = stopping_target
    drafter = Scripted(words)
    generations = decode(target, drafter, PROMPTS, max_new_tokens=NUM_NEW, ignore_stop=True)
    assert tokens_of(generations) == words


def test_the_first_token_may_be_the_last(target: Target, words: list[list[int]]) -> None:
    stopping = Target(target.model, None, "tiny")
    stopping.stop_ids = torch.tensor([words[0][0]])
    generation = decode(stopping, Scripted(words), PROMPTS[0], max_new_tokens=NUM_NEW)
    assert (generation.tokens, generation.accepted) == (words[0][:1], [])
    assert math.isnan(generation.tau), "no pass, no ratio"


@pytest.mark.parametrize("num_new", [1, 2, 3, 4, 5, 6, 7, 11])
def test_the_length_limit_cuts_inside_a_run(
    num_new: int, target: Target, words: list[list[int]]
) -> None:
    generations = decode(target, Scripted(words), PROMPTS, max_new_tokens=num_new)
    assert tokens_of(generations) == [row[:num_new] for row in words]
    assert {g.num_passes for g in generations} == {-(-(num_new - 1) // 5)}


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_context_ends_each_sequence_of_a_batch_where_it_ends_alone(
    name: str, target: Target, words: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "max_context", 7)
    generations = decode(target, drafters(words)[name], PROMPTS, max_new_tokens=NUM_NEW)
    room = [7 - len(prompt) for prompt in PROMPTS]
    assert room == [3, 4, 1, 6]
    assert tokens_of(generations) == [row[:r] for row, r in zip(words, room, strict=True)]


def test_the_real_end_of_the_context_can_be_reached(target: Target) -> None:
    prompt = [3 + i % 90 for i in range(500)]
    expected = decode_autoregressively(target, prompt, max_new_tokens=100).tokens
    assert len(expected) == target.max_context - 500 == 12
    assert decode(target, Scripted([expected], num_nodes=9), prompt, 100).tokens == expected
    longest = prompt + expected[:-1]
    assert decode(target, Scripted([expected[-1:]]), longest, 100).tokens == expected[-1:]


def refused(target: Target, prompts: list, **options: object) -> str:
    with pytest.raises(ValueError) as error:
        decode(target, Autoregressive(), prompts, **options)
    return str(error.value)


def test_a_prompt_that_fills_the_context_is_refused(target: Target) -> None:
    message = refused(target, [[7], [7] * 512])
    assert "512 tokens" in message and "ends at 512" in message and "shorten" in message


@pytest.mark.parametrize("prompts", [[], [[]], [[5], []]])
def test_an_empty_prompt_is_refused(prompts: list, target: Target) -> None:
    assert "a prompt is empty" in refused(target, prompts)


def test_a_token_that_the_target_does_not_have_is_refused(target: Target) -> None:
    for token in (-1, target.vocab_size):
        message = refused(target, [[5, 6], [7, token]])
        assert f"holds token {token}" in message and f"0 to {target.vocab_size - 1}" in message


def test_prompts_may_be_tensors_and_arrays_of_ids(target: Target) -> None:
    expected = decode(target, Autoregressive(), PROMPTS[0], 6).tokens
    ids = torch.tensor(PROMPTS[0])
    for prompt in (ids, ids.numpy(), list(ids.numpy()), tuple(PROMPTS[0])):
        assert decode(target, Autoregressive(), prompt, 6).tokens == expected
    for batch in (ids[None], [ids], ids.numpy()[None]):
        assert [one.tokens for one in decode(target, Autoregressive(), batch, 6)] == [expected]


def test_logits_that_are_no_numbers_are_refused_before_a_token_is_said(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Target.logits
    monkeypatch.setattr(Target, "logits", lambda self, states: honest(self, states) * torch.nan)
    message = refused(target, [[5, 6]])
    assert "no finite logits" in message and "bfloat16 or float32" in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-38}, "0 (greedy) or at least 0.0001"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 prompts"),
        ({"seed": []}, "0 seeds for 1 prompts"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, named: str, target: Target) -> None:
    assert named in refused(target, PROMPTS[0], **options)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["oracle", "bushy", "adversary"])
def test_each_sequence_of_a_batch_gets_what_it_gets_alone(
    name: str, options: dict, stopping_target: tuple[Target, list[list[int]]]
) -> None:
    target, _ = stopping_target
    options = options | {"max_new_tokens": NUM_NEW}
    seeds = [100, 101, 7, 3]
    alone = [
        decode_autoregressively(target, prompt, **options | {"seed": [seed]})
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    said = tokens_of(alone)
    together = decode(target, drafters(said)[name], PROMPTS, **options | {"seed": seeds})
    assert tokens_of(together) == said
    assert len(set(map(len, said))) > 1, "all ended together"


def test_copies_of_a_prompt_agree_greedily_and_part_when_sampled(target: Target) -> None:
    copies = [PROMPTS[0]] * 3
    greedy = tokens_of(decode_autoregressively(target, copies, max_new_tokens=12))
    assert greedy[0] == greedy[1] == greedy[2]
    sampled = tokens_of(decode_autoregressively(target, copies, max_new_tokens=12, **SAMPLED))
    assert len(set(map(tuple, sampled))) == 3
    options = SAMPLED | {"seed": [9, 9, 4]}
    keyed = tokens_of(decode_autoregressively(target, copies, max_new_tokens=12, **options))
    assert keyed[0] == keyed[1] != keyed[2]


def test_one_seed_counts_up_over_the_batch(target: Target) -> None:
    counted = decode_autoregressively(target, PROMPTS, max_new_tokens=12, **SAMPLED)
    options = SAMPLED | {"seed": [5, 6, 7, 8]}
    given = decode_autoregressively(target, PROMPTS, max_new_tokens=12, **options)
    assert tokens_of(counted) == tokens_of(given)


def test_a_perfect_drafter_has_tau_of_its_levels_and_the_bonus(
    target: Target, words: list[list[int]]
) -> None:
    for generation in decode(target, Scripted(words), PROMPTS, max_new_tokens=NUM_NEW):
        assert generation.tau == 5 and generation.accepted == [4] * 5 == generation.drafted
    for generation in decode_autoregressively(target, PROMPTS, max_new_tokens=NUM_NEW):
        assert generation.tau == 1 and generation.accepted == [0] * 25 == generation.drafted


@pytest.mark.parametrize("name", DRAFTERS)
def test_what_is_counted_is_what_was_emitted(
    name: str, target: Target, words: list[list[int]]
) -> None:
    drafter, new_per_round = drafters(words)[name], []
    drafter.propose, num_drafted = counting(drafter), []
    generations = decode(
        target, drafter, PROMPTS, max_new_tokens=NUM_NEW, on_round=new_per_round.append
    )
    for generation, emitted in zip(generations, drafter.emitted, strict=True):
        assert 1 + sum(a + 1 for a in generation.accepted) == len(emitted)
        assert generation.tokens == emitted[:NUM_NEW]
        assert len(generation.drafted) == generation.num_passes
        assert generation.tau == (NUM_NEW - 1) / generation.num_passes
        num_drafted += generation.drafted
    assert sum(new_per_round) == len(PROMPTS) * (NUM_NEW - 1)
    assert sorted(num_drafted) == sorted(drafter.num_drafted)


def counting(drafter: Scripted) -> Callable:
    """Its `propose`, noting the size of every tree."""
    propose, drafter.num_drafted = drafter.propose, []

    def noting() -> object:
        tree = propose()
        drafter.num_drafted += (tree.num_nodes - 1).tolist()
        return tree

    return noting


def test_gaps_are_the_leads_of_the_tokens_emitted(target: Target, words: list[list[int]]) -> None:
    generations = decode(target, Scripted(words), PROMPTS, max_new_tokens=9, record_gaps=True)
    for prompt, said, generation in zip(PROMPTS, words, generations, strict=True):
        _, states = target.features(torch.tensor([prompt + said[:8]]))
        best = target.logits(states[0, len(prompt) - 1 :]).topk(2).values
        assert generation.gaps == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-3)
    assert decode(target, Scripted(words), PROMPTS[0], max_new_tokens=9).gaps == []


def test_seconds_are_split_over_the_parts_of_a_round(
    target: Target, words: list[list[int]]
) -> None:
    generation = decode(target, Scripted(words), PROMPTS[0], max_new_tokens=9)
    parts = generation.seconds_by_part
    assert set(parts) == {"prefill", "draft", "target", "verify", "keep", "observe"}
    assert 0 < parts["prefill"] <= generation.prefill_seconds < generation.seconds
    assert sum(parts.values()) <= generation.seconds


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64])
def test_race_times_depend_on_seed_and_position_alone(length: int) -> None:
    seeds = [3, 2**40, 3, 11]
    whole, times = (position_race_times(seeds, n, 50) for n in (100, length))
    assert torch.equal(times, whole[:, :length])
    for row, seed in enumerate(seeds):
        assert torch.equal(position_race_times([seed], length, 50)[0], times[row])
    assert torch.equal(times[0], times[2]) and not torch.equal(times[0], times[3])


def test_race_times_of_neighbouring_seeds_are_exponential_and_unrelated() -> None:
    times = position_race_times(range(4000), 3, 1)[..., 0].double()
    uniforms = (-times).exp()
    assert 0 < uniforms.min() and uniforms.max() < 1
    ranked = uniforms.sort(0).values - torch.linspace(0, 1, 4000).double()[:, None]
    assert ranked.abs().max() < 0.035, "Kolmogorov-Smirnov at about one in ten thousand"
    neighbours = torch.cat([uniforms[:-1], uniforms[1:]], 1)
    related = torch.corrcoef(neighbours.T) - torch.eye(6)
    assert related.abs().max() < 0.07, "four and a half standard errors"


def test_without_a_seed_the_first_token_follows_the_target_and_a_batch_repeats_as_a_whole(
    target: Target,
) -> None:
    options = {"max_new_tokens": 2, "temperature": 1.0, "seed": None}
    copies = [PROMPTS[0]] * 3000
    torch.manual_seed(5)
    drawn = tokens_of(decode_autoregressively(target, copies, **options))
    torch.manual_seed(5)
    assert tokens_of(decode_autoregressively(target, copies, **options)) == drawn
    assert tokens_of(decode_autoregressively(target, copies, **options)) != drawn
    _, scores = target.prefill([PROMPTS[0]], 64)
    expected = scores.logits[0, 0].double().softmax(-1)
    first = torch.tensor([tokens[0] for tokens in drawn])
    found = torch.bincount(first, minlength=len(expected)).double() / len(drawn)
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((found - expected).abs() <= 4.5 * deviation + 1e-3).all()
    assert (found > 0).sum() > 1, "the target leaves nothing to draw"


def test_a_drafter_that_foresees_draws_wants_a_seed(target: Target) -> None:
    class Seer(Autoregressive):
        def foresee(self, times_at: object, sampling: object) -> None: ...

    with pytest.raises(ValueError, match="give a seed, not None"):
        decode(target, Seer(), PROMPTS[0], temperature=1.0, seed=None)
    decode(target, Seer(), PROMPTS[0], max_new_tokens=2, seed=None)  # greedy: nothing is drawn


def test_small_race_times_are_not_multiples_of_a_step_of_float32() -> None:
    # from uniforms of 24 bits, tokens rarer than 6e-8 would arrive too often or never
    times = position_race_times(range(200), 500, 10_000).flatten().sort().values[:500]
    assert times[0] > 0 and (times[1:] > times[:-1]).float().mean() > 0.99


def probs_of_transformers(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList(warpers)(None, logits).softmax(-1)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.9])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-4])
def test_what_is_sampled_from_is_what_transformers_samples_from(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = 3 * torch.randn(64, 100)
    found = Sampling(temperature, top_p, top_k).probs(logits)
    expected = probs_of_transformers(logits, temperature, top_k, top_p)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_distribution_has_the_shape_of_its_logits_and_is_float32() -> None:
    logits = torch.randn(2, 3, 50)
    probs = Sampling(0.8, 0.9, 5).probs(logits.bfloat16())
    assert (probs.shape, probs.dtype) == (logits.shape, torch.float32)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3))


def masks(size: int) -> Tensor:
    """Every mask of so many rows that keeps one at least."""
    return torch.tensor([[bool(n >> i & 1) for i in range(size)] for n in range(1, 2**size)])


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_gaps_are_filled_by_moving_the_fewest_rows(size: int) -> None:
    for is_kept in masks(size):
        order, kept = fill_gaps(is_kept).tolist(), is_kept.nonzero()[:, 0].tolist()
        assert sorted(order) == kept
        num_moved = sum(place != row for place, row in enumerate(order))
        assert num_moved == sum(row >= len(kept) for row in kept)
