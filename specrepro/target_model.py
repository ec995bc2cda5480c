"""The frozen target: a transformers causal LM, unforked, scoring draft trees against its own cache.

The model stays the transformers object; only its attention function is ours, registered with
`AttentionInterface`, so a pass over a tree is the model's own forward with explicit positions.
Hidden-state taps are read on entry to the layers that EAGLE-3 names, in the same pass.

Not covered: encoder-decoder models, multimodal inputs, attention sinks, and models whose layers
keep a recurrent state instead of keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from specrepro import assets
from specrepro.draft_tree import DraftTree
from specrepro.packed_linear import pack
from specrepro.tree_verify import (
    Verdict,
    attention_mask,
    keep_accepted,
    packed_attention,
    store_tree,
    tree_attention,
)

EMBEDDED = "smollm2"
ATTENTION = "specrepro_tree"


@dataclass(slots=True)
class KVCache:
    """Preallocated keys and values of every layer with a length per sequence."""

    slots: Tensor  # (layers, 2, B, S, Hkv, D)
    lengths: Tensor  # (B,) committed tokens

    @property
    def capacity(self) -> int:
        return self.slots.shape[3]

    def select(self, rows: Tensor) -> KVCache:
        """The sequences `rows` alone; in place, so only the rows that change place are copied."""
        is_moved = rows != torch.arange(len(rows), device=rows.device)
        self.slots[:, :, is_moved.nonzero()[:, 0]] = self.slots[:, :, rows[is_moved]]
        return KVCache(self.slots[:, :, : len(rows)], self.lengths[rows])


@dataclass(slots=True)
class Scores:
    """The target's view of each tree node."""

    logits: Tensor  # (B, N, V) next-token logits
    taps: Tensor  # (B, N, 3H) residual stream on entry to the low, middle and high tap layer
    hidden: Tensor  # (B, N, H) final state after the last norm


@dataclass(slots=True)
class _Pass:
    """What the attention function of every layer needs to know about the pass it is in."""

    cache: KVCache | None
    tree: DraftTree
    masks: dict[int | None, Tensor]  # by sliding window
    is_prefill: bool

    def mask(self, window: int | None) -> Tensor | None:
        N = self.tree.tokens.shape[1]
        if self.is_prefill and (window is None or N <= window):
            return None
        if window not in self.masks:
            if self.is_prefill:
                self.masks[window] = _banded_causal(self.tree.tokens, window)
            else:
                self.masks[window] = attention_mask(
                    self.tree, self.cache.lengths, self._num_slots(), window
                )
        return self.masks[window]

    def _num_slots(self) -> int:
        """Slots that attention reads.

        Batched products on a CPU would first copy anything but the whole cache.
        """
        B, N = self.tree.tokens.shape
        if B >= 4 and self.tree.tokens.device.type == "cpu":
            return self.cache.capacity
        return int(self.cache.lengths.max()) + N


def _banded_causal(tokens: Tensor, window: int) -> Tensor:
    B, N = tokens.shape
    positions = torch.arange(N, device=tokens.device)
    distance = positions[:, None] - positions
    return ((distance >= 0) & (distance < window)).expand(B, N, N)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_pass: _Pass | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: heads-first tensors in, (B, N, Hq, D) out."""
    if tree_pass is None or s_aux is not None:
        raise ValueError(_unsupported(type(module).__name__, "attends in a way of its own"))
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    window = sliding_window or None
    cache, mask = tree_pass.cache, tree_pass.mask(window)
    if cache is None:
        return packed_attention(q, k, v, mask, scaling, softcap), None
    k_cache, v_cache = cache.slots[module.layer_idx]
    if tree_pass.is_prefill:
        store_tree(k, v, k_cache, v_cache, cache.lengths)
        return packed_attention(q, k, v, mask, scaling, softcap), None
    options = {"scale": scaling, "window": window, "softcap": softcap, "mask": mask}
    return tree_attention(q, k, v, k_cache, v_cache, cache.lengths, tree_pass.tree, **options), None


AttentionInterface.register(ATTENTION, _attend)


class Target:
    """A frozen causal LM with the three operations that a round needs: prefill, verify, keep."""

    def __init__(self, model: nn.Module, tokenizer: object | None, name: str):
        """Take over `model`; raises ValueError where its layers are not plain attention layers."""
        _require_attention_layers(model, name)
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(ATTENTION)
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.device, self.dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self.hidden_size, self.vocab_size = self.config.hidden_size, self.head.weight.shape[0]
        self.max_context = getattr(self.config, "max_position_embeddings", None) or 2**31
        self.stop_ids = torch.tensor(_stop_ids(model), dtype=torch.long, device=self.device)
        self.tap_layers = tap_layers(self.config.num_hidden_layers)
        pack(self.model)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens, drafts included."""
        num_layers, num_heads = self.config.num_hidden_layers, self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.hidden_size // num_heads
        num_kv_heads = getattr(self.config, "num_key_value_heads", None) or num_heads
        # heads before slots in memory: batched products over few rows take half the time on them
        shape = (num_layers, 2, batch, num_kv_heads, capacity, head_dim)
        slots = torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(3, 4)
        return KVCache(slots, torch.zeros(batch, dtype=torch.long, device=self.device))

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[KVCache, Scores]:
        """Run the prompts into a new cache.

        Scores hold the last token's logits (B, 1, V) but taps and states of every token. Shorter
        prompts are padded on the right; what lies beyond their length is never read.
        """
        tokens, lengths = pad(prompts, self.device)
        cache = self.new_cache(len(prompts), capacity)
        hidden, taps = self._forward(_Pass(cache, DraftTree.chain(tokens), {}, is_prefill=True))
        cache.lengths = lengths
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1][:, None]
        return cache, Scores(self.logits(last), taps, hidden)

    @torch.inference_mode()
    def verify(self, cache: KVCache, tree: DraftTree) -> Scores:
        """Score every node of every tree in one pass; their keys wait in the cache for `keep`."""
        hidden, taps = self._forward(_Pass(cache, tree, {}, is_prefill=False))
        return Scores(self.logits(hidden), taps, hidden)

    @torch.inference_mode()
    def keep(self, cache: KVCache, verdict: Verdict) -> None:
        """Commit the root and the accepted path; forget the rest of the tree."""
        cache.lengths = keep_accepted(cache.slots, verdict, cache.lengths)

    @torch.no_grad()  # not inference mode: training differentiates through what it returns
    def features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Taps (B, N, 3H) and final states (B, N, H) of whole sequences (B, N), for training."""
        hidden, taps = self._forward(_Pass(None, DraftTree.chain(tokens), {}, is_prefill=True))
        return taps, hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of final states (..., H), scaled and capped where the model does so."""
        return self.final_logits(self.head(hidden))

    def final_logits(self, logits: Tensor) -> Tensor:
        """What the model makes of its head's output, of any part of the vocabulary."""
        scale = _logit_scale(self.config)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        if scale != 1:
            logits = logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _forward(self, tree_pass: _Pass) -> tuple[Tensor, Tensor]:
        tree = tree_pass.tree
        if tree_pass.is_prefill:
            positions = torch.arange(tree.tokens.shape[1], device=self.device)[None]
        else:
            positions = tree_pass.cache.lengths[:, None] + tree.depths()
        with _recorded_inputs([self.decoder.layers[i] for i in self.tap_layers]) as taps:
            output = self.decoder(
                input_ids=tree.tokens, position_ids=positions, use_cache=False, tree_pass=tree_pass
            )
        return output.last_hidden_state, torch.cat(taps, -1)


