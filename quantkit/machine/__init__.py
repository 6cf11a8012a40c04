"""This machine's memory, disk and user folder, and explanations of its errors."""
