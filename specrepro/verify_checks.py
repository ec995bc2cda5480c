"""What tree verification refuses: one ValueError, with the value, before anything is launched.

Shapes are always looked at. What would have to be read back from a GPU (trees, lengths, masses) is
looked at once a pass, and not while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specrepro.draft_tree import DraftTree
from specrepro.races import vocabulary_grid

SAMPLING_MODES = ("coupled", "deterministic", "without_replacement", "with_replacement")
HEAD_SIZES = (64, 80, 96, 128, 256)  # of the kernels; torch takes any


def may_read_back(tensor: Tensor) -> bool:
    """Reading a GPU's values costs a synchronisation, and is forbidden in a CUDA graph."""
    return not tensor.is_cuda or not torch.cuda.is_current_stream_capturing()


def refuse_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    tree: DraftTree,
    block_table: Tensor | None,
) -> None:
    """Raise ValueError where the arguments of attention do not fit each other."""
    vectors = (q, k, v, k_cache, v_cache)
    are_vectors = all(x.ndim == 4 for x in vectors)
    B, N, Hq, D = q.shape if are_vectors else (0, 0, 1, 0)
    Hkv = k.shape[2] if are_vectors else 1
    faults = {
        "queries, keys, values and caches must have four dimensions": not are_vectors,
        f"{Hq} query heads cannot share {Hkv} key-value heads": Hq % Hkv != 0,
        f"k and v must be {(B, N, Hkv, D)}": not k.shape == v.shape == (B, N, Hkv, D),
        f"the tree must be {(B, N)}": tree.tokens.shape != (B, N),
        f"cache_lengths must be {(B,)}": cache_lengths.shape != (B,),
        "the caches of keys and values must have one shape": k_cache.shape != v_cache.shape,
        f"the cache must end in {(Hkv, D)}": k_cache.shape[2:] != (Hkv, D),
        f"the cache must hold {B} sequences": block_table is None and k_cache.shape[0] != B,
        f"the block table must be ({B}, pages)": block_table is not None
        and (block_table.ndim != 2 or block_table.shape[0] != B),
        "queries, keys, values and caches must be of one dtype on one device": len(
            {(x.dtype, x.device) for x in vectors}
        )
        > 1,
    }
    for fault, is_there in faults.items():
        if is_there:
            raise ValueError(
                f"{fault}: q {_described(q)}, k {_described(k)}, v {_described(v)}, "
                f"cache {_described(k_cache)} and {_described(v_cache)}, "
                f"lengths {tuple(cache_lengths.shape)}, tree {tuple(tree.tokens.shape)}"
            )


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def refuse_options(window: int | None, softcap: float | None) -> None:
    """Raise ValueError for a window that nothing lies in, or a cap that caps everything."""
    for name, value in (("window", window), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, or None for none, not {value}")


def capacity_of(cache: Tensor, block_table: Tensor | None) -> int:
    """Slots of a sequence in a cache (..., slots or page slots, Hkv, D)."""
    return cache.shape[-3] * (1 if block_table is None else block_table.shape[1])


def refuse_lengths(cache_lengths: Tensor, num_nodes: int, capacity: int) -> None:
    """Raise ValueError where prefixes of these lengths leave no room for a tree behind them."""
    shortest, longest = torch.stack(cache_lengths.aminmax()).tolist()
    if shortest < 0 or longest + num_nodes > capacity:
        raise ValueError(
            f"cache lengths run from {shortest} to {longest}; with {num_nodes} nodes behind "
            f"them they must fit the {capacity} slots of the cache"
        )


def refuse_pages(
    block_table: Tensor, cache_lengths: Tensor, num_nodes: int | Tensor, cache: Tensor
) -> None:
    """Raise ValueError where a page in use is none of the pages of `cache`.

    `num_nodes` behind the lengths are in use, of each sequence as many or (B, 1).
    """
    num_pages, page_size = cache.shape[-4], cache.shape[-3]
    first_slots = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    is_used = first_slots < cache_lengths[:, None] + num_nodes
    is_wrong = is_used & ((block_table < 0) | (block_table >= num_pages))
    if is_wrong.any():
        row, place = is_wrong.nonzero()[0].tolist()
        raise ValueError(
            f"page {place} of sequence {row} is {block_table[row, place].item()}, "
            f"but there are pages 0 to {num_pages - 1}"
        )


def refuse_path(path: Tensor, cache_lengths: Tensor, capacity: int) -> None:
    """Raise ValueError where an accepted path (B, P) runs out of a cache."""
    last = cache_lengths + path.amax(1)
    is_wrong = (cache_lengths < 0) | (last >= capacity)
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"node {int(path[row].amax())} behind the {int(cache_lengths[row])} tokens of "
            f"sequence {row} lies outside the {capacity} slots of the cache"
        )


