"""The house keeps its shape: who may import whom, and what may be committed at all."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "specrepro"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

NGRAM = {"decoding", "draft_tree", "target_model"}
EAGLE3 = NGRAM | {
    "tree_verify", "packed_linear", "checkpoints", "draft_training", "draft_layer", "corpus",
    "recipes",
}  # fmt: skip
EXTENDS_EAGLE3 = EAGLE3 | {"eagle3"}
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "__init__": set(),
    "draft_tree": set(),
    "tree_kernel": set(),
    "kernel_launch": {"tree_kernel"},
    "kernel_traffic": {"kernel_launch"},
    "packed_linear": set(),
    "assets": set(),
    "commands": {"assets"},
    "figures": set(),
    "claims": set(),
    "checkpoints": set(),
    "races": set(),
    "verify_checks": {"draft_tree", "races"},
    "verify_reference": {"draft_tree"},
    "tree_verify": {"kernel_launch", "draft_tree", "races", "verify_checks"},
    "kernel_report": {"tree_kernel", "kernel_launch", "kernel_traffic", "verify_checks", "races"},
    "target_model": {
        "assets", "tree_verify", "verify_checks", "draft_tree", "packed_linear", "paper_tier",
    },
    "prompts": {"assets"},
    "decoding": {"tree_verify", "target_model", "draft_tree", "races"},
    "magpie": {"decoding", "target_model", "prompts", "checkpoints"},
    "corpus": {
        "decoding", "target_model", "tree_verify", "prompts", "assets", "checkpoints",
        "draft_training",
    },
    "draft_training": {"checkpoints"},
    "draft_layer": {"target_model"},
    "recipes": {
        "checkpoints", "corpus", "decoding", "draft_training", "packed_linear", "prompts",
        "target_model", "training_cards",
    },
    "provenance": set(),
    "measure": {
        "provenance", "checkpoints", "decoding", "target_model", "draft_tree", "packed_linear",
    },
    "rows": {"provenance", "measure", "target_model"},
    "losslessness": {"measure", "decoding", "target_model", "draft_tree", "tree_verify"},
    "kernel_timings": {
        "kernel_launch", "tree_verify", "draft_tree", "target_model", "decoding", "measure",
        "races", "rows",
    },
    "paper_tier": {"assets", "checkpoints", "prompts"},
    "experiment": {
        "paper_tier",
        "provenance", "measure", "rows", "losslessness", "claims", "prompts", "corpus", "decoding",
        "target_model", "figures", "assets", "checkpoints",
    },
    "pages": {"experiment", "measure", "claims", "checkpoints", "prompts"},
    "__main__": {"experiment", "pages", "assets", "claims", "paper_tier", "prompts", "tts"},
    "suffix": set(),
    "ngram": NGRAM | {"suffix"},
    "recycling": NGRAM | {"ngram"},
    "eagle3": EAGLE3,
    "eagle2": EXTENDS_EAGLE3,
    "training_cards": set(),
    "eagle3_variants": {
        "eagle3", "eagle2", "medusa", "draft_lm", "recipes", "corpus", "draft_training",
        "target_model", "training_cards",
    },
    "eagle3_figures": {"figures"},
    "headroom": {"draft_tree", "target_model", "tree_verify"},
    "coupled": {"eagle3", "decoding", "races", "target_model"},
    "eagle3_lab": {
        "eagle3", "eagle2", "medusa", "draft_lm", "ngram", "recycling", "eagle3_variants",
        "headroom", "coupled", "losslessness", "eagle3_figures", "training_cards", "recipes",
        "experiment", "measure", "rows", "decoding", "checkpoints", "target_model",
    },
    "medusa": EAGLE3,
    "draft_lm": EAGLE3,
    "cost_table": {
        "rows", "decoding", "draft_tree", "target_model", "tree_verify", "checkpoints",
    },
    "cost_model": {"cost_table", "kernel_launch", "kernel_traffic"},
    "replay": {
        "cost_table", "measure", "rows", "decoding", "draft_tree", "target_model", "tree_verify",
        "checkpoints",
    },
    "cast": EXTENDS_EAGLE3 | {"assets", "cost_table", "replay"},
    "cast_lab": {
        "cast", "cost_table", "cost_model", "replay", "eagle3", "experiment", "measure",
        "decoding", "checkpoints", "target_model",
    },
    "cast_rows": {
        "cast", "cast_lab", "replay", "cost_table", "eagle3", "measure", "rows", "decoding",
        "draft_tree",
    },
    "cast_figures": {"figures"},
    "forest": {"decoding", "draft_tree", "target_model"},
    "gto": EXTENDS_EAGLE3 | {"forest"},
    "gto_arms": {
        "gto", "eagle3", "eagle3_variants", "recipes", "corpus", "draft_training", "checkpoints",
        "target_model",
    },
    "gto_rows": {
        "gto", "corpus", "rows", "decoding", "draft_tree", "target_model", "tree_verify", "eagle3",
        "forest",
    },
    "gto_figures": {"figures"},
    "gto_lab": {
        "gto", "gto_arms", "gto_rows", "gto_figures", "eagle3", "eagle3_lab", "experiment",
        "recipes", "rows", "measure", "checkpoints", "target_model", "training_cards", "corpus",
    },
    "backbone": {"draft_tree"},
    "cascade": {
        "corpus", "draft_layer", "eagle3", "packed_linear", "target_model", "tree_verify",
    },
    # from eagle2 the cross-entropy of two states by one frozen head
    "fasteagle": EXTENDS_EAGLE3 | {"backbone", "cascade", "eagle2"},
    "fasteagle_variants": {
        "fasteagle", "eagle3", "eagle3_variants", "recipes", "corpus", "draft_training",
        "checkpoints", "target_model",
    },
    "fasteagle_rows": {
        "cost_model", "cost_table",
        "cascade", "draft_layer", "eagle3", "fasteagle", "measure", "rows", "target_model",
    },
    "fasteagle_figures": {"figures"},
    "compiled_drafting": {"eagle3", "fasteagle"},
    "fasteagle_lab": {
        "backbone", "cast", "checkpoints", "compiled_drafting", "cost_table", "decoding", "eagle3",
        "eagle3_lab", "experiment", "fasteagle", "fasteagle_figures", "fasteagle_rows",
        "fasteagle_variants", "measure", "recipes", "target_model", "training_cards",
    },
    "draft_labels": {"corpus", "decoding", "eagle3", "target_model"},
    "adaeagle": EXTENDS_EAGLE3 | {"eagle2", "draft_labels"},
    "adaeagle_predictors": {
        "adaeagle", "recipes", "corpus", "checkpoints", "measure", "target_model",
    },
    "adaeagle_rows": {
        "adaeagle", "replay", "cost_table", "decoding", "measure", "rows", "target_model",
    },
    "adaeagle_lab": {
        "adaeagle", "adaeagle_predictors", "adaeagle_rows", "cost_table", "replay", "eagle3",
        "recipes", "experiment", "measure", "rows", "checkpoints", "claims", "target_model",
    },
    "adaeagle_figures": {"figures"},
    "hybrid": NGRAM | {"ngram", "eagle3"},
    "reasoning": {"decoding", "prompts", "target_model"},
    "sessions": {
        "measure", "prompts", "reasoning", "decoding", "draft_tree", "target_model", "tree_verify",
    },
    "tts": EXTENDS_EAGLE3 | {
        "ngram", "recycling", "suffix", "hybrid", "draft_lm", "reasoning", "sessions", "measure",
    },
    "tts_rows": {"tts", "measure", "rows"},
    "tts_export": {"measure", "checkpoints"},
    "tts_lab": {
        "tts", "tts_rows", "tts_export", "drafting_cost", "hybrid", "ngram", "reasoning",
        "sessions", "experiment", "measure", "rows", "decoding", "checkpoints", "target_model",
    },
    "tts_figures": {"figures"},
    "drafting_cost": NGRAM | {"ngram", "recycling", "corpus", "measure", "tree_verify"},
}  # fmt: skip

MAX_FILE_BYTES, MAX_TREE_BYTES = 30_000_000, 150_000_000
PICKLE_SUFFIXES = {".bin", ".pickle", ".pkl", ".pt", ".pth"}
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|root|home/\w+|tmp/\w+)\b")
NOT_OURS = {".git", ".venv", "__pycache__", "build", "runs"}


def modules_of(package: Path) -> list[str]:
    """Every module by its path below the package, so a subfolder's is missing from the table."""
    files = sorted(package.rglob("*.py"))
    return [file.relative_to(package).with_suffix("").as_posix() for file in files]


