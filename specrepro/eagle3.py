"""EAGLE-3: a one-layer draft head on fused target features, trained by testing itself (arXiv:2503.01840).

Reproduced: the head (section 3.1), training-time test (3.2), dynamic draft trees (EAGLE-2's, appendix A), Table 1's
measures at temperature 0 and 1, acceptance by depth.
Not reproduced here: the paper's targets and GPUs at any tier below `paper`; serving tables 3 to 5.
Departs from the paper:
- no second linear layer 2H -> H before the decoder layer: no released checkpoint has it, q, k and v absorb it;
- the loss mask is aligned with the row that decoding starts from (`reference_mask=True` restores the released trainer's);
- the embedded default starts `lm_head` and `norm` from the target's own, since its training budget is small
  (`lm_head_init="random"` restores the paper's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specrepro.draft_tree import ROOT, DraftTree, keep_best
from specrepro.target_model import Target
from specrepro.tree_verify import Verdict, attention_mask, packed_attention, prefix_mask, store_tree


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Sizes of the draft head; the released config.json's field names."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int = 32000  # released Llama-3 heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # released heads carry none, and 10000 is what their training used
    target_hidden_size: int | None = None  # where it differs from hidden_size


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """Dynamic draft trees (appendix A: EAGLE-3 drafts eight levels deep; 60 nodes for the 8B target)."""

    depth: int = 7  # expansions after the first level, so 8 levels
    top_k: int = 10  # nodes expanded per level and children kept per node
    total_tokens: int = 60  # nodes sent to the target, the root included

    def __post_init__(self) -> None:
        if self.depth < 0 or self.top_k < 1 or self.total_tokens < 2:
            raise ValueError(f"a draft tree needs depth >= 0, top_k >= 1 and total_tokens >= 2, not {self}")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Training-time test (section 3.2; values the paper does not state are the released trainer's)."""

    steps: int = 5  # unrolled steps (section 4, implementation)
    step_decay: float = 0.8  # weight of step j is 0.8 ** j (released trainer)
    reference_mask: bool = False  # the released trainer's loss mask, which misses the first assistant row
    lm_head_init: str = "random"  # or "target": start from the target's own head


# --- the equations


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (..., heads, D) by cos and sin (..., D / 2)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def supervised_rows(is_answer: Tensor, step: int, reference_mask: bool = False) -> Tensor:
    """(b, n) bool: rows whose prediction at this step is trained, from the answer tokens `is_answer` (b, n).

    Row i at step j reads token i+1+j and predicts token i+2+j: both must lie in the answer. The reference mask asks it
    of token i+j instead, so it misses the row that decoding starts from and trains one that points past the end.
    """
    if reference_mask:
        return shift_left(is_answer, step)
    return shift_left(is_answer, step + 1) & shift_left(is_answer, step + 2)


def shift_left(x: Tensor, by: int) -> Tensor:
    """Drop the first `by` columns of x (b, n, ...) and pad zeros at the end."""
    shifted = torch.zeros_like(x)
    if by < x.shape[1]:
        shifted[:, : x.shape[1] - by] = x[:, by:]
    return shifted


