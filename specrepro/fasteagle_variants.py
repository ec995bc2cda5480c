"""Cascades trained alike, to be compared with each other and with EAGLE-3's head.

`python -m specrepro.fasteagle_variants runs/corpus` trains, one after the other, what is not there
yet; it can be stopped at any time and goes on with the same command. All take one share of the
corpus for one number of steps, but for the one that takes EAGLE-3's time instead: a step of the
cascade and one of training-time test do not take equally long, so how long they take is measured
here first (`training_seconds`) and kept beside the variants.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specrepro import checkpoints, commands, corpus
from specrepro.eagle3 import Eagle3
from specrepro.eagle3_variants import (
    Budget,
    Variant,
    Workshop,
    start,
    train_all,
    training_parser,
)
from specrepro.fasteagle import FastEagle
from specrepro.recipes import Method, Recipe
from specrepro.target_model import Target
from specrepro.target_model import load as load_target

WORK = Path("runs") / "whole" / "fasteagle" / "variants"  # where tier `full` looks for them
BUDGET = Budget(epochs=2.0)
OURS, EAGLE3 = "FastEagle", "EAGLE-3"
LAYERS = (1, 2, 4, 5, 7)  # beside the recipe's own number
ABLATED = {  # variant -> its name in tables
    "fasteagle": OURS,
    "fasteagle_last": "FastEagle, last depth alone",
    "fasteagle_uniform": "FastEagle, uniform weights",
    "fasteagle_features": "FastEagle, with feature loss",
    "fasteagle_fixed_norms": "FastEagle, the target's norm",
    "fasteagle_shared": "FastEagle, shared layer",
    "fasteagle_parallel": "FastEagle, parallel layers",
    "fasteagle_whole_head": "FastEagle, whole vocabulary",
    "fasteagle_from_eagle3": "FastEagle, from EAGLE-3's layer",
    "eagle3": EAGLE3,
}
SAME_TIME = "fasteagle_same_time"
_SETTINGS: dict[str, dict[str, object]] = {
    "fasteagle": {},
    "fasteagle_last": {"training.supervision": "last"},
    "fasteagle_uniform": {"training.decay": 1.0},
    "fasteagle_features": {"training.feature_weight": 0.1},
    "fasteagle_fixed_norms": {"training.learns_norms": False},
    "fasteagle_shared": {"wiring": "shared"},
    "fasteagle_parallel": {"wiring": "parallel"},
    "fasteagle_whole_head": {"draft_vocab_size": 0},
} | {f"fasteagle_{n}_layers": {"num_layers": n} for n in LAYERS}
VARIANTS = {name: Variant(name, FastEagle, changes) for name, changes in _SETTINGS.items()}
VARIANTS["eagle3"] = Variant("eagle3", Eagle3)


@dataclass
class Bench:
    """Where the variants are trained and kept, in the order that some need others in."""

    target: Target
    work: Path = WORK
    budget: Budget = BUDGET

    @property
    def workshop(self) -> Workshop:
        return Workshop(self.target, self.work, self.budget)

    def variant(self, name: str) -> Variant:
        """One of VARIANTS, or one that depends on what is measured or trained before it."""
        if name == "fasteagle_from_eagle3":
            head = str(self.workshop.folder(VARIANTS["eagle3"]))
            return Variant(name, FastEagle, {"training.init": head})
        if name == SAME_TIME:
            return Variant(name, FastEagle, times=self._steps_in_eagle3s_time())
        if name not in VARIANTS:
            raise ValueError(f"unknown variant {name!r}; choose one of {', '.join(names())}")
        return VARIANTS[name]

    def _steps_in_eagle3s_time(self) -> float:
        """Steps of the cascade that take as long as one of EAGLE-3's head, as measured before."""
        path = self.work / "training_seconds.json"
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: python -m specrepro.fasteagle_variants measures it first"
            )
        seconds = json.loads(path.read_text())
        return seconds[EAGLE3] / seconds[OURS]

    def measure(self, features: Path) -> dict[str, float]:
        """Seconds of a training step by method, measured once and kept."""
        path = self.work / "training_seconds.json"
        if not path.is_file():
            found = training_seconds(self.target, features)
            checkpoints.write_text(path, json.dumps(found, indent=2) + "\n")
        return json.loads(path.read_text())


def names() -> list[str]:
    """Of every variant, in an order in which they can be trained."""
    return [*ABLATED][::-1] + [n for n in VARIANTS if n not in ABLATED] + [SAME_TIME]


def training_seconds(target: Target, features: Path, num_steps: int = 12) -> dict[str, float]:
    """Median seconds of a training step, of both methods on the same batches in turn."""
    recipes_of = {OURS: Recipe.of(FastEagle, target), EAGLE3: Recipe.of(Eagle3, target)}
    cache = corpus.features_in(features, target)
    ids = corpus.prompt_ids(target.tokenizer, cache.answers)
    sizes = recipes_of[EAGLE3].batch_tokens, 0, num_steps + 1
    batches = corpus.batch_order(cache.answers, *sizes)
    steps = {name: _Stepper(one.method, target, cache) for name, one in recipes_of.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number, places in enumerate(batches):
        batch = cache.batch(places, ids).to(target.device, target.dtype)
        for name, step in steps.items():
            seconds = step(batch)
            if number:  # the first one warms up
                taken[name].append(seconds)
    return {name: torch.tensor(found).median().item() for name, found in taken.items()}


class _Stepper:
    """Forward, backward and update of one method, timed."""

    def __init__(self, method: Method, target: Target, cache: corpus.Sequences):
        self.target, self.module = target, method.new_module(target, cache.answers)
        self.loss = method.loss(self.module, target)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def __call__(self, batch: corpus.Batch) -> float:
        began, is_half = time.perf_counter(), self.target.dtype != torch.float32
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=is_half):
            loss, _ = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # which waits for the device
        return time.perf_counter() - began


def train(bench: Bench, wanted: Sequence[str], features: Path) -> None:
    """Train what is not there of the `wanted` variants, EAGLE-3's head before what begins as it."""
    if SAME_TIME in wanted:
        bench.measure(features)
    for name in [name for name in names() if name in wanted]:
        train_all(bench.workshop, [bench.variant(name)], features)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.fasteagle_variants <corpus>`, alone or under torchrun."""
    parser = training_parser("fasteagle_variants", __doc__, names(), WORK, BUDGET)
    parser.add_argument("--epochs", type=float, default=BUDGET.epochs)
    options = start(parser, arguments)
    budget = Budget(options.share, options.epochs, options.steps)
    bench = Bench(load_target(options.target), options.work, budget)
    train(bench, options.only, options.corpus)


if __name__ == "__main__":
    commands.run(main)
