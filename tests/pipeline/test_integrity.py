"""Damage in what a stage reads: DVC checks out what its cache holds without hashing it."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.project import Project

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def split(make_project: Callable[..., Project]) -> Project:
    """Make a project whose first two stages DVC has run."""
    project = make_project()
    project.commit_all()
    project.run("dvc", "repro", "split")
    return project


@pytest.fixture
def project(split: Project, tmp_path: Path) -> Project:
    """Copy it; its outputs are links to the copy's cache again."""
    shutil.copytree(split.folder, tmp_path / "project", symlinks=True)
    project = Project(tmp_path / "project")
    shutil.rmtree(project / "data/split")
    shutil.rmtree(project / "data/raw")
    project.run("dvc", "checkout", "data/raw", "data/split")
    return project


def flip(file: Path) -> None:
    """Flip a bit in a file, which keeps its inode and its time as on a failing disk."""
    was = file.stat()
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    file.chmod(was.st_mode)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


def format_stage(project: Project) -> subprocess.CompletedProcess[str]:
    return project.run("dvc", "repro", "format", check=False)


def way_out(stderr: str, after: str) -> list[str]:
    """Return the command that a message names after some words."""
    return stderr.split(after)[1].split("`")[1].split()


def test_a_flipped_bit_in_the_cache_is_found_and_the_way_out_leads_out(project: Project) -> None:
    file = project / "data/split/train.parquet"
    whole = file.read_bytes()
    assert file.stat().st_nlink > 1, "no link to the cache"
    flip(file)
    shutil.rmtree(project / "data/split")
    assert project.run("dvc", "checkout", "data/split").returncode == 0
    assert file.read_bytes() != whole, "DVC checks what it checks out: this test is of no use"
    done = format_stage(project)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "data/split/train.parquet: its md5 is" in done.stderr
    assert "as the stage split wrote it" in done.stderr
    assert not (project / "data/formatted").exists()
    by_hand = project.stage("format", check=False)
    assert by_hand.returncode == 1 and "DVC's cache is damaged" in by_hand.stderr
    project.run(*way_out(done.stderr, "remove it ("))
    project.run(*way_out(done.stderr, "or "))
    assert file.read_bytes() == whole
    assert format_stage(project).returncode == 0


def test_damage_outside_the_cache_is_found(project: Project) -> None:
    """Where DVC copies or clones files, the cache is whole."""
    file = project / "data/split/train.parquet"
    whole = file.read_bytes()
    project.run("dvc", "unprotect", "data/split")
    project.run("dvc", "status")  # DVC notes the copy's time
    flip(file)
    done = format_stage(project)
    assert done.returncode != 0 and "data/split/train.parquet: its md5 is" in done.stderr
    assert "cache is damaged" not in done.stderr
    project.run(*way_out(done.stderr, "wrote it; "))
    project.run("dvc", "checkout", "data/split")
    assert file.read_bytes() == whole
    assert format_stage(project).returncode == 0


def test_stages_run_by_hand_one_after_the_other(project: Project) -> None:
    """Their outputs are not those of dvc.lock, which only DVC writes; that is said, and no error."""
    project.set(split__seed=7)
    for path in (project / "data/split").iterdir():
        path.unlink()
    project.stage("split")
    done = project.stage("format")
    assert "note: data/split/" in done.stderr and (project / "data/formatted").exists()


def test_changed_parameters_and_data_are_no_damage(project: Project) -> None:
    project.set(split__seed=7)
    questions = project / "assets/demo-questions.jsonl"
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[3:]))
    assert format_stage(project).returncode == 0
