"""Heads tuned alike from one EAGLE-3 head, to be compared: GTO, the token loss alone, ablations.

`python -m specrepro.gto_arms runs/corpus` tunes, one after the other, what is not there yet.
Stopped at any time, by Ctrl-C or `timeout 3600`, it loses five minutes at most and goes on with the
same command; started twice, the two share the work. The corpus must not change meanwhile.

All begin from the same head and take as many steps over the same share of the corpus, except arms
of equal time: those train on the token loss alone for as long as GTO takes for its steps, going by
what a step of either costs on this machine (`cost.json`, throughput and memory beside it). Each
ends in its last state, whatever its looks said. At every look a head is also asked for the reward
of its trees on the corpus's last answers, which no arm is trained on (`looks.jsonl`).

The first head should not have seen the corpus either: it would have learnt by heart what the arms
can only unlearn. `python -m specrepro.corpus runs/corpus --committed --without FOLDER` leaves out
the answers of the packed corpus it was trained on.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specrepro import checkpoints, commands, corpus, draft_training, eagle3, recipes
from specrepro.eagle3_variants import claimed, start, training_parser
from specrepro.gto import GroupTreeLoss, Gto
from specrepro.recipes import Recipe
from specrepro.target_model import Target
from specrepro.target_model import load as load_target

WORK = Path("runs") / "whole" / "gto" / "arms"  # where tier `full` looks for them
LOOKS, COST = "looks.jsonl", "cost.json"
TOKENS_ALONE = {"tuning.weight": 0.0}
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Arm:
    """One head to tune, as its difference from GTO's own recipe."""

    name: str  # of its folder
    method: str  # as tables name it
    settings: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0  # of the order of batches
    equal_time: bool = False  # as long as GTO takes, not as many steps


HEADLINE = tuple(
    arm
    for seed in SEEDS
    for arm in (
        Arm(f"gto_{seed}", "GTO", seed=seed),
        Arm(f"tokens_{seed}", "Token loss only", TOKENS_ALONE, seed),
        Arm(f"tokens_time_{seed}", "Token loss only, equal time", TOKENS_ALONE, seed, True),
    )
)
ABLATION = (
    Arm("no_debias", "GTO without debiasing", {"tuning.debias": False}),
    *(Arm(f"groups_{m}", f"GTO, groups of {m}", {"tuning.group_size": m}) for m in (4, 16)),
    Arm("reward_max", "GTO, max over branches", {"tuning.reward": "max"}),
    Arm("reward_mean", "GTO, mean over branches", {"tuning.reward": "mean"}),
    Arm("reward_lme", "GTO, log-mean-exp", {"tuning.reward": "log-mean-exp"}),
    Arm("weight_5", "GTO, ten times the weight", {"tuning.weight": 5.0}),
    Arm("reward_expected", "GTO, expected tokens", {"tuning.reward": "expected"}),
    Arm("greedy", "GTO, greedy rewards", {"tuning.greedy": True}),
)
GROUPS_OF_1 = "GTO, groups of 1"  # whose advantage is none, whatever the trees: the token loss
ARMS = {arm.name: arm for arm in (*HEADLINE, *ABLATION)}


@dataclass(frozen=True, slots=True)
class Budget:
    """What every arm may use."""

    share: float = 0.25  # of the corpus
    steps: int = 500
    evaluations: int = 4  # looks at held-out tau and reward
    num_held_out: int = 16  # last answers of the corpus, which no arm is trained on
    num_answers: int | None = None  # of the corpus; None is all
    batch_tokens: int | None = None  # of a step; None is the recipe's

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or min(self.steps, self.evaluations, self.num_held_out) < 1:
            raise ValueError(
                f"share is {self.share}, steps {self.steps}, evaluations {self.evaluations} and"
                f" num_held_out {self.num_held_out}; give a part of the corpus and at least 1 each"
            )


