"""What the cards of checkpoints tell: the budget of a head, and how its tau grew.

A head that went on from another holds that one's card in its own, under `start`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd


def card_of(folder: Path) -> dict[str, Any]:
    """A checkpoint's card; empty where it has none."""
    path = folder / "card.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def stretches(card: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cards of all runs of training that a head went through, the first one first."""
    found = []
    while card:
        found.append(card)
        card = card.get("start", {})
    return found[::-1]


def _positions_a_step(card: Mapping[str, Any]) -> int:
    """Tokens of prompts and answers, padding included, that all processes read in one step."""
    batch_tokens = card["recipe"].get("batch_tokens") or card["batch_tokens"]
    return batch_tokens * card.get("processes", 1)


def _num_steps(card: Mapping[str, Any]) -> int:
    loop = card["recipe"].get("loop", card["recipe"])
    return card.get("stopped_after_step") or loop["total_steps"]


def budget_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a head was trained on: answer tokens of its corpus, steps, and positions read in all."""
    if not card:
        return {}
    runs = stretches(card)
    return {
        "trained_tokens": card["answer_tokens"],
        "steps": sum(map(_num_steps, runs)),
        "trained_positions": sum(_num_steps(one) * _positions_a_step(one) for one in runs),
        "corpus": card["corpus"][:12],
    }


def training_rows(card: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of quantity "training": held-out tau by positions read, over all stretches.

    Tau is of few prompts, and of the tree that was drafted then (`total_tokens`).
    """
    found, before = [], 0
    for number, one in enumerate(stretches(card), 1):
        tree = one.get("held_out_tree") or one["recipe"]["method"].get("tree", {})
        row = {
            "quantity": "training",
            "method": "EAGLE-3",
            "prompts": "held out",
            "temperature": 0.0,
        }
        row |= {"stretch": number, "total_tokens": tree.get("total_tokens")}
        row |= {"num_prompts": one["held_out_prompts"], "source": "cards of the heads"}
        found += [
            row | {"positions": before + int(step) * _positions_a_step(one), "tau": tau}
            for step, tau in one["held_out_tau_by_step"].items()
        ]
        before += _num_steps(one) * _positions_a_step(one)
    return pd.DataFrame(found)
