"""What drafting and verifying cost here, measured by the code that decodes and kept as a file.

A table holds milliseconds by part of a round, batch size, context and number of tokens:

- "target": a pass over trees of `num_tokens` nodes, the root included, the walk and the cache: S_T;
- "level": drafting one more level below `num_tokens` nodes, choosing them included: S_D;
- "extend": the start of a round, `num_tokens` accepted tokens through the draft head;
- "rest": pruning, learning from the verdict and the loop itself, for trees of `num_tokens` nodes.

Costs are stored at contexts L, 2 L, ..., M L and at the sizes that were timed; `curve` interpolates
between sizes and never between contexts (`select`). A pass over more nodes than were timed is
charged along the last two sizes. Raw points keep their median and their 20 and 80 % quantiles. A
header says what was measured where; a table of another header is refused.

Departs from the paper: the transcriptions of it give no L, M and N, and an index of contexts that
would always be the last one; see `select`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from specrepro import checkpoints, rows
from specrepro.decoding import Clock, Drafter, decode
from specrepro.draft_tree import DraftTree, Growth, keep_best, take_shape
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

PARTS = ("target", "level", "extend", "rest")
PLACES = ("target", "dtype", "device", "threads", "torch", "transformers", "triton")
KEYS = ["part", "batch", "context", "num_tokens"]
DEEPEST = 4  # levels drafted while profiling, unless the largest tree needs more


@dataclass(frozen=True, slots=True)
class Grid:
    """What is timed. The paper names no grid; the largest tree is the released code's bound."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    bucket: int = 256  # L, tokens of context
    num_buckets: int = 4  # M
    sizes: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 60, 80, 96, 129)  # nodes
    widths: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 10)  # of a drafted level, K at most
    max_rows: int = 512  # nodes of a pass, all sequences together
    warm_up: int = 3  # rounds that do not count at the start of every piece; the first never does
    repeats: int = 50  # of every size at batch 1

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Batch sizes and contexts."""
        return [(b, k * self.bucket) for b in self.batches for k in range(1, self.num_buckets + 1)]

    def sizes_of(self, batch: int) -> list[int]:
        """Tree sizes that a batch of this size is timed with; one and two nodes always are."""
        return [n for n in self.sizes if n <= 2 or n * batch <= self.max_rows]

    def repeats_of(self, batch: int) -> int:
        """How often every size is timed: the dearer the passes, the less often, but three times."""
        return max(min(3, self.repeats), self.repeats // batch)


def select(context: int, bucket: int, num_buckets: int) -> int:
    """The context that stands for this one: the next multiple of L = `bucket`, at most M L.

    The paper's index reads (max(floor(c / L), M - 1) + 1) L, which is M L for every context in the
    table and beyond it for the others; it can only be meant with min.
    """
    return (min(context // bucket, num_buckets - 1) + 1) * bucket


class CostTable:
    """Milliseconds by part, batch size, context and number of tokens."""

    def __init__(
        self, header: Mapping[str, Any], points: pd.DataFrame, seconds: float | None = None
    ):
        """`points` have the columns of KEYS, `value`, and its quantiles `value_low` and _high.

        `seconds` are what measuring them took.
        """
        self.header, self.points, self.seconds = dict(header), points, seconds
        self.batches = sorted(int(batch) for batch in points["batch"].unique())
        self._curves = {
            (part, int(batch)): _curves(found)
            for (part, batch), found in points.groupby(["part", "batch"])
        }
        self._sizes = {
            (part, int(batch)): sorted(int(n) for n in found["num_tokens"].unique())
            for (part, batch), found in points.groupby(["part", "batch"])
        }
        if missing := [
            pair for b in self.batches for pair in _pairs(b) if pair not in self._curves
        ]:
            raise ValueError(f"the cost table lacks {missing[0]}; measure it again")

    @property
    def machine(self) -> str:
        """What tells this table from others in a figure."""
        h = self.header
        if self.is_modelled:
            return f"{h['device']} (modelled)"
        if str(h["device"]).startswith("NVIDIA"):
            return f"{h['dtype']}, {h['device']}"
        return f"{h['dtype']}, {h['threads']} thread{'s' * (h['threads'] != 1)}"

    @property
    def is_modelled(self) -> bool:
        """Whether the numbers follow from published peaks instead of a clock."""
        return bool(self.header.get("modelled", False))

    @property
    def max_tokens(self) -> int:
        """Nodes of the largest tree that was timed at any batch size."""
        return max(self.num_tokens(batch) for batch in self.batches)

    def num_tokens(self, batch: int) -> int:
        """Nodes of the largest tree that was timed with this batch size."""
        return self._curves["target", self._stand_in(batch)][1].shape[1]

    def curve(self, part: str, batch: int, context: int) -> np.ndarray:
        """(N,) milliseconds of a part for 1, 2, ..., N tokens."""
        bucket, curves = self._curves[part, self._stand_in(batch)]
        return curves[select(context, bucket, len(curves)) // bucket - 1]

    def cost(self, part: str, batch: int, context: int, num_tokens: int) -> float:
        """Milliseconds of a part; beyond what was timed only a pass of the target grows dearer."""
        curve = self.curve(part, batch, context)
        beyond = num_tokens - len(curve)
        if beyond > 0 and part == "target":
            return float(curve[-1] + beyond * self._slope(batch, context))
        return float(curve[min(num_tokens, len(curve)) - 1])

    def _slope(self, batch: int, context: int) -> float:
        """Milliseconds of one more node behind the largest tree timed, from the last two sizes."""
        curve = self.curve("target", batch, context)
        sizes = self._sizes["target", self._stand_in(batch)]
        step = sizes[-1] - sizes[-2] if len(sizes) > 1 else 0
        return max(0.0, float(curve[-1] - curve[-1 - step])) / max(1, step)

    def round(
        self, batch: int, context: int, num_rows: int, widths: Sequence[int], num_tokens: int
    ) -> float:
        """Milliseconds of a whole round.

        `num_rows` accepted tokens to begin with, levels drafted below `widths` nodes each, a tree
        of `num_tokens` nodes, the root included.
        """
        total = self.cost("extend", batch, context, num_rows)
        for width in widths:
            total += self.cost("level", batch, context, width)
            context += width
        return total + sum(
            self.cost(part, batch, context - sum(widths), num_tokens) for part in ("target", "rest")
        )

    def rows(self) -> pd.DataFrame:
        """The raw points as rows of quantity "cost"."""
        places = {name: self.header.get(name) for name in ("target", "device", "dtype", "threads")}
        named = {"quantity": "cost", "method": "EAGLE-3", "machine": self.machine}
        return self.points.assign(**named, **places, modelled=self.is_modelled)

    def require(self, header: Mapping[str, Any], where: object = "this cost table") -> CostTable:
        """Itself; a ValueError that names every difference where it was measured otherwise."""
        changed = [name for name in header if self.header.get(name) != header[name]]
        if changed:
            then = " and ".join(f"{name} {self.header.get(name)!r}" for name in changed)
            now = " and ".join(f"{header[name]!r}" for name in changed)
            raise ValueError(
                f"{where} was measured with {then}, this run has {now}:"
                " measure it again (remove the file, or --fresh) or restore the setting"
            )
        return self

    def save(self, path: str | Path) -> Path:
        """Write header and points as JSON, whole or not at all."""
        points = self.points.astype(object).where(self.points.notna(), None)
        content = {"header": self.header, "seconds": self.seconds}
        content["points"] = points.to_dict("records")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text(Path(path), json.dumps(content, indent=1) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, header: Mapping[str, Any] | None = None) -> CostTable:
        """Read a table; one that does not carry `header` is refused with every difference named."""
        try:
            content = json.loads(Path(path).read_text())
            points = pd.DataFrame(content["points"])
            table = cls(content["header"], points, content.get("seconds"))
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is no cost table ({reason}); measure one again") from None
        return table.require(header or {}, f"cost table {path}")

    def _stand_in(self, batch: int) -> int:
        """The smallest batch size in the table that is not below this one."""
        larger = [known for known in self.batches if known >= batch]
        if not larger:
            raise ValueError(
                f"this cost table knows batches of up to {self.batches[-1]} sequences, not {batch};"
                f" measure one with batch {batch} in its grid"
            )
        return larger[0]


def _pairs(batch: int) -> list[tuple[str, int]]:
    return [(part, batch) for part in PARTS]


def _curves(found: pd.DataFrame) -> tuple[int, np.ndarray]:
    """L, and the curves (M, N) of a part and batch: linear between the sizes that were timed."""
    contexts = sorted(int(context) for context in found["context"].unique())
    bucket = contexts[0]
    if contexts != [bucket * (k + 1) for k in range(len(contexts))]:
        raise ValueError(f"contexts {contexts} of a cost table are not L, 2 L, 3 L, ...")
    lines = [found[found["context"] == context].sort_values("num_tokens") for context in contexts]
    every = np.arange(1, max(int(line["num_tokens"].iloc[-1]) for line in lines) + 1)
    curves = [np.interp(every, line["num_tokens"], line["value"].astype(float)) for line in lines]
    return bucket, np.stack(curves)


def header_of(target: Target, drafter: str, top_k: int) -> dict[str, Any]:
    """What a table of this target on this machine must have been measured with.

    `drafter` names the weights, for example the hash of a checkpoint; `top_k` are the children
    drafted below every node.
    """
    here = rows.environment(target)
    return {name: here[name] for name in PLACES} | {"drafter": drafter, "top_k": top_k}


def obtain(path: str | Path, header: Mapping[str, Any], make: Callable[[], CostTable]) -> CostTable:
    """The table in a file, or a new one put there; one measured otherwise is refused."""
    if not Path(path).is_file():
        make().save(path)
    return CostTable.load(path, header)


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Compute with so many threads for as long as the block lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- measuring


def profile(
    target: Target,
    drafter: Drafter,  # one that asks its `tree` for the shape of what it drafts
    header: Mapping[str, Any],
    grid: Grid,
    words: Sequence[int] = (),
) -> CostTable:
    """Time every part of a round behind prompts made of `words` (any tokens where there are none).

    Sizes take turns in an order that changes from cycle to cycle, so that a disturbance falls on
    all of them.
    """
    clock = Clock(target.device)
    profiler = Profiler(target, drafter, header, grid, words)
    for batch, context in tqdm(grid.cases, desc="cost table", unit="setting"):
        profiler.repeat(batch, context, grid.repeats_of(batch))
    return profiler.table(clock.elapsed())


class Profiler:
    """Times every part of a round, a little at a time where it is to take turns with other work."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        header: Mapping[str, Any],
        grid: Grid,
        words: Sequence[int] = (),
    ):
        self.target, self.drafter, self.header, self.grid = target, drafter, header, grid
        self.words = words or _any_words(target)
        self._timed: dict[tuple[int, int], _Metronome] = {}

    def repeat(self, batch: int, context: int, times: int = 1) -> None:
        """Time every size so many times more, behind prompts that grow up to `context` tokens."""
        timed = self._metronome(batch, context)
        num_new, wanted = min(64, self.grid.bucket // 2), timed.fewest_repeats + times
        prompts = [
            [self.words[(97 * row + k) % len(self.words)] for k in range(context - num_new)]
            for row in range(batch)
        ]
        take_shape(self.drafter, timed)
        while timed.fewest_repeats < wanted:
            decode(self.target, timed, prompts, num_new, ignore_stop=True)

    def _metronome(self, batch: int, context: int) -> _Metronome:
        if (batch, context) not in self._timed:
            top_k, clock = self.header["top_k"], Clock(self.target.device)
            widths = sorted({width for width in self.grid.widths if width < top_k} | {top_k})
            sizes = self.grid.sizes_of(batch)
            timed = _Metronome(self.drafter, clock, sizes, widths, top_k, batch)
            timed.warm_up = self.grid.warm_up
            self._timed[batch, context] = timed
        return self._timed[batch, context]

    def table(self, seconds: float | None = None) -> CostTable:
        """What was timed so far."""
        points = [
            _points(timed.samples).assign(batch=batch, context=context)
            for (batch, context), timed in self._timed.items()
        ]
        return CostTable(self.header, pd.concat(points, ignore_index=True), seconds)


def _any_words(target: Target, num_words: int = 512) -> list[int]:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(target.vocab_size, (num_words,), generator=draws).tolist()


def _points(samples: Sequence[tuple[str, int, float]]) -> pd.DataFrame:
    """Median and 20 and 80 % quantiles of (part, tokens, milliseconds).

    Sizes that a run met by chance count where it met them three times.
    """
    table = pd.DataFrame(samples, columns=["part", "num_tokens", "value"])
    counts = table.groupby(["part", "num_tokens"])["value"].transform("size")
    most = counts.groupby(table["part"]).transform("max")
    table = table[counts >= np.minimum(3, most)]
    found = table.groupby(["part", "num_tokens"])["value"]
    columns = {"value": 0.5, "value_low": 0.2, "value_high": 0.8}
    points = pd.DataFrame({name: found.quantile(q) for name, q in columns.items()})
    return points.assign(repeats=found.size()).reset_index()


class _Metronome:
    """A drafter and the shape of its trees: takes the sizes in turn and times every part."""

    warm_up = 1

    def __init__(
        self,
        drafter: Drafter,
        clock: Clock,
        sizes: Sequence[int],
        widths: Sequence[int],
        top_k: int,
        batch: int,
    ):
        self.drafter, self.clock, self.batch, self.top_k = drafter, clock, batch, top_k
        self.sizes, self.widths = list(sizes), list(widths)
        self.max_nodes = self.total_tokens = max(sizes)
        # the first level is drafted in full width, so that there are nodes enough for any size
        needed = -(-(self.total_tokens - 1 - top_k - top_k**2) // top_k) + 1
        self.depth = max(DEEPEST, needed)
        self.num_expanded = self.depth * top_k
        self.samples: list[tuple[str, int, float]] = []
        self._next_size, self._next_width = _shuffled(sizes, 0), _shuffled(widths, 1)

    @property
    def fewest_repeats(self) -> int:
        """How often the size that was met least was timed."""
        counts = Counter((part, num) for part, num, _ in self.samples)
        wanted = [("target", n) for n in self.sizes] + [("level", n) for n in self.widths]
        return min(counts[one] for one in wanted)

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.drafter.begin(prompts, lengths, roots, scores)
        self._num_rounds, self._num_sequences, self._num_rows = 0, len(roots), 1
        self._part, self._rest = ("rest", 1), 0.0
        self._last = self.clock.elapsed()

    def propose(self) -> DraftTree:
        self._rest += self._lap()
        self._note(self._rest)
        self._num_rounds, self._part = self._num_rounds + 1, ("extend", self._num_rows)
        tree = self.drafter.propose()
        self._rest, self._part = self._lap(), ("target", tree.tokens.shape[1])
        return tree

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self._note(self._lap())
        self.drafter.observe(verdict, scores)
        self._part = ("rest", self._part[1])
        self._num_rows = verdict.tokens.shape[1]

    def select(self, rows: Tensor) -> None:
        self._num_sequences = len(rows)
        self.drafter.select(rows)

    def choose(self, level: int, scores: Tensor) -> Tensor:
        """Full width first, then whatever width is next."""
        self._note(self._lap())
        width = self.top_k if level == 0 else next(self._next_width)
        self._part = ("level", width)
        return scores.topk(width, 1).indices

    def prune(self, growth: Growth) -> DraftTree:
        """The best nodes, as many as are next."""
        self._note(self._lap())
        return keep_best(*growth.pool(), next(self._next_size))[0]

    def _lap(self) -> float:
        """Milliseconds since the last lap."""
        before, self._last = self._last, self.clock.elapsed()
        return 1e3 * (self._last - before)

    def _note(self, milliseconds: float) -> None:
        """Keep a time, unless some sequence has ended or the round is there to warm up."""
        if self._num_sequences == self.batch and self._num_rounds > self.warm_up:
            self.samples.append((*self._part, milliseconds))


def _shuffled(values: Sequence[int], seed: int) -> Iterator[int]:
    """The values again and again, each cycle in an order of its own."""
    draws = random.Random(seed)
    while True:
        yield from draws.sample(list(values), len(values))
