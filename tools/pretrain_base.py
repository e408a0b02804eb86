"""Pretrain the small base model that ships with the project, from scratch, on plain text.

Documents are joined by practice texts (tools/practice.py): their sentences repeated in another order,
and fact sheets of made companies.

    python -m tools.pretrain_base --text .cache/text/beige_book.parquet \\
        --out assets/demo-base --compile

Takes about five minutes on a data-centre GPU. The output is a Hugging Face model folder with
tokenizer and card, moved into place when complete. Text: a .parquet file with a ``text`` column,
a .txt file, or a folder of such files.
"""

import argparse
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers

from tools.base_card import BEIGE_BOOK, history_rows, score_rows, write_card
from tools.base_model import PROMPT, Shape, make_model, score_folder
from tools.base_training import TrainingResult, TrainingSettings, train_model
from tools.byte_bpe import train_tokenizer
from tools.corpus import (
    BOS,
    SHARED_LENGTH,
    Documents,
    InputError,
    byte_count,
    encode_stream,
    read_documents,
    shared_share,
    split_documents,
    token_id,
)
from tools.ngram import score_ngrams
from tools.practice import practice_texts


@dataclass(frozen=True)
class Practice:
    """The numbers of repeated passages and of fact sheets that are added to the training part."""

    repeats: int
    sheets: int


def check_out(out: Path) -> None:
    """Refuse to replace anything but an empty folder or an earlier model.

    Raises:
        InputError: ``out`` is a file, or a folder with files but no config.json.
    """
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise InputError(f"{out}: holds something other than a model; choose another --out")


