"""Data sets and bases from the hub, through the real stages: pinned, refused, interrupted, offline.

The hub is tests/support/hub.py. Every test has its own cache, empty at first.
"""

import gzip
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import snapshot_download

from fintune.data.formatting import format_row
from fintune.data.prompt import load_tokenizer
from fintune.data.tables import SPLITS, write_rows
from fintune.params import Base
from support.hub import Hub
from support.project import Project

pytestmark = pytest.mark.end_to_end

OLD, NEW, UNKNOWN = "a" * 40, "b" * 40, "c" * 40
OLD_ROWS = [
    {"instruction": "Answer.", "input": f"What is bond {i}?", "output": f"Bond {i} is a loan."}
    for i in range(3)
]
NEW_ROWS = [{**row, "output": row["output"] + " It pays interest."} for row in OLD_ROWS[:2]]
LISTED, UNLISTED, INVALID = "hf_listedAAAA", "hf_unlistedBBBB", "hf_invalidCCCC"
FORMER = {"manifest.json": b"former manifest", "qa.parquet": b"former rows"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}

MakeProject = Callable[..., Project]
Environment = dict[str, str]
THREE_COLUMNS: dict[str, Any] = {
    "fetch__columns": {"instruction": "instruction", "input": "input", "output": "output"},
    "split__validation_fraction": 0.1,
    "split__test_fraction": 0.1,
}


