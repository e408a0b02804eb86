"""The local hub pins, refuses and cuts off, whichever client is used."""

import hashlib
import json
from collections.abc import Iterator
from email.message import Message
from http.client import IncompleteRead
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from support.hub import Hub

A, B, UNKNOWN = "a" * 40, "b" * 40, "c" * 40
OLD, NEW = bytes(range(256)) * 40, b"new weights"
WEIGHTS = "model.safetensors"


class Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes

    @property
    def code(self) -> str | None:
        """Return the hub's own name for a refusal."""
        return self.headers["X-Error-Code"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Serve a model at two revisions, and a gated copy of the first."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/config.json").write_text("{}")
    with Hub() as hub:
        (tmp_path / WEIGHTS).write_bytes(OLD)
        hub.add("models", "acme/tiny", tmp_path, revision=A)
        hub.add("models", "acme/gated", tmp_path, revision=A)
        (tmp_path / WEIGHTS).write_bytes(NEW)
        hub.add("models", "acme/tiny", tmp_path, revision=B)
        hub.gate("models", "acme/gated", token="hf_listed", accepted=True)
        hub.gate("models", "acme/gated", token="hf_unlisted", accepted=False)
        yield hub


def post(hub: Hub, path: str, content: dict[str, str], token: str | None) -> Answer:
    return ask(hub, path, token, method="POST", body=json.dumps(content).encode())


def put(hub: Hub, oid: str, body: bytes) -> Answer:
    return ask(hub, f"/lfs/{oid}", method="PUT", body=body)


def ask(
    hub: Hub,
    path: str,
    token: str | None = None,
    method: str = "GET",
    body: bytes | None = None,
    **headers: str,
) -> Answer:
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = Request(hub.url + path, body, headers=headers, method=method)
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=10) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except HTTPError as error:
        return Answer(error.code, error.headers, error.read())


def test_a_revision_is_pinned_and_main_is_the_last_one(hub: Hub) -> None:
    for revision, commit, weights in ((A, A, OLD), (B, B, NEW), ("main", B, NEW)):
        answer = ask(hub, f"/acme/tiny/resolve/{revision}/{WEIGHTS}")
        assert (answer.headers["X-Repo-Commit"], answer.body) == (commit, weights)
        digest = hashlib.sha256(weights).hexdigest()  # the cache names large files by it
        assert answer.headers["X-Linked-ETag"] == f'"{digest}"'
        info = json.loads(ask(hub, f"/api/models/acme/tiny/revision/{revision}").body)
        sizes = {file["rfilename"]: file["size"] for file in info["siblings"]}
        assert (info["sha"], sizes) == (commit, {WEIGHTS: len(weights), "sub/config.json": 2})
        tree = json.loads(ask(hub, f"/api/models/acme/tiny/tree/{revision}?recursive=true").body)
        assert {each["path"]: each["size"] for each in tree} == sizes | {"sub": 0}
    assert json.loads(ask(hub, "/api/models/acme/tiny").body)["sha"] == B
    top = json.loads(ask(hub, f"/api/models/acme/tiny/tree/{A}").body)
    assert [each["path"] for each in top] == ["sub", WEIGHTS]


def test_what_is_not_there_is_refused_by_its_name(hub: Hub) -> None:
    for path in (
        f"/acme/tiny/resolve/{UNKNOWN}/{WEIGHTS}",
        f"/api/models/acme/tiny/tree/{UNKNOWN}",
    ):
        unknown = ask(hub, path)
        assert (unknown.status, unknown.code) == (404, "RevisionNotFound")
    missing = ask(hub, f"/acme/tiny/resolve/{A}/other.json")
    assert (missing.status, missing.code) == (404, "EntryNotFound")
    # Strangers cannot tell private from missing; a data set is not a model.
    for token, status in ((None, 401), ("hf_listed", 404)):
        for path in ("/api/models/acme/nothing", "/api/datasets/acme/tiny"):
            answer = ask(hub, path, token)
            assert (answer.status, answer.code) == (status, "RepoNotFound")
    assert ask(hub, "/api/whoami-v2").status == 501


