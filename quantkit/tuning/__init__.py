"""Tuning by gradient: codes, scales and what else a stock file leaves free, block after block."""
