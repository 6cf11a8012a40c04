"""What calibration says of inputs and outputs: Hessians, expert counts, Fisher information."""
