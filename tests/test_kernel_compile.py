"""Every kernel compiles for every architecture without a GPU and spills nothing on sm_90.

The test process interprets kernels, so compiling happens in another. `kernel_resources.csv` is what
it finds:

    python -m specrepro.kernel_report resources kernel_resources.csv
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from specrepro import kernel_launch, tree_kernel
from specrepro.kernel_report import (
    TARGETS,
    TORCH_DTYPES,
    VARIANTS,
    configurations,
)
from specrepro.verify_checks import HEAD_SIZES

TABLE = Path(__file__).parents[1] / "kernel_resources.csv"
KEYS = ["kernel", "architecture", "dtype", "variant", "head_size", "tile_rows"]
SHARED_KILOBYTES = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}


def compile_again(path: Path, *options: str) -> pd.DataFrame:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "specrepro.kernel_report", "resources", str(path), *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return pd.read_csv(path)


@pytest.fixture(scope="module")
def committed() -> pd.DataFrame:
    return pd.read_csv(TABLE)


def test_a_kernel_compiled_now_needs_what_the_table_says(
    committed: pd.DataFrame, tmp_path: Path
) -> None:
    """One configuration of each kernel on each architecture."""
    options = ("--first", "--dtypes", "bf16", "--head-sizes", "128")
    rows = compile_again(tmp_path / "rows.csv", *options)
    assert len(rows) == committed.groupby(["kernel", "architecture"]).ngroups
    found = rows[KEYS].merge(committed, on=KEYS, how="left")[rows.columns]
    pd.testing.assert_frame_equal(rows, found, check_dtype=False)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_whole_table_can_be_made_again(committed: pd.DataFrame, tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(compile_again(tmp_path / "rows.csv"), committed)


def test_the_table_holds_every_configuration_that_launches_choose(committed: pd.DataFrame) -> None:
    listed = configurations(list(TARGETS), list(TORCH_DTYPES), list(HEAD_SIZES))
    expected = pd.DataFrame([one.columns() for one in listed])
    pd.testing.assert_frame_equal(committed[expected.columns], expected, check_dtype=False)
    kernels = {name for name in vars(tree_kernel) if name.endswith("_kernel")}
    assert set(committed["kernel"]) == kernels
    assert not committed.duplicated(KEYS).any()


@pytest.mark.parametrize(
    ("architecture", "most"), [("sm_90", 0), ("gfx942", 0), ("sm_80", 40), ("sm_100", 40)]
)
def test_nothing_spills_on_sm_90_and_next_to_nothing_elsewhere(
    architecture: str, most: int, committed: pd.DataFrame
) -> None:
    rows = committed[committed["architecture"] == architecture]
    assert set(VARIANTS) <= set(rows["variant"])
    assert rows["stack_bytes"].max() == most, rows[rows["stack_bytes"] > most].to_string()


@pytest.mark.parametrize("architecture", TARGETS)
def test_shared_memory_fits_the_card(architecture: str, committed: pd.DataFrame) -> None:
    rows = committed[committed["architecture"] == architecture]
    assert 0 < rows["shared_bytes"].max() <= SHARED_KILOBYTES[architecture] * 1024


def test_what_does_not_fit_a_card_with_99_kilobytes_is_cut_smaller_there(
    committed: pd.DataFrame,
) -> None:
    rows = committed[committed["kernel"] == "tree_attention_kernel"]
    for one in rows[rows["architecture"] == "sm_80"].itertuples():
        itemsize = 4 if one.dtype == "fp32" else 2
        tiles = [
            kernel_launch.choose_tiles(64, int(one.head_size), itemsize, architecture)
            for architecture in (80, 86, 89, 120)
        ]
        fits = one.shared_bytes <= 99 * 1024
        assert all((small.stages < tiles[0].stages) is not fits for small in tiles[1:])


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 4096, 4097, 40_000])
def test_splits_of_a_prefix_cover_it_whatever_the_tree(length: int) -> None:
    plans = [kernel_launch.plan(1, nodes, 32, 8, 128, 50_000, 2) for nodes in (1, 60)]
    assert plans[0].splits_of(length) == plans[1].splits_of(length)
    split_size, num_splits = plans[0].splits_of(length)
    assert (num_splits - 1) * split_size <= length <= num_splits * split_size
    assert num_splits <= plans[0].num_splits


def test_the_interpreted_kernels_are_not_compiled_by_mistake() -> None:
    if not kernel_launch.is_interpreted():
        pytest.skip("compiled kernels on this machine")
    command = [sys.executable, "-m", "specrepro.kernel_report", "resources"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "unset TRITON_INTERPRET" in run.stderr
