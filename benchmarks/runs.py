"""What the benchmarks share: runs in processes of one thread (or on a Ray cluster), results as JSON lines, resumable.

Not a benchmark itself; README.md in this folder says how they are run.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.stats
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts
CHECKPOINTS = Path("benchmarks/checkpoints")  # from ROOT; trained players that later benchmarks play


@dataclasses.dataclass
class Running:
    """Options of every benchmark that is made of runs."""

    only: str = ""  # run settings whose name contains this, or one of these (commas, without a space behind them)
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds
    jobs: int = 2  # runs side by side, a thread each
    minutes: float = 120.0  # start no further run after so many minutes
    quick: bool = False  # few steps, episodes and seeds, to see that all works; results are kept apart
    ray: str = ""  # address of a Ray cluster to run on (auto, or ray://HOST:10001; local starts one here)
    again: bool = False  # run again what has a result of other options, or whose checkpoint is not there
    fresh: bool = False  # measure anew: results are kept apart in results/fresh/, and read from there
    report: bool = False  # tables and pictures of the results so far, without running anything
    worker: str = ""  # (used by the benchmark itself)

    def results(self, name: str) -> Path:
        """The file of a benchmark's results."""
        apart = "quick" if self.quick else "fresh" if self.fresh else ""
        return ROOT / "benchmarks" / "results" / apart / f"{name}.jsonl"


def kinds_of(options: str) -> list[str]:
    """The co-players that a setting is evaluated with: three of each kind it was trained on."""
    words = shlex.split(options)
    if "--co-players" in words:
        return words[words.index("--co-players") + 1].split(",")
    return ["self", "ns", "nh", "random"]


def checkpoint_of(benchmark: str, setting: str, seed: int, quick: bool = False) -> str:
    """Path from ROOT of a kept checkpoint."""
    name = "".join(c if c.isalnum() or c in "-." else "_" for c in f"{setting}__{seed}{'__quick' * quick}")
    return str(CHECKPOINTS / benchmark / f"{name}.pt")


