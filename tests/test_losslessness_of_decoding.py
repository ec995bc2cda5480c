"""Whatever is drafted, the target's own words come out: token for token, and in distribution."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import TARGET_FAMILIES
from scipy.stats import chisquare
from scripted_drafters import FixedTree, drafters, said_by_generate
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specrepro import decoding, target_model
from specrepro.decoding import Autoregressive, Drafter, Generation, Sampling, decode
from specrepro.draft_tree import DraftTree
from specrepro.target_model import Target
from specrepro.tree_verify import Verdict

PROMPTS = [[10, 20, 30, 40], [50, 60, 70], [15, 25, 35, 45, 55, 65], [80]]
NUM_NEW = 24
DRAFTERS = tuple(drafters([]))
SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 10, "top_p": 0.8},
]

Spoken = Callable[[str], tuple[Target, list[list[int]]]]


@pytest.fixture(scope="module")
def spoken(tiny_target_folder: Callable[..., Path]) -> Spoken:
    """The target of a family, and what `transformers.generate` says after each prompt."""

    @cache
    def target_and_words(family: str) -> tuple[Target, list[list[int]]]:
        folder = str(tiny_target_folder(family))
        words = said_by_generate(folder, PROMPTS, NUM_NEW)
        return target_model.load(folder, dtype="float32"), words

    return target_and_words


def assert_acceptance_is_that_of(name: str, generations: list[Generation]) -> None:
    """A run that accepts nothing proves nothing about acceptance, so each must do its part."""
    per_sequence = [sum(generation.accepted) for generation in generations]
    if name in ("adversary", "empty"):
        assert per_sequence == [0] * len(generations)
    elif name == "oracle":
        assert all(set(generation.accepted[:-1]) == {4} for generation in generations)
    elif name != "random":
        assert min(per_sequence) > 3, f"{per_sequence} accepted"
        assert len({tuple(g.accepted) for g in generations}) == len(generations), "in lockstep"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("family", TARGET_FAMILIES)
def test_greedy_tokens_are_those_of_generate(
    family: str, name: str, batch: int, spoken: Spoken
) -> None:
    target, words = spoken(family)
    drafter = drafters(words[:batch])[name]
    generations = decode(target, drafter, PROMPTS[:batch], max_new_tokens=NUM_NEW)
    assert [generation.tokens for generation in generations] == words[:batch]
    assert_acceptance_is_that_of(name, generations)


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_sampled_run_repeats_the_autoregressive_run_of_its_seed(
    name: str, options: dict, spoken: Spoken
) -> None:
    target, _ = spoken("llama")
    options = options | {"seed": 7, "max_new_tokens": NUM_NEW}
    words = [g.tokens for g in decode(target, Autoregressive(), PROMPTS, **options)]
    generations = decode(target, drafters(words)[name], PROMPTS, **options)
    assert [generation.tokens for generation in generations] == words
    assert_acceptance_is_that_of(name, generations)


VOCAB_SIZE, LENGTH, NUM_RUNS = 5, 3, 6000
PROMPT = [1, 3]
TREES = {
    "star": FixedTree([0, 2, 3], [0, 0, 0]),
    "chain": FixedTree([2, 4], [0, 1]),
    "tree": FixedTree([0, 1, 2, 0, 3, 1], [0, 0, 0, 1, 1, 2]),
    "no draft": Autoregressive(),
}


@pytest.fixture(scope="module")
def small_target() -> Target:
    """A target of five tokens, whose distributions differ from prefix to prefix."""
    options = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB_SIZE, eos_token_id=None, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight.data, std=0.4 if weight.dim() > 1 else 1.0)
    return Target(model, None, "small")


def exact_distribution(target: Target, sampling: Sampling) -> Tensor:
    """The probability of every sequence of `LENGTH` tokens, in lexicographic order."""
    sequences = torch.tensor(list(product(range(VOCAB_SIZE), repeat=LENGTH)))
    prompts = torch.tensor(PROMPT).expand(len(sequences), -1)
    states = target.features(torch.cat([prompts, sequences], 1))[1][:, len(PROMPT) - 1 : -1]
    probs = sampling.probs(target.logits(states)).double()
    return probs.gather(2, sequences[..., None]).prod(1)[:, 0]


def p_value(target: Target, drafter: Drafter, options: dict, seed: int = 0) -> float:
    """Chi-square of whole sequences against the exact distribution; rare ones share one cell."""
    expected = NUM_RUNS * exact_distribution(target, Sampling(**options))
    prompts = [PROMPT] * NUM_RUNS
    generations = decode(target, drafter, prompts, LENGTH, seed=seed, **options)
    was_accepted = any(max(generation.accepted) for generation in generations)
    assert was_accepted or drafter.max_nodes == 1, "nothing was accepted, so nothing was verified"
    words = torch.tensor([generation.tokens for generation in generations])
    places = (words * VOCAB_SIZE ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    found = torch.bincount(places, minlength=len(expected)).double()
    assert not found[expected == 0].any(), "a sequence came out that the target never says"
    is_rare = expected < 5
    cells = [torch.cat([x[~is_rare], x[is_rare].sum()[None]]) for x in (found, expected)]
    observed, wanted = (x[cells[1] > 0].numpy() for x in cells)
    assert len(wanted) > 20, "too few cells to tell two distributions apart"
    return chisquare(observed, wanted * (NUM_RUNS / wanted.sum())).pvalue


@pytest.mark.parametrize("options", SAMPLINGS[:2], ids=str)
@pytest.mark.parametrize("name", TREES)
def test_whole_sequences_follow_the_target(name: str, options: dict, small_target: Target) -> None:
    seed = NUM_RUNS * list(TREES).index(name)
    p = p_value(small_target, TREES[name], options, seed)
    assert p > 1e-3, f"p = {p:.1e}: the sequences are not the target's"


def rejection_loop(residual: bool, renormalise: bool) -> Callable[..., Verdict]:
    """Sampling written as tries of one sibling after another, right only with both corrections.

    Child x is accepted with its probability. A rejected one leaves the distribution (`residual`),
    and the rest is scaled up to one before the next try (`renormalise`).
    """
    rng = random.Random(0)

    def emit(tree: DraftTree, row: int, probs: list[list[float]]) -> tuple[list[int], list[int]]:
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        path, emitted, is_descending = [0], [], True
        while is_descending:
            left, is_descending = list(probs[path[-1]]), False
            for child in [n for n, p in enumerate(parents) if p == path[-1]]:
                mass = sum(left) if renormalise else 1.0
                if rng.random() * mass < left[tokens[child]]:
                    path.append(child)
                    emitted.append(tokens[child])
                    is_descending = True
                    break
                left[tokens[child]] *= not residual
        return path, [*emitted, rng.choices(range(VOCAB_SIZE), left)[0]]

    def verify(tree: DraftTree, target_probs: Callable, race_times: Tensor) -> Verdict:
        B, N = tree.tokens.shape
        probs = torch.stack([target_probs(torch.full((B,), n)) for n in range(N)], 1).tolist()
        rows = [emit(tree, row, probs[row]) for row in range(B)]
        path, tokens = (
            torch.tensor([x + [-1] * (N - len(x)) for x in column])
            for column in zip(*rows, strict=True)
        )
        num_accepted = (path >= 0).sum(1) - 1
        return Verdict(path, num_accepted, tokens, tokens.gather(1, num_accepted[:, None])[:, 0])

    return verify


@pytest.mark.parametrize("name", ["star", "tree"])
@pytest.mark.parametrize(
    ("residual", "renormalise", "is_right"),
    [(True, True, True), (True, False, False), (False, False, False)],
)
def test_the_same_test_tells_a_right_rule_from_wrong_ones(
    name: str,
    residual: bool,
    renormalise: bool,
    is_right: bool,
    small_target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "verify_sample", rejection_loop(residual, renormalise))
    p = p_value(small_target, TREES[name], {"temperature": 1.0})
    assert p > 1e-3 if is_right else p < 1e-9, f"p = {p:.1e}"
