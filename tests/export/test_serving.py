"""One tuned model, used in every way that README documents: each gives the same greedy answer.

Its base is the demo's, trained for some steps, so that its answers are sentences.
"""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import jinja2
import mlflow
import pandas as pd
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import metadata_load
from transformers import AutoTokenizer

from fintune.data.prompt import RESPONSE_END, encode, load_tokenizer, render_prompt
from fintune.data.tables import read_rows
from fintune.errors import UserError
from fintune.export.bom import write_bom
from fintune.export.card import read_records, write_card
from fintune.export.gguf.llama_cpp import llama_cpp_answers
from fintune.export.push import adapter_card
from fintune.export.pyfunc import PACKAGES
from fintune.export.verify import check_use
from fintune.generation.tuned import prompt_tokens
from fintune.integrity import hash_files, sha256
from fintune.model.adapter import read_training
from fintune.model.base import load_plain
from fintune.params import Base, read_params
from fintune.reports import whole
from fintune.tracking.models import model_of_run
from support.project import ROOT, SAMPLED, Project
from support.servers import free_port, running_server

pytestmark = pytest.mark.end_to_end

QUESTION = (
    "In 2009, Acme Foods reported rent of $5 million and cash of $7 million. What was the cash?"
)
PLAIN = """
import json, sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = sys.modules["fintune"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
message = [{"role": "user", "content": sys.argv[2]}]
prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
greedy = {"temperature": None, "top_p": None, "min_p": None, "top_k": None, "repetition_penalty": 1.0}
new = model.generate(**prompt, do_sample=False, **greedy)
new = new[0, prompt["input_ids"].shape[1]:].tolist()
print(json.dumps({
    "answer": tokenizer.decode(new, skip_special_tokens=True),
    "last": tokenizer.convert_ids_to_tokens(new[-1]),
    "decoding": {name: getattr(model.generation_config, name) for name in sys.argv[3:]},
}))
"""
PYFUNC = """
import json, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri("sqlite:///mlflow.db")
model = mlflow.pyfunc.load_model("models:/financial-qa@champion")
greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
one = model.predict(pd.DataFrame({"question": [sys.argv[1]]}), params=greedy)
two = model.predict(pd.DataFrame(
    {"question": ["How do I save?", sys.argv[1]], "instruction": ["Be brief.", None]}, index=[7, 9]
), params=greedy)
usual = model.predict(pd.DataFrame({"question": [sys.argv[1]]}))
named = model.predict(pd.DataFrame({"question": [sys.argv[1]]}), params=json.loads(sys.argv[2]))
hot = {"temperature": 2.0, "min_p": 0.0}
drawn = [model.predict(pd.DataFrame({"question": [sys.argv[1]]}), params=hot | {"seed": s})
         for s in (1, 1, 2)]
print(json.dumps({
    "one": one["answer"].tolist(), "two": two["answer"].tolist(), "index": two.index.tolist(),
    "drawn": [frame["answer"][0] for frame in drawn],
    "usual": usual["answer"][0], "named": named["answer"][0],
}))
"""


@pytest.fixture(scope="module")
def served(make_project: Callable[..., Project]) -> Project:
    """Train a model on the demo's base in a project, with a lenient gate."""
    project = make_project()
    shutil.rmtree(project / "base")
    shutil.copytree(ROOT / "assets/demo-base", project / "base")
    questions = (ROOT / "assets/demo-questions.jsonl").read_text().splitlines()
    read_off = [line for line in questions if json.loads(line)["kind"] == "read_off"]
    short = sorted(read_off, key=len)[:500]  # the model learns sooner to end what is short
    (project / "assets/demo-questions.jsonl").write_text("\n".join(short) + "\n")
    project.set_all(
        {
            "train.max_steps": 40,
            "train.rows_per_step": 12,
            "train.tokens_per_pass": "auto",
            "train.validate_every_steps": 40,
            "generation.max_new_tokens": 96,
            "evaluate.gate.min_stop_rate": None,
            "evaluate.gate.max_loop_rate": None,
            "evaluate.gate.min_accuracy_gain": None,
            "evaluate.gate.max_forgetting": None,
            "merge_export.gguf": ["f16", "q8_0"],
        }
    )
    for stage in ("fetch", "split", "format", "train", "evaluate", "merge_export"):
        project.stage(stage)
    return project


@pytest.fixture(scope="module")
def plain(served: Project) -> dict[str, Any]:
    """Generate from the merged folder with transformers alone."""
    done = served.run("python", "-c", PLAIN, "models/merged", QUESTION, *SAMPLED)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(found["answer"].split()) > 3
    return found


