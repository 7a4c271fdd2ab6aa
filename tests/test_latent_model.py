"""The latent world model of latent_world_model.py: losses, targets and planner, each by a slow
way to the same; what it learns of a tiny game; and training from a file of recorded play."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import SMALL, load_script
from run_tools import assert_same_run, broken_run, networks, parsed, refused, run, shake, trust

NAME = "latent_world_model"
HUNT = "msh-3x3-3p-2h1s"
DRIFTS = "msg-2x3-3p-3d"
GAMES = [HUNT, DRIFTS, "msh-2x3-4p-2h2s", "msh-3x3-1p-2h1s"]
LEAVING = "test_pettingzoo_game:Leaving"
STAY = 4
TERMS = ["observation", "reward", "value", "consistency"]
GAMMA = 0.9
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(scope="module")
def script():
    return load_script(NAME)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Runs are written elsewhere; environments of another test module can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)


def small(script, **options):
    return script.Args(**{**SMALL, "plan_samples": 4, **options})


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def lively(script):
    """Makes a game and an agent whose every network says something, with the options given."""

    def make(seed=0, **options):
        args = small(script, **{"env_id": HUNT, "horizon": 9, "gamma": GAMMA, **options})
        game = script.make_game(args, "cpu")
        return game, shake(script.Agent(game, script.checked(args, game)), seed)

    return make


def some_actions(script, game, state, generator):
    """Legal actions [B, N], the interactions ahead of moves."""
    weights = game.action_mask(state).float()
    weights[..., STAY + 1 :] *= 6.0
    return script.sample(weights.log(), generator)


def rows_of_play(script, game, agent, batch=40, steps=9):
    """Transitions [R, ..] of all players in random play, with any goals and shifts."""
    generator = generator_of(3)
    found = []
    state = game.start(batch, generator)
    for _ in range(steps):
        action = some_actions(script, game, state, generator)
        after, reward, terminated, _ = game.step(state, action)
        own, views = game.features(state)
        goals = torch.randn(*action.shape, agent.moa.goal_size, generator=generator)
        row = {"own": own, "others": agent.inputs(views, goals)[0], "action": action}
        row |= {"other_actions": action[:, game.others], "reward": reward}
        row |= {"shift": torch.randn(action.shape, generator=generator), "terminated": terminated}
        row |= {"valued": torch.rand(action.shape, generator=generator) < 0.6}
        row |= dict(zip(["next_own", "next_views"], game.features(after), strict=True))
        found.append({name: value[game.alive(state)] for name, value in row.items()})
        state = game.restart(after, terminated.all(1), generator)
    return {name: torch.cat([row[name] for row in found]) for name in found[0]}


# ------------------------------------------------------------------------------------------------
# The model in plain matrices, one row at a time
# ------------------------------------------------------------------------------------------------
def linear(layer, x):
    return layer.weight @ x + layer.bias


def plain_network(net, own, others, goal):
    theirs = own.new_zeros(net.mix.in_features)
    for other in others:
        theirs = theirs + linear(net.other, other).relu()
    hidden = linear(net.own, own) + linear(net.mix, theirs) + linear(net.goal, goal)
    return linear(net.out, linear(net.hidden, hidden.relu()).relu())


def plain_encode(model, own, others):
    mine, theirs = model.encoders
    zs = linear(mine[2], linear(mine[0], own).relu())
    return zs, [linear(theirs[2], linear(theirs[0], other).relu()) for other in others]


def plain_step(model, own, others, action, other_actions):
    size = model.size

    def block(layer, zs, action):
        both = linear(layer, zs)[2 * size * action : 2 * size * (action + 1)]
        return both[:size], both[size:]

    step, shift = block(model.own_blocks, own, action)
    pairs = zip(others, other_actions, strict=True)
    parts = [block(model.other_blocks, zs, a) for zs, a in pairs]
    choice = torch.eye(model.num_actions).to(own)[action]
    whole = plain_network(model.whole, own, [heard for _, heard in parts], choice)
    ahead = []
    for zs, (theirs, heard) in zip(others, parts, strict=True):
        change = linear(model.change, (heard + whole[size : 2 * size]).relu())
        stays = 1.0 / (1.0 + (-3.0 - change[size]).exp())
        ahead.append((zs + theirs + shift + change[:size]) * stays)
    return own + step + whole[:size], ahead, whole[2 * size]


def plain_terms(script, agent, row):
    """The four terms of one row, as tensors."""
    model = agent.model
    goals = row["others"][:, model.other_size :]
    goal = goals.sum(0)
    zs = plain_encode(model, row["own"], row["others"])
    seen = torch.cat([row["next_views"], goals], 1)
    after = plain_encode(model, row["next_own"], seen)
    action = int(row["action"])
    *ahead, reward = plain_step(model, *zs, action, row["other_actions"].tolist())
    own = linear(model.own_decoder, ahead[0])
    ended = bool(row["terminated"])
    terms = {"observation": (own[-1] - float(not ended)) ** 2}
    terms["reward"] = (reward - row["reward"]) ** 2
    terms["value"] = terms["consistency"] = own.new_zeros(())
    values = [plain_network(model.value, *latents, goal)[0] for latents in (zs, after, ahead)]
    if bool(row["valued"]):
        target = row["reward"] + row["shift"]
        if not ended:
            following = values[1 if agent.args.td_target == "observed" else 2]
            target = target + GAMMA * following
        terms["value"] = (values[0] - target.detach()) ** 2
    if not ended:
        terms["observation"] = terms["observation"] + ((own[:-1] - row["next_own"]) ** 2).sum()
        for zs, view in zip(ahead[1], row["next_views"], strict=True):
            error = linear(model.other_decoder, zs) - view
            terms["observation"] = terms["observation"] + (error**2).sum()
        terms["value"] = terms["value"] + (values[2] - values[1].detach()) ** 2
        pairs = [(ahead[0], after[0]), *zip(ahead[1], after[1], strict=True)]
        terms["consistency"] = sum(((x - y) ** 2).sum() for x, y in pairs)
    return terms


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("td_target", ["observed", "model"])
@pytest.mark.parametrize("env_id", GAMES)
def test_losses_row_by_row(script, lively, monkeypatch, env_id, td_target):
    """Terms, their weighted sum, and its gradient, on rows with ends and rows without a value."""
    coefs = dict(zip(TERMS, (0.5, 2.0, 0.3, 0.7), strict=True))
    monkeypatch.setattr(script, "MODEL_COEFS", coefs)
    game, agent = lively(env_id=env_id, td_target=td_target)
    rows = rows_of_play(script, game, agent)
    some = torch.arange(0, len(rows["reward"]), max(1, len(rows["reward"]) // 60))
    rows = {name: value[some] for name, value in rows.items()}
    kinds = set(zip(rows["terminated"].tolist(), rows["valued"].tolist(), strict=True))
    assert len(kinds) == 4 and (rows["reward"] != 0.0).any()
    by_row = []
    for r in range(len(some)):
        row = {name: value[r] for name, value in rows.items()}
        by_row.append(plain_terms(script, agent, row))
    expected = {name: sum(row[name] for row in by_row) / len(some) for name in TERMS}
    loss, terms = script.model_loss(agent, rows)
    assert list(terms) == [f"model/{name}" for name in TERMS]
    for name in TERMS:
        torch.testing.assert_close(terms[f"model/{name}"], expected[name], **CLOSE)
        assert expected[name] > 0.01
    whole = sum(coefs[name] * expected[name] for name in TERMS)
    torch.testing.assert_close(loss, whole, **CLOSE)
    parameters = [*agent.model.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(loss, parameters, **options)
    for one, other in zip(gradients, torch.autograd.grad(whole, parameters, **options)):
        torch.testing.assert_close(one, other, **CLOSE)


# ------------------------------------------------------------------------------------------------
# Symmetry
# ------------------------------------------------------------------------------------------------
def test_permuted_co_players_permute_latents(script, lively):
    """And what is decoded of them; reward, value and the own latent stay."""
    game, agent = lively(env_id="msh-2x3-4p-2h2s")
    model = agent.model
    rows = rows_of_play(script, game, agent)
    order = torch.tensor([2, 0, 1])
    shown = []
    for place in (torch.arange(3), order):
        others = rows["others"][:, place]
        zs = model.encode(rows["own"], others)
        *ahead, reward = model(*zs, rows["action"], rows["other_actions"][:, place])
        own, views, plays_on = model.decode(*ahead)
        goal = others[..., model.other_size :].sum(1)
        alike = [zs[0], ahead[0], reward, own, plays_on]
        alike += [model.value(*latents, goal) for latents in (zs, ahead)]
        shown.append((alike, [zs[1], ahead[1], views]))
    for first, second in zip(shown[0][0], shown[1][0]):
        torch.testing.assert_close(first, second, **CLOSE)
    for first, second in zip(shown[0][1], shown[1][1]):
        torch.testing.assert_close(first[:, order], second, **CLOSE)
        assert (first - second).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------
# The planner
# ------------------------------------------------------------------------------------------------
def situation(script, game, agent, batch=12):
    """A state in which some have left, and what a player sees of it."""
    generator = generator_of(8)
    state = game.start(batch, generator)
    for _ in range(3):
        state, *_ = game.step(state, some_actions(script, game, state, generator))
    goals = torch.randn(batch, game.num_players, agent.moa.goal_size, generator=generator)
    log_std = torch.full_like(goals, -0.5)
    return state, (*game.features(state), goals, log_std)


@torch.no_grad()
@pytest.mark.parametrize("co_player_model", ["moa", "nh"])
def test_scores_equal_a_plain_loop(script, lively, monkeypatch, co_player_model):
    """Over decisions, samples and own actions, with the same draws and only the observer's view."""
    drawn = {}

    def note(name):
        function = getattr(script, name)

        def noted(*inputs):
            drawn[name] = function(*inputs)
            return drawn[name]

        monkeypatch.setattr(script, name, noted)

    for name in ("sample_joint_actions", "rule_actions"):
        note(name)
    game, agent = lively(co_player_model=co_player_model)
    agent.args.reward_scale = 7.0  # is in the rewards that are learnt, and not applied twice
    state, seen = situation(script, game, agent)
    chosen = game.alive(state).nonzero(as_tuple=True)
    q = script.scores(agent, state, seen, chosen, generator_of(1))
    joint = drawn["sample_joint_actions" if co_player_model == "moa" else "rule_actions"]
    assert ("rule_actions" in drawn) == (co_player_model == "nh")
    assert joint.shape == (len(state.time), 4, 3)
    model = agent.model
    own, views, goals, _ = seen
    for d, (b, i) in enumerate(zip(*(x.tolist() for x in chosen), strict=True)):
        company = [(i + k) % 3 for k in (1, 2)]
        theirs = [torch.cat([views[b, i, slot], goals[b, j]]) for slot, j in enumerate(company)]
        zs = plain_encode(model, own[b, i], theirs)
        total = sum(goals[b, j] for j in company)
        for a in range(game.num_actions):
            expected = 0.0
            for k in range(4):
                actions = [int(joint[b, k, j]) for j in company]
                *ahead, reward = plain_step(model, *zs, a, actions)
                share = min(max(float(linear(model.own_decoder, ahead[0])[-1]), 0.0), 1.0)
                value = float(plain_network(model.value, *ahead, total)[0])
                expected += (float(reward) + GAMMA * share * value) / 4
            assert float(q[d, a]) == pytest.approx(expected, abs=1e-4)
    assert len(q) > 20 and q.std(1).min() > 0.01


