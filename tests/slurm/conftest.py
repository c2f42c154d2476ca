"""One cluster for the whole session; skipped with the reason where none can run, unless SLURM_TESTS=require makes that a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megakd.runtime.launch import TORCH_VARIABLES
from support import slurm_cluster as cluster
from support.slurm_jobs import until
from support.slurm_scripts import Script, repository, shrunk

# pytest itself may run inside a SLURM job, or under torchrun; sbatch hands its environment on to the ranks
FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SUBMITIT_", *TORCH_VARIABLES)


@pytest.fixture(scope="session")
def started() -> Iterator[cluster.Cluster]:
    """A two-node cluster, started once; the environment is as before."""
    reason = cluster.why_not()
    if reason and os.environ.get("SLURM_TESTS") == "require":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    # Not pytest's tmp_path: munged wants every folder above its socket to be searchable, and the path has to be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    here = cluster.Cluster(folder)
    here.start()
    try:
        yield here
    finally:
        here.stop()
        if os.environ.get("SLURM_KEEP_LOGS") != "1":
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm(started: cluster.Cluster) -> Iterator[cluster.Cluster]:
    """The cluster that sbatch, srun and submitit find through the environment, in the tests of one file: other folders' tests see none."""
    with pytest.MonkeyPatch.context() as here:
        for name in list(os.environ):
            if name.startswith(FOREIGN):
                here.delenv(name)
        for name, value in started.environment().items():
            here.setenv(name, value)
        yield started


@pytest.fixture(scope="module")
def no_jobs_left(slurm: cluster.Cluster) -> Iterator[None]:
    """After a module, nothing of its jobs runs on."""
    yield
    subprocess.run(["scancel", "--user=root"], check=False)
    until(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=False).stdout.strip())


@pytest.fixture
def plain_preemption(slurm: cluster.Cluster) -> Iterator[None]:
    """SLURM's default: a job that is preempted gets SIGTERM alone, not the signal it asked for by --signal."""
    slurm.reconfigure(user_signal=False)
    yield
    slurm.reconfigure()


@pytest.fixture(scope="session")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def site(slurm: cluster.Cluster, _site: Path) -> Iterator[Path]:
    """A folder like the repository to submit its scripts from; it is the working folder, its `python` the one of these tests."""
    folder = _site
    with pytest.MonkeyPatch.context() as here:
        here.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
        for name, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}.items():
            here.setenv(name, value)
        here.chdir(folder)
        yield folder


@pytest.fixture(scope="session")
def arguments(world: Path, _site: Path) -> list[str]:
    return shrunk(world, _site)


@pytest.fixture(scope="session")
def _submitted() -> list[Script]:
    return []


@pytest.fixture(scope="module")
def undisturbed(site: Path, arguments: list[str], _submitted: list[Script]) -> Script:
    """A run that nothing happens to, one for all files. It may be at work still: wait for it."""
    if not _submitted:
        _submitted.append(Script(site, "distill_vitbigG", *arguments))
    return _submitted[0]
