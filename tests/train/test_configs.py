"""The configs and launch files that people run: valid, described rightly, and with commands that the launcher takes."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from fm_longctx.train import config_load
from fm_longctx.train.cli import _split
from fm_longctx.train.dry_run import SAMPLES, estimate
from fm_longctx.train.estimate import GIB

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_runs_dry_and_its_header_is_the_estimators(path):
    config = config_load.load(path)
    header = "".join(line.lstrip("# ") for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert config.train.folder == f"runs/{path.stem}"
    told = re.search(
        r"Estimated, not measured, for (\d+) (\w+): ([\d.]+) GiB a GPU at the peak", " ".join(header.split())
    )
    assert told or config.train.device == "cpu", header
    # Where received keys are kept, memory hangs on the batches: those that the header was written from.
    keeps_keys = config.parallel.context > 1 and config.train.activation_checkpointing == "selective"
    found = estimate(config, told[2] if told else "h100", samples=SAMPLES if keeps_keys else 1)
    assert found.fits and "\nfits  " in str(found)
    if not told:
        return
    assert int(told[1]) == found.ranks
    # The standard library's files differ between versions of Python; time depends on them more, and is not compared.
    assert float(told[3]) == pytest.approx(found.memory.peak / GIB, rel=0.05)
    assert f"configs/{path.name} --dry-run" in header


def test_what_does_not_fit_is_said():
    config = config_load.load(ROOT / "configs/llama8b_128k.yaml", ["--train.activation_checkpointing", "none"])
    found = estimate(config, samples=1)
    assert not found.fits
    assert "DOES NOT FIT" in str(found) and "train.activation_checkpointing to selective or full" in str(found)
    with pytest.raises(ValueError, match="h100, h200, a100, b200"):
        estimate(config, "h1000")


def launched(command):
    """The launcher's arguments in a command line, checked as the launcher does."""
    path, _, _, overrides = _split(command[command.index("launch/train.py") + 1 :])
    return config_load.load(ROOT / path, overrides)


def test_slurm_script():
    """Its shell is valid, and what it gives to torchrun is what the launcher takes."""
    script = ROOT / "launch/slurm/train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    # Run it, with the cluster's commands as echoes.
    stubs = "scontrol() { echo node1; echo node2; }; srun() { printf 'srun'; printf ' %q' \"$@\"; echo; };"
    environment = {"SLURM_JOB_NODELIST": "node[1-8]", "SLURM_JOB_NUM_NODES": "8", "SLURM_JOB_ID": "123456"}
    arguments = "configs/llama70b_128k.yaml --train.log_every 5"
    ran = subprocess.run(
        ["bash", "-c", f"{stubs} set -- {arguments}; source {script}"],
        env=environment | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    dry, real = (line.split() for line in ran.stdout.splitlines())
    assert dry[:2] == ["srun", "--nodes"] and "--dry-run" in dry
    assert launched(real).train.log_every == 5
    assert real[real.index("--nnodes") + 1] == "8" and real[real.index("--rdzv-endpoint") + 1] == "node1:29956"
    assert int(real[real.index("--nproc-per-node") + 1]) * 8 == launched(real).parallel.ranks
    missing = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert missing.returncode != 0 and "usage: sbatch" in missing.stderr


def test_kubernetes_job():
    job = yaml.safe_load((ROOT / "launch/kubernetes/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    nodes = sum(part["replicas"] for part in replicas.values())
    for part in replicas.values():
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        assert container["command"][0] == "torchrun"
        assert {f"--nnodes={nodes}", f"--nproc-per-node={job['spec']['nprocPerNode']}"} <= set(container["command"])
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert str(gpus) == job["spec"]["nprocPerNode"]
        assert nodes * gpus == launched(container["command"]).parallel.ranks
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    names = re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert names