def refuse_what_kernels_lack(q: Tensor) -> None:
    """Raise ValueError for a head size or number format that no kernel has."""
    if q.shape[-1] not in HEAD_SIZES:
        raise ValueError(
            f"the kernels have head sizes {', '.join(map(str, HEAD_SIZES))}, not {q.shape[-1]}: "
            "use backend='torch'"
        )
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        raise ValueError(
            "Triton's interpreter cannot multiply bfloat16: use float16, float32 or backend='torch'"
        )


def refuse_sampling(
    tree: DraftTree,
    target_probs: Tensor | Callable[[Tensor], Tensor],
    uniforms: Tensor | None,
    final_uniforms: Tensor | None,
    mode: str,
    race_times: Tensor | None,
    draft_probs: Tensor | None,
    backend: str,
) -> None:
    """Raise ValueError where `verify_sample` cannot draw from what it is given."""
    if mode not in SAMPLING_MODES:
        raise ValueError(f"unknown sampling mode {mode!r}; choose {', '.join(SAMPLING_MODES)}")
    if callable(target_probs) and (mode != "coupled" or backend == "triton"):
        who = "the kernels need" if mode == "coupled" else f"mode {mode!r} needs"
        raise ValueError(f"{who} target_probs as a tensor (B, N, V), not as a function")
    B, N = tree.tokens.shape
    vocab_size = None if callable(target_probs) else target_probs.shape[-1]
    if mode == "coupled":
        width = None if vocab_size is None else sum(vocabulary_grid(vocab_size))
        _refuse_race_times(race_times, B, N, width)
    else:
        _refuse_uniforms(uniforms, final_uniforms, B, N, mode)
    if (draft_probs is not None) != mode.endswith("_replacement"):
        needs = "needs" if mode.endswith("_replacement") else "takes no"
        raise ValueError(f"mode {mode!r} {needs} draft_probs")
    if not callable(target_probs):
        for name, probs in (("target_probs", target_probs), ("draft_probs", draft_probs)):
            _refuse_probs(name, probs, (B, N, vocab_size))
        _refuse_empty_target(target_probs, tree.is_node)
    if may_read_back(tree.tokens):
        tree.validate(vocab_size, allow_duplicates=mode == "with_replacement")


def _refuse_race_times(race_times: Tensor | None, B: int, N: int, width: int | None) -> None:
    shape = None if race_times is None else tuple(race_times.shape)
    if shape is None or shape[:2] != (B, N) or width not in (None, shape[-1]):
        raise ValueError(
            f"mode 'coupled' needs race_times {(B, N, width or 'R + C')}, exponentials for the"
            f" grid of the vocabulary at each node, not {shape}"
        )
    if may_read_back(race_times) and not (race_times >= 0).all():
        wrong = race_times[~(race_times >= 0)][0].item()
        raise ValueError(f"race times are exponentials and never {wrong}")


def _refuse_uniforms(
    uniforms: Tensor | None, final_uniforms: Tensor | None, B: int, N: int, mode: str
) -> None:
    needed = {"uniforms": (uniforms, (B, N)), "final_uniforms": (final_uniforms, (B,))}
    for name, (given, shape) in needed.items():
        found = None if given is None else tuple(given.shape)
        if found != shape:
            raise ValueError(f"mode {mode!r} needs {name} {shape}, not {found}")
        is_one = (given >= 0) & (given <= 1)
        if may_read_back(given) and not is_one.all():
            raise ValueError(f"{name} must lie in [0, 1), not at {given[~is_one][0].item()}")


def _refuse_probs(name: str, probs: Tensor | None, shape: tuple[int, int, int]) -> None:
    if probs is None:
        return
    if probs.shape != shape:
        raise ValueError(f"{name} must be {shape}, not {tuple(probs.shape)}")
    is_one = (probs >= 0) & (probs < torch.inf)  # what is not a number is neither
    if may_read_back(probs) and not is_one.all():
        row, node, token = (~is_one).nonzero()[0].tolist()
        raise ValueError(
            f"{name} of token {token} at node {node} of sequence {row} is "
            f"{probs[row, node, token].item()}; "
            "probabilities must be finite and not negative"
        )


def _refuse_empty_target(target_probs: Tensor, is_node: Tensor) -> None:
    if not may_read_back(target_probs):
        return
    is_empty = is_node & ~target_probs.any(-1)
    if is_empty.any():
        row, node = is_empty.nonzero()[0].tolist()
        raise ValueError(f"target_probs at node {node} of sequence {row} have no mass to draw from")
