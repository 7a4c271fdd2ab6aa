"""Is a causal transformer over a co-player's steps a better encoder of goals than sums of features?

`model`: the sums of hop_onestep.py beside the transformer of experiments/transformer_goals.py, at
as many game steps; both `longer`, with which the sums still take fewer CPU seconds than the
transformer before; and both with a `weak KL`, since with the default weight z can be drawn to tell
nothing. As in `moa_data`, with its `none` and `oracle`: negative log-likelihood of scripted
players' actions on unseen matches by episode, and the share of the gap that is closed (to an oracle
that has learnt for the fewer steps). Besides, whether a linear probe (multinomial logistic
regression) tells a player's kind from the mean of q(z | h) at the start of an episode, on matches
that it has not seen.

`training`: returns by kind of both, trained on the mixture with all defaults. `long`: what became
of these in matches of 2,400 steps with three players of one kind, frozen: the first ten episodes
against the last 600 steps. `speed`: decisions a CPU second of both by turns, every seat deciding,
without and with the planner; medians of rounds.
"""

import importlib
import statistics
import time

import numpy as np
import torch

import moa_data
from adaptation import LATE, frozen
from figures import by_setting, figure, table
from run import ROOT, checkpoint_of, train_and_judge

EPISODES = moa_data.EPISODES
SCRIPTS = {"sum": "hop_onestep", "transformer": "transformer_goals"}
STEPS = {"msh-4x4-4h1s": 100_000, "msg": 150_000}  # game steps of a model, `longer`:
LONGER = {"msh-4x4-4h1s": 230_000, "msg": 375_000}
TRAINING = {"msh-4x4-4h1s": 120_000, "msg": 120_000}  # game steps
WEAK = "--moa-alpha 0.001"  # a tenth of the default weight; chosen with seed 21
MODELS = {  # script and options
    "none": moa_data.MODELS["none"],
    "oracle": moa_data.MODELS["oracle"],
    "sum": (SCRIPTS["sum"], "--plan-update none"),
    "transformer": (SCRIPTS["transformer"], "--plan-update none"),
    "sum, longer": (SCRIPTS["sum"], "--plan-update none"),
    "transformer, longer": (SCRIPTS["transformer"], "--plan-update none"),
    "sum, weak KL": (SCRIPTS["sum"], f"--plan-update none {WEAK}"),
    "transformer, weak KL": (SCRIPTS["transformer"], f"--plan-update none {WEAK}"),
}
BATCH = 64  # games that decide side by side


def jobs(seeds: tuple[int, ...], quick: bool) -> list[dict]:
    """Seeds outermost, opponent models first."""
    found = []
    for seed in (1,) if quick else seeds or (1, 2, 3):
        games = list(STEPS)[: 1 if quick else 2]
        for game in games:
            found += [model_job(game, name, seed, quick) for name in MODELS]
        for game in games:
            for name, script in SCRIPTS.items():
                found += played_jobs(game, name, script, seed, quick)
            job = {"setting": f"speed | {game}", "seed": seed, "game": game}
            job |= {"rounds": 3 if quick else 15, "stage": 2, "alone": True}
            found.append(job)
    return found


def model_job(game: str, name: str, seed: int, quick: bool) -> dict:
    """The job of an opponent model."""
    script, words = MODELS[name]
    setting = f"model | {game} | {name}"
    steps = LONGER[game] if name.endswith("longer") else STEPS[game]
    kinds = moa_data.KINDS[game[:3]]
    words = f"--env-id {game} --co-players {kinds} {words} --learning-rate 0 --seed {seed}"
    words += f" --match-episodes {EPISODES} --total-timesteps {4096 if quick else steps}"
    job = {"setting": setting, "seed": seed, "script": script, "options": words, "kinds": kinds}
    job["keep"] = checkpoint_of("transformer", setting, seed, quick)
    return job | {"game": game, "matches": 20 if quick else 200}


def played_jobs(game: str, name: str, script: str, seed: int, quick: bool) -> list[dict]:
    """The job of a training on the mixture, and those of long matches of what comes of it."""
    setting = f"training | {game} | {name}"
    words = f"--env-id {game} --seed {seed} --total-timesteps {4096 if quick else TRAINING[game]}"
    kinds = moa_data.KINDS[game[:3]].split(",")
    kept = checkpoint_of("transformer", setting, seed, quick)
    training = {"setting": setting, "seed": seed, "script": script, "options": words}
    training |= {"kinds": {k: k for k in kinds}, "episodes": 20 if quick else 640, "keep": kept}
    match = {"seed": seed, "script": script, "learner": kept, "stage": 1, "game": game}
    match |= {"matches": 2 if quick else 20, "steps": 600 if quick else 2400}
    found = [training]
    for kind in kinds[:2]:  # who plays at random cannot be adapted to
        found.append({**match, "setting": f"long | {game} | {kind} | {name}", "entry": kind})
    return found


def work(job: dict) -> dict:
    """The result of a job, by what its setting begins with."""
    what = job["setting"].split(" | ")[0]
    if what == "training":
        return train_and_judge(job)
    if what == "speed":
        return speed(job)
    script = importlib.import_module(job["script"])
    if what == "long":
        seed = 1000 * job["seed"]
        path = str(ROOT / job["learner"])
        played = frozen(script, path, job["entry"], job["matches"], job["steps"], seed)
        return {"frozen": played[0], "first": played[1]}
    moa_data.MATCHES = job["matches"]  # of this process alone
    result = moa_data.work(job)
    if "--goal" not in job["options"]:
        game = script.GridGame(job["game"])
        agent = script.load_player(str(ROOT / job["keep"]), game, 1).agent
        seeds = (3000 + job["seed"], 4000 + job["seed"])
        played = [moa_data.play(script, agent, job["kinds"], seed)[1][1:] for seed in seeds]
        result["probe"] = [probe(*parts) for parts in zip(*played)]
    return result


