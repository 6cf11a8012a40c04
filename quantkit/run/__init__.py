"""A run: its folder, its events, the inputs of a stage, and its output on a terminal."""
