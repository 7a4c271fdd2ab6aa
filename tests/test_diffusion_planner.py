"""The diffusion model of diffusion_planner.py: what it learns from, its loss and its draws by brute
force, seats relabelled; and that runs learn, plan with it and go on from checkpoints."""

import itertools
import math
from pathlib import Path

import pytest
import torch

import diffusion_planner as script
from conftest import SMALL
from run_tools import assert_same_run, broken_run, networks, parsed, refused, run, shake, trust

HUNT = "msh-3x3-3p-2h1s"
ACTIONS = 7
GONE, MASKED = ACTIONS, ACTIONS + 1
SMALL = {**SMALL, "env_id": HUNT, "horizon": 6, "plan_until": 1.0, "plan_samples": 4}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "MODEL_UPDATES", 2)
    monkeypatch.setattr(script, "MODEL_BATCH", 64)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def lively(**options):
    """A game and an agent whose every network says something."""
    args = script.Args(**{**SMALL, **options})
    game = script.make_game(args, "cpu")
    return game, shake(script.Agent(game, script.checked(args, game)))


def situation(game, batch=40, steps=3):
    """A state in which some have left."""
    generator = generator_of(2)
    state = game.start(batch, generator)
    for _ in range(steps):
        weights = game.action_mask(state).float()
        weights[..., 5:] *= 6.0
        state, *_ = game.step(state, script.sample(weights.log(), generator))
    assert not game.alive(state).all()
    return state


def seen_in(game, agent, state):
    own, views = game.features(state)
    goals = torch.randn(*own.shape[:2], agent.moa.goal_size, generator=generator_of(1))
    return own, views, goals, goals * 0.0


def recorded_play(game, agent, steps):
    """A MatchBuffer of some matches of two episodes, and by step actions [B, N], who was alive,
    which episodes and matches ended [B]."""
    generator = generator_of(0)
    buffer = script.MatchBuffer(game, agent.args)
    players = script.CoPlayers(game, ["nh", "random"], 4, 2, generator)
    players.agents[0] = script.Player(agent, 4)
    agent.plan_mode = "none"
    state = game.start(4, generator)
    record = []
    for _ in range(steps):
        actions = players.act(state, game.action_mask(state))
        after, reward, terminated, truncated = game.step(state, actions)
        step = {"action": actions, "alive": game.alive(state), "reward": reward}
        step["reached"] = game.reached(state, actions, after, reward)
        ended = (terminated | truncated).all(1)
        match_ended = players.observe(ended)
        buffer.add(state, step, ended, match_ended)
        record.append((actions, game.alive(state), ended, match_ended))
        state = game.restart(after, ended, generator)
    return buffer, record


@pytest.mark.parametrize("history", [512, 11])
def test_tokens_are_what_followed(monkeypatch, history):
    """Step by step, over ends of episodes, of matches, of the record, and of what is read."""
    monkeypatch.setattr(script, "HISTORY", history)
    buffer, record = recorded_play(*lively(), 40)
    found = set()
    for g, start in itertools.product(range(4), range(40)):
        batch = buffer.read(torch.tensor([g]), torch.tensor([start]))
        tokens = script.future_tokens(batch, 8, ACTIONS)[0]
        ends = [t for t in range(start, 40) if record[t][3][g]]
        last = min([*ends, 39, start + history - 1])
        cut = last == start + history - 1
        for t, n, h in itertools.product(range(start, last + 1), range(3), range(8)):
            over = [s for s in range(t, min(t + h, last + 1)) if record[s][2][g]]
            if over and not (cut and over[0] == last):
                expected = GONE
            elif t + h > last:
                expected = MASKED
            else:
                actions, alive, *_ = record[t + h]
                expected = int(actions[g, n]) if alive[g, n] else GONE
            assert tokens[t - start, n, h] == expected, (g, start, t, n, h)
            found.add(expected)
    assert found >= {GONE, MASKED, 0, 5}


