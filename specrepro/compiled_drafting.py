"""Drafting through `torch.compile`: what is left of a round when its launches cost next to nothing.

A cascade is one graph a round; a head that goes on from its own features is one a level, and
whatever joins the levels (which nodes to expand, what they see) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specrepro import eagle3, fasteagle


def compiled(drafter: eagle3.Drafter) -> eagle3.Drafter:
    """The same drafter, its layers and its choice of words compiled; the first calls take long."""
    layers = "_run" if isinstance(drafter, fasteagle.Drafter) else "_layer"
    for name in (layers, "_children"):
        setattr(drafter, name, _by_graph(getattr(drafter, name)))
    return drafter


def _by_graph(step: Callable[..., object]) -> Callable[..., object]:
    """One graph for every number of rows above 1, and of slots that a mask shows."""
    graph = torch.compile(step)

    def call(*tensors: Tensor) -> object:
        for tensor in tensors:
            varies = (1, 2) if tensor.dtype == torch.bool else (1,)
            dims = [dim for dim in varies if dim < tensor.dim()]
            torch._dynamo.maybe_mark_dynamic(tensor, dims)
        return graph(*tensors)

    return call
