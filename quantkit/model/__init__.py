"""The model in PyTorch, block by block, and the map from its weights to the GGUF's rows.

blockwise    one block at a time            streaming    blocks read as they are needed
row_maps     found bit for bit              unmapped     tensors without one, by name
offload      hidden states on disk          precision    what a forward pass computes in
"""
