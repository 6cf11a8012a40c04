"""Fine-tune by gradient the codes, scales and whatever else a stock file can change, block by
block.
"""
