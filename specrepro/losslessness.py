"""Are the methods lossless? Asked of the very decoding that is timed, prompt by prompt.

In float32 greedy decoding has no excuse: it equals `transformers.generate(do_sample=False)` token
for token. Since draws are keyed by seed and position, a sampled run equals the autoregressive run
of the same seed, unless the race that drew a token was won by less than rounding moves a logit
(`near_tie_bound`). Each check is a row of quantity "losslessness" whose `value` counts the prompts
that differ without that excuse; `num_divergences` counts all, `detail` says which, and where.

In half precision a pass over a tree rounds differently from a pass over one token, so two nearly
tied logits may change places. There the row is of quantity "near_tie": every first divergence is
looked up in the autoregressive run, `gap` is the largest lead its best logit had at such a place;
and the target reads each whole answer once more, behind its own prompt: `shortfall` is the most by
which the logit of any token in it falls short of the best one there. `value` counts the prompts
where either is above a bound. Rows of quantity "divergence" list each divergence. Sampled runs are
not compared in half precision, where rounding alone turns many a race.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from specrepro.decoding import Autoregressive, Drafter, Generation, Sampling, decode
from specrepro.draft_tree import ROOT, DraftTree
from specrepro.measure import (
    AUTOREGRESSIVE,
    GENERATE,
    Methods,
    Question,
    as_drafter,
    generate,
    sequence_seed,
)
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

GREEDY = Sampling()
SAMPLED = Sampling(temperature=1.0)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two continuations of one prompt first part; a missing token means the end."""

    prompt_id: str
    place: int  # new tokens before it
    expected: int | None
    found: int | None

    def __str__(self) -> str:
        names = ["the end" if t is None else f"{t}" for t in (self.found, self.expected)]
        return f"{self.prompt_id} at new token {self.place}: {names[0]} instead of {names[1]}"


def first_divergence(
    prompt_id: str, expected: Sequence[int], found: Sequence[int]
) -> Divergence | None:
    """The first place where two lists of tokens differ, none where they are equal."""
    if list(expected) == list(found):
        return None
    shared = min(len(expected), len(found))
    pairs = zip(expected, found, strict=False)
    place = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), shared)
    ours, theirs = (tokens[place] if place < len(tokens) else None for tokens in (expected, found))
    return Divergence(prompt_id, place, ours, theirs)


def near_tie_bound(dtype: torch.dtype) -> float:
    """The largest lead, in logits, that rounding alone can overturn: 0.5 in bfloat16.

    Logits of winning tokens lie between 16 and 32, where bfloat16 has steps of 1/8. The two runs
    round every hidden state differently, which moves a logit by up to two such steps, and a lead is
    the difference of two logits: four steps. The steps of float16 are eight times finer. In float32
    a tree pass and one-token passes of the embedded target differ by up to 6.5e-5 (four prompts):
    twice that, doubled.
    """
    bounds = {torch.bfloat16: 0.5, torch.float16: 0.0625, torch.float32: 2.5e-4}
    if dtype not in bounds:
        raise ValueError(f"{dtype} has no near ties to excuse; choose bfloat16, float16 or float32")
    return bounds[dtype]


class WrongDrafts:
    """Drafts what the target thought least likely after the prompt: hardly any is ever accepted."""

    parents = (ROOT, 0, 0, 0, 1, 1, 2, 4, 4, 7)  # several children and levels, all for nothing
    max_nodes = len(parents)

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.roots = roots
        self.words = scores.logits[:, 0].topk(self.max_nodes - 1, largest=False).indices

    def propose(self) -> DraftTree:
        tokens = torch.cat([self.roots[:, None], self.words], 1)
        parents = torch.tensor(self.parents, device=tokens.device)
        return DraftTree(tokens, parents.expand(len(tokens), -1))

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.roots = verdict.bonus

    def select(self, rows: Tensor) -> None:
        self.roots, self.words = self.roots[rows], self.words[rows]


def losslessness(
    target: Target,
    methods: Methods,
    questions: Sequence[Question],
    *,
    prompts: str,
    max_new_tokens: int = 64,
    batch: int = 1,
    seed: int = 0,
    bound: float | None = None,
    samplings: Sequence[Sampling] = (GREEDY, SAMPLED),
) -> pd.DataFrame:
    """Rows that say for each method whether it gave the target's own tokens; see above.

    In float32 the baseline itself is checked too, in each of the `samplings`; `bound` replaces
    `near_tie_bound` below that.
    """
    room = target.max_context - max(len(token_ids) for _, token_ids in questions)
    audit = _Audit(target, list(questions), min(max_new_tokens, room), batch, seed)
    drafters = {AUTOREGRESSIVE: Autoregressive()} | {
        name: as_drafter(entry) for name, entry in methods.items() if name != GENERATE
    }
    if target.dtype == torch.float32:
        rows = [row for one in samplings for row in _exactness_rows(audit, drafters, one)]
    else:
        bound = near_tie_bound(target.dtype) if bound is None else bound
        rows = _near_tie_rows(audit, drafters, bound)
    dtype = str(target.dtype).removeprefix("torch.")
    common = {"prompts": prompts, "batch": batch, "seed": seed, "dtype": dtype}
    return pd.DataFrame([common | row for row in rows])


