"""Runs as Jobs of Hugging Face, on machines by the minute in a visitor's own account."""
