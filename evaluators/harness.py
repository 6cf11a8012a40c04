"""lm-evaluation-harness's interface to a model, over llama.cpp: every task that the harness knows
runs on any GGUF (`pip install .[tasks]`; `evaluators.tasks` is the command).

Texts become tokens as the harness's own model for transformers makes them: special tokens in them
are taken as such, a BOS is put first where the vocabulary asks for one and the text has none, and
what is too long loses its beginning. Requests are computed in batches that share what they begin
with (`pair_scores`, `continuations`); what was answered is kept in a file by the request's hash, so
that a run that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows

from evaluators.answer_log import AnswerLog
from evaluators.continuations import GREEDY, Continuation, Prompt, Sampling, continue_all
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Model, model_sha256
from evaluators.logprobs import RowWorkers
from evaluators.pair_scores import (
    Pair,
    Score,
    encode_pair,
    score_pairs,
    start_of,
    tokens_of,
)

_MAX_GEN_TOKS = 256  # the harness's, where a task does not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Beside these a task may say what only other engines know, and what greedy answers do not need.
_DRAWN = ("temperature", "top_k", "top_p")
_PLAIN = {"do_sample", "until", *_LENGTHS, *_DRAWN}

Progress = Callable[[str, int, int], None]  # what is asked for, how much is done, of how much


class GgufLM(LM):
    """A GGUF that is open, as the harness asks it. `truncated` counts requests that lost their
    beginning, `unfinished` answers that reached their limit.

    Raises EvaluationError, from every method, for what llama.cpp or the file cannot do.
    """

    def __init__(
        self, model: Model, out: Path | None = None, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self._model = model
        self._progress = progress
        self._sha256 = model_sha256(model.path)
        self._log = AnswerLog(out, self._sha256, "answer") if out else None
        self.truncated = self.unfinished = 0

    @property
    def max_length(self) -> int:
        """Return how many tokens a sequence may have."""
        return self._model.n_ctx_train

    @property
    def tokenizer_name(self) -> str:
        """Return what the harness tells rendered chats apart by."""
        return f"gguf-{self._sha256[:16]}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages with the file's own chat template. Without `add_generation_prompt` the
        last message is the beginning of an answer, and the prompt ends with it.
        """
        prompt = self._model.chat_prompt(chat_history, asks=add_generation_prompt)
        if prompt is None:
            raise EvaluationError(f"{self._model.path} has no chat template.", "Leave --chat out.")
        if add_generation_prompt:
            return prompt
        begun = chat_history[-1]["content"]
        at = prompt.rfind(begun)
        if at < 0:  # some templates strip what they are given
            begun = begun.strip()
            at = prompt.rfind(begun)
        if at < 0:
            raise EvaluationError(
                f"The chat template of {self._model.path} changes an answer that was begun.",
                "Leave --chat out for this task.",
            )
        return prompt[: at + len(begun)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the sum of log p of each continuation after its context, and whether greedy
        decoding would have given it.
        """
        answers = self._answer("loglikelihood", requests, self._score)
        return [(float(log_p), bool(greedy)) for log_p, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the sum of log p of each text's tokens: in windows as long as the model allows,
        each token predicted once, the last window with as much context as fits.
        """
        return [float(x) for x in self._answer("loglikelihood_rolling", requests, self._roll)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return what follows each context, up to the first of its stop texts."""
        answers = self._answer("generate_until", requests, self._generate)
        self.unfinished += sum(ended == "limit" for _, ended in answers)
        return [str(text) for text, _ in answers]

    def _answer(
        self,
        kind: str,
        requests: Sequence[Instance],
        compute: Callable[[list[tuple[Any, ...]], list[int], Callable[[int, Any], None]], None],
    ) -> list[Any]:
        """The answers of all requests, from the file or computed; one request is asked once, but
        for repeats of one that draws its tokens.
        """
        arguments = [tuple(request.args) for request in requests]
        seen: dict[str, int] = {}
        hashes, repeats = [], []
        for one in arguments:
            plain = _hash(kind, one, 0)
            repeat = seen.get(plain, 0) if _draws(kind, one) else 0
            seen[plain] = repeat + 1
            hashes.append(_hash(kind, one, repeat))
            repeats.append(repeat)
        known = self._log.answers if self._log else {}
        first = {digest: i for i, digest in reversed(list(enumerate(hashes)))}
        todo = [i for digest, i in sorted(first.items(), key=lambda x: x[1]) if digest not in known]
        found = {digest: known[digest] for digest in first if digest in known}

        def done(position: int, answer: Any) -> None:
            i = todo[position]
            found[hashes[i]] = answer
            if self._log:
                self._log.append(requests[i].task_name or "", hashes[i], answer)
            if self._progress:
                self._progress(kind, len(found), len(first))

        if todo:
            compute([arguments[i] for i in todo], [repeats[i] for i in todo], done)
        return [found[digest] for digest in hashes]

    def _score(
        self, arguments: list[tuple[Any, ...]], _: list[int], done: Callable[[int, Any], None]
    ) -> None:
        pairs = []
        for context, continuation in arguments:
            pair = encode_pair(self._model, context, continuation, special=True)
            pairs.append(self._within(pair))
        self._score_pairs(pairs, lambda i, score: done(i, [score.log_p, score.is_greedy]))

    def _roll(
        self, arguments: list[tuple[Any, ...]], _: list[int], done: Callable[[int, Any], None]
    ) -> None:
        pairs: list[Pair] = []
        owners: list[int] = []
        for i, (text,) in enumerate(arguments):
            ids = tokens_of(self._model, text, special=True).tolist()
            start = int(start_of(self._model)[0])
            windows = [
                Pair(np.array(inputs, np.int32), np.array(targets, np.int32))
                for inputs, targets in get_rolling_token_windows(ids, start, self.max_length, 1)
            ]
            pairs += windows
            owners += [i] * len(windows)
            if not windows:
                done(i, 0.0)
        sums = dict.fromkeys(owners, 0.0)
        left = {i: owners.count(i) for i in sums}

        def scored(index: int, score: Score) -> None:
            i = owners[index]
            sums[i] += score.log_p
            left[i] -= 1
            if left[i] == 0:
                done(i, sums[i])

        if pairs:
            self._score_pairs(pairs, scored)

    def _score_pairs(self, pairs: list[Pair], done: Callable[[int, Score], None]) -> None:
        model = self._model

        def scored(index: int, score: Score) -> None:
            if not np.isfinite(score.log_p):
                raise EvaluationError(
                    f"{model.path} gives logits that are not finite numbers.",
                    "Its weights hold NaN or infinity, or overflow: quantize it again.",
                )
            done(index, score)

        with RowWorkers(model.n_vocab, model.runtime.threads) as workers:
            score_pairs(model, pairs, workers, scored)

    def _within(self, pair: Pair) -> Pair:
        """Without the beginning of what is too long."""
        if len(pair.inputs) <= self.max_length:
            return pair
        self.truncated += 1
        if len(pair.targets) > self.max_length:
            raise EvaluationError(
                f"A continuation of {len(pair.targets):,} tokens is longer than the"
                f" {self.max_length:,} that {self._model.path} was trained with.",
                "Leave the task out for this model.",
            )
        return Pair(pair.inputs[-self.max_length :], pair.targets)

    def _generate(
        self, arguments: list[tuple[Any, ...]], repeats: list[int], done: Callable[[int, Any], None]
    ) -> None:
        prompts = [
            self._prompt(context, settings, repeat)
            for (context, settings), repeat in zip(arguments, repeats, strict=True)
        ]

        def ended(index: int, continuation: Continuation) -> None:
            done(index, [continuation.text, continuation.ended])

        continue_all(self._model, prompts, ended, share=True)

    def _prompt(self, context: str, settings: dict[str, Any], repeat: int) -> Prompt:
        n_tokens, stops, sampling = generation_settings(settings, repeat)
        most = self.max_length - n_tokens
        if most < 1:
            raise EvaluationError(
                f"The task asks for answers of {n_tokens:,} tokens, and {self._model.path} was"
                f" trained with {self.max_length:,}.",
                f"Use --max-tokens with less than {self.max_length:,}.",
            )
        ids = tokens_of(self._model, context, special=True)
        if len(ids) == 0:
            ids = start_of(self._model)
        self.truncated += len(ids) > most
        return Prompt(ids[-most:], n_tokens, stops, sampling)


def generation_settings(
    settings: dict[str, Any], repeat: int = 0
) -> tuple[int, tuple[str, ...], Sampling]:
    """Return how many tokens a task asks for, up to which texts, and how they are drawn; `repeat`
    is the number of the answer where it wants several. Raises EvaluationError for a setting that
    would change answers and is not known here.
    """
    unknown = sorted(settings.keys() - _PLAIN)
    if unknown:
        raise EvaluationError(
            f"The task asks for {', '.join(unknown)} when answers are generated, which is not"
            " known here.",
            "Leave the task out.",
        )
    n_tokens = next((settings[n] for n in _LENGTHS if settings.get(n) is not None), _MAX_GEN_TOKS)
    until = settings.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    sampling = GREEDY
    if _samples(settings):
        sampling = Sampling(
            float(settings.get("temperature", 1.0)),
            int(settings.get("top_k", 0)),
            float(settings.get("top_p", 1.0)),
            seed=repeat,
        )
    return int(n_tokens), tuple(stop for stop in stops if stop), sampling


def _samples(settings: dict[str, Any]) -> bool:
    return bool(settings.get("do_sample")) and float(settings.get("temperature", 1.0)) > 0


def _draws(kind: str, arguments: tuple[Any, ...]) -> bool:
    return kind == "generate_until" and _samples(arguments[1])


def _hash(kind: str, arguments: tuple[Any, ...], repeat: int) -> str:
    said = json.dumps([kind, arguments, repeat], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]
