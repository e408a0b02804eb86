"""Fixtures shared by several test modules: a tiny base model and small copies of the project."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several workers share the cores

import mlflow
import pytest
import torch
from hypothesis import HealthCheck, settings
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from fintune.data.prompt import load_tokenizer
from fintune.params import Base
from support.project import COPIED, ROOT, SMALL, Project

# The same examples at each run; the profile fuzz tries other ones, and many more.
CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("tests", derandomize=True, database=None, **CHECKS)
settings.register_profile("fuzz", max_examples=20_000, print_blob=True, **CHECKS)
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, so that the tests are the same on any machine; `-m gpu` runs those that need one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests, so that the workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("end_to_end") is None)


def pytest_collection_finish() -> None:
    """Take what has been imported out of the full collections: accelerate runs one after each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random two-layer Mistral with the demo's tokenizer."""
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
    """Return the tiny base as a parameter section."""
    return Base(model=str(tiny_base), revision=None)


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> Any:
    """Load the tiny base's tokenizer with the two special tokens."""
    return load_tokenizer(base, "new")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an MLflow database once: its migrations take a second."""
    folder = tmp_path_factory.mktemp("store")
    SqlAlchemyStore(f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artifacts"))
    return folder / "mlflow.db"


@pytest.fixture
def client(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Connect to an MLflow store in a folder of its own, with experiment 1; work there."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = MlflowClient()
    client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id="1")  # not one of another test's store
    return client


@pytest.fixture(scope="session")
def make_project(
    tiny_base: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Project]:
    """Return a function that copies the project with the tiny base and a seventh of the demo's questions."""

    def make(real: bool = False, **values: Any) -> Project:
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
        shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
        shutil.copy(ROOT / "assets/general-text.jsonl", folder / "assets/general-text.jsonl")
        questions = (ROOT / "assets/demo-questions.jsonl").read_text().splitlines()[::7]
        (folder / "assets/demo-questions.jsonl").write_text("\n".join(questions) + "\n")
        shutil.copytree(tiny_base, folder / "base")
        project = Project(folder, real)
        if not real:
            shutil.copy(empty_store, folder / "mlflow.db")
        project.set_all(SMALL)
        project.set(**values)
        return project

    return make
