"""The frozen target: any transformers causal LM, unforked, scoring whole draft trees against its own cache.

The model stays the transformers object; only its attention function is ours, registered with `AttentionInterface`, so a
pass over a tree is the model's own forward with explicit positions. Hidden-state taps are read on entry to the layers
that EAGLE-3 names, in the same pass.

Not covered: encoder-decoder models, multimodal inputs, models whose layers keep a recurrent state instead of keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specrepro import assets
from specrepro.draft_tree import DraftTree
from specrepro.tree_verify import Verdict, attention_mask, keep_accepted, packed_attention, store_tree, tree_attention

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
                self.masks[window] = attention_mask(self.tree, self.cache.lengths, self._num_slots(), window)
        return self.masks[window]

    def _num_slots(self) -> int:
        """Slots that attention reads; batched products on a CPU would first copy anything but the whole cache."""
        B, N = self.tree.tokens.shape
        if B >= 4 and self.tree.tokens.device.type == "cpu":
            return self.cache.capacity
        return int(self.cache.lengths.max()) + N


def _banded_causal(tokens: Tensor, window: int) -> Tensor:
    B, N = tokens.shape
    distance = torch.arange(N, device=tokens.device)[:, None] - torch.arange(N, device=tokens.device)
    return ((distance >= 0) & (distance < window)).expand(B, N, N)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    tree_pass: _Pass | None = None, **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: heads-first tensors in, (B, N, Hq, D) out."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    window = sliding_window or None
    mask = tree_pass.mask(window)
    if tree_pass.cache is None:
        return packed_attention(q, k, v, mask, scaling, softcap), None
    k_cache, v_cache = tree_pass.cache.slots[module.layer_idx]
    if tree_pass.is_prefill:
        store_tree(k, v, k_cache, v_cache, tree_pass.cache.lengths)
        return packed_attention(q, k, v, mask, scaling, softcap), None
    out = tree_attention(
        q, k, v, k_cache, v_cache, tree_pass.cache.lengths, tree_pass.tree,
        scale=scaling, window=window, softcap=softcap, mask=mask,
    )
    return out, None


AttentionInterface.register(ATTENTION, _attend)


class Target:
    """A frozen causal LM with the three operations that a round needs: prefill, verify, keep."""

    def __init__(self, model: nn.Module, tokenizer: object | None, name: str):
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
        self.stop_ids = torch.tensor(_stop_ids(model), device=self.device)
        self.tap_layers = tap_layers(self.config.num_hidden_layers)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens, drafts included."""
        num_heads = self.config.num_key_value_heads
        head_dim = getattr(self.config, "head_dim", None) or self.hidden_size // self.config.num_attention_heads
        # heads before slots in memory, since a batched product over few rows runs twice as fast on such keys
        shape = (self.config.num_hidden_layers, 2, batch, num_heads, capacity, head_dim)
        slots = torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(3, 4)
        return KVCache(slots, torch.zeros(batch, dtype=torch.long, device=self.device))

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[KVCache, Scores]:
        """Run the prompts into a new cache; scores hold the last token's logits (B, 1, V) but taps and states of every token.

        Shorter prompts are padded on the right; what lies beyond their length is never read.
        """
        tokens, lengths = pad(prompts, self.device)
        cache = self.new_cache(len(prompts), capacity)
        hidden, taps = self._forward(_Pass(cache, DraftTree.chain(tokens), {}, is_prefill=True))
        cache.lengths = lengths
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1][:, None]
        return cache, Scores(self.logits(last), taps, hidden)

    @torch.inference_mode()
    def verify(self, cache: KVCache, tree: DraftTree) -> Scores:
        """Score every node of every tree in one pass; the nodes' keys wait in the cache behind the prefix."""
        hidden, taps = self._forward(_Pass(cache, tree, {}, is_prefill=False))
        return Scores(self.logits(hidden), taps, hidden)

    @torch.inference_mode()
    def keep(self, cache: KVCache, verdict: Verdict) -> None:
        """Commit the root and the accepted path; forget the rest of the tree."""
        cache.lengths = keep_accepted(cache.slots, verdict, cache.lengths)

    @torch.no_grad()  # not inference mode: training differentiates through what it returns
    def features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Taps (B, N, 3H) and final states (B, N, H) of whole sequences (B, N), for training; keeps no cache."""
        hidden, taps = self._forward(_Pass(None, DraftTree.chain(tokens), {}, is_prefill=True))
        return taps, hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's next-token logits of final states (..., H), with the soft-cap of the models that have one."""
        logits = self.head(hidden)
        softcap = getattr(self.config, "final_logit_softcapping", None)
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


def tap_layers(num_layers: int) -> tuple[int, int, int]:
    """Layers whose input EAGLE-3 fuses, low, middle and high: hidden_states[2], [N // 2], [N - 3]."""
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


def pad(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Right-padded token ids (B, longest) and lengths (B,)."""
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths


def _stop_ids(model: nn.Module) -> list[int]:
    eos = model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else model.config.eos_token_id
    if eos is None:
        return []
    return list(eos) if isinstance(eos, (list, tuple)) else [eos]


def choose_dtype(dtype: str | torch.dtype, device: str = "cpu") -> torch.dtype:
    """`auto` takes bfloat16 on a GPU and on CPUs that multiply it natively (AMX or AVX-512 BF16), else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        is_native = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if is_native else torch.float32
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(known)}")
    return known[dtype]


def load(name: str = EMBEDDED, dtype: str | torch.dtype = "auto", device: str | None = None) -> Target:
    """Load `smollm2` (the embedded target), a Hub id or a local folder of a transformers causal LM."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = str(assets.embedded_target()) if name == EMBEDDED else name
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no target {name!r}: it is neither 'smollm2', nor a folder with a config.json, nor a Hub id reachable from here"
            f" ({str(error).splitlines()[0]})"
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"target {name!r} is a {config.model_type} model, not a causal language model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=choose_dtype(dtype, device)).to(device)
    return Target(model, _load_tokenizer(folder), name)


def _load_tokenizer(folder: str) -> object | None:
    has_tokenizer = not Path(folder).is_dir() or any(Path(folder).glob("tokenizer*"))
    return AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
