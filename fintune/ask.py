"""Ask the tuned model in the terminal.

python -m fintune.ask "What is a bond?"                      # the merged model, answering as it is set up
python -m fintune.ask --model models/adapter --greedy "..."  # or the adapter, or NAME@ALIAS, or NAME/VERSION
python -m fintune.ask                                        # questions one after another, until Ctrl-D
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer
from transformers.utils.logging import disable_progress_bar

from fintune.answering import generation_config, load_tuned, prompt_tokens
from fintune.params import UserError, read_params
from fintune.prompts import Tokenizer

FOLDERS = ("models/merged", "models/adapter")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    arguments = parser.parse_args()
    disable_progress_bar()  # of loading, which is shorter than reading it
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, tokenizer, config = open_model(arguments.model)
    if config is None:
        config = generation_config(tokenizer, read_params().merge_export.generation)
    if arguments.greedy:
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    if arguments.question is not None:
        answer(model, tokenizer, config, arguments.question, arguments.instruction)
        return
    while (question := _next_question()) is not None:
        if not question.strip():
            continue
        try:
            answer(model, tokenizer, config, question, arguments.instruction)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print()


def open_model(source: str) -> tuple[Any, Tokenizer, GenerationConfig | None]:
    """Load a folder or a registered version: the model, its tokenizer and, if it says so, how it answers."""
    if Path(source).is_dir() or source in FOLDERS:
        return load(Path(source))
    from fintune.stage import project_root
    from fintune.tracking import connect, download_version

    with tempfile.TemporaryDirectory() as scratch:
        return load(download_version(connect(project_root()), source, Path(scratch)))


def load(folder: Path) -> tuple[Any, Tokenizer, GenerationConfig | None]:
    """The same of a folder."""
    model, tokenizer = load_tuned(folder)
    if not (folder / "generation_config.json").is_file():
        return model, tokenizer, None
    return model, tokenizer, GenerationConfig.from_pretrained(folder)


def answer(
    model: Any,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    question: str,
    instruction: str | None,
) -> None:
    """Print the answer as it is being made."""
    ids = torch.tensor([prompt_tokens(tokenizer, question, instruction)], device=model.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def _next_question() -> str | None:
    """What the user types, or pipes in, line by line; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


if __name__ == "__main__":
    from fintune.stage import run

    run(main)
