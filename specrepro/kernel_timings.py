"""How long tree verification takes, beside the other means there are: attention, a pass, a verdict.

    python -m specrepro.tree_kernel [rows.csv]     on an idle machine: minutes

Rows go to `figures/tree_verify/timings.csv` unless said otherwise.

Three quantities, a row each: one layer of attention over a tree of 60 nodes, at the heads of an
8B model, beside attention under a dense mask, `flex_attention` and, if installed, FlashInfer; a
whole pass of a target over such a tree, behind 512 tokens, beside the same pass under a dense mask;
and what follows a pass at batch 1, the walk, the bonus token and the cache kept. On a GPU the
Triton kernels run; on a CPU the torch path stands in for them, and two rows have bounds to meet.

Contenders take turns, so that a disturbance falls on all of them. `milliseconds` is a median,
`ratio` the median of the ratios to the first contender's time in the same turn; `_low` and `_high`
are 95 % intervals by bootstrap. On a GPU the second-level cache is emptied before every run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface

from specrepro import commands, kernel_launch, target_model
from specrepro.decoding import Sampling, judge
from specrepro.draft_tree import DraftTree
from specrepro.measure import load_average_warning
from specrepro.races import vocabulary_grid
from specrepro.rows import environment, interval
from specrepro.target_model import KVCache, Scores, Target
from specrepro.tree_verify import (
    attention_mask,
    pack,
    store_tree,
    tree_attention,
)

NODES, QUERY_HEADS, KV_HEADS, HEAD_SIZE = 60, 32, 8, 128  # of one layer: Llama 8B's heads
CONTEXTS = (512, 2048, 8192)  # cached tokens
DEPTH = 5  # drafted tokens that the timed walk accepts
MOST_OF_DENSE, MOST_MILLISECONDS = 1.05, 2.0  # what a CPU has to keep to
DENSE = "specrepro_dense"  # the attention of the pass beside ours
NUM_RESAMPLES = 2000
ROWS = Path("figures/tree_verify/timings.csv")

Runs = dict[str, Callable[[], object]]


def layers(
    device: str, contexts: Sequence[int] = CONTEXTS, turns: int = 30
) -> Iterator[dict[str, Any]]:
    """One layer of attention in bfloat16 at each context, by each means there is."""
    for context in contexts:
        case = _case(context, device)
        kv_bytes = 2 * (context + NODES) * KV_HEADS * HEAD_SIZE * case[0].itemsize
        runs = {name: _captured(run, device) for name, run in _contenders(*case).items()}
        for row in compared(runs, device, turns):
            row |= {"quantity": "layer", "context": context, "nodes": NODES}
            row |= {"target": None, "dtype": "bfloat16"}
            if "milliseconds" in row:
                rate = 1e3 * kv_bytes / row["milliseconds"]
                row["kv_gigabytes_per_second"] = round(rate / 1e9, 1)
                row["share_of_peak"] = _share_of_peak(rate, device)
            yield row


def passes(
    target: Target, dense: Target, context: int = min(CONTEXTS), turns: int = 30
) -> Iterator[dict[str, Any]]:
    """A whole pass over a tree, and the same pass of `dense`, which `attends_densely`."""
    runs: Runs = {}
    for name, one in (("SDPA, dense mask", dense), ("tree_attention", target)):
        cache, tree = _cached(one, context, NODES), _bushy_tree(NODES, one.device)
        runs[name] = lambda one=one, cache=cache, tree=tree: one.verify(cache, tree)
    for row in compared(runs, target.device.type, turns):
        row |= {"quantity": "pass", "context": context, "nodes": NODES}
        is_bounded = row["contender"] == "tree_attention" and target.device.type == "cpu"
        yield row | (_held_to("ratio", MOST_OF_DENSE, row) if is_bounded else {})


def verdicts(
    target: Target, context: int = min(CONTEXTS), turns: int = 30
) -> Iterator[dict[str, Any]]:
    """What follows a pass at batch 1: the walk down the tree, the bonus token, the cache kept."""
    cache, tree, scores = _verified(target, context)
    lengths, times = cache.lengths, _times_that_win(tree, target)
    samplings = {"greedy": (Sampling(), None), "sampled": (Sampling(1.0), times)}

    def step(sampling: Sampling, times: Tensor | None) -> int:
        verdict = judge(tree, scores, sampling, times)
        target.keep(cache, verdict)
        cache.lengths = lengths
        return int(verdict.num_accepted)

    runs: Runs = {name: lambda chosen=chosen: step(*chosen) for name, chosen in samplings.items()}
    for row in compared(runs, target.device.type, turns):
        row |= {"quantity": "verify step", "context": context, "nodes": NODES}
        row |= {"accepted": runs[row["contender"]]()}
        is_bounded = target.device.type == "cpu"
        yield row | (_held_to("milliseconds", MOST_MILLISECONDS, row) if is_bounded else {})


def compared(runs: Runs, device: str, turns: int) -> Iterator[dict[str, Any]]:
    """A row for each contender; one that cannot run here is a row that says why.

    Ratios are to the first, so what keeps that one from running is raised.
    """
    milliseconds, failures = _timed(runs, device, turns)
    first = np.array(milliseconds[next(iter(runs))])
    for name, measured in milliseconds.items():
        row = {"contender": name, "turns": turns} | _median("milliseconds", np.array(measured))
        yield row | _median("ratio", np.array(measured) / first)
    for name, failure in failures.items():
        yield {"contender": name, "failed": failure}


@torch.inference_mode()
def _timed(runs: Runs, device: str, turns: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of every turn of those that run, and the first line of why the others do not."""
    milliseconds: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for name, run in runs.items():
        try:
            run()
            milliseconds[name] = []
        except (RuntimeError, TypeError, ValueError) as error:
            if not milliseconds:
                raise
            failures[name] = str(error).splitlines()[0]
    for turn in range(turns + 1):  # the first one warms up
        for name, measured in milliseconds.items():
            took = _milliseconds(runs[name], device)
            measured += [took] if turn else []
    return milliseconds, failures


