"""Small copies of the project, run as users run it."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from support.zygote import Zygote

ROOT = Path(__file__).parents[2]
COPIED = ("fintune", "stages", "recipes", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/plots")

SAMPLED = {
    "temperature": 0.7,
    "top_p": 0.95,
    "min_p": 0.05,
    "top_k": 0,
    "repetition_penalty": 1.05,
}
# Small enough for seconds per stage, yet complete: 4 bits, LoRA, packing, a gate.
SMALL = {
    "base.model": "base",
    "format.max_tokens": 192,
    "train.lora.r": 4,
    "train.max_steps": 6,
    "train.rows_per_step": 8,
    "train.tokens_per_pass": 600,
    "train.validate_every_steps": 3,
    "evaluate.max_rows": 8,
    "evaluate.samples_per_prompt": 2,
    "generation.decoding": SAMPLED,
    "generation.max_new_tokens": 8,
    "evaluate.bootstrap_samples": 100,
    "merge_export.check_rows": 8,
    "merge_export.register": "always",  # so small a model passes no gate
}


@cache
def the_zygote() -> Zygote:
    """Start the zygote of this test process, once."""
    return Zygote()


class Project:
    """A copy of the project in a temporary folder, with small parameters, run as users run it.

    Stages and commands run in forks of a zygote, unless `real` asks for new interpreters.
    """

    def __init__(self, folder: Path, real: bool = False) -> None:
        self.folder = folder
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("MLFLOW_", "DVC_", "HF_", "GIT_"))
        }
        path = [str(Path(sys.executable).parent), os.environ["PATH"]]
        if not real:
            zygote = the_zygote()
            self.environment |= zygote.environment
            path.insert(0, zygote.path)
        self.environment["PATH"] = os.pathsep.join(path)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def set(self, **values: Any) -> None:
        """Change parameters; `__` in a name stands for a dot."""
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
        """Create a git repository, and commit everything."""
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
        """Run one stage without DVC."""
        return self.run("python", "-m", f"stages.{name}", check=check, **extra)
