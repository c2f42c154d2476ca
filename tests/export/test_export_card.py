"""The model card of an export, its push to a hub, its heads, and a disk that is full."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from megakd.runtime import checkpoint
from support.runs import KD, environment, megakd, train

COMMAND = [sys.executable, "-P", "-m", "megakd.cli", "export"]


@pytest.fixture(scope="module")
def run(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distilled, with a head for each of two objectives, and scored."""
    folder = tmp_path_factory.mktemp("card") / "run"
    sets = (*KD, f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}", "evaluation.batch=60")
    done = train(recipe_file, "--out", folder, sets=sets)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    assert megakd("export", run, "--to", "transformers", "--out", out, "--license", "apache-2.0", "--keep_projection") == 0
    return out


def test_the_card_says_what_run_json_and_the_scores_say(run: Path, exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    head = card.data.to_dict()
    assert (head["library_name"], head["pipeline_tag"], head["license"]) == ("transformers", "zero-shot-image-classification", "apache-2.0")
    scores = json.loads((run / "evaluation.json").read_text())["retrieval"]["test"]
    content = json.loads((run / "run.json").read_text())
    assert f"| retrieval test | image to text R@5 | {scores['image_to_text']['R@5']:.4f} | 60 images |" in card.text
    assert "recipe: tiny, step 6 of 6, 16 pairs a step" in card.text
    assert "teacher: an architecture of the recipe's own, random" in card.text
    assert f"torch {content['versions']['torch']}" in card.text
    assert 'AutoModel.from_pretrained("FOLDER")' in card.text
    assert "image embeddings of equal pixels differ by" in card.text


def test_the_code_of_a_card_runs(exported: Path) -> None:
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(exported))
    script = f"from PIL import Image\nimage = Image.new('RGB', (50, 40), 'red')\n{code}\nprint(tuple(logits.shape))\n"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 1)\n", done.stderr


