"""A laboratory that reruns six papers on speculative decoding and judges them claim by claim.

The face to use from Python is `target_model.load`, `decoding.decode`, its baseline
`decoding.decode_autoregressively`, and one module per paper. The package itself imports nothing, so
asking for its version is instant.
"""

__version__ = "0.1.0"
