"""Ask the tuned model in the terminal.

python -m fintune ask "What is a bond?"                      # the merged model, with its own settings
python -m fintune ask --model models/adapter --greedy "..."  # an adapter, NAME@ALIAS or NAME/VERSION
python -m fintune ask                                        # one question after another, until Ctrl-D
"""

import argparse
import logging
import sys

from fintune import paths
from fintune.errors import UserError
from fintune.params import read_params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the question, the model and decoding."""
    parser.add_argument("question", nargs="?", help="without one, a prompt for many opens")
    parser.add_argument(
        "--model",
        default=str(paths.MERGED),
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
    from fintune.usage.models import answer, open_model

    disable_progress_bar()  # loading is over before anyone can read it
    logging.getLogger("transformers").setLevel(logging.ERROR)
    opened = open_model(given.model, lambda: read_params().generation)
    if given.greedy:
        opened.config.update(**options(GREEDY))

    def print_answer(question: str) -> None:
        answer(opened, question, given.instruction, lambda text: print(text, end="", flush=True))
        print()

    if given.question is not None:
        print_answer(given.question)
        return
    while (question := _next_question()) is not None:
        if not question.strip():
            continue
        try:
            print_answer(question)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print()


def _next_question() -> str | None:
    """Read the next typed or piped line; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None
