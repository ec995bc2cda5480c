"""Packing changes how long a product takes, never what it gives or what can be trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from specrepro import measure, target_model
from specrepro.packed_linear import _Packed, pack, unpacked

HAS_PACKING = torch.backends.mkldnn.is_available()
HAS_HALF = HAS_PACKING and torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_HALF, reason="no bfloat16")),
]

pytestmark = pytest.mark.skipif(not HAS_PACKING, reason="torch was built without oneDNN")


def two_layers(dtype: torch.dtype, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160, bias), nn.SiLU(), nn.Linear(160, 33, bias)).to(dtype)


def is_packed(module: nn.Module) -> list[bool]:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return [isinstance(layer.forward, _Packed) for layer in layers]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 10), (1, 60), (2, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_layers_give_what_they_gave(dtype, shape, bias):
    model = two_layers(dtype, bias)
    x = torch.randn(*shape, 96).to(dtype)
    with torch.inference_mode():
        before = model(x)
        pack(model)
        after = model(x)
        with unpacked(model):
            assert torch.equal(model(x), before) and not any(is_packed(model))
    assert all(is_packed(model)), "packed again once the context is left"
    if dtype == torch.bfloat16:
        assert torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_a_packed_layer():
    """Losses differentiate through the frozen target's head."""
    model = two_layers(torch.float32).requires_grad_(False)
    x = torch.randn(4, 96, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    pack(model)
    (ours,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(ours, expected)
    assert expected.abs().sum() > 0


@pytest.mark.skipif(not HAS_HALF, reason="no bfloat16")
def test_autocast_is_obeyed():
    model, x = two_layers(torch.bfloat16), torch.randn(4, 96)
    pack(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="same dtype"):
        model(x)


def test_what_cannot_be_packed_is_left_alone():
    half, double = two_layers(torch.float16), two_layers(torch.float64)
    for model in (half, double, nn.ReLU()):
        pack(model)
        assert not any(is_packed(model))


def test_a_copy_of_a_packed_layer_has_weights_of_its_own():
    model = two_layers(torch.float32)
    pack(model)
    x, copied = torch.randn(2, 96), copy.deepcopy(model)
    with torch.inference_mode():
        before = model(x)
        assert torch.equal(copy.deepcopy(model)(x), before)
        copied[0].weight.zero_()
        assert torch.equal(model(x), before) and not torch.equal(copied(x), before)


def test_the_target_is_packed_and_plain_transformers_is_not(tiny_target_folder, monkeypatch):
    folder: Path = tiny_target_folder("llama")
    target = target_model.load(str(folder), dtype="float32", device="cpu")
    assert all(is_packed(target.model))
    with measure._plain_transformers(target):
        assert not any(is_packed(target.model))
    assert all(is_packed(target.model))
