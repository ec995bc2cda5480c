"""Heads trained alike, to be compared: ablations, baselines, shares of the corpus.

`python -m specrepro.eagle3_variants runs/corpus` trains, one after the other, what is not there
yet. Stopped at any time, by Ctrl-C or `timeout 3600`, it loses five minutes at most and goes on
with the same command; started twice, the two share the work. The corpus must not change meanwhile.

All take the same share of the corpus for the same number of steps, unless their share is what is
studied: then they take a part of it, for the same number of epochs. By default the share is a
quarter, once: enough to compare these heads with each other, and not with the committed one.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from specrepro import commands, corpus, draft_training, recipes
from specrepro.draft_lm import DraftLM
from specrepro.eagle2 import Eagle2
from specrepro.eagle3 import Eagle3
from specrepro.medusa import Medusa
from specrepro.recipes import Method, Recipe
from specrepro.target_model import EMBEDDED, Target
from specrepro.target_model import load as load_target
from specrepro.training_cards import card_of

WORK = Path("runs") / "whole" / "eagle3" / "variants"  # where tier `full` looks for them


@dataclass(frozen=True, slots=True)
class Variant:
    """One head to train, as its difference from the method's own recipe."""

    name: str  # of its folder
    method: type[Method]
    settings: Mapping[str, object] = field(default_factory=dict)
    scale: float = 1.0  # times the budget's share of the corpus
    times: float = 1.0  # the budget's epochs
    evaluations: int = 1  # looks at held-out tau


ABLATION = (
    Variant("eagle3", Eagle3),
    Variant("eagle2", Eagle2),
    Variant("eagle3_final", Eagle3, {"features": "final"}),
    Variant("eagle3_no_ttt", Eagle3, {"training.steps": 1}),
    Variant("eagle3_final_no_ttt", Eagle3, {"features": "final", "training.steps": 1}),
    Variant(
        "eagle2_no_feature_loss", Eagle2,
        {"training.regression": 0.0, "training.classification": 1.0},
    ),
    # the others begin with the target's own output head, EAGLE-3 with a random one
    Variant("eagle3_target_head", Eagle3, {"training.lm_head_init": "target"}),
    Variant("medusa", Medusa),
    Variant("draft_lm", DraftLM),
)  # fmt: skip
SENSITIVITY = (
    Variant("eagle3_ttt_2", Eagle3, {"training.steps": 2}),
    Variant("eagle3_ttt_5", Eagle3, {"training.steps": 5}),
    Variant("eagle3_vocab_2048", Eagle3, {"draft_vocab_size": 2048}),
    Variant("eagle3_vocab_16384", Eagle3, {"draft_vocab_size": 16384}),
)
SCALES = (0.125, 0.25, 0.5, 1.0)  # of the budget's share
SCALING = tuple(
    Variant(f"{method.name}_x{scale:g}", method, scale=scale)
    for scale in SCALES
    if scale < 1  # the ablation trains the whole
    for method in (Eagle3, Eagle2)
)
# the smallest share for as many steps as the largest: what more data alone brings
OVER_TRAINING = Variant("eagle3_long", Eagle3, scale=SCALES[0], times=8, evaluations=12)
VARIANTS = {one.name: one for one in (*ABLATION, *SENSITIVITY, *SCALING, OVER_TRAINING)}


@dataclass(frozen=True, slots=True)
class Budget:
    """What every variant may use."""

    share: float = 0.25  # of the corpus
    epochs: float = 1.0
    steps: int | None = None  # in place of `epochs`
    num_answers: int | None = None  # of the corpus that shares are of; None is all
    batch_tokens: int | None = None  # of a step; None is the recipe's

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; give a part of the corpus, at most 1")