def test_time_attention(
    q: Tensor,  # (b, m, Hq, D)  queries of step j at the trained rows
    first_k: Tensor,  # (b, n, Hkv, D)  step-0 keys of every row
    first_v: Tensor,
    own_k: Sequence[Tensor],  # steps 1..j, each (b, m, Hkv, D): keys of the very same rows
    own_v: Sequence[Tensor],
    rows: Tensor,  # (b, m)  which of the n rows the m are
) -> Tensor:
    """Attention of training-time test (Fig. 6): step-0 keys up to the row itself, then its own key of each later step.

    The causal block never shrinks with the step, and nothing else is visible: what a decode-time chain from row i sees.
    """
    b, m, Hq, D = q.shape
    n, Hkv = first_k.shape[1], first_k.shape[2]
    q = q.view(b, m, Hkv, Hq // Hkv, D) * D**-0.5
    scores = torch.einsum("bmhgd,bnhd->bhgmn", q, first_k).float()
    is_future = torch.arange(n, device=q.device) > rows[:, :, None]
    scores = scores.masked_fill(is_future[:, None, None], -torch.inf)
    own = [torch.einsum("bmhgd,bmhd->bhgm", q, k).float()[..., None] for k in own_k]
    weights = torch.cat([scores, *own], -1).softmax(-1).to(q.dtype)
    out = torch.einsum("bhgmn,bnhd->bmhgd", weights[..., :n], first_v)
    for step, v in enumerate(own_v):
        out = out + weights[..., n + step].permute(0, 3, 1, 2)[..., None] * v[:, :, :, None]
    return out.reshape(b, m, Hq, D)


class SoftCrossEntropy(torch.autograd.Function):
    """Soft cross-entropy of a linear head, without ever holding all logits: sum over rows of -sum_v p(v) log q(v).

    Rows are taken in chunks that stay in the processor's cache; the gradient is formed while the logits are there.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """states (M, H), weight (V, H), teacher logits (M, V) -> loss sum, top-1 agreement (M,), overlap (M,)."""
        narrow = weight.to(teacher.dtype)
        grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight, dtype=torch.float32)
        loss = torch.zeros((), device=states.device)
        agrees, overlap = torch.zeros(len(states)), torch.zeros(len(states))
        for start in range(0, len(states), SoftCrossEntropy.CHUNK):
            part = slice(start, start + SoftCrossEntropy.CHUNK)
            chunk = states[part].to(narrow.dtype)
            log_q = (chunk @ narrow.T).float().log_softmax(-1)
            p = teacher[part].float().softmax(-1)
            loss += torch.dot(p.flatten(), log_q.flatten()).neg()
            agrees[part] = (log_q.argmax(-1) == p.argmax(-1)).float()
            q = log_q.exp_()
            overlap[part] = torch.minimum(p, q).sum(-1)
            grad_logits = q.sub_(p).to(narrow.dtype)
            grad_states[part] = (grad_logits @ narrow).to(states.dtype)
            grad_weight += (grad_logits.T @ chunk).float()
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(agrees, overlap)
        return loss, agrees, overlap

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_states, grad_weight = ctx.saved_tensors
        return grad_states * grad.to(grad_states.dtype), (grad_weight * grad).to(ctx.weight_dtype), None


# --- the head


class DraftAttention(nn.Module):
    """Projections of the one attention layer; its input is twice as wide as its output."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(2 * H, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(2 * H, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(2 * H, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, H, bias=False)


class GatedMLP(nn.Module):
    """SwiGLU, as in the target."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """The decoder layer of Fig. 5: embedding and feature in, feature out."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(H, eps)  # on the embedding
        self.hidden_norm = nn.RMSNorm(H, eps)  # on the feature
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(H, eps)
        self.mlp = GatedMLP(config)

    def mixed_input(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """(..., 2H): the normed embedding first, the normed feature second."""
        return torch.cat([self.input_layernorm(embeddings), self.hidden_norm(features)], -1)

    def finish(self, features: Tensor, attended: Tensor) -> Tensor:
        """Close the layer from attention output (..., Hq * D); the residual is the feature before its norm."""
        y = features + self.self_attn.o_proj(attended)
        return y + self.mlp(self.post_attention_layernorm(y))


class DraftHead(nn.Module):
    """Everything that is trained; the embedding is the target's and stays frozen.

    Parameter names are those of the released checkpoints.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        H = config.hidden_size
        self.fc = nn.Linear(3 * (config.target_hidden_size or H), H, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = nn.RMSNorm(H, config.rms_norm_eps)
        self.lm_head = nn.Linear(H, config.draft_vocab_size, bias=False)
        if config.draft_vocab_size != config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    def set_vocabulary(self, token_ids: Tensor) -> None:
        """Draft over the target tokens `token_ids` (draft_vocab_size,), ascending; `d2t` holds offsets."""
        assert len(token_ids) == self.config.draft_vocab_size, "one target token per draft token"
        self.d2t.copy_(token_ids - torch.arange(len(token_ids), device=token_ids.device))
        self.t2d.zero_()[token_ids] = True

    def draft_token_ids(self) -> Tensor:
        """(draft_vocab_size,) target ids of the draft vocabulary."""
        ids = torch.arange(self.config.draft_vocab_size, device=self.fc.weight.device)
        return ids + self.d2t if hasattr(self, "d2t") else ids

    def project(self, embeddings: Tensor, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (..., Hq, D), rotated keys and values (..., Hkv, D) of rows at `positions` (...)."""
        attention, D = self.midlayer.self_attn, self.config.head_dim
        x = self.midlayer.mixed_input(embeddings, features)
        q, k, v = (proj(x).unflatten(-1, (-1, D)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        cos, sin = self.rotary(positions)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (..., D / 2) of `positions` (...)."""
        D = self.config.head_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, D, 2, device=positions.device) / D)
        angles = positions[..., None].float() * frequencies
        return angles.cos(), angles.sin()

    def logits(self, features: Tensor) -> Tensor:
        """Next-token logits over the draft vocabulary."""
        return self.lm_head(self.norm(features))


def head_config(target: Target, draft_vocab_size: int) -> HeadConfig:
    """A head shaped like one layer of the target."""
    c = target.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return HeadConfig(
        c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, head_dim, target.vocab_size,
        min(draft_vocab_size, target.vocab_size), rms_norm_eps=getattr(c, "rms_norm_eps", 1e-5),
    )  # fmt: skip


def most_frequent_tokens(tokens: Tensor, vocab_size: int, draft_vocab_size: int) -> Tensor:
    """The `draft_vocab_size` most frequent of the supervised `tokens`, as ascending ids; unused low ids fill up."""
    counts = torch.bincount(tokens.flatten(), minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:draft_vocab_size].sort().values


# --- drafting


class Drafter:
    """Grows a draft tree level by level and keeps its most probable nodes (EAGLE-2's expansion and re-ranking)."""

    def __init__(self, head: DraftHead, target: Target, tree: TreeConfig | None = None):
        check_fits(head.config, target)
        self.head = head.to(target.device, target.dtype).eval().requires_grad_(False)
        self.embedding = target.model.get_input_embeddings().weight
        self.token_ids = head.draft_token_ids()
        self.tree = tree or TreeConfig()

    @property
    def max_nodes(self) -> int:
        return self.tree.total_tokens

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, taps: Tensor) -> None:
        """Row i pairs the taps of token i with the token after it; the last prompt token's partner is the root."""
        B, n = prompts.shape
        following = torch.cat([prompts[:, 1:], roots[:, None]], 1)
        following[torch.arange(B, device=roots.device), lengths - 1] = roots
        self.roots, self.pending = roots, (following, taps, lengths)
        self.lengths = torch.zeros_like(lengths)  # rows in the draft cache, all from target features
        self.cache = self._new_cache(B, n + 64)

    def observe(self, verdict: Verdict, taps: Tensor) -> None:
        """Queue the verified features; drafted rows are forgotten, since they came from the head's own features."""
        rows = torch.arange(len(taps), device=taps.device)[:, None]
        verified = taps[rows, verdict.path.clamp_min(0)]
        self.roots = verdict.bonus
        self.pending = (verdict.tokens.clamp_min(0), verified, verdict.num_accepted + 1)

    def select(self, rows: Tensor) -> None:
        self.roots, self.lengths, self.cache = self.roots[rows], self.lengths[rows], self.cache[:, rows]
        self.pending = tuple(part[rows] for part in self.pending)

    @torch.inference_mode()
    def propose(self) -> DraftTree:
        last = self._extend()
        return self._grow(last)

    def _extend(self) -> Tensor:
        """Run the pending rows through the head, keep their keys, and return the last row's feature (B, H)."""
        tokens, taps, counts = self.pending
        rows = torch.arange(len(tokens), device=tokens.device)
        chain = DraftTree.chain(tokens, counts)
        features = self.head.fc(taps)
        positions = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self._reserve(tokens.shape[1])
        mask = attention_mask(chain, self.lengths, int(self.lengths.max()) + tokens.shape[1])
        out = self._layer(tokens, features, positions, self.lengths, mask)
        self.lengths = self.lengths + counts
        return out[rows, counts - 1]

    def _grow(self, last: Tensor) -> DraftTree:
        """Expand the best `top_k` nodes of each level; re-rank the whole pool (appendix A)."""
        B, k = len(last), self.tree.top_k
        self._reserve(self.tree.depth * k)
        log_probs, tokens = self._children(last[:, None])
        pool = [(self.roots[:, None], torch.full_like(self.roots[:, None], ROOT), torch.zeros_like(log_probs[:, 0, :1]))]
        scores, features = log_probs[:, 0], last[:, None].expand(-1, k, -1)
        frontier_tokens, parents = tokens[:, 0], torch.zeros_like(tokens[:, 0])
        pool.append((frontier_tokens, parents, scores))
        frontier_ids = torch.arange(1, k + 1, device=last.device).expand(B, k)  # ids in the pool
        ancestors = torch.zeros(B, k, 0, dtype=torch.bool, device=last.device)
        num_pool = k + 1
        for level in range(self.tree.depth):
            itself = torch.eye(k, dtype=torch.bool, device=last.device).expand(B, k, k)
            ancestors = torch.cat([ancestors, itself], -1)
            features = self._expand(frontier_tokens, features, ancestors, level)
            log_probs, tokens = self._children(features)
            cumulative = (scores[:, :, None] + log_probs).flatten(1)
            pool.append((tokens.flatten(1), frontier_ids.repeat_interleave(k, 1), cumulative))
            scores, best = cumulative.topk(k, 1)
            frontier_tokens, frontier_ids, came_from = tokens.flatten(1).gather(1, best), best + num_pool, best // k
            features = features.gather(1, came_from[:, :, None].expand(-1, -1, features.shape[-1]))
            ancestors = ancestors.gather(1, came_from[:, :, None].expand(-1, -1, ancestors.shape[-1]))
            num_pool += k * k
        tokens, parents, scores = (torch.cat(parts, 1) for parts in zip(*pool, strict=True))
        return keep_best(tokens, parents, scores, self.tree.total_tokens)[0]

    def _expand(self, tokens: Tensor, features: Tensor, ancestors: Tensor, level: int) -> Tensor:
        """One more level: the frontier's own features (B, k, H), their keys stored behind the earlier levels'."""
        k = tokens.shape[1]
        positions = (self.lengths + level)[:, None].expand(-1, k)
        mask = prefix_mask(ancestors, self.lengths, int(self.lengths.max()) + ancestors.shape[-1])
        return self._layer(tokens, features, positions, self.lengths + level * k, mask)

    def _layer(self, tokens: Tensor, features: Tensor, positions: Tensor, start: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.head.project(F.embedding(tokens, self.embedding), features, positions)
        store_tree(k, v, *self.cache, start)
        attended = packed_attention(q, *self.cache[:, :, : mask.shape[-1]], mask)
        return self.head.midlayer.finish(features, attended.flatten(2))

    def _children(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities and target ids (B, n, top_k) of each node's best children, at temperature 1."""
        log_probs = self.head.logits(features).float().log_softmax(-1)
        best = log_probs.topk(self.tree.top_k, -1)
        return best.values, self.token_ids[best.indices]

    def _new_cache(self, batch: int, capacity: int) -> Tensor:
        c = self.head.config
        shape = (2, batch, capacity, c.num_key_value_heads, c.head_dim)
        return torch.zeros(shape, dtype=self.head.fc.weight.dtype, device=self.embedding.device)

    def _reserve(self, num_slots: int) -> None:
        """Double the cache where `num_slots` more rows would not fit."""
        needed = int(self.lengths.max()) + num_slots
        if needed > self.cache.shape[2]:
            larger = self._new_cache(self.cache.shape[1], max(needed, 2 * self.cache.shape[2]))
            larger[:, :, : self.cache.shape[2]] = self.cache
            self.cache = larger


def check_fits(config: HeadConfig, target: Target) -> None:
    """Raise a ValueError where the head was made for a target of another size or vocabulary."""
    for name, own, needed in (
        ("hidden size", config.target_hidden_size or config.hidden_size, target.hidden_size),
        ("vocabulary", config.vocab_size, target.vocab_size),
    ):
        if own != needed:
            raise ValueError(
                f"this draft head was made for a target with {name} {own}, but {target.name} has {needed};"
                " train a head for this target or name the target it belongs to"
            )
