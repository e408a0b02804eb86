"""The parameters: one frozen, strict class for each section of params.yaml.

Keys whose value is the same in most projects may be left out. `read_params` validates the whole file at
every stage and reports every problem at once, so a typo in `train` is found before `fetch` runs.
"""

import contextlib
import difflib
import re
import typing
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fintune.errors import UserError

PARAMS_FILE = Path("params.yaml")
COMMIT = re.compile(r"[0-9a-f]{40}")
SECRET = re.compile(
    r"token|key|secret|sig|pass|pwd|auth|credential", re.IGNORECASE
)  # in a URL's query
# a method of pydantic's metaclass, which it takes for an attribute of MergeExport's parent
warnings.filterwarnings("ignore", 'Field name "register" in "MergeExport" shadows')
ALL_LINEAR: Literal["all-linear"] = "all-linear"
AUTO, VALUES = "(auto)", "(values)"  # tags of generation.decoding's two forms, left out of messages

Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
Rate = Annotated[float | Literal["auto"], PlainValidator(lambda value: _auto_or_rate(value))]


def _auto_or_rate(value: Any) -> Any:
    if value == "auto":
        return value
    if type(value) in (int, float) and 0 < value < float("inf"):
        return float(value)
    raise ValueError(f"give auto or a number above 0, not {value!r}")


def _auto_or_count(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"give auto or a number, not {value!r}")


class Section(BaseModel):
    """Base class of all sections: immutable, no unknown keys, no coercion between types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Columns(Section):
    """The source's columns that hold the three texts; `default_instruction` replaces a null instruction.

    More are optional: `context`, a text that the input asks about; `messages`, a conversation instead of the
    three; `result`, what of the output can be right or wrong; `kind`, by which the report breaks the metrics
    down; `split`, which says train, validation or test; and `group`, whose rows stay in one split.
    """

    instruction: Name | None = None
    input: Name | None = None
    output: Name | None = None
    context: Name | None = None
    messages: Name | None = None
    result: Name | None = None
    kind: Name | None = None
    split: Name | None = None
    group: Name | None = None

    @model_validator(mode="after")
    def _question_and_answer(self) -> "Columns":
        if self.messages is None and (self.input is None or self.output is None):
            raise ValueError("give input and output, or messages")
        return self


class Source(Section):
    """A source of question-answer records, its shape, and the share of its questions that is taken."""

    source: Name
    revision: Name | None = None
    config: Name | None = None
    split: Name = "train"
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    shape: Literal["auto", "columns", "messages"] = "auto"
    turns: Literal["last", "all"] = "last"
    columns: Columns
    default_instruction: Name | None = None

    @field_validator("source")
    @classmethod
    def _without_secrets(cls, source: str) -> str:
        parts = urlsplit(source)
        keys = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True)]
        if parts.scheme and ("@" in parts.netloc or any(SECRET.search(key) for key in keys)):
            raise ValueError(
                "holds a user name, a password or a token, which would be written to dvc.lock and model "
                "cards; use the storage's own environment variables, or download the file to data/source"
            )
        return source

    @model_validator(mode="after")
    def _instruction_from_somewhere(self) -> "Source":
        conversation = self.shape == "messages" or self.columns.messages is not None
        given = [self.columns.instruction, self.default_instruction]
        if not conversation and given.count(None) != 1:
            raise ValueError(
                "give either columns.instruction or default_instruction, and null for the other"
            )
        return self


class Fetch(Source):
    """The source of the records, perhaps more of them, and the handling of unusable rows."""

    more: list[Source] = []
    invalid_rows: Literal["drop", "refuse"] = "drop"


class Split(Section):
    """Held-out fractions of the questions, and the similarity from which two are near-duplicates.

    A null fraction holds out only the rows that `fetch.columns.split` assigns.
    """

    seed: Seed = 13
    validation_fraction: Fraction | None
    test_fraction: Fraction | None
    near_duplicate_similarity: Annotated[float, Field(ge=0.5, le=1)] | None = 0.7

    @model_validator(mode="after")
    def _something_left_to_train_on(self) -> "Split":
        if (self.validation_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on")
        return self


class Base(Section):
    """The base model: a local folder, or a hub id pinned to a commit."""

    model: Name
    revision: Name | None = None

    @property
    def is_folder(self) -> bool:
        """Return whether `model` names a local folder rather than a hub id."""
        return Path(self.model).is_dir()

    @model_validator(mode="after")
    def _pinned(self) -> "Base":
        if self.is_folder:
            return self
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.model):
            raise ValueError(
                f"model: {self.model} is neither a folder here nor a hub id (owner/name)"
            )
        if self.revision is None:
            raise ValueError(
                f"model: {self.model} is no folder here; if it is a hub id, set revision to one of "
                f"the commits at https://huggingface.co/{self.model}/commits"
            )
        if not COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"revision: {self.revision!r} can move between two stages; give a commit's "
                f"40 hex digits, from https://huggingface.co/{self.model}/commits"
            )
        return self


class Format(Section):
    """The layout of prompts and answers, the maximum length of a row in tokens, and longer rows' handling."""

    template: Literal["seed", "base"] = "seed"
    max_tokens: Annotated[int, Field(ge=16)]
    overlong: Literal["truncate", "drop"] = "truncate"


