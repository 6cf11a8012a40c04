"""Plan what a run would do and cost: targets, levels, memory, disk."""
