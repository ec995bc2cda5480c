"""Run in an environment of its own: logits of an exported head, by the `speculators` library.

    python speculators_logits.py FOLDER INPUTS OUTPUTS

INPUTS holds `taps` (n, 3H), `tokens` (n,), the word after each, and `steps`; OUTPUTS gets
`logits` (steps, n, Vd). It prints the versions it ran with.
"""

import sys
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel


def main(folder: str, inputs: str, outputs: str) -> None:
    model = SpeculatorModel.from_pretrained(folder, dtype=torch.float32).eval()
    unread = [name for name, weight in model.named_parameters() if weight.isnan().any()]
    assert not unread, f"weights that nothing was read into: {unread}"
    given, logits = load_file(inputs), []
    model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out[0]))
    positions = torch.arange(len(given["tokens"]))[None]
    with torch.no_grad():
        model(
            hidden_states=given["taps"][None],
            input_ids=given["tokens"][None],
            document_ids=torch.zeros_like(positions),
            position_ids=positions,
            ttt_steps=int(given["steps"]),
        )
    save_file({"logits": torch.stack(logits)}, outputs)
    print(*(f"{name} {version(name)}" for name in ("speculators", "torch", "transformers")))


if __name__ == "__main__":
    main(*sys.argv[1:])
