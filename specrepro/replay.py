"""Recorded drafts replayed under a cost table: what any shape of tree would have brought, and when.

`record` decodes one token a pass and notes at every position which candidates the drafter would
hang below it, as wide and deep as asked for. The emitted text is that of every lossless method
(greedy, and of the same seed at a temperature), so a replay visits the positions that decoding with
another tree would visit, with the drafts that it would see there. Times come from a cost table:
what it predicts for this machine is held against measured runs (`agreement`), and a modelled table
says what a card would make of the same rounds.

Not exact: nodes that the recording did not expand have no children, so a shape that follows a path
outside the recorded width sees it end; and in half precision decoding may part from the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from specrepro import checkpoints
from specrepro.cost_table import CostTable
from specrepro.decoding import Drafter, decode
from specrepro.draft_tree import DraftTree, Growth, Shape, take_shape
from specrepro.measure import (
    Question,
    Record,
    dtype_name,
    sequence_seed,
    target_name,
)
from specrepro.rows import bootstrap, interval
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict, verify_greedy

REPLAYED = "replayed from recorded rounds"
NO_CHILD, THE_END, NO_TOKEN = -1, -1, -2  # NO_TOKEN - k is the k-th child that was not recorded
NOT_DRAFTED = 2**30  # in place of a rank
CHUNK = 256  # positions looked at together

MakeDrafter = Callable[["Recorded"], Drafter]


@dataclass(frozen=True, slots=True)
class Trace:
    """One emitted text and the candidates drafted at each of its positions, the last left out."""

    prompts: str
    prompt_id: str
    temperature: float
    seed: int
    target: str
    dtype: str
    context: int  # prompt tokens
    depth: int  # expansions recorded, after the first level
    top_k: int  # children recorded below every expanded node
    tokens: list[int]  # emitted; position p has tokens[p] for its root
    drafted: Tensor  # (P, n) int32 tokens of the pool, the root first
    first_child: Tensor  # (P, n) int32 where a node's children begin in the pool, or NO_CHILD
    scores: Tensor  # (P, n) cumulative log probabilities


# --- recording


def record(
    target: Target,
    drafter: Drafter,  # one that asks its `tree` for the shape of what it drafts
    questions: Sequence[Question],
    shape: Shape,
    *,
    prompts: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch: int = 8,
    seed: int = 0,
) -> list[Trace]:
    """Decode every question one token a pass; `shape` says how wide and deep to draft meanwhile."""
    recorder, traces = _Recorder(drafter, shape), []
    common = {"prompts": prompts, "temperature": temperature, "seed": seed}
    common |= {"target": target_name(target), "dtype": dtype_name(target)}
    common |= {"depth": shape.depth, "top_k": shape.top_k}
    groups = [questions[i : i + batch] for i in range(0, len(questions), batch)]
    for group in tqdm(groups, desc=f"traces, {prompts}", unit="batch"):
        asked = [list(token_ids) for _, token_ids in group]
        seeds = [sequence_seed(seed, prompt_id) for prompt_id, _ in group]
        found = decode(target, recorder, asked, max_new_tokens, temperature, seed=seeds)
        for (prompt_id, ids), one, pools in zip(group, found, recorder.pools, strict=True):
            place = {"prompt_id": prompt_id, "context": len(ids), "tokens": one.tokens}
            traces.append(Trace(**common, **place, **_stacked(pools)))
    return traces


def _stacked(pools: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """The pools of one sequence as the tensors of a trace."""
    if not pools:  # the text ended with its first token
        empty = torch.zeros(0, 1)
        return {"drafted": empty.int(), "first_child": empty.int(), "scores": empty}
    tokens, parents, scores = (torch.stack(part).cpu() for part in zip(*pools, strict=True))
    nodes = torch.arange(parents.shape[1]).expand_as(parents)[:, 1:]
    none = torch.full_like(parents, parents.shape[1])
    first = none.scatter_reduce(1, parents[:, 1:], nodes, "amin")
    first = first.masked_fill(first == parents.shape[1], NO_CHILD)
    return {"drafted": tokens.int(), "first_child": first.int(), "scores": scores.float()}


class _Recorder:
    """A drafter and the shape of its trees: everything is drafted and noted, the root proposed."""

    max_nodes = total_tokens = 1

    def __init__(self, drafter: Drafter, shape: Shape):
        self.drafter, self.choose = drafter, shape.choose
        self.depth, self.top_k, self.num_expanded = shape.depth, shape.top_k, shape.num_expanded
        take_shape(drafter, self)

    def prune(self, growth: Growth) -> DraftTree:
        pool = growth.pool()
        for row, *one in zip(self._rows, *pool, strict=True):
            self.pools[row].append(tuple(one))
        return DraftTree.root_only(pool[0][:, 0])

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self._rows = list(range(len(roots)))
        self.pools: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self._rows]
        self.drafter.begin(prompts, lengths, roots, scores)

    def propose(self) -> DraftTree:
        return self.drafter.propose()

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.drafter.observe(verdict, scores)

    def select(self, rows: Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]
        self.drafter.select(rows)


def save(traces: Sequence[Trace], folder: str | Path) -> None:
    """Keep traces as a folder of safetensors."""
    tensors, named = {}, []
    for place, trace in enumerate(traces):
        fields = {name: getattr(trace, name) for name in Trace.__dataclass_fields__}
        own = {name: fields.pop(name) for name in ("drafted", "first_child", "scores")}
        tensors |= {f"{place}.{name}": tensor.contiguous() for name, tensor in own.items()}
        named.append(fields)
    checkpoints.save(folder, tensors, {"traces": named})


def load(folder: str | Path) -> list[Trace]:
    """What `save` kept."""
    tensors, config = checkpoints.load(folder)
    names = ("drafted", "first_child", "scores")
    return [
        Trace(**fields, **{name: tensors[f"{place}.{name}"] for name in names})
        for place, fields in enumerate(config["traces"])
    ]


def obtain(folder: str | Path, make: Callable[[], Sequence[Trace]]) -> list[Trace]:
    """The traces of a folder, or new ones put there."""
    if not Path(folder).is_dir():
        save(make(), folder)
    return load(folder)


# --- drafting from a recording


class Recorded:
    """Drafts again what was drafted at the positions of some traces, in the shape of its `tree`."""

    def __init__(self, traces: Sequence[Trace], tree: Shape | None = None):
        self.tree, self.traces = tree, list(traces)
        self.top_k = min(trace.top_k for trace in traces)
        self.drafted, self.first_child, self.scores = (
            torch.cat([getattr(trace, name) for trace in traces])
            for name in ("drafted", "first_child", "scores")
        )
        sizes = [len(trace.drafted) for trace in traces]
        self.starts = torch.tensor([0, *np.cumsum(sizes)[:-1].tolist()])
        self.following = torch.cat([_following(trace) for trace in traces])  # (P, depth)

    @property
    def max_nodes(self) -> int:
        return self.tree.total_tokens

    def begin(self, *_: Any) -> None:
        """Go to the first position of every trace."""
        self.rows, self.widths = self.starts.clone(), []

    def propose(self) -> DraftTree:
        return self._grow(self.tree)

    def observe(self, verdict: Verdict, scores: Any) -> None:
        self.rows = self.rows + verdict.num_accepted + 1

    def select(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]

    def verify(self, tree: DraftTree) -> Verdict:
        """What the target, which is the text, accepts of the trees drafted at these positions."""
        following = self.following[self.rows]
        depths = tree.depths().clamp_max(following.shape[1] - 1)
        return verify_greedy(tree, following.gather(1, depths))

    def _grow(self, shape: Shape) -> DraftTree:
        if shape.top_k > self.top_k:
            raise ValueError(
                f"{shape.top_k} children a node are asked for and {self.top_k} were recorded;"
                " record wider or draft narrower"
            )
        origins = self.rows.new_zeros(len(self.rows), 1)
        growth = Growth(self.drafted[self.rows, 0].long())
        origins, self.widths = self._branch(growth, origins, shape.top_k), []
        for _ in growth.descents(shape):
            self.widths.append(growth.ids.shape[1])
            origins = self._branch(growth, origins, shape.top_k)
        return shape.prune(growth)

    def _branch(self, growth: Growth, origins: Tensor, top_k: int) -> Tensor:
        """Hang the recorded children below the frontier; `origins` are the pool's recorded ids."""
        rows, ranks = self.rows[:, None], torch.arange(top_k)
        parents = origins.gather(1, growth.ids)
        first = self.first_child[rows, parents.clamp_min(0)].long()
        is_missing = ((parents < 0) | (first < 0))[:, :, None]
        children = (first[:, :, None] + ranks).clamp_min(0)
        at_parent = self.scores[rows, parents.clamp_min(0)][:, :, None]
        log_probs = self.scores[rows[:, :, None], children] - at_parent
        tokens = self.drafted[rows[:, :, None], children].long()
        growth.branch(
            log_probs.masked_fill(is_missing, -torch.inf),
            torch.where(is_missing, NO_TOKEN - ranks, tokens),
        )
        return torch.cat([origins, children.masked_fill(is_missing, NO_CHILD).flatten(1)], 1)


