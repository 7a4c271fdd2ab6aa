"""Few-shot adaptation to three co-players, by HOP's protocol: frozen, and going on learning.

A learner that was trained in self-play, on the mixture (the main job), or `diverse`, plays 2,400
steps with the same three co-players of one kind: one match, the protocol of HOP (Huang et al. 2024,
arXiv 2406.08002). `diverse` is the mixture and a pool: six short runs of plain PPO, in self-play,
prosocial self-play, among each scripted kind and among the mixture, and snapshots of the learner's
own past. `frozen`: no weight changes, what adapts is what is inferred of the co-players; it plays
as at the end of training, on the stag hunts without its planner. `planning`: the same, with the
planner that `--init` has. `learning`: `--init` with its defaults, one learner a match; policy, V
and opponent model go on learning, the planner plans. Kinds are scripted ones; strangers, which no
training has (`strangers.py`; half of them were kept out of all choices); and self-play players of
plain and of prosocial PPO that go on learning, too, by PPO with a constant rate.

A score is the mean return of the episodes that end in a window of 300 steps, between 0, a uniformly
random player, and 1, the best of plain PPO and planning without goals that were trained on just
these co-players (0.3 M steps each, one seed), in the last 600 steps. Where random play does nearly
as well there is no score; shares of that best return, of frozen players and of random play, compare
all kinds. The whole takes days: ask for parts.
"""

import contextlib
import importlib
import itertools
import os
import shlex
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import hop_onestep as ppo
import strangers
from figures import draw_panels, figure, random_return, table
from learning import KINDS as MIXTURE
from run import ROOT, checkpoint_of, train_and_judge

GAMES = ("msh-4x4-4h1s", "msh-4h1s", "msg")
GROUPS = ("self-play", "mixture", "diverse")
METHODS = ("hop_mcts", "hop_onestep", "hop_ppo_gumbel", "latent_world_model")
SCRIPTED = {"msh": ("ns", "nh", "random"), "msg": ("cleaner", "exploiter", "random")}
LEARNERS = {"plain PPO": "", "prosocial PPO": "--prosocial 1"}  # co-players that go on learning
REFERENCES = ("--plan-update none", "")  # options, beside --goal none
MATCHES = 10  # of a learner with each kind
STEPS = 2400  # of a match
WINDOW = 300  # steps of a window
LATE = 2  # windows at the end of a match that its score is of
FIRST = 10  # episodes at the start of a match, as many as one has in training
SORTS = ("scripted", "stranger", "held-out")  # of kinds, by the first word of their names
LEAST_RANGE = 0.05  # of score 1, between the two; with less there is no score
SHOWN = {"msh-4x4-4h1s": "nh", "msh-4h1s": "nh", "msg": "exploiter"}  # in the picture


def jobs(seeds: tuple[int, ...], quick: bool):
    """Seeds outermost; one reference of a kind is enough."""
    seeds = (1,) if quick else seeds or (1, 2, 3, 4, 5)
    games = GAMES[:1] if quick else GAMES
    for seed, game in itertools.product(seeds, games):
        for job in jobs_of(game, seed, quick):
            if seed == seeds[0] or "reference_steps" not in job:
                yield job


