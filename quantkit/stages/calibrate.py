"""calibrate: text becomes tokens, and tokens become the activation statistics of every linear
layer.

Writes `tokens.safetensors` (train and heldout sequences), `eval/<domain>.txt` (text that nothing
before validation sees),
`hessians/block-NNN.safetensors` and `hessians/head.safetensors` (two Hessians per distinct input:
train and heldout),
`hessians/embedding.safetensors` (the gradients' outer products at what is looked up),
`hessians/fisher.safetensors` (what output errors cost),
`imatrix.gguf` (the diagonals, as llama-imatrix writes them) and `calibration.json`. The unit of
work is one block: after a kill, blocks whose file is there are only run forward.
"""

from __future__ import annotations

from quantkit.config.calibration import shown
from quantkit.files import write_json
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.sources.snapshot import load_snapshot

NAME = "calibrate"

_FISHER_TOKENS = 4096  # gradients are averaged over all positions: few tokens price a layer well


class Calibrate(Stage):
    """Run text through the model to learn which inputs matter."""

    name = NAME
    version = 4
    fields = ("calibration", "profile", "seed", "device")
    takes_long = True

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError for texts that cannot be read and activations that are not finite."""
        import torch
        from safetensors.numpy import load_file

        from quantkit.calibration.prepare import write_texts
        from quantkit.calibration.tokenizer import Tokenizer
        from quantkit.config import N_CTX
        from quantkit.gguf_file.imatrix import write_imatrix
        from quantkit.model.blockwise import compute_dtype
        from quantkit.model.opening import open_model
        from quantkit.model.row_maps import load_row_maps
        from quantkit.statistics.collect import collect
        from quantkit.statistics.fisher import output_fisher
        from quantkit.statistics.hessian import HessianCollector
        from quantkit.statistics.stored import (
            embedding_file,
            fisher_file,
            save_fisher,
            save_statistics,
        )

        made, folder = run.artifacts, run.artifacts.folder(NAME)
        snapshot = load_snapshot(run.dir)
        dtype = compute_dtype(run.config.device)
        model = open_model(run, NAME, snapshot.folder, dtype, run.config.device)
        tokenizer = Tokenizer(snapshot.folder)
        about = write_texts(run, model, tokenizer)
        stored = load_file(made.tokens)
        tokens = {part: stored[part] for part in ("train", "heldout")}
        outputs = [made.tokens, *(made.eval_texts / name for name in about.eval)]
        statistics = collect(run, model, tokens, folder)
        if not fisher_file(folder).exists():
            ids = torch.from_numpy(tokens["heldout"][: max(1, _FISHER_TOKENS // N_CTX)])
            lookups = {part: HessianCollector({}) for part in tokens}
            fisher = output_fisher(model, ids, run.config.seed, lookups)
            save_statistics(embedding_file(folder), lookups, in_blocks=False)
            save_fisher(fisher_file(folder), fisher)
        maps = load_row_maps(made.row_maps)
        importances = {
            name: (m.in_file_order(statistics[m.module].diagonal), statistics[m.module].n_tokens)
            for name, m in maps.items()
            if m.module in statistics and statistics[m.module].in_blocks
        }
        names = [f"{domain.name} ({domain.source})" for domain in about.domains]
        write_imatrix(made.imatrix, importances, names, len(tokens["train"]), N_CTX)
        report = {
            "spec": shown(run.config.calibration),
            "note": about.note,
            "domains": about.domains,
            "languages": about.languages,
            "n_tokens": {part: int(ids.size) for part, ids in tokens.items()},
            "n_ctx": N_CTX,
            "n_imatrix_entries": len(importances),
            "seed": run.config.seed,
            "dtype": str(dtype).removeprefix("torch."),
        }
        outputs += [
            write_json(made.calibration, report),
            made.imatrix,
            *sorted(made.statistics.glob("*.safetensors")),
        ]
        return StageResult(outputs, {"n_tokens": report["n_tokens"], "note": about.note})

    def is_intermediate(self, path: str) -> bool:
        """Hessians are only needed by the quantize stage."""
        return "/hessians/" in path

    def last_reader(self, path: str) -> str:
        """Hessians are large, and not looked at after their stage."""
        return "quantize" if self.is_intermediate(path) else "publish"