def siblings_imported_by(node: ast.AST) -> Iterator[str]:
    """The modules of ours that one import statement names, however it is written."""
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        origin = ".".join(filter(None, ["specrepro" if node.level else None, node.module]))
        dotted = [f"{origin}.{alias.name}" for alias in node.names]
    else:
        return
    for name in dotted:
        package, _, rest = name.partition(".")
        if package == "specrepro" and rest and not rest.startswith("__"):
            yield rest.split(".")[0]


def imports_of(source: str) -> set[str]:
    return {name for node in ast.walk(ast.parse(source)) for name in siblings_imported_by(node)}


def tracked_files() -> list[Path]:
    """What git tracks; where there is no repository, everything that was unpacked."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listing.stdout.split("\0") if name]
    files = [ROOT / name for name in names] or [
        file for file in ROOT.rglob("*") if not NOT_OURS & set(file.relative_to(ROOT).parts)
    ]
    return [file for file in files if file.is_file()]


def is_text(file: Path) -> bool:
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)


def lines_naming_a_machine(file: Path) -> list[str]:
    lines = file.read_text(errors="replace").splitlines()
    return [
        f"{file.relative_to(ROOT)}:{number} {line.strip()[:80]}"
        for number, line in enumerate(lines, 1)
        if MACHINE_PATH.search(line)
    ]


@pytest.mark.parametrize("module", modules_of(PACKAGE))
def test_module_imports_only_what_lies_below_it(module: str) -> None:
    assert module in ALLOWED_IMPORTS, f"say in ALLOWED_IMPORTS what {module} may import"
    source = (PACKAGE / f"{module}.py").read_text()
    allowed = ALLOWED_IMPORTS[module] | ({"commands"} if "__main__" in source else set())
    used = imports_of(source)
    assert used <= allowed, f"{module} may not import {used - allowed}"


def test_table_names_only_modules_that_it_knows() -> None:
    named = set().union(*ALLOWED_IMPORTS.values())
    assert named <= set(ALLOWED_IMPORTS), f"not a module: {named - set(ALLOWED_IMPORTS)}"


def test_no_import_cycle_is_possible() -> None:
    try:
        TopologicalSorter(ALLOWED_IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"the table allows a cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "statement",
    [
        "import specrepro.eagle3",
        "import specrepro.eagle3 as head",
        "from specrepro import eagle3",
        "from specrepro.eagle3 import Drafter",
        "from . import eagle3",
        "from .eagle3 import Drafter",
        "def later():\n    from specrepro.eagle3 import Drafter",
    ],
)
def test_every_way_to_write_an_import_is_seen(statement: str) -> None:
    assert imports_of(statement) == {"eagle3"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_defines_nothing_and_holds_no_outputs(notebook: Path) -> None:
    cells = [
        cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    definitions = re.findall(r"^\s*(?:async def|def|class) \w+", source, re.MULTILINE)
    assert not definitions, f"move to the package: {definitions}"
    executed = [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]
    assert not executed, f"{len(executed)} cells keep outputs: run nbstripout {notebook.name}"


def test_no_tracked_text_carries_a_path_of_one_machine() -> None:
    found = [
        line for file in tracked_files() if is_text(file) for line in lines_naming_a_machine(file)
    ]
    assert not found, "\n".join(found)


def test_weights_are_committed_as_safetensors_only() -> None:
    found = [file.name for file in tracked_files() if file.suffix in PICKLE_SUFFIXES]
    assert not found, f"convert to safetensors: {found}"


def test_committed_files_stay_small() -> None:
    sizes = {str(file.relative_to(ROOT)): file.stat().st_size for file in tracked_files()}
    assert "pyproject.toml" in sizes, "the listing is not of this project"
    assert not [name for name, size in sizes.items() if size > MAX_FILE_BYTES]
    assert sum(sizes.values()) <= MAX_TREE_BYTES
