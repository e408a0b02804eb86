"""Measure base, tuned model and champion on the same rows, loading the base once."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fintune.data.prompt import encode, end_token_id
from fintune.errors import UserError
from fintune.evaluation.choice import choose
from fintune.evaluation.harness import run_harness
from fintune.evaluation.rows import Chosen
from fintune.evaluation.scores import Question, result_of
from fintune.evaluation.texts import similarities
from fintune.generation.decoding import Decoding, title
from fintune.generation.generate import Answer
from fintune.generation.generate import generate as generate_answers
from fintune.generation.slots import FEWEST_ROWS
from fintune.generation.vllm import serving
from fintune.merging.merge import merge_into_folder
from fintune.model.adapter import (
    AdapterInfo,
    base_of,
    load_adapter,
    load_another_adapter,
    read_training,
)
from fintune.model.base import load_base
from fintune.model.conformance import fp8_differs
from fintune.model.likelihood import Likelihood, fp8_is_near, likelihood
from fintune.params import Evaluate, Generation
from fintune.processes import rank

PASSAGE_TOKENS = 512
Generate = Callable[..., list[Answer]]  # from prompts and a Decoding


@dataclass(frozen=True)
class ModelResult:
    """The measurements of one model.

    `answers` holds each row's samples, and `greedy` its greedy answer; `general` is the
    likelihood of the general text, if any.
    """

    scores: Likelihood
    answers: list[list[Answer]]
    greedy: list[Answer]
    general: Likelihood | None


@dataclass(frozen=True)
class Measured:
    """Results by model name (base, tuned, champion if measured), with decoding, harness and metadata."""

    results: dict[str, ModelResult]
    decoding: dict[str, Any]
    similarity: dict[str, np.ndarray]
    harness: dict[str, Any]
    champion_fault: str  # why a fetched champion was not measured, or empty
    about: dict[str, Any]
    collected: dict[str, list[list[Answer]]] = field(default_factory=dict)


def measure(
    adapter: Path,
    champion: Path | None,
    test: Chosen,
    validation: Chosen,
    passages: list[str],
    params: Evaluate,
    generation: Generation,
    collected: Sequence[dict[str, Any]] = (),
) -> Measured:
    """Load the base once, and measure base, tuned model and champion by switching adapters.

    All processes of the stage call this; they share the rows and the questions. Meanings of answers and the
    harness's tasks are the first one's alone.

    The tuned model comes first: if `generation.decoding` is `auto`, its answers to the validation rows
    decide how all of them answer the test rows.

    Args:
        adapter: the tuned model's folder.
        champion: folder of the champion's adapter, or None.
        test, validation: formatted rows, with `prompt` and `completion`, and their references.
        passages: general text; empty to skip forgetting.
        collected: formatted rows whose questions are asked, too; they count in no other figure.
    """
    trained = read_training(adapter)
    base, train, dtype = trained.base, trained.train, trained.dtype
    tokenizer = trained.load_tokenizer()
    model = load_adapter(load_base(base, tokenizer, train["quantization"], dtype), adapter)
    states: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "tuned": nullcontext,
        "base": model.disable_adapter,
    }
    folders = {"base": None, "tuned": adapter, "champion": champion}
    champion_fault = ""
    if champion:
        try:
            load_another_adapter(model, champion, "champion")
            states["champion"] = nullcontext
        except UserError as error:  # a faulty champion must not stop the evaluation
            champion_fault = str(error)
    tokens = [encode(tokenizer, row["prompt"], row["completion"]) for row in test.rows]
    if params.products == "fp8" and (why := fp8_differs(model, trained)):
        raise UserError(f"evaluate.products: fp8: {why}; set bfloat16")
    fp8 = params.products == "fp8" and fp8_is_near(model, tokens)
    computed: dict[str, Any] = {"kernels": params.kernels, "fp8": fp8}
    general = [encode_passage(tokenizer, passage) for passage in passages]
    prompts = [prompt for prompt, _ in tokens]
    asked = _once(validation, tokenizer) if generation.decoding == "auto" else []
    more = [encode(tokenizer, row["prompt"], row["completion"])[0] for row in collected]
    longest = max(prompts + more + [each.prompt for each in asked], key=len)
    plain = Decoding(end_token_id(tokenizer), generation.max_new_tokens, seed=params.seed)
    results: dict[str, ModelResult] = {}
    of_collected: dict[str, list[list[Answer]]] = {}
    report: dict[str, Any] = {}
    for name, state in states.items():
        model.set_adapter("champion" if name == "champion" else "default")
        with state():
            scores = likelihood(model, tokens, f"{name} likelihood", **computed)
            passage = None
            if general:
                passage = likelihood(model, general, f"{name} general text", **computed)
            written = partial(plain_folder, trained, tokenizer, folders[name])
            most = len(longest) + generation.max_new_tokens
            using = engine(model, tokenizer, most, params, computed, name, written)
            with using as (generate, version):
                if not report:
                    answers = len(set(map(tuple, prompts))) * (params.samples_per_prompt + 1)
                    budget = answers * len(states) // 2  # long answers of bad candidates cost more
                    report = _decide(generate, asked, plain, generation, budget)
                    decoding = plain.using(report)
                begun = time.perf_counter()
                samples = 1 if decoding.is_greedy else params.samples_per_prompt
                wanted = [decoding] * samples + [plain] * (decoding != plain)
                found = _answer_rows(generate, prompts, wanted, f"{name} answers")
                report["answer_seconds"] += time.perf_counter() - begun
                if more:
                    title_ = f"{name} collected questions"
                    of_collected[name] = _answer_rows(generate, more, [decoding], title_)
        drawn, greedy = [row[:samples] for row in found], [row[-1] for row in found]
        results[name] = ModelResult(scores, drawn, greedy, passage)
    report["samples_per_prompt"] = samples
    model.set_adapter("default")
    first = rank() == 0
    compared = {name: states[name] for name in ("base", "tuned")}
    about = {
        "base": base.model,
        "base_revision": base.revision,
        "quantization": train["quantization"],
        "dtype": str(dtype).removeprefix("torch."),
        "device": model.device.type,
        "engine": version,
        "learning_rate": train["learning_rate"],
        "epochs": train["epochs"],
        "lora_r": train["lora"]["r"],
        **({"products": "fp8"} if fp8 else {}),
    }
    return Measured(
        results,
        report,
        _similarity(results, test.references, params, model.device) if first else {},
        run_harness(model, tokenizer, params.harness, compared, FEWEST_ROWS, params.seed)
        if first
        else {},
        champion_fault,
        about,
        of_collected,
    )


def _once(chosen: Chosen, tokenizer: Any) -> list[Question]:
    """Return each prompt of the validation rows once."""
    found: dict[tuple[int, ...], Question] = {}
    for row, references in zip(chosen.rows, chosen.references, strict=True):
        prompt, _ = encode(tokenizer, row["prompt"], row["completion"])
        found.setdefault(tuple(prompt), Question(prompt, references, result_of(row), row["input"]))
    return list(found.values())


def _decide(
    generate: Generate,
    asked: list[Question],
    plain: Decoding,
    generation: Generation,
    budget: int,
) -> dict[str, Any]:
    """Return the report's `decoding`: the values to answer with, and how they were found."""
    begun = time.perf_counter()

    def answer(prompts: list[list[int]], settings: list[dict[str, float]]) -> list[Answer]:
        return generate(prompts, [plain.using(each) for each in settings], title="decodings")

    if generation.decoding == "auto":
        found = choose(asked, answer, budget)
        settings = found.pop("settings")
    else:
        found = {"decided_by": "parameters", "candidates": []}
        settings = generation.decoding.model_dump()
        found["reason"] = f"{title(settings)}: given in generation.decoding"
    return {
        **settings,
        "max_new_tokens": generation.max_new_tokens,
        "title": title(settings),
        **found,
        "choice_seconds": time.perf_counter() - begun,
        "answer_seconds": 0.0,
    }


