"""What the README shows a reader works as shown."""

from __future__ import annotations

import re

import pytest

from specrepro import experiment

TEXT = experiment.README.read_text()


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


def test_every_link_and_picture_leads_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    local = [target for target in targets if not target.startswith("http")]
    missing = [target for target in local if not (experiment.ROOT / target).exists()]
    assert local and not missing, f"the README points at {missing}"
