"""The benchmark's notebook on a tiny target: rows for every claim and figure, replays that hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_eagle3 import make_head
from test_tts_sessions import QUESTIONS

from specrepro import eagle3, experiment, tts, tts_figures
from specrepro.eagle3 import TreeConfig
from specrepro.target_model import Target
from specrepro.tts import Size

NOTEBOOK = experiment.ROOT / "notebooks" / "tts.ipynb"
NUM_NEW = 48
SMALL = Size(
    2, NUM_NEW, tts.HEADLINE, ("EAGLE-3", "SAM", "Recycling"), times_samples=False, has_store=False,
    audited=("SAM", "EAGLE-3"), num_audited=1, num_cost_rounds=2,
)  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:the load average is"),
    pytest.mark.filterwarnings("ignore:IProgress not found"),
]


@pytest.fixture(scope="module")
def names(quick_target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the notebook knows after its last cell."""
    folder = tmp_path_factory.mktemp("tts")
    head = eagle3.save_head(make_head(quick_target), folder / "head", TreeConfig(2, 3, 8))
    given = {"tier": "smoke", "target": "quick", "dtype": "float32"}
    given |= {"checkpoint": str(head), "figures_dir": str(folder)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiment.targets, "load", lambda *_, **options: quick_target)
        patched.setitem(tts.SIZES, "smoke", SMALL)
        asked = [*QUESTIONS, replace(QUESTIONS[1], id="q3", text="is it so?")]
        patched.setattr(tts, "questions", lambda *_: asked)
        patched.setattr(
            experiment.Run, "questions", lambda self, name, n: [("a", [40, 50, 60]), ("b", [5, 9])]
        )
        return executed(given)


def executed(given: dict[str, object]) -> dict[str, object]:
    notebook = json.loads(NOTEBOOK.read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            names |= given if "tags" in cell["metadata"] else {}
    return names


@pytest.fixture(scope="module")
def rows(names: dict[str, object]) -> pd.DataFrame:
    return names["run"].rows


def test_every_figure_is_drawn_with_units_on_its_axes(
    names: dict[str, object], rows: pd.DataFrame
) -> None:
    drawn = {path.stem for path in names["run"].folder.glob("fig_*.png")}
    assert drawn == {*tts_figures.DRAWINGS, "fig_10_time_per_round"}
    for name, draw in tts_figures.DRAWINGS.items():
        figure = draw(rows)
        assert isinstance(figure, Figure) and figure.legends, name
        assert all(axes.has_data() for axes in figure.axes), name
        assert figure.axes[-1].get_xlabel() or figure.axes[0].get_xlabel(), name