def test_the_best_legal_action_is_played(script, lively):
    """By a planner alone with a large weight."""
    game, agent = lively(plan_update="hop", plan_beta=1e6)
    agent.plan_slope.fill_(1.0)
    state, _ = situation(script, game, agent, 60)
    mask = game.action_mask(state)
    players = script.CoPlayers(game, ["self"], 60, 1, generator_of(0))
    with torch.no_grad():
        seats = torch.ones_like(mask[..., 0])
        decision = script.Player(agent, 60).act(state, mask, seats, players)
    best = decision["q_plan"].masked_fill(~mask, -math.inf).argmax(2)
    alive = game.alive(state)
    assert torch.equal(decision["action"][alive], best[alive])
    assert (decision["q_plan"].argmax(2) != best)[alive].any()


@pytest.mark.parametrize("env_id", [HUNT, DRIFTS])
def test_a_rule_acts_as_the_scripted_kind(script, lively, env_id):
    """Whatever it can do without a target, and nothing else, of every seat."""
    sets = {}
    for kind in script.GridGame(env_id).kinds:
        game, agent = lively(env_id=env_id, co_player_model=kind, plan_samples=300)
        state, _ = situation(script, game, agent, 6)
        joint = script.rule_actions(agent, state, generator_of(1))
        number = torch.full_like(state.players, list(game.kinds).index(kind))
        told = (game.action_mask(state), number, number < 0, torch.full_like(number, -1))
        generator = generator_of(2)
        played = [game.scripted_actions(state, *told, generator)[0] for _ in range(300)]
        played = torch.stack(played, 1)
        assert joint.shape == played.shape == (6, 300, 3)
        sets[kind] = []
        for b, i in itertools.product(range(6), range(3)):
            sets[kind].append(set(joint[b, :, i].tolist()))
            assert sets[kind][-1] == set(played[b, :, i].tolist())
    assert all(one != other for one, other in itertools.combinations(sets.values(), 2))


