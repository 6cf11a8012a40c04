"""Everything that llama.cpp does for us: its converter, stock mixes, memory of contexts, chat.

converter/   the pinned converter in a sandbox     stock       the types of llama.cpp's mixes
tokens       its tokens against the tokenizer's    contexts    bytes of a context
chat, templates   the model's chat template        place       where its processes run
output       metadata, name and size of an output
"""