def about(start: float) -> dict:
    """What every result says of the process that made it. `start` is the wall clock at its beginning."""
    import torch

    return {
        "seconds": round(time.time() - start, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread of {os.cpu_count()}",
        "torch": torch.__version__,
    }


def work(job: dict) -> dict:
    """Trains and evaluates one setting with one seed, in this process. `job` has script, setting, seed, options (of the
    command line) and episodes (of the evaluation, a kind), and may have `kinds`: co-players to evaluate with, by a name
    for them (default: those of the options); `play`: options of `evaluate` by a name for them, for other ways to play
    what was trained; `keep`: where the checkpoint is kept; `curves`: further metrics whose curves the result has."""
    import torch

    script = importlib.import_module(job["script"])
    torch.set_num_threads(1)
    start, began = time.time(), time.process_time()
    metrics = script.train(script.parse_arguments(shlex.split(job["options"])))
    result = {**job, "command": f"python {job['script']}.py {job['options']}"}
    result["train_cpu_seconds"] = round(time.process_time() - began, 1)
    content = script.load_checkpoint(metrics["run"])
    if job.get("keep"):
        names = ("script", "game", "args", "agent", "plan_mode", "played")  # what playing needs
        kept = {name: content[name] for name in names if name in content}
        save(kept, ROOT / job["keep"])
    n = script.GridGame(content["args"]["env_id"]).num_players
    for name in ("returns", "by_episode", "all_seats"):
        result[name] = {}
    kinds = job.get("kinds") or {kind: kind for kind in kinds_of(job["options"])}
    for (name, play), (kind, entry) in itertools.product({"": {}, **job.get("play", {})}.items(), kinds.items()):
        label = f"{kind} {name}".strip()
        played = script.evaluate(metrics["run"], entry, episodes=job["episodes"], seed=1000 + job["seed"], **play)
        result["returns"][label] = round(played["focal_return"], 4)
        result["by_episode"][label] = [round(x, 4) for x in played["by_episode"]]
        everyone = played["focal_return"] + (n - 1) * played["co_player_return"]
        result["all_seats"][label] = round(everyone / n, 4)
    result["curve"] = curve(metrics["run"])
    result["curves"] = {name: curve(metrics["run"], name) for name in job.get("curves", [])}
    result["metrics"] = {k: v for k, v in metrics.items() if k != "run" and not k.startswith("time/")}
    return result | about(start)


def save(content: dict, path: Path) -> None:
    """A kept checkpoint; a killed benchmark leaves the whole of it or nothing."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def curve(run: str, name: str = "charts/episodic_return") -> list[list[float]]:
    """About a hundred points [game steps, seconds since the first, value] of a run's metric `name`, by default the
    mean return of the learner's seats; none if it was not logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars(name) if name in events.Tags()["scalars"] else []
    points = points[:: max(1, len(points) // 100)]
    return [[p.step, round(p.wall_time - points[0].wall_time, 1), round(p.value, 4)] for p in points]


def by_cpu_time(run: dict) -> list[list[float]]:
    """The curve of a run with its clock, the wall's, stretched to the CPU seconds of its training: the machine may have
    had other work. The clock starts with the first point; until then time is taken to go with game steps."""
    (first, *_), (last, seconds, _) = run["curve"][0], run["curve"][-1]
    before = run["train_cpu_seconds"] * first / last
    share = (run["train_cpu_seconds"] - before) / seconds if seconds else 0.0
    return [[step, before + share * second, value] for step, second, value in run["curve"]]


def results_in(file: Path) -> list[dict]:
    """The results in `file`, by setting and seed; the last one of each."""
    results = {}
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            result = json.loads(line)
        except json.JSONDecodeError:  # a benchmark was killed while it wrote
            print(f"{file.name}: line {number} is no whole result and is left out", file=sys.stderr)
        else:
            results[result["setting"], result["seed"]] = result
    return [results[key] for key in sorted(results)]


def by_setting(file: Path) -> dict[str, list[dict]]:
    """The results in `file`: the runs of each setting, by seed."""
    return {k: list(g) for k, g in itertools.groupby(results_in(file), lambda r: r["setting"])}


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------
def commit() -> str:
    """The commit of the code that runs; `-dirty` if anything else than results and pictures was changed since."""
    changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs"]
    asked = [
        subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (["git", "rev-parse", "--short", "HEAD"], changed)
    ]
    return (asked[0] or "unknown") + "-dirty" * bool(asked[1])


def in_process(program: str, job: dict, root: str, running: set[subprocess.Popen]) -> dict | str:
    """The result of `program --worker JOB`, run in a process of its own in the folder `root`, or what went wrong.
    While it runs the process is in `running`."""
    command = [sys.executable, f"benchmarks/{program}", "--worker", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd=root, env=environment) as process:
        running.add(process)
        output, errors = process.communicate()
        running.remove(process)
    if process.returncode:
        return f"{job['setting']}, seed {job['seed']}, failed:\n{errors[-2000:]}"
    return json.loads(output.splitlines()[-1])


def locally(program: str, jobs: list[dict], at_once: int, deadline: float) -> Iterator[dict | str | None]:
    """As they come: the result of each job, or what went wrong, or None if it was not started before `deadline`. The
    processes end with the one that asks."""
    running: set[subprocess.Popen] = set()

    def run(job: dict) -> dict | str | None:
        return in_process(program, job, str(ROOT), running) if time.time() < deadline else None

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                process.terminate()


def on_ray(program: str, jobs: list[dict], address: str, deadline: float) -> Iterator[dict | str | None]:
    """The same as `locally` on a Ray cluster, a core each. The cluster's machines need the packages of
    requirements.txt; code and kept checkpoints are sent to them, new checkpoints come back."""
    os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")  # or the checkpoints would not be sent
    import ray

    content = {"working_dir": str(ROOT), "excludes": ["/runs/", "/.git/", "/docs/", "/wandb/", "/.venv/", ".*_cache"]}
    ray.init(address=None if address == "local" else address, runtime_env=content, log_to_driver=False)

    @ray.remote(num_cpus=1)
    def run(job: dict) -> tuple[dict | str | None, bytes]:
        if time.time() >= deadline:
            return None, b""
        sys.path.insert(0, "benchmarks")  # of the working directory that was sent
        result = importlib.import_module("runs").in_process(program, job, os.getcwd(), set())
        kept = not isinstance(result, str) and job.get("keep")
        return result, Path(kept).read_bytes() if kept else b""

    left = [run.remote(job) for job in jobs]
    while left:
        (ready,), left = ray.wait(left)
        try:
            result, checkpoint = ray.get(ready)
        except ray.exceptions.RayError as error:  # of the cluster
            result, checkpoint = str(error), b""
        if checkpoint:
            path = ROOT / result["keep"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(checkpoint)
        yield result
    ray.shutdown()


def other_options(job: dict, result: dict) -> list[str]:
    """Names of what `result` was made with that is not as in `job`. Where its checkpoint is kept does not count, nor do
    `curves`: the job has their names, the result the curves."""
    asked = json.loads(json.dumps(job)).items()
    return [name for name, value in asked if name not in ("commit", "keep", "curves") and result.get(name) != value]


def jobs_left(program: str, jobs: list[dict], options: Running, file: Path) -> list[dict]:
    """Those of `jobs` that `options` do not leave out, and that have no result in `file`. Results of other options
    are told; they and what lacks its checkpoint are run `--again`. In `--quick` there is nothing to go on from."""
    parts = re.split(",(?! )", options.only)
    jobs = [job for job in jobs if any(part in job["setting"] for part in parts)]
    if options.quick:
        return jobs
    results = {(r["setting"], r["seed"]): r for r in results_in(file)}
    changed, left = [], []
    for job in jobs:
        result = results.get((job["setting"], job["seed"]))
        differs = other_options(job, result) if result else []
        missing = "keep" in job and not (ROOT / job["keep"]).exists()
        if not result or (options.again and (differs or missing)):
            left.append(job)
        elif differs:
            changed.append(f"{job['setting']}, seed {job['seed']}: other {', '.join(differs)}")
    if changed:
        what = f"{len(changed)} results were made with other options ({changed[0]}; ...)"
        print(f"{program}: {what} and stay; --again runs them again", file=sys.stderr)
    return left


def run_all(program: str, jobs: list[dict], options: Running, file: Path) -> int:
    """Works off `jobs` (each with setting and seed) that are left, as `program --worker JOB`; appends the results to
    `file` as they come. Returns how many failed, which is told; they cost no other job its result."""
    program, failed = Path(program).name, 0
    jobs = [{**job, "commit": commit()} for job in jobs_left(program, jobs, options, file)]
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * options.minutes
    if options.ray:
        results = on_ray(program, jobs, options.ray, deadline)
    else:
        results = locally(program, jobs, options.jobs, deadline)
    with tqdm(total=len(jobs), unit="run", desc=program) as progress, contextlib.closing(results):
        for result in results:
            if isinstance(result, str):
                failed += 1
                progress.write(result, file=sys.stderr)
            elif result is not None:
                append(result, file)
                progress.update()
                figures = f" {result['returns']}" if "returns" in result else ""
                progress.write(f"{result['setting']} seed {result['seed']}:{figures} in {result['seconds']:.0f} s")
    return failed


def append(result: dict, file: Path) -> None:
    """Adds a line to `file`; behind a line that a killed benchmark left unfinished, if there is one."""
    with file.open("ab+") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            whole = out.read() == b"\n"
        else:
            whole = True
        out.write((b"" if whole else b"\n") + json.dumps(result).encode() + b"\n")


def benchmark(program: str, options: Running, jobs: list[dict], work: Callable[[dict], dict], file: Path) -> bool:
    """What `main` of a benchmark does with its `jobs`: True when it remains to report. A worker prints its result.
    Exits with status 1 after the runs if one failed."""
    if options.worker:
        print("\n" + json.dumps(work(json.loads(options.worker))))
        return False
    if not options.report:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C: no run outlives the benchmark
        if failed := run_all(program, jobs, options, file):
            sys.exit(f"{Path(program).name}: {failed} of the runs failed; started again, it runs what is left")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def row(*cells: str) -> None:
    """Prints a row of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def head(*cells: str) -> None:
    """Prints the head of a Markdown table."""
    print()
    row(*cells)
    print("|-" * len(cells) + "|")


def spread(values: list[float]) -> str:
    """Mean over seeds, and every seed."""
    return f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def interquartile_mean(scores: list[list[float]]) -> tuple[float, float, float]:
    """Interquartile mean of the scores of all runs of all tasks (one list a task), and the ends of its 95 % interval by
    a bootstrap that draws runs anew within each task: Agarwal et al. 2021 (rliable, arXiv 2108.13264), by scipy."""

    def iqm(*tasks: np.ndarray) -> float:
        return float(scipy.stats.trim_mean(np.concatenate(tasks), 0.25))

    tasks = [np.asarray(task, float) for task in scores]
    if min(map(len, tasks)) < 2:
        return iqm(*tasks), float("nan"), float("nan")
    drawn = scipy.stats.bootstrap(
        tasks, iqm, n_resamples=2000, vectorized=False, method="percentile", rng=np.random.default_rng(1)
    )
    return iqm(*tasks), float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def mean_over_tasks(scores: list[list[float]]) -> tuple[float, float, float]:
    """Mean over tasks (one list of runs a task) of the mean over runs, and the ends of its 95 % interval by Student's
    t, with the degrees of freedom of Welch and Satterthwaite; nan where a task has one run."""
    mean = statistics.mean(map(statistics.mean, scores))
    if min(map(len, scores)) < 2:
        return mean, float("nan"), float("nan")
    parts = [statistics.variance(task) / len(task) for task in scores]
    if not sum(parts):
        return mean, mean, mean
    freedom = sum(parts) ** 2 / sum(part**2 / (len(task) - 1) for part, task in zip(parts, scores, strict=True))
    half = float(scipy.stats.t.ppf(0.975, freedom)) * sum(parts) ** 0.5 / len(scores)
    return mean, mean - half, mean + half


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of independent runs, and the ends of its 95 % interval by Student's t; nan with one run."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return mean, float(mean - half), float(mean + half)


@functools.cache
def random_return(game: str, company: str, matches: int = 200) -> float:
    """Mean return of a uniformly random player among `company`: a co-player's name for all, or N-1 after commas. With
    `self` it is random as well. The score 0 of the normalised returns."""
    import torch

    import hop_onestep as script

    world, generator = script.GridGame(game), torch.Generator().manual_seed(1)
    pool = company.split(",")
    pool = pool * (world.num_players - 1) if len(pool) == 1 else pool
    players = script.CoPlayers(world, pool, matches, 10, generator, fixed=True)
    state = world.start(matches, generator)
    running = torch.zeros(matches, world.num_players)  # returns of the running episodes
    focal, everyone = [], []  # returns of the episodes that ended, at most ten of each match
    left = torch.full((matches,), 10)
    while (left > 0).any():
        mask, seat, learner = world.action_mask(state), players.focal, players.kind == 0
        random = torch.multinomial(mask.flatten(0, 1).float(), 1, generator=generator).view(learner.shape)
        actions = torch.where(learner, random, players.act(state, mask))
        state, reward, terminated, truncated = world.step(state, actions)
        running = running + reward
        ended = (terminated | truncated).all(1)
        counted = ended & (left > 0)
        focal.append(running[counted, seat[counted]])
        everyone.append(running[counted].mean(1))
        left = left - ended.long()
        running[ended] = 0.0
        players.observe(ended)
        state = world.restart(state, ended, generator)
    return float(torch.cat(everyone if company == "self" else focal).mean())


def best_return(game: str) -> float:
    """Highest possible mean return of all players. The score 1 of the normalised returns."""
    import hop_onestep as script

    return script.GridGame(game).best_return