@dataclass(frozen=True, slots=True)
class _Audit:
    """The prompts of one check, decoded alike by whatever is checked."""

    target: Target
    questions: list[Question]
    max_new_tokens: int
    batch: int
    seed: int

    def generations(
        self, drafter: Drafter, sampling: Sampling, batch: int | None = None, **options: Any
    ) -> list[Generation]:
        size, found = batch or self.batch, []
        for start in range(0, len(self.questions), size):
            group = self.questions[start : start + size]
            seeds = [sequence_seed(self.seed, prompt_id) for prompt_id, _ in group]
            found += decode(
                self.target, drafter, [list(token_ids) for _, token_ids in group],
                self.max_new_tokens, **asdict(sampling), seed=seeds, **options,
            )  # fmt: skip
        return found

    def divergences(
        self, expected: list[Generation], found: list[Generation]
    ) -> list[Divergence | None]:
        """Per prompt, where it parts from what was expected."""
        ids = [prompt_id for prompt_id, _ in self.questions]
        tokens = ([one.tokens for one in generations] for generations in (expected, found))
        return [first_divergence(*case) for case in zip(ids, *tokens, strict=True)]

    def shortfalls(self, found: list[Generation]) -> dict[str, float]:
        """Per prompt, the most by which a token's logit falls short of the best one there."""
        pairs = zip(self.questions, found, strict=True)
        return {name: self._shortfall(ids, one.tokens) for (name, ids), one in pairs}

    @torch.inference_mode()
    def _shortfall(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        whole = torch.tensor([[*prompt, *tokens]], device=self.target.device)
        _, states = self.target.features(whole)
        logits = self.target.logits(states[0, len(prompt) - 1 : -1]).float()
        own = logits.gather(1, whole[0, len(prompt) :, None])[:, 0]
        return (logits.amax(1) - own).max().item()


def _exactness_rows(
    audit: _Audit, drafters: dict[str, Drafter], sampling: Sampling
) -> list[dict[str, Any]]:
    if sampling.is_greedy:
        expected = [
            generate(audit.target, [token_ids], audit.max_new_tokens)[0]
            for _, token_ids in audit.questions
        ]
    else:
        expected = audit.generations(Autoregressive(), sampling, batch=1, record_gaps=True)
    return [
        _exactness_row(audit, method, drafter, sampling, expected)
        for method, drafter in drafters.items()
    ]


def _exactness_row(
    audit: _Audit, method: str, drafter: Drafter, sampling: Sampling, expected: list[Generation]
) -> dict[str, Any]:
    found = audit.generations(drafter, sampling)
    parted = _parted(audit.divergences(expected, found), expected)
    bound = 0.0 if sampling.is_greedy else near_tie_bound(audit.target.dtype)
    return {
        "quantity": "losslessness",
        "method": method,
        "versus": GENERATE if sampling.is_greedy else AUTOREGRESSIVE,
        "temperature": sampling.temperature,
        "num_prompts": len(found),
        "new_tokens": sum(len(generation.tokens) for generation in found),
        "num_divergences": len(parted),
        "bound": bound,
        "value": sum(not lead <= bound for _, lead in parted),
        "detail": "; ".join(_described(*case) for case in parted),
    }


def _parted(
    cases: list[Divergence | None], baseline: list[Generation]
) -> list[tuple[Divergence, float]]:
    """The divergences there are, each with the baseline's own lead there."""
    pairs = zip(cases, baseline, strict=True)
    return [(case, _lead(case, own)) for case, own in pairs if case is not None]


def _described(case: Divergence, lead: float) -> str:
    return str(case) if math.isinf(lead) else f"{case}, gap {lead:.3g}"


def _near_tie_rows(
    audit: _Audit, drafters: dict[str, Drafter], bound: float
) -> list[dict[str, Any]]:
    baseline = audit.generations(Autoregressive(), GREEDY, batch=1, record_gaps=True)
    rows = []
    for method, drafter in drafters.items():
        if method == AUTOREGRESSIVE:
            continue
        found = audit.generations(drafter, GREEDY)
        parted = _parted(audit.divergences(baseline, found), baseline)
        rows += _audited_rows(method, parted, audit.shortfalls(found), bound)
    return rows


def _lead(case: Divergence, baseline: Generation) -> float:
    """The baseline's own lead there; an end in the wrong place is no tie, whatever the logits.

    `generate` says nothing of its leads, so nothing excuses a parting from it.
    """
    is_tie_possible = None not in (case.expected, case.found) and bool(baseline.gaps)
    return baseline.gaps[case.place] if is_tie_possible else math.inf


def _audited_rows(
    method: str,
    parted: list[tuple[Divergence, float]],
    shortfalls: dict[str, float],
    bound: float,
) -> list[dict[str, Any]]:
    common = {"method": method, "versus": AUTOREGRESSIVE, "temperature": 0.0, "bound": bound}
    large = [(case.prompt_id, _described(case, gap)) for case, gap in parted if not gap <= bound]
    large += [
        (name, f"{name} has a token {short:.3g} below the best")
        for name, short in shortfalls.items()
        if not short <= bound  # nor where it is no number
    ]
    summary = {
        "quantity": "near_tie",
        "num_prompts": len(shortfalls),
        "num_divergences": len(parted),
        "gap": max((gap for _, gap in parted), default=None),
        "shortfall": max(shortfalls.values()),
        "value": len({name for name, _ in large}),
        "detail": "; ".join(what for _, what in large),
    }
    each = [
        {"quantity": "divergence", "prompt_id": case.prompt_id, "place": case.place}
        | {"gap": gap, "value": int(not gap <= bound), "detail": str(case)}
        for case, gap in parted
    ]
    return [common | row for row in (summary, *each)]
