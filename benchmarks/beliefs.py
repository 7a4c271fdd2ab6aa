"""How well do inferred goals know whom they play with?

    python benchmarks/beliefs.py                                                # small stag hunt
    python benchmarks/beliefs.py --env-id msg --kinds cleaner,exploiter,random
    python benchmarks/beliefs.py --env-id msh-4h1s --kinds ns,nh,random,ns-noisy,nh-noisy

Scripted players of several kinds meet in matches of five episodes, beside one that plays by its
first, almost random policy. Opponent models learn from such matches alone: of hop_onestep.py told
nothing (`none`), told every player's kind and target (`oracle`), and with a VAE's z (`vae`); and
that of hop_ppo_gumbel.py with discrete goals, of which one is drawn for a match (`discrete`) or all
count by their share (`em`). On matches that none has seen: the negative log-likelihood of the
scripted players' actions in nats, by episode of the match, and the share of the gap from none to
oracle that inferring closes; and how often a player's likeliest goal, at the start of an episode,
tells its kind, by majority vote over other matches (on the snowdrift, whether it is a cleaner: the
other two differ only on a drift)."""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import hop_onestep  # noqa: E402
import hop_ppo_gumbel  # noqa: E402

EPISODES = 5
IDLE = "--plan-update offset --plan-beta 0 --plan-samples 1"  # so that the opponent model is trained
MODELS = {  # script and options
    "none": (hop_onestep, f"--goal none {IDLE}"),
    "oracle": (hop_onestep, f"--goal oracle {IDLE}"),
    "vae": (hop_onestep, "--plan-update none"),
    "discrete": (hop_ppo_gumbel, ""),
    "em": (hop_ppo_gumbel, "--goal-training em"),
}


@dataclasses.dataclass
class Options:
    env_id: str = "msh-4x4-4h1s"  # game
    kinds: str = "ns,nh,random"  # scripted co-players
    steps: int = 500_000  # game steps to learn from
    matches: int = 300  # matches to vote by, and as many to measure on
    seeds: str = "1,2,3"  # a comma list
    models: str = "none,oracle,vae,discrete"  # which to train, also em


def train(script, words):
    """The agent at the end of a run."""
    last = {}
    folder = tempfile.TemporaryDirectory()
    with folder, contextlib.chdir(folder.name), contextlib.redirect_stdout(None):
        script.train(script.parse_arguments(words), watch=last.update)
    return last["agent"]


def predictions(script, player, seen, mask):
    """log pi_hat [B, N, A] of all seats, by what a Player has inferred of them."""
    own, views, goals, _ = seen
    moa = player.agent.moa
    if script is hop_onestep:
        return script.masked(moa.decoder(own, views, goals), mask).log_softmax(-1)
    belief = moa.belief(player.memory).clamp(min=1e-30).log()
    each = []
    for action in range(mask.shape[2]):
        taken = torch.full_like(mask[:, :, 0], action, dtype=torch.int64)
        each.append((belief + moa.log_likelihood(own, views, mask, taken)).logsumexp(2))
    return torch.stack(each, 2)


@torch.no_grad()
def play(script, agent, kinds, matches, seed):
    """Of scripted players in `matches` matches side by side, by episode: mean NLL [EPISODES]; and
    at the start of each, (likeliest goal, kind) [.., 2] (empty for a continuous goal)."""
    generator = torch.Generator().manual_seed(seed)
    game = agent.game
    players = script.CoPlayers(game, kinds.split(","), matches, EPISODES, generator)
    player = players.agents[0] = script.Player(agent, matches)
    state = game.start(matches, generator)
    sums = torch.zeros(EPISODES, 2)
    starts = [[] for _ in range(EPISODES)]
    fresh = torch.ones(matches).bool()  # an episode begins
    done = ~fresh
    while not done.all():
        mask = game.action_mask(state)
        others = (players.kind > 0) & ~done[:, None]
        guess = predictions(script, player, player.infer(state, players), mask)
        if script is not hop_onestep:
            goal = agent.moa.belief(player.memory).argmax(2)
            pairs = torch.stack([goal, players.kind], 2)
        actions = players.act(state, mask)
        nll = -script.pick(guess, actions)
        counted = others & player.decision["alive"]
        for k in range(EPISODES):
            now = (players.episode == k)[:, None]
            sums[k] += torch.stack([nll[counted & now].sum(), (counted & now).sum()])
            if script is not hop_onestep:
                starts[k].append(pairs[others & now & fresh[:, None]])
        state, _, terminated, truncated = game.step(state, actions)
        fresh = (terminated | truncated).all(1)
        done = done | players.observe(fresh)
        state = game.restart(state, fresh, generator)
    return sums[:, 0] / sums[:, 1], [torch.cat(pairs) for pairs in starts if pairs]


def accuracy(votes, pairs, names):
    """Share of players whose goal tells the kind, by the majority of `votes` with the same goal."""
    if "cleaner" in names:
        cleaner = names.index("cleaner")
        votes, pairs = (torch.stack([x[:, 0], x[:, 1] == cleaner], 1) for x in (votes, pairs))
    table = torch.zeros(64, 64)
    table.index_put_((votes[:, 0], votes[:, 1]), torch.ones(len(votes)), accumulate=True)
    return float((table.argmax(1)[pairs[:, 0]] == pairs[:, 1]).float().mean())


def row(label, values):
    print(f"| {label} | " + " | ".join(f"{float(value):.3f}" for value in values) + " |")


def main(options: Options) -> None:
    torch.set_num_threads(1)
    names = ["self", *options.kinds.split(",")]
    print(f"{options.env_id}, {options.kinds}, {options.steps} game steps; torch {torch.__version__}")
    print("\n| | " + " | ".join(f"episode {k + 1}" for k in range(EPISODES)) + " |")
    print("|" + "-|" * (EPISODES + 1))
    for seed in map(int, options.seeds.split(",")):
        nll = {}
        for model in options.models.split(","):
            script, words = MODELS[model]
            words += f" --env-id {options.env_id} --co-players {options.kinds} --seed {seed}"
            words += f" --total-timesteps {options.steps} --match-episodes {EPISODES}"
            agent = train(script, f"{words} --learning-rate 0".split())
            _, votes = play(script, agent, options.kinds, options.matches, 1000 + seed)
            nll[model], pairs = play(script, agent, options.kinds, options.matches, 2000 + seed)
            row(f"NLL, {model}, seed {seed}", nll[model])
            if pairs:
                shares = [accuracy(*parts, names) for parts in zip(votes, pairs)]
                row(f"kind known, seed {seed}", shares)
        for model in ("vae", "discrete", "em"):
            if {"none", "oracle", model} <= nll.keys():
                gap = (nll["none"] - nll[model]) / (nll["none"] - nll["oracle"])
                row(f"gap closed, {model}, seed {seed}", gap)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