def _following(trace: Trace) -> Tensor:
    """(P, depth + 2) the tokens that follow each position, THE_END behind the last."""
    ends = [THE_END] * (trace.depth + 2)
    text = torch.tensor([*trace.tokens[1:], *ends])
    return text.unfold(0, trace.depth + 2, 1)[: len(trace.drafted)]


def path_ranks(traces: Sequence[Trace], depth: int, top_k: int) -> tuple[Tensor, Tensor]:
    """How a fixed tree ranks what is accepted, at every position of every trace.

    Ranks (P, depth + 1) that the drafted node of the text's path at each depth has among all
    candidates of that tree, from 1, or NOT_DRAFTED. A tree of m drafted nodes accepts as many as
    have rank m at most. And the candidates' confidences (P, pool), best first.
    """
    recorded, shape = Recorded(traces), _Pool(depth, top_k)
    found = []
    for rows in torch.arange(len(recorded.drafted)).split(CHUNK):
        recorded.rows = rows
        recorded._grow(shape)
        found.append(_ranked_path(*shape.pool, recorded.following[rows, : depth + 1]))
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


class _Pool:
    """The shape of EAGLE-2's tree before it is pruned; keeps the pool and proposes the root."""

    total_tokens = 1

    def __init__(self, depth: int, top_k: int):
        self.depth, self.top_k, self.num_expanded = depth, top_k, depth * top_k

    def choose(self, level: int, scores: Tensor) -> Tensor:
        return scores.topk(self.top_k, 1).indices

    def prune(self, growth: Growth) -> DraftTree:
        self.pool = growth.pool()
        return DraftTree.root_only(self.pool[0][:, 0])


