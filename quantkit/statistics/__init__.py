"""The statistics of calibration: Hessians, expert counts, Fisher information."""