def jobs_of(game: str, seed: int, quick: bool):
    """Co-players and pools; learners; then references, and matches of every learner and kind."""
    family = game[:3]
    groups, methods = (GROUPS[:1], METHODS[1:3]) if quick else (GROUPS, METHODS)

    def kept(name):
        """Path from ROOT of who was trained under this name."""
        return checkpoint_of("adaptation", f"{game} | {name}", seed, quick)

    def train(name, script, words, keep, own=seed, steps=500_000, **more):
        words = f"--env-id {game} {words} --seed {own} --total-timesteps {8192 if quick else steps}"
        job = {"setting": f"training | {game} | {name}", "seed": own, "script": script}
        job |= {"options": " ".join(words.split()), "kinds": {"self": "self"}, "episodes": 100}
        return {**job, "keep": keep, **more}

    for name, words in LEARNERS.items():
        words = f"--co-players self --goal none --plan-update none {words}"
        yield train(name, "hop_onestep", words, kept(name))
    pool = Path(kept("pool")).with_suffix("")
    pooled = {kind: f"--co-players {kind}" for kind in ("self", *SCRIPTED[family])}
    pooled |= {"prosocial": "--co-players self --prosocial 1", "mixture": ""}
    for name, words in pooled.items() if "diverse" in groups else ():
        words = f"--plan-update none {words}"
        keep = str(pool / name / "checkpoint.pt")  # of another seed than who meets it
        yield train(f"pool | {name}", "hop_onestep", words, keep, seed + 100, 150_000)
    company = ",".join([*MIXTURE[family], str(pool)])
    trained = {"self-play": "--co-players self", "mixture": "--num-envs 16"}
    trained["diverse"] = f"--num-envs 16 --co-players {company} --snapshot-every 250"
    for group, method in itertools.product(groups, methods):
        name = f"{group} | {method}"
        yield train(name, method, trained[group], kept(name), stage=1)
    kinds = {kind: kind for kind in SCRIPTED[family]}
    for label, players in (("stranger", strangers.DEVELOPMENT), ("held-out", strangers.HELD_OUT)):
        kinds |= {f"{label} {name}": f"benchmarks.strangers:{name}" for name in players[family]}
    kinds |= {f"learning {name}": kept(name) for name in LEARNERS}
    for kind in list(kinds)[:: 5 if quick else 1]:
        played = {"game": game, "kind": kind, "entry": kinds[kind], "stage": 2}
        played |= {"steps": 600 if quick else STEPS, "matches": 2 if quick else MATCHES}
        reference = {"setting": f"reference | {game} | {kind}", "seed": 1, **played}
        yield {**reference, "reference_steps": 4096 if quick else 300_000}
        for group, method in itertools.product(groups, methods):
            name = f"{group} | {method}"
            match = {**played, "seed": seed, "group": group, "script": method}
            match["learner"] = kept(name)
            ways = ["learning"]
            if not kind.startswith("learning "):
                ways += ["frozen"] if method == "hop_ppo_gumbel" else ["frozen", "planning"]
            for way in ways:
                setting = f"{game} | {name} | {kind} | {way}"
                yield {**match, "setting": setting, "way": way}