def environment_of(project: Project) -> dict[str, str]:
    return project.environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}"}


def program(name: str) -> str:
    return str(Path(sys.executable).absolute().parent / name)


def test_the_merged_model_ends_its_answers_and_decodes_as_it_was_measured(
    served: Project, plain: dict[str, Any]
) -> None:
    assert plain["last"] == RESPONSE_END
    assert plain["decoding"] == SAMPLED
    evaluated = json.loads((served / "reports/evaluation.json").read_text())["decoding"]
    assert SAMPLED.items() <= evaluated.items()


def test_ollama_is_told_the_same(served: Project) -> None:
    lines = (served / "models/merged/Modelfile").read_text().splitlines()
    said = dict(line.split()[1:] for line in lines if line.startswith("PARAMETER"))
    assert said.pop("stop") == RESPONSE_END and said.pop("num_predict") == "96"
    numbers = {name: float(value) for name, value in said.items()}
    assert numbers.pop("repeat_last_n") == -1
    assert numbers.pop("repeat_penalty") == SAMPLED["repetition_penalty"]
    assert numbers == {k: v for k, v in SAMPLED.items() if k != "repetition_penalty"}
    assert (served / "models/merged" / lines[0].removeprefix("FROM ./")).is_file()
    prompt = render_prompt("{{ .System }}", "{{ .Prompt }}") + "{{ .Response }}"
    assert f'TEMPLATE """{prompt}"""' in "\n".join(lines)


def test_the_chat_template_makes_the_training_prompts(served: Project) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served / "models/merged")
    trained_with = load_tokenizer(Base(model=str(served / "base"), revision=None), "new")
    rows = read_rows(served / "data/formatted/train.parquet", ["instruction", "input", "prompt"])
    for row in rows:
        expected = encode(trained_with, row["prompt"], "")[0]
        assert prompt_tokens(tokenizer, row["input"], row["instruction"]) == expected
    usual = pd.Series([row["instruction"] for row in rows]).mode()[0]
    as_usual = prompt_tokens(tokenizer, QUESTION, None)
    assert as_usual == prompt_tokens(tokenizer, QUESTION, usual)
    assert as_usual != prompt_tokens(tokenizer, QUESTION, "Be brief.")


def test_the_chat_template_reads_parts_of_text(served: Project) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served / "models/merged")

    def rendered(*messages: tuple[str, Any]) -> str:
        said = [{"role": role, "content": content} for role, content in messages]
        text: str = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        return text

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a bond?"}]
    assert rendered(("user", parts)) == rendered(("user", "What is a bond?"))
    asked = ("user", "What is a bond?")
    assert rendered(("developer", "Be brief."), asked) == rendered(("system", "Be brief."), asked)
    turns = (asked, ("assistant", None), asked)
    assert rendered(*turns).count("<response>") == 2
    with pytest.raises(jinja2.TemplateError, match="no messages of role tool are known"):
        rendered(asked, ("tool", "7"))
    with pytest.raises(
        jinja2.TemplateError, match="only text can be read, not a part of type image"
    ):
        rendered(("user", [{"type": "image_url", "image_url": {"url": "x"}}]))


def test_a_batch_is_padded_on_the_left(served: Project, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served / "models/merged")
    assert tokenizer.padding_side == "left"
    model = load_plain(served / "models/merged")
    prompts = [render_prompt("Answer.", text) for text in ("Why?", 20 * "What is a bond? ")]
    check_use(served / "models/merged", model, prompts)
    model.generation_config.temperature = -1.0
    model.generation_config.do_sample = True
    with pytest.raises(UserError, match="the exported folder cannot generate: "):
        check_use(served / "models/merged", model, prompts)
    model.generation_config.temperature = 1.0
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"padding changes the logits after .* by \d+\.\d%"):
        check_use(tmp_path, model, prompts)


@pytest.mark.parametrize("question", ["", " \n", "a <response> b", "a <response|end>"])
def test_what_is_no_question_is_refused(served: Project, question: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served / "models/merged")
    with pytest.raises(UserError, match=r"is empty|a token of the prompt"):
        prompt_tokens(tokenizer, question, None)


@pytest.mark.parametrize(
    "model", ["models/merged", "models/adapter", "financial-qa@champion", "financial-qa/1"]
)
def test_ask_gives_the_same_answer(served: Project, plain: dict[str, Any], model: str) -> None:
    done = served.run("python", "-m", "fintune", "ask", "--model", model, "--greedy", QUESTION)
    assert done.stdout == plain["answer"] + "\n"


