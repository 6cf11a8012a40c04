"""quantkit: turn any Hugging Face language model into the best GGUF for a size budget, with proof.

Nine stages, one spelling everywhere: fetch, convert, calibrate, quantize, search, tune, stitch,
validate, publish.
"""

__version__ = "0.1.0"