def test_a_rule_is_of_the_game(script, monkeypatch, capsys):
    for words in (["cleaner"], ["self"], ["ns", "--env-id", "msg"]):
        line = refused(script, monkeypatch, capsys, "--co-player-model", *words)
        assert "--co-player-model" in line


# ------------------------------------------------------------------------------------------------
# What is learnt from
# ------------------------------------------------------------------------------------------------
@pytest.fixture
def steps(script, monkeypatch):
    """The steps of all games, as the simulator took them: a list of dicts."""
    taken = []
    plain = script.GridGame.step

    def noted(self, state, actions):
        result = plain(self, state, actions)
        names = "state actions after reward terminated truncated".split()
        taken.append(dict(zip(names, [state, actions, *result], strict=True)))
        return result

    monkeypatch.setattr(script.GridGame, "step", noted)
    return taken


@pytest.mark.parametrize("plan_update", ["offset", "hop"])
def test_rows_are_what_the_game_did(script, steps, monkeypatch, tmp_path, plan_update):
    """Of every player that is there; next features are those of the step's own next state, and a
    truncated player's value counts on."""
    monkeypatch.setattr(script, "REPLAY", 500)
    seen = []

    def watch(**names):
        trust(**names)
        kept = {k: torch.stack(v) for k, v in names["storage"].items()}
        seen.append((kept, names["moves"], names["recent"], names["args"], names["game"]))

    options = {"env_id": HUNT, "co_players": "self,nh", "prosocial": 0.3, "horizon": 7}
    options |= {"plan_update": plan_update, "plan_until": 1.0, "plan_beta": 2.0}
    args = small(script, **options, num_steps=40, total_timesteps=480)
    run(script, args, tmp_path, watch)
    assert len(steps) == 120 and len(seen) == 3
    counts = dict.fromkeys(["rewarded", "ended", "cut", "absent", "restarted", "shifted"], 0)
    for number, (kept, moves, _, args, game) in enumerate(seen):
        rows = []
        for t, step in enumerate(steps[40 * number : 40 * number + 40]):
            own, views = game.features(step["state"])
            next_own, next_views = game.features(step["after"])
            for b, i in itertools.product(range(4), range(3)):
                if step["state"].players[b, i] < 0:
                    counts["absent"] += 1
                    continue
                company = [(i + 1) % 3, (i + 2) % 3]
                action = int(step["actions"][b, i])
                reward = 0.7 * step["reward"][b, i] + 0.3 * step["reward"][b].mean()
                shift = kept["expected"][t, b, i] - kept["q_plan"][t, b, i, action]
                if plan_update == "hop":
                    shift = shift - (1 - number / 3) / 2.0 * kept["log_prob"][t, b, i]
                row = {"own": own[b, i], "next_own": next_own[b, i]}
                row |= {"next_views": next_views[b, i], "reward": args.reward_scale * reward}
                goals = kept["goals"][t, b, company]
                row |= {"others": torch.cat([views[b, i], goals], 1), "shift": shift}
                row |= {"action": action, "other_actions": step["actions"][b, company]}
                row["valued"] = kept["learner"][t, b, i]
                row["terminated"] = step["terminated"][b, i]
                rows.append({name: torch.as_tensor(value) for name, value in row.items()})
                counts["rewarded"] += bool(reward != 0.0)
                counts["ended"] += bool(row["terminated"])
                counts["cut"] += bool(step["truncated"][b, i])
                counts["shifted"] += bool(row["valued"]) and abs(float(shift)) > 1e-4
                if t < 39:
                    later = game.features(steps[40 * number + t + 1]["state"])[0][b, i]
                    counts["restarted"] += not torch.equal(later, next_own[b, i])
        assert set(moves) == set(rows[0]) == set(script.TRANSITION)
        for name in moves:
            expected = torch.stack([row[name] for row in rows])
            torch.testing.assert_close(
                moves[name], expected, msg=lambda text, n=name: f"{n} {text}"
            )
        assert 0 < moves["valued"].sum() < len(rows)
    assert min(counts.values()) > 10, counts
    everything = [moves for _, moves, *_ in seen]
    for name, value in seen[-1][2].items():
        assert torch.equal(value, torch.cat([moves[name] for moves in everything])[-500:])