def test_ask_answers_line_by_line(served: Project, plain: dict[str, Any]) -> None:
    """And an unusable question does not end the conversation."""
    done = subprocess.run(
        [sys.executable, "-m", "fintune", "ask", "--greedy"],
        cwd=served.folder,
        env=served.environment,
        input=f"{QUESTION}\n\nsay <response>\n{QUESTION}\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == 2 * (plain["answer"] + "\n")
    assert done.stderr.count("error: ") == 1 and "<response> stands in the text" in done.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("financial-qa@nobody", "financial-qa@nobody: not in this registry"),
        ("nothing", "nothing: no folder here; a registered version is NAME@ALIAS"),
        ("data", "neither a merged model nor an adapter is there; `dvc repro` makes both"),
        ("base", "not a model of this project: its tokenizer lacks the prompt"),
    ],
)
def test_ask_names_what_is_no_model(served: Project, model: str, message: str) -> None:
    done = served.run("python", "-m", "fintune", "ask", "--model", model, "x", check=False)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_mlflow_loads_the_champion(served: Project, plain: dict[str, Any], tmp_path: Path) -> None:
    done = served.run("python", "-c", PYFUNC, QUESTION, json.dumps(SAMPLED | {"seed": 0}))
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["one"] == [plain["answer"]]
    assert found["two"][1] == plain["answer"] and found["index"] == [7, 9]
    assert found["drawn"][0] == found["drawn"][1] != found["drawn"][2]
    assert found["usual"] == found["named"]