class Lora(Section):
    """LoRA's rank, scale (alpha / r), dropout and target layers, by name or all linear ones."""

    r: Count
    alpha: Annotated[int | float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[Name], Field(min_length=1)] | Literal["all-linear"] = ALL_LINEAR


# of `train`: where it is computed, and what is kept of it; a training goes on with other ones
PLACE = {"parallel", "processes", "checkpoint_every_steps"}


class Train(Section):
    """The fine-tuning run.

    Batch sizes are in rows. `parallel`, `processes`, `attention`, `kernels`, `checkpointing`, `dequantize`
    and `tokens_per_pass` affect how a step is computed, not what is learned; `products`, in which format the
    base's products are, does by some thousandths of a nat. `auto` chooses by hardware.
    """

    quantization: Literal["nf4", "none"] = "nf4"
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    lora: Lora
    learning_rate: Rate
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Positive = 1.0
    epochs: Positive
    max_steps: Count | None = None
    rows_per_step: Count
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    processes: Annotated[int | Literal["auto"], PlainValidator(_auto_or_count)] = "auto"
    attention: Literal["auto", "varlen", "sdpa", "padded"] = "auto"
    kernels: Literal["auto", "fused", "plain"] = "auto"
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    dequantize: Literal["auto", "once", "always"] = "auto"
    products: Literal["auto", "bfloat16", "fp8"] = "auto"
    tokens_per_pass: Annotated[int | Literal["auto"], PlainValidator(_auto_or_count)] = "auto"
    validate_every_steps: Count
    checkpoint_every_steps: Count | None = None
    early_stopping_patience: Count | None = None
    keep: Literal["best_loss", "best_answers", "last"] = "best_loss"
    end_token: Literal["new", "base"] = "new"
    seed: Seed = 0

    @model_validator(mode="after")
    def _fused_packs(self) -> "Train":
        if self.attention == "padded" and self.kernels == "fused":
            raise ValueError(
                "kernels: fused ones take packed rows; set plain, or another attention"
            )
        plain = self.kernels == "plain" or self.attention == "padded"
        if self.checkpointing == "selective" and plain:
            raise ValueError("checkpointing: selective needs kernels: fused; set none or full")
        return self

    @property
    def wanted_processes(self) -> int | str:
        """Return the number of processes, or `auto`."""
        return 1 if self.parallel == "none" else self.processes

    @model_validator(mode="after")
    def _none_is_one(self) -> "Train":
        if self.parallel == "none" and self.processes not in ("auto", 1):
            raise ValueError(
                f"processes: {self.processes} with parallel: none, which is one; set auto, ddp or fsdp"
            )
        return self


