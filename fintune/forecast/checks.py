"""Checks of all that a run needs; each says what it found, and none stops the others."""

import logging
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fintune.data.prompt import load_tokenizer
from fintune.errors import UserError, explain, first_line
from fintune.evaluation.harness import task_manager
from fintune.evaluation.rows import general_passages
from fintune.export.gguf.convert import check_convertible
from fintune.export.gguf.llama_cpp import require_packages
from fintune.export.signature import signing_key
from fintune.forecast.workload import Sample, sources_of, take_sample
from fintune.generation.vllm import find_vllm
from fintune.hardware import size_text
from fintune.hub.models import check_base, check_positions, read_config_file
from fintune.lineage import in_no_commit, lacks_repository
from fintune.model.base import read_config
from fintune.model.conformance import agreement_of
from fintune.params import Base, Evaluate, Fetch, Format, MergeExport, Train
from fintune.paths import DVC_CONFIG

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of a check: `said` holds the way out as well."""

    status: Status
    what: str
    said: str


class Findings(list[Finding]):
    """The findings so far."""

    def check(self, what: str, look: Callable[[], str | None]) -> None:
        """Add what a check returns, what it warns of, and of what it fails."""
        warned = _Gathered()
        log = logging.getLogger("fintune")
        printed, log.propagate = log.propagate, False
        log.addHandler(warned)
        try:
            said = look()
        except UserError as error:
            self.append(Finding("problem", what, str(error)))
        except Exception as error:  # a check that breaks must not hide the others
            text = explain(error) or f"{type(error).__name__}: {first_line(error)}"
            self.append(Finding("problem", what, text))
        else:
            if said is not None:
                self.append(Finding("ok", what, said))
        finally:
            log.removeHandler(warned)
            log.propagate = printed
        self.extend(Finding("warning", what, line) for line in dict.fromkeys(warned.lines))

    def warn(self, what: str, said: str) -> None:
        """Add a warning."""
        self.append(Finding("warning", what, said))

    @property
    def problems(self) -> list[Finding]:
        """Return what would make the run fail."""
        return [each for each in self if each.status == "problem"]


class _Gathered(logging.Handler):
    """Warnings that are logged meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().removeprefix("warning: ").removeprefix("note: "))


def base_weights(base: Base) -> tuple[int, str]:
    """Return the size of a base's weights, and what it is."""
    size = check_base(base)
    where = "a folder" if base.is_folder else "on the hub, within reach"
    return size, f"{base.model}: {where}, {size_text(size)}"


def check_layout(base: Base, format_: Format, train: Train, export: MergeExport) -> tuple[Any, str]:
    """Check the base's positions, tokenizer and GGUF files; return its tokenizer, and how it is computed.

    Raises:
        UserError: one of them cannot be used.
    """
    config = read_config_file(base)
    check_positions(config, format_.max_tokens)
    tokenizer = load_tokenizer(base, train.end_token, format_.template)
    if export.gguf:
        require_packages()
        check_convertible(config, tokenizer)
    return tokenizer, str(agreement_of(read_config(base)))


def check_evaluation(evaluate: Evaluate) -> str:
    """Check the program that answers, the harness, the general text and the signing key; say which are used.

    Raises:
        UserError: one of them is not there, or cannot be used.
    """
    used = [f"engine {evaluate.engine}"]
    if evaluate.engine == "vllm":
        find_vllm()
    if evaluate.harness.tasks:
        task_manager(evaluate.harness)
        used.append(f"harness tasks {', '.join(evaluate.harness.tasks)}")
    if passages := general_passages(evaluate.general_text):
        used.append(f"{len(passages)} passages of {evaluate.general_text}")
    if evaluate.embedding:
        model = Base(model=evaluate.embedding.model, revision=evaluate.embedding.revision)
        used.append(f"embeddings of {base_weights(model)[1]}")
    return ", ".join([*used, *["signed"] * (signing_key() is not None)])


def check_sources(fetch: Fetch, root: Path) -> tuple[Sample, str]:
    """Read the first rows of all sources; return them, and what they are."""
    sample = Sample()
    for part in sources_of(fetch):
        take_sample(part, sample)
    if untracked := in_no_commit(root, [part.source for part in sources_of(fetch)]):
        logging.getLogger("fintune").warning(
            "%s: neither git nor DVC knows it: `dvc exp run --queue` and `--temp` run in a copy without it, "
            "and a clone lacks it; `git add` or `dvc add` it",
            ", ".join(untracked),
        )
    return sample, "\n".join(sample.said)


def check_room(base: Base, size: int, adapter: int, folder: Path) -> str:
    """Check the disk space: the merged model and DVC's copy, checkpoints, and a base from the hub.

    Raises:
        UserError: there is less than a run needs.
    """
    parts = {
        "merged model, and DVC's copy where it cannot link": 2 * size,
        "adapter and checkpoints": 4 * adapter,
    }
    if not base.is_folder:
        parts["the hub's base, unless it is cached"] = size
    needed, free = sum(parts.values()), shutil.disk_usage(folder).free
    listed = ", ".join(f"{size_text(count)} {name}" for name, count in parts.items())
    said = f"{size_text(needed)} needed, {size_text(free)} free ({listed})"
    if free < needed:
        raise UserError(
            f"{folder}: {said}; make room (`dvc gc -w` removes outputs of other experiments from the cache)"
        )
    return said


def check_repository(root: Path) -> str:
    """Check that DVC finds the git repository that it wants.

    Raises:
        UserError: it does not.
    """
    if lacks_repository(root):
        raise UserError(
            f"{root} is not a git repository, without which `dvc repro` refuses to run: clone the "
            "project, or run `git init && git add -A && git commit -m start`; without git, write "
            f"`no_scm = true` under [core] in {DVC_CONFIG[0]}"
        )
    return f"{root}"


def table(findings: Sequence[Finding], columns: int = 80) -> str:
    """Write findings as a table of at most so many columns."""
    width = max(len(each.what) for each in findings)
    lines = []
    for each in findings:
        head = f"{each.status:<7}  {each.what:<{width}}  "
        wrapped = [
            part
            for line in each.said.splitlines()
            for part in textwrap.wrap(line, columns - len(head)) or [""]
        ]
        lines += [f"{head if not i else ' ' * len(head)}{part}" for i, part in enumerate(wrapped)]
    return "\n".join(lines)
