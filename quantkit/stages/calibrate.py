"""calibrate: text becomes tokens, and a backward pass says what output errors cost.

Writes `tokens.safetensors` (train and heldout sequences), `eval/<domain>.txt` (text that nothing
before validation sees), `calibration.json`, `gradients/fisher.safetensors` and
`gradients/embedding.safetensors` (the gradients' outer products at what is looked up).
"""

from __future__ import annotations

from quantkit.config.calibration import shown
from quantkit.files import write_json
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.sources.snapshot import load_snapshot

NAME = "calibrate"

_FISHER_TOKENS = 4096  # gradients are averaged over all positions: few tokens price a layer well


class Calibrate(Stage):
    """Take the text, and learn from gradients which outputs matter."""

    name = NAME
    version = 6
    fields = ("calibration", "profile", "seed", "device")
    takes_long = True

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError for texts that cannot be read."""
        import torch
        from safetensors.numpy import load_file

        from quantkit.calibration.prepare import write_texts
        from quantkit.calibration.tokenizer import Tokenizer
        from quantkit.config import N_CTX
        from quantkit.model.blockwise import compute_dtype
        from quantkit.model.opening import open_model
        from quantkit.statistics.fisher import output_fisher
        from quantkit.statistics.hessian import HessianCollector
        from quantkit.statistics.stored import embedding_file, fisher_file, save_gradients

        made = run.artifacts
        snapshot = load_snapshot(run.dir)
        dtype = compute_dtype(run.config.device)
        model = open_model(run, NAME, snapshot.folder, dtype, run.config.device)
        tokenizer = Tokenizer(snapshot.folder)
        about = write_texts(run, model, tokenizer)
        stored = load_file(made.tokens)
        tokens = {part: stored[part] for part in ("train", "heldout")}
        outputs = [made.tokens, *(made.eval_texts / name for name in about.eval)]
        if not fisher_file(made.gradients).exists():
            ids = torch.from_numpy(tokens["heldout"][: max(1, _FISHER_TOKENS // N_CTX)])
            lookups = {part: HessianCollector({}) for part in tokens}

            def progress(done: int, total: int) -> None:
                run.events.progress(NAME, done, total, "gradients at the outputs of every layer")

            fisher = output_fisher(model, ids, run.config.seed, lookups, progress=progress)
            save_gradients(made.gradients, fisher, lookups)
        report = {
            "spec": shown(run.config.calibration),
            "note": about.note,
            "domains": about.domains,
            "languages": about.languages,
            "n_tokens": {part: int(ids.size) for part, ids in tokens.items()},
            "n_ctx": N_CTX,
            "seed": run.config.seed,
            "dtype": str(dtype).removeprefix("torch."),
        }
        outputs += [
            write_json(made.calibration, report),
            embedding_file(made.gradients),
            fisher_file(made.gradients),
        ]
        return StageResult(outputs, {"n_tokens": report["n_tokens"], "note": about.note})

    def is_intermediate(self, path: str) -> bool:
        """Gradients are only needed by the quantize stage."""
        return "/gradients/" in path

    def last_reader(self, path: str) -> str:
        """Gradients are not looked at after their stage."""
        return "quantize" if self.is_intermediate(path) else "publish"
