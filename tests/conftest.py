"""Fixtures that several test modules share: a tiny base model and small copies of the project."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from fintune.params import Base
from fintune.prompts import load_tokenizer

ROOT = Path(__file__).parent.parent
COPIED = ("fintune", "stages", "recipes", "dvc.yaml", ".dvcignore", ".gitignore")

# Small enough for seconds a stage, with every part of the real thing: 4 bits, LoRA, packing, a gate.
SMALL = {
    "base.model": "base",
    "format.max_tokens": 192,
    "split.validation_fraction": 0.1,
    "train.lora.r": 4,
    "train.max_steps": 6,
    "train.rows_per_step": 8,
    "train.tokens_per_pass": 600,
    "train.validate_every_steps": 3,
    "evaluate.max_rows": 8,
    "evaluate.max_new_tokens": 8,
    "evaluate.sampling.rows": 2,
    "evaluate.bootstrap_samples": 100,
    "merge_export.check_rows": 8,
}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Mistral with the demo's tokenizer, saved as a folder."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/demo-base")
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    """The tiny base as the stages' parameters name it."""
    return Base(model=str(tiny_base), revision=None)


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> Any:
    """Its tokenizer with the two tokens."""
    return load_tokenizer(base)


class Project:
    """A copy of the project in a temporary folder, with small parameters, run as users run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("MLFLOW_", "DVC_", "HF_", "GIT_"))
        }
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def set(self, **values: Any) -> None:
        """Change parameters; `__` in a name stands for the dot."""
        self.set_all({key.replace("__", "."): value for key, value in values.items()})

    def set_all(self, values: dict[str, Any]) -> None:
        """Change parameters by dotted key."""
        yaml = YAML()
        path = self / "params.yaml"
        params = yaml.load(path.read_text())
        for key, value in values.items():
            *sections, last = key.split(".")
            section = params
            for name in sections:
                section = section[name]
            section[last] = value
        with path.open("w") as file:
            yaml.dump(params, file)

    def run(
        self, *command: str, check: bool = True, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy; `python` is this interpreter."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | extra,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{command} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
            )
        return done

    def commit_all(self) -> None:
        """Make it a git repository with everything in its first commit."""
        (self / "data/source/.gitkeep").touch()
        self.run("git", "init", "--quiet")
        for key, value in {
            "user.name": "A",
            "user.email": "a@example.org",
            "commit.gpgsign": "false",
        }.items():
            self.run("git", "config", key, value)
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "start")

    def stage(
        self, name: str, check: bool = True, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one stage by itself."""
        return self.run("python", "-m", f"stages.{name}", check=check, **extra)


@pytest.fixture(scope="session")
def make_project(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Project]:
    """Make a copy of the project with the tiny base and 300 of the demo's questions."""

    def make(**values: Any) -> Project:
        folder = tmp_path_factory.mktemp("project")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        shutil.copy(ROOT / "recipes/demo.yaml", folder / "params.yaml")
        (folder / "assets/demo-base").mkdir(parents=True)
        (folder / "assets/demo-base/README.md").write_text("Not used here: base.model is base.\n")
        (folder / "data/source").mkdir(parents=True)
        (folder / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
        shutil.copy(ROOT / "assets/general-text.jsonl", folder / "assets/general-text.jsonl")
        questions = (ROOT / "assets/demo-questions.jsonl").read_text().splitlines()[::6]
        (folder / "assets/demo-questions.jsonl").write_text("\n".join(questions) + "\n")
        shutil.copytree(tiny_base, folder / "base")
        project = Project(folder)
        project.set_all(SMALL)
        project.set(**values)
        return project

    return make