def test_denoiser_seat_by_seat_and_relabelled():
    """Each reads its own tokens beside its goal, and co-players' beside theirs."""
    game, agent = lively()
    own, views, goals, _ = seen_in(game, agent, situation(game))
    tokens = torch.randint(ACTIONS + 2, (40, 3, 4), generator=generator_of(3))
    others, _ = agent.inputs(views, goals)
    logits = script.denoise(agent, own, others, goals, tokens)
    assert logits.shape == (40, 3, 4, ACTIONS + 1) and logits.std(0).min() > 0.01
    plans = torch.eye(ACTIONS + 2)[tokens].flatten(2)
    for i in range(3):
        company = [(i + 1) % 3, (i + 2) % 3]
        theirs = torch.cat([views[:, i], goals[:, company], plans[:, company]], 2)
        expected = agent.denoiser(own[:, i], theirs, torch.cat([goals[:, i], plans[:, i]], 1))
        torch.testing.assert_close(logits[:, i].flatten(1), expected)
    seats = [2, 0, 1]
    state = situation(game)
    state = state._replace(players=state.players[:, seats])
    own, views = game.features(state)
    others, _ = agent.inputs(views, goals[:, seats])
    moved = script.denoise(agent, own, others, goals[:, seats], tokens[:, seats])
    torch.testing.assert_close(moved, logits[:, seats])


@torch.no_grad()
def test_loss_is_the_bound_over_all_masks():
    """Of 1300 times one state: the integral over t of all ways to mask its known tokens, times 1/t;
    a seat that left is seen, what is not recorded is masked, and both are no targets."""
    game, agent = lively(future_steps=2)
    state = situation(game)
    left = (~game.alive(state)).sum(1)
    state = type(state)(*(x[left == 1][:1] for x in state))
    alive = game.alive(state)
    own, views = game.features(state)
    mask = game.action_mask(state)
    first = mask.int().argmax(2)
    here = torch.where(alive, first, 4)
    rows = {"own": own, "others": views, "mask": mask, "action": here, "active": alive}
    rows |= {"ended": alive & False, "first": here * 0, "weight": alive}
    later = {**rows, "action": here * 0 + 3, "weight": alive & False}
    batch = {
        k: torch.stack([rows[k], later[k]], 1).expand(1300, -1, -1, *rows[k].shape[2:])
        for k in rows
    }
    goals, _ = agent.moa.encode(torch.zeros(1, 3, 2, agent.moa.memory_size), own, views)
    others, _ = agent.inputs(views, goals)
    future = torch.stack([here, here * 0 + 3], 2).masked_fill(~alive[..., None], GONE)
    places = alive[0].nonzero()[:, 0].tolist()
    places = [*itertools.product(places, range(2))]
    expected = 0.0
    generators = [generator_of(k) for k in range(12)]
    for count in range(1, len(places) + 1):
        for hidden in itertools.combinations(places, count):
            noisy = future.clone()
            for n, h in hidden:
                noisy[0, n, h] = MASKED
            logits = script.denoise(agent, own, others, goals, noisy)
            logits[:, :, 0, :-1] = logits[:, :, 0, :-1].masked_fill(~mask, -1e9)
            logits[:, :, 0, -1] = -1e9
            nll = -sum(logits.log_softmax(3)[0, n, h, future[0, n, h]] for n, h in hidden)
            ways = math.gamma(count) * math.gamma(len(places) - count + 1)  # t^(c - 1) (1 - t)^(..)
            expected += float(nll) * ways / math.gamma(len(places) + 1) / len(places)
    losses = [float(script.diffusion_loss(agent, batch, random)[0]) for random in generators]
    assert sum(losses) / 12 == pytest.approx(expected, rel=0.02)
    batch["active"] = batch["active"] & torch.tensor([True, False])[:, None]  # nothing follows
    loss, _ = script.diffusion_loss(agent, batch, generator_of(0))
    assert not math.isclose(float(loss), expected, rel_tol=0.1)


@pytest.mark.parametrize("steps, denoising_steps", [(1, 2), (1, 1), (2, 4), (2, 1)])
def test_draws_have_the_distribution_of_a_table(monkeypatch, steps, denoising_steps):
    """One token at a time: the joint one, summed over what is not asked for; all at once: the
    product of its marginals. At the first step only legal actions, whatever the table says."""
    options = {"env_id": "msh-2x2-2p-1h1s", "future_steps": 2, "plan_samples": 20_000}
    game, agent = lively(denoising_steps=denoising_steps, **options)
    state = game.start(1, generator_of(4))
    mask = game.action_mask(state)[0]
    futures = torch.tensor([*itertools.product([1, 3, 4], repeat=4)]).view(81, 2, 2)
    table = torch.rand(81, generator=generator_of(5)) ** 4
    table[futures[:, 0, 0] == futures[:, 1, 0]] *= 9.0  # players depend on each other
    legal = mask[torch.arange(2), futures[:, :, 0]].all(1)

    def denoise(agent, own, others, goals, tokens):
        tokens = tokens[:, :, None]
        fits = ((futures == tokens) | (tokens == MASKED)).flatten(3).all(3)
        told = torch.nn.functional.one_hot(futures, ACTIONS + 1).float()
        return torch.einsum("bkf,fnha->bknha", fits * table * legal, told).log()

    monkeypatch.setattr(script, "denoise", denoise)
    seen = seen_in(game, agent, state)
    tokens = script.sample_futures(agent, state, seen, steps, generator_of(6))[0]
    assert (tokens[:, :, steps:] == MASKED).all()
    table = table * legal / (table * legal).sum()
    asked, number = futures[:, :, :steps].flatten(1).unique(dim=0, return_inverse=True)
    joint = torch.zeros(len(asked)).index_add(0, number, table)
    product = torch.ones(len(asked))
    for place in asked.T:
        product *= (joint * (place == place[:, None])).sum(1)
    assert (joint - product).abs().sum() > 0.3
    drawn = (tokens[:, None, :, :steps].flatten(2) == asked).all(2).float().mean(0)
    expected = product if denoising_steps == 1 else joint
    assert float(drawn.sum()) == pytest.approx(1.0)
    assert (drawn - expected).abs().sum() < 0.06


