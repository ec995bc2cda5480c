"""Every training-free drafter at work: lossless, replayable, and apart from other sequences."""

from __future__ import annotations

import random
from ast import literal_eval
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from test_losslessness_of_decoding import p_value, small_target  # noqa: F401
from test_ngram import NAMES, every_text_drafter
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specrepro import decoding, target_model
from specrepro.decoding import Autoregressive, Drafter, Generation, decode
from specrepro.draft_tree import DraftTree
from specrepro.ngram import Rest, RestConfig, Sam, SamConfig, StaticTexts, replay
from specrepro.recycling import Lookahead, LookaheadConfig, RecyclingConfig, TokenRecycling
from specrepro.suffix import SuffixArray
from specrepro.target_model import Target
from specrepro.tree_verify import Verdict

PROMPTS = [[10, 20, 30, 40], [50, 60, 70], [15, 25, 35, 45, 55, 65], [80]]
SHORT_PROMPTS = [[1, 2, 3, 4], [2, 5], [4, 4, 1], [3]]
NUM_NEW = 18
SAMPLINGS = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}]


def every_drafter(texts: Sequence[Sequence[int]], carries: bool = False) -> dict[str, Drafter]:
    others = {"Recycling": TokenRecycling(carries=carries), "Lookahead": Lookahead(carries=carries)}
    return every_text_drafter(texts, carries) | others


EVERY_NAME = (*NAMES, "Recycling", "Lookahead")


@pytest.fixture(scope="module")
def target(tiny_target_folder: Callable[..., Path]) -> Target:
    return target_model.load(str(tiny_target_folder("llama")), dtype="float32")


@pytest.fixture(scope="module")
def looping_target() -> Target:
    """A target of eight tokens, which soon repeats itself."""
    options = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=8, **options)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight.data, std=0.3 if weight.dim() > 1 else 1.0)
    return Target(model, None, "looping")


@cache
def _spoken(target: Target, prompts: str, options: str) -> list[list[int]]:
    decoded = decode(
        target, Autoregressive(), literal_eval(prompts), NUM_NEW, **literal_eval(options)
    )
    return [generation.tokens for generation in decoded]


def spoken(target: Target, prompts: list[list[int]], options: dict) -> list[list[int]]:
    """What the target says on its own."""
    return _spoken(target, repr(prompts), repr(options))


def num_accepted(generations: Sequence[Generation]) -> int:
    return sum(sum(generation.accepted) for generation in generations)


# --- lossless


