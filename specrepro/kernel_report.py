"""What the compiled kernels need, and what a card could reach with them: no GPU is asked.

    python -m specrepro.kernel_report resources kernel_resources.csv   registers and memory
    python -m specrepro.kernel_report roofline [rows.csv]              modelled floors

Compiling needs no GPU: Triton carries its own assembler, and its cuobjdump reads registers, stack
(where spilled registers go) and shared memory from the result. `kernel_resources.csv` holds a row
for every kernel, architecture, number format and head size, in the configuration a launch chooses;
the attention kernel plain, with pages, and with pages, window and softcap, which needs the most;
and plain for groups of heads that are no power of two.
Nothing spills on sm_90 or gfx942; on sm_80 and sm_100 some rows keep up to 40 bytes on the stack.
The roofline follows from the kernel's own loop bounds and published peaks: it is modelled, not
measured. What is measured: `python -m specrepro.tree_kernel`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specrepro import commands, kernel_launch, kernel_traffic, tree_kernel
from specrepro.races import vocabulary_grid
from specrepro.verify_checks import HEAD_SIZES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NODES, QUERY_HEADS, KV_HEADS = 60, 32, 8  # a 60-node tree, Llama 8B's heads
TREE_SIZES = (NODES, 30, 1)  # nodes of the trees whose tiles are compiled
VOCABULARIES = (49_152, 128_256, 151_936)  # SmolLM2, Llama 3, Qwen 3
PLAIN = {"PAGED": False, "HAS_WINDOW": False, "HAS_SOFTCAP": False}
SEVENS = {"HKV": 4, "G": 7, "D": 128, "BLOCK_D": 128}  # Qwen2.5 7B's: no power of two
VARIANTS = {  # of the attention kernel
    "plain": PLAIN,
    "pages": {"PAGED": True, "HAS_WINDOW": False, "HAS_SOFTCAP": False},
    "pages, window, softcap": {"PAGED": True, "HAS_WINDOW": True, "HAS_SOFTCAP": True},
}
MODES = {  # of the walk by rejection
    "deterministic": {"SAMPLED": False, "REPLACED": False},
    "without_replacement": {"SAMPLED": True, "REPLACED": False},
    "with_replacement": {"SAMPLED": True, "REPLACED": True},
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INDEX_POINTERS = {
    "table_ptr": "*i32",
    "depths_ptr": "*i32",
    "words_ptr": "*u32",
    **dict.fromkeys(
        ("lengths_ptr", "num_nodes_ptr", "tokens_ptr", "parents_ptr", "choice_ptr", "path_ptr"),
        "*i64",
    ),
    **dict.fromkeys(("emitted_ptr", "accepted_ptr", "bonus_ptr"), "*i64"),
}
MODEL_POINTERS = ("q_ptr", "k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr", "out_ptr", "cache_ptr")


@dataclass(frozen=True, slots=True)
class Configuration:
    """A kernel as some launch compiles it: constants, and what Triton is not left to choose."""

    kernel: str
    architecture: str
    dtype: str
    variant: str
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=dict)

    def columns(self) -> dict[str, object]:
        """What tells it from the others in a table."""
        tile = {"head_size": "D", "tile_rows": "BLOCK_M", "tile_slots": "BLOCK_S"}
        names = ("kernel", "architecture", "dtype", "variant")
        columns = {name: getattr(self, name) for name in names}
        return columns | {name: self.constants.get(of) for name, of in tile.items()}


def configurations(
    targets: list[str], dtypes: list[str], head_sizes: list[int]
) -> Iterator[Configuration]:
    """Every kernel on every architecture, as launches choose it."""
    for target in targets:
        yield from walks(target)
        for variant, is_paged in (("pages", True), ("plain", False)):
            constants = {"HKV": KV_HEADS, "D": 128, "BLOCK": 1024, "PAGED": is_paged}
            yield Configuration("keep_accepted_kernel", target, "bf16", variant, constants)
        for dtype in dtypes:
            for head_size in head_sizes:
                shape = {"HKV": KV_HEADS, "G": QUERY_HEADS // KV_HEADS, "D": head_size}
                shape |= {"BLOCK_D": triton.next_power_of_2(head_size)}
                yield from attention(target, dtype, shape)
                if head_size == SEVENS["D"]:
                    yield from attention(target, dtype, SEVENS, {"groups of seven": PLAIN})
                merge = shape | {"BLOCK_R": kernel_launch.MERGE_ROWS}
                yield Configuration("merge_splits_kernel", target, dtype, "plain", merge)


def walks(target: str) -> Iterator[Configuration]:
    shape = {"BLOCK_N": triton.next_power_of_2(NODES)}
    options = {"num_warps": kernel_launch.VOCABULARY_WARPS}
    yield Configuration("greedy_walk_kernel", target, "fp32", "plain", shape)
    for vocabulary in VOCABULARIES:
        R, C = vocabulary_grid(vocabulary)
        grid = shape | {"ROWS": kernel_launch.race_tile_rows(R, C), "C": C}
        variant = f"vocabulary {vocabulary}"
        yield Configuration("coupled_walk_kernel", target, "fp32", variant, grid, options)
    for mode, flags in MODES.items():
        constants = shape | flags | {"BLOCK_V": kernel_launch.RESIDUAL_TILE}
        yield Configuration("residual_walk_kernel", target, "fp32", mode, constants, options)


def attention(
    target: str,
    dtype: str,
    shape: dict[str, int],
    variants: dict[str, dict[str, bool]] = VARIANTS,
) -> Iterator[Configuration]:
    """One configuration for each variant, and each tile that some size of tree gets."""
    architecture, torch_dtype = TARGETS[target].arch, TORCH_DTYPES[dtype]
    precision = kernel_launch.dot_precision(torch_dtype, architecture)
    for variant, flags in variants.items():
        is_plain = not (flags["HAS_WINDOW"] or flags["HAS_SOFTCAP"])
        of_a_size = (
            kernel_launch.choose_tiles(
                nodes * shape["G"], shape["D"], torch_dtype.itemsize, architecture,
                is_plain=is_plain, group=shape["G"],
            )
            for nodes in TREE_SIZES
        )  # fmt: skip
        for tiles in dict.fromkeys(of_a_size):
            constants = shape | flags | {"BLOCK_M": tiles.rows, "BLOCK_S": tiles.slots}
            constants |= {"BLOCK_T": kernel_launch.WORD_BITS, "PRECISION": precision}
            options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
            yield Configuration("tree_attention_kernel", target, dtype, variant, constants, options)


def compiled(one: Configuration) -> dict[str, object]:
    """Compile a kernel without a GPU: a row of what it needs."""
    function = getattr(tree_kernel, one.kernel)
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: _type_of(name, one) for name in names},
        constexprs={(names.index(name),): value for name, value in one.constants.items()},
        # as at launch: torch aligns its tensors, and head sizes make strides multiples of 16
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name.endswith("_ptr") or re.fullmatch(r"[qkv]_\w+|stride_\w+", name)
        },
    )
    result = triton.compile(source, target=TARGETS[one.architecture], options=one.options)
    chosen = {"warps": result.metadata.num_warps, "stages": result.metadata.num_stages}
    shared = {"shared_bytes": result.metadata.shared}
    return one.columns() | chosen | _resources(result) | shared


def _type_of(name: str, one: Configuration) -> str:
    if name in one.constants:
        return "constexpr"
    if name in INDEX_POINTERS:
        return INDEX_POINTERS[name]
    if name in MODEL_POINTERS and "walk" not in one.kernel:
        return f"*{one.dtype}"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in ("scale", "cap") else "i32"


def _resources(result: object) -> dict[str, int]:
    """Registers of a thread and bytes of stack: spilled registers live there."""
    if "amdgcn" in result.asm:
        found = dict(
            re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", result.asm["amdgcn"])
        )
        return {
            "registers": int(found["vgpr_count"]),
            "stack_bytes": int(found["private_segment_fixed_size"]),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": max(map(int, re.findall(r"REG:(\d+)", text))),
        "stack_bytes": max(map(int, re.findall(r"STACK:(\d+)", text))),
    }


def resource_rows(chosen: Iterable[Configuration]) -> pd.DataFrame:
    rows = pd.DataFrame([compiled(one) for one in chosen])
    return rows.astype({name: "Int64" for name in ("head_size", "tile_rows", "tile_slots")})


def first_of_each(chosen: Iterable[Configuration]) -> list[Configuration]:
    """One configuration of each kernel on each architecture."""
    first: dict[tuple[str, str], Configuration] = {}
    for one in chosen:
        first.setdefault((one.kernel, one.architecture), one)
    return list(first.values())


def roofline(
    batch: int = 1,
    nodes: int = NODES,
    contexts: Sequence[int] = (512, 2048, 8192),
    query_heads: int = QUERY_HEADS,
    kv_heads: int = KV_HEADS,
    head_size: int = 128,
    dtype: str = "bf16",
) -> pd.DataFrame:
    """What one attention layer moves and computes, and its modelled floor on each card.

    The tree kernel, beside one that does not pack the heads of a key-value head, and beside a fused
    attention that is given a dense mask. `kv_over_minimum` is of each key and value loaded once.
    """
    given = {"batch": batch, "nodes": nodes, "query_heads": query_heads, "kv_heads": kv_heads}
    given |= {"head_size": head_size, "dtype": dtype}
    shape = (nodes, query_heads, kv_heads, head_size, TORCH_DTYPES[dtype].itemsize)
    rows = []
    for card in kernel_traffic.CARDS:
        for context in contexts:
            least = kernel_traffic.minimum_traffic([context] * batch, *shape)
            for name, moved in _traffic_of_each(card.architecture, [context] * batch, shape):
                floor = kernel_traffic.floor_seconds(card, moved, shape[-1])
                quantities = {
                    "kv_megabytes": moved.kv_bytes / 1e6,
                    "megabytes": moved.total_bytes / 1e6,
                    "gigaoperations": moved.operations / 1e9,
                    "kv_over_minimum": moved.kv_bytes / least.kv_bytes,
                    "modelled_floor_us": 1e6 * floor,
                }
                row = {"card": card.name, "context": context, "attention": name} | given
                rows.append(row | {name: round(value, 3) for name, value in quantities.items()})
    return pd.DataFrame(rows)


def _traffic_of_each(
    architecture: int, lengths: list[int], shape: tuple[int, ...]
) -> Iterator[tuple[str, kernel_traffic.Traffic]]:
    nodes, query_heads, kv_heads, head_size, itemsize = shape
    for packs_heads, behind in ((True, ""), (False, ", heads not packed")):
        geometry = kernel_launch.plan(
            len(lengths), nodes, query_heads, kv_heads if packs_heads else query_heads, head_size,
            max(lengths) + nodes, itemsize, architecture,
        )  # fmt: skip
        yield (
            f"tree kernel{behind}",
            kernel_traffic.traffic(geometry, lengths, *shape, packs_heads=packs_heads),
        )
    for packs_heads, behind in ((True, ", heads packed"), (False, "")):
        moved = kernel_traffic.dense_mask_traffic(lengths, *shape, packs_heads=packs_heads)
        yield f"SDPA, dense mask{behind}", moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", choices=["resources", "roofline"])
    parser.add_argument("rows", nargs="?", type=Path, help="where the rows go as CSV")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=TORCH_DTYPES, default=list(TORCH_DTYPES))
    parser.add_argument("--head-sizes", nargs="+", type=int, default=list(HEAD_SIZES))
    parser.add_argument("--first", action="store_true", help="one of each kernel and architecture")
    options = parser.parse_args()
    if options.report == "roofline":
        table = roofline()
    elif kernel_launch.is_interpreted():
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    else:
        chosen = configurations(options.targets, options.dtypes, options.head_sizes)
        table = resource_rows(first_of_each(chosen) if options.first else chosen)
    if options.rows is not None:
        table.to_csv(options.rows, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    commands.run(main)
