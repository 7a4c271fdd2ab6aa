"""Runs the benchmarks: trainings and matches in processes of one thread, results as JSON lines.

    python benchmarks/run.py learning                    # one benchmark: what has no result yet
    python benchmarks/run.py goals --only "msg | hop_mcts" --seeds 1    # a part of it
    python benchmarks/run.py --report                    # results.md and pictures of what is here

Stop it and start it at will: at most the runs under way are lost, and a run that fails costs no
other its result. A line of results has setting, seed, command (of a training), commit
(`-dirty`: something was not committed), machine, version of torch and seconds.

A benchmark is a module of this folder with `jobs(seeds, quick)`, dicts with `setting` and `seed`,
seeds outermost, so that everything has one before anything has two; `work(job)`, which makes the
result of one in its own process, by default `train_and_judge`; `report(results)`, Markdown; and,
where there are pictures, `draw(results)`. A job with a `stage` waits for all of lower stages; one
that is to be `alone` runs while no other does.
"""

import dataclasses
import importlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks/experiments")]
NAMES = """learning adaptation goals environments scaling planner_speed moa_data offline
    transformer diffusion view""".split()


@dataclasses.dataclass
class Options:
    names: tyro.conf.Positional[tuple[Literal[tuple(NAMES)], ...]] = tuple(NAMES)  # benchmarks
    only: str = ""  # settings that contain this, or one of these (commas, no space behind them)
    seeds: tuple[int, ...] = ()  # seeds (default: each benchmark's own)
    jobs: int = 2  # runs side by side
    minutes: float = 120.0  # start no further run after so many minutes
    quick: bool = False  # few steps, one seed, always from the start; results are kept apart
    fresh: bool = False  # measure anew; results are kept apart, in results/fresh
    report: bool = False  # run nothing
    worker: str = ""  # a job; used by this program itself


def results_of(name: str, options: Options) -> Path:
    """The file of a benchmark's results."""
    apart = "quick" if options.quick else "fresh" if options.fresh else ""
    return ROOT / "benchmarks" / "results" / apart / f"{name}.jsonl"


def checkpoint_of(benchmark: str, setting: str, seed: int, quick: bool) -> str:
    """Path from ROOT of a trained player that later jobs play."""
    name = re.sub(r"[^\w.-]", "_", f"{setting}__{seed}{'__quick' * quick}")
    return f"benchmarks/checkpoints/{benchmark}/{name}.pt"


# ---- A job, in its own process -------------------------------------------------------------------
def training(setting: str, seed: int, script: str, words: str, steps: int, **more) -> dict:
    """A job for `train_and_judge`, so many game steps with `words` of the command line."""
    words = f"{words} --total-timesteps {steps} --seed {seed}"
    about = {"setting": setting, "seed": seed, "script": script}
    return about | {"options": " ".join(words.split())} | more


def trained(script, job: dict, watch=None) -> dict:
    """Trains a script with `options` of the command line, in which what ends in .pt is a path from
    ROOT; the beginning of a result. `keep`: path from ROOT of the player that is to be kept; a
    killed benchmark leaves all of it or nothing."""
    words = [str(ROOT / w) if w.endswith(".pt") else w for w in shlex.split(job["options"])]
    began = time.process_time()
    folder = script.train(script.parse_arguments(words), watch)["run"]
    result = {**job, "command": f"python {job['script']}.py {job['options']}", "folder": folder}
    result["train_cpu_seconds"] = round(time.process_time() - began, 1)
    if "keep" in job:
        content = script.load_checkpoint(folder)
        path = ROOT / job["keep"]
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: content[name] for name in ("script", "args", "agent", "played")}
        torch.save(kept, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return result


def train_and_judge(job: dict) -> dict:
    """Trains the `script`, and evaluates it for `episodes` with each of `kinds`, co-players by a
    name for them."""
    script = importlib.import_module(job["script"])
    result = trained(script, job)
    run = result["folder"]
    args = script.Args(**script.load_checkpoint(run)["args"])
    seats = script.make_game(args, "cpu").num_players
    result |= {"returns": {}, "by_episode": {}, "all_seats": {}}
    for kind, entry in job["kinds"].items():
        seed = 1000 + job["seed"]
        played = script.evaluate(run, entry, episodes=job["episodes"], seed=seed)
        everyone = played["focal_return"] + (seats - 1) * played["co_player_return"]
        result["returns"][kind] = round(played["focal_return"], 4)
        result["by_episode"][kind] = [round(x, 4) for x in played["by_episode"]]
        result["all_seats"][kind] = round(everyone / seats, 4)
    return result | {"curve": curve(run, result["train_cpu_seconds"])}


def curve(run: str, cpu_seconds: float) -> list[list[float]]:
    """About a hundred points [game steps, CPU seconds, mean return of the learner's seats]. The
    clock of the log is stretched to the CPU seconds of the training: there may be other work."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    name = "charts/episodic_return"
    points = events.Scalars(name) if name in events.Tags()["scalars"] else []
    if not points:
        return []
    before = cpu_seconds * points[0].step / points[-1].step  # the clock starts with the first
    span = points[-1].wall_time - points[0].wall_time
    pace = (cpu_seconds - before) / span if span else 0.0
    points = points[:: 1 + len(points) // 100]
    seconds = [before + pace * (point.wall_time - points[0].wall_time) for point in points]
    return [[p.step, round(s, 1), round(p.value, 4)] for p, s in zip(points, seconds)]


def work(job: dict) -> dict:
    """The result of a job, with what every result says of the process that made it."""
    torch.set_num_threads(1)
    start = time.time()
    benchmark = importlib.import_module(job["benchmark"])
    result = {**job, **getattr(benchmark, "work", train_and_judge)(job)}
    result |= {"torch": torch.__version__, "machine": machine()}
    result.pop("folder", None)
    result["cpu_seconds"] = round(time.process_time(), 1)
    return result | {"seconds": round(time.time() - start, 1)}


def machine() -> str:
    """Model of the processor, where the system tells."""
    path = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", path.read_text()) if path.exists() else None
    return f"{found[1] if found else platform.machine()}, 1 thread of {os.cpu_count()}"


# ---- Many jobs -----------------------------------------------------------------------------------
def results_in(file: Path) -> list[dict]:
    """The results in `file`, by setting and seed; the last one of each."""
    results = {}
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            result = json.loads(line)
        except json.JSONDecodeError:  # a benchmark was killed while it wrote
            print(f"{file.name}: line {number} is no whole result, left out", file=sys.stderr)
        else:
            results[result["setting"], result["seed"]] = result
    return [results[key] for key in sorted(results)]


def append(result: dict, file: Path) -> None:
    """Adds a line to `file`, behind one that a killed benchmark left unfinished, if there is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
    with file.open("a") as out:
        out.write("\n" * (not whole) + json.dumps(result) + "\n")


def commit() -> str:
    """The commit of the code; `-dirty` if anything but results and pictures has changed since."""
    made = [":!benchmarks/results", ":!benchmarks/results.md", ":!benchmarks/pictures"]
    changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *made]
    told = []
    for words in (["git", "rev-parse", "--short", "HEAD"], changed):
        told.append(subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip())
    return (told[0] or "unknown") + "-dirty" * bool(told[1])


