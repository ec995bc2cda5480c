"""Draws from distributions whose randomness is an argument: by a race, or by inversion.

A distribution is a row of masses in any scale; what has no mass is never drawn. `tree_kernel` runs
the same races and inversions on a GPU, draw by draw.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def vocabulary_grid(vocab_size: int) -> tuple[int, int]:
    """Rows R and columns C of the least-sided grid that holds a vocabulary, C a power of two."""
    columns = 2 ** math.ceil(math.log2(max(vocab_size, 2)) / 2)
    return -(-vocab_size // columns), columns


def race(probs: Tensor, times: Tensor) -> Tensor:
    """Draw a token from each row of `probs` (B, V), scaled or not: the first to arrive wins.

    With independent standard exponentials E, argmin of E / p is distributed as p (the race that
    Gumbel-max runs in logarithms). Two races, among the rows of the vocabulary's grid by their
    masses and among the columns of the winner, need R + C `times` (B, R + C) in place of V. Unlike
    an inverted cumulative distribution, which carries the rounding of every token's mass to every
    draw, a race turns only where two arrivals nearly tie.
    """
    _, _, tokens = _arrivals(probs, times)
    return tokens


def race_lead(probs: Tensor, times: Tensor) -> Tensor:
    """(B,) how far the logarithms of masses must move to turn the race of each row."""
    among_rows, among_columns, _ = _arrivals(probs, times)
    first_two = torch.stack([_two_first(among_rows), _two_first(among_columns)])
    return (first_two[..., 1] / first_two[..., 0]).log().amin(0)


def odds(probs: Tensor, times: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    """(B, n, M) how likely each token is to win the race of `times` (B, R + C), by guessed masses.

    `probs` (B, n, M) are the guesses for some tokens (M,) of the vocabulary. Were their logarithms
    off by independent standard Gumbel noise, each would win a race with its share of mass / time:
    among the grid's rows r, then among the columns c of one, M_r / t_r and p / t_c over their sums.
    So a token may be likely by what it is or by its luck.
    """
    R, C = vocabulary_grid(vocab_size)
    rows, columns = (token_ids // C).expand_as(probs), token_ids % C
    empty = probs.new_zeros(*probs.shape[:-1], R)
    among_rows = empty.scatter_add(-1, rows, probs) / times[:, None, :R]
    among_columns = probs / times[:, None, R:][..., columns]
    in_row = empty.scatter_add(-1, rows, among_columns)
    # a row without mass has no share to give
    share = among_rows / in_row.clamp_min(torch.finfo(probs.dtype).tiny)
    found = (share / among_rows.sum(-1, keepdim=True)).gather(-1, rows) * among_columns
    return found.clamp_max(1)  # rounding must not make a child likelier than its parent


def _two_first(arrivals: Tensor) -> Tensor:
    arrivals = F.pad(arrivals, (0, 1), value=torch.inf)
    return arrivals.topk(2, -1, largest=False).values


def _arrivals(probs: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """When each row (B, R) and each column of the winning row (B, C) arrive, and who wins (B,)."""
    R, C = vocabulary_grid(probs.shape[-1])
    grid = F.pad(probs, (0, R * C - probs.shape[-1])).view(-1, R, C)
    among_rows = times[:, :R] / grid.sum(-1)
    row = among_rows.argmin(-1)
    among_columns = times[:, R:] / grid[torch.arange(len(row), device=row.device), row]
    return among_rows, among_columns, row * C + among_columns.argmin(-1)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert each row's (B, V) cumulative distribution at its uniform; never draws zero mass."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # the largest float below the total, so that rounding can never step past the last token with
    # mass
    threshold = torch.minimum(
        uniforms[:, None].to(total) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]
