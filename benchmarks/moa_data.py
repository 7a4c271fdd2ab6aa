"""What should the opponent model learn from, and how much does it know?

`buffer`: which episodes of a player it learns from, all or those with a reward (HOP); whether it
pays to pretrain it, or to load that of a finished run of another seed (the donor's, which has then
learnt twice as long, if it is not frozen). `model`: learned from matches of scripted kinds beside
one player that stays as initialised, told nothing (none), told kind and target (oracle), with a
VAE's z (vae), with discrete goals drawn (discrete) or all by their share (em).

Both are measured on matches that none has seen, five episodes each: negative log-likelihood of the
scripted players' actions in nats, by episode of the match; of `model` also the share of the gap
from none to oracle that inferring closes, and how often a player's likeliest discrete goal, at the
start of an episode, tells its kind, by majority vote over other matches (on the snowdrift, whether
it is a cleaner: the other two differ only on a drift).
"""

import contextlib
import importlib
import tempfile

import numpy as np
import torch

from figures import by_setting, figure, paired, table
from run import checkpoint_of, trained, training

EPISODES = 5
MATCHES = 300  # to vote by, and as many to measure on
BUFFER_GAME, BUFFER_STEPS = "msh-4h1s", 200_000
BUFFERS = {  # options
    "all episodes": "",
    "rewarded episodes": "--moa-buffer positive",
    "pretrained": "--pretrain-moa-steps 40000",
    "donor": "",
    "loaded": "--load-moa",
    "loaded, frozen": "--freeze-moa --load-moa",
}
MODEL_STEPS = {"msh-4x4-4h1s": 500_000, "msg": 200_000}
IDLE = "--plan-update offset --plan-beta 0 --plan-samples 1"  # so that the opponent model learns
MODELS = {  # script and options
    "none": ("hop_onestep", f"--goal none {IDLE}"),
    "oracle": ("hop_onestep", f"--goal oracle {IDLE}"),
    "vae": ("hop_onestep", "--plan-update none"),
    "discrete": ("hop_ppo_gumbel", ""),
    "em": ("hop_ppo_gumbel", "--goal-training em"),
}
KINDS = {"msh": "ns,nh,random", "msg": "cleaner,exploiter,random"}


def jobs(seeds: tuple[int, ...], quick: bool):
    """Seeds outermost."""
    for seed in (1,) if quick else seeds or (1, 2, 3):
        donor = checkpoint_of("moa_data", "donor", seed, quick)
        for name, words in BUFFERS.items():
            own = seed + 100 * (name == "donor")
            words = f"--env-id {BUFFER_GAME} --co-players {KINDS['msh']} {words}"
            about = {"kinds": KINDS["msh"]}
            if name.startswith("loaded"):
                words += f" {donor}"
                about["stage"] = 1
            elif name == "donor":
                about["keep"] = donor
            steps = 4096 if quick else BUFFER_STEPS
            yield training(f"buffer | {name}", own, "hop_onestep", words, steps, **about)
        for game in list(MODEL_STEPS)[: 1 if quick else 2]:
            kinds = KINDS[game[:3]]
            steps = 4096 if quick else MODEL_STEPS[game]
            for name, (script, words) in MODELS.items():
                words = f"--env-id {game} --co-players {kinds} {words} --learning-rate 0"
                words += f" --match-episodes {EPISODES}"
                setting = f"model | {game} | {name}"
                yield training(setting, seed, script, words, steps, kinds=kinds)


def work(job: dict) -> dict:
    """NLL by episode of the match, early and at the end; returns of the first and last fifth."""
    script = importlib.import_module(job["script"])
    votes = 1000 + job["seed"]
    early = []
    returns = []
    last = {}

    def watch(iteration, agent, args, finished, **seen):
        for _, kinds, values in finished:
            returns.append((iteration, float(values[kinds == 0].mean())))
        last.update(agent=agent, iteration=iteration)
        steps = iteration * args.num_envs * args.num_steps
        if not early and steps >= args.total_timesteps / 5:
            early.extend(play(script, agent, job["kinds"], votes + 1000)[0])

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        result = trained(script, job, watch)
    ends = (0.2 * last["iteration"], 0.8 * last["iteration"])
    result["early"] = early
    result["first"] = float(np.mean([value for k, value in returns if k <= ends[0]]))
    result["last"] = float(np.mean([value for k, value in returns if k > ends[1]]))
    _, voters = play(script, last["agent"], job["kinds"], votes)
    result["late"], pairs = play(script, last["agent"], job["kinds"], votes + 1000)
    if script.SCRIPT == "hop_ppo_gumbel":
        names = ["self", *job["kinds"].split(",")]
        result["known"] = [accuracy(*parts, names) for parts in zip(voters, pairs)]
    return result


