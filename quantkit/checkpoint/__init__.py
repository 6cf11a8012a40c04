"""Read a checkpoint's own files before any weight: config.json, headers, adapters.

weight_files   which files transformers reads         safetensors   headers, and shells of them
info           ModelInfo: all that is known            quantized     stored in fewer bits
adapter        a LoRA's settings                      bounds        numbers no model has
codeless       without its own code
"""