@pytest.mark.parametrize("anneal", [True, False])
def test_the_model_learns_while_it_is_planned_on_and_slower_and_slower(script, tmp_path, anneal):
    """The planner is off in the last of five iterations."""
    rates = []
    updates = []

    def watch(optimizer, sums, **names):
        rates.append(optimizer.param_groups[2]["lr"] / script.MODEL_LEARNING_RATE)
        updates.append(len(sums["model/reward"]))

    args = small(script, plan_update="offset", plan_until=0.8, total_timesteps=320, anneal=anneal)
    run(script, args, tmp_path, watch)
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.25] if anneal else [1.0] * 5)
    assert updates == [script.MODEL_UPDATES] * 4 + [0]


def test_no_model_is_learnt_without_a_planner(script, tmp_path):
    losses = []
    args = small(script, plan_update="none", total_timesteps=128)
    run(script, args, tmp_path, lambda metrics, **names: losses.append(metrics))
    assert len(losses) == 2 and not any("model/reward" in metrics for metrics in losses)


def test_any_environment_is_planned_in(script, tmp_path):
    """By default; rows are of agents that are there, and the model is learnt."""
    seen = []

    def watch(**names):
        trust(**names)
        kept = {k: torch.stack(v) for k, v in names["storage"].items()}
        seen.append((kept, names["moves"], networks(names["agent"])["model"]))

    args = small(script, env_id=LEAVING, co_players="self,random")
    finished = run(script, args, tmp_path, watch)
    assert script.load_checkpoint(finished.path)["args"]["plan_update"] == "offset"
    assert seen[1][0]["offset"].abs().max() > 0.0
    for kept, moves, _ in seen:
        assert 0 < len(moves["own"]) == kept["alive"].sum() < kept["alive"].numel()
        assert torch.equal(moves["next_own"], kept["next_own"][kept["alive"]])
        done = torch.tensor([True, False, False]) & (kept["own"][..., 0] * 6 == 1.0)
        assert torch.equal(
            kept["terminated"] & kept["alive"], done
        )  # the first, in its second step
    assert not torch.equal(seen[0][2], seen[1][2])


