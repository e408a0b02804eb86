"""Open a model to ask it, and answer a question word by word."""

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, TextStreamer

from fintune import paths
from fintune.export.signature import check_folder
from fintune.generation.decoding import GREEDY, SETTINGS, options
from fintune.generation.tuned import generation_config, load_tuned, prompt_tokens
from fintune.integrity import check_outputs
from fintune.lineage import project_root
from fintune.params import Generation
from fintune.registry.versions import download_version
from fintune.tracking.client import connect
from fintune.usage.identity import FOLDERS


@dataclass(frozen=True)
class Opened:
    """A loaded model with its tokenizer and the decoding that it was evaluated with."""

    model: Any
    tokenizer: Any
    config: GenerationConfig
    adapted: bool = True  # False: the base answers, without the adapter

    @property
    def has_adapter(self) -> bool:
        """Return whether the base can answer as well, because the adapter is not merged into it."""
        return hasattr(self.model, "disable_adapter")


@dataclass(frozen=True)
class Said:
    """An answer: its text, its number of tokens, the seconds, and whether it ended by itself."""

    text: str
    tokens: int
    seconds: float
    ended: bool


def open_model(source: str, given: Callable[[], Generation]) -> Opened:
    """Load a model from a folder or a registered version.

    Args:
        given: reads the parameters, for a model without a decoding of its own.

    Raises:
        UserError: it is not there, cannot be loaded, or is not what its checksums say.
    """
    if Path(source).is_dir() or source in FOLDERS:
        return load(Path(source), given)
    with tempfile.TemporaryDirectory() as scratch:
        return load(download_version(connect(project_root()), source, Path(scratch)), given)


def load(folder: Path, given: Callable[[], Generation]) -> Opened:
    """Load a model from a folder; its decoding is its own, else this project's.

    Raises:
        UserError: as `open_model`.
    """
    if folder.is_dir():
        check_folder(folder)
    if folder == paths.ADAPTER:  # the merged model has a SHA256SUMS
        check_outputs([folder], strict=False)
    model, tokenizer = load_tuned(folder)
    if (folder / "generation_config.json").is_file():
        return Opened(model, tokenizer, GenerationConfig.from_pretrained(folder))
    decoding = own_decoding(given())
    return Opened(model, tokenizer, generation_config(tokenizer, decoding))


def own_decoding(given: Generation) -> dict[str, float]:
    """Return this project's decoding: the evaluated one, else the given one, else greedy."""
    if paths.EVALUATION.is_file():
        evaluated: dict[str, float] = json.loads(paths.EVALUATION.read_text())["decoding"]
        return evaluated
    settings = GREEDY if given.decoding == "auto" else given.decoding.model_dump()
    return {**settings, "max_new_tokens": given.max_new_tokens}


def settings_of(config: GenerationConfig) -> dict[str, float]:
    """Return a generation config as our settings and `max_new_tokens`; the reverse of `with_settings`."""
    given = {name: getattr(config, name, None) for name in SETTINGS}
    if not config.do_sample:
        given = dict.fromkeys(SETTINGS) | {"repetition_penalty": given["repetition_penalty"]}
    found = {name: GREEDY[name] if value is None else value for name, value in given.items()}
    return {**found, "max_new_tokens": int(config.max_new_tokens)}


def with_settings(config: GenerationConfig, settings: Mapping[str, float]) -> GenerationConfig:
    """Return a copy of a generation config with other settings; its end tokens stay."""
    changed = GenerationConfig.from_dict(config.to_dict())
    changed.update(**options(settings), max_new_tokens=int(settings["max_new_tokens"]))
    return changed


class _Streamed(TextStreamer):  # type: ignore[misc]
    """Texts of an answer, given on as soon as they are whole words."""

    def __init__(self, tokenizer: Any, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.take(text)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """An end that the reader of an answer asks for."""

    def __init__(self, asked: Event) -> None:
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


def answer(
    opened: Opened,
    question: str,
    instruction: str | None,
    take: Callable[[str], None],
    config: GenerationConfig | None = None,
    stop: Event | None = None,
) -> Said:
    """Answer a question, and give the text on as it is generated.

    Args:
        question: with its passage, as in training.
        instruction: None for the usual one.
        config: by default the model's own.
        stop: ends the answer when it is set.

    Raises:
        UserError: the question is empty, or contains a special token of the prompt.
    """
    config = config or opened.config
    ids = torch.tensor(
        [prompt_tokens(opened.tokenizer, question, instruction)], device=opened.model.device
    )
    texts: list[str] = []

    def both(text: str) -> None:
        texts.append(text)
        take(text)

    began = monotonic()
    with nullcontext() if opened.adapted else opened.model.disable_adapter():
        tokens = opened.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_Streamed(opened.tokenizer, both),
            stopping_criteria=[_Stopped(stop)] if stop else None,
        )[0, ids.shape[1] :].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ended = bool(tokens) and tokens[-1] in ends
    return Said("".join(texts).strip(), len(tokens), monotonic() - began, ended)
