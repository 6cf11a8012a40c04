"""The receipt beside a published file: what was measured, on which tokens, by which build, so that
anybody can measure it again (docs/verify.md).

    schema    receipt.json as dataclasses, and its sum
    claims    what validate measures, window by window and item by item
    make      a receipt of a run
    limits    how far two honest measurements of one file are apart

It is published with the files, and `quantkit.verifying` checks it.
"""

from __future__ import annotations

from quantkit.evidence.receipt.schema import NAME, Receipt, read, to_json, write

__all__ = ["NAME", "Receipt", "read", "to_json", "write"]
