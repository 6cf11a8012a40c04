"""How far two honest measurements of one file are apart, and how far a receipt may say they are.

What is compared are figures of the very same windows and items, so no error of a sample is in it:
only how builds and processors of llama.cpp round (dev/LOG.md, "Receipts" has the measurements).
"""

from __future__ import annotations

from dataclasses import fields

from quantkit.evidence.receipt.schema import Tolerance

# Between a build for AVX-512 and one for AVX2 the differences of 12 windows of Q8_0, Q4_K_M and
# Q2_K have root mean squares of at most 0.0004 nats of KL at a KL of 0.006 (0.005 at 0.5), 0.009 of
# -log p and 0.016 of equal tokens; two of 60 answers were others. The limits are four times that
# and more, so that of some hundred windows hardly one is beyond them by chance.
TOLERANCE = Tolerance(kl=0.001, kl_share=0.1, nll=0.04, top1=0.07, picks=0.05, tokens=0.005)


def beyond(stated: Tolerance) -> list[str]:
    """Return the names of the limits that a receipt sets wider than this version does: whoever
    writes a receipt must not choose what passes.
    """
    names = (f.name for f in fields(Tolerance))
    return [n for n in names if not 0 <= getattr(stated, n) <= getattr(TOLERANCE, n)]