def _ranked_path(
    tokens: Tensor, parents: Tensor, scores: Tensor, following: Tensor
) -> tuple[Tensor, Tensor]:
    """Ranks of the nodes on the path `following` (P, D), and every confidence, best first."""
    ranked = scores[:, 1:].sort(dim=1, descending=True, stable=True)
    ranks = torch.zeros_like(parents)
    ranks.scatter_(1, ranked.indices + 1, torch.arange(1, ranks.shape[1]).expand(len(ranks), -1))
    node, on_path = parents.new_zeros(len(parents)), []
    for wanted in following.T:
        is_it = (parents == node[:, None]) & (tokens == wanted[:, None])
        found, node = is_it.max(1)
        node = node.masked_fill(~found, len(tokens[0]))  # nobody's parent
        rank = ranks.gather(1, node.clamp_max(ranks.shape[1] - 1)[:, None])[:, 0]
        on_path.append(rank.masked_fill(~found, NOT_DRAFTED))
    return torch.stack(on_path, 1), ranked.values.exp()


# --- the clock of a replay

Rounds = Callable[[list[int], list[int]], tuple[list[int], Sequence[int], int]]


def replay(
    traces: Sequence[Trace],
    draft: MakeDrafter | Shape | None,
    costs: CostTable,
    *,
    method: str,
    batch: int = 1,
    ranks: tuple[Tensor, Tensor] | None = None,
) -> list[Record]:
    """Records as `measure.compare` leaves them, with predicted seconds and no prefill.

    `draft` makes a drafter from a `Recorded` one, or is EAGLE-2's tree of a fixed depth, top_k and
    size (`ranks` may hand over its `path_ranks`), or None for autoregressive decoding. Sequences
    are decoded in the batches of a measured run.
    """
    is_fixed = not (draft is None or callable(draft))
    if is_fixed:
        rounds = _Fixed(draft, ranks or path_ranks(traces, draft.depth, draft.top_k))
    records = []
    for start in range(0, len(traces), batch):
        group = traces[start : start + batch]
        if not is_fixed:
            rounds = _one_token if draft is None else _Live(group, draft)
        records += _replay_group(group, rounds, costs, method, batch)
        if is_fixed:
            rounds.first += sum(len(trace.drafted) for trace in group)
    return records


