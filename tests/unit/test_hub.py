"""model.path as the name of a model of the Hugging Face Hub. There is no network in these tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpg_megatron.config.sections import ModelConfig
from gpg_megatron.errors import UserError
from gpg_megatron.model.hub import SHAPES, fetched, local_directory, shape_directory

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
FILES = {
    "config.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"not wanted",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in offline mode."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, commit: str, files: dict[str, bytes], ref: str = "main") -> Path:
    """A snapshot of org/model as the Hub's library lays it out."""
    root = cache / "models--org--model"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def test_a_cached_model_is_used_and_its_commit_named(cache: Path) -> None:
    snapshot = put(cache, COMMIT, FILES)
    other = put(cache, OTHER, FILES, ref="v2")
    model = ModelConfig(path="org/model")
    assert local_directory(model) == snapshot
    assert fetched(model) == ModelConfig(path="org/model", revision=COMMIT)
    assert local_directory(fetched(model)) == snapshot
    assert local_directory(ModelConfig(path="org/model", revision="v2")) == other
    assert fetched(ModelConfig(path="org/model", revision=OTHER)).revision == OTHER


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_part_of_a_model_is_not_taken_for_it(cache: Path, missing: str) -> None:
    put(cache, COMMIT, {name: x for name, x in FILES.items() if name != missing})
    with pytest.raises(UserError, match=f"org/model has no {missing.replace('model', '.*')} in"):
        fetched(ModelConfig(path="org/model"))


def test_every_file_of_the_index_must_be_there(cache: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    files = FILES | {"model.safetensors.index.json": json.dumps(index).encode()}
    snapshot = put(cache, COMMIT, files)
    with pytest.raises(UserError, match="org/model has no model-2.safetensors in"):
        fetched(ModelConfig(path="org/model"))
    (snapshot / "model-2.safetensors").write_bytes(b"")
    assert fetched(ModelConfig(path="org/model")).revision == COMMIT


def test_a_directory_of_that_name_goes_first(cache: Path, tmp_path: Path) -> None:
    put(cache, COMMIT, FILES)
    (tmp_path / "org" / "model").mkdir(parents=True)
    model = ModelConfig(path="org/model")
    assert fetched(model) == model and local_directory(model) == Path("org/model")
    with pytest.raises(UserError, match=r"model\.revision is v2, but model\.path org/model is no"):
        local_directory(ModelConfig(path="org/model", revision="v2"))


@pytest.mark.parametrize("path", ["model", "./model", "/org/model", "a/b/c", "~/model", "a/..", ""])
def test_other_paths_are_no_names(cache: Path, path: str) -> None:
    model = ModelConfig(path=path)
    assert fetched(model) == model and local_directory(model) == Path(path)


def test_the_dry_run_takes_what_there_is_of_a_shape(cache: Path, tmp_path: Path) -> None:
    model = ModelConfig(path="Qwen/Qwen2-7B-Instruct")
    assert shape_directory(model) == SHAPES / "Qwen/Qwen2-7B-Instruct"
    demo = ModelConfig(path="runs/demo_model/model")
    assert shape_directory(demo) == SHAPES / "runs/demo_model/model"
    (tmp_path / "runs/demo_model/model").mkdir(parents=True)
    assert shape_directory(demo) == Path("runs/demo_model/model")
    assert shape_directory(ModelConfig(path="nowhere")) == Path("nowhere")
    with pytest.raises(UserError, match="org/model is no directory, not in the Hugging Face cache"):
        shape_directory(ModelConfig(path="org/model"))
    snapshot = put(cache, COMMIT, {"config.json": b"{}"})
    assert shape_directory(ModelConfig(path="org/model")) == snapshot


class _Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub that fetching a model needs."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        headers = {"X-Repo-Commit": COMMIT}
        if path.startswith("/api/models/org/model/revision/"):
            body = json.dumps({"_id": "1", "id": "org/model", "sha": COMMIT}).encode()
        elif path.startswith("/api/models/org/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": name}
                for name, content in FILES.items()
            ]
            body = json.dumps(tree).encode()
        elif path.startswith("/org/model/resolve/") and name in FILES:
            body = FILES[name]
            headers["ETag"] = f'"{name}"'
        else:
            headers["X-Error-Code"] = "RepoNotFound"
            body = b""
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


PROGRAM = """
import os, sys
from gpg_megatron.config.sections import ModelConfig
from gpg_megatron.model.hub import fetched, local_directory, shape_directory
shape = shape_directory(ModelConfig(path="org/model"))
print(*sorted(os.listdir(shape)))
model = fetched(ModelConfig(path="org/model"))
print(model.revision, *sorted(os.listdir(local_directory(model))))
try:
    fetched(ModelConfig(path="org/other"))
except ValueError as error:
    print(error)
"""


def test_what_is_missing_is_fetched(tmp_path: Path) -> None:
    with hub() as address:
        environment = {
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    shape, model, unknown = done.stdout.splitlines()
    assert shape == "config.json"
    assert model == f"{COMMIT} config.json model.safetensors tokenizer_config.json"
    assert "org/other is no directory" in unknown and "(404 Client Error)" in unknown
    assert "Fetching 3 files: 100%" in done.stderr
