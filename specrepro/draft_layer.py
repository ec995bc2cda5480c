"""The one decoder layer, shaped like the target's, that EAGLE's kind of draft heads is made of.

What goes into it and which head comes after it are the papers' affairs; its parameters have the
names of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specrepro.target_model import Target


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Sizes of a one-layer head; the released config.json's field names."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # released heads carry none, and 10000 is what their training used

    @property
    def state_size(self) -> int:
        """Of the target's states."""
        return self.hidden_size


def sizes_of(target: Target) -> dict[str, float]:
    """`LayerConfig` of a layer shaped like the target's."""
    c = target.config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(c, name) for name in names} | {
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "vocab_size": target.vocab_size,
        "rms_norm_eps": getattr(c, "rms_norm_eps", 1e-5),
    }


def check_fits(config: LayerConfig, target: Target) -> None:
    """Raise a ValueError where the head was made for a target of another size or vocabulary."""
    for name, own, needed in (
        ("hidden size", config.state_size, target.hidden_size),
        ("vocabulary", config.vocab_size, target.vocab_size),
    ):
        if own != needed:
            raise ValueError(
                f"this draft head was made for a target with {name} {own},"
                f" but {target.name} has {needed};"
                " train a head for this target or name the target it belongs to"
            )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (..., heads, D) by cos and sin (..., D / 2)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class RMSNorm(nn.Module):
    """Root mean square norm in float32.

    Unlike torch's own it takes a bfloat16 input with a float32 weight.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class DraftAttention(nn.Module):
    """Projections of the one attention layer; its input may be wider than its output."""

    def __init__(self, config: LayerConfig, input_size: int):
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(input_size, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(input_size, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(input_size, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, H, bias=False)


class GatedMLP(nn.Module):
    """SwiGLU, as in the target."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(self.gate_proj(x), self.up_proj(x))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """From the two projections (..., I) on."""
        return self.down_proj(F.silu(gate) * up)


class DraftLayer(nn.Module):
    """One decoder layer like the target's; what goes into it is its head's affair."""

    def __init__(self, config: LayerConfig, input_size: int):
        super().__init__()
        self.config = config
        self.self_attn = DraftAttention(config, input_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (..., D / 2) of `positions` (...)."""
        D = self.config.head_dim
        frequencies = self.config.rope_theta ** (
            -torch.arange(0, D, 2, device=positions.device) / D
        )
        angles = positions[..., None].float() * frequencies
        return angles.cos(), angles.sin()

    def queries(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries (..., Hq, D) of layer inputs x."""
        q = self.self_attn.q_proj(x).unflatten(-1, (-1, self.config.head_dim))
        return rotate(q, *rotary)

    def keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, (..., Hkv, D) of layer inputs x."""
        k, v = (
            projection(x).unflatten(-1, (-1, self.config.head_dim))
            for projection in (self.self_attn.k_proj, self.self_attn.v_proj)
        )
        return rotate(k, *rotary), v

    def finish(
        self, residual: Tensor, attended: Tensor, mlp: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Close the layer from attention output (..., Hq * D); `mlp` may stand in for its own."""
        y = residual + self.self_attn.o_proj(attended)
        return y + (mlp or self.mlp)(self.post_attention_layernorm(y))


def joined(*projections: nn.Linear) -> nn.Linear:
    """One layer for projections of the same input; their weights become views of its."""
    weight = torch.cat([projection.weight for projection in projections])
    parts = weight.split([projection.out_features for projection in projections])
    for projection, part in zip(projections, parts, strict=True):
        projection.weight.data = part
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
