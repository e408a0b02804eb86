"""Write Ollama's description of a model beside a GGUF file."""

from collections.abc import Mapping
from pathlib import Path

from fintune.data.prompt import render_prompt
from fintune.errors import UserError
from fintune.generation.decoding import SETTINGS
from fintune.model.adapter import AdapterInfo

NAMES = {"repetition_penalty": "repeat_penalty"}  # where Ollama's differ from transformers'


def write_modelfile(
    file: Path, trained: AdapterInfo, decoding: Mapping[str, float], end_token: str
) -> Path:
    """Write `Modelfile` beside a GGUF file, for `ollama create NAME -f Modelfile`.

    Args:
        trained: its instruction is that of a question without one. Where the base's own chat template lays
            out the rows, TEMPLATE is left out: the file carries that template, of which Ollama knows many,
            and one in Ollama's own language cannot be derived from it.
        decoding: the settings and `max_new_tokens`, as evaluation.json has them.
        end_token: ends an answer.

    Raises:
        UserError: the instruction holds three quotation marks, which end a text there.
    """
    instruction = trained.instruction
    if '"""' in instruction:
        raise UserError(f"gguf: Ollama's Modelfile cannot express the instruction {instruction!r}")
    prompt = render_prompt("{{ .System }}", "{{ .Prompt }}")
    lines = [
        f"FROM ./{file.name}",
        *([f'TEMPLATE """{prompt}{{{{ .Response }}}}"""'] if trained.template == "seed" else []),
        *([f'SYSTEM """{instruction}"""'] if instruction or trained.template == "seed" else []),
        f"PARAMETER stop {end_token}",
        *(f"PARAMETER {NAMES.get(name, name)} {decoding[name]:g}" for name in SETTINGS),
        "PARAMETER repeat_last_n -1",
        f"PARAMETER num_predict {decoding['max_new_tokens']:g}",
    ]
    path = file.with_name("Modelfile")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
