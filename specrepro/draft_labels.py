"""How many tokens a draft head has right at every place of the target's greedy answers.

Row i drafts behind token i + 1, as decoding does when token i is the last one whose state is known
and token i + 1 is the bonus token: its label counts the tokens that are right from i + 2 on. A
draft that is right so far has the features that the text itself gives, so all places are drafted at
once, on the text; what comes after the first wrong token is never looked at.

A place whose draft is right to the end of an answer has a label only where the answer ended of
itself: nobody knows what would have come behind one that was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from specrepro import corpus, eagle3
from specrepro.decoding import most_probable
from specrepro.target_model import Target

NO_LABEL = -1
GREEDY_SHARE = 0.9  # of an answer's tokens; another pass turns near ties, sampling turns far more
CHUNK = 256  # rows whose logits exist at a time


def num_right(
    chain: Iterable[Tensor],  # (b, m, H) features of the drafted rows by step
    choose: Callable[[Tensor], Tensor],  # features (M, H) -> drafted tokens (M,)
    tokens: Tensor,  # (b, n)
    is_answer: Tensor,  # (b, n)
    rows: Tensor,  # (b, m)  which of the n rows draft
    is_row: Tensor,  # (b, m)  which of these are real
) -> tuple[Tensor, Tensor]:
    """(b, m) how many drafted tokens in a row are the text's, and whether the text ended first.

    Row i drafts behind token i + 1, so that step j stands for token i + 2 + j.
    """
    lengths, is_right, is_open = torch.zeros_like(rows), is_row.clone(), torch.zeros_like(is_row)
    for step, features in enumerate(chain):
        both = (tokens, is_answer)
        said, is_said = (eagle3.shift_left(x, 2 + step).gather(1, rows) for x in both)
        is_open |= is_right & ~is_said
        is_right &= is_said
        if not is_right.any():
            break
        drafted = torch.full_like(said, NO_LABEL)
        drafted[is_right] = choose(features[is_right])
        is_right &= drafted == said
        lengths += is_right
    return lengths, is_open


def are_greedy(batch: corpus.Batch) -> Tensor:
    """(b,) which answers say what the target finds most probable, near ties aside."""
    is_said = batch.is_answer[:, 1:]
    is_best = is_said & (batch.choices[:, :-1] == batch.tokens[:, 1:])
    return is_best.sum(1) >= GREEDY_SHARE * is_said.sum(1).clamp_min(1)


class Labels:
    """How many drafted tokens are right at every place of greedy answers; each is drafted once."""

    def __init__(self, head: nn.Module, target: Target, most: int):
        self.head = head.to(target.device, target.dtype).eval().requires_grad_(False)
        self.embedding, self.most = eagle3.embedding_of(head, target), most
        self.logits = getattr(head, "logits", target.logits)  # EAGLE's head has the target's
        self.token_ids, self.stop_ids = head.draft_token_ids(), target.stop_ids
        self.known: dict[bytes, Tensor] = {}

    def __call__(self, batch: corpus.Batch) -> Tensor:
        """(b, n) the label of each row, NO_LABEL where it has none."""
        keys = [_key(*pair) for pair in zip(batch.tokens, batch.is_answer, strict=True)]
        if new := [row for row, key in enumerate(keys) if key not in self.known]:
            part = corpus.Batch(*(getattr(batch, name)[new] for name in corpus.Batch.__slots__))
            found = self._label(part).cpu().to(torch.int8)
            self.known |= {keys[row]: one for row, one in zip(new, found, strict=True)}
        labels = torch.full_like(batch.tokens, NO_LABEL)
        for row, key in enumerate(keys):
            own = self.known[key][: labels.shape[1]]  # beyond is padding of another batch
            labels[row, : len(own)] = own
        return labels

    @torch.no_grad()
    def _label(self, batch: corpus.Batch) -> Tensor:
        is_supervised = eagle3.supervised_rows(batch.is_answer, step=0)
        rows, is_row = eagle3.rows_of_mask(is_supervised & are_greedy(batch)[:, None])
        features = self.head.fuse(self.head.read(batch))
        chain = eagle3.unroll(
            self.head, self.embedding, batch.tokens, features, rows, steps=self.most
        )
        lengths, is_open = num_right(
            chain, self._choose, batch.tokens, batch.is_answer, rows, is_row
        )
        is_known = is_row & (~is_open | self._have_ended(batch)[:, None])
        labels = torch.full_like(batch.tokens, NO_LABEL)
        places = is_row.nonzero()[:, 0], rows[is_row]
        labels[places] = lengths.where(is_known, NO_LABEL)[is_row]
        return labels

    def _choose(self, features: Tensor) -> Tensor:
        parts = [most_probable(self.logits(part)) for part in features.split(CHUNK)]
        return self.token_ids[torch.cat(parts)]

    def _have_ended(self, batch: corpus.Batch) -> Tensor:
        """(b,) answers that end with a stop token: nothing is left to draft behind it."""
        return (torch.isin(batch.tokens, self.stop_ids) & batch.is_answer).any(1)


def _key(tokens: Tensor, is_answer: Tensor) -> bytes:
    """Of a sequence, whatever batch it is padded in."""
    places = is_answer.nonzero()[:, 0].tolist() or [0]
    words = tokens[: places[-1] + 1].cpu().numpy().tobytes()
    return places[0].to_bytes(8, "little") + words
