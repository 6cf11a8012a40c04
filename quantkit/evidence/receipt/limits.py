"""How far two honest measurements of one file are apart, and how far a receipt may say they are.

What is compared are figures of the very same windows and items, so no error of a sample is in it:
only how builds and processors of llama.cpp round (dev/LOG.md, "Receipts" has the measurements).
"""

from __future__ import annotations

from dataclasses import fields

from quantkit.evidence.receipt.schema import Tolerance

# Between a build for AVX-512 and one for AVX2 the largest differences of 12 windows, Q8_0 to Q2_K,
# were 0.0006 nats at a KL of 0.006 and 0.010 at 0.5, 0.022 of -log p, 0.028 of equal tokens, and
# one of 60 answers.
TOLERANCE = Tolerance(kl=0.0005, kl_share=0.1, nll=0.04, top1=0.05, picks=0.05)


def beyond(stated: Tolerance) -> list[str]:
    """Return the names of the limits that a receipt sets wider than this version does: whoever
    writes a receipt must not choose what passes.
    """
    names = (f.name for f in fields(Tolerance))
    return [n for n in names if not 0 <= getattr(stated, n) <= getattr(TOLERANCE, n)]