def fastest(traces: Sequence[Trace], trees: Sequence[Shape], costs: CostTable, batch: int) -> Shape:
    """Which fixed tree brings most tokens a second on these texts; of equally fast the smallest."""
    ranks = cache(partial(path_ranks, traces))
    rates = {
        tree: tokens_per_second(
            replay(traces, tree, costs, method="", batch=batch, ranks=ranks(tree.depth, tree.top_k))
        )
        for tree in trees
    }
    return max(rates, key=lambda tree: (rates[tree], -tree.total_tokens, -tree.depth))


def _one_token(live: list[int], rows: list[int]) -> tuple[list[int], Sequence[int], int]:
    """Accepted, widths of the levels and tree size of a round without drafts."""
    return [0] * len(live), (), 1


class _Fixed:
    """Rounds of a fixed tree: what it accepts at every position is looked up."""

    first = 0  # position of the group's first text among all of them

    def __init__(self, shape: Shape, ranks: tuple[Tensor, Tensor]):
        num_drafted = min(shape.total_tokens - 1, ranks[1].shape[1])
        self.accepted = (ranks[0] <= num_drafted).sum(1).tolist()
        self.widths, self.num_tokens = (shape.top_k,) * shape.depth, num_drafted + 1

    def __call__(self, live: list[int], rows: list[int]) -> tuple[list[int], Sequence[int], int]:
        return [self.accepted[self.first + row] for row in rows], self.widths, self.num_tokens


class _Live:
    """Rounds of a drafter that decides anew in each."""

    def __init__(self, group: Sequence[Trace], draft: MakeDrafter):
        self.recorded = Recorded(group)
        self.drafter = draft(self.recorded)
        context = torch.tensor([trace.context for trace in group])
        self.drafter.begin(None, context, self.recorded.starts, None)
        self.live = list(range(len(group)))

    def __call__(self, live: list[int], rows: list[int]) -> tuple[list[int], Sequence[int], int]:
        if len(live) < len(self.live):
            places = [place for place, row in enumerate(self.live) if row in live]
            self.drafter.select(torch.tensor(places))
            self.live = live
        assert self.recorded.rows.tolist() == rows, "the drafter is not where its sequences are"
        tree = self.drafter.propose()
        verdict = self.recorded.verify(tree)
        self.drafter.observe(verdict, None)
        return verdict.num_accepted.tolist(), self.recorded.widths, tree.tokens.shape[1]


