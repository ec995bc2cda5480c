"""Draft, verify, keep until every sequence has ended: the loop of every drafter and the baseline.

The loop knows nothing of how a tree is drafted. A `Drafter` proposes a tree per sequence, the
target scores all of them in one pass, the walk decides, the cache keeps what was accepted.
Autoregressive decoding is the drafter that proposes the root alone. Sequences of a batch accept
different lengths and end at different times.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from specrepro.draft_tree import DraftTree
from specrepro.races import race, race_lead, vocabulary_grid
from specrepro.target_model import KVCache, Scores, Target, pad, reads_every_slot
from specrepro.tree_verify import Verdict, takes_kernels, verify_greedy, verify_sample

COLDEST = 1e-4  # temperature: below it logits may overflow


class Drafter(Protocol):
    """Proposes draft trees; all state it keeps between rounds belongs to one call of `decode`.

    One that draws what it drafts may bring a `judge` of its own, with the arguments of `judge`. One
    that brings `foresee(times_at, sampling)` is told before each `propose`, at temperature > 0, how
    the next tokens will be drawn: `times_at(depth)` are the race times (B, R + C) of the children
    of nodes at a depth.
    """

    max_nodes: int  # most nodes of a tree, the root included

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        """Start new sequences.

        Prompts (B, n) padded on the right, their lengths (B,), first emitted tokens (B,), and the
        scores of the prefill.
        """

    def propose(self) -> DraftTree:
        """One tree per sequence, rooted at its last emitted token."""

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        """Learn what was accepted; `scores` belong to the nodes of the tree just proposed."""

    def select(self, rows: Tensor) -> None:
        """Go on with the sequences `rows` alone."""


class Autoregressive:
    """Proposes the root alone: one token a pass."""

    max_nodes = 1

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.roots = roots

    def propose(self) -> DraftTree:
        return DraftTree.root_only(self.roots)

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.roots = verdict.bonus

    def select(self, rows: Tensor) -> None:
        self.roots = self.roots[rows]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from logits, by the baseline and by verification alike."""

    temperature: float = 0.0  # 0 decodes greedily
    top_p: float = 1.0  # nucleus mass kept
    top_k: int = 0  # candidates kept; 0 keeps all

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or self.temperature >= COLDEST):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or at least {COLDEST}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or positive")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def probs(self, logits: Tensor) -> Tensor:
        """What is sampled from, (..., V) in float32: temperature first, then top-k, then top-p."""
        logits = logits.float() / self.temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probs = logits.softmax(-1)
        return probs if self.top_p == 1 else _nucleus(probs, self.top_p)


