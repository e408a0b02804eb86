"""Addresses of the page: loopback is this machine's alone, and others need a user and a password."""

import argparse
import socket

import pytest
from starlette.datastructures import Headers

from fintune.commands.chat import check_port
from fintune.commands.chat import main as chat
from fintune.errors import UserError
from fintune.usage.guard import PASSWORD, USER, access_to

ANN = {"authorization": "Basic YW5uOmNvcnJlY3QtaG9yc2U="}  # ann:correct-horse


@pytest.fixture(autouse=True)
def without_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(USER, raising=False)
    monkeypatch.delenv(PASSWORD, raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "10.0.0.1", "machine.example"])
def test_an_address_for_others_needs_a_user_and_a_password(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"others could reach the page; set {USER}"):
        chat(argparse.Namespace(host=host, port=0, model="models/merged"))
    monkeypatch.setenv(USER, "ann")
    for password in ("", "short"):
        monkeypatch.setenv(PASSWORD, password)
        with pytest.raises(UserError, match="of at least 8 characters") as told:
            access_to(host)
        assert "short" not in str(told.value)
    monkeypatch.setenv(PASSWORD, "correct-horse")
    access = access_to(host)
    assert access.fault(Headers({"host": "any.example:8600"})) == 401
    assert access.fault(Headers({"host": "any.example:8600"} | ANN)) is None
    foreign = {"host": "any.example:8600", "origin": "http://other.example"}
    assert access.fault(Headers(foreign | ANN)) == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_loopback_is_open_to_this_machine_by_its_names(host: str) -> None:
    access = access_to(host)
    for name in ("127.0.0.1:8600", "localhost:8600", "[::1]:8600"):
        assert access.fault(Headers({"host": name, "origin": f"http://{name}"})) is None
    for name in ("", "rebound.example", "rebound.example:8600", "127.0.0.1.example:8600"):
        assert access.fault(Headers({"host": name})) == 403
    assert access.fault(Headers({"host": "localhost:8600", "origin": "null"})) == 403


def test_on_loopback_too_a_password_that_is_set_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(USER, "ann")
    monkeypatch.setenv(PASSWORD, "correct-horse")
    access = access_to("127.0.0.1")
    assert access.fault(Headers({"host": "localhost"})) == 401
    for wrong in ("Basic", "Basic YW5u", "Bearer YW5uOmNvcnJlY3QtaG9yc2U=", "Basic é"):
        assert access.fault(Headers({"host": "localhost", "authorization": wrong})) == 401
    assert access.fault(Headers({"host": "localhost"} | ANN)) is None


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="name another with --port"):
            check_port("127.0.0.1", other.getsockname()[1])
