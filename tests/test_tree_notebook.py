"""The kernel's notebook runs as it stands, draws every figure and says what it claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tree_cases import language_patched_once_a_launch  # noqa: F401

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "tree_verify.ipynb"


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebook_runs_and_sees_what_it_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shown: list[object] = []
    names: dict[str, object] = {"display": shown.append}
    for cell in cells():
        exec(cell, names)
        names |= {"figures_dir": str(tmp_path)} if "figures_dir:" in cell else {}
    drawn = {path.name.split("_")[1] for path in (tmp_path / "tree_verify").glob("fig_*.png")}
    assert drawn == {"1", "2", "3", "4"} and shown
    said = capsys.readouterr().out
    assert "bitwise equal: True" in said
    assert "nodes [0, " in said and said.rstrip().endswith("True")
    difference = said.partition("largest difference from the reference: ")[2].split()[0]
    assert float(difference) < 1e-5
    floors = names["floors"].pivot_table("modelled_floor_us", ["card", "context"], "attention")
    assert (floors["tree kernel"] < floors["SDPA, dense mask"]).all()
