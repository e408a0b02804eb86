"""The pipeline with format.template: base, from format to the exported folder."""

import json
from collections.abc import Callable

import pytest
from transformers import AutoTokenizer

from fintune.data import chat
from fintune.data.tables import read_rows
from support.project import Project

TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' ~ message.role ~ '|>\n' ~ message.content ~ eos_token ~ '\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.end_to_end
def test_a_chat_base_is_trained_judged_and_exported_in_its_own_layout(
    make_project: Callable[..., Project],
) -> None:
    project = make_project(format__template="base")
    tokenizer = AutoTokenizer.from_pretrained(project / "base")
    for stage in ("fetch", "split"):
        project.stage(stage)
    refused = project.stage("format", check=False)
    assert "has no chat template; set format.template: seed" in refused.stderr
    checked = project.run("python", "-m", "fintune", "check", check=False)
    assert checked.returncode and "problem  layers      format.template: " in checked.stdout

    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(project / "base")
    assert (
        "the base's own chat template; an answer ends with </s>" in project.stage("format").stderr
    )
    checked = project.run("python", "-m", "fintune", "check", check=False)
    assert checked.stderr.strip() == "error: 1 problem: repository"
    told = " ".join(checked.stdout.split())
    assert "is not a git" in told and "git init" in told
    (row, *_) = read_rows(project / "data/formatted/test.parquet", ["prompt", "completion"])
    messages = [
        {"role": "system", "content": row["instruction"]},
        {"role": "user", "content": row["input"]},
    ]
    assert row["prompt"] == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    for stage in ("train", "evaluate", "merge_export"):
        project.stage(stage)
    training = json.loads((project / "models/adapter/training.json").read_text())
    assert training["template"] == "base"
    exported = AutoTokenizer.from_pretrained(project / "models/merged")
    assert exported.chat_template == TEMPLATE and len(exported) == len(tokenizer)
    config = json.loads((project / "models/merged/generation_config.json").read_text())
    assert config["eos_token_id"] in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    card = (project / "models/merged/README.md").read_text()
    assert "`format.template: base`" in card and "ends with `</s>`" in card
    assert "<response>" not in card
    for model in ("models/merged", "models/adapter"):
        project.run(
            "python", "-m", "fintune", "ask", "--model", model, "--greedy", "What is a bond?"
        )
    assert chat.DAY not in row["prompt"]