def test_without_a_licence_none_is_written_and_this_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = checkpoint.available(run)[0]
    assert megakd("export", run, "--checkpoint", first, "--to", "open_clip", "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "names no licence: give --license" in told
    assert "has no scores" in told, "they are of another step"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in card
    assert "## Scores" not in card


def test_heads_are_kept_when_asked(run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint.load_weights(checkpoint.available(run)[-1])[1]
    heads = {name.removeprefix("heads."): value for name, value in weights.items() if name.startswith("heads.")}
    kept = load_file(exported / "heads.safetensors")
    assert kept.keys() == heads.keys()
    assert all(kept[name].equal(value) for name, value in heads.items())
    with safe_open(exported / "heads.safetensors", framework="pt") as file:
        known = json.loads(file.metadata()["heads"])
    assert known["feature"]["objective"] == "feature"
    assert known["feature"]["teacher"] == "teacher"
    assert type(transformers.AutoModel.from_pretrained(exported)).__name__ == "CLIPModel", "which the file beside does not disturb"
    assert megakd("export", exported.parent, "--to", "open_clip", "--out", tmp_path / "a") == 2
    assert (
        megakd(
            "export", "--model", "ViT-S-32-alt", "--pretrained", "random", "--to", "open_clip", "--out", tmp_path / "b", "--keep_projection"
        )
        == 2
    )
    assert "--keep_projection: there is no head" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--license", "Apache 2"], "--license 'Apache 2'"),
        (["--push", "small-clip"], "--push small-clip: give ORG/NAME"),
        (["--dry_run"], "--dry_run: goes with --push"),
        (["--part", "images"], "did you mean 'image'"),
    ],
)
def test_a_mistake_of_the_card_or_the_push_is_told_before_anything(
    arguments: list[str], told: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert megakd("export", run, "--to", "transformers", "--out", tmp_path / "out", *arguments) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_passed_over_or_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    *_, before, last = checkpoint.available(copy)
    (last / "weights.safetensors").write_bytes((last / "weights.safetensors").read_bytes()[:-4])
    assert megakd("export", copy, "--to", "open_clip", "--out", tmp_path / "a") == 0
    told = capsys.readouterr().out
    assert "passing over a damaged checkpoint" in told
    assert f"{before}, step" in told
    assert megakd("export", copy, "--checkpoint", last, "--to", "open_clip", "--out", tmp_path / "b") == 2
    assert "weights.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_full_disk_is_one_message(run: Path, tmp_path: Path) -> None:
    """A tmpfs of less than the weights, and one that the weights fit on alone, which fills up while files are written."""
    size = sum(value.numel() for value in checkpoint.load_weights(checkpoint.available(run)[-1])[1].values()) * 4 // 1024
    for kib, told in ((size // 2, "are free there"), (size + 24, "the disk is full")):
        disk = tmp_path / str(kib)
        disk.mkdir()
        mount = f'mount -t tmpfs -o size={kib}k tmpfs {disk} && "$@"; code=$?; ls -A {disk}; exit $code'
        command = ["unshare", "--mount", "sh", "-c", mount, "sh", *COMMAND, str(run), "--to", "transformers", "--out", str(disk / "out")]
        if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
            pytest.skip("no name spaces here")
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
        assert done.stdout.strip().splitlines()[-1:] != ["out"], "nothing is left"


class _Hub(BaseHTTPRequestHandler):
    """What a push asks of a hub: a repository, a valid card, which files go how, and one commit that holds them."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        here = f"http://127.0.0.1:{server.server_port}/lab/small"
        server.asked.append((self.path, self.headers.get("Authorization")))
        if server.refuses:
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif self.path == "/api/repos/create":
            server.made.append(json.loads(body))
            self._answer(200, {"url": here})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer(200, {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"success": True, "commitOid": "a" * 40, "commitUrl": f"{here}/commit/{'a' * 40}"})
        else:
            self._answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self._answer(404, {"error": self.path})

    def _answer(self, code: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quietly."""


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked, server.made, server.files, server.refuses = [], [], {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _push(run: Path, out: Path, endpoint: str, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, str(run), "--to", "open_clip", "--out", str(out), "--push", "lab/small", *more]
    env = environment(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(out.parent / "home"), **variables)
    return subprocess.run(command, env={**env, "NO_PROXY": "*"}, capture_output=True, text=True, check=False)


def test_a_push_sends_the_folder_as_it_is(run: Path, tmp_path: Path, hub: Any) -> None:
    done = _push(run, tmp_path / "out", f"http://127.0.0.1:{hub.server_port}", HF_TOKEN="hf_of_a_test")
    assert done.returncode == 0, done.stderr
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.made[0]["name"] == "small"
    assert hub.made[0].get("private") or hub.made[0].get("visibility") == "private"
    assert {token for _, token in hub.asked} == {"Bearer hf_of_a_test"}
    assert b"hf-hub:lab/small" in hub.files["README.md"]
    assert "hf_of_a_test" not in done.stdout + done.stderr


def test_a_dry_run_lists_what_would_be_sent_and_asks_nobody(run: Path, tmp_path: Path, hub: Any) -> None:
    done = _push(run, tmp_path / "out", f"http://127.0.0.1:{hub.server_port}", "--dry_run", HF_TOKEN="hf_of_a_test")
    assert done.returncode == 0, done.stderr
    assert hub.asked == []
    for path in (tmp_path / "out").iterdir():
        assert any(path.name in line and f"{path.stat().st_size:,} bytes" in line for line in done.stdout.splitlines()), done.stdout


def test_a_push_that_fails_is_one_message_and_the_folder_stays(run: Path, tmp_path: Path, hub: Any) -> None:
    hub.refuses = True
    here = f"http://127.0.0.1:{hub.server_port}"
    cases: dict[str, tuple[str, dict[str, str]]] = {"refused": (here, {"HF_TOKEN": "hf_of_a_test"}), "nobody": ("http://127.0.0.1:9", {})}
    for name, (endpoint, variables) in cases.items():
        out = tmp_path / name / "out"
        out.parent.mkdir()
        done = _push(run, out, endpoint, **variables)
        assert (done.returncode, done.stderr.count("error: --push lab/small: the hub did not take it")) == (2, 1), done.stderr
        assert "Traceback" not in done.stderr
        assert (out / "open_clip_model.safetensors").is_file()
