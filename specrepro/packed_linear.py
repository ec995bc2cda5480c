"""Linear layers whose weights lie in the order in which a CPU's products read them.

oneDNN lays a weight out anew in every call, which for a few rows takes as long as the product. Done
once for a frozen layer, a pass over 1 to 16 tokens takes about half the time, and gives the same
numbers: bit for bit in bfloat16, to rounding in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NUM_ROWS = 256  # a hint to oneDNN; the layout it chooses for few rows is slower at many


def pack(module: nn.Module) -> None:
    """Pack every linear layer of `module` that can be; its weights must not change any more.

    The weights themselves stay where they are, so memory for them doubles.
    """
    for layer in _linear_layers(module):
        if _can_be_packed(layer.weight):
            layer.forward = _Packed(layer)


def unpack(module: nn.Module) -> dict[nn.Linear, _Packed | None]:
    """Undo `pack`, and return what its layers had."""
    return {layer: vars(layer).pop("forward", None) for layer in _linear_layers(module)}


@contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """The module as it was before `pack`, for as long as the context lasts."""
    packed = unpack(module)
    try:
        yield
    finally:
        for layer, forward in packed.items():
            if forward is not None:
                layer.forward = forward


class _Packed:
    """The forward of a layer, from its packed weight; a copy packs its own layer's when called."""

    def __init__(self, layer: nn.Linear):
        self.layer, self.weight = layer, _packed(layer.weight)

    def __getstate__(self) -> dict[str, object]:
        return {"layer": self.layer, "weight": None}

    def __call__(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if needs_gradient or torch.compiler.is_compiling() or x.dtype != self.layer.weight.dtype:
            return F.linear(x, self.layer.weight, self.layer.bias)
        if self.weight is None:
            self.weight = _packed(self.layer.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.layer.bias, "none", [], "")


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _NUM_ROWS)


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if type(layer) is nn.Linear]


def _can_be_packed(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    is_half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return type(weight) is nn.Parameter and (is_half or weight.dtype == torch.float32)