# ---- Matches -------------------------------------------------------------------------------------
def windows(ends: list[tuple[int, float]], steps: int) -> list[float]:
    """Mean return by window [steps / WINDOW] of episodes (step of the end, return); nan if none."""
    step, value = np.array(ends).reshape(-1, 2).T
    parts = [value[step // WINDOW == k] for k in range(steps // WINDOW)]
    return [float(part.mean()) if len(part) else float("nan") for part in parts]


def frozen(script, path, entry, batch, steps, seed, **play):
    """Of `batch` matches side by side: returns by window, mean of each match's first episodes;
    `play`: options of playing that are not those of training."""
    game = script.GridGame(script.load_checkpoint(path)["args"]["env_id"])
    generator = torch.Generator().manual_seed(seed)
    entries = [entry] * (game.num_players - 1)
    players = script.CoPlayers(game, entries, batch, steps + 1, generator, fixed=True)
    players.agents[0] = script.load_player(path, game, batch, **play)
    state = game.start(batch, generator)
    returns = game.alive(state) * 0.0
    ends = []
    first = []
    with torch.no_grad():
        for step in range(steps):
            actions = players.act(state, game.action_mask(state))
            state, reward, terminated, truncated = game.step(state, actions)
            returns = returns + reward
            ended = (terminated | truncated).all(1)
            own = script.pick(returns, players.focal)
            ends += [(step, value) for value in own[ended].tolist()]
            first += own[ended & (players.episode < FIRST)].tolist()
            returns = returns.masked_fill(ended[:, None], 0.0)
            players.advance(ended)
            state = game.restart(state, ended, generator)
    return windows(ends, steps), float(np.mean(first))


def learning(script, path, entry, steps, seed, learner):
    """Returns by window of one match in which the player goes on learning; `learner`, if any, lets
    the others."""
    ends = []

    def watch(iteration, finished, args, **seen):
        for _, kinds, returns in finished:
            step = (iteration - 1) * args.num_steps
            ends.extend((step, value) for value in returns[kinds == 0].tolist())
        if learner:
            learner.learn(**seen)

    words = ["--init", path, "--co-players", entry, "--seed", f"{seed}"]
    args = script.parse_arguments([*words, "--total-timesteps", f"{steps}"])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        script.train(args, watch)
    return windows(ends, steps)


class Learner:
    """Lets the agent of kind 1, of a run of hop_onestep.py without goals and planner, go on
    learning by PPO from what its seats saw and did. Where an episode is truncated, V of the last
    step stands for V of the final state."""

    optimizer = None  # until it learns

    def learn(self, co_players, storage, state, generator, **rest):
        """After an iteration of `train`, whose variables these are."""
        agent = co_players.agents[1].agent
        own = agent.args
        if self.optimizer is None:
            learnt = {"params": [*agent.actor.parameters(), *agent.critic.parameters()]}
            self.optimizer = torch.optim.Adam([learnt], own.learning_rate, eps=1e-5)
        names = "own views mask alive action reward goes_on final_value".split()
        rows = {name: torch.stack(storage[name]) for name in names}  # [T, B, N, ..]
        after = zip(("own", "views"), co_players.game.features(state))
        seen = [torch.cat([rows[name], last[None]]) for name, last in after]
        goals = seen[0].new_zeros(*seen[0].shape[:3], agent.moa.goal_size)
        inputs = agent.inputs(seen[1].flatten(0, 1), goals.flatten(0, 1))
        seen[1:] = [x.unflatten(0, goals.shape[:2]) for x in inputs]
        with torch.no_grad():
            value = agent.critic(*seen).squeeze(-1)  # [T + 1, B, N]
            policy = ppo.masked(agent.actor(*(x[:-1] for x in seen)), rows["mask"]).log_softmax(-1)
        rows |= dict(zip(("own", "others", "goal"), (x[:-1] for x in seen)))
        rows["log_prob"] = ppo.pick(policy, rows["action"])
        ended = value[:-1] * (rows["final_value"] != 0)  # truncated, or else terminated
        following = torch.where(rows["goes_on"], value[1:], ended)
        shared = rows["reward"].mean(2, keepdim=True)
        reward = own.reward_scale * rows["reward"].lerp(shared, own.prosocial)
        steps = (reward, value[:-1], following, rows["goes_on"])
        rows["advantage"] = ppo.generalised_advantages(*steps, own.gamma, own.gae_lambda)
        rows["return"] = rows["advantage"] + value[:-1]
        rows["offset"] = torch.zeros_like(policy)
        seats = rows["alive"] & (co_players.kind == 1)
        rows = {name: rows[name][seats] for name in ppo.LEARNT if name in rows}
        for part in ppo.minibatches(rows, own.update_epochs, own.num_minibatches, generator):
            loss, terms = ppo.ppo_loss(agent, part, 0.1 * own.ent_coef)
            ppo.descend(self.optimizer, 0, loss, own.max_grad_norm, terms, defaultdict(list))


def work(job: dict) -> dict:
    """What comes of a training, of a reference, or of a learner's matches with one kind."""
    if "options" in job:
        return train_and_judge(job)
    entry = str(ROOT / job["entry"]) if job["entry"].endswith(".pt") else job["entry"]
    if "script" not in job:
        trained = [reference(job, entry, words) for words in REFERENCES]
        return {"random": random_return(job["game"], entry), "trained": trained}
    script = importlib.import_module(job["script"])
    path = str(ROOT / job["learner"])
    seed = 1000 * job["seed"]
    if job["way"] != "learning":
        given = script.INIT if job["way"] == "planning" else {}
        play = {name: given[name] for name in script.PLAYED if name in given}
        played = frozen(script, path, entry, job["matches"], job["steps"], seed, **play)
        return {job["way"]: played[0], "first": played[1]}
    began = time.process_time()
    matches = []
    for k in range(job["matches"]):
        learner = Learner() if job["kind"].startswith("learning ") else None
        matches.append(learning(script, path, entry, job["steps"], seed + k, learner))
    seconds = (time.process_time() - began) / len(matches)
    return {"learning": matches, "cpu_seconds_a_match": round(seconds, 1)}


def reference(job: dict, entry: str, words: str) -> float:
    """Late return of a learner trained on just these co-players."""
    words = f"--env-id {job['game']} --co-players {entry} --goal none {words} --seed 1"
    words += f" --total-timesteps {job['reference_steps']}"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run = os.path.abspath(ppo.train(ppo.parse_arguments(shlex.split(words)))["run"])
        returns, _ = frozen(ppo, run, entry, 2 * job["matches"], job["steps"], 1)
    return float(np.nanmean(returns[-LATE:]))


# ---- Figures -------------------------------------------------------------------------------------
def scale(results: list[dict]) -> dict[tuple, tuple[float, float]]:
    """Returns of score 0 and of score 1, by game and kind."""
    found = [r for r in results if r["setting"].startswith("reference")]
    return {(r["game"], r["kind"]): (r["random"], max(r["trained"])) for r in found}


def scored(result: dict, name: str, scales: dict) -> np.ndarray | None:
    """Scores of `result[name]`; None where scores 0 and 1 are nearly the same."""
    low, high = scales[result["game"], result["kind"]]
    if high - low < LEAST_RANGE * abs(high) or name not in result:
        return None
    return (np.asarray(result[name], float) - low) / (high - low)


def late(scores: np.ndarray | None) -> float | None:
    """Mean of the last windows of scores [.., W]; a single score as it is."""
    return None if scores is None else float(np.nanmean(np.atleast_1d(scores)[..., -LATE:]))


def share(result: dict, scales: dict) -> float | None:
    """Late return of frozen weights, of that of score 1."""
    if "frozen" not in result:
        return None
    return float(np.nanmean(result["frozen"][-LATE:])) / scales[result["game"], result["kind"]][1]


def sort_of(kind: str) -> str:
    """One of SORTS, or learning."""
    return kind.split()[0] if " " in kind else "scripted"


def mean_shares(results: list[dict], scales: dict) -> list[str]:
    """By SORTS: mean share over the three kinds, of the seeds that met them all."""
    by_seed = defaultdict(list)
    for r in results:
        if "frozen" in r:
            by_seed[sort_of(r["kind"]), r["seed"]].append(share(r, scales))
    means = {key: float(np.mean(x)) for key, x in by_seed.items() if len(x) == 3}
    return [figure([x for key, x in means.items() if key[0] == sort]) for sort in SORTS]


def random_shares(game: str, scales: dict) -> list[str]:
    """The same of random play."""
    by_sort = defaultdict(list)
    for (played, kind), (low, high) in scales.items():
        if played == game:
            by_sort[sort_of(kind)].append(low / high)
    return [f"{np.mean(by_sort[sort]):.2f}" if by_sort[sort] else "" for sort in SORTS]


def matches_in(results: list[dict], scales: dict) -> dict[tuple, list[dict]]:
    """Results of matches by game, group, script and kind."""
    played = defaultdict(list)
    for r in results:
        if "learner" in r and (r["game"], r["kind"]) in scales:
            played[r["game"], r["group"], r["script"], r["kind"]].append(r)
    return played


def report(results: list[dict]) -> str:
    """A table of scores for each game and group of learners, and one of shares."""
    scales = scale(results)
    played = matches_in(results, scales)
    parts = []
    for (game, group), keys in itertools.groupby(sorted(played), key=lambda key: key[:2]):
        rows = []
        for key in keys:
            of = played[key]
            first = [scored(r, "first", scales) for r in of if r["way"] == "frozen"]
            cells = [figure([late(x) for x in first])]
            for way in ("frozen", "planning", "learning"):
                cells.append(figure([late(scored(r, way, scales)) for r in of]))
            cells.append(figure([share(r, scales) for r in of]))
            cells.append(figure([r.get("cpu_seconds_a_match") for r in of], 0))
            rows.append([*key[2:], *cells])
        head = ["script", "co-players", "frozen, first ten", "frozen, last 600"]
        head += ["frozen, planning", "learning, last 600", "frozen, share of return"]
        parts.append(f"{game}, trained: {group}\n\n{table([*head, 'CPU seconds a match'], rows)}")
    rows = []
    for key, settings in itertools.groupby(sorted(played), key=lambda key: key[:3]):
        cells = mean_shares([r for setting in settings for r in played[setting]], scales)
        if any(cells):
            rows.append([*key, *cells])
    for game in sorted({row[0] for row in rows}):
        rows.append([game, "", "random play", *random_shares(game, scales)])
    head = ["game", "trained", "script", "frozen, share of return: scripted kinds"]
    parts += [table([*head, "strangers", "held-out strangers"], rows)] if rows else []
    parts.append("No score where random play gets 95 % of what who was trained on them gets.")
    return "\n\n".join(parts)


def draw(results: list[dict]) -> None:
    """adaptation.png: scores along the match, frozen (dotted) and learning, by game."""
    scales = scale(results)
    played = matches_in(results, scales)
    panels = defaultdict(dict)
    ways = ("frozen", "learning")
    for (game, kind), method, way in itertools.product(SHOWN.items(), METHODS, ways):
        scores = [scored(r, way, scales) for r in played[game, "self-play", method, kind]]
        scores = [np.nanmean(np.atleast_2d(x), 0) for x in scores if x is not None]
        if scores:
            ends = WINDOW * np.arange(1, len(scores[0]) + 1)
            panels[f"{game}: three {kind}"][f"{method}, {way}"] = (ends, np.array(scores))
    y = "score (0 random, 1 trained on them)"
    draw_panels("adaptation", panels, "steps of the match", y, columns=3, ylim=(-0.2, 1.1))
