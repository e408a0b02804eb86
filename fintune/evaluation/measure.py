"""Measure base, tuned model and champion on the same rows, loading the base once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fintune.data.prompt import RESPONSE_END, encode, end_token_id, load_tokenizer
from fintune.errors import UserError
from fintune.evaluation.harness import run_harness
from fintune.evaluation.statistics import Sums
from fintune.evaluation.texts import similarities, text_scores
from fintune.generation.decoding import Decoding
from fintune.generation.generate import Answer
from fintune.generation.generate import generate as generate_answers
from fintune.generation.slots import FEWEST_ROWS
from fintune.generation.vllm import serving
from fintune.merging.merge import merge_into_folder
from fintune.model.adapter import AdapterInfo, load_adapter, load_another_adapter, read_training
from fintune.model.base import base_of, load_base
from fintune.model.likelihood import Likelihood, likelihood
from fintune.params import Evaluate

PASSAGE_TOKENS = 512
Generate = Callable[..., list[Answer]]  # from prompts and a Decoding


@dataclass(frozen=True)
class ModelResult:
    """The measurements of one model; `general` is the likelihood of the general text, if any."""

    scores: Likelihood
    answers: list[Answer]
    general: Likelihood | None


@dataclass(frozen=True)
class Measured:
    """Results by model name (base, tuned, champion if measured), with samples, harness and metadata."""

    results: dict[str, ModelResult]
    similarity: dict[str, np.ndarray]
    sampled: list[str]
    harness: dict[str, Any]
    champion_fault: str  # why a fetched champion was not measured, or empty
    about: dict[str, Any]


def measure(
    adapter: Path,
    champion: Path | None,
    rows: list[dict[str, Any]],
    references: list[list[str]],
    passages: list[str],
    params: Evaluate,
) -> Measured:
    """Load the base once, and measure base, tuned model and champion by switching adapters.

    Args:
        adapter: the tuned model's folder.
        champion: folder of the champion's adapter, or None.
        rows: formatted test rows, with `prompt` and `completion`.
        references: all answers to each row's question.
        passages: general text; empty to skip forgetting.
    """
    trained = read_training(adapter)
    base, train, dtype = trained.base, trained.train, trained.dtype
    tokenizer = load_tokenizer(base)
    model = load_adapter(load_base(base, tokenizer, train["quantization"], dtype), adapter)
    states: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "base": model.disable_adapter,
        "tuned": nullcontext,
    }
    folders = {"base": None, "tuned": adapter, "champion": champion}
    champion_fault = ""
    if champion:
        try:
            load_another_adapter(model, champion, "champion")
            states["champion"] = nullcontext
        except UserError as error:  # a faulty champion must not stop the evaluation
            champion_fault = str(error)
    tokens = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    general = [encode_passage(tokenizer, passage) for passage in passages]
    prompts = [prompt for prompt, _ in tokens]
    greedy = Decoding(end_token_id(tokenizer), params.max_new_tokens)
    sampling = replace(
        greedy,
        temperature=params.sampling.temperature,
        top_p=params.sampling.top_p,
        seed=params.seed,
    )
    results: dict[str, ModelResult] = {}
    sampled: list[Answer] = []
    for name, state in states.items():
        model.set_adapter("champion" if name == "champion" else "default")
        with state():
            scores = likelihood(model, tokens, f"{name} likelihood", params.kernels)
            passage = (
                likelihood(model, general, f"{name} general text", params.kernels)
                if general
                else None
            )
            written = partial(plain_folder, trained, tokenizer, folders[name])
            with engine(model, tokenizer, prompts, params, name, written) as (generate, version):
                answers = _once_each(generate, prompts, greedy, f"{name} answers")
                # cannot sample from non-finite logits
                if name == "tuned" and np.isfinite(scores.nll).all():
                    sampled = generate(prompts[: params.sampling.rows], sampling, title="samples")
        results[name] = ModelResult(scores, answers, passage)
    model.set_adapter("default")
    similarity = {}
    if params.embedding:
        texts = {name: [a.text for a in result.answers] for name, result in results.items()}
        similarity = similarities(texts, references, params.embedding, model.device)
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
    }
    return Measured(
        results,
        similarity,
        [each.text for each in sampled],
        run_harness(model, tokenizer, params.harness, compared, FEWEST_ROWS, params.seed),
        champion_fault,
        about,
    )


def plain_folder(trained: AdapterInfo, tokenizer: Any, adapter: Path | None, folder: Path) -> None:
    """Write the merged model, or the base alone, to a folder for another program."""
    merge_into_folder(
        trained.base, tokenizer, adapter, folder, trained.dtype, trained.nf4_compute_dtype
    )


@contextmanager
def engine(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    params: Evaluate,
    name: str,
    write: Callable[[Path], None],
) -> Iterator[tuple[Generate, str]]:
    """Yield a generate function for the configured engine, and its version string.

    Args:
        model: generates with its active adapter.
        prompts: must include the longest prompt to generate from.
        name: of the model, for messages.
        write: writes the same model to a folder.
    """
    rows = params.rows_per_batch
    if params.engine == "built_in":
        how: dict[str, Any] = {"rows_at_once": rows, "kernels": params.kernels}
        yield partial(generate_answers, model, tokenizer, **how), "built_in"
        return
    most = max(map(len, prompts)) + params.max_new_tokens
    dtype = base_of(model).get_output_embeddings().weight.dtype
    with serving(write, dtype, most, rows, f"{name} answers") as (server, version):
        yield partial(server.generate, tokenizer), f"vllm {version}"


def _once_each(
    generate: Generate, prompts: Sequence[list[int]], decoding: Decoding, title: str
) -> list[Answer]:
    """Generate one answer for all rows with the same prompt."""
    different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    answers = generate([list(prompt) for prompt in different], decoding, title=title)
    by_prompt = dict(zip(different, answers, strict=True))
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def encode_passage(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Encode general text without the prompt's format: every token but the first is predicted.

    A long text is truncated.
    """
    ids = tokenizer(text)["input_ids"][:PASSAGE_TOKENS]
    return ids[:1], ids[1:]


def metric_sums(
    result: ModelResult,
    rows: Sequence[dict[str, Any]],
    references: Sequence[Sequence[str]],
    similarity: np.ndarray | None,
) -> Sums:
    """Compute each metric's numerator and denominator for every row."""
    scores, answers = result.scores, result.answers
    texts = text_scores([each.text for each in answers], references)
    one = np.ones(len(rows))
    answer_bytes = [len(row["completion"].removesuffix(RESPONSE_END).encode()) for row in rows]
    sums = {
        "loss": (scores.nll, scores.tokens),
        "perplexity": (scores.nll, scores.tokens),
        "bits_per_byte": (scores.nll / np.log(2), np.array(answer_bytes, dtype=float)),
        "token_accuracy": (scores.correct, scores.tokens),
        **{key: (texts[key], one) for key in ("rouge_1", "rouge_2", "rouge_l", "chrf")},
        **({} if similarity is None else {"similarity": (similarity, one)}),
        "stop_rate": (np.array([float(each.stopped) for each in answers]), one),
        "empty_rate": (np.array([float(not each.text) for each in answers]), one),
        "distinct_2": (texts["distinct_2"], one),
        "longest_repeat": (texts["longest_repeat"], one),
        "mean_answer_tokens": (np.array([float(each.tokens) for each in answers]), one),
        "length_ratio": (texts["words"], texts["reference_words"]),
    }
    return sums
