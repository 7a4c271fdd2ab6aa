"""What the benchmarks of single scripts share: runs in processes of one thread, results as JSON lines, resumable.

Not a benchmark itself; `onestep.py` and `mcts.py` say how they are run.
"""

import concurrent.futures
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def kinds_of(options: str) -> list[str]:
    """The co-players that a setting is evaluated with: three of each kind it was trained on."""
    words = shlex.split(options)
    if "--co-players" in words:
        return words[words.index("--co-players") + 1].split(",")
    return ["self", "ns", "nh", "random"]


def work(job: dict) -> dict:
    """Trains and evaluates one setting with one seed, in this process. `job` has script, setting, seed, options (of the
    command line) and episodes (of the evaluation, a kind); and, if the trained player is also to be played otherwise,
    `play`: options of `evaluate` by a name for them."""
    sys.path.insert(0, str(ROOT))
    import torch

    script = importlib.import_module(job["script"])
    torch.set_num_threads(1)
    start = time.time()
    metrics = script.train(script.parse_arguments(shlex.split(job["options"])))
    result = {**job, "command": f"python {job['script']}.py {job['options']}"}
    result |= {"seconds": round(time.time() - start, 1), "cpu_seconds": round(time.process_time(), 1)}
    result["machine"] = f"{platform.processor() or platform.machine()}, 1 thread of {os.cpu_count()}"
    result["torch"] = torch.__version__
    for name in ("returns", "by_episode", "all_seats"):
        result[name] = {}
    n = script.GridGame(script.load_checkpoint(metrics["run"])["game"]).num_players
    for name, play in {"": {}, **job.get("play", {})}.items():
        for kind in kinds_of(job["options"]):
            label = f"{kind} {name}".strip()
            played = script.evaluate(metrics["run"], kind, episodes=job["episodes"], seed=1000 + job["seed"], **play)
            result["returns"][label] = round(played["focal_return"], 4)
            result["by_episode"][label] = [round(x, 4) for x in played["by_episode"]]
            everyone = played["focal_return"] + (n - 1) * played["co_player_return"]
            result["all_seats"][label] = round(everyone / n, 4)
    result["curve"] = curve(metrics["run"])
    return result | {"metrics": {k: v for k, v in metrics.items() if k != "run"}}


def curve(run: str) -> list[list[float]]:
    """About a hundred points [game steps, seconds since the first, mean return of the learner's seats] of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars("charts/episodic_return")
    points = points[:: max(1, len(points) // 100)]
    return [[p.step, round(p.wall_time - points[0].wall_time, 1), round(p.value, 4)] for p in points]


def spread(values: list[float]) -> str:
    """Mean over seeds, and every seed."""
    return f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def results_in(file: Path) -> list[dict]:
    """The results in `file`, by setting and seed."""
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(map(json.loads, lines), key=lambda r: (r["setting"], r["seed"]))


def run_all(program: str, jobs: list[dict], at_once: int, file: Path | None) -> None:
    """Works off `jobs`, `at_once` at a time, each as `program --worker JOB`; appends the results to `file`, if there is
    one, as they come. Jobs whose result is in `file` are left out."""
    done = {(r["setting"], r["seed"]) for r in results_in(file)} if file else set()
    jobs = [job for job in jobs if (job["setting"], job["seed"]) not in done]

    def run(job: dict) -> dict:
        command = [sys.executable, program, "--worker", json.dumps(job)]
        place = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
        ended = subprocess.run(command, capture_output=True, text=True, **place)
        if ended.returncode:
            raise RuntimeError(f"{job['setting']}, seed {job['seed']}:\n{ended.stderr[-2000:]}")
        return json.loads(ended.stdout.splitlines()[-1])

    if file:
        file.parent.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), unit="run") as progress:
        for future in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
            result = future.result()
            progress.update()
            progress.write(
                f"{result['setting']} seed {result['seed']}: {result['returns']} in {result['seconds']:.0f} s"
            )
            if file:
                with file.open("a") as out:
                    out.write(json.dumps(result) + "\n")
