"""AdaEAGLE's predictors, trained alike to be compared: one for each penalty, and one of classes.

`python -m specrepro.adaeagle_predictors runs/corpus` makes what is committed: AdaEAGLE's own for
each base, and for EAGLE's head those that its figures compare. All see the same answers as often,
and are trained in one process, which drafts at the places of these answers once (`draft_labels`).
Stopped, it goes on with the same command.

The last state is kept: no held-out tau is looked at, since the longest drafts have the highest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specrepro import adaeagle, checkpoints, commands, corpus, recipes
from specrepro.adaeagle import BASES, AdaEagle
from specrepro.measure import dtype_name, target_name
from specrepro.recipes import Recipe
from specrepro.target_model import EMBEDDED, Target
from specrepro.target_model import load as load_target

OWN = AdaEagle()
PENALTIES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)  # that are compared
WORK = Path("runs") / AdaEagle.name


@dataclass(frozen=True, slots=True)
class Budget:
    """What every predictor may use."""

    num_answers: int | None = 1000  # of the corpus, in a fair sample; None is all
    epochs: float = 5.0


def recipe_of(target: Target, settings: dict[str, Any]) -> Recipe:
    """The target's recipe with some settings of the predictor changed."""
    return recipes.changed(Recipe.of(AdaEagle, target), settings)


def all_settings(base: str) -> list[dict[str, Any]]:
    """What is committed for a base: its own, and for EAGLE's head those that are compared."""
    if base != OWN.base:
        return [{"base": base}]
    return [{"penalty": x} for x in PENALTIES] + [{"is_classifier": True}]


def name_of(method: AdaEagle) -> str:
    """Of a predictor with such settings."""
    what = "classes" if method.is_classifier else f"penalty_{method.penalty:g}"
    return f"{method.base.lower()}_{what}"


def folder_of(method: AdaEagle, root: Path) -> Path:
    """Where it lies: AdaEAGLE's own at `root`, the others below it."""
    return root if name_of(method) == name_of(OWN) else root / name_of(method)


def committed(method: AdaEagle) -> Path | None:
    """The committed predictor of these settings, if there is one that knows this very head."""
    folder = folder_of(method, adaeagle.CHECKPOINT)
    if not (folder / checkpoints.CONFIG).is_file():
        return None
    config = adaeagle.load_predictor(folder)[1]
    is_same = all(config[name] == value for name, value in method.origin.items())
    return folder if is_same else None


def train_alike(
    recipe: Recipe, target: Target, features: Path, work: Path, destination: Path, budget: Budget,
    **about: object,
) -> Path:  # fmt: skip
    """Train a predictor on the budget's share of the corpus, unless it is there, with its card.

    The card has its counts and hashes, and what `about` says.
    """
    answers = corpus.features_in(features, target, budget.num_answers)
    steps = max(1, corpus.num_batches(answers.answers, recipe.batch_tokens, budget.epochs))
    loop = replace(recipe.loop, total_steps=steps)
    recipe = replace(recipe, loop=loop, epochs=budget.epochs)
    predictor = recipes.train(recipe, target, answers, work, resume=True)
    recipe.method.save(predictor, destination)
    card = {
        "target": target_name(target), "corpus": answers.hash, "num_answers": len(answers),
        "answer_tokens": answers.num_answer_tokens, "recipe": asdict(recipe),
        "dtype": dtype_name(target), **about,
    }  # fmt: skip
    checkpoints.write_text(destination / "card.json", json.dumps(card, indent=2) + "\n")
    return destination


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.adaeagle_predictors <corpus>`: one base after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m specrepro.adaeagle_predictors", description=__doc__
    )
    parser.add_argument(
        "corpus", type=Path, help="folder with part-*, from python -m specrepro.corpus"
    )
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES),
                        help="whose committed head drafts")  # fmt: skip
    parser.add_argument("--target", default=EMBEDDED, help="smollm2, a Hub id or a folder")
    parser.add_argument("--destination", type=Path, default=adaeagle.CHECKPOINT)
    parser.add_argument("--work", type=Path, default=WORK, help="training states and logs")
    parser.add_argument("--num-answers", type=int, default=Budget().num_answers,
                        help="of the corpus, half of which are greedy and teach")  # fmt: skip
    parser.add_argument("--epochs", type=float, default=Budget().epochs)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    target, budget = load_target(options.target), Budget(options.num_answers, options.epochs)
    command = " ".join([*parser.prog.split(), *(arguments or sys.argv[1:])])
    for base in options.base:
        for settings in all_settings(base):
            recipe = recipe_of(target, settings)
            work = options.work / name_of(recipe.method)
            folder = folder_of(recipe.method, options.destination)
            own = recipe, target, options.corpus, work, folder, budget
            print(train_alike(*own, command=command), flush=True)


if __name__ == "__main__":
    commands.run(main)