def jobs_left(name: str, options: Options, results: list[dict]) -> list[dict]:
    """A benchmark's jobs that are asked for and have no result; with `--quick` all asked for."""
    jobs = importlib.import_module(name).jobs(options.seeds, options.quick)
    parts = re.split(",(?! )", options.only)
    jobs = [job for job in jobs if any(part in job["setting"] for part in parts)]
    there = set() if options.quick else {(r["setting"], r["seed"]) for r in results}
    return [job for job in jobs if (job["setting"], job["seed"]) not in there]


def in_process(job: dict, running: set[subprocess.Popen]) -> dict | str:
    """The result of a job, or what went wrong. While it runs its process is in `running`."""
    command = [sys.executable, "benchmarks/run.py", "--worker", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=environment) as process:
        running.add(process)
        output, errors = process.communicate()
        running.remove(process)
    if process.returncode:
        return f"{job['setting']}, seed {job['seed']}, failed:\n{errors[-2000:]}"
    return json.loads(output.splitlines()[-1])


def side_by_side(jobs: list[dict], at_once: int, deadline: float):
    """As they come: what `in_process` makes of each job that can start before `deadline`. No
    process outlives the one that asks."""
    running: set[subprocess.Popen] = set()

    def run(job: dict) -> dict | str | None:
        return in_process(job, running) if time.time() < deadline else None

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                if future.result() is not None:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                process.terminate()


def run_all(name: str, options: Options, deadline: float) -> int:
    """Works off the jobs of a benchmark that are left; returns how many failed."""
    file = results_of(name, options)
    about = {"benchmark": name, "commit": commit()}
    jobs = [{**job, **about} for job in jobs_left(name, options, results_in(file))]
    failed = 0
    with tqdm(total=len(jobs), unit="run", desc=name) as progress:
        for stage in sorted({job.get("stage", 0) for job in jobs}):
            now = [job for job in jobs if job.get("stage", 0) == stage]
            at_once = 1 if any(job.get("alone") for job in now) else options.jobs
            for result in side_by_side(now, at_once, deadline):
                if isinstance(result, str):
                    failed += 1
                    progress.write(result, file=sys.stderr)
                    continue
                append(result, file)
                progress.update()
                told = f"{result['setting']}, seed {result['seed']}: {result.get('returns', '')}"
                progress.write(f"{told} in {result['seconds']:.0f} s")
    return failed


def report(options: Options) -> None:
    """Prints the tables; those of the repository's results are results.md, with pictures."""
    kept = not (options.quick or options.fresh)
    pages = []
    for name in options.names:
        results = results_in(results_of(name, options))
        benchmark = importlib.import_module(name)
        if results:
            if kept and hasattr(benchmark, "draw"):
                benchmark.draw(results)
            made = Counter(f"{r['commit']} on {r['machine']}" for r in results)
            told = "; ".join(f"{made[key]} of {key}" for key in sorted(made))
            parts = [f"## {name}", benchmark.report(results), f"Results, by commit: {told}."]
            pictures = (ROOT / "benchmarks" / "pictures").glob(f"{name}*.png") if kept else ()
            parts += [f"![{picture.stem}](pictures/{picture.name})" for picture in sorted(pictures)]
            pages.append("\n\n".join(parts) + "\n")
    page = "\n".join(pages)
    print(page)
    if kept and options.names == tuple(NAMES):
        head = "# Results\n\nMade by `python benchmarks/run.py --report`, not by hand. "
        head += "[README.md](README.md) says what each benchmark asks, and how.\n\n"
        (ROOT / "benchmarks" / "results.md").write_text(head + page)


def main(options: Options) -> int:
    if options.worker:
        print("\n" + json.dumps(work(json.loads(options.worker))))
        return 0
    names = () if options.report else options.names
    problem = "--jobs must be at least 1" if options.jobs < 1 else ""
    if names and not any(jobs_left(name, options, []) for name in names):
        problem = f"no setting has {options.only!r} in it"
    if problem:
        print(f"run.py: error: {problem}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # no run outlives this
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    deadline = time.time() + 60 * options.minutes
    failed = sum(run_all(name, options, deadline) for name in names)
    report(options)
    if failed:
        print(f"{failed} runs failed; started again, what is left is run", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