@dataclass
class Workshop:
    """Where arms are tuned and kept."""

    target: Target
    work: Path = WORK
    start: Path = eagle3.CHECKPOINT  # of the head that all begin from
    budget: Budget = field(default_factory=Budget)

    def folder(self, arm: Arm) -> Path:
        """Of the arm's checkpoint, whether it is there or not."""
        return self.work / arm.name / "checkpoint"

    def card(self, arm: Arm) -> dict[str, Any] | None:
        """What a tuned arm's card says; None before that."""
        path = self.folder(arm) / "card.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def looks(self, arm: Arm) -> list[dict[str, float]]:
        """Step, tau and reward at each look, in the order of steps."""
        path = self.work / arm.name / LOOKS
        lines = path.read_text().splitlines() if path.is_file() else []
        # after an interruption a look may have been taken twice
        last = {one["step"]: one for one in map(json.loads, lines)}
        return [last[step] for step in sorted(last)]

    def log(self, arm: Arm) -> list[dict[str, float]]:
        """What was logged of each step."""
        path = self.work / arm.name / "training" / draft_training.LOG
        lines = path.read_text().splitlines() if path.is_file() else []
        return [one for one in map(json.loads, lines) if "loss" in one]

    def recipe(self, arm: Arm) -> Recipe:
        """The arm's own, but for how long it takes."""
        own = Recipe.of(Gto, self.target)
        is_committed = self.start == eagle3.CHECKPOINT  # whose place no card needs to tell
        settings = {"start": "" if is_committed else str(self.start), **arm.settings}
        batch_tokens = self.budget.batch_tokens or own.batch_tokens
        own = replace(
            own, loop=replace(own.loop, seed=arm.seed, keeps_last=True), batch_tokens=batch_tokens
        )
        return recipes.changed(own, settings)

    def tune(self, arm: Arm, features: Path) -> Path:
        """The arm's checkpoint, tuned unless it is there; goes on where it was interrupted."""
        if self.card(arm) is not None:
            self._require_same(arm)
            return self.folder(arm)
        num_answers, steps = self._num_answers(features), self.budget.steps
        if arm.equal_time:
            steps = max(1, round(steps * self.cost_ratio(features)))
        cache = corpus.features_in(features, self.target, num_answers)
        recipe = self.recipe(arm)
        _, num_ranks = draft_training.join_processes()
        in_one = corpus.num_batches(cache.answers, recipe.batch_tokens, 1.0)
        recipe = replace(recipe, epochs=steps * num_ranks / in_one)
        training = self.work / arm.name / "training"
        return recipes.make_checkpoint(
            recipe, self.target, features, training, self.folder(arm), start=self.start,
            evaluations=self.budget.evaluations, num_answers=num_answers, resume=True,
            score=_Look(self, recipe, training, self.held_out(features)),
        )  # fmt: skip

    def _num_answers(self, features: Path) -> int:
        """Of the corpus that is trained on."""
        total = len(self._whole(features))
        left = total - self.budget.num_held_out
        if left < 1:
            raise ValueError(
                f"the corpus has {total} answers, and {self.budget.num_held_out} are held out;"
                " answer more prompts or hold out fewer"
            )
        return min(left, max(1, round(self.budget.share * total)))

    def _whole(self, features: Path) -> corpus.Sequences:
        return corpus.features_in(features, self.target, self.budget.num_answers)

    def held_out(self, features: Path) -> list[corpus.Batch]:
        """The last answers of the corpus, one a batch."""
        cache = self._whole(features)
        ids = range(len(cache) - self.budget.num_held_out, len(cache))
        prompt_ids = corpus.prompt_ids(self.target.tokenizer, [cache.answers[i] for i in ids])
        return [self._to_device(cache.batch([i], prompt_ids)) for i in ids]

    def _to_device(self, batch: corpus.Batch) -> corpus.Batch:
        return batch.to(self.target.device, self.target.dtype)

    def cost_ratio(self, features: Path) -> float:
        """Seconds of a step of GTO's over one on the token loss alone, measured once."""
        path = self.work / COST
        if not path.is_file():
            both = HEADLINE[1], HEADLINE[0]  # the smaller first: memory is not all given back
            costs = {arm.method: self._cost(arm, features) for arm in both}
            checkpoints.write_text(path, json.dumps(costs, indent=2) + "\n")
        costs = self.costs()
        return costs["GTO"]["seconds"] / costs["Token loss only"]["seconds"]

    def costs(self) -> dict[str, dict[str, float]]:
        """What a step took, by method; empty where none was measured."""
        path = self.work / COST
        return json.loads(path.read_text()) if path.is_file() else {}

    def _cost(self, arm: Arm, features: Path, num_steps: int = 5) -> dict[str, float]:
        """Of a step forward and back, the first one not counted.

        Median seconds (of this process's own time on a CPU, which other programs do not change),
        words trained on, trees of the head and bytes held at the peak, the target's own included.
        """
        recipe, cache = self.recipe(arm), self._whole(features)
        prompt_ids = corpus.prompt_ids(self.target.tokenizer, cache.answers)
        order = corpus.batch_order(cache.answers, recipe.batch_tokens, 0, num_steps + 1)
        module = recipe.method.new_module(self.target, cache.answers)
        loss = recipe.method.loss(module, self.target)
        _forget_peak(self.target.device)
        steps = []
        for ids in order:
            batch, began = self._to_device(cache.batch(ids, prompt_ids)), self._now()
            num_trees = _step(loss, batch, self.target)
            steps.append((self._now() - began, int(batch.is_answer.sum()), num_trees))
        seconds, words, trees = zip(*steps[1:], strict=True)
        means = {"words": statistics.mean(words), "trees": statistics.mean(trees)}
        return {"seconds": statistics.median(seconds)} | means | {"peak": _peak(self.target.device)}

    def _now(self) -> float:
        """Seconds on a clock of which differences count."""
        on_cpu = self.target.device.type == "cpu"
        return time.process_time() if on_cpu else time.perf_counter()

    def _require_same(self, arm: Arm) -> None:
        card = self.card(arm)
        there = card["recipe"]["method"], card["start"]["sha256"]
        method = json.loads(json.dumps(asdict(self.recipe(arm).method)))
        if there != (method, checkpoints.digest(self.start)):
            raise ValueError(
                f"{self.folder(arm)} was tuned with other settings or from another head; choose"
                " another folder with --work, restore the setting, or move it away"
            )