class Sampler(Section):
    """The values of a decoding: temperature 0 is greedy, top_k 0 and repetition_penalty 1 are off."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    min_p: Annotated[float, Field(ge=0, lt=1)]
    top_k: Annotated[int, Field(ge=0)]
    repetition_penalty: Positive


class Generation(Section):
    """Decoding of the tuned model, wherever it answers: measured, judged, shown and shipped.

    `auto` measures a list of decodings on validation rows and takes the best.
    """

    decoding: Annotated[
        Annotated[Literal["auto"], Tag(AUTO)] | Annotated[Sampler, Tag(VALUES)],
        Discriminator(lambda given: VALUES if isinstance(given, dict | Sampler) else AUTO),
    ] = "auto"
    max_new_tokens: Count

    @field_validator("decoding", mode="before")
    @classmethod
    def _auto_or_values(cls, given: Any) -> Any:
        if given != "auto" and not isinstance(given, dict | Sampler):
            keys = ", ".join(Sampler.model_fields)
            raise ValueError(f"give auto or {{{keys}}}, not {given!r}; temperature 0 is greedy")
        return given


class Embedding(Section):
    """The model that embeds answers and references to compare them: a folder, or a pinned hub id."""

    model: Name
    revision: Name | None

    @model_validator(mode="after")
    def _pinned(self) -> "Embedding":
        if not Path(self.model).is_dir() and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"model: {self.model} is no folder here; if it is a hub id, set revision to a "
                f"commit's 40 hex digits, not {self.revision!r}"
            )
        return self


class Harness(Section):
    """Tasks of lm-evaluation-harness for base and tuned model; an empty `tasks` runs none."""

    tasks: list[Name] = []
    include_path: Name | None = None
    limit: Count | None = None


class Gate(Section):
    """Rules that the tuned model must meet to become the champion; null disables a rule.

    With `strict`, a broken rule fails the stage after all outputs are written.
    """

    min_perplexity_reduction: Annotated[float, Field(ge=0, lt=1)] | None
    min_stop_rate: Share | None
    max_loop_rate: Share | None
    min_accuracy_gain: Annotated[float, Field(ge=-1, le=1)] | None
    max_forgetting: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    max_loss_above_champion: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    strict: bool = False


class Evaluate(Section):
    """The comparison of base, tuned model and champion on the test rows."""

    max_rows: Count | None
    samples_per_prompt: Count = 2
    engine: Literal["built_in", "vllm"] = "built_in"
    rows_per_batch: Annotated[int | Literal["auto"], PlainValidator(_auto_or_count)] = "auto"
    kernels: Literal["auto", "fused", "plain"] = "auto"
    products: Literal["bfloat16", "fp8"] = "bfloat16"
    embedding: Embedding | None = None
    general_text: Name | None
    champion: Annotated[str, Field(pattern=r"^[^/:@]+$")] | None = "registered"
    harness: Harness = Harness()
    bootstrap_samples: Count = 1000
    seed: Seed = 0
    gate: Gate

    def champion_of(self, registered: str) -> str | None:
        """Return the model whose champion is measured; `registered` is the one that is exported."""
        return registered if self.champion == "registered" else self.champion

    @model_validator(mode="after")
    def _fp8_is_built_in(self) -> "Evaluate":
        if self.products == "fp8" and (self.engine != "built_in" or self.kernels == "plain"):
            raise ValueError(
                "products: fp8: only engine: built_in with fused kernels has it; set bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _rules_have_something_to_judge(self) -> "Evaluate":
        if self.general_text is None and self.gate.max_forgetting is not None:
            raise ValueError("general_text is null, so gate.max_forgetting has to be null, too")
        if self.champion is None and self.gate.max_loss_above_champion is not None:
            raise ValueError(
                "champion is null, so gate.max_loss_above_champion has to be null, too"
            )
        return self


class MergeExport(Section):
    """The format of the merged model, and the registered name of the adapter.

    `weights` selects what the adapter is added to: `trained_on`, the weights that it was trained against
    (dequantised, for a 4-bit base), or `original`, the base's own. `register` says which models become a
    version: those that passed the gate, all, or none. `license` is the model's own: neither the
    base's nor the data's is.
    """

    weights: Literal["trained_on", "original"] = "trained_on"
    dtype: Literal["bfloat16", "float16", "float32"] = "float16"
    check_rows: Count = 64
    max_loss_difference: Positive = 0.02
    gguf: list[Literal["f16", "q8_0"]] = []
    registered_model: Annotated[str, Field(pattern=r"^[^/:@]+$")]
    register: Literal["passed", "always", "never"] = "passed"
    license: Name | None = None


class Params(Section):
    """The whole of params.yaml."""

    fetch: Fetch
    split: Split
    base: Base
    format: Format
    train: Train
    generation: Generation
    evaluate: Evaluate
    merge_export: MergeExport

    @model_validator(mode="after")
    def _held_out_rows_from_somewhere(self) -> "Params":
        named = any(part.columns.split for part in (self.fetch, *self.fetch.more))
        for key in ("validation_fraction", "test_fraction"):
            if getattr(self.split, key) is None and not named:
                raise ValueError(
                    f"split.{key}: null takes the rows that a column of the source assigns; "
                    "name it in fetch.columns.split, or give a fraction"
                )
        return self


def read_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate the whole parameter file.

    Raises:
        UserError: the file is missing, is not YAML, or has a wrong key, type or value; every problem is
            listed on its own line, with its dotted key.
    """
    raw = _load(path)
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
    lines = "\n".join(f"  {line}" for line in problems)
    raise UserError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}\n{lines}")


