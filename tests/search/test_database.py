"""The index of candidates: where the bytes of each lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny_gguf import write_llama

from quantkit.ggml import native
from quantkit.ggml.types import BF16, QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import SlotFile, lay_out
from quantkit.gptq.errors import Error, Errors, TypeErrors
from quantkit.run.artifacts import Artifacts
from quantkit.search.database import load_database, write_database
from quantkit.tensors import UNCHANGED, CandidateKey
from quantkit.tuning.tuned import load_stored

Q40 = QuantType("Q4_0")


def test_what_is_stored_as_in_the_base_lies_there(tmp_path: Path) -> None:
    """Two levels, in both of which the head is pinned to the base's own type."""
    made = Artifacts(tmp_path)
    made.base.parent.mkdir()
    base = GgufFile(write_llama(made.base))
    matrices = [name for name, t in base.tensors.items() if len(t.shape) == 2]
    found: dict[str, dict[str, TypeErrors]] = {name: {} for name in matrices}
    for level in (Q40, QuantType("Q8_0")):
        types = dict.fromkeys(matrices, level) | {"output.weight": BF16}
        file = SlotFile(made.level(level), lay_out(base, types))
        for name in base.tensors:
            qtype = types.get(name)
            values = base.packed(name)
            if qtype is not None and qtype != BF16:
                values = native.quantize(base.values(name), qtype)
            file.write(name, values)
            if qtype is not None:
                found[name][str(qtype)] = TypeErrors("rtn", {"rtn": Error(0.1, None)})
        file.finish()
    kept = {"token_embd.weight": BF16, "output.weight": BF16}
    written = write_database(made, Errors(dict(found), (), ()), kept)
    index = load_database(made)
    assert index == written and list(index.candidates) == matrices
    (head,) = index.candidates["output.weight"]
    *quantized, table = index.candidates["token_embd.weight"]
    assert [c.qtype for c in quantized] == [Q40, QuantType("Q8_0")]
    for stored in (head, table):
        assert (stored.qtype, stored.method, stored.error) == (BF16, UNCHANGED, 0.0)
        assert (made.levels / stored.file).resolve() == made.base.resolve()
        assert stored.offset == base.tensors[stored.tensor].offset
    key = CandidateKey("token_embd.weight", Q40, "rtn")
    assert index.find(key).file == "Q4_0.gguf"
    chosen = {"output.weight": head, key.tensor: index.find(key)}
    stored = load_stored(chosen, {c.file: made.levels / c.file for c in chosen.values()})
    assert np.array_equal(stored["output.weight"].packed, base.packed("output.weight"))
    assert stored[key.tensor].qtype == Q40