def most_probable(logits: Tensor) -> Tensor:
    """The first best token of each row; `argmax` of bfloat16 takes five times as long on a CPU."""
    return logits.float().argmax(-1)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most probable tokens whose mass reaches `top_p`, renormalised."""
    ranked, order = probs.sort(-1, descending=True)
    is_kept = ranked.cumsum(-1) - ranked < top_p
    kept = torch.zeros_like(probs).scatter(-1, order, ranked * is_kept)
    return kept / kept.sum(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Thinking:
    """A limit on thinking: what is to follow where it has not ended within the budget.

    Places count new tokens, so the limit falls on the same token whatever was drafted. A forced
    token takes a round of its own, in which nothing is accepted.
    """

    budget: int  # new tokens before the first forced one
    end_id: int  # the token that ends thinking
    forced: tuple[int, ...]  # what is said to end it, `end_id` among it

    def __post_init__(self) -> None:
        if self.budget < 1 or self.end_id not in self.forced:
            raise ValueError(f"thinking needs a budget >= 1 and an end among its words, not {self}")

    def forced_places(self, tokens: Sequence[int]) -> range:
        """Which of the emitted `tokens` the target did not choose."""
        num_forced = 0 if self.end_id in tokens[: self.budget] else len(self.forced)
        return range(self.budget, max(self.budget, min(len(tokens), self.budget + num_forced)))

    def overrule(self, verdict: Verdict, tokens: Tensor, num_new: Tensor) -> Verdict:
        """Cut what a round emits where the budget ends, and behind that emit the forced tokens.

        `tokens` (B, L) are those emitted before, of which `num_new` (B,) are real.
        """
        offsets = torch.arange(verdict.path.shape[1], device=num_new.device)
        before = torch.arange(min(self.budget, tokens.shape[1]), device=num_new.device)
        has_ended = (tokens[:, : self.budget] == self.end_id) & (before < num_new[:, None])
        ends_now = (verdict.tokens == self.end_id) & (num_new[:, None] + offsets < self.budget)
        is_open, left = ~(has_ended.any(1) | ends_now.any(1)), self.budget - num_new
        is_forced = is_open & (left <= 0) & (left > -len(self.forced))
        most = torch.where(is_open & (left > 0), left - 1, verdict.num_accepted)
        num_accepted = torch.minimum(verdict.num_accepted, most).masked_fill(is_forced, 0)
        forced = torch.tensor(self.forced, device=num_new.device)
        word = forced[(-left).clamp(0, len(forced) - 1)]
        chosen = verdict.tokens.gather(1, num_accepted[:, None])[:, 0]
        bonus = torch.where(is_forced, word, chosen)
        is_kept = offsets <= num_accepted[:, None]
        emitted = verdict.tokens.where(is_kept, -1).scatter(
            1, num_accepted[:, None], bonus[:, None]
        )
        return Verdict(verdict.path.where(is_kept, -1), num_accepted, emitted, bonus)


@dataclass(slots=True)
class Generation:
    """One decoded sequence; a batch shares `seconds` and `seconds_by_part`."""

    tokens: list[int]  # new tokens, up to and including the stop token
    accepted: list[int]  # drafted tokens accepted, per round after prefill
    drafted: list[int]  # nodes proposed, the root not counted, per round
    seconds: float  # wall time, prefill included
    prefill_seconds: float
    # prefill, draft, target, verify, keep, observe
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    # at each emitted token, when asked for: the lead of the best logit, or of the race's winner
    gaps: list[float] = field(default_factory=list)
    forced: list[int] = field(
        default_factory=list
    )  # places of tokens that the target did not choose

    @property
    def num_passes(self) -> int:
        """Target passes after prefill."""
        return len(self.accepted)

    @property
    def tau(self) -> float:
        """Tokens emitted per target pass, bonus included, prefill and its own token left out.

        NaN where the sequence ended with the prefill: there was no pass.
        """
        return (len(self.tokens) - 1) / self.num_passes if self.num_passes else math.nan


class Clock:
    """Wall time, whole and by part; a GPU marks parts in its stream, and nobody waits for them."""

    def __init__(self, device: torch.device):
        self._device = device
        self.start = time.perf_counter()
        self._parts: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def elapsed(self) -> float:
        """Seconds since the start, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self.start

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self._mark()
        yield
        self._parts.append((name, began, self._mark()))

    def seconds_by_part(self) -> dict[str, float]:
        """What the parts of each name took in all."""
        self.elapsed()
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, began, ended in self._parts:
            is_event = isinstance(began, torch.cuda.Event)
            seconds[name] += began.elapsed_time(ended) / 1000 if is_event else ended - began
        return dict(seconds)

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


