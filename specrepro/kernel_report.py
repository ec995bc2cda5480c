"""What the compiled kernels need, what a card could reach with them, and how long they take.

    python -m specrepro.kernel_report resources kernel_resources.csv   registers and memory
    python -m specrepro.kernel_report roofline                         modelled floors
    python -m specrepro.tree_kernel [rows.csv]                         timings

Compiling needs no GPU: Triton carries its own assembler, and its cuobjdump reads registers, stack
(where spilled registers go) and shared memory from the result. `kernel_resources.csv` holds a row
for every kernel, architecture, number format and head size, in the configuration a launch chooses;
the attention kernel plain, with pages, and with pages, window and softcap, which needs the most.
Nothing spills on sm_90 or gfx942; on sm_80 and sm_100 some rows keep up to 40 bytes on the stack.
The roofline follows from the kernel's own loop bounds and published peaks: it is modelled, not
measured. Timings are measured, on a GPU beside dense-mask attention, flex_attention and, if
installed, FlashInfer; on a CPU the torch path stands in for the kernel.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specrepro import tree_kernel
from specrepro.draft_tree import DraftTree
from specrepro.tree_verify import (
    HEAD_SIZES,
    attention_mask,
    pack,
    store_tree,
    tree_attention,
    vocabulary_grid,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NODES, QUERY_HEADS, KV_HEADS = 60, 32, 8  # of a timed call: a 60-node tree, Llama 8B's heads
TREE_SIZES = (NODES, 30, 1)  # nodes of the trees whose tiles are compiled
VOCABULARIES = (49_152, 128_256, 151_936)  # SmolLM2, Llama 3, Qwen 3
VARIANTS = {  # of the attention kernel
    "plain": {"PAGED": False, "HAS_WINDOW": False, "HAS_SOFTCAP": False},
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
                merge = shape | {"BLOCK_R": tree_kernel.MERGE_ROWS}
                yield Configuration("merge_splits_kernel", target, dtype, "plain", merge)


def walks(target: str) -> Iterator[Configuration]:
    shape = {"BLOCK_N": triton.next_power_of_2(NODES)}
    options = {"num_warps": tree_kernel.VOCABULARY_WARPS}
    yield Configuration("greedy_walk_kernel", target, "fp32", "plain", shape)
    for vocabulary in VOCABULARIES:
        R, C = vocabulary_grid(vocabulary)
        grid = shape | {"ROWS": tree_kernel.race_tile_rows(R, C), "C": C}
        variant = f"vocabulary {vocabulary}"
        yield Configuration("coupled_walk_kernel", target, "fp32", variant, grid, options)
    for mode, flags in MODES.items():
        constants = shape | flags | {"BLOCK_V": tree_kernel.RESIDUAL_TILE}
        yield Configuration("residual_walk_kernel", target, "fp32", mode, constants, options)


def attention(target: str, dtype: str, shape: dict[str, int]) -> Iterator[Configuration]:
    """One configuration for each variant, and each tile that some size of tree gets."""
    architecture, torch_dtype = TARGETS[target].arch, TORCH_DTYPES[dtype]
    precision = tree_kernel.dot_precision(torch_dtype, architecture)
    for variant, flags in VARIANTS.items():
        is_plain = not (flags["HAS_WINDOW"] or flags["HAS_SOFTCAP"])
        of_a_size = (
            tree_kernel.choose_tiles(
                nodes * shape["G"], shape["D"], torch_dtype.itemsize, architecture,
                is_plain=is_plain,
            )
            for nodes in TREE_SIZES
        )  # fmt: skip
        for tiles in dict.fromkeys(of_a_size):
            constants = shape | flags | {"BLOCK_M": tiles.rows, "BLOCK_S": tiles.slots}
            constants |= {"BLOCK_T": tree_kernel.WORD_BITS, "PRECISION": precision}
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


def roofline(contexts: tuple[int, ...] = (512, 2048, 8192), head_size: int = 128) -> pd.DataFrame:
    """Modelled floor times of one attention layer at batch 1 in half precision."""
    rows = []
    shape = dict(
        nodes=NODES, query_heads=QUERY_HEADS, kv_heads=KV_HEADS, head_size=head_size, itemsize=2
    )
    for card in tree_kernel.CARDS:
        for context in contexts:
            lengths = [context]
            geometry = tree_kernel.plan(
                1, NODES, QUERY_HEADS, KV_HEADS, head_size, context, 2, card.architecture
            )
            least = tree_kernel.minimum_traffic(lengths, **shape)
            moved = {
                "tree kernel": tree_kernel.traffic(geometry, lengths, **shape),
                "dense mask, packed heads": tree_kernel.dense_mask_traffic(
                    lengths, **shape, packs_heads=True
                ),
                "dense mask": tree_kernel.dense_mask_traffic(lengths, **shape, packs_heads=False),
            }
            for name, one in moved.items():
                rows.append(
                    {
                        "card": card.name,
                        "context": context,
                        "attention": name,
                        "kv_over_minimum": round(one.kv_bytes / least.kv_bytes, 3),
                        "scratch_megabytes": round(one.scratch_bytes / 1e6, 2),
                        "modelled_floor_us": round(1e6 * tree_kernel.floor_seconds(card, one), 2),
                    }
                )
    return pd.DataFrame(rows)


def timings(device: str, contexts: tuple[int, ...] = (512, 2048, 8192)) -> pd.DataFrame:
    """Measured microseconds of one attention layer, ours beside what else is installed."""
    dtype = torch.bfloat16
    rows = []
    for context in contexts:
        case = _case(context, device, dtype)
        kv_bytes = 2 * (context + NODES) * KV_HEADS * 128 * dtype.itemsize
        for name, run in _contenders(*case).items():
            row = {"attention": name, "context": context, "nodes": NODES, "dtype": "bfloat16"}
            rows.append(row | _timing(run, kv_bytes, device))
    return pd.DataFrame(rows)


def _timing(run: Callable[[], object], kv_bytes: int, device: str) -> dict[str, object]:
    """Columns of one contender; one that cannot run here is a row that says why."""
    where = {"device": device_name(device), "torch": torch.__version__}
    where |= {"triton": triton.__version__}
    try:
        seconds = _seconds(run, device)
    except (RuntimeError, TypeError, ValueError) as error:
        return where | {"failed": str(error).splitlines()[0]}
    return where | {
        "microseconds": round(1e6 * seconds, 1),
        "kv_gigabytes_per_second": round(kv_bytes / seconds / 1e9, 1),
        "share_of_peak": _share_of_peak(kv_bytes / seconds, device),
    }


def _case(context: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments of `tree_attention` for one tree with three children a node."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(1, NODES, QUERY_HEADS, 128), *[(1, NODES, KV_HEADS, 128)] * 2]
    shapes += [(1, context + NODES, KV_HEADS, 128)] * 2
    tensors = [torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes]
    parents = (torch.arange(NODES, device=device) + 2) // 3 - 1
    tree = DraftTree(torch.arange(NODES, device=device)[None], parents[None])
    return *tensors, torch.tensor([context], device=device), tree


def _contenders(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    tree: DraftTree,
) -> dict[str, Callable[[], object]]:
    """The same attention by each means there is; masks and plans are made beforehand for all."""
    num_slots = k_cache.shape[1]
    store_tree(k, v, k_cache, v_cache, lengths)
    mask, packed = attention_mask(tree, lengths, num_slots), pack(tree)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k_cache, v_cache)]
    block_mask = create_block_mask(
        lambda b, h, row, slot: mask[0, row, slot], 1, None, q.shape[1], num_slots, device=q.device
    )
    compiled_flex = torch.compile(flex_attention)
    runs = {
        "tree_attention": lambda: tree_attention(
            q, k, v, k_cache, v_cache, lengths, tree, mask=mask, packed=packed
        ),
        "scaled_dot_product_attention, dense mask": lambda: F.scaled_dot_product_attention(
            *heads_first, attn_mask=mask[:, None], enable_gqa=True
        ),
        "flex_attention": lambda: compiled_flex(
            *heads_first, block_mask=block_mask, enable_gqa=True
        ),
    }
    try:
        from flashinfer import single_prefill_with_kv_cache
    except ImportError:
        return runs
    flat = q[0], k_cache[0], v_cache[0]
    return runs | {
        "FlashInfer, custom mask": lambda: single_prefill_with_kv_cache(*flat, custom_mask=mask[0])
    }


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return triton.testing.do_bench(run, return_mode="median") / 1e3
    run()
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


def _share_of_peak(bytes_per_second: float, device: str) -> float | None:
    """Of the memory bandwidth that the card's own clock and bus width give."""
    if device != "cuda":
        return None
    properties = torch.cuda.get_device_properties(0)
    peak = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
    return round(bytes_per_second / peak, 3)


def device_name(device: str) -> str:
    return (
        torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", choices=["resources", "roofline", "timings"])
    parser.add_argument("rows", nargs="?", type=Path, help="where the rows go as CSV")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=TORCH_DTYPES, default=list(TORCH_DTYPES))
    parser.add_argument("--head-sizes", nargs="+", type=int, default=list(HEAD_SIZES))
    parser.add_argument("--first", action="store_true", help="one of each kernel and architecture")
    options = parser.parse_args()
    if options.report == "resources":
        if tree_kernel.is_interpreted():
            parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
        chosen = configurations(options.targets, options.dtypes, options.head_sizes)
        table = resource_rows(first_of_each(chosen) if options.first else chosen)
    elif options.report == "roofline":
        table = roofline()
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            print("No GPU: on one, this times the Triton kernel; here the torch path stands in.")
        table = timings(device)
    if options.rows is not None:
        table.to_csv(options.rows, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
