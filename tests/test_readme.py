"""What the README shows a reader works as shown."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from specrepro import experiment, pages

TEXT = pages.README.read_text()


@pytest.mark.slow
def test_the_example_decodes_faster_than_one_token_a_pass():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {}
    exec(example.replace('"checkpoints/eagle3"', "eagle3.CHECKPOINT"), names)
    out = names["out"]
    assert out.tau > 1.2, "the committed head drafts next to nothing"
    assert len(out.tokens) > 20


def test_every_file_that_the_map_names_exists_and_none_is_left_out():
    (house,) = re.findall(r"## The house\n\n```\n(.*?)```", TEXT, re.DOTALL)
    named = set(re.findall(r"^  (\w+\.py) ", house, re.MULTILINE))
    present = {path.name for path in (experiment.ROOT / "specrepro").glob("*.py")}
    assert named == present - {"__init__.py", "__main__.py"}


def test_tables_and_pages_are_those_of_the_committed_rows():
    remedy = "run: python -m specrepro readme"
    assert pages.with_tables(TEXT) == TEXT, remedy
    assert all(f"<!-- rows: {paper} -->" in TEXT for paper in experiment.PAPERS)
    written = pages.pages()
    assert written.keys() == experiment.PAPERS.keys(), "a paper without a verdict"
    for paper, text in written.items():
        assert pages.page(paper).read_text() == text, remedy


def test_a_setting_without_a_mean_is_told_by_its_prompt_sets():
    rows = [("EAGLE-3", 0, 1, "chat"), ("EAGLE-3", 0, 1, "mean"), ("EAGLE-3", 0, 8, "chat")]
    found = pd.DataFrame(rows, columns=["method", "temperature", "batch", "prompts"])
    assert pages.means(found)[["batch", "prompts"]].values.tolist() == [[1, "mean"], [8, "chat"]]


def test_a_page_tells_every_claim_once_and_shows_every_figure():
    text = pages.page_of("eagle3")
    told = json.loads((pages.page("eagle3").parent / "verdict.json").read_text())["claims"]
    for one in told:
        name = f"`{one['id']}`" if one["verdict"] == "not tested" else f"| {one['statement']} |"
        assert text.count(name) == 1, one["id"]
    shown = re.findall(r"!\[[^]]+\]\((.+?)\)", text)
    numbers = [int(name.split("_")[1]) for name in shown]
    assert numbers == sorted(numbers) and len(shown) == len(set(shown)) > 5


def test_every_link_and_picture_leads_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    local = [target for target in targets if not target.startswith("http")]
    missing = [target for target in local if not (experiment.ROOT / target).exists()]
    assert local and not missing, f"the README points at {missing}"
