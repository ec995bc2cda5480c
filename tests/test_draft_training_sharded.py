"""A target whose layers are spread over two processes trains a head as a whole target does."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drafter_cases import RECIPE
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from specrepro import checkpoints, corpus, draft_training, prompts, recipes
from specrepro.target_model import Target

NUM_STEPS = 5
LOOP = replace(RECIPE.loop, total_steps=NUM_STEPS, evaluate_every=3)
QUESTIONS = [[40, 71, 70, 85, 13, 20, 66, 9], [30, 31, 32]]


def score_on(target: Target) -> Callable[[nn.Module], float]:
    return lambda module: recipes.held_out_tau(RECIPE.method, module, target, QUESTIONS)


def share_of(layers: nn.Module) -> float:
    """Of the layers' numbers, the part that lies in this process."""
    copies = [name for name, layer in layers.named_modules() if "forward" in vars(layer)]
    assert not copies, f"packed copies of whole weights: {copies}"
    weights = list(layers.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    return sum(w.to_local().numel() for w in weights) / sum(w.numel() for w in weights)


def one_of_two(
    rank: int, port: int, folder: Path, target_folder: str, asked: list[prompts.Prompt]
) -> None:
    """A process as torchrun starts it: it leaves the log of its run and its last weights."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    prompts.training_prompts = lambda: iter(asked)
    target = recipes.load_sharded(target_folder, "float32")
    assert share_of(target.decoder.layers) == 0.5
    features = corpus.FeatureCache(folder / "corpus", target.hidden_size)
    module = recipes.train(
        replace(RECIPE, loop=LOOP), target, features, folder / "two", score=score_on(target)
    )
    assert not isinstance(target.head.weight, DTensor), "the loss reads it as it is"
    checkpoints.save_tensors(folder / f"rank-{rank}", dict(module.named_parameters()))


def train_whole(target: Target, folder: Path) -> None:
    """One process that takes in each step what the two took."""
    features = corpus.FeatureCache(folder / "corpus", target.hidden_size)
    torch.manual_seed(LOOP.seed)
    module = RECIPE.method.new_module(target, features.answers)
    loss = RECIPE.method.loss(module, target)
    ids = corpus.prompt_ids(target.tokenizer, features.answers)
    order = corpus.batch_order(features.answers, RECIPE.batch_tokens, LOOP.seed, 2 * NUM_STEPS)

    def batches_at(step: int) -> list[corpus.Batch]:
        pair = order[2 * step : 2 * step + 2]
        return [features.batch(batch, ids).to(target.device, target.dtype) for batch in pair]

    def mean_loss(batches: list[corpus.Batch]) -> tuple[Tensor, dict[str, float]]:
        return sum(loss(batch)[0] for batch in batches) / 2, {}

    draft_training.train(
        module, batches_at, mean_loss, LOOP, folder / "one", score=score_on(target)
    )


def logged(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
def test_two_processes_with_half_the_layers_each_follow_the_loss_of_one(
    chat_target, tiny_chat_folder, features, training_prompts, tmp_path
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, tmp_path, str(tiny_chat_folder), training_prompts)
    torch.multiprocessing.spawn(one_of_two, arguments, nprocs=2)
    train_whole(chat_target, tmp_path)
    two, one = (logged(tmp_path / name, "loss") for name in ("two", "one"))
    assert len(two) == NUM_STEPS and two == pytest.approx(one, rel=1e-5)
    assert max(one) - min(one) > 1e-3, "a curve that is flat tells nothing"
    scores = logged(tmp_path / "two", "score")
    assert scores == logged(tmp_path / "one", "score") and len(scores) == 2
    ranks = [checkpoints.load_tensors(tmp_path / f"rank-{rank}") for rank in (0, 1)]
    assert all(torch.equal(weight, ranks[1][name]) for name, weight in ranks[0].items())


def test_a_target_is_not_spread_over_one_process(tiny_chat_folder):
    with pytest.raises(ValueError, match="start several with torchrun"):
        recipes.load_sharded(str(tiny_chat_folder))
