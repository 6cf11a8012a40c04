"""One pass over the blocks: the Hessians of every distinct input, on disk."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from quantkit.config import N_CTX
from quantkit.files import PARTIAL
from quantkit.machine.memory import free_memory
from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.offload import States
from quantkit.run.stage import Run
from quantkit.statistics.experts import ExpertCollector
from quantkit.statistics.hessian import HessianCollector, is_linear
from quantkit.statistics.stored import InputDiagonal, block_file, head_file, save_statistics

STAGE = "calibrate"
BATCH_TOKENS = 4096  # per forward call
ACTIVATIONS_SHARE = 0.25  # of the free memory; what is more lies in a file


def collect(
    run: Run, model: BlockwiseModel, tokens: dict[str, np.ndarray], folder: Path
) -> dict[str, InputDiagonal]:
    """Run all blocks over all tokens; write each block's Hessians. Return the diagonals by
    module.
    """
    device = run.config.device
    batches = [
        (part, torch.from_numpy(ids[i : i + BATCH_TOKENS // N_CTX]).to(device))
        for part, ids in tokens.items()
        for i in range(0, len(ids), BATCH_TOKENS // N_CTX)
    ]
    room = int(ACTIVATIONS_SHARE * free_memory())
    states = States(folder / f"activations{PARTIAL}", room, "cpu")
    for i, (_, ids) in enumerate(batches):
        states.put(i, model.trace(ids)[0], {})
    summary: dict[str, InputDiagonal] = {}
    n_blocks = len(model.blocks)
    for index in range(n_blocks):
        path = block_file(folder, index)
        prefix = model.block_name(index)
        linears = {
            f"{prefix}.{n}": m for n, m in model.blocks[index].named_modules() if is_linear(m)
        }
        collectors = {part: HessianCollector(linears) for part in tokens}
        with model.holding(index):
            experts = {
                part: ExpertCollector(model.blocks[index], prefix, ids.size)
                for part, ids in tokens.items()
            }
            for i, (part, ids) in enumerate(batches):
                hidden, shared_kv = states.get(i, device)
                call = model.trace(ids)[1][index].with_shared_kv(shared_kv)
                with torch.no_grad(), ExitStack() as stack:
                    if not path.exists():
                        stack.enter_context(collectors[part].watching())
                        stack.enter_context(experts[part].watching())
                    hidden = model.run_block(index, hidden, call)
                states.put(i, hidden, shared_kv)
        summary |= save_statistics(path, collectors, in_blocks=True, experts=experts)
        run.events.progress(
            STAGE, index + 1, n_blocks + 1, f"block {index + 1} of {n_blocks}: activations"
        )
    path = head_file(folder)
    collectors = {part: HessianCollector(model.head_linears()) for part in tokens}
    if not path.exists():
        for i, (part, _) in enumerate(batches):
            with collectors[part].watching():
                model.head_input(states.get(i, device)[0])
    states.clear()
    summary |= save_statistics(path, collectors, in_blocks=False)
    run.events.progress(STAGE, n_blocks + 1, n_blocks + 1, "activations are done")
    return summary
