"""CAST's notebook runs as it stands on a tiny target: every stage, figure and claim of it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from test_eagle3 import make_head

from specrepro import cast_figures, claims, eagle3, prompts, target_model

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "cast.ipynb"


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


@pytest.fixture
def settings(tiny_chat_folder, tmp_path, monkeypatch) -> dict[str, str]:
    """A run of the smallest tier on a tiny target with a head of its own, and short questions."""
    target = target_model.load(str(tiny_chat_folder), dtype="float32", device="cpu")
    head = eagle3.save_head(make_head(target), tmp_path / "head")

    def load(name: str, num_prompts: int, seed: int = 0) -> list[prompts.Prompt]:
        asked = [({"role": "user", "content": f"{name} {n}?"},) for n in range(num_prompts)]
        return [prompts.Prompt(f"{name}/{n}", name, words) for n, words in enumerate(asked)]

    monkeypatch.setattr(prompts, "load", load)
    chosen = {"tier": "smoke", "target": str(tiny_chat_folder), "dtype": "float32"}
    return chosen | {"checkpoint": str(head), "figures_dir": str(tmp_path)}


def run_notebook(settings: dict[str, str]) -> None:
    names: dict[str, object] = {}
    for cell in cells():
        exec(cell, names)
        names |= settings if "figures_dir:" in cell else {}


@pytest.mark.slow
def test_the_notebook_measures_draws_and_judges(settings, tmp_path):
    run_notebook(settings)
    folder = tmp_path / "cast"
    drawn = {path.stem for path in folder.glob("fig_*.png")}
    assert drawn == set(cast_figures.DRAWINGS) and len(drawn) == 8
    verdicts = {
        one["id"]: one for one in json.loads((folder / "verdict.json").read_text())["claims"]
    }
    assert len(verdicts) == len(claims.load("cast"))
    for name in ("lossless-greedy", "lossless-sampling"):
        assert verdicts[name]["verdict"] == "direction holds", verdicts[name]["why"]
    for name in ("own-policy-time", "own-profile-time", "tau-rises-with-size", "faster"):
        assert verdicts[name]["verdict"] != "not tested", verdicts[name]["why"]
    found = pd.read_csv(folder / "results.csv")
    assert {"decode", "decode_elsewhere", "replay", "ablation", "choice"} <= set(found["quantity"])
    assert {"decoded.jsonl", "decoded_bfloat16_1.jsonl"} <= {
        path.name for path in (folder / "records/smoke").iterdir()
    }
