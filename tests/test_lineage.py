"""Inputs that are in no commit are found, so that a clone is not said to rebuild from them."""

import json
import subprocess
from pathlib import Path

import pytest

from fintune.lineage import in_no_commit, lacks_repository
from fintune.tracking.runs import describe_run


def test_inputs_in_no_commit(tmp_path: Path) -> None:
    root = tmp_path / "project"
    names = [
        "kept/a.csv",
        "new.csv",
        "ignored/b.csv",
        "by_dvc/c.csv",
        "deep/by_dvc/d.csv",
        "half/e",
    ]
    for name in [*names, "half/f", "../outside.csv"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / ".gitignore").write_text("ignored/\nby_dvc/\n")
    (root / "by_dvc.dvc").write_text("outs: []\n")
    (root / "deep/by_dvc/d.csv.dvc").write_text("outs: []\n")
    for arguments in (
        ["init", "--quiet"],
        ["add", "--force", "kept", "half/e", ".gitignore", "by_dvc.dvc", "deep/by_dvc/d.csv.dvc"],
    ):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    outside = str(tmp_path / "outside.csv")
    given = [*names, "kept", "half", "half/f", "owner/name", outside, "https://host/x.csv"]
    found = in_no_commit(root, given)
    assert found == ["new.csv", "ignored/b.csv", "half", "half/f", outside]


def test_a_run_names_its_source_that_is_in_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/my.csv").write_text("x")
    params = {"params.yaml": {"fetch": {"source": "data/my.csv"}}}
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {"fetch": {"params": params}}}))
    monkeypatch.setenv("DVC_STAGE", "train")

    def commit(*names: str) -> dict[str, str]:
        for arguments in (
            ["init", "--quiet"],
            ["add", *names],
            [
                *[
                    "-c",
                    "user.name=A",
                    "-c",
                    "user.email=a@example.org",
                    "commit",
                    "--quiet",
                    "-m",
                    "x",
                ]
            ],
        ):
            subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
        base = {"base": {"model": "owner/name", "revision": None}}
        tags: dict[str, str] = describe_run("1", base, "cpu", tmp_path)["tags"]
        return tags

    tags = commit("dvc.lock")
    assert (tags["inputs_in_no_commit"], tags["git_dirty"]) == ("data/my.csv", "true")
    tags = commit("data/my.csv")
    assert "inputs_in_no_commit" not in tags and tags["git_dirty"] == "false"


def test_a_folder_that_dvc_refuses_is_known(tmp_path: Path) -> None:
    """One without git, unless DVC was told to do without; a link to a repository counts as one."""
    assert lacks_repository(tmp_path)
    (tmp_path / ".dvc").mkdir()
    for text, lacking in (
        ("[core]\n    analytics = false\n", True),
        ("[core]\nno_scm = True\n", False),
    ):
        (tmp_path / ".dvc/config").write_text(text)
        assert lacks_repository(tmp_path) is lacking
    (tmp_path / ".dvc/config").unlink()
    (tmp_path / ".git").write_text("gitdir: elsewhere\n")
    assert not lacks_repository(tmp_path)
