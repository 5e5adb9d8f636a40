"""Everything worth knowing of a GPU, in order of worth: python -m benchmarks.gpu --minutes 25 --out gpu

Stages: (1) correctness against the CPU, captured and not; (2) milliseconds of update, plan and act by size, eager,
captured, compiled, and both; (3) the peers whose checkouts are given, in the same run; (4) TD-MPC2 through Ray, the
learner acting for env actors, and its evaluation; (5) TD-MPC2 on walker-walk; (6) DreamerV3 from pixels. Each job is a
process with a bound of its own, and its figures are written as they come, to OUT/figures.jsonl; a job whose figures are
there is not run again. Jobs of a stage warm up and compile beside each other and are timed one at a time. OUT/table.md
holds the tables.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGES = {"obs": "image", "batch": 16, "length": 64}
LEARNING = ("ray", "walker", "pixels")  # stages that train
RAY_STEPS = 4_000  # 1,500 of them learn
OTHERS: dict[str, dict[str, Any]] = {  # as published
    "storm:18m": {"batch": 16, "length": 64, "precision": "bfloat16"},
    "diamond:atari": {"batch": 32, "length": 15, "precision": "float32"},
    "storm:tiny": {"batch": 8, "length": 32, "precision": "bfloat16"},
    "diamond:tiny": {"batch": 16, "length": 5, "precision": "float32"},
}


@dataclass(frozen=True)
class Job:
    """One process: its name, stage, command, and the most seconds it may take."""

    name: str
    stage: str
    command: list[str]
    seconds: float


def own(name: str, stage: str, kind: str, seconds: float, **options: Any) -> Job:
    return Job(name, stage, [sys.executable, "-m", "benchmarks.gpu_job", kind, json.dumps(options)], seconds)


def correctness(o: argparse.Namespace) -> list[Job]:
    common = {"device": o.device, "repeats": 1}
    tiny = {"obs": "image", "batch": 4, "length": 8}
    dreamer = {"model": "dreamerv3:size1m", **tiny, "precisions": o.precisions}
    tdmpc2 = {"model": "tdmpc2:1m", "obs": "vector", "batch": 32, "precisions": ["float32"]}
    storm = {"model": "storm:tiny", **tiny, "precisions": o.precisions, "beside_cpu": False}
    diamond = {"model": "diamond:tiny", "obs": "rally", "batch": 4, "length": 3, "precisions": ["float32"]}
    return [
        own("correctness dreamerv3", "correctness", "correctness", 150, **common, **dreamer),
        own("correctness tdmpc2", "correctness", "correctness", 150, **common, **tdmpc2),
        own("correctness storm", "correctness", "correctness", 150, **common, **storm),
        own("correctness diamond", "correctness", "correctness", 150, **common, **diamond, beside_cpu=False),
    ]


def timing(o: argparse.Namespace) -> list[Job]:
    acting_modes = [mode for mode in o.modes if mode in ("eager", "captured")]  # DreamerV3's acting is not compiled
    common = {"device": o.device, "repeats": o.repeats, "lock": str(o.out / "lock")}
    jobs = []
    for size in o.tdmpc2_sizes:
        model = {"model": f"tdmpc2:{size}", "obs": "vector", "batch": 256, "precision": "float32"}
        jobs.append(own(f"update tdmpc2:{size}", "timing", "update", o.bound, **common, **model, modes=o.modes))
        acting = {**common, **model, "envs": o.envs}
        jobs.append(own(f"act tdmpc2:{size}", "timing", "act", o.bound, **acting, modes=o.modes))
    for size in o.dreamer_sizes:
        model = {"model": f"dreamerv3:{size}", **IMAGES, "batch": o.batch, "length": o.length}
        learning = {**common, **model, "precision": "bfloat16"}
        jobs.append(own(f"update dreamerv3:{size}", "timing", "update", o.bound, **learning, modes=o.modes))
        acting = {**common, **model, "envs": o.envs[:2]}
        jobs.append(own(f"act dreamerv3:{size}", "timing", "act", o.bound, **acting, modes=acting_modes))
    for name in o.others:
        model = {"model": name, "obs": "image", **OTHERS[name]}
        jobs.append(own(f"update {name}", "timing", "update", o.bound, **common, **model, modes=o.modes))
        acting = {**common, **model, "envs": o.envs[:2]}
        jobs.append(own(f"act {name}", "timing", "act", o.bound, **acting, modes=acting_modes))
    return jobs


def peers(o: argparse.Namespace) -> list[Job]:
    folder = Path(__file__).parent
    common = {"device": o.device, "threads": 2, "warmup": 4, "repeats": o.repeats, "lock": str(o.out / "lock")}
    found = []
    rows = {"obs": "image", "precision": "bfloat16", "batch": o.batch, "length": o.length}
    for size in o.dreamer_sizes[:2]:
        options = json.dumps({**common, **rows, "size": size})
        if o.dreamerv3:
            found.append((f"JAX dreamerv3:{size}", [o.jax, f"{folder}/dreamerv3_reference.py", o.dreamerv3, options]))
        if o.r2dreamer:
            command = [sys.executable, f"{folder}/r2dreamer_reference.py", o.r2dreamer, options]
            found.append((f"r2dreamer {size}", command))
    for size in o.tdmpc2_sizes[:2]:
        options = json.dumps({**common, "batch": 256, "size": int(size.removesuffix("m"))})
        if o.tdmpc2:
            command = [sys.executable, f"{folder}/tdmpc2_reference.py", o.tdmpc2, options]
            found.append((f"TD-MPC2's authors {size}", command))
    return [Job(name, "peers", [str(part) for part in command], o.bound) for name, command in found]


def learning(o: argparse.Namespace) -> list[Job]:
    def train(name: str, preset: str, steps: int, *runtime: str) -> Job:
        command = [sys.executable, "-m", "launch.train", "--config", f"configs/{preset}.yaml", "--runtime", *runtime]
        how = ["--run-dir", str(o.out / name), "--train.device", o.device, "--train.total_steps", str(steps)]
        return Job(name, name, [*command, *how, *o.train_more.split()], o.learning_seconds)

    return [
        train("ray", "tdmpc2_dmc", min(o.steps, RAY_STEPS), "ray", "--runtime.env_actors", "2"),
        train("walker", "tdmpc2_dmc", o.steps, "inline"),
        train("pixels", "dreamerv3_dmc_vision", o.steps, "inline"),
    ]


def run(jobs: list[Job], o: argparse.Namespace, ends: float) -> None:
    """Run jobs beside each other, at most o.parallel at a time; what has no time left is left out.

    While one trains, none is timed: the others warm up and compile.
    """
    waiting, running = sorted(jobs, key=lambda job: job.stage not in LEARNING), []
    lock = (o.out / "lock").open("a")
    while waiting or running:
        while waiting and len(running) < o.parallel and time.monotonic() < ends:
            job = waiting.pop(0)
            if job.stage in LEARNING:
                fcntl.flock(lock, fcntl.LOCK_EX)
            log = (o.out / "log.txt").open("ab")
            log.write(f"\n=== {job.name}: {' '.join(job.command)}\n".encode())
            log.flush()
            output = o.out / f"{job.name.replace(' ', '_').replace(':', '_')}.out"
            process = subprocess.Popen(job.command, stdout=output.open("wb"), stderr=log, start_new_session=True)
            running.append((job, process, output, time.monotonic()))
        if not running:
            print(f"no time left for {', '.join(job.name for job in waiting)}", flush=True)
            return
        time.sleep(0.2)
        for entry in list(running):
            job, process, output, begun = entry
            over = time.monotonic() > min(begun + job.seconds, ends)
            if process.poll() is None and over:
                end(process, signal.SIGINT if job.stage in LEARNING else signal.SIGKILL)
            if process.poll() is not None:
                running.remove(entry)
                finished(job, process, output, time.monotonic() - begun, o)
                if job.stage in LEARNING:
                    fcntl.flock(lock, fcntl.LOCK_UN)


def end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """A learning run is interrupted, so that it saves and sums up; the rest is killed."""
    os.killpg(process.pid, how)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finished(job: Job, process: subprocess.Popen[bytes], output: Path, seconds: float, o: argparse.Namespace) -> None:
    """Keep what the job printed, also of one that ran out of time."""
    text = output.read_text(errors="replace")
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        found += [value] if isinstance(value, dict) else []
    with (o.out / "figures.jsonl").open("a") as file:
        for value in found:
            file.write(json.dumps({"job": job.name, "stage": job.stage, **value}) + "\n")
        if process.returncode == 0:
            file.write(json.dumps({"job": job.name, "stage": job.stage, "done": round(seconds, 1)}) + "\n")
    with (o.out / "log.txt").open("a") as file:
        file.write(f"\n--- {job.name} ended with {process.returncode} after {seconds:.0f} s\n{text[-3000:]}\n")
    output.unlink()
    print(f"{job.name}: {'done' if process.returncode == 0 else f'ended with {process.returncode}'} in {seconds:.0f} s")
    for value in found:
        print("   ", json.dumps(shortened(value)), flush=True)


def shortened(value: dict[str, Any]) -> dict[str, Any]:
    """Lists of seconds as their median in milliseconds."""
    short = {}
    for name, entry in value.items():
        short[name] = f"{1e3 * sorted(entry)[len(entry) // 2]:.3f} ms" if isinstance(entry, list) and entry else entry
    return short


def table(out: Path) -> str:
    """The figures as Markdown."""
    path = out / "figures.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = ["| what | mode | figures |", "|---|---|---|"]
    for row in rows:
        if "done" in row:
            continue
        rest = {k: v for k, v in shortened(row).items() if k not in ("job", "stage", "mode")}
        lines.append(f"| {row['job']} | {row.get('mode', '')} | {', '.join(f'{k} {v}' for k, v in rest.items())} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stages", default="correctness,timing,peers,ray,walker,pixels")
    parser.add_argument("--tdmpc2-sizes", default="5m,1m,19m,48m,317m")
    parser.add_argument("--dreamer-sizes", default="size12m,size1m,size50m,size200m")
    parser.add_argument("--others", default="storm:18m,diamond:atari", help=f"of {', '.join(OTHERS)}")
    parser.add_argument("--modes", default="eager,captured,compiled,both")
    parser.add_argument("--precisions", default="float32,bfloat16", help="of DreamerV3's correctness")
    parser.add_argument("--envs", default="1,16,64,256", help="numbers of environments to plan for")
    parser.add_argument("--batch", type=int, default=16, help="of DreamerV3")
    parser.add_argument("--length", type=int, default=64, help="of DreamerV3")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--parallel", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--bound", type=float, default=400, help="seconds for one timing job")
    parser.add_argument("--steps", type=int, default=50_000, help="of the learning runs")
    parser.add_argument("--learning-seconds", type=float, default=600, help="for one learning run")
    parser.add_argument("--train-more", default="", help="further arguments of the learning runs, as one text")
    parser.add_argument("--r2dreamer", type=Path, help="checkout of NM512/r2dreamer")
    parser.add_argument("--tdmpc2", type=Path, help="checkout of nicklashansen/tdmpc2")
    parser.add_argument("--dreamerv3", type=Path, help="checkout of danijar/dreamerv3")
    parser.add_argument("--jax", default=sys.executable, help="a Python that has what the JAX code needs")
    options = parser.parse_args()
    for name in ("tdmpc2_sizes", "dreamer_sizes", "others", "envs", "modes", "precisions"):
        setattr(options, name, [part for part in getattr(options, name).split(",") if part])
    options.envs = [int(count) for count in options.envs]
    options.out = options.out.resolve()
    return options


def main() -> None:
    o = parse()
    o.out.mkdir(parents=True, exist_ok=True)
    path, ends = o.out / "figures.jsonl", time.monotonic() + 60 * o.minutes
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["job"] for row in known if "done" in row}
    jobs = [*correctness(o), *timing(o), *peers(o), *learning(o)]
    for stages in o.stages.split(","):
        chosen = [job for job in jobs if job.stage in stages.split("+") and job.name not in done]
        print(f"== {stages}: {len(chosen)} jobs, {(ends - time.monotonic()) / 60:.1f} minutes left", flush=True)
        run(chosen, o, ends)
        (o.out / "table.md").write_text(table(o.out) + "\n")
    print(f"tables: {o.out / 'table.md'}")


if __name__ == "__main__":
    main()
