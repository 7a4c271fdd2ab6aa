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
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

from runs import Running, about, benchmark, by_setting, curve, earlier_moa, spread

SELF = f"--co-players self --goal none {earlier_moa()}"
KINDS = "ns,nh,random"
SETTINGS = {  # part -> setting -> (options, co-players it is evaluated with)
    "selfplay": {
        "msh-4x4-4h1s": (f"--env-id msh-4x4-4h1s {SELF} --total-timesteps 200000", "self"),
        "msh-4h1s": (f"--env-id msh-4h1s {SELF} --total-timesteps 500000", "self"),
        "msg": (f"--env-id msg {SELF} --total-timesteps 250000 --plan-samples 8", "self"),
    },
    "offline": {
        "online": (f"--co-players {KINDS} {earlier_moa()} --total-timesteps 200000", KINDS),
        "offline": (f"--offline DATA {earlier_moa()} --total-timesteps 400000", KINDS),
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
class Options(Running):
    part: Literal["selfplay", "offline"] = "selfplay"  # what to run
    episodes: int = 2000  # evaluation episodes for each kind of co-players


def work(job: dict) -> dict:
    """Trains and evaluates one setting with one seed, in this process."""
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
    result |= {**about(start), "returns": {}, "all_seats": {}}
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


def report(file: Path) -> None:
    """Markdown tables of the results in `file`."""
    runs = by_setting(file)
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
    cut, sizes = "", {"episodes": options.episodes, "steps": 75000}
    if options.quick:
        cut, sizes = " --total-timesteps 10000", {"episodes": 64, "steps": 3000}
    jobs = [
        {"setting": setting, "seed": seed, "options": f"{words} --seed {seed}{cut}", "kinds": kinds, **sizes}
        for seed in options.seeds[: 1 if options.quick else None]
        for setting, (words, kinds) in SETTINGS[options.part].items()
    ]
    file = options.results("latent_model")
    if benchmark(__file__, options, jobs, work, file):
        report(file)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
