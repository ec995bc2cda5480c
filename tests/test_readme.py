"""What the README shows a reader works as shown."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

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
    (house,) = re.findall(r"## The house\n.*?```\n(.*?)```", TEXT, re.DOTALL)
    named = set(re.findall(r"^  (\w+\.py) ", house, re.MULTILINE))
    present = {path.name for path in (experiment.ROOT / "specrepro").glob("*.py")}
    assert named == present - {"__init__.py", "__main__.py"}


def test_table_and_pages_are_those_of_the_committed_rows():
    remedy = "run: python -m specrepro readme"
    assert pages.with_table(TEXT) == TEXT, remedy
    written = pages.pages()
    assert written.keys() == experiment.PAPERS.keys(), "a paper without a verdict"
    for paper, text in written.items():
        assert pages.page(paper).read_text() == text, remedy


@pytest.mark.parametrize("paper", experiment.PAPERS)
def test_verdicts_are_those_of_the_committed_claims_and_rows(paper):
    path = experiment.ROOT / "figures" / paper / "verdict.json"
    told = json.loads(path.read_text())
    found = experiment.judged(paper, path.with_name("results.csv"), told["tier"])
    again = json.loads(json.dumps([asdict(one) for one in found]))
    assert told["claims"] == again, "run: python -m specrepro readme"


def test_rows_that_an_earlier_head_left_are_not_judged(tmp_path):
    folder = experiment.ROOT / "figures" / "eagle3"
    results = tmp_path / "results.csv"
    results.write_bytes((folder / "results.csv").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    for checkpoint, is_tested in ((manifest["checkpoint"], True), ("0" * 64, False)):
        told = json.dumps(manifest | {"checkpoint": checkpoint})
        (tmp_path / "manifest.json").write_text(told)
        found = {one.id: one for one in experiment.judged("eagle3", results, "laptop")}
        assert (found["own-tau-greedy"].verdict != "not tested") is is_tested


def test_a_page_keeps_what_was_written_by_hand_and_only_that(tmp_path, monkeypatch):
    folder = experiment.ROOT / "figures" / "gto"
    for name in ("results.csv", "verdict.json", "manifest.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(pages, "page", lambda _: tmp_path / "README.md")
    fresh = pages.page_of("gto")
    assert fresh.startswith(f"# {experiment.PAPERS['gto']}\n")
    (tmp_path / "README.md").write_text(f"# Found\n\nNothing.\n\n{pages.MARK}\n\nold numbers\n")
    again = pages.page_of("gto")
    assert again.startswith(f"# Found\n\nNothing.\n\n{pages.MARK}\n\n## What")
    assert (
        "old numbers" not in again
        and again.partition(pages.MARK)[2] == fresh.partition(pages.MARK)[2]
    )


def test_the_table_holds_each_papers_own_method_beside_what_is_reported():
    lines = [line for line in TEXT.splitlines() if line.startswith("| [")]
    assert len(lines) == len(experiment.PAPERS)
    found = pd.read_csv(pages.page("eagle3").with_name("results.csv"), low_memory=False)
    found = found[(found["quantity"] == "decode") & (found["method"] == "EAGLE-3")]
    found = found[found["prompts"] == "mean"]
    row = found[(found["tier"] == "laptop") & (found["temperature"] == 0)].iloc[0]
    assert f"| {row['speedup']:.2f}x [" in lines[0] and f"| {row['tau']:.2f} [" in lines[0]
    assert "4.44x / 6.23 (Llama-3.1-8B)" in lines[0], "mean of Table 1"


def test_a_readme_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="no place for its table"):
        pages.with_table("# A text\n<!-- papers -->\n")


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


def test_methods_beside_ours_are_told_with_the_model_that_the_paper_measured_them_on():
    _, _, below = pages.page_of("eagle3").partition("## Beside other methods")
    lines = {line[: line.find(" | mean")]: line for line in below.split("##")[0].splitlines()}
    assert lines["| EAGLE-3 | 0"].endswith("| 4.44x / 6.23 |"), "of the model beside ours"
    assert lines["| PLD | 0"].endswith("| 1.74x / 1.80 (Vicuna-13B) |")


def test_table_2_is_told_on_its_own_sets_beside_the_papers_cells():
    _, _, below = pages.page_of("eagle3").partition("## Ablation")
    lines = below.split("##")[0].splitlines()
    told = {tuple(line.strip("| ").split(" | ")[:3]): line for line in lines if "|" in line}
    one = "EAGLE-3 (top feature only)", "0"
    assert told[*one, "chat"].endswith("| 3.82x / 5.37 |")
    assert told[*one, "maths"].endswith("| 3.77x / 5.22 |")
    assert (*one, "humaneval") not in told and ("EAGLE-3", "1", "chat") not in told


@pytest.mark.parametrize(
    "path", [pages.README, *map(pages.page, experiment.PAPERS)], ids=lambda path: path.parent.name
)
def test_every_link_and_picture_leads_somewhere(path):
    targets = re.findall(r"\]\(([^)]+)\)", path.read_text())
    local = [target for target in targets if not target.startswith("http")]
    missing = [target for target in local if not (path.parent / target).exists()]
    assert local and not missing, f"{path} points at {missing}"
