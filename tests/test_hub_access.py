"""Data sets and bases from the hub, through the real stages: pinned, refused, cut off, offline.

The hub is tests/hub.py. Every cache lies in a temporary folder that the test names, cold or warm.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Project
from hub import Hub

from fintune.params import Base
from fintune.prompts import format_row, load_tokenizer
from fintune.records import SPLITS, write_rows

pytestmark = pytest.mark.end_to_end

OLD, NEW, UNKNOWN = "a" * 40, "b" * 40, "c" * 40
OLD_ROWS = [
    {"instruction": "Answer.", "input": f"What is bond {i}?", "output": f"Bond {i} is a loan."}
    for i in range(3)
]
NEW_ROWS = [{**row, "output": row["output"] + " It pays interest."} for row in OLD_ROWS[:2]]
LISTED, UNLISTED, INVALID = "hf_listedAAAA", "hf_unlistedBBBB", "hf_invalidCCCC"
FORMER = {"qa.parquet": b"former rows", "manifest.json": b"former manifest"}

MakeProject = Callable[..., Project]
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def hub(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Data sets and bases at two revisions each, where `main` is the newer; gated and odd ones at one."""
    old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
    pq.write_table(pa.Table.from_pylist(OLD_ROWS), old / "train.parquet")
    pq.write_table(pa.Table.from_pylist(NEW_ROWS), new / "train.parquet")
    letters = tmp_path_factory.mktemp("letters")
    for file in tiny_base.iterdir():
        (letters / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((letters / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []  # a token for every letter
    (letters / "tokenizer.json").write_text(json.dumps(tokenizer))
    pickled = tmp_path_factory.mktemp("pickled")
    for file in tiny_base.glob("*.json"):
        (pickled / file.name).write_bytes(file.read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"runs code when loaded")
    with Hub() as hub:
        hub.add("datasets", "acme/qa", old, revision=OLD)
        hub.add("datasets", "acme/qa", new, revision=NEW)
        hub.add("datasets", "acme/gated", old, revision=OLD)
        hub.add("datasets", "acme/cut", old, revision=OLD)
        hub.add("models", "acme/tiny", tiny_base, revision=OLD)
        hub.add("models", "acme/tiny", letters, revision=NEW)
        hub.add("models", "acme/gated", tiny_base, revision=OLD)
        hub.add("models", "acme/pickled", pickled, revision=OLD)
        for kind in ("datasets", "models"):
            hub.gate(kind, "acme/gated", token=LISTED, accepted=True)
            hub.gate(kind, "acme/gated", token=UNLISTED, accepted=False)
        yield hub


def refusal(done: Done) -> str:
    """The one message of a stage that refused."""
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    return output[output.index("error: ") :]


def fetched(project: Project) -> tuple[list[dict[str, str]], dict[str, object]]:
    manifest = json.loads((project / "data/raw/manifest.json").read_text())
    return pq.read_table(project / "data/raw/qa.parquet").to_pylist(), manifest


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def keeps_token_to_itself(project: Project, token: str, done: Done) -> bool:
    texts = [done.stdout.encode(), done.stderr.encode(), *files(project.folder).values()]
    return not any(token.encode() in text for text in texts)


class TestDataSet:
    def test_a_pinned_revision_gives_its_rows(
        self, hub: Hub, make_project: MakeProject, tmp_path: Path
    ) -> None:
        """Cold, with a cache that the other revision has warmed, and offline with both in the cache."""
        project = make_project(fetch__source="acme/qa")
        environment = hub.environment(tmp_path / "home")
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        for revision, rows, how in (
            (OLD, OLD_ROWS, environment),
            (NEW, NEW_ROWS, environment),
            (OLD, OLD_ROWS, offline),
        ):
            project.set(fetch__revision=revision)
            before = len(hub.requests)
            project.stage("fetch", **how)
            got, manifest = fetched(project)
            assert got == rows
            assert (manifest["source"], manifest["revision"]) == ("acme/qa", revision)
            assert manifest["rows"] == manifest["rows_read"] == len(rows)
            assert (len(hub.requests) == before) == (how is offline)

        project.set(fetch__revision=UNKNOWN)
        message = refusal(project.stage("fetch", check=False, **offline))
        assert "not in the local cache" in message
        assert "HF_HUB_OFFLINE" in message and UNKNOWN in message
        message = refusal(project.stage("fetch", check=False, **environment))
        assert f"acme/qa has no revision {UNKNOWN}" in message
        assert fetched(project) == (got, manifest)

    def test_main_is_resolved_to_a_commit(
        self, hub: Hub, make_project: MakeProject, tmp_path: Path
    ) -> None:
        project = make_project(fetch__source="acme/qa", fetch__revision="main")
        project.stage("fetch", **hub.environment(tmp_path / "home"))
        rows, manifest = fetched(project)
        assert (rows, manifest["revision"]) == (NEW_ROWS, NEW)

    @pytest.mark.parametrize(
        ("parameters", "expected"),
        [
            ({"fetch.revision": None}, ["fetch.revision", f"revision: {NEW}"]),
            ({"fetch.revision": UNKNOWN}, ["no revision", UNKNOWN, "/datasets/acme/qa/commits"]),
            ({"fetch.source": "acme/nothing"}, ["acme/nothing", "not on the hub", "HF_TOKEN"]),
            ({"fetch.split": "tests"}, ["acme/qa", OLD, "tests", "train"]),
            ({"fetch.columns.output": "outptu"}, ["fetch.columns.output", "did you mean output?"]),
        ],
        ids=["no revision", "unknown revision", "unknown data set", "unknown split", "no column"],
    )
    def test_a_mistake_is_explained_and_the_former_rows_stay(
        self,
        hub: Hub,
        make_project: MakeProject,
        tmp_path: Path,
        parameters: dict[str, str | None],
        expected: list[str],
    ) -> None:
        project = make_project(fetch__source="acme/qa", fetch__revision=OLD)
        project.set_all(parameters)
        (project / "data/raw").mkdir()
        for name, content in FORMER.items():
            (project / "data/raw" / name).write_bytes(content)
        done = project.stage("fetch", check=False, **hub.environment(tmp_path / "home"))
        message = refusal(done)
        assert all(part in message for part in expected), message
        assert files(project / "data/raw") == FORMER

    def test_a_gate_opens_to_the_right_token_alone(
        self, hub: Hub, make_project: MakeProject, tmp_path: Path
    ) -> None:
        project = make_project(fetch__source="acme/gated", fetch__revision=OLD)
        page = f"{hub.url}/datasets/acme/gated"
        for token, expected in (
            ("", ["acme/gated is gated", page, "set HF_TOKEN"]),
            (INVALID, ["HF_TOKEN is not valid", page]),
            (UNLISTED, ["HF_TOKEN's account has no access", page, "wait for approval"]),
        ):
            environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": token}
            done = project.stage("fetch", check=False, **environment)
            message = refusal(done)
            assert all(part in message for part in expected), message
            assert not (project / "data/raw").exists()
            assert not token or keeps_token_to_itself(project, token, done)
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": LISTED}
        done = project.stage("fetch", **environment)
        assert fetched(project)[0] == OLD_ROWS
        assert keeps_token_to_itself(project, LISTED, done)

    def test_a_broken_download_leaves_nothing_and_is_gone_on_with(
        self, hub: Hub, make_project: MakeProject, tmp_path: Path
    ) -> None:
        project = make_project(fetch__source="acme/cut", fetch__revision=OLD)
        environment = hub.environment(tmp_path / "home")
        hub.cut("acme/cut", "train.parquet", after_bytes=100)
        message = refusal(project.stage("fetch", check=False, **environment))
        assert "acme/cut" in message and "run it again" in message
        assert not (project / "data/raw").exists()
        message = refusal(
            project.stage("fetch", check=False, **environment | {"HF_HUB_OFFLINE": "1"})
        )
        assert "not in the local cache" in message
        hub.mend()
        project.stage("fetch", **environment)
        assert fetched(project)[0] == OLD_ROWS


@pytest.fixture
def split_project(make_project: MakeProject) -> Project:
    """A project where the split stage has run; the base is to be taken from the hub."""
    project = make_project(base__model="acme/tiny", base__revision=OLD)
    for split in SPLITS:
        write_rows(project / f"data/split/{split}.parquet", OLD_ROWS)
    return project


def token_counts(project: Project) -> list[int]:
    """Tokens of each formatted training row."""
    return pq.read_table(project / "data/formatted/train.parquet")["tokens"].to_pylist()


class TestBase:
    def test_the_tokenizer_is_that_of_the_pinned_revision(
        self, hub: Hub, split_project: Project, tiny_base: Path, tmp_path: Path
    ) -> None:
        """Cold, and offline with the cache that this left."""
        tokenizer = load_tokenizer(Base(model=str(tiny_base), revision=None))
        expected = [
            row["tokens"]
            for row, _ in (format_row(tokenizer, row, 192, "truncate") for row in OLD_ROWS)
            if row
        ]
        environment = hub.environment(tmp_path / "home")
        split_project.stage("format", **environment)
        assert token_counts(split_project) == expected
        # Neither the weights of this revision nor anything of another is loaded for the tokenizer.
        loaded = {request.path for request in hub.requests if request.path.startswith("/acme/tiny")}
        assert f"/acme/tiny/resolve/{OLD}/tokenizer.json" in loaded
        assert f"/acme/tiny/resolve/{OLD}/model.safetensors" not in loaded
        assert not any(NEW in path or "main" in path for path in loaded)

        split_project.set(base__revision=NEW)
        split_project.stage("format", **environment)
        letters = token_counts(split_project)
        assert all(many > few for many, few in zip(letters, expected, strict=True))

    @pytest.mark.parametrize(
        ("parameters", "expected"),
        [
            (
                {"base.revision": UNKNOWN},
                ["acme/tiny has no revision", UNKNOWN, "/acme/tiny/commits"],
            ),
            ({"base.revision": "main"}, ["base: revision: 'main' can move", "acme/tiny/commits"]),
            ({"base.revision": None}, ["base: model: acme/tiny", "set revision"]),
            ({"base.model": "acme/nothing"}, ["acme/nothing", "not on the hub", "HF_TOKEN"]),
            ({"base.model": "acme/pickled"}, ["acme/pickled", "no safetensors weights", OLD]),
        ],
        ids=["unknown revision", "branch", "no revision", "unknown model", "no safetensors"],
    )
    def test_a_mistake_is_explained_before_formatting(
        self,
        hub: Hub,
        split_project: Project,
        tmp_path: Path,
        parameters: dict[str, str | None],
        expected: list[str],
    ) -> None:
        split_project.set_all(parameters)
        done = split_project.stage("format", check=False, **hub.environment(tmp_path / "home"))
        message = refusal(done)
        assert all(part in message for part in expected), message
        assert not (split_project / "data/formatted").exists()

    def test_a_gate_opens_to_the_right_token_alone(
        self, hub: Hub, split_project: Project, tmp_path: Path
    ) -> None:
        split_project.set(base__model="acme/gated")
        for token, expected in (
            ("", ["acme/gated is gated", "set HF_TOKEN"]),
            (INVALID, ["HF_TOKEN is not valid"]),
            (UNLISTED, ["HF_TOKEN's account has no access", "wait for approval"]),
        ):
            environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": token}
            done = split_project.stage("format", check=False, **environment)
            message = refusal(done)
            assert all(part in message for part in (*expected, f"{hub.url}/acme/gated")), message
            assert not (split_project / "data/formatted").exists()
            assert not token or keeps_token_to_itself(split_project, token, done)
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": LISTED}
        done = split_project.stage("format", **environment)
        assert token_counts(split_project)
        assert keeps_token_to_itself(split_project, LISTED, done)
