"""Calibration text: where it comes from, how it is mixed, rendered and sampled."""
