"""The figures of latent_world_model.py in the README: trains every setting with several seeds, and prints tables.

    python benchmarks/latent_model.py --part selfplay    # all seats learn, planning in the latent model
    python benchmarks/latent_model.py --part offline     # from 300,000 transitions of random and scripted play; online
    python benchmarks/latent_model.py --report           # tables from the results so far

Every run uses one thread. The model of every run is judged on episodes that it has not learnt from: in self-play on
12,800 game steps collected with the trained player at all seats, offline on the last tenth of the file. A result is a
JSON line in `benchmarks/results/latent_model.jsonl` with its exact command, seed, seconds and machine; runs that are
there are not repeated, so an interrupted part goes on where it stopped. `--quick` cuts steps to see that all works.
"""

import dataclasses
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from runs import ROOT, curve, spread

RESULTS = ROOT / "benchmarks" / "results" / "latent_model.jsonl"
SELF = "--co-players self --goal none"
KINDS = "ns,nh,random"
SETTINGS = {  # part -> setting -> (options, co-players it is evaluated with)
    "selfplay": {
        "msh-4x4-4h1s": (f"--env-id msh-4x4-4h1s {SELF} --total-timesteps 200000", "self"),
        "msh-4h1s": (f"--env-id msh-4h1s {SELF} --total-timesteps 500000", "self"),
        "msg": (f"--env-id msg {SELF} --total-timesteps 250000 --plan-samples 8", "self"),
    },
    "offline": {
        "online": (f"--co-players {KINDS} --total-timesteps 200000", KINDS),
        "offline": ("--offline DATA --total-timesteps 400000", KINDS),
    },
}
FIGURES = {  # of latent_world_model.diagnose -> column
    "cells": "cells",
    "views": "whole views",
    "five_steps_cells": "cells, 5 steps on",
    "reward_error": "reward error",
    "reward_recall": "paid found",
    "no_reward_recall": "unpaid found",
    "ends_recall": "ends found",
    "value_explained": "V explains",
    "value_slope": "slope on V",
}


@dataclasses.dataclass
class Options:
    part: Literal["selfplay", "offline"] = "selfplay"  # what to run
    only: str = ""  # run settings whose name contains this
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds
    episodes: int = 2000  # evaluation episodes for each kind of co-players
    quick: bool = False  # few steps, one seed; results are not kept
    report: bool = False  # print tables only
    worker: str = ""  # (used by the benchmark itself)


