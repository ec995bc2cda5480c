"""One loop for every drafter: the loss it streams, what survives an interruption, what is kept."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from specrepro import checkpoints, draft_training
from specrepro.draft_training import LoopConfig, soft_cross_entropy

CONFIG = LoopConfig(learning_rate=0.05, warmup_steps=2, total_steps=9, save_seconds=2.5)


def tiny_head() -> nn.Module:
    """The same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def batch_of(step: int, rank: int = 0) -> Tensor:
    """Four rows that depend on the step and the process alone."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_through(module: nn.Module) -> draft_training.Loss:
    """Squared error against the sine of the inputs' sum, with one metric to log."""

    def loss_of(batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        loss = (module(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
        return loss, {"seen": batch[0, 0].item()}

    return loss_of


def run(folder: Path, config: LoopConfig = CONFIG, **options: object) -> nn.Module:
    module = tiny_head()
    options = {"batch_at": batch_of, "resume": False} | options
    return draft_training.train(
        module, options.pop("batch_at"), loss_through(module), config, folder, **options
    )


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in log_of(folder) if "loss" in line]


def states_of(folder: Path) -> dict[str, Tensor]:
    """Everything a run leaves behind: weights, optimiser, step and best state."""
    state = checkpoints.load_tensors(folder / "training_state.safetensors")
    best = checkpoints.load_tensors(folder / "best.safetensors")
    return state | {f"best.{name}": tensor for name, tensor in best.items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{name} differs"


def weight_norm(module: nn.Module) -> float:
    """A score that rises and falls as training goes on."""
    return math.sin(37 * sum(p.detach().square().sum().item() for p in module.parameters()))


class Killed(Exception):
    """Stands for whatever stops a run."""


def killed_at(step: int) -> Callable[[int], Tensor]:
    def batch_at(now: int) -> Tensor:
        if now == step:
            raise Killed
        return batch_of(now)

    return batch_at


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a second, so a run of CONFIG saves at every third step."""

    class Clock:
        now = 0

        def monotonic(self) -> int:
            self.now += 1
            return self.now

    monkeypatch.setattr(draft_training, "time", Clock())


# --- schedule and loss


def test_rate_climbs_to_the_peak_and_falls_to_its_final_fraction():
    config = LoopConfig(learning_rate=2.0, warmup_steps=4, total_steps=24, final_fraction=0.1)
    assert config.rate(0) == 0.5
    assert config.rate(3) == config.rate(4) == 2.0
    assert config.rate(14) == pytest.approx(2.0 * (0.1 + 0.9 / 2)), "half-way down the cosine"
    assert config.rate(24) == config.rate(1000) == pytest.approx(0.2)
    assert replace(config, warmup_steps=0).rate(0) == 2.0


def test_rate_of_each_step_is_what_the_optimiser_uses(tmp_path):
    config = replace(CONFIG, total_steps=1, clip=1e9, warmup_steps=4)
    before, after = tiny_head(), run(tmp_path, config)
    # the first step of Adam moves every weight by the learning rate
    moved = (after[0].weight - before[0].weight).abs()
    assert torch.allclose(moved, torch.full_like(moved, config.learning_rate / 4), rtol=1e-3)


def test_steps_are_adams_with_the_papers_betas_on_gradients_cut_to_half_a_unit(tmp_path):
    """Section 4 of EAGLE-3: betas (0.9, 0.95), gradients clipped at 0.5."""
    config = LoopConfig(learning_rate=0.1, warmup_steps=0, total_steps=3, final_fraction=1.0)
    pull = [torch.tensor([[30.0, 40.0]]), torch.tensor([[0.3, -0.1]]), torch.tensor([[-8.0, 6.0]])]

    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    draft_training.train(
        module, lambda step: pull[step], lambda g: ((module.weight * g).sum(), {}), config,
        tmp_path, resume=False, score=lambda _: 0.0,
    )  # fmt: skip
    weight, m, v = torch.zeros(1, 2), 0.0, 0.0
    for step, gradient in enumerate(pull, 1):
        cut = gradient * min(1.0, 0.5 / gradient.norm().item())
        m, v = 0.9 * m + 0.1 * cut, 0.95 * v + 0.05 * cut.square()
        unbiased = (m / (1 - 0.9**step), v / (1 - 0.95**step))
        weight -= 0.1 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-4, atol=1e-5)


def soft_cross_entropy_reference(
    states: Tensor, weight: Tensor, teacher: Tensor, rows: Tensor
) -> Tensor:
    p = teacher[rows].softmax(-1)
    return -(p * (states @ weight.T).log_softmax(-1)).sum()


@pytest.mark.parametrize("num_rows", [0, 1, 255, 256, 519])  # nothing, and either side of a chunk
def test_streamed_soft_cross_entropy_is_pytorchs(num_rows):
    states, weight = torch.randn(num_rows, 6), torch.randn(11, 6)
    teacher, rows = 3 * torch.randn(40, 11), torch.randint(40, (num_rows,))
    ours = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, agrees = soft_cross_entropy(*ours, teacher, rows)
    expected = soft_cross_entropy_reference(*theirs, teacher, rows)
    (0.3 * loss).backward(), (0.3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    is_same = (states @ weight.T).argmax(-1) == teacher[rows].argmax(-1)
    assert agrees.tolist() == is_same.float().tolist()
    assert num_rows < 255 or 0 < is_same.sum() < num_rows, "agreement never varied"


# --- stopped and resumed


@pytest.mark.parametrize("step", [1, 4, 8])  # before the first save, between two, at the last step
def test_stopped_and_resumed_ends_in_the_same_bits(tmp_path, ticking, step):
    config = replace(CONFIG, evaluate_every=2)
    whole = run(tmp_path / "whole", config, score=weight_norm)
    with pytest.raises(Killed):
        run(tmp_path / "cut", config, score=weight_norm, batch_at=killed_at(step))
    assert steps_of(tmp_path / "cut") == list(range(step))
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line that was being written
    resumed = run(tmp_path / "cut", config, score=weight_norm, resume=True)
    assert_same_bits(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    assert_same_bits(states_of(tmp_path / "cut"), states_of(tmp_path / "whole"))
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert steps_of(tmp_path / "cut") == list(range(9)), "one line a step"


def test_resuming_repeats_what_came_after_the_last_save_and_no_more(tmp_path, ticking):
    with pytest.raises(Killed):
        run(tmp_path, batch_at=killed_at(7))
    saved_step = int(checkpoints.load_tensors(tmp_path / "training_state.safetensors")["step"])
    assert 0 < saved_step < 7, "the interruption must fall between two saves"
    seen = []
    run(tmp_path, batch_at=lambda step: seen.append(step) or batch_of(step), resume=True)
    assert seen == list(range(saved_step, 9))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole = run(tmp_path, score=weight_norm)
    again = run(tmp_path, score=weight_norm, resume=True)
    assert_same_bits(dict(again.named_parameters()), dict(whole.named_parameters()))
    assert steps_of(tmp_path) == list(range(9))


def test_training_that_diverges_stops_and_keeps_what_was_saved(tmp_path, ticking):
    def poisoned(step: int) -> Tensor:
        return batch_of(step) * (torch.inf if step == 7 else 1)

    with pytest.raises(ValueError, match="diverged: at step 7 .* lower learning rate"):
        run(tmp_path, batch_at=poisoned)
    saved = checkpoints.load_tensors(tmp_path / "training_state.safetensors")
    assert 0 < saved.pop("step") < 7 and saved.pop("best") == -math.inf, "it was never scored"
    assert all(x.isfinite().all() for x in saved.values())


def test_changed_setting_refuses_to_resume_and_is_named(tmp_path):
    run(tmp_path, identity={"corpus": "abc", "betas": (1, 2)})
    with pytest.raises(ValueError, match=r"loop\.learning_rate was 0\.05 and is 0\.1") as refused:
        config = replace(CONFIG, learning_rate=0.1)
        run(tmp_path, config, identity={"corpus": "xyz", "betas": (1, 2)}, resume=True)
    assert "corpus was 'abc' and is 'xyz'" in str(refused.value)
    assert "betas" not in str(refused.value) and "warmup_steps" not in str(refused.value)
    run(tmp_path, identity={"corpus": "abc", "betas": (1, 2)}, resume=True)


def test_a_fresh_run_takes_nothing_from_an_earlier_one_in_its_folder(tmp_path, ticking):
    run(tmp_path, score=lambda _: 100.0)
    with pytest.raises(Killed):
        run(tmp_path, replace(CONFIG, seed=1), batch_at=killed_at(1), score=weight_norm)
    assert steps_of(tmp_path) == [0]
    resumed = run(tmp_path, replace(CONFIG, seed=1), score=weight_norm, resume=True)
    assert_same_bits(dict(resumed.named_parameters()), dict(run(tmp_path / "b").named_parameters()))
    assert draft_training.kept_score(tmp_path) <= 1


def test_state_with_the_highest_score_is_the_one_returned(tmp_path):
    config = replace(CONFIG, evaluate_every=3)
    scores, seen = iter([0.5, 2.0, 1.0]), []

    def score(module: nn.Module) -> float:
        seen.append({name: p.detach().clone() for name, p in module.named_parameters()})
        return next(scores)

    module = run(tmp_path, config, score=score)
    assert_same_bits(dict(module.named_parameters()), seen[1])
    assert not torch.equal(seen[1]["0.weight"], seen[2]["0.weight"])
    assert draft_training.kept_score(tmp_path) == 2.0
    assert [line["step"] for line in log_of(tmp_path) if "score" in line] == [2, 5, 8]


def test_heads_that_are_compared_after_equal_steps_keep_their_last_state(tmp_path):
    scores = iter([2.0, 1.0, 0.5])
    config = replace(CONFIG, evaluate_every=3, keeps_last=True)
    module = run(tmp_path / "a", config, score=lambda _: next(scores))
    last = run(tmp_path / "b", CONFIG)
    assert_same_bits(dict(module.named_parameters()), dict(last.named_parameters()))
    assert draft_training.kept_score(tmp_path / "a", keeps_last=True) == 0.5


def test_a_score_that_is_not_a_number_never_wins(tmp_path):
    scores = iter([1.0, math.nan, 0.0])
    run(tmp_path, replace(CONFIG, evaluate_every=3), score=lambda _: next(scores))
    assert checkpoints.load_tensors(tmp_path / "training_state.safetensors")["best"].item() == 1.0


# --- several processes


def one_of_two(rank: int, port: int, folder: str) -> None:
    """A process as torchrun starts it: train on its own batches and leave its last weights."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    assert draft_training.join_processes() == (rank, 2)
    module = run(Path(folder), batch_at=lambda step: batch_of(step, rank), score=weight_norm)
    checkpoints.save_tensors(Path(folder) / f"rank-{rank}", dict(module.named_parameters()))


def test_two_processes_take_the_steps_of_one_with_both_batches(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    alone = tiny_head()
    loss_of = loss_through(alone)

    def mean_loss(batches: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return sum(loss_of(batch)[0] for batch in batches) / 2, {}

    draft_training.train(
        alone, lambda step: (batch_of(step), batch_of(step, 1)), mean_loss, CONFIG, tmp_path / "one"
    )
    ranks = [checkpoints.load_tensors(tmp_path / f"rank-{rank}") for rank in (0, 1)]
    assert_same_bits(*ranks)
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(ranks[0][name], weight.detach(), rtol=1e-5, atol=1e-6)
    assert steps_of(tmp_path) == list(range(9)), "the first process alone writes the log"
    unlike = run(tmp_path / "first batches alone")
    assert (unlike[0].weight - alone[0].weight).abs().max() > 1e-3


def test_alone_there_is_one_process_and_nothing_to_average():
    assert draft_training.join_processes() == (0, 1)
    assert draft_training.is_first_process()
    module = tiny_head()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    draft_training.average_gradients(module)
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
