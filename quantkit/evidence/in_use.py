"""Measure for validate what users meet: answers beside the original's, and KL in conversations
through the chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.evidence.baselines import Baseline
from quantkit.evidence.receipt.claims import Claims
from quantkit.evidence.receipt.schema import BASE, OF_FILE, OF_WEIGHTS
from quantkit.evidence.report.measures import Measures
from quantkit.evidence.report.schema import OURS, Documents
from quantkit.llamacpp.place import weights_room

if TYPE_CHECKING:
    from evaluators import generation
    from evaluators.document_kl import DocumentLogits
    from evaluators.figures import OnDocuments
    from evaluators.llama_runtime import Runtime
    from evaluators.overlap import Seen
    from quantkit.config import Effort

Progress = Callable[[int, int], None]


class InUse:
    """Asks the original once, then file after file. What cannot be measured is in `measures`.

    Answers and the original's distributions are kept in `kept`, so that a killed run takes them up
    again; what is opened is closed by `stack`.
    """

    def __init__(
        self,
        base: Path,
        effort: Effort,
        runtime: Runtime,
        measures: Measures,
        kept: Path,
        stack: ExitStack,
        seen: Seen,
        claims: Claims,
    ) -> None:
        self._base, self._effort, self._runtime = base, effort, runtime
        self._measures, self._kept, self._stack = measures, kept, stack
        self._seen = seen  # what was calibrated on
        self._claims = claims
        self._answers: generation.Replies | None = None
        self._logits: DocumentLogits | None = None
        self.floor: dict[str, OnDocuments] | None = None
        self.documents: Documents | None = None

    def ask_original(self, progress: Progress) -> None:
        """Take the original's answers, its distributions on the documents, and the floor: what F16
        makes of its own weights.
        """
        from evaluators import document_kl

        self._answers = self._measures.take(
            "answers of the original", lambda: self._asked(part(progress, 0))
        )
        self._logits = self._measures.take(
            "KL in conversations", lambda: self._read(part(progress, 1))
        )
        if self._logits is None:
            return
        measure = partial(
            document_kl.measure_weights,
            self._logits,
            self._base,
            self._kept.parent,
            self._runtime,
            part(progress, 2),
            self._memory(),
        )
        found = self._measures.take("the floor of the engine", measure)
        self._claims.add_talks(BASE, BASE, OF_WEIGHTS, found)
        self.floor = found.domains if found else None

    def _asked(self, progress: Progress) -> generation.Replies:
        from evaluators import conversations, generation

        n_prompts, n_new = self._effort.answers
        prompts = conversations.prompts(limit=n_prompts)
        asked = generation.ask(self._base, prompts, n_new, self._runtime)
        found = generation.answers(self._base, asked, self._kept, self._runtime, progress)
        self._claims.add_base_replies(found, n_prompts)
        return found

    def _read(self, progress: Progress) -> DocumentLogits:
        from evaluators import conversations
        from evaluators.document_kl import DocumentLogits
        from evaluators.documents import gather

        talks = conversations.dialogues(limit=self._effort.documents)
        found = gather(self._base, talks, runtime=self._runtime)
        said = [str(message["content"]) for one in talks for message in one.talk.messages]
        made = DocumentLogits.compute(self._base, found, self._kept, self._runtime, progress)
        self.documents = Documents(
            n=len(found.documents),
            n_tokens=found.n_tokens,
            n_scored=found.n_scored,
            sha256=found.sha256(),
            asked=found.asked,
            reason=found.reason or None,
            left_out=found.left_out or None,
            overlap=self._seen.overlap("\n\n".join(said)),
        )
        self._claims.add_used_talks(found, self._effort.documents)
        return self._stack.enter_context(made)

    def of(self, file: Baseline, path: Path, progress: Progress) -> dict[str, Any]:
        """Return the fields of a file's row that are measured here; of ours those of the weights
        alone, too.
        """
        from evaluators import document_kl, generation

        answers, logits, runtime = self._answers, self._logits, self._runtime
        name = file.name
        found: dict[str, Any] = {}
        if answers is not None:
            measure = partial(
                generation.measure, answers, path, self._kept, runtime, part(progress, 0)
            )
            beside = self._measures.take(f"answers of {name} beside the original's", measure)
            found["answers"] = beside and beside.answers
            self._claims.add_replies(file, beside)
        if logits is not None:
            read = partial(document_kl.measure, logits, path, runtime, part(progress, 1))
            on_file = self._measures.take(f"KL of {name} in conversations", read)
            found["conversations"] = on_file and on_file.domains
            self._claims.add_talks(name, file.kind, OF_FILE, on_file)
        if logits is not None and file.kind == OURS:
            alone = partial(
                document_kl.measure_weights,
                logits,
                path,
                self._kept.parent,
                runtime,
                part(progress, 2),
                self._memory(),
            )
            of_weights = self._measures.take(f"weight KL of {name} in conversations", alone)
            self._claims.add_talks(name, file.kind, OF_WEIGHTS, of_weights)
            found["weight_conversations"] = of_weights and {
                domain: figures.kl for domain, figures in of_weights.domains.items()
            }
        return found

    def _memory(self) -> int:
        from quantkit.machine.memory import free_memory  # needs torch

        return weights_room(free_memory())


def part(progress: Progress, at: int, n: int = 3) -> Progress:
    """Return the progress of one of `n` equal parts."""
    return lambda done, total: progress(at * max(total, 1) + done, n * max(total, 1))