# ------------------------------------------------------------------------------------------------
# What goals tell of kinds
# ------------------------------------------------------------------------------------------------
def probe(learnt, judged):
    """Share of `judged` goals whose kind a logistic regression on `learnt` ones tells; both goals
    and kind [P, Z + 1]. Kinds that differ in nothing but rare states limit it."""
    goals, unseen = learnt[:, :-1], judged[:, :-1]
    kinds, truth = learnt[:, -1].long(), judged[:, -1].long()
    mean = goals.mean(0)
    spread = goals.std(0) + 1e-6
    linear = torch.nn.Linear(goals.shape[1], int(kinds.max()) + 1)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = linear((goals - mean) / spread)
        decay = 1e-4 * linear.weight.square().sum()
        value = torch.nn.functional.cross_entropy(logits, kinds) + decay
        value.backward()
        return value

    optimizer.step(loss)
    return float((linear((unseen - mean) / spread).argmax(1) == truth).float().mean())


# ------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------
@torch.no_grad()
def speed(job: dict) -> dict:
    """Decisions a CPU second by name of the encoder, and of the planner: none or offset."""
    rates = {}
    for plan in ("none", "offset"):
        players = {}
        for name, module in SCRIPTS.items():
            script = importlib.import_module(module)
            args = script.Args(env_id=job["game"], plan_update=plan, seed=job["seed"])
            game = script.make_game(args, "cpu")
            torch.manual_seed(job["seed"])
            player = script.Player(script.Agent(game, script.checked(args, game)), BATCH)
            generator = torch.Generator().manual_seed(job["seed"])
            players[name] = (player, game.start(BATCH, generator), generator, [])
        for _ in range(job["rounds"]):
            for player, state, generator, seconds in players.values():
                seconds.append(seconds_of_steps(player, state, generator))
        for name, (player, *_, seconds) in players.items():
            decisions = 10 * BATCH * player.agent.game.num_players
            rates[f"{name} | {plan}"] = round(decisions / statistics.median(seconds[1:]))
    return {"decisions_a_second": rates}


def seconds_of_steps(player, state, generator) -> float:
    """CPU seconds of ten decisions of all seats in `state`, which the player remembers."""
    game = player.agent.game
    mask = game.action_mask(state)
    holder = type("Holder", (), {"generator": generator})
    began = time.process_time()
    for _ in range(10):
        player.remember(player.act(state, mask, mask.any(2), holder)["action"])
    return time.process_time() - began


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------
def report(results: list[dict]) -> str:
    """For each game: opponent models; returns; and the speed."""
    runs = by_setting(results)
    parts = []
    for game in STEPS:
        of = {name: runs.get(f"model | {game} | {name}", []) for name in MODELS}
        rows = []
        for name, several in of.items():
            nll = moa_data.cells([r["late"] for r in several], 3)
            seconds = figure([r["train_cpu_seconds"] for r in several], 0)
            rows.append([f"nats an action, {name}", *nll, seconds])
        for name in list(MODELS)[2:]:
            rows.append([f"gap closed, {name}", *moa_data.cells(moa_data.gaps(of, name), 2), ""])
        for name in list(MODELS)[2:]:
            known = moa_data.cells([r["probe"] for r in of[name]], 3)
            rows.append([f"kind told by a linear probe, {name}", "", *known, ""])
        episodes = [f"episode {k + 1}" for k in range(EPISODES)]
        rows = [row for row in rows if any(row[1:])]
        parts += [table([game, *episodes, "CPU seconds"], rows)] if rows else []
    parts.append(table(["trained on the mixture", "encoder", *returns_head()], returns_rows(runs)))
    rows = []
    for game in STEPS:
        for key in ("none", "offset"):
            rates = {}
            for name in SCRIPTS:
                several = runs.get(f"speed | {game}", [])
                rates[name] = [r["decisions_a_second"][f"{name} | {key}"] for r in several]
            ratio = np.divide(rates["transformer"], rates["sum"]).tolist()
            cells = [figure(rates["sum"], 0), figure(rates["transformer"], 0), figure(ratio)]
            rows.append([game, key, *cells])
    parts.append(table(["decisions a second", "planner", *SCRIPTS, "ratio"], rows))
    return "\n\n".join(parts)


def returns_head() -> list[str]:
    return ["return, 10 episodes", "long: first ten episodes", "last 600 steps", "CPU seconds"]


def returns_rows(runs: dict[str, list[dict]]) -> list[list[str]]:
    """Returns with three of a kind of both encoders, in matches of ten episodes and in long ones;
    CPU seconds of the training."""
    rows = []
    for game in STEPS:
        for kind in moa_data.KINDS[game[:3]].split(","):
            for name in SCRIPTS:
                trained = runs.get(f"training | {game} | {name}", [])
                long = runs.get(f"long | {game} | {kind} | {name}", [])
                late = [float(np.nanmean(r["frozen"][-LATE:])) for r in long]
                cells = [figure([r["returns"][kind] for r in trained])]
                cells += [figure([r["first"] for r in long]), figure(late)]
                cells.append(figure([r["train_cpu_seconds"] for r in trained], 0))
                rows.append([f"{game}, 3 {kind}", name, *cells])
    return rows
