"""Coupled drafting: EAGLE-3's head, drafting at temperature > 0 by the dice that will be thrown.

Which token is drawn at a position is decided by the target's distribution there and by race times
that the sequence's seed and the position fix (`races`), whatever was drafted. So a drafter may look
at these times, and draft not what is likely but what is likely to win. Coupling one draw of a draft
model with the target's through shared randomness is Daliri, Musco and Suresh's (arXiv:2408.07978);
here the children of a tree's nodes are ranked so, and the tree grows and is pruned as EAGLE-2's
does.

Lossless without any rule of acceptance: the tokens are those of the autoregressive run of the same
seed, one by one. It takes a sampler whose dice are fixed by position, as this lab's are; none of
the six papers drafts like this, so its tau at temperature 1 is not to be set beside theirs. Greedy
decoding throws no dice, and is EAGLE-3's; so is a run under a wrapper that does not pass `foresee`
on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from specrepro import eagle3
from specrepro.decoding import Sampling
from specrepro.races import odds
from specrepro.target_model import Scores, Target

COUPLED = "EAGLE-3, coupled"


class CoupledDrafter(eagle3.Drafter):
    """Scores every candidate with its chance to be drawn, given the times of its position."""

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.times_at = None
        super().begin(prompts, lengths, roots, scores)

    def foresee(self, times_at: Callable[[int], Tensor], sampling: Sampling) -> None:
        """Take the race times (B, R + C) below each depth of the tree to be proposed."""
        self.times_at, self.sampling, self.level = times_at, sampling, 0

    def _children(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log odds and target ids (B, n, top_k) of the likeliest winners."""
        if self.times_at is None:
            return super()._children(features)
        probs = self.sampling.probs(self.logits(features))
        times = self.times_at(self.level)
        self.level += 1
        chances = odds(probs, times, self.token_ids, self.head.config.vocab_size)
        best = chances.topk(self.tree.top_k, -1)
        return best.values.log(), self.token_ids[best.indices]


def drafters(
    checkpoint: Path | str = eagle3.CHECKPOINT, **tree: int
) -> dict[str, Callable[[Target], CoupledDrafter]]:
    """Its loader; `tree` overrides a checkpoint's sizes where not 0."""
    changed = {name: value for name, value in tree.items() if value}

    def load(target: Target) -> CoupledDrafter:
        head, own = eagle3.load_head(checkpoint)
        return CoupledDrafter(head, target, replace(own, **changed))

    return {COUPLED: load}
