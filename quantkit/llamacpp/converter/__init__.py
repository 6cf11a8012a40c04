"""llama.cpp's own converter, pinned, sandboxed and never copied: a snapshot in, `base.gguf` out.

    install.py        sets the converter up from llama-cpp-python's source package, checks its hash
    snapshot.py       a copy of the model without code: no *.py, no auto_map, no pickles
    vocabulary.py     what the converter leaves out of a vocabulary; runs inside
    sandbox.py        the converter's jobs in quantkit.sandbox
    floor.py          what a page for strangers needs before it converts
    entry.py          what runs inside
    added.py          models written as another architecture that computes the same; runs inside
    pretokenizer.py   a tokenizer the converter does not know: which of llama.cpp's does the same
    architectures.py  what the pinned converter can really convert
    explain.py        a failed conversion in one sentence
    convert.py        all of it in order

What is promised: no code of the model repository is run, because none is there, and what reads the
model runs in quantkit.sandbox: it may read the model's copy, write the output's file, and nothing
else.
"""
