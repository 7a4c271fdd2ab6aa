"""How fast is hop_onestep.py? All figures of one run, so that their ratios hold on a machine whose speed drifts.

    python benchmarks/speed.py                            # training with and without planner, and the planner alone
    python benchmarks/speed.py --env-id msg --threads 1
    python benchmarks/speed.py --num-envs 16,64,256 --json

Methods take turns, iteration by iteration; medians over `--rounds` rounds after one that is not counted. Trained is for
`--warm-up` game steps first, since learners that know the game leave it early or stay to its end.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hop_onestep as script

METHODS = {
    "plain PPO": {"plan_update": "none", "goal": "none"},
    "plain PPO, goals inferred": {"plan_update": "none"},
    "planner, network": {"plan_update": "hop", "plan_until": 1.0, "goal": "none"},
    "planner, simulator": {"plan_update": "hop", "plan_until": 1.0, "goal": "none", "transition": "simulator"},
    "simulator, goals inferred": {"plan_update": "hop", "plan_until": 1.0, "transition": "simulator"},
}


@dataclasses.dataclass
class Options:
    env_id: str = "msh-4x4-4h1s"  # game
    num_envs: str = "64"  # parallel games, a comma list
    plan_samples: int = 16  # K
    threads: int = 0  # threads (default: torch's)
    rounds: int = 7  # counted rounds
    warm_up: int = 8192  # game steps of training before anything is timed
    json: bool = False  # print a JSON line for each number of games as well


def measure(options: Options, num_envs: int) -> dict[str, dict[str, float]]:
    """Medians by method: game steps a second of training, decisions a second of Agent.act and of the planner in it."""
    trainers = {}
    for name, settings in METHODS.items():
        settings = {"env_id": options.env_id, "num_envs": num_envs, "plan_samples": options.plan_samples, **settings}
        trainers[name] = script.Trainer(script.resolved(script.Args(co_players="self", **settings)))
        while trainers[name].global_step < options.warm_up:
            trainers[name].iterate()
    rates = {name: {"steps": [], "decisions": [], "planner": []} for name in METHODS}
    for counted in range(options.rounds + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.iterate()
            seconds = time.perf_counter() - start
            agent, state, mask = trainer.agent, trainer.state, trainer.game.action_mask(trainer.state)
            deciding = int((trainer.co_players.learner & (state.players >= 0)).sum())
            agent.timer = script.Timer(True)
            begin = time.perf_counter()
            for _ in range(10):
                agent.act(state, mask, trainer.memory, trainer.co_players.learner, trainer.generator, None)
            acting = time.perf_counter() - begin
            planning = agent.timer.seconds.get(("planner",), 0.0)
            agent.timer = script.Timer(False)
            if counted:
                rates[name]["steps"].append(num_envs * trainer.args.num_steps / seconds)
                rates[name]["decisions"].append(10 * deciding / acting)
                if planning:
                    rates[name]["planner"].append(10 * deciding / planning)
    return {name: {k: statistics.median(v) for k, v in rate.items() if v} for name, rate in rates.items()}


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    for num_envs in map(int, options.num_envs.split(",")):
        result = measure(options, num_envs)
        threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        print(f"{options.env_id}, {num_envs} games, K = {options.plan_samples}, {threads}")
        print(f"{'':28}{'game steps/s':>14}{'of plain':>10}{'decisions/s':>13}{'planner alone':>15}")
        plain = result["plain PPO"]["steps"]
        for name, rate in result.items():
            alone = f"{rate['planner']:15,.0f}" if "planner" in rate else ""
            print(f"{name:28}{rate['steps']:14,.0f}{rate['steps'] / plain:10.2f}{rate['decisions']:13,.0f}{alone}")
        if options.json:
            print(
                json.dumps(
                    {"env_id": options.env_id, "num_envs": num_envs, "threads": torch.get_num_threads(), **result}
                )
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
