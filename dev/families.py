"""Run every family of tests/support/families.py and write docs/architectures.md. Names run only
those, and print their rows. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from families import FAMILIES  # noqa: E402
from family_run import Row, run_all  # noqa: E402

from quantkit.evidence.integrity import F16_LIMIT, FILE_LIMIT  # noqa: E402
from quantkit.llamacpp.converter.architectures import BEYOND_REACH  # noqa: E402
from quantkit.markdown import table  # noqa: E402

_HEADERS = "family,models,llama.cpp,mapped,GPTQ,parity F16,parity file,swapped,notes".split(",")
_TEXT = """# Architectures

Written by `python dev/families.py`: do not edit. Each line is a tiny random checkpoint of the real
config class that went through the whole pipeline, from fetch to stitch: llama.cpp's own converter,
row maps, calibration, every quantizer, a search. llama.cpp loaded the stitched file
{llama}, and its logits were compared with PyTorch's (transformers {transformers}) with exactly the
same dequantized weights. Other models of these architectures only differ in size. Architectures
that are not listed work as long as both programs know them; `quantkit plan` says how much of a
model GPTQ covers.

- **mapped**: share of the parameters of linear layers whose rows were found in the model.
- **GPTQ**: share of those parameters that were quantized with a Hessian of their inputs.
- **parity**: mean KL in nats per token of PyTorch against llama.cpp, of the file expanded to F16
  (at most 1e-4, rounding) and of the file itself (at most 1e-2, llama.cpp's 8-bit activations).
  In a mixture of experts a router's tie can fall either way, and that token gets another output:
  there the worst of 96 tokens may be left out, and the note says so.
- **swapped**: the first of these with 32 rows of one tensor exchanged with the next 32 on one side:
  this is what a wrong row map would look like.

{table}

Both programs know these, but they are refused before anything is downloaded:

{beyond}
"""


def cells(row: Row) -> list[str]:
    family = FAMILIES[row.family]
    if row.problem:
        return [row.family, family.models, "", "", "", "", "", "", row.problem.splitlines()[0]]
    notes = [family.notes, *row.apart]
    if row.n_projector_bytes:
        notes.append("vision tower: a GGUF of its own")
    if row.passed and row.kl_f16 > F16_LIMIT:
        notes.append(f"F16 {row.kl_f16_trimmed:.1e} without one token: experts tie for it")
    if row.passed and row.kl_file > FILE_LIMIT:
        notes.append(f"file {row.kl_file_trimmed:.1e} without one token: experts tie for it")
    return [
        row.family,
        family.models,
        row.architecture,
        f"{row.mapped_share:.0%}",
        f"{row.gptq_share:.0%}",
        f"{row.kl_f16:.1e}",
        f"{row.kl_file:.1e}",
        f"{row.kl_swapped:.1e}",
        "; ".join(note for note in notes if note) + ("" if row.passed else " **fails**"),
    ]


def main() -> int:
    names = sys.argv[1:] or list(FAMILIES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in run_all(names, Path(folder)):
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
            rows.append(row)
    if names == list(FAMILIES):
        text = _TEXT.format(
            llama=f"(llama-cpp-python {version('llama-cpp-python')})",
            transformers=version("transformers"),
            beyond="\n".join(f"- {name}: {why}." for name, why in BEYOND_REACH.items()),
            table=table(_HEADERS, [cells(row) for row in rows]),
        )
        (ROOT / "docs" / "architectures.md").write_text(text, "utf-8")
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