def _require_attention_layers(model: nn.Module, name: str) -> None:
    layers = getattr(model.get_decoder(), "layers", [])
    are_plain = [hasattr(layer, "self_attn") or hasattr(layer, "attention") for layer in layers]
    if not layers or not all(are_plain):
        reason = f"is a {model.config.model_type} model, not a decoder of attention layers"
        raise ValueError(_unsupported(f"target {name!r}", reason))


def _unsupported(what: str, why: str) -> str:
    return f"{what} {why}; choose a causal language model such as Llama, Qwen, Mistral or Gemma"


def _logit_scale(config: PreTrainedConfig) -> float:
    """What Cohere multiplies logits by and Granite divides them by; 1 for the others."""
    return getattr(config, "logit_scale", None) or 1 / (
        getattr(config, "logits_scaling", None) or 1
    )


def tap_layers(num_layers: int) -> tuple[int, int, int]:
    """Layers whose input EAGLE-3 fuses: hidden_states[2], [N // 2] and [N - 3]."""
    return min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)


@contextlib.contextmanager
def _recorded_inputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the hidden states on entry to `layers`, in order, during one forward."""
    inputs: list[Tensor | None] = [None] * len(layers)

    def recorder(place: int):
        return lambda _, args: inputs.__setitem__(place, args[0])

    hooks = [layer.register_forward_pre_hook(recorder(i)) for i, layer in enumerate(layers)]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def pad(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Right-padded token ids (B, longest) and lengths (B,)."""
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


def _stop_ids(model: nn.Module) -> list[int]:
    eos = model.generation_config.eos_token_id
    eos = model.config.eos_token_id if eos is None else eos
    if eos is None:
        return []
    return list(eos) if isinstance(eos, (list, tuple)) else [eos]


def choose_dtype(dtype: str | torch.dtype, device: str = "cpu") -> torch.dtype:
    """`auto` is bfloat16 on a GPU and on CPUs with AMX or AVX-512 BF16 for it, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if device != "cpu" or is_native else torch.float32
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(known)}")
    return known[dtype]


def load(
    name: str = EMBEDDED, dtype: str | torch.dtype = "auto", device: str | None = None
) -> Target:
    """Load `smollm2` (the embedded target), a Hub id or a local folder of a causal LM.

    Raises ValueError for a name, a model or a dtype that cannot serve, and for weights that are
    unreadable or not all there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(dtype, device)
    folder = str(assets.embedded_target()) if name == EMBEDDED else name
    _require_causal_config(folder, name)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot read the weights of target {name!r}: {str(error).splitlines()[0]};"
            " download or save the model again"
        ) from None
    _require_attention_layers(model, name)
    _require_every_weight(report["missing_keys"], name)
    return Target(model.to(device), _load_tokenizer(folder), name)


def _require_causal_config(folder: str, name: str) -> None:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no target {name!r}: it is neither {EMBEDDED!r}, nor a folder with a config.json,"
            f" nor a Hub id reachable from here ({str(error).splitlines()[0]})"
        ) from None
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    if config.is_encoder_decoder or not is_causal:
        reason = f"is a {config.model_type} model, not a causal language model"
        raise ValueError(_unsupported(f"target {name!r}", reason))


def _require_every_weight(missing: Iterable[str], name: str, num_named: int = 8) -> None:
    """transformers draws `missing` weights at random; tied and ignored ones are not among them."""
    if names := sorted(missing):
        others = f" and {len(names) - num_named} more" if len(names) > num_named else ""
        raise ValueError(
            f"the weights of target {name!r} lack {', '.join(names[:num_named])}{others};"
            " download or save the model again"
        )


def _load_tokenizer(folder: str) -> object | None:
    has_tokenizer = not Path(folder).is_dir() or any(Path(folder).glob("tokenizer*"))
    return AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
