"""`make golden`: run the golden runs and write their numbers anew: of all, or of those named.

With `--written`, the files that they start from and that tests read are written anew before.

The commit that renews them says why the numbers had to change, see README.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from support import golden
from support.golden import HERE, RUNS, WRITTEN, inside, machine, make_workplace, megakd, run
from support.runs import settings, train

# Two hundred steps: what a student is to take over from this teacher is then more than noise.
TAUGHT = ("optim.steps=200", "optim.warmup=20", "checkpoint.every=200", "checkpoint.keep=1", "optim.batch=48", "data.workers=0")
READING = "reading"


def main() -> None:
    again = "--written" in sys.argv[1:]
    names = [name for name in sys.argv[1:] if name != "--written"] or [*RUNS, READING]
    if unknown := [name for name in names if name not in (*RUNS, READING)]:
        sys.exit(f"no golden run is named {', '.join(unknown)}: there are {', '.join((*RUNS, READING))}")
    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder)
        if again:
            sys.argv = ["megakd/train.py"]  # run.json keeps the command line
            _write_files(make_workplace(workplace / "first", runs=None))
        make_workplace(workplace / "second")
        world = golden.digest(workplace / "second" / "data" / "shapes")  # before runs leave their indexes there
        for name in [name for name in names if name != READING]:
            found = golden.measured(run(name, workplace / "second", f"out/{name}"))
            content = {"commit": _commit(), "machine": machine(), "world_sha256": world, **found}
            _write(HERE / f"{name}.json", content)
        if READING not in names:
            return
        with inside(workplace / "second"):
            megakd("evaluate", "runs/smoke_teacher")
            read = {
                "scores": golden.scores(Path("runs/smoke_teacher")),
                "answers": {question: golden.ask(question) for question in golden.QUESTIONS},
            }
        _write(HERE / f"{READING}.json", {"commit": _commit(), "machine": machine(), **read})


def _write_files(workplace: Path) -> None:
    """What later commits are to read, see README.md; what no test reads is left out."""

    def trained(recipe: str, *sets: str) -> Path:
        with inside(workplace):
            finished = train(None, "--recipe", recipe, "--out", f"runs/{recipe}", *settings(*sets))
        assert finished.code == 0, finished.out + finished.err
        return workplace / "runs" / recipe

    teacher = trained("smoke_teacher", *TAUGHT, *golden.TEACHER)
    lora = trained("vqa_lora", *TAUGHT, *golden.TOWER, *golden.DECODER, "answers.tower=trained", "evaluation.vqa={}")
    half = run("one_rank", workplace, "runs/smoke")
    with inside(workplace):
        megakd("embed", "--recipe", "smoke", "--out", "runs/store", "--dtype", "fp32", *settings(*golden.ALONE))
    # As a kill after step 6 leaves the run.
    shutil.rmtree(half / "checkpoints" / "step_00000012")
    shutil.rmtree(half / "model")
    (half / "evaluation.json").unlink()
    lines = (half / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 6), encoding="utf-8")
    shutil.rmtree(WRITTEN, ignore_errors=True)
    for folder in (teacher, half, workplace / "runs" / "store", lora / "bundle"):
        shutil.copytree(folder, WRITTEN / folder.relative_to(workplace / "runs"))
    _write(WRITTEN / "machine.json", machine())
    for path in WRITTEN.rglob("run.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        for start in content["jobs"]:
            start["nodes"] = "localhost"
        _write(path, content)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    asked = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    return "the one after " + subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