@dataclass
class Workshop:
    """Where variants are trained and kept."""

    target: Target
    work: Path = WORK
    budget: Budget = field(default_factory=Budget)

    def folder(self, variant: Variant) -> Path:
        """Of the variant's checkpoint, whether it is there or not."""
        return self.work / variant.name / "checkpoint"

    def card(self, variant: Variant) -> dict[str, Any] | None:
        """What a trained variant's card says; None before that."""
        return card_of(self.folder(variant)) or None

    def train(self, variant: Variant, features: Path) -> Path:
        """The variant's checkpoint, trained unless it is there; goes on where it was interrupted.

        Raises ValueError where one is there that was trained otherwise.
        """
        if self.card(variant) is not None:
            self._require_same(variant, features)
            return self.folder(variant)
        return recipes.variant(
            variant.method, self.target, features, self.work / variant.name, variant.settings,
            share=self.budget.share * variant.scale, epochs=self._epochs(variant, features),
            num_answers=self.budget.num_answers, batch_tokens=self.budget.batch_tokens,
            evaluations=variant.evaluations,
        )  # fmt: skip

    def _epochs(self, variant: Variant, features: Path) -> float:
        """The budget's number of steps is of its share, so a larger share takes more."""
        if self.budget.steps is None:
            return self.budget.epochs * variant.times
        answers = self._sample(self.budget.share, features).answers
        in_one = corpus.num_batches(answers, self._batch_tokens(variant), 1.0)
        _, num_ranks = draft_training.join_processes()
        return self.budget.steps * num_ranks / in_one * variant.times

    def _batch_tokens(self, variant: Variant) -> int:
        return self.budget.batch_tokens or Recipe.of(variant.method, self.target).batch_tokens

    def _sample(self, share: float, features: Path) -> corpus.Sequences:
        """The part of the corpus that `recipes.variant` trains on."""
        total = len(corpus.features_in(features, self.target, self.budget.num_answers))
        return corpus.features_in(features, self.target, max(1, round(share * total)))

    def _require_same(self, variant: Variant, features: Path) -> None:
        recipe = Recipe.of(variant.method, self.target)
        method, loop = recipes.changed(recipe, variant.settings).method, asdict(recipe.loop)
        wanted = {
            "corpus": self._sample(self.budget.share * variant.scale, features).hash,
            "batch_tokens": self._batch_tokens(variant),
            "epochs": self._epochs(variant, features),
            "method": asdict(method),
        }
        own = ("total_steps", "evaluate_every", "keeps_last", "save_seconds")  # each variant's
        wanted |= {name: value for name, value in loop.items() if name not in own}
        wanted, card = json.loads(json.dumps(wanted)), self.card(variant)
        there = {"corpus": card["corpus"]} | card["recipe"] | card["recipe"]["loop"]
        if wrong := [name for name, value in wanted.items() if there[name] != value]:
            raise ValueError(
                f"{self.folder(variant)} was trained with another {' and '.join(wrong)}; choose"
                " another folder with --work, restore the setting, or move it away"
            )


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process alone may train in `folder`, for as long as the block lasts.

    Processes under torchrun train one variant together, so each of them may.
    """
    if draft_training.join_processes()[1] > 1:
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def train_all(workshop: Workshop, variants: Sequence[Variant], features: Path) -> None:
    """Train what no other process is training, and print the time that each took."""
    for number, variant in enumerate(variants, 1):
        if draft_training.is_first_process():
            print(f"[{number}/{len(variants)}] {variant.name}", flush=True)
        was_there = workshop.card(variant) is not None
        with claimed(workshop.work / variant.name) as is_ours:
            began = time.perf_counter()
            if is_ours:
                workshop.train(variant, features)
            minutes = (time.perf_counter() - began) / 60
        if draft_training.is_first_process():
            print(_line(workshop, variant, is_ours, was_there, minutes), flush=True)


def _line(
    workshop: Workshop, variant: Variant, is_ours: bool, was_there: bool, minutes: float
) -> str:
    if not is_ours:
        return f"{variant.name}: another process is training it"
    if was_there:
        return f"{variant.name}: there already, in {workshop.folder(variant)}"
    card = workshop.card(variant)
    steps = card["recipe"]["loop"]["total_steps"]
    return (
        f"{variant.name}: {steps} steps, {minutes:.1f} minutes now,"
        f" held-out tau {card['held_out_tau']:.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.eagle3_variants <corpus>`, alone, several times, or under torchrun."""
    parser = training_parser("eagle3_variants", __doc__, VARIANTS, WORK, Budget())
    parser.add_argument("--epochs", type=float, default=Budget().epochs)
    parser.add_argument("--num-answers", type=int, help="of the corpus; all if left out")
    options = start(parser, arguments)
    sizes = options.num_answers, options.batch_tokens
    budget = Budget(options.share, options.epochs, options.steps, *sizes)
    workshop = Workshop(load_target(options.target), options.work, budget)
    train_all(workshop, [VARIANTS[name] for name in options.only], options.corpus)


def training_parser(
    module: str, about: str, names: Iterable[str], work: Path, budget: Any
) -> argparse.ArgumentParser:
    """The command line of what is trained alike, by names, within a budget of share and steps."""
    parser = argparse.ArgumentParser(prog=f"python -m specrepro.{module}", description=about)
    parser.add_argument(
        "corpus", type=Path, help="folder with part-*, from python -m specrepro.corpus"
    )
    parser.add_argument("--only", nargs="+", choices=list(names), default=list(names),
                        help=f"what to train of {', '.join(names)}",
                        metavar="NAME")  # fmt: skip
    parser.add_argument("--target", default=EMBEDDED, help="smollm2, a Hub id or a folder")
    parser.add_argument("--work", type=Path, default=work, help="where it goes")
    parser.add_argument("--share", type=float, default=budget.share, help="of the corpus")
    parser.add_argument("--steps", type=int, default=budget.steps, help="on that share")
    parser.add_argument("--batch-tokens", type=int, help="of a step; the recipe's if left out")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    return parser


def start(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, in a process that has its threads and has joined the others."""
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    draft_training.join_processes()
    return options


if __name__ == "__main__":
    commands.run(main)
