"""The diffusion model of diffusion_planner.py: its tokens, loss and draws by brute force; the
planner; and that runs learn it, go on from checkpoints, and refuse what cannot be."""

import itertools
import math
from pathlib import Path

import pytest
import torch

import conftest
import diffusion_planner as script
from run_tools import (
    assert_same_run,
    broken_run,
    generator_of,
    networks,
    parsed,
    refused,
    run,
    shake,
    trust,
)

ACTIONS, GONE, MASKED = 7, 7, 8
HUNT = {"env_id": "msh-3x3-3p-2h1s", "horizon": 6, "plan_until": 1.0, "plan_samples": 4}
SMALL = {**conftest.SMALL, **HUNT}


@pytest.fixture(autouse=True)
def few_updates(monkeypatch):
    monkeypatch.setattr(script, "MODEL_UPDATES", 1)
    monkeypatch.setattr(script, "MODEL_BATCH", 64)


def situation(batch=40, **options):
    """An agent whose every network says something; a state in which some have left; in it what
    Player.infer could see."""
    args = script.Args(**{**SMALL, **options})
    game = script.make_game(args, "cpu")
    agent = shake(script.Agent(game, script.checked(args, game)))
    state = game.start(batch, generator_of(4))
    for k in range(3):
        weights = game.action_mask(state).float()
        weights[..., 5:] *= 6.0
        state, *_ = game.step(state, script.sample(weights.log(), generator_of(k)))
    own, views = game.features(state)
    goals = torch.randn(*own.shape[:2], agent.moa.goal_size, generator=generator_of(1))
    return agent, state, (own, views, goals, 0.0 * goals)


@pytest.mark.parametrize("history", [512, 11])
def test_tokens_are_what_followed(monkeypatch, history):
    """Step by step, over ends of episodes, of matches, of the record, and of what is read."""
    monkeypatch.setattr(script, "HISTORY", history)
    agent, state, _ = situation(4)
    game, generator = agent.game, generator_of(0)
    buffer = script.MatchBuffer(game, agent.args)
    episodes = torch.arange(4)  # so that matches of two end here and there
    record = []
    for _ in range(40):
        actions = script.random_actions(game.action_mask(state), generator)
        after, reward, terminated, truncated = game.step(state, actions)
        ended = (terminated | truncated).all(1)
        episodes = episodes + ended
        record.append((actions, game.alive(state), ended, ended & (episodes % 2 == 0)))
        step = {"action": actions, "alive": game.alive(state), "reward": reward}
        buffer.add(state, {**step, "reached": actions * 0 - 1}, *record[-1][2:])
        state = game.restart(after, ended, generator)
    found = set()
    for g, start in itertools.product(range(4), range(40)):
        batch = buffer.read(torch.tensor([g]), torch.tensor([start]))
        tokens = script.future_tokens(batch, 8, ACTIONS)[0].tolist()
        ends = [t for t in range(start, 40) if record[t][3][g]]
        last = min([*ends, 39, start + history - 1])
        cut = last == start + history - 1  # who can tell whether the episode goes on?
        for t, n, h in itertools.product(range(start, last + 1), range(3), range(8)):
            over = [s for s in range(t, min(t + h, last + 1)) if record[s][2][g]]
            if over and not (cut and over[0] == last):
                expected = GONE
            elif t + h > last:
                expected = MASKED if record[t][1][g, n] else GONE
            else:
                actions, alive, *_ = record[t + h]
                expected = int(actions[g, n]) if alive[g, n] else GONE
            assert tokens[t - start][n][h] == expected, (g, start, t, n, h)
            found.add(expected)
    assert found >= {GONE, MASKED, 0, 5}


def test_denoiser_seat_by_seat():
    """Each reads its own tokens beside its goal, and co-players' beside theirs, in any order."""
    agent, _, (own, views, goals, _) = situation()
    tokens = torch.randint(ACTIONS + 2, (40, 3, 4), generator=generator_of(3))
    logits = script.denoise(agent, own, agent.inputs(views, goals)[0], goals, tokens)
    plans = torch.eye(ACTIONS + 2)[tokens].flatten(2)
    for i in range(3):
        company = [(i + 2) % 3, (i + 1) % 3]
        theirs = torch.cat([views[:, i].flip(1), goals[:, company], plans[:, company]], 2)
        expected = agent.denoiser(own[:, i], theirs, torch.cat([goals[:, i], plans[:, i]], 1))
        torch.testing.assert_close(logits[:, i].flatten(1), expected)


