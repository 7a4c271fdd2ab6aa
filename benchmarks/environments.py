"""PettingZoo environments: does it learn there, and what do goals and planners bring?

Rock, paper, scissors against a player that prefers one move in each match (`biased_rps.py`), where
inferred goals are what pays; and self-play in simple_spread and simple_tag of mpe2, and in
level-based foraging (`foraging.py`). Judged by the learner's return; in self-play by that of all:
in simple_tag, where three chase one, it tells how often that is caught, not how well any plays.
"""

from figures import by_setting, figure, table
from run import training

ENVIRONMENTS = {  # name: id, co-players, game steps
    "rps": ("pettingzoo.classic.rps_v2", "benchmarks.biased_rps:Biased", 65_536),
    "simple_spread": ("mpe2.simple_spread_v3", "self", 131_072),
    "simple_tag": ("mpe2.simple_tag_v3", "self", 65_536),
    "foraging": ("benchmarks.foraging:parallel_env", "self", 98_304),
}
METHODS = {  # name: script, options
    "goals": ("hop_onestep", ""),
    "goals, one step": ("hop_onestep", "--plan-update offset"),
    "goals, latent model": ("latent_world_model", ""),
    "discrete goals": ("hop_ppo_gumbel", ""),
    "plain PPO": ("hop_onestep", "--goal none"),
}


def jobs(seeds: tuple[int, ...], quick: bool):
    """Seeds outermost."""
    for seed in (1,) if quick else seeds or (1, 2, 3):
        for name, (env_id, company, steps) in ENVIRONMENTS.items():
            for method, (script, words) in METHODS.items():
                words = f"--env-id {env_id} --co-players {company} --num-envs 32 {words}"
                length = 2048 if quick else steps
                job = training(f"{name} | {method}", seed, script, words, length)
                yield {**job, "kinds": {"trained with": company}, "episodes": 32 if quick else 320}


def report(results: list[dict]) -> str:
    """Returns by method and environment, and times."""
    runs = by_setting(results)
    returns, seconds = [], []
    for method in METHODS:
        each = [runs[f"{name} | {method}"] for name in ENVIRONMENTS]
        returns.append([method, *(figure([*map(returned, of)]) for of in each)])
        times = [[run["train_cpu_seconds"] for run in of] for of in each]
        seconds.append([method, *(figure(of, 0) for of in times)])
    parts = {"return": returns, "CPU seconds of training": seconds}
    return "\n\n".join(table([title, *ENVIRONMENTS], rows) for title, rows in parts.items())


def returned(run: dict) -> float:
    """Of all seats in self-play, else of the learner."""
    key = "all_seats" if "--co-players self" in run["options"] else "returns"
    return run[key]["trained with"]