@dataclass(slots=True)
class _Batch:
    """The growing output of every sequence; rows are the original ones, whoever has ended.

    It stays on the device: a round reads back `progress` and nothing else of it.
    """

    tokens: Tensor  # (B, 1 + longest limit), of which `num_new` are real; the last one never is
    limits: Tensor  # (B,) most new tokens of each sequence
    num_new: Tensor  # (B,)
    is_done: Tensor  # (B,) bool
    rounds: list[Tensor]  # (3, b) of the sequences that went on: row, tokens accepted, drafted
    gaps: list[list[float]]

    @classmethod
    def empty(cls, limits: Tensor) -> _Batch:
        """Nothing emitted yet."""
        tokens = limits.new_zeros(len(limits), 1 + int(limits.max()))
        is_done = torch.zeros_like(limits, dtype=torch.bool)
        return cls(tokens, limits, torch.zeros_like(limits), is_done, [], [[] for _ in tokens])

    def append(self, rows: Tensor, emitted: Tensor, counts: Tensor, stop_ids: Tensor) -> None:
        """Add `counts` (b,) of the tokens `emitted` (b, P) to `rows` (b,).

        They are cut behind a stop token and at the length limit.
        """
        places = torch.arange(emitted.shape[1], device=emitted.device)
        is_stop = torch.isin(emitted, stop_ids) & (places < counts[:, None])
        before_stop = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, counts)
        counts = torch.minimum(before_stop, self.limits[rows] - self.num_new[rows])
        slots = (self.num_new[rows][:, None] + places).clamp_max(self.tokens.shape[1] - 1)
        self.tokens[rows[:, None], slots] = emitted  # what is cut lies beyond `num_new`
        self.num_new[rows] += counts
        is_full = self.num_new[rows] == self.limits[rows]
        is_kept = places < counts[:, None]
        self.is_done[rows] = (is_stop & is_kept).any(1) | is_full

    def count(self, rows: Tensor, accepted: Tensor, drafted: Tensor) -> None:
        """Note how many drafted tokens of `rows` (b,) this round accepted and proposed."""
        self.rounds.append(torch.stack([rows, accepted, drafted]))

    def progress(self) -> tuple[int, int]:
        """Tokens emitted so far, and sequences that have ended."""
        num_emitted, num_done = torch.stack([self.num_new.sum(), self.is_done.sum()]).tolist()
        return num_emitted, num_done

    def counts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens accepted and drafted, round by round, of every sequence."""
        accepted, drafted = ([[] for _ in self.tokens] for _ in range(2))
        noted = torch.cat(self.rounds, 1).T.tolist() if self.rounds else ()
        for row, num_accepted, num_drafted in noted:
            accepted[row].append(num_accepted)
            drafted[row].append(num_drafted)
        return accepted, drafted


def decode(
    target: Target,
    drafter: Drafter,
    prompt_ids: Sequence[int] | Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] | None = 0,
    ignore_stop: bool = False,
    record_gaps: bool = False,
    on_round: Callable[[int], None] | None = None,
    thinking: Thinking | None = None,
) -> Generation | list[Generation]:
    """Decode one prompt (a list of ids) to a Generation, or a batch of them to a list.

    Draws are keyed by sequence seed and position, so a sampled run repeats the autoregressive run
    of the same seed. `seed` is one for every sequence (then sequence i uses seed + i) or one each;
    None draws on the device by torch's own generator, which spares a large batch the time to draw
    for each sequence (448 numbers a token of 49152 words), and nothing repeats but the whole batch.
    Raises ValueError for a prompt that is empty, holds what is no token of the target, or leaves no
    room in its context; each sequence is cut to the room that its own prompt leaves.
    """
    is_single, prompts = _as_lists(prompt_ids)
    sampling = Sampling(temperature, top_p, top_k)
    limits = _limits(target, prompts, max_new_tokens)
    seeds, times = None if seed is None else _seeds(seed, len(prompts)), None
    if not sampling.is_greedy:
        times = _race_times(target, drafter, seeds, max(limits) + drafter.max_nodes)
    stop_ids = target.stop_ids[:0] if ignore_stop else target.stop_ids
    loop = _Loop(target, drafter, sampling, times, stop_ids, record_gaps, thinking)
    generations = loop.run(prompts, limits, on_round)
    return generations[0] if is_single else generations


def decode_autoregressively(
    target: Target, prompt_ids: Sequence[int] | Sequence[Sequence[int]], **options: object
) -> Generation | list[Generation]:
    """The baseline: one token a pass through the very same loop, with the options of `decode`."""
    return decode(target, Autoregressive(), prompt_ids, **options)


def position_race_times(seeds: Sequence[int], length: int, vocab_size: int) -> Tensor:
    """(B, length, R + C) exponentials; row b from its own seed whatever the batch and the drafts.

    From uniforms of 53 bits, so that even the rarest token has its share of the small ones.
    """
    shape = (length, sum(vocabulary_grid(vocab_size)))
    rows = (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    )
    return torch.stack([(-torch.log1p(-u)).clamp_min(2**-54).float() for u in rows])


class _FreshTimes:
    """Race times as `position_race_times` has them, but drawn anew each time they are read."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.num_times, self.device = sum(vocabulary_grid(vocab_size)), device

    def __getitem__(self, places: tuple[Tensor, Tensor]) -> Tensor:
        shape = (*torch.broadcast_shapes(*(one.shape for one in places)), self.num_times)
        return torch.empty(shape, device=self.device).exponential_().clamp_min_(2**-54)


def _race_times(
    target: Target, drafter: Drafter, seeds: Sequence[int] | None, length: int
) -> Tensor | _FreshTimes:
    """What the draws of a batch are read from; a ValueError where none can be foreseen."""
    if seeds is not None:
        return position_race_times(seeds, length, target.vocab_size).to(target.device)
    if hasattr(drafter, "foresee"):
        raise ValueError("this drafter foresees the target's draws: give a seed, not None")
    return _FreshTimes(target.vocab_size, target.device)


def fill_gaps(is_kept: Tensor) -> Tensor:
    """Order of the kept rows that moves the fewest: the last take the places of those that go."""
    num_kept = int(is_kept.sum())
    order = torch.arange(num_kept, device=is_kept.device)
    order[~is_kept[:num_kept]] = is_kept[num_kept:].nonzero()[:, 0] + num_kept
    return order


