"""GTO's notebook runs as it stands on a tiny target, and says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from test_eagle3 import make_head

from specrepro import claims, eagle3, prompts, target_model
from specrepro.eagle3 import TreeConfig

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "gto.ipynb"


@pytest.fixture
def settings(tiny_chat_folder, tmp_path, monkeypatch) -> dict[str, str]:
    """A run of the smallest tier on a tiny target, with short questions."""

    def load(name: str, num_prompts: int, seed: int = 0) -> list[prompts.Prompt]:
        asked = [({"role": "user", "content": f"{name} {n}?"},) for n in range(num_prompts)]
        return [prompts.Prompt(f"{name}/{n}", name, words) for n, words in enumerate(asked)]

    monkeypatch.setattr(prompts, "load", load)
    chosen = {"tier": "smoke", "target": str(tiny_chat_folder), "dtype": "float32"}
    return chosen | {"figures_dir": str(tmp_path)}


def run_notebook(chosen: dict[str, str]) -> None:
    names: dict[str, object] = {}
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(source := "".join(cell["source"]), names)
            names |= chosen if "figures_dir:" in source else {}


@pytest.mark.slow
def test_the_notebook_measures_draws_and_judges(settings, tmp_path, capsys):
    target = target_model.load(settings["target"], dtype="float32", device="cpu")
    heads = {
        name: make_head(target, seed=seed) for seed, name in enumerate(("start", "checkpoint"))
    }
    for name, head in heads.items():
        settings[name] = str(eagle3.save_head(head, tmp_path / name, TreeConfig(2, 3, 8)))
    run_notebook(settings)
    folder = tmp_path / "gto"
    drawn = {path.stem for path in folder.glob("fig_*.png")}
    assert drawn == {
        "fig_1_speedup_and_tau", "fig_2_greedy_path", "fig_3_reward", "fig_4_ratios",
        "fig_5_tree_shapes",
    }  # fmt: skip
    told = json.loads((folder / "verdict.json").read_text())["claims"]
    verdicts = {one["id"]: one["verdict"] for one in told}
    assert len(verdicts) == len(claims.load("gto"))
    assert verdicts["lossless-greedy"] == verdicts["lossless-sampling"] == "direction holds"
    for name in ("tree-above-greedy-path", "reward-rises", "other-trees-gain-too", "faster"):
        assert verdicts[name] != "not tested", name
    assert verdicts["gain-is-not-more-training"] == "not tested"
    assert "python -m specrepro.gto_arms runs/corpus" in capsys.readouterr().out
    found = pd.read_csv(folder / "results.csv")
    assert {"decode", "paths", "reward", "ratio", "shapes", "losslessness"} <= set(
        found["quantity"]
    )