@pytest.fixture(scope="module")
def hub(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Serve acme/qa and acme/tiny at OLD and NEW, where `main` is NEW, and other repositories at OLD only."""
    old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
    pq.write_table(pa.Table.from_pylist(OLD_ROWS), old / "train.parquet")
    pq.write_table(pa.Table.from_pylist(NEW_ROWS), new / "train.parquet")
    several = tmp_path_factory.mktemp("several")
    (several / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy.csv\n"
        "- config_name: hard\n  data_files: hard.csv\n---\n"
    )
    for name in ("easy", "hard"):
        lines = [f"Are there {name} fees?,None", "Which rate?,N/A", "How many?,7", "Left out?,"]
        (several / f"{name}.csv").write_text("\n".join(["input,output", *lines]))
    torn = tmp_path_factory.mktemp("torn")
    (torn / "README.md").write_text("---\nlicense: [mit\nconfigs: {\n---\n")
    (torn / "train.csv").write_text("input,output\nWhy?,So.\n")
    letters = shutil.copytree(tiny_base, tmp_path_factory.mktemp("base") / "letters")
    tokenizer = json.loads((letters / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []  # a token for every letter
    (letters / "tokenizer.json").write_text(json.dumps(tokenizer))
    pickled = shutil.copytree(tiny_base, letters.with_name("pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with Hub() as hub:
        hub.add("datasets", "acme/qa", old, revision=OLD)
        hub.add("datasets", "acme/qa", new, revision=NEW)
        hub.add("datasets", "acme/several", several, revision=OLD)
        hub.add("datasets", "acme/torn", torn, revision=OLD)
        hub.add("datasets", "acme/gated", old, revision=OLD)
        hub.add("datasets", "acme/cut", old, revision=OLD)
        hub.add("models", "acme/tiny", tiny_base, revision=OLD)
        hub.add("models", "acme/tiny", letters, revision=NEW)
        hub.add("models", "acme/gated", tiny_base, revision=OLD)
        hub.add("models", "acme/pickled", pickled, revision=OLD)
        for token in (LISTED, UNLISTED):
            hub.gate("datasets", "acme/gated", token=token, accepted=token == LISTED)
            hub.gate("models", "acme/gated", token=token, accepted=token == LISTED)
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> Iterator[Environment]:
    """Yield the environment of a process that reads from the hub, with an empty cache and no token."""
    yield hub.environment(tmp_path / "home")
    hub.mend()


@pytest.fixture
def split_project(make_project: MakeProject) -> Project:
    """Make a project after the split stage, with a base from the hub."""
    project = make_project(base__model="acme/tiny", base__revision=OLD)
    for split in SPLITS:
        write_rows(project / f"data/split/{split}.parquet", OLD_ROWS)
    return project


def run(project: Project, stage: str, environment: Environment) -> subprocess.CompletedProcess[str]:
    """Run a stage, and check that the token is in no output and no file."""
    done = project.stage(stage, False, **environment)
    if token := environment["HF_TOKEN"]:
        texts = [done.stdout.encode(), done.stderr.encode(), *files(project.folder).values()]
        assert not any(token.encode() in text for text in texts)
    return done


def succeed(project: Project, stage: str, environment: Environment) -> None:
    done = run(project, stage, environment)
    assert done.returncode == 0, done.stderr


def refuse(project: Project, stage: str, environment: Environment, *expected: str) -> None:
    """Check that a stage fails with one message with the expected parts, and without a traceback."""
    done = run(project, stage, environment)
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "Traceback" not in output
    lines = output.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1, output
    message = "\n".join(lines[starts[0] :])
    assert [part for part in expected if part not in message] == [], message


def files(folder: Path) -> dict[str, bytes]:
    """Read every file below the folder, including hidden ones."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def fetched(project: Project) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Read the raw rows and the manifest."""
    manifest = json.loads((project / "data/raw/manifest.json").read_text())
    return pq.read_table(project / "data/raw/qa.parquet").to_pylist(), manifest


def token_counts(project: Project) -> list[Any]:
    """Read the number of tokens of each formatted training row."""
    rows = pq.read_table(project / "data/formatted/train.parquet")
    return list(rows["tokens"].to_pylist())


class TestDataSet:
    def test_a_pinned_revision_gives_its_rows(
        self, hub: Hub, make_project: MakeProject, environment: Environment
    ) -> None:
        """With an empty cache, with the other revision in the cache, and offline with both."""
        project = make_project(**THREE_COLUMNS, fetch__source="acme/qa")
        offline = environment | OFFLINE
        for revision, rows, how in (
            (OLD, OLD_ROWS, environment),
            (NEW, NEW_ROWS, environment),
            (OLD, OLD_ROWS, offline),
        ):
            project.set(fetch__revision=revision)
            requests = len(hub.requests)
            succeed(project, "fetch", how)
            assert (len(hub.requests) > requests) == (how is environment)
            assert fetched(project)[0] == rows
            manifest = fetched(project)[1]
            assert (manifest["source"], manifest["revision"]) == ("acme/qa", revision)
            assert manifest["rows_read"] == manifest["rows"] == len(rows)

        before = files(project / "data/raw")
        project.set(fetch__revision=UNKNOWN)
        refuse(project, "fetch", environment, f"acme/qa has no revision {UNKNOWN}")
        refuse(
            project, "fetch", offline, UNKNOWN, "not in the local cache", "HF_HUB_OFFLINE is set"
        )
        assert files(project / "data/raw") == before

    def test_a_configuration_is_named_and_its_texts_are_kept(
        self, make_project: MakeProject, environment: Environment
    ) -> None:
        """An answer of None or N/A in a CSV file is text; pandas takes it for a missing value."""
        project = make_project(**THREE_COLUMNS, fetch__default_instruction="Answer.")
        project.set(fetch__columns={"instruction": None, "input": "input", "output": "output"})
        project.set(fetch__source="acme/several", fetch__revision=OLD)
        refuse(project, "fetch", environment, "['easy', 'hard']", "name one in fetch.config")
        project.set(fetch__config="hard")
        succeed(project, "fetch", environment)
        rows = pq.read_table(project / "data/raw/qa.parquet").to_pylist()
        assert [row["output"] for row in rows] == ["None", "N/A", "7"]
        assert rows[0]["input"] == "Are there hard fees?"
        project.set(fetch__source="acme/torn", fetch__config=None)
        refuse(project, "fetch", environment, "acme/torn")

    @pytest.mark.parametrize(
        "named",
        [
            *("SECRET", "file://SECRET", "../../../secret.csv", "http://127.0.0.1:9/secret.csv"),
            *("zip://secret.csv::SECRET", "{split: train, path: SECRET}"),
        ],
    )
    def test_a_card_cannot_name_the_user_s_files(
        self,
        hub: Hub,
        make_project: MakeProject,
        environment: Environment,
        named: str,
        tmp_path: Path,
    ) -> None:
        project = make_project(**THREE_COLUMNS, fetch__default_instruction="Answer.")
        project.set(fetch__columns={"instruction": None, "input": "input", "output": "output"})
        secret = project / "data/source/secret.csv"
        near = Path(environment["HF_HOME"]) / "hub/secret.csv"  # as seen from the snapshot
        near.parent.mkdir(parents=True, exist_ok=True)
        for file in (secret, near):
            file.write_text("input,output\nWhich key?,0x5ec4e7\n")
        data = tmp_path / "data"
        data.mkdir()
        entry = named.replace("SECRET", str(secret))
        quoted = entry if entry.startswith("{") else json.dumps(entry)
        (data / "own.csv").write_text("input,output\nWhy?,So.\n")
        (data / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files: {quoted}\n---\n"
        )
        repository = f"acme/{tmp_path.name}"
        hub.add("datasets", repository, data, revision=OLD)
        project.set(fetch__source=repository, fetch__revision=OLD)
        refuse(project, "fetch", environment, "which is no file of its own")
        assert not (project / "data/raw/qa.parquet").exists()

    def test_a_data_set_is_read_up_to_the_limit(
        self, hub: Hub, make_project: MakeProject, environment: Environment, tmp_path: Path
    ) -> None:
        """One that says so is not downloaded, and a bomb is downloaded and not unpacked."""
        project = make_project(**THREE_COLUMNS, fetch__default_instruction="Answer.")
        project.set(fetch__columns={"instruction": None, "input": "input", "output": "output"})
        project.set(fetch__source="acme/bomb", fetch__revision=OLD)
        (tmp_path / "data").mkdir()
        lines = b"input,output\n" + b"Why?,So.\n" * 300_000
        (tmp_path / "data/train.csv.gz").write_bytes(gzip.compress(lines))
        hub.add("datasets", "acme/bomb", tmp_path / "data", revision=OLD)
        limit = {"FINTUNE_SOURCE_GIB": "0.000002"}
        hub.requests.clear()
        refuse(project, "fetch", environment | limit, "its files have more than 2e-06 GiB")
        assert not any("resolve" in request.path for request in hub.requests)
        limit = {"FINTUNE_SOURCE_GIB": "0.001"}
        refuse(project, "fetch", environment | limit, "train.csv.gz: unpacked, it has more than")
        assert not [*Path(environment["HF_HOME"]).rglob("*.arrow")]
        succeed(project, "fetch", environment)

    def test_a_link_out_of_the_cache_is_not_followed(
        self, make_project: MakeProject, environment: Environment
    ) -> None:
        project = make_project(**THREE_COLUMNS, fetch__source="acme/qa", fetch__revision=OLD)
        succeed(project, "fetch", environment)
        (file,) = Path(environment["HF_HOME"]).rglob("snapshots/*/train.parquet")
        secret = project / "data/source/secret.parquet"
        shutil.copy(file, secret)
        file.unlink()
        file.symlink_to(secret)
        refuse(project, "fetch", environment | OFFLINE, "leads out of the data set's folder")

    def test_bytes_that_are_not_the_hub_s_are_refused(
        self, make_project: MakeProject, environment: Environment
    ) -> None:
        project = make_project(**THREE_COLUMNS, fetch__source="acme/qa", fetch__revision=OLD)
        succeed(project, "fetch", environment)
        rows = files(project / "data/raw")
        (file,) = Path(environment["HF_HOME"]).rglob("snapshots/*/train.parquet")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.resolve().chmod(0o644)
        file.resolve().write_bytes(data)
        refuse(project, "fetch", environment, "train.parquet", "what the hub states", "delete that")
        assert files(project / "data/raw") == rows
        file.resolve().unlink()
        succeed(project, "fetch", environment)
        assert files(project / "data/raw") == rows

    def test_main_is_resolved_to_a_commit(
        self, make_project: MakeProject, environment: Environment
    ) -> None:
        project = make_project(**THREE_COLUMNS, fetch__source="acme/qa", fetch__revision="main")
        succeed(project, "fetch", environment)
        rows, manifest = fetched(project)
        assert (rows, manifest["revision"]) == (NEW_ROWS, NEW)

    @pytest.mark.parametrize(
        ("parameters", "expected"),
        [
            ({"fetch.revision": None}, ["fetch.revision", f"revision: {NEW}"]),
            ({"fetch.revision": UNKNOWN}, ["no revision", UNKNOWN, "/datasets/acme/qa/commits"]),
            ({"fetch.source": "acme/nothing"}, ["acme/nothing", "not on the hub", "HF_TOKEN"]),
            ({"fetch.split": "tests"}, ["acme/qa", OLD, "tests", "['train']"]),
            ({"fetch.columns.output": "outptu"}, ["fetch.columns.output", "did you mean output?"]),
        ],
        ids=["no revision", "unknown revision", "unknown data set", "unknown split", "no column"],
    )
    def test_a_mistake_is_explained_and_the_former_rows_stay(
        self,
        make_project: MakeProject,
        environment: Environment,
        parameters: dict[str, str | None],
        expected: list[str],
    ) -> None:
        project = make_project(**THREE_COLUMNS, fetch__source="acme/qa", fetch__revision=OLD)
        project.set_all(parameters)
        (project / "data/raw").mkdir()
        for name, content in FORMER.items():
            (project / "data/raw" / name).write_bytes(content)
        refuse(project, "fetch", environment, *expected)
        assert files(project / "data/raw") == FORMER

    def test_a_gate_opens_to_the_right_token_alone(
        self, hub: Hub, make_project: MakeProject, environment: Environment
    ) -> None:
        project = make_project(**THREE_COLUMNS, fetch__source="acme/gated", fetch__revision=OLD)
        page = f"{hub.url}/datasets/acme/gated"
        for token, expected in (
            ("", ["acme/gated is gated", "accept its terms", "set HF_TOKEN"]),
            (INVALID, ["HF_TOKEN is not valid"]),
            (UNLISTED, ["HF_TOKEN's account has no access yet"]),
        ):
            refuse(project, "fetch", environment | {"HF_TOKEN": token}, page, *expected)
            assert not (project / "data/raw").exists()
        succeed(project, "fetch", environment | {"HF_TOKEN": LISTED})
        assert fetched(project)[0] == OLD_ROWS

    def test_a_broken_download_leaves_nothing_and_the_next_try_succeeds(
        self, hub: Hub, make_project: MakeProject, environment: Environment
    ) -> None:
        project = make_project(**THREE_COLUMNS, fetch__source="acme/cut", fetch__revision=OLD)
        hub.cut("acme/cut", "train.parquet", after_bytes=100)
        refuse(project, "fetch", environment, "acme/cut", hub.url, "run it again")
        refuse(project, "fetch", environment | OFFLINE, "acme/cut", "not in the local cache")
        assert not (project / "data/raw").exists()
        hub.mend()
        succeed(project, "fetch", environment)
        assert fetched(project)[0] == OLD_ROWS

    def test_a_broken_row_is_named(
        self, hub: Hub, make_project: MakeProject, environment: Environment, tmp_path: Path
    ) -> None:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken/train.jsonl").write_text('{"input": "a"}\n{"input": \n')
        hub.add("datasets", "acme/broken", tmp_path / "broken", revision=OLD)
        project = make_project(**THREE_COLUMNS, fetch__source="acme/broken", fetch__revision=OLD)
        refuse(project, "fetch", environment, "acme/broken", OLD, "JSON parse error", "in row 1")

    @pytest.mark.parametrize("revision", [None, "main"])
    def test_offline_only_a_commit_says_what_is_meant(
        self, make_project: MakeProject, environment: Environment, revision: str | None
    ) -> None:
        project = make_project(**THREE_COLUMNS, fetch__source="acme/qa", fetch__revision=revision)
        expected = (revision or "null", "40 hex digits", "HF_HUB_OFFLINE")
        refuse(project, "fetch", environment | OFFLINE, "fetch.revision", *expected)


class TestBase:
    def test_the_tokenizer_is_that_of_the_pinned_revision(
        self, hub: Hub, split_project: Project, environment: Environment, tiny_base: Path
    ) -> None:
        tokenizer = load_tokenizer(Base(model=str(tiny_base), revision=None), "new")
        formatted = (format_row(tokenizer, row, 192, "truncate")[0] for row in OLD_ROWS)
        expected = [row["tokens"] for row in formatted if row]
        requests = len(hub.requests)
        succeed(split_project, "format", environment)
        assert token_counts(split_project) == expected
        asked = {request.path for request in hub.requests[requests:]}
        assert f"/acme/tiny/resolve/{OLD}/tokenizer.json" in asked
        assert f"/acme/tiny/resolve/{OLD}/model.safetensors" not in asked  # 14 GB of a 7B model

        split_project.set(base__revision=NEW)
        succeed(split_project, "format", environment)
        letters = token_counts(split_project)
        assert all(many > 2 * few for many, few in zip(letters, expected, strict=True))

    def test_offline_the_cache_answers_alone(
        self, hub: Hub, split_project: Project, environment: Environment
    ) -> None:
        offline = environment | OFFLINE
        refuse(split_project, "format", offline, "acme/tiny", OLD, "HF_HUB_OFFLINE is set")
        assert not (split_project / "data/formatted").exists()
        cache = environment["HF_HUB_CACHE"]
        snapshot_download("acme/tiny", revision=OLD, endpoint=hub.url, cache_dir=cache, token=False)
        requests = len(hub.requests)
        succeed(split_project, "format", offline)
        assert token_counts(split_project)
        assert len(hub.requests) == requests

    @pytest.mark.parametrize(
        ("parameters", "expected"),
        [
            (
                {"base.revision": UNKNOWN},
                ["acme/tiny has no revision", UNKNOWN, "acme/tiny/commits"],
            ),
            ({"base.revision": "main"}, ["params.yaml", "revision: 'main' can move", "commits"]),
            ({"base.revision": None}, ["params.yaml", "model: acme/tiny", "set revision"]),
            ({"base.model": "acme/nothing"}, ["acme/nothing", "not on the hub", "HF_TOKEN"]),
            ({"base.model": "acme/pickled"}, ["acme/pickled", "no safetensors weights", OLD]),
        ],
        ids=["unknown revision", "branch", "no revision", "unknown model", "no safetensors"],
    )
    def test_a_mistake_is_explained_before_formatting(
        self,
        split_project: Project,
        environment: Environment,
        parameters: dict[str, str | None],
        expected: list[str],
    ) -> None:
        split_project.set_all(parameters)
        refuse(split_project, "format", environment, *expected)
        assert not (split_project / "data/formatted").exists()

    def test_a_gate_opens_to_the_right_token_alone(
        self, hub: Hub, split_project: Project, environment: Environment
    ) -> None:
        split_project.set(base__model="acme/gated")
        page = f"{hub.url}/acme/gated"
        for token, expected in (
            ("", ["acme/gated is gated", "accept its terms", "set HF_TOKEN"]),
            (INVALID, ["HF_TOKEN is not valid"]),
            (UNLISTED, ["HF_TOKEN's account has no access yet"]),
        ):
            refuse(split_project, "format", environment | {"HF_TOKEN": token}, page, *expected)
            assert not (split_project / "data/formatted").exists()
        succeed(split_project, "format", environment | {"HF_TOKEN": LISTED})
        assert token_counts(split_project)

    def test_offline_a_cached_tokenizer_is_no_base(
        self, split_project: Project, environment: Environment
    ) -> None:
        """The format stage leaves config and tokenizer in the cache, and train needs the weights."""
        succeed(split_project, "format", environment)
        for stage in ("format", "train"):
            refuse(
                split_project, stage, environment | OFFLINE, "acme/tiny", OLD, "weights", "cache"
            )

    @pytest.mark.parametrize(
        ("stage", "file"), [("format", "tokenizer.json"), ("train", "model.safetensors")]
    )
    def test_a_broken_download_is_explained(
        self, hub: Hub, split_project: Project, environment: Environment, stage: str, file: str
    ) -> None:
        if stage == "train":
            succeed(split_project, "format", environment)
        hub.cut("acme/tiny", file, after_bytes=1000)
        refuse(split_project, stage, environment, "acme/tiny", hub.url, "run it again")