@torch.no_grad()
def test_loss_is_the_bound_over_all_masks(monkeypatch):
    """Of 1300 times one state: the integral over t of all ways to mask its tokens, times 1/t; who
    left is seen and no target; with and without a second step that is recorded."""
    agent, state, _ = situation(future_steps=2)
    one = agent.game.alive(state).sum(1) == 2
    state = type(state)(*(x[one][:1] for x in state))
    alive, mask = agent.game.alive(state), agent.game.action_mask(state)
    own, views = agent.game.features(state)
    now = mask.int().argmax(2)
    memory = torch.zeros(1, 3, 2, agent.moa.memory_size)
    goals, _ = agent.moa.encode(memory, own, views)
    read = []
    denoise = script.denoise
    monkeypatch.setattr(script, "denoise", lambda *x: read.append(x[-1]) or denoise(*x))
    for known in (1, 2):
        seen = {"own": own, "views": views, "mask": mask, "first": now * 0, "ended": alive & False}
        rows = [{**seen, "action": now, "active": alive, "weight": alive}]
        active = alive & (known == 2)
        rows.append({**seen, "action": now * 0 + 3, "active": active, "weight": alive & False})
        batch = {k: torch.stack([row[k] for row in rows], 1) for k in rows[0]}
        batch = {k: x.expand(1300, *x.shape[1:]) for k, x in batch.items()}
        future = torch.stack([now, now * 0 + 3], 2).masked_fill(~alive[..., None], GONE)
        future[0, alive[0], known:] = MASKED
        places = [*itertools.product(alive[0].nonzero()[:, 0].tolist(), range(known))]
        expected = 0.0
        for count in range(1, len(places) + 1):
            for hidden in itertools.combinations(places, count):
                noisy = future.clone()
                for n, h in hidden:
                    noisy[0, n, h] = MASKED
                others, _ = agent.inputs(views, goals)
                logits = script.denoise(agent, own, others, goals, noisy)[0]
                logits[:, 0] += torch.cat([mask[0], mask[0, :, :1] & False], 1).log()
                nll = [-logits[n, h].log_softmax(0)[future[0, n, h]] for n, h in hidden]
                ways = math.gamma(count) * math.gamma(len(places) - count + 1)
                expected += float(sum(nll)) * ways / math.gamma(len(places) + 1) / len(places)
        losses = [script.diffusion_loss(agent, batch, generator_of(k))[0] for k in range(12)]
        assert float(sum(losses)) / 12 == pytest.approx(expected, rel=0.02)
        assert all((tokens[:, ~alive[0]] == GONE).all() for tokens in read)


@pytest.mark.parametrize("steps, denoising_steps", [(1, 2), (1, 1), (2, 4), (2, 1)])
def test_draws_have_the_distribution_of_a_table(monkeypatch, steps, denoising_steps):
    """One token at a time: the joint one, summed over what is not asked for; all at once: the
    product of its marginals."""
    options = {"env_id": "msh-2x2-2p-1h1s", "future_steps": 2, "plan_samples": 20_000}
    agent, _, seen = situation(1, denoising_steps=denoising_steps, **options)
    state = agent.game.start(1, generator_of(4))
    legal = agent.game.action_mask(state)[0].nonzero()
    first = [legal[legal[:, 0] == n, 1].tolist()[-3:] for n in range(2)]
    futures = [*itertools.product(first[0], (0, GONE), first[1], (0, GONE))]
    futures = torch.tensor(futures).view(-1, 2, 2)
    table = torch.rand(len(futures), generator=generator_of(5)) ** 4
    table[futures[:, 0, 0] == futures[:, 1, 0]] *= 9.0  # players depend on each other
    table[futures[:, 0, 1] == futures[:, 1, 1]] *= 9.0
    table = table / table.sum()

    def denoise(agent, own, others, goals, tokens):
        fits = ((futures == tokens[:, :, None]) | (tokens[:, :, None] == MASKED)).flatten(3).all(3)
        told = torch.nn.functional.one_hot(futures, ACTIONS + 1).float()
        return torch.einsum("bkf,fnha->bknha", fits * table, told).log()

    monkeypatch.setattr(script, "denoise", denoise)
    tokens = script.sample_futures(agent, state, seen, steps, generator_of(6))[0]
    assert (tokens[:, :, steps:] == MASKED).all()
    asked, number = futures[:, :, :steps].flatten(1).unique(dim=0, return_inverse=True)
    joint = torch.zeros(len(asked)).index_add(0, number, table)
    product = torch.ones(len(asked))
    for place in asked.T:
        product *= (joint * (place == place[:, None])).sum(1)
    assert (joint - product).abs().sum() > 0.3
    drawn = (tokens[:, None, :, :steps].flatten(2) == asked).all(2).float().mean(0)
    assert (drawn - (product if denoising_steps == 1 else joint)).abs().sum() < 0.06


