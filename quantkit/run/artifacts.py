"""The names of the nine stages in their order, and of the files that they leave for one another. No
other module types a stage's folder or a file's name in it.
"""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "fetch",
    "convert",
    "calibrate",
    "quantize",
    "search",
    "tune",
    "stitch",
    "validate",
    "publish",
)


class Artifacts:
    """Paths in a run's folder. With an empty `root` they are relative to it, as the manifest and a
    Job's mirror name them.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage, `<root>/4-quantize`."""
        return self._root / f"{NAMES.index(stage) + 1}-{stage}"

    # fetch

    @property
    def snapshot(self) -> Path:
        """Return what is known of the model, and where its files are."""
        return self.folder("fetch") / "snapshot.json"

    # convert

    @property
    def base(self) -> Path:
        """The model at full precision as llama.cpp's converter writes it."""
        return self.folder("convert") / "base.gguf"

    @property
    def equalized(self) -> Path:
        """The folder of the checkpoint with its channels equalized, if that was asked for."""
        return self.folder("convert") / "equalized"

    @property
    def equalized_base(self) -> Path:
        """Return the GGUF of `equalized`."""
        return self.folder("convert") / "equalized.gguf"

    @property
    def powers(self) -> Path:
        """The powers of two that the parameters of `equalized` were multiplied by."""
        return self.folder("convert") / "powers.safetensors"

    @property
    def quantized(self) -> Path:
        """Return what is quantized: `equalized_base` where there is one, else `base`."""
        return self.equalized_base if self.equalized_base.exists() else self.base

    @property
    def projector(self) -> Path:
        """The GGUF of the model's encoder, if it has one that could be converted."""
        return self.folder("convert") / "mmproj.gguf"

    @property
    def specs(self) -> Path:
        """The tensors of `base`, as JSON."""
        return self.folder("convert") / "tensors.json"

    @property
    def row_maps(self) -> Path:
        """Which rows of which weight every tensor of `base` is."""
        return self.folder("convert") / "rowmaps.safetensors"

    @property
    def carried(self) -> Path:
        """Rows of a quantized source that GGUF's types hold: a file for each tensor."""
        return self.folder("convert") / "carried"

    @property
    def checks(self) -> Path:
        """Return the path of the checks of `base` against its original."""
        return self.folder("convert") / "checks.json"

    # calibrate

    @property
    def tokens(self) -> Path:
        """Sequences of token ids, `train` and `heldout`: int64 (n, 512)."""
        return self.folder("calibrate") / "tokens.safetensors"

    @property
    def calibrated(self) -> Path:
        """The text of those tokens: all that stages before validation see."""
        return self.folder("calibrate") / "calibrated.txt"

    @property
    def calibration(self) -> Path:
        """Return what the tokens were taken from, as JSON."""
        return self.folder("calibrate") / "calibration.json"

    @property
    def eval_texts(self) -> Path:
        """The folder of the texts that nothing before validation sees."""
        return self.folder("calibrate") / "eval"

    @property
    def gradients(self) -> Path:
        """The folder of what the backward pass leaves: what errors cost."""
        return self.folder("calibrate") / "gradients"

    # quantize

    @property
    def levels(self) -> Path:
        """The folder of the level files, each a whole GGUF."""
        return self.folder("quantize")

    def level(self, name: object) -> Path:
        """Return the level file of a type, by its name."""
        return self.levels / f"{name}.gguf"

    @property
    def imatrix(self) -> Path:
        """The importance matrix as llama.cpp reads it."""
        return self.importances / "imatrix.gguf"

    @property
    def importances(self) -> Path:
        """The folder of the importance matrix, and of its parts until all are there."""
        return self.levels / "importances"

    @property
    def errors(self) -> Path:
        """Errors by tensor, type and method, and fallbacks, as JSON."""
        return self.levels / "errors.json"

    @property
    def database(self) -> Path:
        """The index of every way to store every tensor."""
        return self.levels / "database.json"

    # search

    @property
    def budgets(self) -> Path:
        """The budgets that are met, those that are refused, and what was assumed of tuning."""
        return self.folder("search") / "budgets.json"

    @property
    def best(self) -> Path:
        """The best allocation so far, for whoever watches."""
        return self.folder("search") / "best.json"

    def answer(self, limit_bytes: int) -> Path:
        """Return the folder of what the search found within a budget."""
        return self.folder("search") / str(limit_bytes)

    @property
    def search_states(self) -> str:
        """A pattern of the files that a killed search goes on from."""
        return f"{self.folder('search')}/*/state.json"

    # tune

    def tuned(self, limit_bytes: int) -> Path:
        """Return the path of the tuned level file for a budget; it exists if tuning helped."""
        return self.folder("tune") / str(limit_bytes) / f"tuned-{limit_bytes}.gguf"

    @property
    def tuning(self) -> Path:
        """Return what tuning came to, by budget, as JSON."""
        return self.folder("tune") / "tuning.json"

    # stitch, validate, publish

    @property
    def stitched(self) -> Path:
        """The folder of the finished GGUFs and their recipes."""
        return self.folder("stitch")

    @property
    def outputs(self) -> Path:
        """The finished GGUFs by their budgets, as JSON."""
        return self.stitched / "outputs.json"

    @property
    def report(self) -> Path:
        """The report; `report.md` and `report.html` are next to it."""
        return self.folder("validate") / "report.json"

    @property
    def receipt(self) -> Path:
        """The means of every window, by which anybody can measure it again."""
        return self.folder("validate") / "receipt.json"

    @property
    def parts(self) -> Path:
        """The folder of the parts of files that are too large for the Hub."""
        return self.folder("publish") / "parts"

    @property
    def upload(self) -> Path:
        """The folder of what is published."""
        return self.folder("publish") / "upload"


RELATIVE = Artifacts(Path())
