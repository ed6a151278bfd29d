"""Weights by a name of the Hugging Face Hub, which a server of this machine stands for."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, torchrun
from test_dino import images, of_transformers

from mae.weights import reading

CODE = """
import sys, torch
from mae.inference import get_model
model = get_model("owner/dino-small")
torch.save(model.extract_feat(torch.load(sys.argv[1]), "tokens"), sys.argv[2])
"""
COMMIT = "0" * 40


@pytest.fixture
def hub(tmp_path):
    """A hub with a folder of DINOv2, another file that is not to be downloaded, and a gated model."""
    theirs = of_transformers("v2", tmp_path / "folder")
    (tmp_path / "folder/pytorch_model.bin").write_bytes(b"not to be read")
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(self.path)
            if "gated" in self.path:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
            if "/api/models/owner/dino-small/tree" in self.path:
                files = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": COMMIT}
                         for path in (tmp_path / "folder").iterdir()]  # fmt: skip
                return self.answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
            if "/api/models/owner/dino-small" in self.path:
                files = [{"rfilename": path.name} for path in (tmp_path / "folder").iterdir()]
                content = {"id": "owner/dino-small", "sha": COMMIT, "siblings": files, "private": False}
                return self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
            file = tmp_path / "folder" / self.path.rpartition("/")[2]
            if "/owner/dino-small/resolve/" in self.path and file.is_file():
                data = file.read_bytes()
                tag = hashlib.sha256(data).hexdigest()
                return self.answer(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def answer(self, status, data, headers):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    yield theirs, environment, asked
    server.shutdown()
    server.server_close()


def run(code, *argv, environment, folder):
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_a_name_of_the_hub_is_downloaded_once(hub, tmp_path):
    """Also without the server afterwards. Files that may contain code are not downloaded."""
    theirs, environment, asked = hub
    torch.save(images(32, 32), tmp_path / "images.pt")
    for endpoint in (environment["HF_ENDPOINT"], "http://127.0.0.1:1"):
        done = run(CODE, tmp_path / "images.pt", tmp_path / "found.pt",
                   environment={**environment, "HF_ENDPOINT": endpoint}, folder=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
        expected = theirs(images(32, 32)).last_hidden_state
        torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected, rtol=1e-4, atol=1e-5)
        (tmp_path / "found.pt").unlink()
    assert any("model.safetensors" in path for path in asked)
    assert not any(".bin" in path for path in asked)


@pytest.mark.slow
def test_the_processes_of_a_machine_ask_once(hub, tmp_path):
    _, environment, asked = hub
    code = """
import sys
from mae import parallel
from mae.weights import reading
parallel.init("cpu")
print(len(reading.read("owner/dino-small").tensors))
parallel.teardown()
"""
    (tmp_path / "read.py").write_text(code)
    counts = []
    for processes in (1, 2):
        asked.clear()
        environment["HF_HOME"] = str(tmp_path / str(processes))
        done = subprocess.run([*torchrun(processes), tmp_path / "read.py"], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == processes
        counts.append(sorted(asked))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "expected"), [("owner/gated", "license"), ("owner/other", "owner/other")])
def test_a_model_that_can_not_be_read_is_one_line(name, expected, hub, tmp_path):
    _, environment, _ = hub
    argv = [name, "--data_path", "none"]
    command = [sys.executable, ROOT / "main_knn.py", "--finetune", *argv]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()[-1:]
    assert done.returncode == 1 and "main_knn.py: error" in line and expected in line


def test_a_local_folder_of_the_owner_does_not_hide_a_released_encoder(tmp_path, monkeypatch, caplog):
    """A folder with the complete name is read, and a line says so."""
    of_transformers("v2", tmp_path / "facebook/dinov2-small")
    monkeypatch.chdir(tmp_path)
    reading.read("facebook/dinov2-small")
    assert [line for line in caplog.messages if "facebook/dinov2-small" in line and "Hub" in line]
    with pytest.raises(ValueError, match="hf download facebook/dinov2-base"):
        reading.read("facebook/dinov2-base")


def test_without_a_network_the_error_names_the_command_that_downloads_elsewhere(hub, tmp_path):
    _, environment, _ = hub
    command = [sys.executable, ROOT / "main_knn.py", "--finetune", "owner/dino-small", "--data_path", "none"]
    done = subprocess.run(command, env={**environment, "HF_ENDPOINT": "http://127.0.0.1:1"}, cwd=tmp_path,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 1 and "hf download owner/dino-small" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_comparison_takes_names_of_the_hub(hub, labelled, tmp_path):
    """The title is the name without the owner. The weights are the same in each run, also without the server."""
    _, environment, _ = hub
    command = [sys.executable, ROOT / "main_compare.py", "--encoders", "owner/dino-small", "--protocols", "knn",
               "--labels", "all", "--data_path", labelled, "--num_workers", "0", "--device", "cpu", "--output_dir",
               tmp_path / "out"]  # fmt: skip
    for endpoint in (environment["HF_ENDPOINT"], "http://127.0.0.1:1"):
        done = subprocess.run(command, env={**environment, "HF_ENDPOINT": endpoint}, cwd=tmp_path,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "| dino-small (k-NN) |" in done.stdout
    record = json.loads((tmp_path / "out/runs/dino-small/knn/48/0/run.json").read_text())
    assert record["inputs"]["finetune"] == COMMIT