@pytest.mark.parametrize(
    ("token", "status", "code"),
    [
        (None, 401, "GatedRepo"),
        ("hf_unlisted", 403, "GatedRepo"),
        ("hf_invalid", 401, None),
        ("hf_listed", 200, None),
    ],
)
def test_a_gate_refuses_the_files_to_all_but_its_list(
    hub: Hub, token: str | None, status: int, code: str | None
) -> None:
    for path in (f"/acme/gated/resolve/{A}/{WEIGHTS}", "/api/models/acme/gated/auth-check"):
        for method in ("HEAD", "GET"):
            answer = ask(hub, path, token, method)
            assert (answer.status, answer.code) == (status, code)
            assert (answer.body == OLD) == (
                status == 200 and path.endswith(WEIGHTS) and method == "GET"
            )
            assert hub.requests[-1] == (method, path, token is not None)
    public = 401 if token == "hf_invalid" else 200  # an invalid token is refused everywhere
    for path in ("/api/models/acme/gated", f"/acme/tiny/resolve/{A}/{WEIGHTS}"):
        assert ask(hub, path, token).status == public


def test_a_cut_drops_the_connection_until_it_is_mended(hub: Hub) -> None:
    path = f"/acme/tiny/resolve/{A}/{WEIGHTS}"
    hub.cut("acme/tiny", WEIGHTS, after_bytes=1000)
    with pytest.raises(IncompleteRead) as error:
        ask(hub, path)
    assert (error.value.partial, error.value.expected) == (OLD[:1000], len(OLD) - 1000)
    with pytest.raises(IncompleteRead) as error:
        ask(hub, path, Range="bytes=1000-")
    assert error.value.partial == b""
    assert ask(hub, f"/acme/gated/resolve/{A}/{WEIGHTS}", "hf_listed").body == OLD
    hub.mend()
    rest = ask(hub, path, Range="bytes=1000-")
    assert (rest.status, rest.body) == (206, OLD[1000:])
    assert rest.headers["Content-Range"] == f"bytes 1000-{len(OLD) - 1}/{len(OLD)}"
    assert ask(hub, path).body == OLD


def test_a_stopped_hub_answers_nobody(tmp_path: Path) -> None:
    with Hub() as hub:
        assert ask(hub, "/api/models/acme/tiny").status == 401
    with pytest.raises(OSError, match="refused"):
        ask(hub, "/api/models/acme/tiny")


def test_a_private_model_is_for_its_owner(hub: Hub) -> None:
    hub.allow("hf_owner", "acme")
    hub.allow("hf_other", "other")
    hub.create("acme/secret", private=True, token="hf_owner")
    path = "/api/models/acme/secret"
    assert json.loads(ask(hub, path, "hf_owner").body)["private"] is True
    assert json.loads(ask(hub, "/api/models/acme/tiny").body)["private"] is False
    for token, status in ((None, 401), ("hf_other", 404)):
        answer = ask(hub, path, token)
        assert (answer.status, answer.code) == (status, "RepoNotFound")


@pytest.mark.parametrize(
    ("token", "status"), [(None, 401), ("hf_unknown", 401), ("hf_other", 403), ("hf_owner", 409)]
)
def test_a_model_is_made_by_its_owner_once(hub: Hub, token: str | None, status: int) -> None:
    hub.allow("hf_owner", "acme")
    hub.allow("hf_other", "other")
    asked = {"organization": "acme", "name": "tiny", "visibility": "private"}
    assert post(hub, "/api/repos/create", asked, token).status == status


def test_an_object_is_kept_whole_or_not(hub: Hub) -> None:
    oid = hashlib.sha256(OLD).hexdigest()
    assert put(hub, oid, OLD[:-1]).status == 400 and hub.stored == {}
    assert put(hub, oid, OLD).status == 200 and hub.stored == {oid: OLD}
