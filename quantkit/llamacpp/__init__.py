"""Whatever llama.cpp is asked: its converter, its mixes of types, what a context takes, its chat.

converter/   the pinned converter in a sandbox     stock       the types of llama.cpp's mixes
tokens       its tokens against the tokenizer's    contexts    bytes of a context
chat, templates   the model's chat template        place       where its processes run
output       metadata, name and size of an output
"""