def test_the_planner_takes_the_first_step(monkeypatch):
    """Of one set of draws for all observers; who has left idles, who is there acts legally."""
    game, agent = lively()
    state = situation(game)
    drawn = []
    draw = script.sample_futures
    monkeypatch.setattr(script, "sample_futures", lambda *x: drawn.append(draw(*x)) or drawn[0])
    monkeypatch.setattr(script, "outcome", lambda model, own, others, joint, a: (joint[..., 0], a))
    alive = game.alive(state)
    chosen = alive.nonzero(as_tuple=True)
    agent.args.gamma = 0.0
    q = script.scores(agent, state, seen_in(game, agent, state), chosen, generator_of(1))
    first = drawn[0][..., 0]
    there = alive[:, None].expand_as(first)
    assert (first[~there] == GONE).all() and first[there].max() < GONE
    assert (
        game.action_mask(state)[:, None]
        .expand(-1, 4, -1, -1)[there]
        .gather(1, first[there][:, None])
        .all()
    )
    assert first.float().std(1).max() > 0.0
    joint = torch.where(there, first, 4).float().mean(1)
    expected = joint[chosen[0], (chosen[1] + 1) % 3]
    torch.testing.assert_close(q, expected[:, None].expand_as(q))


@pytest.mark.parametrize("env_id", [HUNT, "test_pettingzoo_game:Leaving"])
def test_runs_learn_it_and_go_on_to_the_bit(tmp_path, monkeypatch, env_id):
    """It learns if the planner draws from it, with a frozen MOA as well."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    weights = []

    def watch(**names):
        trust(**names)
        found = networks(names["agent"])
        weights.append({name: found[name].clone() for name in ("moa", "denoiser")})
        assert ("diffusion/nll" in names["metrics"]) == (names["args"].co_player_model != "moa")

    args = script.Args(**{**SMALL, "env_id": env_id, "checkpoint_every": 1})
    whole = run(script, args, tmp_path, watch).path
    assert not torch.equal(weights[0]["denoiser"], weights[1]["denoiser"])
    if env_id == HUNT:
        unbroken = run(script, args, tmp_path).path
        broken = broken_run(script, args, tmp_path, 1)
        run(script, parsed(script, tmp_path, "--resume", broken), tmp_path)
        assert_same_run(script, unbroken, broken)
    words = ["--init", whole, "--total-timesteps", 200, "--freeze-moa"]
    run(script, parsed(script, tmp_path, *words), tmp_path, watch)
    assert torch.equal(weights[-1]["moa"], weights[-2]["moa"])
    assert not torch.equal(weights[-1]["denoiser"], weights[-2]["denoiser"])
    played = script.evaluate(whole, "random", episodes=4, denoising_steps=5)
    assert math.isfinite(played["focal_return"])


def test_what_cannot_be(tmp_path, monkeypatch, capsys):
    """Among it: a denoiser that never learnt."""
    args = script.Args(**{**SMALL, "co_player_model": "moa"})
    path = run(script, args, tmp_path).path
    words = ["--evaluate", path, "--co-player-model", "diffusion", "--plan-update", "offset"]
    assert "diffusion" in refused(script, monkeypatch, capsys, *words)
    assert "future-steps" in refused(script, monkeypatch, capsys, "--future-steps", 65)
    assert "denoising" in refused(script, monkeypatch, capsys, "--denoising-steps", 0)
    assert "co-player-model" in refused(script, monkeypatch, capsys, "--co-player-model", "self")