def _step(loss: draft_training.Loss, batch: corpus.Batch, target: Target) -> float:
    """One step forward and back; how many trees of the head it drafted."""
    is_half = target.dtype != torch.float32
    with torch.autocast(target.device.type, torch.bfloat16, enabled=is_half):
        total, metrics = loss(batch)
    total.backward()
    total.item()  # waits for the device
    num_groups = metrics.get("groups", 0.0)
    return 0.0 if math.isnan(num_groups) else num_groups * loss.config.group_size


def _forget_peak(device: torch.device) -> None:
    """Have `_peak` tell of what comes from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    """Most bytes held since: of the device, or of this process where that is the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])


class _Look:
    """A look at a head in training: its tau, and its reward beside."""

    def __init__(
        self, workshop: Workshop, recipe: Recipe, training: Path, batches: list[corpus.Batch]
    ):
        self.target, self.training, self.batches = workshop.target, training, batches
        self.method = recipe.method
        self.measure = Recipe.of(Gto, self.target).method.tuning  # one ruler for all arms
        self.questions = recipes.held_out_questions(self.target)
        self.first, _ = eagle3.load_head(workshop.start)
        self.first.to(self.target.device)

    def __call__(self, module: nn.Module) -> float:
        tau = recipes.held_out_tau(self.method, module, self.target, self.questions)
        if draft_training.is_first_process():
            lines = (self.training / draft_training.LOG).read_text().splitlines()
            look = {"step": json.loads(lines[-1])["step"] + 1, "tau": tau} | self._rewards(module)
            with (self.training.parent / LOOKS).open("a") as file:
                file.write(json.dumps(look) + "\n")
        return tau

    def _rewards(self, module: nn.Module) -> dict[str, float]:
        loss = GroupTreeLoss(
            module, self.target, self.method.tree, self.method.training, self.measure, self.first
        )
        rollouts = [one for one in map(loss.sample, self.batches) if one is not None]
        if not rollouts:
            raise ValueError(
                f"no held-out answer is as long as a group of {self.measure.group_size} positions;"
                " hold out more answers"
            )
        gains, lengths = (
            torch.cat([getattr(one, name)[one.is_row] for one in rollouts]).float()
            for name in ("gains", "lengths")
        )
        return {"reward_gap": gains.mean().item(), "accepted": lengths.mean().item()}


def tune_all(workshop: Workshop, arms: Sequence[Arm], features: Path) -> None:
    """Tune what no other process is tuning, and print what became of each."""
    for arm in arms:
        with claimed(workshop.work / arm.name) as is_ours:
            if is_ours:
                workshop.tune(arm, features)
        if draft_training.is_first_process():
            print(_line(workshop, arm, is_ours), flush=True)


def _line(workshop: Workshop, arm: Arm, is_ours: bool) -> str:
    if not is_ours:
        return f"{arm.name}: another process is tuning it"
    card = workshop.card(arm)
    steps = card["recipe"]["loop"]["total_steps"]
    return f"{arm.name}: {steps} steps, held-out tau {card['held_out_tau']:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.gto_arms <corpus>`, alone, several times, or under torchrun."""
    parser = training_parser("gto_arms", __doc__, ARMS, WORK, Budget())
    parser.add_argument("--start", type=Path, default=eagle3.CHECKPOINT, help="head to begin from")
    parser.add_argument("--num-answers", type=int, help="of the corpus; all if left out")
    parser.add_argument("--evaluations", type=int, default=Budget().evaluations, help="looks")
    options = start(parser, arguments)
    sizes = {
        "evaluations": options.evaluations,
        "num_answers": options.num_answers,
        "batch_tokens": options.batch_tokens,
    }
    budget = Budget(options.share, options.steps, **sizes)
    workshop = Workshop(load_target(options.target), options.work, options.start, budget)
    tune_all(workshop, [ARMS[name] for name in options.only], options.corpus)


if __name__ == "__main__":
    commands.run(main)
