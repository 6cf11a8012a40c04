"""Measure GGUF files: perplexity, KL from the base, zero-shot, speed. See README.md here."""