def test_rare_rewards_stay_in_the_reservoir(script, lively, monkeypatch):
    """Thirty among six thousand, in sixty places."""
    monkeypatch.setattr(script, "RESERVOIR", 60)
    game, agent = lively()
    for weight in agent.model.whole.out.parameters():
        torch.nn.init.zeros_(weight)  # no reward is expected
    generator = generator_of(0)
    rows = rows_of_play(script, game, agent, batch=400)
    rows = {name: value[:6000] for name, value in rows.items()}
    rows["reward"] = torch.zeros(6000)
    rows["reward"][::200] = 3.0 + torch.arange(30)
    reservoir = {}
    with torch.no_grad():
        for part in torch.arange(6000).split(1000):
            offered = {name: value[part] for name, value in rows.items()}
            reservoir = script.surprising(agent.model, offered, reservoir, generator)
    assert sorted(reservoir["reward"].tolist())[30:] == rows["reward"][::200].tolist()
    assert {len(value) for value in reservoir.values()} == {60}
    recent = {name: value[1:190] for name, value in rows.items()}
    recent["valued"] = torch.ones(189, dtype=torch.bool)
    assert not recent["reward"].any()
    reservoir["valued"] = torch.ones(60, dtype=torch.bool)
    batch = script.model_batch(recent, reservoir, generator)
    few = script.MODEL_BATCH // 4
    assert set(batch) == set(script.TRANSITION)
    assert {len(value) for value in batch.values()} == {script.MODEL_BATCH}
    assert batch["valued"][:-few].all() and not batch["valued"][-few:].any()
    assert not batch["reward"][:-few].any() and batch["reward"][-few:].any()
    assert recent["valued"].all() and reservoir["valued"].all()
    both = torch.cat([recent["own"], reservoir["own"]])  # rows stay whole
    shift = torch.cat([recent["shift"], reservoir["shift"]])
    for own, value in zip(batch["own"], batch["shift"], strict=True):
        assert torch.equal(both[(shift == value).nonzero()[0, 0]], own)


def test_a_tiny_game_is_learnt_exactly(script):
    """Rewards, who plays on, and where the co-player will be, on 2x2 with a stag and a hare."""
    args = small(script, env_id="msh-2x2-2p-1h1s", goal="none", plan_samples=2)
    game = script.make_game(args, "cpu")
    torch.manual_seed(0)
    agent = script.Agent(game, script.checked(args, game))
    rows = rows_of_play(script, game, agent, batch=400)
    rows["others"][..., game.other_size :] = 0.0
    rows["shift"] = torch.zeros(len(rows["shift"]))
    assert set(rows["reward"].tolist()) == {0.0, 0.5, 1.0, 5.0}
    rows["reward"] *= agent.args.reward_scale
    optimizer = torch.optim.Adam(agent.model.parameters())
    count = len(rows["reward"])
    generator = generator_of(1)
    for k in range(800):
        index = torch.randint(count, (128,), generator=generator)
        loss, _ = script.model_loss(agent, {name: x[index] for name, x in rows.items()})
        optimizer.param_groups[0]["lr"] = script.MODEL_LEARNING_RATE * (1 - k / 800)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.model.parameters(), 10.0)
        optimizer.step()
    model = agent.model
    with torch.no_grad():
        zs = model.encode(rows["own"], rows["others"])
        *ahead, reward = model(*zs, rows["action"], rows["other_actions"])
        _, views, plays_on = model.decode(*ahead)
    error = (reward - rows["reward"]).abs()
    assert error.mean() < 0.03 and error.max() < 0.25
    assert torch.equal(plays_on < 0.5, rows["terminated"])
    there = ~rows["terminated"] & (rows["next_views"][:, 0, 0] == 1.0)
    way = 2.0 * views[there, 0, 8:10]  # down and right, over the width
    expected = 2.0 * rows["next_views"][there, 0, 8:10]
    assert torch.equal(way.round(), expected)
    assert (expected != 2.0 * rows["others"][there, 0, 8:10]).any(1).sum() > 100


