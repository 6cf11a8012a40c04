"""What this machine has: memory, disk, a folder of its own; and what its faults mean in words."""
