"""What the compiled kernels need, what a card could reach with them, and how long they take.

    python -m specrepro.kernel_report resources kernel_resources.csv   compile for every
    architecture python -m specrepro.kernel_report roofline                         modelled floors
    beside others' python -m specrepro.tree_kernel [rows.csv]                         timings

Compiling needs no GPU: Triton carries its own assembler, and its cuobjdump reads registers, stack
(where spilled registers go) and shared memory from the result. The roofline follows from the
kernel's own loop bounds and published peaks: it is modelled, not measured. Timings are measured, on
a GPU beside dense-mask attention, flex_attention and, if installed, FlashInfer; on a CPU the torch
path stands in for the kernel.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
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
from specrepro.tree_verify import HEAD_SIZES, attention_mask, pack, store_tree, tree_attention

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
NODES, QUERY_HEADS, KV_HEADS = (
    60,
    32,
    8,
)  # of a compiled or timed call: a 60-node tree, Llama 8B's heads
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
WALKS = {
    "greedy_walk_kernel": {"BLOCK_N": 64},
    "coupled_walk_kernel": {"BLOCK_N": 64, "BLOCK_V": 1024},
    "residual_walk_kernel": {"BLOCK_N": 64, "BLOCK_V": 1024, "SAMPLED": True, "REPLACED": False},
}


def compiled(
    kernel: str,
    target: str,
    dtype: str,
    constants: dict[str, object],
    warps: int = 4,
    stages: int = 2,
) -> dict[str, object]:
    """Compile one kernel for one architecture: a row of what it needs."""
    function = getattr(tree_kernel, kernel)
    names = function.arg_names
    signature = {name: _type_of(name, dtype, kernel, constants) for name in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # as at launch: torch aligns its tensors, and head sizes make strides multiples of 16
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name.endswith("_ptr") or re.fullmatch(r"[qkv]_\w+|stride_\w+", name)
        },
    )
    options = {"num_warps": warps, "num_stages": stages}
    result = triton.compile(source, target=TARGETS[target], options=options)
    row = {"kernel": kernel, "architecture": target, "dtype": dtype}
    row |= {"head_size": constants.get("D"), "tile_rows": constants.get("BLOCK_M")}
    row |= {"tile_slots": constants.get("BLOCK_S"), "warps": warps, "stages": stages}
    return row | _resources(result) | {"shared_bytes": result.metadata.shared}


def _type_of(name: str, dtype: str, kernel: str, constants: dict[str, object]) -> str:
    if name in constants:
        return "constexpr"
    if name in INDEX_POINTERS:
        return INDEX_POINTERS[name]
    if name in MODEL_POINTERS and "walk" not in kernel:
        return f"*{dtype}"
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


def compiled_attention(
    target: str,
    dtype: str,
    head_size: int,
    nodes: int = NODES,
    *,
    paged: bool = False,
    window: bool = False,
    softcap: bool = False,
) -> dict[str, object]:
    """The attention kernel as a launch on that architecture would choose it."""
    group = QUERY_HEADS // KV_HEADS
    architecture = TARGETS[target].arch
    tiles = tree_kernel.choose_tiles(nodes * group, head_size, ITEM_BYTES[dtype], architecture)
    torch_dtype = torch.float32 if dtype == "fp32" else torch.float16
    constants = {
        "HKV": KV_HEADS,
        "G": group,
        "D": head_size,
        "BLOCK_M": tiles.rows,
        "BLOCK_S": tiles.slots,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "BLOCK_T": tree_kernel.WORD_BITS,
        "PAGED": paged,
        "HAS_WINDOW": window,
        "HAS_SOFTCAP": softcap,
        "PRECISION": tree_kernel.dot_precision(torch_dtype, architecture),
    }
    return compiled("tree_attention_kernel", target, dtype, constants, tiles.warps, tiles.stages)


def compiled_small(target: str) -> Iterator[dict[str, object]]:
    """Merge, walks and the cache kernel."""
    shape = {"HKV": KV_HEADS, "D": 128}
    merge = shape | {
        "G": QUERY_HEADS // KV_HEADS,
        "BLOCK_R": tree_kernel.MERGE_ROWS,
        "BLOCK_D": 128,
    }
    yield compiled("merge_splits_kernel", target, "bf16", merge)
    for walk, constants in WALKS.items():
        warps = tree_kernel.COUPLED_WARPS if walk == "coupled_walk_kernel" else 4
        yield compiled(walk, target, "fp32", constants, warps)
    yield compiled("keep_accepted_kernel", target, "bf16", shape | {"BLOCK": 1024, "PAGED": True})


def resource_rows(targets: list[str], dtypes: list[str], head_sizes: list[int]) -> pd.DataFrame:
    """A row per kernel, architecture, number format and head size, in the default configuration."""
    rows = []
    for target in targets:
        rows += compiled_small(target)
        for dtype in dtypes:
            rows += [compiled_attention(target, dtype, size) for size in head_sizes]
    return pd.DataFrame(rows).astype(
        {name: "Int64" for name in ("head_size", "tile_rows", "tile_slots")}
    )


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
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=list(ITEM_BYTES), default=list(ITEM_BYTES))
    parser.add_argument("--head-sizes", nargs="+", type=int, default=list(HEAD_SIZES))
    options = parser.parse_args()
    if options.report == "resources":
        if tree_kernel.is_interpreted():
            parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
        table = resource_rows(options.targets, options.dtypes, options.head_sizes)
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