# ------------------------------------------------------------------------------------------------
# Recorded play
# ------------------------------------------------------------------------------------------------
def recorded(script, path, steps=50, batch=3, env_id=HUNT):
    """Play of scripted co-players, written to `path` as arrays by name; these."""
    args = small(script, env_id=env_id, horizon=6)
    game = script.make_game(args, "cpu")
    generator = generator_of(4)
    pool = ["nh", "random"] if game.simulates else ["random"]
    players = script.CoPlayers(game, pool, batch, 2, generator)
    state = game.start(batch, generator)
    found = []
    for _ in range(steps):
        action = players.act(state, game.action_mask(state))
        after, reward, terminated, truncated = game.step(state, action)
        ended = (terminated | truncated).all(1)
        step = {**state._asdict(), **{f"next_{k}": x for k, x in after._asdict().items()}}
        step |= {"action": action, "reward": reward, "terminated": terminated}
        step |= {"truncated": truncated, "match_ended": players.observe(ended)}
        found.append({name: value.clone() for name, value in step.items()})
        state = game.restart(after, ended, generator)
    arrays = {name: torch.stack([step[name] for step in found]).numpy() for name in found[0]}
    np.savez_compressed(path, env_id=env_id, **arrays)
    return {"env_id": env_id, **arrays}


@pytest.fixture(scope="module")
def play(script, tmp_path_factory):
    """Of a game of each sort a file of recorded play, and what is in it."""
    files = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        for number, env_id in enumerate((HUNT, LEAVING)):
            path = tmp_path_factory.mktemp("play") / f"{number}.npz"
            files[env_id] = (path, recorded(script, path, env_id=env_id))
    return files


def offline_args(script, path, **options):
    """Of 80 steps of three games, which is more than a file has."""
    options = {"env_id": HUNT, "horizon": 6, "num_steps": 20, "moa_updates": 2, **options}
    return small(script, **options, offline=str(path), total_timesteps=240)


@pytest.fixture
def no_steps(script, monkeypatch):
    """Games that cannot be stepped."""

    def never(*inputs):
        raise AssertionError("a game is stepped")

    for game in (script.GridGame, script.PettingZooGame):
        monkeypatch.setattr(game, "step", never)


@pytest.mark.parametrize("env_id", [HUNT, LEAVING])
def test_recorded_play_is_learnt_from_as_it_was(script, play, no_steps, tmp_path, env_id):
    """No game is stepped; matches end where they did, and with the last row. The same rows, in
    scale, are every player's, and all of V's."""
    path, arrays = play[env_id]
    data = {k: torch.from_numpy(x) for k, x in arrays.items() if isinstance(x, np.ndarray)}
    assert data["match_ended"].sum() > 0 and not data["match_ended"][-1].all()
    seen = []

    def watch(**names):
        kept = {k: torch.stack(v) for k, v in names["storage"].items()}
        weights = {name: value.clone() for name, value in networks(names["agent"]).items()}
        seen.append({**names, "kept": kept, "weights": weights, "memory": names["player"].memory})

    args = offline_args(script, path, env_id=env_id, prosocial=0.5, num_steps=1)
    finished = run(script, args, tmp_path, watch)
    last = seen[-1]
    assert last["args"].num_envs == 3 and len(seen) == 80
    index = torch.arange(80) % 50
    kept = {k: torch.cat([names["kept"][k] for names in seen]) for k in last["kept"]}
    for name in ("action", "reward", "terminated"):
        assert torch.equal(kept[name], data[name][index]), name
    over = data["terminated"] | data["truncated"]
    over[-1] = True
    assert torch.equal(kept["goes_on"], ~over[index])
    state_type = last["game"].state_type
    before, after = ([data[f"{k}{name}"] for name in state_type._fields] for k in ("", "next_"))
    for t in range(80):
        row = int(index[t])
        state, following = (state_type(*(x[row] for x in xs)) for xs in (before, after))
        assert torch.equal(kept["own"][t], last["game"].features(state)[0])
        own, views = last["game"].features(following)
        assert torch.equal(kept["next_own"][t], own) and torch.equal(kept["next_views"][t], views)
        assert torch.equal(kept["alive"][t], last["game"].alive(state))
    assert not kept["learner"].any() and kept["q_plan"][kept["alive"]].any(1).all()
    begun = torch.zeros(2, 3).long()  # episodes and matches, by step
    for t in range(80):
        for name, start in zip(("episode", "match"), begun, strict=True):
            assert torch.equal(last["buffer"].ring[name][t], start), (name, t)
        ended = data["match_ended"][index[t]] | (index[t] == 49)
        begun[0][over[index[t]].all(1)] = t + 1
        begun[1][ended] = t + 1
        remembered = seen[t]["memory"][..., -1].amax(1)  # steps of the match, of the episode
        assert torch.equal(remembered == 0, (begun == t + 1).flip(0).T), t
    scale = last["args"].reward_scale
    moves = [names["moves"] for names in seen]
    reward = kept["reward"].lerp(kept["reward"].mean(2, keepdim=True), 0.5) * scale
    torch.testing.assert_close(torch.cat([x["reward"] for x in moves]), reward[kept["alive"]])
    chosen = kept["q_plan"].gather(3, kept["action"][..., None])[..., 0]
    shift = (kept["expected"] - chosen)[kept["alive"]]
    torch.testing.assert_close(torch.cat([x["shift"] for x in moves]), shift)
    assert all(x["valued"].all() for x in moves) and shift.std() > 0.0
    for name, learns in {"model": True, "moa": True, "actor": False, "critic": False}.items():
        same = torch.equal(seen[0]["weights"][name], last["weights"][name])
        assert same != learns, name
    assert "model/reward" in finished.metrics and "losses/policy" not in finished.metrics


