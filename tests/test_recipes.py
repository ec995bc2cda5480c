"""A checkpoint is made from the target's own features, by one road for every paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from specrepro import checkpoints, corpus, draft_training, prompts, recipes, target_model
from specrepro.decoding import decode, decode_autoregressively
from specrepro.eagle3 import Drafter, Eagle3, TrainingConfig, TreeConfig
from specrepro.recipes import Recipe
from specrepro.target_model import Target

PROMPT = [40, 71, 70, 85, 13, 20, 66, 9]
RECIPE = Recipe(
    Eagle3(40, TreeConfig(2, 3, 8), TrainingConfig(steps=2)),
    draft_training.LoopConfig(learning_rate=1e-3, warmup_steps=2),
    batch_tokens=120,
    epochs=0.1,
)


@pytest.fixture(scope="module")
def target(tiny_chat_folder: Path) -> Target:
    return target_model.load(str(tiny_chat_folder), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def training_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        prompts.Prompt(f"q{n}", "training", ({"role": "user", "content": "word " * (1 + n % 3)},))
        for n in range(12)
    ]
    monkeypatch.setattr(prompts, "training_prompts", lambda: iter(questions))
    monkeypatch.setattr(recipes, "held_out_questions", lambda target: [PROMPT, [30, 31, 32]])


@pytest.fixture
def features(target: Target, tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    questions = list(prompts.training_prompts())
    corpus.generate(target, questions, folder, max_new_tokens=12, batch_size=6)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_from_features_leaves_a_checkpoint_that_drafts(
    tiny_chat_folder, features, tmp_path, dtype
):
    target = target_model.load(str(tiny_chat_folder), dtype=dtype, device="cpu")
    out = recipes.make_checkpoint(
        replace(RECIPE, epochs=3), target, features, tmp_path / "work", tmp_path / "out"
    )
    card = json.loads((out / "card.json").read_text())
    cache = corpus.FeatureCache(features, target.hidden_size)
    assert card["corpus"] == cache.hash and card["processes"] == 1
    lines = [
        json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == card["recipe"]["loop"]["total_steps"] > 6
    assert sum(losses[-3:]) < sum(losses[:3])
    assert card["held_out_tau"] == max(round(x["score"], 3) for x in lines if "score" in x) >= 1
    drafter = Drafter.load(out, target)
    assert drafter.tree == RECIPE.method.tree
    run = decode(target, drafter, PROMPT, max_new_tokens=20)
    if dtype == "float32":
        assert run.tokens == decode_autoregressively(target, PROMPT, max_new_tokens=20).tokens


def test_another_draft_vocabulary_refuses_to_resume(target, features, tmp_path):
    folders = features, tmp_path / "work", tmp_path / "out"
    recipes.make_checkpoint(RECIPE, target, *folders)
    changed = replace(RECIPE, method=replace(RECIPE.method, draft_vocab_size=30))
    with pytest.raises(ValueError, match=r"method\.draft_vocab_size was 40 and is 30"):
        recipes.make_checkpoint(changed, target, *folders, resume=True)


def test_training_goes_on_from_another_checkpoint_and_the_card_says_so(target, features, tmp_path):
    first = recipes.make_checkpoint(RECIPE, target, features, tmp_path / "a", tmp_path / "first")
    still = replace(RECIPE, loop=replace(RECIPE.loop, learning_rate=0.0))
    second = tmp_path / "second"
    recipes.make_checkpoint(still, target, features, tmp_path / "b", second, start=first)
    assert checkpoints.digest(second) == checkpoints.digest(first), "nothing was learnt on top"
    card = json.loads((second / "card.json").read_text())
    assert card["start"]["sha256"] == checkpoints.digest(first)
    assert card["start"]["recipe"] == json.loads((first / "card.json").read_text())["recipe"]


def test_processes_share_the_batches_of_each_step(target, features, tmp_path, monkeypatch):
    """Two processes see in one step what one process sees in two."""

    def batches_of(rank: int, num_ranks: int, num_steps: int) -> list[list[list[int]]]:
        seen = []
        monkeypatch.setattr(draft_training, "join_processes", lambda: (rank, num_ranks))
        monkeypatch.setattr(
            draft_training, "train", lambda head, batch_at, *_, **__: seen.append(batch_at)
        )
        recipe = replace(RECIPE, loop=replace(RECIPE.loop, total_steps=num_steps))
        recipes.train(recipe, target, corpus.FeatureCache(features, target.hidden_size), tmp_path)
        return [seen[0](step).tokens.tolist() for step in range(num_steps)]

    alone = batches_of(0, 1, 6)
    assert alone[::2] == batches_of(0, 2, 3) and alone[1::2] == batches_of(1, 2, 3)
    assert alone[0] != alone[1]


def test_overrides_are_for_the_embedded_target_alone(target, monkeypatch):
    papers = Recipe.of(Eagle3, target)
    assert papers == Recipe(Eagle3())
    assert (papers.method.training.steps, papers.loop.learning_rate) == (5, 5e-5)
    monkeypatch.setattr(target, "name", "smollm2")
    own = Recipe.of(Eagle3, target)
    assert own.method.draft_vocab_size < 32000 and own.method.tree.total_tokens < 60
    assert own.loop.learning_rate > 5e-5 and own.method.training.step_decay == 0.8


def test_a_checkpoint_is_the_named_one_the_committed_one_or_made_here(target, tmp_path):
    assert recipes.obtain_checkpoint(Eagle3, target, "elsewhere") == Path("elsewhere")
    assert checkpoints.digest(recipes.obtain_checkpoint(Eagle3, target))
    work = tmp_path / "runs" / "eagle3"
    made = recipes.obtain_checkpoint(Eagle3, target, from_scratch=True, work=work, recipe=RECIPE)
    assert Drafter.load(made, target).tree == RECIPE.method.tree
    once = checkpoints.digest(made)
    recipes.obtain_checkpoint(Eagle3, target, from_scratch=True, work=work, recipe=RECIPE)
    assert checkpoints.digest(made) == once, "a second call goes on where the first ended"