def pretrain(
    documents: Documents,
    out: Path,
    shape: Shape,
    settings: TrainingSettings,
    device: torch.device,
    source: str,
    command: str,
    practice: Practice,
) -> TrainingResult:
    """Train and score a model, write its card, and move the folder to ``out`` when complete.

    Practice texts are added to the training and the validation part; the test part is documents
    alone. ``source`` (a description of the text) and ``command`` are for the card.

    Raises:
        InputError: too little text, a loss that is not finite, or see ``check_out``.
    """
    check_out(out)
    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", flush=True)

    parts = split_documents(documents.texts)
    counts = {name: len(texts) for name, texts in parts.items()}
    for name in ("train", "validation"):
        share = counts[name] / counts["train"]
        sizes = (round(practice.repeats * share), round(practice.sheets * share))
        parts[name] += list(practice_texts(parts[name], *sizes, name))
    tokenizer = train_tokenizer(parts["train"], shape.vocab_size, shape.positions)
    backend = tokenizer.backend_tokenizer
    streams = {name: encode_stream(backend, texts) for name, texts in parts.items()}
    documents_alone = encode_stream(backend, parts["train"][: counts["train"]])
    if len(streams["train"]) <= settings.context:
        raise InputError(f"less than {settings.context} training tokens; lower --context")
    model = make_model(shape, tokenizer, settings.seed)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
    parameters = model.num_parameters()
    log(f"{len(streams['train']):,} training tokens; {parameters:,} parameters; on {device}")
    bos_id = token_id(backend, BOS)
    trained = train_model(model, streams["train"], streams["validation"], bos_id, settings, log)
    if not trained.best_weights:
        raise InputError("the validation loss was never finite; lower --learning-rate")
    # a fresh model, since the trained one has hooks and compiled layers
    final = make_model(shape, tokenizer, settings.seed)
    final.load_state_dict(trained.best_weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "made"
        final.to(torch.bfloat16).save_pretrained(made)  # type: ignore[arg-type]
        tokenizer.save_pretrained(made)
        folder_bytes = sum(file.stat().st_size for file in made.iterdir())
        log(f"{folder_bytes:,} bytes of model and tokenizer; scoring the test part")
        test_bytes = byte_count(parts["test"])
        score, sample = score_folder(made, streams["test"], settings.context, test_bytes, device)
        scores = {"this model": score}
        baseline = score_ngrams(
            documents_alone, streams["test"], shape.vocab_size, bos_id, test_bytes
        )
        scores |= {f"{order}-gram": figures for order, figures in baseline.items()}
        for name, figures in scores.items():
            log(f"{name}: {figures.bits_per_byte:.4f} bits/byte")
        seen = trained.best_step * settings.rows * settings.context
        facts = {
            **vars(shape),
            **vars(settings),
            **vars(trained),
            **vars(practice),
            **{f"{name}_documents": count for name, count in counts.items()},
            "practice_bytes": byte_count(parts["train"][counts["train"] :]),
            "history": history_rows(trained.history, 12),
            "parameters": parameters,
            "source": source,
            "command": command,
            "folder_bytes": folder_bytes,
            "empty": documents.empty,
            "repeated": documents.repeated,
            "train_bytes": byte_count(parts["train"]),
            "train_tokens": len(streams["train"]),
            "test_bytes": test_bytes,
            "test_tokens": score.tokens,
            "tokens_seen": seen,
            "epochs": seen / len(streams["train"]),
            "hardware": hardware(device),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
            "scores": score_rows(scores),
            "prompt": PROMPT,
            "sample": sample,
            "shared_percent": 100 * shared_share(documents_alone, streams["test"]),
            "shared_length": SHARED_LENGTH,
        }
        (made / "README.md").write_text(write_card(facts), encoding="utf-8")
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors makes its file readable only by the owner
        if out.exists():
            out.rename(Path(temporary) / "former")
        made.rename(out)
    log(f"wrote {out}")
    return trained


def hardware(device: torch.device) -> str:
    """Name the device, for the card."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"a CPU, {torch.get_num_threads()} threads"


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; the defaults are the settings of the shipped model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a file or a folder")
    parser.add_argument("--out", type=Path, required=True, help="folder; replaced when done")
    parser.add_argument("--source", help="what the text is and its licence, for the card")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile (for a GPU)")
    numbers: dict[str, int | float] = {
        "repeats": 6000,
        "sheets": 20000,
        "steps": 9000,
        "minutes": 5.0,
        "rows": 32,
        "context": 1024,
        "learning-rate": 2e-3,
        "warmup-steps": 200,
        "weight-decay": 0.1,
        "dropout": 0.1,
        "seed": 0,
        "log-steps": 100,
        "vocab-size": 6144,
        "hidden-size": 256,
        "intermediate-size": 768,
        "layers": 6,
        "heads": 4,
        "kv-heads": 2,
        "positions": 2048,
    }
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="%(default)s")
    args = parser.parse_args(argv)
    if args.context > args.positions:
        parser.error(f"--context {args.context} is more than --positions {args.positions}")
    if args.vocab_size % 64 or args.vocab_size < 320:
        parser.error(f"--vocab-size {args.vocab_size} is no multiple of 64 from 320 up")
    if args.steps < 1 or args.warmup_steps < 1 or args.log_steps < 1 or args.rows < 1:
        parser.error("--steps, --warmup-steps, --log-steps and --rows must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    """Read the text and pretrain the model; report input errors without a traceback."""
    given = sys.argv[1:] if argv is None else argv
    args = parse(given)
    source = args.source
    if source is None and args.text.stem == "beige_book":
        source = BEIGE_BOOK
    values = vars(args)
    shape = Shape(**{name: values[name] for name in Shape.__dataclass_fields__})
    names = TrainingSettings.__dataclass_fields__
    settings = TrainingSettings(**{name: values[name] for name in names})
    command = shlex.join(["python", "-m", "tools.pretrain_base", *given])
    try:
        documents = read_documents(args.text)
        unknown = "not described (`--source` was not given)"
        device = torch.device(args.device)
        practice = Practice(args.repeats, args.sheets)
        described = source or unknown
        pretrain(documents, args.out, shape, settings, device, described, command, practice)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