def _replay_group(
    group: Sequence[Trace], rounds: Rounds, costs: CostTable, method: str, batch: int
) -> list[Record]:
    """One batch from its first tokens to its last, as records."""
    lengths, places = [len(trace.drafted) for trace in group], [0] * len(group)
    starts = [0, *itertools.accumulate(lengths)]
    accepted, drafted = ([[] for _ in group] for _ in range(2))
    live, num_rows, milliseconds = [row for row, n in enumerate(lengths) if n], 1, 0.0
    while live:
        context = max(group[row].context + places[row] for row in live)
        found, widths, num_tokens = rounds(live, [starts[row] + places[row] for row in live])
        milliseconds += _round_cost(costs, len(live), context, num_rows, widths, num_tokens)
        for row, num in zip(live, found, strict=True):
            accepted[row].append(num)
            drafted[row].append(num_tokens - 1)
            places[row] += num + 1
        live, num_rows = [row for row in live if places[row] < lengths[row]], max(found) + 1
    seconds = milliseconds / 1e3 / len(group)
    lists = zip(group, accepted, drafted, strict=True)
    return [_record(*one, group[0], method, batch, seconds) for one in lists]


def _round_cost(
    costs: CostTable, batch: int, context: int, num_rows: int, widths: Sequence[int], tokens: int
) -> float:
    """Milliseconds; a round that drafts nothing costs its pass alone."""
    if tokens == 1:
        return costs.cost("target", batch, context, 1)
    return costs.round(batch, context, num_rows, widths, tokens)


def _record(
    trace: Trace,
    accepted: list[int],
    drafted: list[int],
    first: Trace,
    method: str,
    batch: int,
    seconds: float,
) -> Record:
    names = ("prompts", "prompt_id", "temperature", "seed", "target", "dtype")
    return Record(
        **{name: getattr(trace, name) for name in names},
        method=method,
        batch=batch,
        repeat=0,
        group=first.prompt_id,
        max_new_tokens=len(trace.tokens),
        top_p=1.0,
        top_k=0,
        new_tokens=len(trace.tokens),
        tokens=trace.tokens,
        seconds=seconds,
        prefill_seconds=0.0,
        target_passes=len(accepted),
        accepted=accepted,
        drafted=drafted,
    )


def tokens_per_second(records: Sequence[Record]) -> float:
    """All tokens after prefill over all of their seconds."""
    emitted, seconds = np.sum([_rate_parts(record) for record in records], 0)
    return emitted / seconds


def _rate_parts(record: Record) -> tuple[int, float]:
    return sum(record.emitted), record.seconds - record.prefill_seconds


def agreement(measured: Sequence[Record], predicted: Sequence[Record]) -> pd.DataFrame:
    """Predicted over measured tokens per second after prefill, for each method and batch size.

    Rows of quantity "replay_check"; `value` is the ratio, with its interval over what was decoded
    together, on the prompts that both have.
    """
    sides = [_by_run(records) for records in (measured, predicted)]
    shared = [key for key in sides[0] if key in sides[1]]
    rows = []
    for method, batch, temperature in dict.fromkeys(key[:3] for key in shared):
        groups = dict.fromkeys(key for key in shared if key[:3] == (method, batch, temperature))
        units = np.array([[*sides[0][key], *sides[1][key]] for key in groups], float)
        totals, draws = units.sum(0), bootstrap(units)
        low, high = interval(_ratio(draws.T))
        row = {"quantity": "replay_check", "method": method, "batch": batch}
        own = {one.prompt_id for one in measured if _run_of(one) in groups}
        row |= {"temperature": temperature, "prompts": "all", "num_prompts": len(own)}
        row |= {"tokens_per_second": totals[0] / totals[1], "value": float(_ratio(totals))}
        rows.append(row | {"value_low": low, "value_high": high})
    return pd.DataFrame(rows)


def _by_run(records: Sequence[Record]) -> dict[tuple[Any, ...], np.ndarray]:
    """Tokens and seconds of what was decoded together, the first repeat of it."""
    sums: dict[tuple[Any, ...], np.ndarray] = {}
    for record in records:
        if record.error is None and record.repeat == 0:
            key = _run_of(record)
            sums[key] = sums.get(key, 0) + np.array(_rate_parts(record), float)
    return sums


def _run_of(record: Record) -> tuple[Any, ...]:
    """What was decoded together, by whom and how."""
    return record.method, record.batch, record.temperature, record.prompts, record.group


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Predicted over measured rate from measured tokens and seconds, then predicted ones."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (sums[2] / sums[3]) / (sums[0] / sums[1])