@pytest.mark.parametrize("options", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_run_says_what_the_target_says(name: str, options: dict, target: Target) -> None:
    """In the second turn, too, when most drafts are right and run beyond the end."""
    expected = spoken(target, PROMPTS, options)
    drafter = every_drafter([expected[0][:12], expected[2]], carries=True)[name]
    turns = [decode(target, drafter, PROMPTS, NUM_NEW, **options) for _ in range(2)]
    for generations in turns:
        assert [generation.tokens for generation in generations] == expected
    if not name.startswith("PLD"):  # these answers hardly repeat themselves
        assert max(map(num_accepted, turns)) > 3, "little was accepted, so little was verified"


@pytest.mark.parametrize("options", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", [name for name in EVERY_NAME if name != "Recycling"])
def test_a_target_that_repeats_itself_keeps_its_words(
    name: str, options: dict, looping_target: Target
) -> None:
    expected = spoken(looping_target, SHORT_PROMPTS, options)
    drafter = every_drafter(expected[:1])[name]
    generations = decode(looping_target, drafter, SHORT_PROMPTS, NUM_NEW, **options)
    assert [generation.tokens for generation in generations] == expected
    assert num_accepted(generations) > 10


@pytest.mark.parametrize("name", ["SAM", "SuffixDecoding", "PIA", "REST", "Recycling"])
def test_a_stop_token_inside_an_accepted_run_ends_the_answer(
    name: str, tiny_target_folder: Callable[..., Path], target: Target
) -> None:
    (expected,) = spoken(target, PROMPTS[:1], SAMPLINGS[0])
    stop = next(token for token in expected[9:] if expected.index(token) > 8)
    folder = tiny_target_folder("llama", eos_token_id=stop)
    stopping = target_model.load(str(folder), dtype="float32")
    drafter = every_drafter([expected], carries=True)[name]
    decode(target, drafter, PROMPTS[0], NUM_NEW)
    generation = decode(stopping, drafter, PROMPTS[0], NUM_NEW)
    assert generation.tokens == expected[: expected.index(stop) + 1]
    if name != "Recycling":
        assert sum(generation.accepted) + generation.num_passes > len(generation.tokens)


# --- replay, and what a draft depends on


def assert_replayed(found: list[int], generation: Generation) -> None:
    """Equal but for what the last round accepted beyond the end of the answer."""
    assert found[:-1] == generation.accepted[:-1]
    assert len(found) == len(generation.accepted) and found[-1] <= generation.accepted[-1]
    num_left = len(generation.tokens) - 1 - sum(count + 1 for count in found[:-1])
    assert found[-1] == min(generation.accepted[-1], num_left)


@pytest.mark.parametrize("options", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_replay_of_the_ids_accepts_what_decoding_did(
    name: str, options: dict, target: Target, looping_target: Target
) -> None:
    """Sampled too: so no draft knows of the draws that judge it, nor of tokens that were cut."""
    looping = looping_target, SHORT_PROMPTS[:2], NUM_NEW
    for speaker, prompts, most in (looping, (target, [PROMPTS[0]] * 2, 13)):
        store = spoken(speaker, prompts[:1], options)
        online, offline = (every_drafter(store, carries=True)[name] for _ in range(2))
        for prompt in prompts:
            generation = decode(speaker, online, prompt, most, **options)
            assert_replayed(replay(prompt, generation.tokens, offline), generation)


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_round_is_counted_once_and_a_token_too(name: str, looping_target: Target) -> None:
    drafter = every_drafter([[1, 2, 3]])[name] if name != "Recycling" else SMALL_RECYCLING()
    for generation in decode(looping_target, drafter, SHORT_PROMPTS, NUM_NEW):
        accepted, drafted = generation.accepted, generation.drafted
        assert len(accepted) == len(drafted) == generation.num_passes
        assert all(0 <= a <= d < drafter.max_nodes for a, d in zip(accepted, drafted, strict=True))
        in_last_round = len(generation.tokens) - 1 - sum(count + 1 for count in accepted[:-1])
        assert 1 <= in_last_round <= accepted[-1] + 1


# --- what is kept, and for whom


@pytest.mark.parametrize("name", EVERY_NAME)
def test_a_sequence_drafts_in_a_batch_as_it_does_alone(name: str, target: Target) -> None:
    (store,) = spoken(target, PROMPTS[1:2], SAMPLINGS[0])
    drafter = every_drafter([store])[name]
    together = decode(target, drafter, PROMPTS, NUM_NEW)
    for row in (0, 3):
        alone = decode(target, drafter, PROMPTS[row], NUM_NEW)
        assert together[row].accepted == alone.accepted
        assert together[row].drafted == alone.drafted


@pytest.mark.parametrize("name", ["SAM", "SAM, filled", "SuffixDecoding", "PIA", "Recycling"])
def test_what_is_carried_helps_the_next_turn_and_reset_ends_it(name: str, target: Target) -> None:
    drafter = every_drafter([], carries=True)[name]
    first, second = (decode(target, drafter, PROMPTS[0], NUM_NEW) for _ in range(2))
    assert sum(second.accepted) > sum(first.accepted)
    drafter.reset()
    assert decode(target, drafter, PROMPTS[0], NUM_NEW).drafted == first.drafted


@pytest.mark.parametrize("name", EVERY_NAME)
def test_nothing_is_carried_unless_asked_for(name: str, target: Target) -> None:
    drafter = every_drafter([[1, 2]])[name]
    first, second = (decode(target, drafter, PROMPTS[0], NUM_NEW) for _ in range(2))
    assert (first.accepted, first.drafted) == (second.accepted, second.drafted)


@pytest.mark.parametrize("name", ["SAM", "PIA", "Recycling", "Lookahead"])
def test_each_sequence_of_a_batch_carries_its_own(name: str, target: Target) -> None:
    drafter = every_drafter([], carries=True)[name]
    decode(target, drafter, PROMPTS, NUM_NEW)
    together = decode(target, drafter, PROMPTS[:2], NUM_NEW)
    drafter.reset()
    decode(target, drafter, PROMPTS[0], NUM_NEW)
    alone = decode(target, drafter, PROMPTS[0], NUM_NEW)
    assert together[0].drafted == alone.drafted


# --- in distribution

RNG = random.Random(0)
STORE = [RNG.choices(range(5), k=12) for _ in range(20)]


def SMALL_RECYCLING() -> TokenRecycling:
    return TokenRecycling(RecyclingConfig(2, ((2,), (2, 1))))


SMALL = {
    "SAM, static": lambda: Sam(SamConfig(max_nodes=7), StaticTexts(STORE, 4)),
    "REST": lambda: Rest(SuffixArray.of(STORE), RestConfig(num_draft=6, num_tokens=3)),
    "Recycling": SMALL_RECYCLING,
    "Lookahead": lambda: Lookahead(LookaheadConfig(level=3, window=2, num_guesses=2)),
}


@pytest.mark.parametrize("name", SMALL)
def test_whole_sequences_follow_the_target(name: str, small_target: Target) -> None:  # noqa: F811
    p = p_value(small_target, SMALL[name](), {"temperature": 1.0}, seed=40_000)
    assert p > 1e-3, f"p = {p:.1e}: the sequences are not the target's"


def independent_rows() -> Callable[..., Verdict]:
    """REST's rule: every path of the tree is compared with a sample of its own, the longest wins.

    Behind it comes a token drawn from the target; REST's code takes the best one, which is worse.
    """
    rng = random.Random(0)

    def agreement(tokens: list[int], path: list[int], probs: list[list[float]]) -> list[int]:
        for place, (node, child) in enumerate(zip(path, path[1:], strict=False)):
            if rng.choices(range(5), probs[node])[0] != tokens[child]:
                return path[: place + 1]
        return path

    def emit(tree: DraftTree, row: int, probs: list[list[float]]) -> tuple[list[int], list[int]]:
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        paths = {0: [0]}
        for node in range(1, int(tree.num_nodes[row])):
            paths[node] = [*paths[parents[node]], node]
        leaves = [path for node, path in paths.items() if node not in parents]
        best = max((agreement(tokens, path, probs) for path in leaves), key=len)
        bonus = rng.choices(range(5), probs[best[-1]])[0]
        return best, [*(tokens[node] for node in best[1:]), bonus]

    def verify(tree: DraftTree, target_probs: Callable, race_times: Tensor) -> Verdict:
        B, N = tree.tokens.shape
        probs = torch.stack([target_probs(torch.full((B,), n)) for n in range(N)], 1).tolist()
        rows = [emit(tree, row, probs[row]) for row in range(B)]
        path, tokens = (pad_sequence(column) for column in zip(*rows, strict=True))
        num_accepted = (path >= 0).sum(1) - 1
        return Verdict(path, num_accepted, tokens, tokens.gather(1, num_accepted[:, None])[:, 0])

    return verify


def pad_sequence(rows: Sequence[list[int]]) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)


def test_the_rule_of_rests_own_code_is_found_out(
    small_target: Target,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "verify_sample", independent_rows())
    p = p_value(small_target, SMALL["REST"](), {"temperature": 1.0}, seed=40_000)
    assert p < 1e-9, f"p = {p:.1e}"