def _as_lists(prompt_ids: Sequence[int] | Sequence[Sequence[int]]) -> tuple[bool, list[list[int]]]:
    """Whether it is one prompt, and all as lists; tensors and arrays of ids are taken too."""
    as_list = getattr(prompt_ids, "tolist", lambda: list(prompt_ids))()
    is_single = bool(as_list) and isinstance(as_list[0], Integral)
    prompts = [as_list] if is_single else as_list
    return is_single, [[int(token) for token in prompt] for prompt in prompts]


def _seeds(seed: int | Sequence[int], num_sequences: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(num_sequences)]
    if len(seed) != num_sequences:
        raise ValueError(f"{len(seed)} seeds for {num_sequences} prompts; give one each or one int")
    return list(seed)


def _limits(target: Target, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """The most new tokens of each sequence."""
    if not prompts or not all(prompts):
        raise ValueError("nothing to continue: a prompt is empty")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if wrong := {t for prompt in prompts for t in prompt if not 0 <= t < target.vocab_size}:
        raise ValueError(
            f"a prompt holds token {min(wrong)}, but those of {target.name} are 0 to"
            f" {target.vocab_size - 1}; encode it with the target's own tokenizer"
        )
    longest = max(map(len, prompts))
    if longest >= target.max_context:
        raise ValueError(
            f"a prompt has {longest} tokens but the context of {target.name} ends at"
            f" {target.max_context}; shorten the prompt"
        )
    return [min(max_new_tokens, target.max_context - len(prompt)) for prompt in prompts]


def _require_finite(logits: Tensor, target: Target) -> None:
    """Raise ValueError for logits of a prompt that cannot be compared."""
    if not logits.isfinite().all():
        raise ValueError(
            f"{target.name} has no finite logits after a prompt in {target.dtype}: where float16"
            " overflows, load the target in bfloat16 or float32"
        )


def _at_nodes(
    function: Callable[[Tensor], Tensor], logits: Tensor
) -> Tensor | Callable[[Tensor], Tensor]:
    """`function` of the logits (B, N, V) at every node at once, as the kernels want it.

    A walk in torch asks at the nodes that it visits, and computes it nowhere else.
    """
    if takes_kernels(logits):
        return function(logits)
    rows = torch.arange(len(logits), device=logits.device)
    return lambda nodes: function(logits[rows, nodes])


def judge(
    tree: DraftTree, scores: Scores, sampling: Sampling, race_times: Tensor | None
) -> Verdict:
    """What the target accepts of each tree, and its own token behind it."""
    if sampling.is_greedy:
        return verify_greedy(tree, _at_nodes(most_probable, scores.logits))
    return verify_sample(tree, _at_nodes(sampling.probs, scores.logits), race_times=race_times)


class _Loop:
    """One call of `decode`: the parts that stay the same from round to round."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        sampling: Sampling,
        race_times: Tensor | _FreshTimes | None,
        stop_ids: Tensor,
        record_gaps: bool,
        thinking: Thinking | None,
    ):
        self.target, self.drafter, self.sampling = target, drafter, sampling
        self.race_times, self.stop_ids, self.record_gaps = race_times, stop_ids, record_gaps
        self.thinking = thinking
        self.clock = Clock(target.device)

    @torch.inference_mode()
    def run(
        self, prompts: list[list[int]], limits: list[int], on_round: Callable[[int], None] | None
    ) -> list[Generation]:
        batch, rows, cache = self._begin(prompts, torch.tensor(limits, device=self.target.device))
        prefill_seconds = self.clock.elapsed()
        num_emitted, num_done = batch.progress()
        while num_done < len(prompts):
            if len(prompts) - num_done < len(rows):
                rows, cache = self._drop_ended(batch, rows, cache)
            self._round(batch, rows, cache)
            num_before, (num_emitted, num_done) = num_emitted, batch.progress()
            if on_round is not None:
                on_round(num_emitted - num_before)
        return self._generations(batch, prefill_seconds)

    def _begin(self, prompts: list[list[int]], limits: Tensor) -> tuple[_Batch, Tensor, KVCache]:
        tokens, lengths = pad(prompts, self.target.device)
        # where every slot is read, the cache grows with its sequences instead
        self.grows = reads_every_slot(len(prompts), self.target.device)
        longest = lengths if self.grows else lengths + limits
        capacity = int(longest.max()) + self.drafter.max_nodes
        with self.clock.part("prefill"):
            cache, scores = self.target.prefill(prompts, capacity)
        _require_finite(scores.logits, self.target)
        batch, rows = _Batch.empty(limits), torch.arange(len(prompts), device=limits.device)
        first = torch.zeros_like(rows)[:, None]
        times = self._times(rows, first)
        roots = self._first_tokens(scores, times)
        batch.append(rows, roots[:, None], torch.ones_like(rows), self.stop_ids)
        self._note_gaps(batch, rows, scores.logits, times, first)
        self.drafter.begin(tokens, lengths, roots, scores)
        return batch, rows, cache

    def _first_tokens(self, scores: Scores, times: Tensor | None) -> Tensor:
        if self.sampling.is_greedy:
            return most_probable(scores.logits[:, 0])
        return race(self.sampling.probs(scores.logits[:, 0]), times[:, 0])

    def _drop_ended(self, batch: _Batch, rows: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        going_on = fill_gaps(~batch.is_done[rows])
        self.drafter.select(going_on)
        return rows[going_on], cache.select(going_on)

    def _round(self, batch: _Batch, rows: Tensor, cache: KVCache) -> None:
        with self.clock.part("draft"):
            self._let_foresee(rows, batch.num_new[rows])
            tree = self.drafter.propose()
        with self.clock.part("target"):
            if self.grows:
                self.target.reserve(cache, tree.tokens.shape[1])
            scores = self.target.verify(cache, tree)
        with self.clock.part("verify"):
            times = self._times(rows, batch.num_new[rows][:, None] + tree.depths())
            # a drafter that drew what it drafted brings the rule that takes account of it
            decide = getattr(self.drafter, "judge", judge)
            verdict = decide(tree, scores, self.sampling, times)
            if self.thinking is not None:
                verdict = self.thinking.overrule(verdict, batch.tokens[rows], batch.num_new[rows])
        with self.clock.part("keep"):
            self.target.keep(cache, verdict)
        with self.clock.part("observe"):
            self.drafter.observe(verdict, scores)
        batch.append(rows, verdict.tokens, verdict.num_accepted + 1, self.stop_ids)
        self._note_gaps(batch, rows, scores.logits, times, verdict.path)
        batch.count(rows, verdict.num_accepted, tree.num_nodes - 1)

    def _let_foresee(self, rows: Tensor, num_new: Tensor) -> None:
        """Show a drafter that asks for it by which times the target will draw."""
        if self.race_times is None or not hasattr(self.drafter, "foresee"):
            return
        last = self.race_times.shape[1] - 1  # nothing behind it is ever emitted
        self.drafter.foresee(
            lambda depth: self.race_times[rows, (num_new + depth).clamp_max(last)], self.sampling
        )

    def _times(self, rows: Tensor, positions: Tensor) -> Tensor | None:
        """The race times of `rows` (b,) at new-token `positions` (b, N)."""
        return None if self.race_times is None else self.race_times[rows[:, None], positions]

    def _note_gaps(
        self, batch: _Batch, rows: Tensor, logits: Tensor, times: Tensor | None, path: Tensor
    ) -> None:
        """Record by how much each token was chosen, for the audit of ties."""
        if not self.record_gaps:
            return
        if self.sampling.is_greedy:
            best = logits.float().topk(2, -1).values
            gaps = best[..., 0] - best[..., 1]
        else:
            probs = self.sampling.probs(logits)
            gaps = race_lead(probs.flatten(0, 1), times.flatten(0, 1)).view(logits.shape[:2])
        gaps = gaps.gather(1, path.clamp_min(0))
        for row, gap, nodes in zip(rows.tolist(), gaps.tolist(), path.tolist(), strict=True):
            batch.gaps[row] += [g for g, node in zip(gap, nodes, strict=True) if node >= 0]

    def _generations(self, batch: _Batch, prefill_seconds: float) -> list[Generation]:
        seconds = self.clock.elapsed()
        parts = self.clock.seconds_by_part()
        return [
            Generation(
                tokens[:count],
                accepted,
                drafted,
                seconds,
                prefill_seconds,
                parts,
                gaps[:count],
                self._forced_places(tokens[:count]),
            )  # fmt: skip
            for tokens, count, accepted, drafted, gaps in zip(
                batch.tokens.tolist(),
                batch.num_new.tolist(),
                *batch.counts(),
                batch.gaps,
                strict=True,
            )
        ]

    def _forced_places(self, tokens: list[int]) -> list[int]:
        return [] if self.thinking is None else list(self.thinking.forced_places(tokens))
