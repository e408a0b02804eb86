"""Real servers on loopback for tests: S3 (moto), PostgreSQL, and MLflow on both, with users."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import urlopen

import requests

ROOT = Path(__file__).parents[2]
PASSWORD = "correct-horse-battery-staple"
S3 = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret-of-anyone",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def postgres_binaries() -> Path | None:
    """Find PostgreSQL's binaries, which Debian keeps off the PATH, in a folder per version."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """Run an S3 server with these buckets; yield its address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=address,
        region_name=S3["AWS_DEFAULT_REGION"],
        aws_access_key_id=S3["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3["AWS_SECRET_ACCESS_KEY"],
    )
    for bucket in buckets:
        client.create_bucket(Bucket=bucket)
    yield address
    server.stop()


@contextmanager
def postgres(binaries: Path) -> Iterator[dict[str, str]]:
    """Run PostgreSQL with the databases of deploy/databases.sql; yield libpq's environment."""
    import psycopg2

    user = {"user": "postgres"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if user:
        shutil.chown(folder, "postgres")
    password = folder / "password"
    password.write_text(PASSWORD)
    password.chmod(0o644)
    data, port = folder / "data", free_port()
    setup = ["--pgdata", str(data), "--username", "mlflow", "--auth", "scram-sha-256"]
    subprocess.run(
        [str(binaries / "initdb"), *setup, "--pwfile", str(password), "--no-sync"],
        check=True,
        capture_output=True,
        cwd=folder,
        **user,
    )
    options = f"-p {port} -h 127.0.0.1 -k {folder} -F"
    control = [str(binaries / "pg_ctl"), "--pgdata", str(data), "--wait"]
    subprocess.run(
        [*control, "--log", str(folder / "log"), "--options", options, "start"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=folder,
        **user,
    )
    environment = {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(port),
        "PGUSER": "mlflow",
        "PGPASSWORD": PASSWORD,
    }
    try:
        connection = psycopg2.connect(
            host="127.0.0.1", port=port, user="mlflow", password=PASSWORD, dbname="postgres"
        )
        connection.autocommit = True  # CREATE DATABASE cannot run in a transaction
        for statement in (ROOT / "deploy/databases.sql").read_text().splitlines():
            connection.cursor().execute(statement)
        connection.close()
        yield environment
    finally:
        subprocess.run(
            [*control, "--mode", "immediate", "stop"],
            check=False,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            **user,
        )
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow_server(database: dict[str, str], s3: str, log: Path) -> Iterator[str]:
    """Run MLflow as deploy/ does; yield its address."""
    port = free_port()
    command = [str(Path(sys.executable).absolute().parent / "mlflow"), "server"]
    command += ["--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", "postgresql+psycopg2:///mlflow"]
    command += ["--artifacts-destination", "s3://mlflow"]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
        **database,
        **S3,
        "MLFLOW_S3_ENDPOINT_URL": s3,
        "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "deploy/auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "only for this test",
    }
    with running_server(command, port, environment, log) as address:
        _hash_fast(database)
        yield address


def _hash_fast(database: dict[str, str]) -> None:
    """Store the admin's password with a fast hash: MLflow's takes 0.1 s, once or twice a request."""
    import psycopg2
    from werkzeug.security import generate_password_hash

    known = {"host": database["PGHOST"], "port": database["PGPORT"], "user": database["PGUSER"]}
    users = psycopg2.connect(**known, password=database["PGPASSWORD"], dbname="mlflow_users")
    with users, users.cursor() as cursor:
        fast = generate_password_hash(PASSWORD, "pbkdf2:sha256:1")
        cursor.execute("update users set password_hash = %s where username = 'admin'", (fast,))
        assert cursor.rowcount == 1
    users.close()


@contextmanager
def running_server(
    command: list[str], port: int, environment: dict[str, str], log: Path
) -> Iterator[str]:
    """Run a server on loopback `port` in its log's folder; yield its address."""
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except HTTPError:  # it answers
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


@contextmanager
def failing_proxy(address: str, fails: str) -> Iterator[str]:
    """Pass requests on to a server, but answer those whose path contains `fails` with 503."""

    class Proxy(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fails in self.path:
                self.send_error(503)
                return
            headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            found = requests.request(
                self.command, f"{address}{self.path}", data=body, headers=headers, timeout=60
            )
            self.send_response(found.status_code)
            self.send_header("Content-Type", found.headers.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(found.content)))
            self.end_headers()
            self.wfile.write(found.content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
