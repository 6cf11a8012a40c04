"""llama.cpp's own converter, pinned, sandboxed and never copied: a snapshot in, `base.gguf` out.

    install.py        sets the converter up from llama-cpp-python's source package, checks its hash
    snapshot.py       a copy of the model without code: no *.py, no auto_map, no pickles
    checkpoint.py     safetensors headers: read, checked, and written as shells without data
    sandbox.py        starts the child: stripped environment, limits, no network, dies with us
    entry.py          what runs inside (imports nothing of quantkit)
    added.py          models written as another architecture that computes the same; runs inside
    pretokenizer.py   a tokenizer the converter does not know: which of llama.cpp's does the same
    architectures.py  what the pinned converter can really convert
    explain.py        a failed conversion in one sentence
    convert.py        all of it in order

What the sandbox promises: no code of the model repository is run, because none is there; the child
knows no token; it cannot open a socket or start a program (seccomp on Linux x86-64 and arm64, else
Python's audit hook, which native code could get around: the result says which it was); its CPU
time, address space and file sizes are bounded. What it does not promise: it runs as the same user
and may read and write what that user may.
"""