@pytest.mark.parametrize("env_id", [HUNT, LEAVING])
def test_offline_run_goes_on_to_the_bit(script, play, tmp_path, no_steps, env_id):
    args = offline_args(script, play[env_id][0], env_id=env_id, checkpoint_every=1)
    unbroken = run(script, args, tmp_path)
    broken = broken_run(script, args, tmp_path, 3)
    assert script.load_checkpoint(broken)["progress"][1] == 2
    run(script, parsed(script, tmp_path, "--resume", broken), tmp_path)
    assert_same_run(script, unbroken.path, broken)


@pytest.mark.parametrize("env_id", [HUNT, LEAVING])
def test_a_file_that_has_become_shorter_is_not_gone_on_with(
    script, play, tmp_path, monkeypatch, capsys, env_id
):
    _, arrays = play[env_id]
    np.savez("cut.npz", **arrays)
    args = offline_args(script, "cut.npz", env_id=env_id, checkpoint_every=1)
    broken = broken_run(script, args, tmp_path, 3)
    assert script.load_checkpoint(broken)["episode"][0] >= 3  # the step that is next
    np.savez("cut.npz", **{k: x[:3] if np.ndim(x) > 1 else x for k, x in arrays.items()})
    assert "does not fit this run" in refused(script, monkeypatch, capsys, "--resume", broken)