def _similarity(
    results: dict[str, ModelResult],
    references: list[list[str]],
    params: Evaluate,
    device: Any,
) -> dict[str, np.ndarray]:
    """Compute the mean similarity of each row's samples to its references, if an embedding is set."""
    if not params.embedding:
        return {}
    samples = len(results["tuned"].answers[0])
    texts = {
        name: [each.text for row in result.answers for each in row]
        for name, result in results.items()
    }
    repeated = [each for each in references for _ in range(samples)]
    found = similarities(texts, repeated, params.embedding, device)
    return {name: values.reshape(-1, samples).mean(axis=1) for name, values in found.items()}


def plain_folder(trained: AdapterInfo, tokenizer: Any, adapter: Path | None, folder: Path) -> None:
    """Write the merged model, or the base alone, to a folder for another program."""
    merge_into_folder(
        trained.base, tokenizer, adapter, folder, trained.dtype, trained.nf4_compute_dtype
    )


@contextmanager
def engine(
    model: Any,
    tokenizer: Any,
    most: int,
    params: Evaluate,
    computed: dict[str, Any],
    name: str,
    write: Callable[[Path], None],
) -> Iterator[tuple[Generate, str]]:
    """Yield a generate function for the configured engine, and its version string.

    Args:
        model: generates with its active adapter.
        most: tokens of a prompt and its answer together.
        computed: the built-in engine's `kernels` and `fp8`.
        name: of the model, for messages.
        write: writes the same model to a folder.
    """
    rows = params.rows_per_batch
    if params.engine == "built_in":
        how = {"rows_at_once": rows} | computed
        yield partial(generate_answers, model, tokenizer, **how), "built_in"
        return
    dtype = base_of(model).get_output_embeddings().weight.dtype
    with serving(write, dtype, most, rows, f"{name} answers") as (server, version):
        yield partial(server.generate, tokenizer), f"vllm {version}"


def _answer_rows(
    generate: Generate,
    prompts: Sequence[list[int]],
    decodings: Sequence[Decoding],
    title: str,
) -> list[list[Answer]]:
    """Answer each different prompt with each of these decodings, the same for all rows that have it."""
    different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    repeated = [list(prompt) for prompt in different for _ in decodings]
    answers = iter(generate(repeated, [*decodings] * len(different), title=title))
    by_prompt = {prompt: [next(answers) for _ in decodings] for prompt in different}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def encode_passage(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Encode general text without the prompt's format: every token but the first is predicted.

    A long text is truncated.
    """
    ids = tokenizer(text, split_special_tokens=True)["input_ids"][:PASSAGE_TOKENS]
    return ids[:1], ids[1:]