def _captured(run: Callable[[], object], device: str) -> Callable[[], object]:
    """On a GPU a replay of all that `run` launches, so that its Python is not timed.

    One layer takes less time than the processor takes to launch it.
    """
    if device != "cuda":
        return run
    graph: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graph:
            run()  # compiles
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            graph.append(captured)
        graph[0].replay()

    return replay


def _milliseconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def _median(name: str, values: np.ndarray) -> dict[str, float]:
    draws = np.random.default_rng(0).choice(values, (NUM_RESAMPLES, len(values)))
    low, high = interval(np.median(draws, axis=1))
    return {name: float(np.median(values)), f"{name}_low": low, f"{name}_high": high}


def _held_to(column: str, at_most: float, row: dict[str, Any]) -> dict[str, Any]:
    return {"bound": f"{column} <= {at_most}", "is_met": row.get(column, np.inf) <= at_most}


def _bushy_tree(nodes: int, device: torch.device | str) -> DraftTree:
    """One tree in which each node has three children, whatever its tokens."""
    node_ids = torch.arange(nodes, device=device)
    return DraftTree(node_ids[None] + 5, ((node_ids + 2) // 3 - 1)[None])


def _case(context: int, device: str) -> tuple[Any, ...]:
    """Arguments of `tree_attention` for one tree behind `context` tokens."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(1, NODES, QUERY_HEADS, HEAD_SIZE), *[(1, NODES, KV_HEADS, HEAD_SIZE)] * 2]
    shapes += [(1, context + NODES, KV_HEADS, HEAD_SIZE)] * 2
    tensors = [torch.randn(shape, generator=rng).to(device, torch.bfloat16) for shape in shapes]
    return *tensors, torch.tensor([context], device=device), _bushy_tree(NODES, device)


def _contenders(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    tree: DraftTree,
) -> Runs:
    """The same attention by each means there is; masks and plans are made beforehand for all."""
    num_slots = k_cache.shape[1]
    store_tree(k, v, k_cache, v_cache, lengths)
    mask = attention_mask(tree, lengths, num_slots)
    shared = {"packed": pack(tree)} if q.is_cuda else {"mask": mask}
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k_cache, v_cache)]
    block_mask = create_block_mask(
        lambda b, h, row, slot: mask[0, row, slot], 1, None, q.shape[1], num_slots, device=q.device
    )
    compiled_flex = torch.compile(flex_attention)
    runs: Runs = {
        "SDPA, dense mask": lambda: F.scaled_dot_product_attention(
            *heads_first, attn_mask=mask[:, None], enable_gqa=True
        ),
        "tree_attention": lambda: tree_attention(
            q, k, v, k_cache, v_cache, lengths, tree, **shared
        ),
        "flex_attention": lambda: compiled_flex(
            # its kernel for few queries has no tile for this many rows of a head
            *heads_first,
            block_mask=block_mask,
            enable_gqa=True,
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
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


def _share_of_peak(bytes_per_second: float, device: str) -> float | None:
    """Of the memory bandwidth that the card's own clock and bus width give."""
    if device != "cuda":
        return None
    properties = torch.cuda.get_device_properties(0)
    peak = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
    return round(bytes_per_second / peak, 3)


def _dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree_pass: Any = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function for a pass over a tree by one fused call."""
    cache, mask = tree_pass.cache, tree_pass.mask(None)
    k_cache, v_cache = cache.slots[module.layer_idx]
    store_tree(key.transpose(1, 2), value.transpose(1, 2), k_cache, v_cache, cache.lengths)
    if mask is None:
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril()[None]
    seen = (slots[:, : mask.shape[-1]].transpose(1, 2) for slots in (k_cache, v_cache))
    out = F.scaled_dot_product_attention(
        query, *seen, attn_mask=mask[:, None], scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(DENSE, _dense_attention)


def attends_densely(target: Target) -> Target:
    """The target itself, from now on under a dense mask: it must have no windows and no caps."""
    target.model.set_attn_implementation(DENSE)
    return target


def _cached(target: Target, context: int, room: int) -> KVCache:
    """A cache that holds `context` drawn tokens."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, target.vocab_size, (1, context), generator=rng)
    return target.prefill(tokens.tolist(), context + room)[0]


def _verified(target: Target, context: int) -> tuple[KVCache, DraftTree, Scores]:
    """A cache, a tree whose first nodes are a chain, and scores that favour each step down it."""
    cache, tree = _cached(target, context, NODES), _bushy_tree(NODES, target.device)
    chain = torch.arange(DEPTH + 1, device=target.device)
    tree.parents[0, chain] = chain - 1
    scores = target.verify(cache, tree)
    scores.logits = scores.logits.clone()  # what inference mode made may not be written to
    scores.logits[0, chain[:-1], tree.tokens[0, chain[1:]]] = 1e3
    return cache, tree, scores


def _times_that_win(tree: DraftTree, target: Target) -> Tensor:
    """(1, N, R + C) race times by which each node of the chain is drawn at the one before."""
    R, C = vocabulary_grid(target.vocab_size)
    times = torch.ones(1, tree.tokens.shape[1], R + C, device=target.device)
    for node, token in enumerate(tree.tokens[0, 1 : DEPTH + 1].tolist()):
        times[0, node, [token // C, R + token % C]] = 1e-30
    return times


def launches(contexts: Sequence[int] = CONTEXTS) -> pd.DataFrame:
    """What attention over the timed tree launches on an H100, whatever is here."""
    rows = []
    for context in contexts:
        plan = kernel_launch.plan(
            1, NODES, QUERY_HEADS, KV_HEADS, HEAD_SIZE, context + NODES, itemsize=2
        )
        _, num_splits = plan.splits_of(context)
        row = {"context": context, "kernel": "tree_attention_kernel"}
        row |= {"programs": KV_HEADS * plan.row_blocks * num_splits, "splits": num_splits}
        row |= {"tile_rows": plan.tiles.rows, "tile_slots": plan.tiles.slots}
        rows.append(row | {"warps": plan.tiles.warps})
    return pd.DataFrame(rows)


def timings(name: str, contexts: Sequence[int], turns: int) -> pd.DataFrame:
    """Every row, with its provenance."""
    target, dense = target_model.load(name), attends_densely(target_model.load(name))
    rows = [
        *verdicts(target, min(contexts), turns),
        *passes(target, dense, min(contexts), turns),
        *layers(target.device.type, contexts, turns),
    ]
    where = environment(target)
    return pd.DataFrame([where | {"batch": 1} | row for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="?", type=Path, default=ROWS)
    parser.add_argument("--target", default=target_model.EMBEDDED)
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--turns", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here, so the torch path is timed. On an H100 a layer would launch:")
        print(launches(options.contexts).to_string(index=False))
    if warning := load_average_warning():
        print(f"warning: {warning}")
    table = timings(options.target, options.contexts, options.turns)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.rows, index=False)
    print(table.drop(columns=list(environment_columns(table))).to_string(index=False))
    print(f"rows: {options.rows}")


def environment_columns(table: pd.DataFrame) -> Iterator[str]:
    """Columns that say the same in every row."""
    return (name for name in table if table[name].nunique(dropna=False) == 1)


if __name__ == "__main__":
    commands.run(main)