@pytest.fixture(scope="module")
def done(script, play, tmp_path_factory):
    """The folders of finished runs from the files."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        for env_id, (path, _) in play.items():
            args = offline_args(script, path, env_id=env_id)
            folders[env_id] = run(script, args, tmp_path_factory.mktemp("done")).path
    return folders


@pytest.mark.parametrize("env_id", [HUNT, LEAVING])
def test_offline_run_plays_by_planning(script, done, monkeypatch, env_id):
    """By the planner alone, which is trusted in full, with those who may be there."""
    game = script.make_game(small(script, env_id=env_id), "cpu")
    agent = script.load_player(done[env_id], game, 2).agent
    assert agent.plan_mode == "hop" and float(agent.plan_slope) == 1.0
    calls = []
    scores = script.scores

    def noted(*inputs):
        calls.append(scores(*inputs))
        return calls[-1]

    monkeypatch.setattr(script, "scores", noted)
    company = "nh,random" if env_id == HUNT else "random"
    result = script.evaluate(done[env_id], company, episodes=6, match_episodes=2)
    assert len(result["focal_returns"]) == 6 and all(map(math.isfinite, result["focal_returns"]))
    assert sum(map(len, calls)) > 10 and torch.cat(calls).std() > 0.0


def test_games_go_on_from_an_offline_run(script, done, steps, tmp_path):
    """With the options of the run, but for the file; the planner is trusted from the start."""
    words = ["--init", done[HUNT], "--co-players", "self,nh"]
    words += ["--num-envs", 3, "--num-steps", 40, "--total-timesteps", 120]
    args = parsed(script, tmp_path, *words)
    assert args.offline is None and args.env_id == HUNT
    offsets = []

    def watch(storage, **names):
        offsets.append(float(torch.stack(storage["offset"]).abs().max()))

    finished = run(script, args, tmp_path, watch)
    assert len(steps) == 40 and offsets[0] > 0.0
    assert {"returns/nh", "losses/policy", "model/reward"} <= set(finished.metrics)
    before, after = (
        networks(script.load_checkpoint(x)["agent"]) for x in (done[HUNT], finished.path)
    )
    for name in before:
        assert 0.0 < (before[name] - after[name]).abs().max() < 0.2, name


def edited(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def test_files_that_cannot_be_learnt_from(script, play, monkeypatch, capsys):
    """One line with the file's name, status 2, and nothing is written."""
    _, arrays = play[HUNT]
    top = np.where(arrays["players"][0, 0, 0] == 0, 2, 0)  # UP or LEFT of cell 0
    changes = {
        "env": {"env_id": "msh"},
        "half": {"next_items": None},
        "bare": {"env_id": None},
        "outside": {"action": edited(arrays["action"], (3, 1, 2), 99)},
        "negative": {"action": edited(arrays["action"], (3, 1, 2), -1)},
        "illegal": {
            "players": edited(arrays["players"], (0, 0, 0), 0),
            "action": edited(arrays["action"], (0, 0, 0), top),
        },
        "nan": {"reward": edited(arrays["reward"], (9, 0, 1), math.nan)},
        "inf": {"reward": edited(arrays["reward"], (9, 0, 1), math.inf)},
        "words": {"reward": np.full(arrays["reward"].shape, "much")},
        "objects": {"reward": np.full(arrays["reward"].shape, None)},
    }
    for name, changed in changes.items():
        content = {k: x for k, x in {**arrays, **changed}.items() if x is not None}
        np.savez(f"{name}.npz", **content)
    Path("text.npz").write_text("text")
    Path("empty.npz").write_bytes(b"")
    np.save("array.npy", arrays["action"])
    Path("folder.npz").mkdir()
    names = [*(f"{name}.npz" for name in [*changes, "text", "empty", "folder", "missing"])]
    for name in [*names, "array.npy"]:
        words = ["--env-id", HUNT, "--offline", name, "--num-envs", 3]
        assert name in refused(script, monkeypatch, capsys, *words), name


@pytest.mark.parametrize("thinned", [True, False])
def test_files_whose_steps_do_not_follow(script, play, monkeypatch, capsys, thinned):
    """Every second step, or an end of an episode that is not told."""
    _, arrays = play[HUNT]
    changed = {k: x[::2] if np.ndim(x) > 1 and thinned else x for k, x in arrays.items()}
    if not thinned:
        changed |= {k: arrays[k] & False for k in ("terminated", "truncated")}
    np.savez("gaps.npz", **changed)
    words = ["--env-id", HUNT, "--offline", "gaps.npz", "--num-envs", 3]
    assert "do not follow" in refused(script, monkeypatch, capsys, *words)


@pytest.mark.parametrize("words", ["--plan-update none", "--goal oracle", "--plan-until 0.5"])
def test_what_cannot_be_learnt_from_files(script, play, monkeypatch, capsys, words):
    words = ["--env-id", HUNT, "--offline", play[HUNT][0], *words.split()]
    assert "--offline" in refused(script, monkeypatch, capsys, *words)


@pytest.mark.parametrize("name", ["seats", "games", "steps", "cells"])
def test_files_whose_arrays_do_not_fit_together(script, play, monkeypatch, capsys, name):
    _, arrays = play[HUNT]
    changed = {
        "seats": {"action": arrays["action"][:, :, :2]},
        "games": {"terminated": arrays["terminated"].all(2)},
        "steps": {"reward": arrays["reward"][:30]},
        "cells": {"next_players": arrays["next_players"] + 50},
    }
    np.savez(f"{name}.npz", **{**arrays, **changed[name]})
    words = ["--env-id", HUNT, "--offline", f"{name}.npz", "--num-envs", 3]
    assert name in refused(script, monkeypatch, capsys, *words)


def test_fewer_steps_than_an_iteration_of_the_file(script, play, monkeypatch, capsys):
    words = ["--env-id", HUNT, "--offline", play[HUNT][0], "--num-envs", 1]
    words += ["--num-steps", 100, "--total-timesteps", 299]
    assert "--total-timesteps" in refused(script, monkeypatch, capsys, *words)


def test_offline_run_from_one_without_a_planner_plays(script, play, tmp_path):
    args = small(script, env_id=HUNT, horizon=6, plan_update="none", total_timesteps=64)
    path = run(script, args, tmp_path).path
    words = ["--init", path, "--offline", play[HUNT][0], "--plan-update", "hop"]
    words += ["--num-steps", 40, "--total-timesteps", 240]
    path = run(script, parsed(script, tmp_path, *words), tmp_path).path
    assert len(script.evaluate(path, "nh", episodes=2)["focal_returns"]) == 2
