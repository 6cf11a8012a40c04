"""A run: its folder, its events, what a stage is given, and its output on a terminal."""