def work(job: dict) -> dict:
    """Trains and evaluates one setting with one seed, in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    import latent_world_model as script

    torch.set_num_threads(1)
    words, seed, data = job["options"], job["seed"], str(Path(tempfile.mkdtemp()) / "data.npz")
    result = {**job, "command": f"python latent_world_model.py {words}"}
    if "DATA" in words:
        collect = f"--collect {job['steps']} --dataset {data} --co-players {KINDS} --seed {1000 + seed}"
        script.collect(script.parse_arguments(shlex.split(collect)))
        result["data"] = f"python latent_world_model.py {collect.replace(data, 'DATA')}"
    start, args = time.time(), script.parse_arguments(shlex.split(words.replace("DATA", data)))
    metrics = script.train(args)
    run = metrics.pop("run")
    result |= {"seconds": round(time.time() - start, 1), "cpu_seconds": round(time.process_time(), 1)}
    machine = f"{platform.processor() or platform.machine()}, 1 thread of {os.cpu_count()}"
    result |= {"machine": machine, "torch": torch.__version__, "returns": {}, "all_seats": {}}
    agent = script.load_agent(run)
    n, players = agent.game.num_players, {"": run}
    if "--offline" in words:  # the same weights, acting by the best score
        content = script.load_checkpoint(run)
        players["greedy "] = str(Path(run) / "greedy.pt")
        torch.save({**content, "args": {**content["args"], "plan_greedy": True}}, players["greedy "])
    for (way, player), kind in itertools.product(players.items(), job["kinds"].split(",")):
        played = script.evaluate(player, kind, episodes=job["episodes"], seed=1000 + seed)
        result["returns"][way + kind] = round(played["focal_return"], 4)
        mean = (played["focal_return"] + (n - 1) * played["co_player_return"]) / n
        result["all_seats"][way + kind] = round(mean, 4)
    if "--offline" not in words:
        kinds = run if job["kinds"] == "self" else f"{run},{KINDS}"
        more = {"dataset": data, "collect": 12_800, "co_players": kinds, "seed": 2000 + seed}
        script.collect(script.Args(env_id=agent.game.id, **more))
        held_out = script.diagnose(agent, script.load_dataset(data, agent.game)[1])
        result["curve"] = curve(run)
    else:
        held_out = {name: value for name, value in metrics.items() if name.startswith("held_out/")}
    result["held_out"] = {name.removeprefix("held_out/"): round(value, 5) for name, value in held_out.items()}
    return result | {"metrics": metrics}


def report() -> None:
    """Markdown tables of the results so far."""
    results = sorted(map(json.loads, RESULTS.read_text().splitlines()), key=lambda r: (r["setting"], r["seed"]))
    runs = {setting: list(some) for setting, some in itertools.groupby(results, lambda r: r["setting"])}
    print("| game, all seats learn | mean return (seeds) | CPU seconds |\n|-|-|-|")
    for setting in filter(runs.get, SETTINGS["selfplay"]):
        seconds = statistics.mean(r["cpu_seconds"] for r in runs[setting])
        print(f"| {setting} | {spread([r['all_seats']['self'] for r in runs[setting]])} | {seconds:.0f} |")
    print(f"\n| msh-4x4-4h1s: learner with three | {' | '.join(KINDS.split(','))} |\n|-|-|-|-|")
    for setting, way in itertools.product(filter(runs.get, SETTINGS["offline"]), ("", "greedy ")):
        if f"{way}ns" in runs[setting][0]["returns"]:
            columns = (spread([r["returns"][way + kind] for r in runs[setting]]) for kind in KINDS.split(","))
            print(f"| {setting}{', argmax' * bool(way)} | {' | '.join(columns)} |")
    print(f"\n| held out (means over seeds) | {' | '.join(FIGURES.values())} |\n|-|{'-|' * len(FIGURES)}")
    for setting in filter(runs.get, itertools.chain(*SETTINGS.values())):
        columns = (statistics.mean(r["held_out"].get(name, float("nan")) for r in runs[setting]) for name in FIGURES)
        print(f"| {setting} | {' | '.join(f'{value:.4f}' for value in columns)} |")


def main(options: Options) -> None:
    if options.worker:
        print("\n" + json.dumps(work(json.loads(options.worker))))
        return
    if options.report:
        report()
        return
    done = set()
    if RESULTS.exists() and not options.quick:
        done = {(r["setting"], r["seed"]) for r in map(json.loads, RESULTS.read_text().splitlines())}
    jobs = []
    for seed in options.seeds[: 1 if options.quick else None]:
        for setting, (words, kinds) in SETTINGS[options.part].items():
            if options.only in setting and (setting, seed) not in done:
                words = f"{words} --seed {seed}" + (" --total-timesteps 10000" if options.quick else "")
                sizes = (
                    {"episodes": 64, "steps": 3000} if options.quick else {"episodes": options.episodes, "steps": 75000}
                )
                jobs.append({"setting": setting, "seed": seed, "options": words, "kinds": kinds, **sizes})
    RESULTS.parent.mkdir(exist_ok=True)
    for job in (progress := tqdm(jobs, unit="run")):
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        ended = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if ended.returncode:
            raise RuntimeError(f"{job['setting']}, seed {job['seed']}:\n{ended.stderr[-2000:]}")
        result = json.loads(ended.stdout.splitlines()[-1])
        progress.write(f"{result['setting']} seed {result['seed']}: {result['returns']} in {result['seconds']:.0f} s")
        if not options.quick:
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
    if not options.quick:
        report()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
