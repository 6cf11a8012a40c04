"""Weight KL of GGUFs by PyTorch: what a GPU takes seconds for and llama-perplexity minutes.

    python benchmarks/torch_kl.py RUN FILE.gguf ... --text A [--text B] [--device cuda] [--out FILE]

RUN is the folder of a run (until convert is enough) of the model that the files are made of. Every
file's weights are decoded into the checkpoint in float32; KL(original || file) is the mean over the
second halves of consecutive windows of 512 tokens. Prints a row per file, and adds it as a line of
JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from quantkit.sources.snapshot import load_snapshot

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from quantkit.gguf_file.read import GgufFile
from quantkit.model.blockwise import load_model, load_tokenizer
from quantkit.model.row_maps import load_row_maps
from quantkit.run.folder import RunDir

N_CTX, BATCH = 512, 4


class Meter:
    """The original, a copy that files are decoded into, and windows of token ids by text."""

    def __init__(self, run: Path, texts: list[Path], n_windows: int, device: str) -> None:
        directory = RunDir(run)
        folder = load_snapshot(directory).folder
        self._maps = load_row_maps(directory.artifacts.row_maps)
        self._base = load_model(folder, torch.float32, device)
        self._model = load_model(folder, torch.float32, device)
        tokenizer = load_tokenizer(folder)
        self._windows = {}
        for text in texts:
            ids = tokenizer(text.read_text("utf-8"), verbose=False).input_ids
            n = min(len(ids) // N_CTX, n_windows)
            self._windows[text.stem] = torch.tensor(ids[: n * N_CTX], device=device).view(n, N_CTX)

    @torch.no_grad()
    def kl(self, path: Path) -> dict[str, float]:
        """Mean KL in nats per token by text."""
        file = GgufFile(path)
        for name, map_ in self._maps.items():
            parameter = self._model.get_parameter(map_.parameter)
            values = torch.from_numpy(file.values(name)).reshape(-1, file.tensors[name].shape[-1])
            map_.scatter(values.to(parameter.device), parameter.data)
        found = {}
        for text, windows in self._windows.items():
            total = 0.0
            for ids in windows.split(BATCH):
                log_p, log_q = (
                    model(ids, use_cache=False).logits[:, N_CTX // 2 :].float().log_softmax(-1)
                    for model in (self._base, self._model)
                )
                total += float((log_p.exp() * (log_p - log_q)).sum(-1).mean(1).sum())
            found[text] = total / len(windows)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--chunks", type=int, default=80, help="of 512 tokens, of each text")
    parser.add_argument("--out", type=Path, help="a line of JSON for every file is added")
    given = parser.parse_args()
    meter = Meter(given.run, given.text, given.chunks, given.device)
    for path in given.files:
        kl = meter.kl(path)
        row = {"file": path.name, "n_bytes": path.stat().st_size, "kl": kl}
        cells = "  ".join(f"{text} {value:.5f}" for text, value in kl.items())
        print(f"{path.name} {row['n_bytes']:,}  {cells}", flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