def test_the_planner_takes_the_first_step(monkeypatch):
    """Of one set of draws for all observers; who has left idles, who is there acts legally."""
    agent, state, seen = situation()
    drawn = []
    draw = script.sample_futures
    monkeypatch.setattr(script, "sample_futures", lambda *x: drawn.append(draw(*x)) or drawn[0])
    monkeypatch.setattr(script, "outcome", lambda model, own, others, joint, a: (joint[..., 1], a))
    alive, mask = agent.game.alive(state), agent.game.action_mask(state)
    chosen = alive.nonzero(as_tuple=True)
    agent.args.gamma = 0.0
    q = script.scores(agent, state, seen, chosen, generator_of(1))
    first = drawn[0][..., 0]
    there = alive[:, None].expand_as(first)
    assert (first[~there] == GONE).all() and (drawn[0][..., 1:][there] == MASKED).all()
    assert mask.log().gather(2, first.transpose(1, 2).clamp(max=6)).isfinite()[alive].all()
    joint = torch.where(there, first, 4).float()
    assert joint.std(1).max() > 0.0
    expected = joint.mean(1)[chosen[0], (chosen[1] + 2) % 3]
    torch.testing.assert_close(q, expected[:, None].expand_as(q))


def test_goals_are_those_of_the_moa(monkeypatch):
    """The same memories go into the encoder as in the MOA's own loss. While goals alone are learnt,
    futures are not."""
    last, given, learns = {}, [], []

    def watch(**names):
        last.update(names)
        learns.append("diffusion/nll" in names["metrics"])

    run(script, script.Args(**{**SMALL, "pretrain_moa_steps": 64}), watch)
    assert learns == [False, True]
    monkeypatch.setattr(script, "MOA_ROWS", 10**6)
    agent = last["agent"]
    encode = agent.moa.encode
    monkeypatch.setattr(agent.moa, "encode", lambda *x: given.append(x[0]) or encode(*x))
    batch = last["buffer"].sample(8, generator_of(0))
    script.moa_loss(agent, batch, False, generator_of(0))
    script.diffusion_loss(agent, batch, generator_of(0))
    ours, theirs = given[1].flatten(0, 1).flatten(1), given[0].flatten(1)
    apart = (theirs[:, None] - ours).abs().amax(2).amin(1)
    assert len(theirs) > 50 and apart.max() < 1e-4 < ours.std(0).max()


@pytest.mark.parametrize("env_id", [HUNT["env_id"], "test_pettingzoo_game:Leaving"])
def test_runs_learn_it_and_go_on_to_the_bit(monkeypatch, env_id):
    """With a frozen MOA as well; not where the planner does not draw from it."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    seen = []

    def watch(agent, **names):
        trust(agent)
        seen.append({name: x.clone() for name, x in networks(agent).items()})

    args = script.Args(**{**SMALL, "env_id": env_id, "checkpoint_every": 1})
    whole = run(script, args, watch).path
    assert not torch.equal(seen[0]["denoiser"], seen[1]["denoiser"])
    if env_id == HUNT["env_id"]:
        unbroken = run(script, args).path
        broken = broken_run(script, args, 1)
        run(script, parsed(script, "--resume", broken))
        assert_same_run(script, unbroken, broken)
    for source in ("diffusion", "moa"):
        words = f"--init {whole} --total-timesteps 200 --freeze-moa --co-player-model {source}"
        run(script, parsed(script, *words.split()), watch)
        assert torch.equal(seen[-1]["moa"], seen[-2]["moa"])
        assert torch.equal(seen[-1]["denoiser"], seen[-2]["denoiser"]) == (source == "moa")
    played = script.evaluate(whole, "random", episodes=4, denoising_steps=5)
    assert math.isfinite(played["focal_return"])


def test_what_cannot_be(monkeypatch, capsys):
    """Among it: a denoiser that never learnt."""
    path = run(script, script.Args(**{**SMALL, "co_player_model": "moa"})).path
    words = f"--evaluate {path} --co-player-model diffusion --plan-update offset"
    assert "diffusion" in refused(script, monkeypatch, capsys, *words.split())
    wrong = {"future-steps": 65, "denoising-steps": 0, "co-player-model": "self"}
    for option, value in wrong.items():
        assert option in refused(script, monkeypatch, capsys, f"--{option}", value)
