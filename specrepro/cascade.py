"""The cascade that FastEagle drafts with: layers in series, each of which speaks for one position.

How it is trained and what becomes of its distributions is told in `fasteagle`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specrepro import corpus, eagle3
from specrepro.draft_layer import DraftLayer, LayerConfig, RMSNorm, joined, rotate
from specrepro.packed_linear import pack
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import packed_attention

WIRINGS = ("cascade", "shared", "parallel")
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class CascadeConfig(LayerConfig):
    """Sizes of the cascade, and how its layers are joined."""

    num_hidden_layers: int = 7  # N; ours
    draft_vocab_size: int = 0  # rows of the target's head; 0 is all of them, as in the paper
    # "shared": one layer's weights at every depth; "parallel": every layer reads the first input
    wiring: str = "cascade"
    # ours; a word's embedding may be a hundred times smaller than the features it stands beside
    norms_word: bool = True

    def __post_init__(self) -> None:
        if self.wiring not in WIRINGS:
            raise ValueError(f"unknown wiring {self.wiring!r}; choose {', '.join(WIRINGS)}")
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; at least 1 is needed")

    @property
    def is_reduced(self) -> bool:
        """Whether the cascade speaks a part of the vocabulary alone."""
        return 0 < self.draft_vocab_size < self.vocab_size


class CascadeLayer(DraftLayer):
    """A decoder layer like the target's, its input normed as there."""

    def __init__(self, config: CascadeConfig):
        super().__init__(config, config.hidden_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Over whole sequences (b, n, H)."""
        z = self.input_layernorm(x)
        q, keys_values = self.queries(z, rotary), self.keys_values(z, rotary)
        # a key-value head for every query head, since not every fused kernel has a gradient without
        k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in keys_values)
        return self.finish(x, packed_attention(q, k, v, None).flatten(2))


class Cascade(nn.Module):
    """Everything that is trained; embedding and language-model head are the target's, frozen."""

    def __init__(self, config: CascadeConfig):
        super().__init__()
        self.config, N, H = config, config.num_hidden_layers, config.hidden_size
        self.fc = nn.Linear(3 * H, H, bias=False)
        self.word_norm = RMSNorm(H, config.rms_norm_eps) if config.norms_word else nn.Identity()
        self.mix = nn.Linear(2 * H, H, bias=False)
        num_own = 1 if config.wiring == "shared" else N
        self.layers = nn.ModuleList(CascadeLayer(config) for _ in range(num_own))
        self.norms = nn.ModuleList(RMSNorm(H, config.rms_norm_eps) for _ in range(N))
        if config.is_reduced:
            ids = torch.zeros(config.draft_vocab_size, dtype=torch.long)
            self.register_buffer("token_map", ids)

    def draft_token_ids(self) -> Tensor:
        """Target ids of the words that the cascade speaks."""
        if self.config.is_reduced:
            return self.token_map
        return torch.arange(self.config.vocab_size, device=self.fc.weight.device)

    def read(self, seen: Scores | corpus.Batch) -> Tensor:
        """What the cascade takes of the target's states (B, n, 3H)."""
        return seen.taps

    def first_input(self, taps: Tensor, embeddings: Tensor) -> Tensor:
        """FC([g_t ; e_{t+1}]) of the first layer, with g_t the fused features."""
        return self.mix(torch.cat([self.fc(taps), self.word_norm(embeddings)], -1))

    def run(self, first: Tensor, layer: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """h_1, ..., h_N from the first input, `layer(i, x)` being what layer i makes of x."""
        is_parallel, x, found = self.config.wiring == "parallel", first, []
        for depth in range(self.config.num_hidden_layers):
            x = layer(depth, first if is_parallel else x)
            found.append(x)
        return found

    def forward(self, taps: Tensor, embeddings: Tensor) -> list[Tensor]:
        """What the head reads (b, n, H) at every depth, over whole sequences in one pass."""
        rotary = self.layers[0].rotary(torch.arange(taps.shape[1], device=taps.device))
        found = self.run(
            self.first_input(taps, embeddings),
            lambda depth, x: self.layers[depth % len(self.layers)](x, rotary),
        )
        return [norm(x) for norm, x in zip(self.norms, found, strict=True)]


def frozen_head(target: Target, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The target's own head over the words `token_ids` alone: states (..., H) to logits."""
    if len(token_ids) == target.vocab_size:
        return target.logits
    weight, bias = target.head.weight[token_ids], target.head.bias
    part = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        part.bias = nn.Parameter(bias[token_ids], requires_grad=False)
    pack(part)
    return lambda states: target.final_logits(part(states))


# --- how training starts


@torch.no_grad()
def start_norms(cascade: Cascade, target: Target) -> None:
    """Norm every depth as the target norms its last state."""
    # of ones it gives its weight however that is written: Gemma's has 1 to be added
    ones = torch.ones(target.hidden_size, dtype=target.dtype, device=target.device)
    for norm in cascade.norms:
        norm.weight.copy_(target.decoder.norm(ones))


@torch.no_grad()
def start_from_eagle3(cascade: Cascade, head: eagle3.DraftHead) -> None:
    """Every layer begins as EAGLE-3's, as far as its weights fit.

    There q, k and v read the word's embedding beside the feature; here they read one input, so the
    half for the feature is kept, and the first input is the feature with a random share of the
    word. EAGLE-3's head and last norm have no place here.
    """
    _require_same_sizes(cascade, head)
    H, source = cascade.config.hidden_size, head.midlayer
    cascade.fc.weight.copy_(head.fc.weight)
    cascade.mix.weight[:, :H] = torch.eye(H)
    if cascade.config.norms_word:
        cascade.word_norm.weight.copy_(source.input_layernorm.weight)
    for layer in cascade.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            theirs = getattr(source.self_attn, name).weight[:, H:]
            getattr(layer.self_attn, name).weight.copy_(theirs)
        layer.self_attn.o_proj.load_state_dict(source.self_attn.o_proj.state_dict())
        layer.mlp.load_state_dict(source.mlp.state_dict())
        layer.post_attention_layernorm.weight.copy_(source.post_attention_layernorm.weight)
        layer.input_layernorm.weight.copy_(source.hidden_norm.weight)


def _require_same_sizes(cascade: Cascade, head: eagle3.DraftHead) -> None:
    for name in SIZES:
        own, other = getattr(cascade.config, name), getattr(head.config, name)
        if own != other:
            raise ValueError(
                f"an EAGLE-3 head with {name} {other} is no start for layers with {own};"
                " name one of the same target, or start from random"
            )
    if head.fc.weight.shape != cascade.fc.weight.shape:
        raise ValueError(
            f"an EAGLE-3 head whose fc is {tuple(head.fc.weight.shape)} does not read the fused"
            f" features; name one with {tuple(cascade.fc.weight.shape)}, or start from random"
        )


# --- decoding


class FusedLayer:
    """A layer as decoding runs it: a few rows through few and packed products."""

    def __init__(self, layer: CascadeLayer):
        attention, mlp, c = layer.self_attn, layer.mlp, layer.config
        self.layer = layer
        self.num_heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        self.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        for module in (self.qkv, self.gate_up, attention.o_proj, mlp.down_proj):
            pack(module)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, n, Hq, D) and keys, and values (B, n, Hkv, D) of inputs x."""
        heads = self.qkv(self.layer.input_layernorm(x))
        q, k, v = heads.unflatten(-1, (sum(self.num_heads), -1)).split(self.num_heads, -2)
        return rotate(q, *rotary), rotate(k, *rotary), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Close the layer from attention output (B, n, Hq * D)."""
        return self.layer.finish(x, attended, self._mlp)

    def _mlp(self, z: Tensor) -> Tensor:
        return self.layer.mlp.gated(*self.gate_up(z).chunk(2, -1))