def predictions(script, player, memory, mask):
    """log pi_hat [B, N, A] of all seats at a Player's decision, before which it had this memory."""
    own, views, goals = map(player.decision.get, ("own", "views", "goals"))
    moa = player.agent.moa
    if script.SCRIPT != "hop_ppo_gumbel":
        return script.masked(moa.decoder(own, views, goals), mask).log_softmax(-1)
    belief = moa.belief(memory).clamp(min=1e-30).log()
    each = []
    for action in range(mask.shape[2]):
        taken = torch.full(mask.shape[:2], action)
        each.append((belief + moa.log_likelihood(own, views, mask, taken)).logsumexp(2))
    return torch.stack(each, 2)


@torch.no_grad()
def play(script, agent, kinds, seed):
    """Of scripted players in MATCHES side by side, by episode: mean NLL [EPISODES]; and at the
    start of each, goals (discrete: the likeliest) and kinds [.., Z + 1]."""
    generator = torch.Generator().manual_seed(seed)
    game = agent.game
    players = script.CoPlayers(game, kinds.split(","), MATCHES, EPISODES, generator)
    player = players.agents[0] = script.Player(agent, MATCHES)
    state = game.start(MATCHES, generator)
    sums = torch.zeros(EPISODES, 2)
    starts = [[] for _ in range(EPISODES)]
    fresh = torch.ones(MATCHES).bool()  # an episode begins
    done = ~fresh
    while not done.all():
        mask = game.action_mask(state)
        others = (players.kind > 0) & ~done[:, None]
        memory = player.memory
        actions = players.act(state, mask)
        guess = predictions(script, player, memory, mask)  # oracle: with the target of this step
        goals = player.decision["goals"]
        if script.SCRIPT == "hop_ppo_gumbel":
            goals = agent.moa.belief(memory).argmax(2, True)
        pairs = torch.cat([goals, players.kind[:, :, None]], 2)
        nll = -script.pick(guess, actions)
        counted = others & player.decision["alive"]
        for k in range(EPISODES):
            now = (players.episode == k)[:, None]
            sums[k] += torch.stack([nll[counted & now].sum(), (counted & now).sum()])
            starts[k].append(pairs[others & now & fresh[:, None]])
        state, _, terminated, truncated = game.step(state, actions)
        fresh = (terminated | truncated).all(1)
        done = done | players.advance(fresh)
        state = game.restart(state, fresh, generator)
    nll = (sums[:, 0] / sums[:, 1]).tolist()
    return nll, [torch.cat(pairs) for pairs in starts]


def accuracy(votes: torch.Tensor, pairs: torch.Tensor, names: list[str]) -> float:
    """Share of players whose goal tells the kind, by the majority of `votes` with that goal."""
    kinds = torch.arange(len(names))
    if "cleaner" in names:
        kinds = torch.tensor([name == "cleaner" for name in names]).long()
    counts = torch.zeros(64, len(names))
    counts.index_put_((votes[:, 0], kinds[votes[:, 1]]), torch.tensor(1.0), accumulate=True)
    return float((counts.argmax(1)[pairs[:, 0]] == kinds[pairs[:, 1]]).float().mean())


def report(results: list[dict]) -> str:
    """A table of the buffers, and one of models for each game."""
    runs = by_setting(results)
    rows = []
    for name in BUFFERS:
        of = runs[f"buffer | {name}"]
        nll = [figure([float(np.mean(r[when])) for r in of], 3) for when in ("early", "late")]
        returns = [figure([r[when] for r in of]) for when in ("first", "last")]
        rows.append([name, *nll, *returns, figure([r["train_cpu_seconds"] for r in of], 0)])
    head = [f"{BUFFER_GAME}: learns from", "nats an action after a fifth", "at the end"]
    head += ["return of the first fifth", "of the last", "CPU seconds"]
    parts = [table(head, rows)]
    for game in MODEL_STEPS:
        of = {name: runs[f"model | {game} | {name}"] for name in MODELS}
        rows = []
        for name in MODELS:
            rows.append([f"nats an action, {name}", *cells([r["late"] for r in of[name]], 3)])
        for name in ("vae", "discrete", "em"):
            rows.append([f"gap closed, {name}", *cells(gaps(of, name), 2)])
        for name in ("discrete", "em"):
            rows.append([f"kind known, {name}", *cells([r["known"] for r in of[name]], 3)])
        head = [game, *(f"episode {k + 1}" for k in range(EPISODES))]
        rows = [row for row in rows if len(row) > 1]
        parts += [table(head, rows)] if rows else []
    return "\n\n".join(parts)


def cells(values: list[list[float]], digits: int) -> list[str]:
    """By episode: the mean of several runs."""
    return [figure(list(of_episode), digits) for of_episode in zip(*values)]


def gaps(of: dict[str, list[dict]], name: str, key: str = "late") -> list[list[float]]:
    """By seed and episode: share of the gap from none to oracle in `key` that a model closes."""
    found = []
    for runs in zip(*paired(of["none"], of["oracle"], of[name])):
        low, high, here = (np.array(r[key]) for r in runs)
        found.append(((low - here) / (low - high)).tolist())
    return found