def with_usual(sections: dict[str, Any]) -> dict[str, Any]:
    """Return sections of a parameter file with the values that left-out keys have."""
    return {
        name: _filled(Params.model_fields[name].annotation, given)
        if name in Params.model_fields and isinstance(given, dict)
        else given
        for name, given in sections.items()
    }


def _filled(annotation: Any, given: dict[str, Any]) -> dict[str, Any]:
    sections = [kind for kind in _members(annotation) if issubclass(kind, Section)]
    found = dict(given)
    if not sections or sections[0] is Columns:  # there, null is nothing that is taken
        return found
    for key, field in sections[0].model_fields.items():
        if isinstance(value := given.get(key), dict):
            found[key] = _filled(field.annotation, value)
        elif not field.is_required() and key not in given:
            usual = field.default
            found[key] = usual.model_dump() if isinstance(usual, Section) else usual
    return found


def left_out(section: Section, prefix: str = "") -> dict[str, Any]:
    """Return the values of the keys that a parameter file leaves out, by dotted key."""
    found: dict[str, Any] = {}
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(section, Columns):
            continue  # there, null is nothing that is taken
        if key not in section.model_fields_set:
            found[prefix + key] = value.model_dump() if isinstance(value, Section) else value
        elif isinstance(value, Section):
            found |= left_out(value, f"{prefix}{key}.")
    return found


def read_name(path: Path = PARAMS_FILE) -> str | None:
    """Return merge_export.registered_model, after which MLflow's experiment is named; None without it.

    The experiment is where things are logged, not what is computed, so no stage depends on it.
    """
    with contextlib.suppress(UserError):
        section = _load(path).get("merge_export")
        name = section.get("registered_model") if isinstance(section, dict) else None
        return name if isinstance(name, str) else None
    return None


def read_valid_sections(path: Path) -> dict[str, Any]:
    """Read the sections that are valid by themselves; `check` looks at them, whatever the others hold."""
    found = {}
    for name, given in _load(path).items():
        field = Params.model_fields.get(name)
        with contextlib.suppress(ValidationError):
            if field and isinstance(field.annotation, type):
                found[name] = field.annotation.model_validate(given)
    return found


def _load(path: Path) -> dict[str, Any]:
    """Load a parameter file.

    Like DVC, this parses with ruamel.yaml, so the `3e-05` that `dvc exp run -S` writes is a number.
    """
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found in {Path.cwd()}; run from the project's root, "
            f"or begin with `cp recipes/demo.yaml {path}`"
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: empty or not a mapping; begin with `cp recipes/demo.yaml {path}`")
    return raw


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping's leaves by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, dict)
        leaves |= flatten(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return leaves


def _describe(problem: Any) -> str:
    """Format a problem as `dotted.key: problem, not value`; for an unknown key, suggest a near match."""
    path = [str(part) for part in problem["loc"] if part not in (AUTO, VALUES)]
    key = ".".join(path)
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _keys_at(path[:-1]), n=1, cutoff=0.5)
            return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        case "model_type" | "dict_type":
            return f"{key}: {problem['input']!r} where keys are expected"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}".removeprefix(": ")
    return f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _keys_at(path: list[str]) -> list[str]:
    """Return the keys of the section at `path`."""
    section: type[BaseModel] = Params
    for part in path:
        if part.isdigit():  # a place in a list
            continue
        annotation: Any = section.model_fields[part].annotation
        section = next(kind for kind in _members(annotation) if issubclass(kind, BaseModel))
    return list(section.model_fields)


def _members(annotation: Any) -> list[type]:
    """Return the classes in a union, or the class itself."""
    inside = [kind for part in typing.get_args(annotation) for kind in _members(part)]
    return inside or [annotation] * isinstance(annotation, type)
