"""What the tests of every trained drafter ask alike: small conversations, a recipe, its outcome."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from specrepro import corpus, draft_training, prompts, recipes
from specrepro.decoding import Drafter, Generation, decode, decode_autoregressively
from specrepro.eagle3 import Eagle3, TrainingConfig, TreeConfig
from specrepro.recipes import Recipe
from specrepro.target_model import Target

PROMPT = [40, 71, 70, 85, 13, 20, 66, 9]
OTHER_PROMPTS = [[30, 31, 32], [50, 9, 8, 7, 6, 5, 44, 43, 42, 41], [77, 12, 90, 33, 61]]
RECIPE = Recipe(
    Eagle3(40, TreeConfig(2, 3, 8), TrainingConfig(steps=2)),
    draft_training.LoopConfig(learning_rate=1e-3, warmup_steps=2),
    batch_tokens=120,
    epochs=0.1,
)


@contextmanager
def world_of(little: Callable[..., Recipe]) -> Iterator[pytest.MonkeyPatch]:
    """A dozen training prompts and recipes of a few steps, with nothing to choose among states."""
    questions = [
        prompts.Prompt(f"q{n}", "training", ({"role": "user", "content": "word " * (1 + n % 3)},))
        for n in range(12)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "training_prompts", lambda: iter(questions))
        patch.setattr(recipes, "held_out_questions", lambda target: [])
        # which would take most of the time; it falls from look to look, so a last state is no best
        looks = count()
        patch.setattr(recipes, "held_out_tau", lambda *_: 1 + 1 / (1 + next(looks)))
        patch.setattr(Recipe, "of", little)
        yield patch


def small_corpus(target: Target, folder: Path) -> Path:
    """`folder`, with short answers to the training prompts."""
    corpus.generate(
        target, list(prompts.training_prompts()), folder, max_new_tokens=12, batch_size=6
    )
    return folder


def make_batch(target: Target, tokens: Tensor, is_answer: Tensor) -> corpus.Batch:
    taps, hidden = target.features(tokens)
    return corpus.Batch(tokens, is_answer, target.logits(hidden).argmax(-1), taps, hidden)


def two_conversations(target: Target, is_padded: bool = False) -> corpus.Batch:
    """20 tokens each; the answers are 6 to 19 and 9 to 16, and more words or padding follows."""
    tokens = torch.randint(5, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    tokens[1, 17:] *= not is_padded
    is_answer = torch.zeros(2, 20, dtype=torch.bool)
    is_answer[0, 6:] = is_answer[1, 9:17] = True
    return make_batch(target, tokens, is_answer)


def conversation(target: Target, prompt: list[int], answer: list[int]) -> corpus.Batch:
    tokens = torch.tensor([prompt + answer])
    return make_batch(target, tokens, torch.arange(tokens.shape[1])[None] >= len(prompt))


def answer_to_prompt(target: Target) -> corpus.Answer:
    """40 greedy tokens after PROMPT."""
    tokens = decode_autoregressively(target, PROMPT, max_new_tokens=40).tokens
    return corpus.Answer("", len(PROMPT), 0.0, 0, tokens)


def learn_by_heart(
    module: nn.Module, loss: Callable, target: Target, folder: Path, **loop: float
) -> nn.Module:
    """`module` trained on nothing but the answer to PROMPT."""
    batch = conversation(target, PROMPT, answer_to_prompt(target).tokens)
    config = draft_training.LoopConfig(warmup_steps=5, **loop)
    return draft_training.train(module, lambda step: batch, loss, config, folder)


def trained(
    recipe: Recipe, target: Target, features: Path, folder: Path
) -> tuple[Path, dict, list[dict]]:
    """The checkpoint, card and log of a run that learnt something."""
    out = recipes.make_checkpoint(recipe, target, features, folder / "work", folder / "out")
    card = json.loads((out / "card.json").read_text())
    log = [json.loads(line) for line in (folder / "work" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == card["recipe"]["loop"]["total_steps"] > 6
    third = len(losses) // 3  # of three epochs: the same answers in both; a surrogate has spikes
    assert median(losses[-third:]) < median(losses[:third]), losses
    assert card["held_out_tau"] == max(round(x["score"], 3) for x in log if "score" in x) >= 1
    assert card["command"].startswith(f"python -m specrepro.{recipe.method.name}")
    return out, card, log


def assert_says_what_the_target_says(target: Target, drafter: Drafter) -> None:
    """20 greedy tokens after PROMPT; in half precision only that it runs."""
    run = decode(target, drafter, PROMPT, max_new_tokens=20)
    if target.dtype == torch.float32:
        assert run.tokens == decode_autoregressively(target, PROMPT, max_new_tokens=20).tokens


def assert_ragged_batch_decodes_as_each_alone(
    target: Target, drafter: Drafter, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> list[Generation]:
    """Rows of different lengths end at different times; the others go on, alike and lossless."""
    asked, options = [PROMPT, *OTHER_PROMPTS], {"temperature": temperature, "max_new_tokens": 30}
    free = decode_autoregressively(target, asked, seed=[0, 1, 2, 3], **options)
    # two rows stop early, the first and the third
    stops = torch.tensor([free[0].tokens[9], free[2].tokens[14]])
    monkeypatch.setattr(target, "stop_ids", stops)
    plain = decode_autoregressively(target, asked, seed=[0, 1, 2, 3], **options)
    together = decode(target, drafter, asked, seed=[0, 1, 2, 3], **options)
    assert [run.tokens for run in together] == [run.tokens for run in plain]
    for seed, (prompt, run) in enumerate(zip(asked, together, strict=True)):
        alone = decode(target, drafter, prompt, seed=seed, **options)
        assert (run.tokens, run.accepted) == (alone.tokens, alone.accepted)
        assert run.drafted == alone.drafted
    assert len({len(run.tokens) for run in together}) > 1, "all rows ended together"
    assert sum(max(run.accepted) > 0 for run in together) > 1
    return together
