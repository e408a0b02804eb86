"""Ask the tuned model in the terminal.

python -m fintune ask "What is a bond?"                      # the merged model, with its own settings
python -m fintune ask --model models/adapter --greedy "..."  # an adapter, NAME@ALIAS or NAME/VERSION
python -m fintune ask                                        # one question after another, until Ctrl-D
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.errors import UserError
from fintune.integrity import check_outputs
from fintune.params import Generation, read_params

FOLDERS = (str(paths.MERGED), str(paths.ADAPTER))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the question, the model and decoding."""
    parser.add_argument("question", nargs="?", help="without one, a prompt for many opens")
    parser.add_argument(
        "--model",
        default=FOLDERS[0],
        help="a folder, NAME@ALIAS or NAME/VERSION; default: %(default)s",
    )
    parser.add_argument("--instruction", help="default: the one that most training rows had")
    parser.add_argument(
        "--greedy", action="store_true", help="the most likely answer, not a drawn one"
    )


def main(given: argparse.Namespace) -> None:
    """Print the answer to the given question, or to each one that is typed or piped in."""
    from transformers.utils.logging import disable_progress_bar

    from fintune.generation.decoding import GREEDY, options
    from fintune.generation.tuned import generation_config

    disable_progress_bar()  # loading is over before anyone can read it
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, tokenizer, config = open_model(given.model)
    if config is None:
        config = generation_config(tokenizer, own_decoding(read_params().generation))
    if given.greedy:
        config.update(**options(GREEDY))
    if given.question is not None:
        print_answer(model, tokenizer, config, given.question, given.instruction)
        return
    while (question := _next_question()) is not None:
        if not question.strip():
            continue
        try:
            print_answer(model, tokenizer, config, question, given.instruction)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print()


def own_decoding(given: Generation) -> dict[str, float]:
    """Return this project's decoding: the evaluated one, else the given one, else greedy."""
    from fintune.generation.decoding import GREEDY

    if paths.EVALUATION.is_file():
        evaluated: dict[str, float] = json.loads(paths.EVALUATION.read_text())["decoding"]
        return evaluated
    settings = GREEDY if given.decoding == "auto" else given.decoding.model_dump()
    return {**settings, "max_new_tokens": given.max_new_tokens}


def open_model(source: str) -> tuple[Any, Any, Any]:
    """Load a model from a folder or a registered version.

    Returns:
        The model, its tokenizer, and its generation config or None.
    """
    if Path(source).is_dir() or source in FOLDERS:
        return load(Path(source))
    from fintune.lineage import project_root
    from fintune.registry.versions import download_version
    from fintune.tracking.client import connect

    with tempfile.TemporaryDirectory() as scratch:
        return load(download_version(connect(project_root()), source, Path(scratch)))


def load(folder: Path) -> tuple[Any, Any, Any]:
    """Load a model from a folder; returns the same as `open_model`."""
    from transformers import GenerationConfig

    from fintune.export.signature import check_folder
    from fintune.generation.tuned import load_tuned

    if folder.is_dir():
        check_folder(folder)
    if folder == paths.ADAPTER:  # the merged model has a SHA256SUMS
        check_outputs([folder], strict=False)
    model, tokenizer = load_tuned(folder)
    if not (folder / "generation_config.json").is_file():
        return model, tokenizer, None
    return model, tokenizer, GenerationConfig.from_pretrained(folder)


def print_answer(
    model: Any, tokenizer: Any, config: Any, question: str, instruction: str | None
) -> None:
    """Generate and print the answer token by token."""
    import torch
    from transformers import TextStreamer

    from fintune.generation.tuned import prompt_tokens

    ids = torch.tensor([prompt_tokens(tokenizer, question, instruction)], device=model.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def _next_question() -> str | None:
    """Read the next typed or piped line; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None