def test_the_mlflow_model_says_what_it_takes_and_needs(served: Project, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{served / 'mlflow.db'}")
    uri = "models:/financial-qa@champion"
    about = mlflow.models.get_model_info(uri)
    assert [(c.name, c.required) for c in about.signature.inputs] == [
        ("question", True),
        ("instruction", False),
    ]
    assert about.signature.outputs.input_names() == ["answer"]
    given = {param.name: param.default for param in about.signature.params}
    assert given == SAMPLED | {"max_new_tokens": 96, "seed": 0}
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    assert list(pd.read_json(folder / "input_example.json", orient="split")) == ["question"]
    names = {path.name for path in folder.rglob("*")}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert not [name for name in names if name.endswith((".pkl", ".bin", ".pt"))]
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert set(pins) == set(PACKAGES)
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
    assert {name: locked[name] for name in pins} == pins
    said = json.loads((folder / "training.json").read_text())
    assert said["base"] == {"model": "base", "revision": None}


def test_the_packages_are_those_that_answering_imports() -> None:
    """Read from the sources in the MLflow model: all that they import to generate answers."""
    ours, imported = {"fintune.export.pyfunc"}, set()
    waiting = [*ours]
    while waiting:
        tree = ast.parse((ROOT / f"{waiting.pop().replace('.', '/')}.py").read_text())
        for node in ast.walk(tree):
            found = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in found:
                if name.startswith("fintune."):
                    module = name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else None
                    waiting += [module] if module and module not in ours else []
                    ours.add(name)
                elif name != "fintune":
                    imported.add(name.split(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"triton"}  # torch's dependency on a GPU
    owners = packages_distributions()
    brought = {"mlflow-skinny", "mlflow-tracing", "pyarrow"}  # mlflow's dependencies
    others = {"datasets", "dvc", "fsspec"}  # which read data and run stages
    given = {normal(owners[name][0]) for name in outside}
    assert given - {normal(name) for name in PACKAGES} <= brought | others


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_mlflow_serves_the_champion(served: Project, plain: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    command = [program("mlflow"), "models", "serve", "-m", "models:/financial-qa@champion"]
    command += ["--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    log = served / "serve.log"
    with running_server(command, port, environment_of(served), log) as address:

        def invoke(question: str) -> Any:
            body = json.dumps({"dataframe_records": [{"question": question}]}).encode()
            headers = {"Content-Type": "application/json"}
            request = Request(f"{address}/invocations", body, headers)
            with urlopen(request, timeout=60) as response:
                return json.load(response)

        assert invoke(QUESTION) == {"predictions": [{"answer": plain["answer"]}]}
        with pytest.raises(HTTPError) as error:
            invoke(" ")
        assert (
            error.value.code == 400
            and "row 0: the question is empty" in error.value.read().decode()
        )


def test_an_openai_client_gets_the_same_answer(served: Project, plain: dict[str, Any]) -> None:
    """From `transformers serve`, at once and streamed."""
    from openai import OpenAI

    port = free_port()
    command = [program("transformers"), "serve", "models/merged"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    offline = served.environment | {"HF_HUB_OFFLINE": "1"}
    with running_server(command, port, offline, served / "openai.log") as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        asked: Any = {
            "model": "models/merged",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
        }
        whole = client.chat.completions.create(**asked).choices[0]
        assert (whole.message.content, whole.finish_reason) == (plain["answer"], "stop")
        chunks = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**asked, stream=True)
            if chunk.choices
        ]
    pieces = [chunk for chunk in chunks if chunk]
    assert "".join(pieces) == plain["answer"] and len(pieces) > 5


def test_transformers_server_keeps_the_longest_answer_of_a_request_alone() -> None:
    """As docs/use.md has it; its example sends `max_tokens`."""
    from transformers import GenerationConfig
    from transformers.cli.serving.chat_completion import ChatCompletionHandler

    handler: Any = object.__new__(ChatCompletionHandler)
    handler.generation_state = SimpleNamespace(_compile=False)
    measured = GenerationConfig(**SAMPLED, do_sample=True, max_new_tokens=64)
    for body, longest in (({}, 1024), ({"max_tokens": 64}, 64)):
        served = handler._build_generation_config(body, measured)
        assert served.max_new_tokens == longest
        assert all(getattr(served, key) == value for key, value in SAMPLED.items())
    assert '"max_tokens": 64' in (ROOT / "docs/use.md").read_text()


def test_llama_cpp_gives_the_same_answer(served: Project, plain: dict[str, Any]) -> None:
    file = served / "models/merged/financial-qa-f16.gguf"
    rows = read_rows(served / "data/formatted/train.parquet", ["instruction"])
    usual = pd.Series([row["instruction"] for row in rows]).mode()[0]
    (answer,) = llama_cpp_answers(file, [render_prompt(usual, QUESTION)], 96)
    assert answer.text.removesuffix(RESPONSE_END) == plain["answer"]
    report = json.loads((served / "reports/export.json").read_text())["gguf"]
    assert report["f16"]["equal_choices"] > 0.97 and report["q8_0"]["equal_choices"] > 0.93
    for kind, most in (("f16", 0.005), ("q8_0", 0.1)):
        assert abs(report[kind]["loss"] - report[kind]["folder_loss"]) < most
    assert report["f16"]["bytes"] == file.stat().st_size > 1.5 * report["q8_0"]["bytes"]


def test_the_card_states_facts(served: Project) -> None:
    card = served / "models/merged/README.md"
    about = metadata_load(card)
    text = card.read_text()
    assert about is not None and "license" not in about  # nobody gave one
    assert (
        "| licence of the base | cc0-1.0 |" in text
        and "| licence of the data | not stated |" in text
    )
    assert "| licence of this model | not stated" in text
    evaluation = whole(json.loads((served / "reports/evaluation.json").read_text()))
    export = json.loads((served / "reports/export.json").read_text())
    assert (
        export["merged_loss_in_4_bits"] > export["merged_loss"]
    )  # a small base learns in small steps
    record = json.loads((served / "models/run.json").read_text())
    manifest = json.loads((served / "data/raw/manifest.json").read_text())
    gain = evaluation["improvement"]["rouge_l"]
    for fact in (
        record["run_id"],
        record["tags"]["hardware"],
        manifest["sha256"],
        f"| train.learning_rate | {record['params']['train.learning_rate']} |",
        f"{export['merged_loss']:.4g} nats an answer token",
        f"{evaluation['tuned']['rouge_l']:.4g} | {gain['value']:.4g} ({gain['low']:.4g} to ",
        *(rule["reason"] for rule in evaluation["gate"]["rules"]),
        f"Loaded in 4 bits (NF4) it is {export['merged_loss_in_4_bits']:.4g}",
        f"as GGUF in q8_0 it is\n{export['gguf']['q8_0']['loss']:.4g} on",
    ):
        assert fact.replace("-0.", "−0.") in text or fact in text, fact
    assert "{{" not in text and "None" not in text
    mlflow.set_tracking_uri(f"sqlite:///{served / 'mlflow.db'}")
    model = model_of_run(mlflow.MlflowClient(), record["run_id"])
    assert model is not None
    files = mlflow.artifacts.download_artifacts(f"models:/{model.model_id}")
    adapter_card = (Path(files) / "README.md").read_text()
    assert metadata_load_text(adapter_card)["library_name"] == "peft"


def test_the_card_has_the_rate_that_a_search_found(
    served: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(served.folder)
    records, trained = read_records(), read_training(Path("models/adapter"))
    records["run"]["params"]["train.learning_rate"] = "auto"
    found = replace(trained, train=trained.train | {"learning_rate": 0.0012})
    write_card(tmp_path, found, records, None, read_params().merge_export)
    lines = (tmp_path / "README.md").read_text().splitlines()
    rates = [line for line in lines if line.startswith("| train.learning_rate |")]
    assert rates == ["| train.learning_rate | 0.0012 (auto) |"]


def metadata_load_text(text: str) -> Any:
    from huggingface_hub import RepoCard

    return RepoCard(text, ignore_metadata_errors=False).data.to_dict()


def test_a_pushed_adapter_gets_the_card_of_its_own_evaluation(
    served: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(served.folder)
    settings = read_params().merge_export
    assert not (served / "models/adapter/README.md").exists()
    card = adapter_card(Path("models/adapter"), settings)
    rouge = json.loads((served / "reports/evaluation.json").read_text())["tuned"]["rouge_l"]
    assert card is not None and f"| {rouge:.4g} |" in card.decode()
    assert metadata_load_text(card.decode())["library_name"] == "peft"
    record = json.loads((served / "models/run.json").read_text()) | {"run_id": "another"}
    (served / "another.json").write_text(json.dumps(record))
    monkeypatch.setattr("fintune.paths.RUN", served / "another.json")
    assert adapter_card(Path("models/adapter"), settings) is None


def test_the_bill_of_materials_is_valid_and_says_what_is_there(served: Project) -> None:
    folder = served / "models/merged"
    text = (folder / "bom.cdx.json").read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)  # with schemas of its package
    assert validator.validate_str(text) is None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    stated = {each["name"]: each["hashes"][0]["content"] for each in model["components"]}
    found = hash_files(folder)
    del found["bom.cdx.json"]
    assert stated == found
    parts = {each["bom-ref"]: each for each in bom["components"]}
    weights = parts["base"]["components"]
    assert weights and all(
        each["hashes"][0]["content"] == sha256(served / "base" / each["name"]) for each in weights
    )
    assert parts["data"]["hashes"][0]["content"] == sha256(served / "data/raw/qa.parquet")
    assert parts["library:torch"]["version"] == importlib.metadata.version("torch")
    assert {"library:safetensors", "hardware"} <= set(parts)
    figures = {
        (each["slice"], each["type"]): each["value"]
        for each in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    tuned = json.loads((served / "reports/evaluation.json").read_text())["tuned"]
    merged = json.loads((served / "reports/export.json").read_text())["merged_loss"]
    assert float(figures["test", "tuned.loss"]) == tuned["loss"]
    assert float(figures["export", "merged_loss"]) == merged


def test_the_same_model_has_the_same_bill_of_materials(
    served: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC hashes the folder: a time or a random serial number would be another output at each run."""
    monkeypatch.chdir(served.folder)
    shutil.copy(served / "models/merged/config.json", tmp_path)
    written = []
    for _ in range(2):
        write_bom(
            tmp_path, "a", read_training(Path("models/adapter")), read_records(), {}, {}, None
        )
        written.append((tmp_path / "bom.cdx.json").read_bytes())
    assert written[0] == written[1]


def test_each_of_a_base_s_files_has_its_own_hash_in_the_bill_of_materials(
    served: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the name of one, as a blob in the hub's cache, states its hash."""
    monkeypatch.chdir(served.folder)
    shutil.copy(served / "models/merged/config.json", tmp_path)
    base, stated = tmp_path / "base", "ab" * 32
    base.mkdir()
    (tmp_path / stated).write_bytes(b"4")
    (base / "model-00004.safetensors").symlink_to(tmp_path / stated)
    for number in (1, 2, 3):
        (base / f"model-0000{number}.safetensors").write_bytes(str(number).encode())
    trained = replace(
        read_training(Path("models/adapter")), base=Base(model=str(base), revision=None)
    )
    write_bom(tmp_path, "a", trained, read_records(), {}, {}, None)
    bom = json.loads((tmp_path / "bom.cdx.json").read_text())
    (described,) = [each for each in bom["components"] if each["bom-ref"] == "base"]
    found = {each["name"]: each["hashes"][0]["content"] for each in described["components"]}
    expected = {
        f"model-0000{n}.safetensors": sha256(base / f"model-0000{n}.safetensors") for n in (1, 2, 3)
    }
    assert found == expected | {"model-00004.safetensors": stated}


def test_the_sums_are_right(served: Project) -> None:
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    folder = served / "models/merged"
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True, check=False)
    listed = [line.split(":")[0] for line in done.stdout.splitlines()]
    present = [p.name for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS"]
    assert done.returncode == 0 and sorted(listed) == sorted(present)
