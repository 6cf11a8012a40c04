"""GGUF files: read them, write them slot by slot, check strangers', stitch.

header    parse within bounds          fields    metadata as stored, decoded when asked for
read      tensors mapped from the file  sound     may llama.cpp open it
write     lay out, fill in any order, resume
stitch    parts of several into one    imatrix   the importance matrix as a file
"""
