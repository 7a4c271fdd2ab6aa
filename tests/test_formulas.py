"""Advantages, losses, histories, match buffer and planner, each by a slow way to the same."""

import dataclasses
import itertools
import math
import types
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional

from conftest import SCRIPTS, plans
from run_tools import shake

pytestmark = pytest.mark.only("hop_onestep")  # most are of what is the same text in all scripts
EVERY = pytest.mark.only(*SCRIPTS)
PLANNERS = pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
DISCRETE = pytest.mark.only("hop_ppo_gumbel")
ROOT = Path(__file__).resolve().parents[1]
HUNT = "msh-3x3-3p-2h1s"
DRIFTS = "msg-2x3-3p-3d"
SMALL_ENV = "test_pettingzoo_game:Leaving"
STAY = 4
GAMMA = 0.9


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Runs are written elsewhere; environments of the other test module can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests")


@pytest.fixture
def lively(script, small):
    """Makes a game and an agent whose every network says something, with the options given."""

    def make(seed=0, **options):
        args = small(**options)
        game = script.make_game(args, "cpu")
        args = script.checked(args, game)
        agent = shake(script.Agent(game, args), seed)
        if plans(script):
            agent.plan_slope.fill_(0.7)
        return game, agent

    return make


def rows_of(state, index):
    return type(state)(*(field[index] for field in state))


def likely(game, state, weight=6.0):
    """Logits [B, N, A] of legal actions, those above the moves of a grid ahead of the rest."""
    mask = game.action_mask(state)
    weights = torch.ones(game.num_actions)
    weights[STAY + 1 :] = weight
    return weights.log().masked_fill(~mask, -1e9)


def draw(logits, generator):
    """int64 [..] from softmax(logits [.., A])."""
    shape = logits.shape[:-1]
    rows = logits.softmax(-1).flatten(0, -2)
    return rows.multinomial(1, generator=generator).view(shape)


def slot_order(order):
    """Slots [N, N-1] of relabelled seats: new seat k is old seat order[k]."""
    n = len(order)
    slots = torch.zeros(n, n - 1, dtype=torch.int64)
    for k, s in itertools.product(range(n), range(n - 1)):
        slots[k, s] = (order[(k + 1 + s) % n] - order[k]) % n - 1
    return slots


def in_order(shape, generator):
    """In place of uniform random numbers by which rows are ordered: leaves them as they are."""
    return torch.arange(shape[0]).float()


def steps_of(storage):
    """The steps of a rollout, dicts by name, of what `train` stores of them by name."""
    length = len(storage["action"])
    return [{name: values[t] for name, values in storage.items()} for t in range(length)]


def player_of(script, agent, batch, memory=None):
    """A Player of `batch` games, with the memory given or an empty one."""
    player = script.Player(agent, batch)
    if memory is not None:
        player.memory = memory
    return player


@torch.no_grad()
def decision_of(script, agent, state, seats=None, memory=None):
    """What a Player decides, by name, with the planner at all seats or at `seats` alone."""
    mask = agent.game.action_mask(state)
    batch = len(mask)
    players = script.CoPlayers(agent.game, ["self"], batch, 1, generator_of(0))
    if seats is None:
        seats = torch.ones_like(mask[..., 0])
    return player_of(script, agent, batch, memory).act(state, mask, seats, players)


# ------------------------------------------------------------------------------------------------
# Advantages
# ------------------------------------------------------------------------------------------------
def test_advantages_by_hand(script):
    """Player 0 leaves with reward 5 in its second step; 1 is terminated after three and begins an
    episode; 2 is truncated after three (V of the last state is 4); 3 goes on (V is 2)."""
    rewards = [
        [1.0, 0.0, 1.0, 0.0],
        [5.0, 2.0, 0.0, 1.0],
        [0.0, 3.0, 1.0, 0.0],
        [0.0, 7.0, 0.0, 1.0],
    ]
    values = [
        [2.0, 1.0, 3.0, 1.0],
        [4.0, 1.0, 2.0, 0.5],
        [0.0, 2.0, 1.0, 2.0],
        [0.0, 3.0, 0.0, 1.0],
    ]
    after = [[4.0, 1.0, 2.0, 0.5], [0.0, 2.0, 1.0, 2.0], [0.0, 0.0, 4.0, 1.0], [0.0, 0.0, 0.0, 2.0]]
    goes_on = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    g = 0.9
    gl = 0.9 * 0.5
    expected = {}
    expected[1, 0] = 5 - 4
    expected[0, 0] = (1 + g * 4 - 2) + gl * 1
    expected[3, 1] = 7 - 3  # an episode of its own
    expected[2, 1] = 3 - 2
    expected[1, 1] = (2 + g * 2 - 1) + gl * 1
    expected[0, 1] = (0 + g * 1 - 1) + gl * expected[1, 1]
    expected[2, 2] = 1 + g * 4 - 1
    expected[1, 2] = (0 + g * 1 - 2) + gl * expected[2, 2]
    expected[0, 2] = (1 + g * 2 - 3) + gl * expected[1, 2]
    expected[3, 3] = 1 + g * 2 - 1
    expected[2, 3] = (0 + g * 1 - 2) + gl * expected[3, 3]
    expected[1, 3] = (1 + g * 2 - 0.5) + gl * expected[2, 3]
    expected[0, 3] = (0 + g * 0.5 - 1) + gl * expected[1, 3]
    inputs = []
    for rows in (rewards, values, after):
        inputs.append(torch.tensor(rows, dtype=torch.float64).unsqueeze(1))
    ongoing = torch.tensor(goes_on).bool().unsqueeze(1)
    result = script.generalised_advantages(*inputs, ongoing, g, 0.5)
    for (t, i), value in expected.items():
        assert float(result[t, 0, i]) == pytest.approx(value)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_advantages_in_closed_form(script, gae_lambda):
    """Sums of (gamma lambda)^k delta to the episode's end; for lambda 1 the return less V."""
    steps = 20
    generator = generator_of(0)
    shape = (steps, 3, 2)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    ends = torch.randn(shape, generator=generator, dtype=torch.float64)
    goes_on = torch.rand(shape, generator=generator) < 0.8
    truncated = torch.rand(shape, generator=generator) < 0.5
    following = torch.where(goes_on, values.roll(-1, 0), ends * truncated)
    following[-1] = ends[-1]
    kept = [field.clone() for field in (rewards, values, following)]
    result = script.generalised_advantages(rewards, values, following, goes_on, GAMMA, gae_lambda)
    for t, b, i in itertools.product(range(steps), range(3), range(2)):
        last = t
        while last < steps - 1 and goes_on[last, b, i]:
            last += 1
        total = 0.0
        returned = GAMMA ** (last - t + 1) * float(following[last, b, i])
        for s in range(t, last + 1):
            delta = rewards[s, b, i] + GAMMA * following[s, b, i] - values[s, b, i]
            total += (GAMMA * gae_lambda) ** (s - t) * float(delta)
            returned += GAMMA ** (s - t) * float(rewards[s, b, i])
        assert float(result[t, b, i]) == pytest.approx(total, rel=1e-5, abs=1e-6)
        if gae_lambda == 1.0:
            advantage = returned - float(values[t, b, i])
            assert float(result[t, b, i]) == pytest.approx(advantage, rel=1e-5, abs=1e-6)
    for field, copied in zip((rewards, values, following), kept, strict=True):
        assert torch.equal(field, copied)


# ------------------------------------------------------------------------------------------------
# Rollouts
# ------------------------------------------------------------------------------------------------
@pytest.fixture
def decisions(script, monkeypatch):
    """Notes what players decide on in training: a list of dicts."""
    shown = []
    plain = script.Player.act

    def noting(player, state, mask, seats, co_players):
        scripted = co_players.scripted()
        seen = {"state": state, "memory": player.memory, "seats": seats, "scripted": scripted}
        shown.append(seen)
        return plain(player, state, mask, seats, co_players)

    monkeypatch.setattr(script.Player, "act", noting)
    return shown


HOP = {"plan_update": "hop", "plan_until": 0.8, "plan_beta": 3.0}


@EVERY
@pytest.mark.parametrize(
    "options",
    [
        {"env_id": HUNT, "co_players": "self,nh,random", "plan_update": "offset"},
        {"env_id": HUNT, "co_players": "nh,ns", "prosocial": 0.3, "goal": "oracle", **HOP},
        {"env_id": DRIFTS, "co_players": "self,exploiter", "prosocial": 1.0, "goal": "none"},
        {"env_id": "msh-2x2-2p-1h1s", "co_players": "self", "match_episodes": 1, **HOP},
    ],
    ids=["inferred", "oracle", "none", "self"],
)
def test_rollout_step_by_step(script, small, decisions, options):
    """Every row of the second iteration against a replay."""
    args = small(num_envs=6, num_steps=30, total_timesteps=360, horizon=8, **options)
    runs = []
    names = "last_value rows state args game".split()

    def watch(**local):
        weights = {name: value.clone() for name, value in local["agent"].state_dict().items()}
        steps = steps_of(local["storage"])
        runs.append({"weights": weights, "steps": steps, **{name: local[name] for name in names}})

    script.train(args, watch)
    first, second = runs
    args = second["args"]
    bonus = plans(script) and args.plan_update == "hop"
    game = second["game"]
    agent = script.Agent(game, args)
    agent.load_state_dict(first["weights"])  # with which the second rollout was played
    steps = second["steps"]
    shown = decisions[30:60]
    n = game.num_players
    values = torch.stack([step["value"] for step in steps])
    advantages = torch.zeros(30, 6, n)
    count = Counter()
    following_advantage = torch.zeros(6, n)
    for t in reversed(range(30)):
        step = steps[t]
        state = shown[t]["state"]
        after, reward, terminated, truncated = game.step(state, step["action"])
        ended = (terminated | truncated).all(1)
        assert torch.equal(step["mask"], game.action_mask(state))
        assert torch.equal(step["alive"], game.alive(state))
        assert torch.equal(step["learner"], shown[t]["seats"] & step["alive"])
        assert not (step["learner"] & ~step["alive"]).any()
        assert torch.equal(step["reward"], reward)
        learnt = (1 - args.prosocial) * reward + args.prosocial * reward.mean(1, keepdim=True)
        learnt = learnt * args.reward_scale
        if bonus:  # at half of the run, with an entropy bonus till 0.8 of it
            learnt = learnt - (1 - 0.5 / 0.8) / 3.0 * step["log_prob"]
        goes_on = ~(terminated | truncated)
        assert torch.equal(step["goes_on"], goes_on)
        for b, i in itertools.product(range(6), range(n)):
            others = [int(step["action"][b, (i + k) % n]) for k in range(1, n)]
            assert step["other_actions"][b, i].tolist() == others
        if t < 29:
            next_state = shown[t + 1]["state"]
            next_value = values[t + 1]
        else:
            next_state = second["state"]
            next_value = second["last_value"]
        for field, new in zip(after, next_state, strict=True):
            assert torch.equal(field[~ended], new[~ended])
        assert not next_state.time[ended].any()
        scripted = shown[t]["scripted"]
        players = types.SimpleNamespace(scripted=lambda scripted=scripted: scripted)
        player = player_of(script, agent, 6, shown[t]["memory"])
        value = player.value(state, players)
        torch.testing.assert_close(step["value"], value, rtol=1e-4, atol=1e-5)
        player.decision = step
        player.remember(step["action"])
        final = player.value(after, players)
        torch.testing.assert_close(step["final_value"], final * truncated, rtol=1e-4, atol=1e-5)
        assert torch.equal(step["final_value"] != 0, truncated)
        next_value = torch.where(goes_on, next_value, step["final_value"])
        delta = learnt + args.gamma * next_value - step["value"]
        discount = args.gamma * args.gae_lambda
        advantages[t] = delta + discount * goes_on * following_advantage
        following_advantage = advantages[t]
        learner = step["learner"]
        count["truncated"] += int((truncated & learner).sum())
        count["left"] += int((terminated & ~ended.unsqueeze(1) & learner).sum())
        count["terminated"] += int((terminated & ended.unsqueeze(1) & learner).sum())
    learner = torch.stack([step["learner"] for step in steps])
    rows = second["rows"]
    torch.testing.assert_close(rows["advantage"], advantages[learner], rtol=1e-4, atol=1e-4)
    if not bonus:
        torch.testing.assert_close(rows["return"], rows["advantage"] + values[learner])
    assert count["truncated"] > 1
    if game.family == "msh":
        assert count["left"] > 0
    assert 0 < learner.sum() <= torch.stack([step["alive"] for step in steps]).sum()


def test_logged_returns(script, small, decisions):
    """By kind and by seat, and lengths: of the episodes that ended, counted by a replay."""
    options = {"env_id": HUNT, "co_players": "nh,self", "num_steps": 60, "horizon": 9}
    runs = []
    kinds = []
    plain = script.CoPlayers.observe

    def noting(players, ended):
        kinds.append(players.kind)
        return plain(players, ended)

    def watch(storage, metrics, game, co_players, **others):
        runs.append((steps_of(storage), dict(metrics), game, co_players.names))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.CoPlayers, "observe", noting)
        script.train(small(total_timesteps=480, **options), watch)
    returns = torch.zeros(4, 3)
    for k, (steps, metrics, game, names) in enumerate(runs):
        totals = defaultdict(list)
        for t, step in enumerate(steps):
            state = decisions[60 * k + t]["state"]
            kind = kinds[60 * k + t]
            after, reward, terminated, truncated = game.step(state, step["action"])
            returns += reward
            for b in (terminated | truncated).all(1).nonzero().flatten().tolist():
                totals["charts/episodic_length"].append(float(after.time[b]))
                for i in range(3):
                    value = float(returns[b, i])
                    totals[f"returns/{names[kind[b, i]]}"].append(value)
                    if kind[b, i] == 0:
                        totals["charts/episodic_return"].append(value)
                        totals[f"returns/seat_{i}"].append(value)
                returns[b] = 0.0
        logged = {}
        for name, value in metrics.items():
            if name.startswith(("returns/", "charts/episodic")):
                logged[name] = value
        expected = {name: sum(values) / len(values) for name, values in totals.items()}
        assert logged == pytest.approx(expected, abs=1e-4)
        assert len(expected) == 7


# ------------------------------------------------------------------------------------------------
# PPO
# ------------------------------------------------------------------------------------------------
def random_rows(script, game, agent, count=40):
    """Rows for `ppo_loss`, with actions of the policy that acted."""
    generator = generator_of(0)
    goal = agent.moa.goal_size
    mask = torch.rand(count, 7, generator=generator) < 0.7
    mask[:, STAY] = True
    rows = {
        "own": torch.randn(count, game.own_size, generator=generator),
        "others": torch.randn(count, 2, game.other_size + goal, generator=generator),
        "goal": torch.randn(count, goal, generator=generator),
        "mask": mask,
        "offset": torch.randn(count, 7, generator=generator) * mask * plans(script),
        "advantage": 2 * torch.randn(count, generator=generator) + 1,
        "return": 2 * torch.randn(count, generator=generator) + 1,
    }
    with torch.no_grad():
        logits = agent.actor(rows["own"], rows["others"], rows["goal"])
        value = agent.critic(rows["own"], rows["others"], rows["goal"]).squeeze(1)
    rows["action"] = draw((logits + rows["offset"]).masked_fill(~mask, -1e9), generator)
    return rows, logits, value


def probabilities(logits, mask):
    """{action: probability} of one row, legal ones alone."""
    exponents = {a: math.exp(float(logits[a])) for a in mask.nonzero().flatten().tolist()}
    total = sum(exponents.values())
    return {a: exponent / total for a, exponent in exponents.items()}


@EVERY
def test_ppo_loss_row_by_row(script, lively):
    """Clipped surrogate, value loss, entropy, approximate KL, share of clipped ratios."""
    game, agent = lively(env_id=HUNT, clip_coef=0.15, vf_coef=0.7, plan_update="offset")
    rows, logits, value = random_rows(script, game, agent)
    count = len(value)
    policies = []
    for r in range(count):
        policies.append(probabilities(logits[r] + rows["offset"][r], rows["mask"][r]))
    chosen = [policies[r][int(a)] for r, a in enumerate(rows["action"])]
    shift = 0.3 * torch.randn(count, generator=generator_of(1))
    rows["log_prob"] = torch.tensor(chosen).log() + shift
    mean = float(rows["advantage"].mean())
    deviation = float(rows["advantage"].std(correction=0))
    expected = defaultdict(float)
    clip_fraction = 0.0
    for r in range(count):
        log_ratio = math.log(chosen[r]) - float(rows["log_prob"][r])
        ratio = math.exp(log_ratio)
        advantage = (float(rows["advantage"][r]) - mean) / deviation
        clipped = min(max(ratio, 0.85), 1.15)
        entropy = -sum(p * math.log(p) for p in policies[r].values())
        expected["losses/policy"] -= min(ratio * advantage, clipped * advantage) / count
        expected["losses/value"] += 0.5 * float(value[r] - rows["return"][r]) ** 2 / count
        expected["losses/entropy"] += entropy / count
        expected["losses/approx_kl"] += (ratio - 1 - log_ratio) / count
        clip_fraction += (abs(ratio - 1) > 0.15) / count
    coefficient = torch.tensor(0.03)
    agent.plan_mode = "offset"
    loss, terms = script.ppo_loss(agent, rows, coefficient)
    values = {name: float(term.detach()) for name, term in terms.items()}
    assert values == pytest.approx(expected, rel=1e-4)
    whole = expected["losses/policy"] + 0.7 * expected["losses/value"]
    whole -= 0.03 * expected["losses/entropy"]
    assert float(loss.detach()) == pytest.approx(whole, rel=1e-4)
    assert 0.1 < clip_fraction < 0.9


@DISCRETE
def test_plain_policy_gradient_row_by_row(script, lively):
    """-log pi times the advantage; what was played before is not read, and nothing is clipped."""
    game, agent = lively(env_id=HUNT, vf_coef=0.7, pg=True)
    rows, logits, value = random_rows(script, game, agent)
    rows["log_prob"] = torch.full_like(rows["advantage"], math.nan)
    mean = float(rows["advantage"].mean())
    deviation = float(rows["advantage"].std(correction=0))
    expected = defaultdict(float)
    for r in range(len(value)):
        policy = probabilities(logits[r], rows["mask"][r])
        advantage = (float(rows["advantage"][r]) - mean) / deviation
        log_prob = math.log(policy[int(rows["action"][r])])
        expected["losses/policy"] -= log_prob * advantage / len(value)
        expected["losses/value"] += 0.5 * float(value[r] - rows["return"][r]) ** 2 / len(value)
        entropy = -sum(p * math.log(p) for p in policy.values())
        expected["losses/entropy"] += entropy / len(value)
    loss, terms = script.ppo_loss(agent, rows, torch.tensor(0.03))
    values = {name: float(term.detach()) for name, term in terms.items()}
    assert values == pytest.approx(expected, rel=1e-4)
    whole = expected["losses/policy"] + 0.7 * expected["losses/value"]
    whole -= 0.03 * expected["losses/entropy"]
    assert float(loss.detach()) == pytest.approx(whole, rel=1e-4)


def test_imitation_is_the_cross_entropy_to_the_planner(script, lively):
    """-sum over a of softmax(beta Q)(a) log pi_theta(a): the policy without the offset."""
    game, agent = lively(env_id=HUNT, vf_coef=0.7, plan_update="hop")
    rows, logits, value = random_rows(script, game, agent)
    rows["log_prob"] = torch.full_like(rows["advantage"], math.nan)  # is not read
    policy_loss = 0.0
    entropy = 0.0
    value_loss = 0.0
    for r in range(len(value)):
        planned = probabilities(rows["offset"][r], rows["mask"][r])
        policy = probabilities(logits[r], rows["mask"][r])
        policy_loss -= sum(p * math.log(policy[a]) for a, p in planned.items()) / len(value)
        entropy -= sum(p * math.log(p) for p in policy.values()) / len(value)
        value_loss += 0.5 * float(value[r] - rows["return"][r]) ** 2 / len(value)
    agent.plan_mode = "hop"
    loss, terms = script.ppo_loss(agent, rows, torch.tensor(0.03))
    assert float(terms["losses/policy"]) == pytest.approx(policy_loss, rel=1e-4)
    assert float(terms["losses/value"]) == pytest.approx(value_loss, rel=1e-4)
    assert float(terms["losses/entropy"]) == pytest.approx(entropy, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(policy_loss + 0.7 * value_loss, rel=1e-4)


@PLANNERS
@pytest.mark.parametrize("plan_update", ["offset", "none"])
def test_the_first_ratio_is_one(script, small, monkeypatch, plan_update):
    check_first_ratios(script, small, monkeypatch, plan_update)


@DISCRETE
def test_the_first_ratio_is_one_without_a_planner(script, small, monkeypatch):
    check_first_ratios(script, small, monkeypatch, "none")


def check_first_ratios(script, small, monkeypatch, plan_update):
    """Before any step of the optimiser PPO's policy is the one that acted, planner included."""
    parts = []
    plain = script.ppo_loss

    def noting(agent, rows, *rest):
        prior = agent.actor(rows["own"], rows["others"], rows["goal"]).detach()
        log_policy = (prior + offset_of(rows, prior)).masked_fill(~rows["mask"], -1e9)
        log_policy = log_policy.log_softmax(1)
        log_prob = log_policy.gather(1, rows["action"].unsqueeze(1)).squeeze(1)
        loss, terms = plain(agent, rows, *rest)
        parts.append((rows, log_prob, terms))
        return loss, terms

    monkeypatch.setattr(script, "ppo_loss", noting)
    options = {"total_timesteps": 64 * 20, "num_steps": 16, "plan_beta": 3.0}
    args = small(env_id=HUNT, plan_update=plan_update, learning_rate=3e-3, **options)
    script.train(args)
    each = args.update_epochs * args.num_minibatches
    assert len(parts) == 20 * each
    largest = 0.0
    for rows, log_prob, terms in parts[::each]:  # the first minibatch of each iteration
        torch.testing.assert_close(log_prob, rows["log_prob"], rtol=0.0, atol=2e-5)
        assert float(terms["losses/approx_kl"]) == pytest.approx(0.0, abs=1e-6)
        largest = max(largest, float(offset_of(rows, rows["mask"]).abs().max()))
    assert largest > 0.2 if plan_update == "offset" else largest == 0.0
    later = [float((log_prob - rows["log_prob"]).abs().max()) for rows, log_prob, _ in parts]
    assert max(later) > 0.01


def offset_of(rows, like):
    """A planner's offset, or zeros in the shape of `like`."""
    return rows.get("offset", torch.zeros(like.shape))


@EVERY
def test_only_the_learners_rows_are_learnt_from(script, small, monkeypatch):
    """Each row once in each pass; co-players' and leavers' rows in none."""
    parts = []
    plain = script.ppo_loss
    runs = []

    def noting(agent, rows, *rest):
        parts.append(rows["advantage"])
        return plain(agent, rows, *rest)

    def watch(storage, rows, **others):
        runs.append((steps_of(storage), rows))

    monkeypatch.setattr(script, "ppo_loss", noting)
    options = {"num_steps": 60, "num_minibatches": 3, "total_timesteps": 240, "horizon": 9}
    args = small(env_id=HUNT, co_players="nh,self", plan_update="none", **options)
    script.train(args, watch)
    ((steps, rows),) = runs
    learner = torch.stack([step["learner"] for step in steps])
    alive = torch.stack([step["alive"] for step in steps])
    assert 0 < learner.sum() < alive.sum() < alive.numel()
    assert len(rows["advantage"]) == learner.sum()
    assert len(parts) == args.update_epochs * 3
    expected = sorted(rows["advantage"].tolist())
    for epoch in range(args.update_epochs):
        passed = torch.cat(parts[3 * epoch : 3 * epoch + 3])
        assert sorted(passed.tolist()) == expected
    assert not torch.equal(parts[0], parts[3])


@PLANNERS
@pytest.mark.parametrize("plan_update", ["offset", "hop", "none"])
def test_rollouts_in_which_the_learner_has_left(script, small, plan_update):
    play_till_the_learner_has_left(script, small(plan_update=plan_update))


@DISCRETE
@pytest.mark.parametrize("goal_training", ["gumbel", "em"])
def test_rollouts_in_which_the_learner_has_left_its_goals(script, small, goal_training):
    play_till_the_learner_has_left(script, small(goal_training=goal_training, seed=4))


def play_till_the_learner_has_left(script, args):
    """The others go on for some steps after it has left: there is nothing to learn from."""
    runs = []

    def watch(storage, metrics, **others):
        learner = torch.stack(storage["learner"])
        runs.append(int(learner.sum()))
        assert all(math.isfinite(value) for value in metrics.values())

    options = {"num_envs": 1, "num_steps": 2, "total_timesteps": 120, "moa_updates": 1}
    options |= {"env_id": "msh-2x2-3p-2h1s", "co_players": "nh"}
    script.train(dataclasses.replace(args, **options), watch)
    assert len(runs) == 60
    assert 0 in runs
    assert 2 in runs


# ------------------------------------------------------------------------------------------------
# Matches of random players, in a buffer and in plain lists
# ------------------------------------------------------------------------------------------------
class Play:
    """Games of random players. `history[b]` has a dict for every step of game b: its state (one
    game), action, alive, reward, reached, the numbers of its match and of its episode, and the
    memory before it."""

    def __init__(self, script, game, agent, batch=5, match_episodes=3, **options):
        self.script = script
        self.game = game
        self.agent = agent
        self.batch = batch
        self.match_episodes = match_episodes
        self.rule = options.get("rule", "all")
        self.kinds = options.get("kinds")
        self.generator = generator_of(options.get("seed", 3))
        buffer_args = dataclasses.replace(
            agent.args,
            num_envs=batch,
            moa_capacity=options.get("capacity", 10**5),
            moa_buffer=self.rule,
        )
        self.state = game.start(batch, self.generator)
        self.buffer = script.MatchBuffer(game, buffer_args)
        self.player = script.Player(agent, batch)
        self.history = [[] for _ in range(batch)]
        self.episode = [0] * batch
        self.match = [0] * batch
        if self.kinds is not None:
            self.players = script.CoPlayers(game, self.kinds, batch, match_episodes, self.generator)

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def step(self):
        game = self.game
        state = self.state
        actions = draw(likely(game, state), self.generator)
        kind = torch.zeros_like(actions)
        if self.kinds is not None:
            kind = self.players.kind
            scripted = self.players.act(state, game.action_mask(state))
            actions = torch.where(kind > 0, scripted, actions)
        after, reward, terminated, truncated = game.step(state, actions)
        reached = game.reached(state, actions, after, reward)
        alive = game.alive(state)
        ended = (terminated | truncated).all(1)
        match_ended = torch.zeros_like(ended)
        for b in range(self.batch):
            one = {
                "state": rows_of(state, torch.tensor([b])),
                "action": actions[b],
                "alive": alive[b],
                "reward": reward[b],
                "reached": reached[b],
                "kind": kind[b],
                "match": self.match[b],
                "episode": self.episode[b],
                "memory": self.player.memory[b],
            }
            self.history[b].append(one)
            if ended[b]:
                self.episode[b] += 1
                if self.episode[b] % self.match_episodes == 0:
                    self.match[b] += 1
                    match_ended[b] = True
        own, views = game.features(state)
        mask = game.action_mask(state)
        self.player.decision = {"own": own, "views": views, "mask": mask, "alive": alive}
        with torch.no_grad():
            self.player.remember(actions)
        self.player.forget(ended, match_ended)
        fields = {"action": actions, "alive": alive, "reward": reward, "reached": reached}
        self.buffer.add(state, fields, ended, match_ended)
        if self.kinds is not None:
            assert torch.equal(self.players.observe(ended), match_ended)
        self.state = game.restart(after, ended, self.generator)

    def span(self, b, t):
        """(game, start, end) of the steps that the buffer reads of the match that step t of game b
        belongs to: all that it holds, of a long match those up to t."""
        steps = self.history[b]
        numbers = [k for k, step in enumerate(steps) if step["match"] == steps[t]["match"]]
        oldest = max(0, len(steps) - self.buffer.size)
        start = max(numbers[0], t - self.script.HISTORY + 1, oldest)
        return b, start, min(numbers[-1] + 1, start + self.script.HISTORY)

    def spans(self):
        """(game, start, end) of all matches, as drawn by their last step."""
        found = []
        for b, steps in enumerate(self.history):
            for match in range(self.match[b] + 1):
                numbers = [t for t, step in enumerate(steps) if step["match"] == match]
                if numbers and numbers[-1] >= len(steps) - self.buffer.size:
                    found.append(self.span(b, numbers[-1]))
        return found

    def read(self, spans):
        games, starts, _ = torch.tensor(spans).unbind(1)
        return self.buffer.read(games, starts)


@pytest.fixture
def play(script, lively):
    """Makes a Play of a game, with its agent."""

    def make(steps=64, env_id=HUNT, horizon=9, batch=5, match_episodes=3, goal="inferred", **more):
        game, agent = lively(env_id=env_id, horizon=horizon, goal=goal)
        return Play(script, game, agent, batch, match_episodes, **more).run(steps)

    return make


def check_batch(play, batch, spans):
    """Every field of the steps read, in plain loops; returns counts of what was seen."""
    game = play.game
    seen = Counter()
    length = max(end - start for _, start, end in spans)
    assert batch["action"].shape == (len(spans), length, game.num_players)
    for s, (b, start, end) in enumerate(spans):
        history = play.history[b]
        steps = history[start:end]
        assert not batch["active"][s, len(steps) :].any()
        assert not batch["weight"][s, len(steps) :].any()
        for t, step in enumerate(steps):
            views = [*game.features(step["state"]), game.action_mask(step["state"])]
            views += game.subgoals(step["state"])
            names = ["own", "others", "mask", "features", "present"]
            for name, view in zip(names, views, strict=True):
                assert torch.equal(batch[name][s, t], view[0])
            for name in ("action", "reward", "reached"):
                assert torch.equal(batch[name][s, t], step[name])
            assert torch.equal(batch["active"][s, t], step["alive"])
            numbers = [k for k, other in enumerate(steps) if other["episode"] == step["episode"]]
            assert (batch["first"][s, t] == numbers[0]).all()
            cut = len(steps) == play.script.HISTORY and step["episode"] == steps[-1]["episode"]
            known = step["episode"] < play.episode[b] and not cut
            assert (batch["ended"][s, t] == known).all()
            for i in range(game.num_players):
                later = [k for k in numbers if k >= t and steps[k]["reached"][i] >= 0]
                subgoal = int(steps[later[0]]["reached"][i]) if later else -1
                assert int(batch["subgoal"][s, t, i]) == subgoal
                total = sum(float(steps[k]["reward"][i]) for k in numbers)
                keeps = play.rule == "all" or total > 1e-6
                assert bool(batch["weight"][s, t, i]) == (keeps and bool(step["alive"][i]))
                seen["known"] += known
                seen["running"] += not known
                seen["none"] += not later
                seen["later"] += bool(later) and later[0] > t
                seen["now"] += bool(later) and later[0] == t
                seen["kept"] += keeps
                seen["not kept"] += not keeps
    return seen


@pytest.mark.parametrize("rule", ["all", "positive"])
@pytest.mark.parametrize("env_id", [HUNT, DRIFTS, SMALL_ENV])
def test_matches_are_read_as_they_were_played(play, env_id, rule):
    horizon = None if env_id == SMALL_ENV else 9
    one = play(env_id=env_id, horizon=horizon, rule=rule, match_episodes=2)
    spans = one.spans()
    seen = check_batch(one, one.read(spans), spans)
    names = ["known", "running", "kept"]
    if env_id != SMALL_ENV:  # where no subgoals are known
        names += ["later", "now"]
    if rule == "positive" and env_id != DRIFTS:  # where each pays all
        names.append("not kept")
    assert min(seen[name] for name in [*names, "none"]) > 3, seen
    parts = []  # the last steps of matches
    for b, start, end in spans:
        if end - start > 8:
            parts.append((b, start + 3, end))
    check_batch(one, one.read(parts), parts)


def test_the_ring_holds_the_last_steps(play, monkeypatch, script):
    """Matches read after the ring has gone round, some longer than all of it, some cut by it."""
    monkeypatch.setattr(script, "HISTORY", 25)
    for match_episodes in (2, 99):
        one = play(steps=31, match_episodes=match_episodes, capacity=1)
        assert one.buffer.size == 25
        for _ in range(25):
            one.step()
            spans = one.spans()
            seen = check_batch(one, one.read(spans), spans)
        assert seen["known"] > 10
        assert seen["running"] > 10


@pytest.mark.parametrize("match_episodes", [1, 2, 99])
def test_sampled_matches(play, monkeypatch, script, match_episodes):
    """A step of a game is drawn, all as likely, and its match is read: all that is held of it, of a
    long one the steps up to that drawn. Subgoals of an episode that is cut there are not known."""
    monkeypatch.setattr(script, "HISTORY", 15)
    one = play(steps=60, match_episodes=match_episodes, capacity=5 * 40)
    buffer = one.buffer
    assert buffer.size == 40
    read = buffer.read
    drawn = []

    def noting(game, start):
        drawn.extend(zip(game.tolist(), start.tolist(), strict=True))
        return read(game[:4], start[:4])

    monkeypatch.setattr(buffer, "read", noting)
    lengths = set()
    for _ in range(12):
        one.step()
        drawn.clear()
        batch = buffer.sample(2000, generator_of(0))
        now = len(one.history[0])
        steps = itertools.product(range(5), range(now - 40, now))
        spans = [one.span(b, t) for b, t in steps]
        ends = {(b, start): end for b, start, end in spans}
        check_batch(one, batch, [(*key, ends[key]) for key in drawn[:4]])
        count = Counter(drawn)
        expected = Counter((b, start) for b, start, _ in spans)
        assert set(count) <= set(expected)
        for key, number in expected.items():
            share = number / 200
            assert abs(count[key] - 2000 * share) < 5 * math.sqrt(2000 * share)
        lengths |= {end - start for _, start, end in spans}
    assert max(lengths) == min(15, 9 * match_episodes)
    assert min(lengths) < 15 or match_episodes == 99


def test_nothing_is_learnt_from_matches_without_reward(script, small):
    """By the MOA, by `--moa-buffer positive`, where nobody has earned anything so far."""
    runs = []

    def watch(agent, storage, metrics, **others):
        assert not torch.stack(storage["reward"]).any()
        assert "losses/value" in metrics
        assert not any(name in metrics for name in ("moa/nll", "moa/kl", "moa/recon"))
        runs.append({name: value.clone() for name, value in agent.moa.state_dict().items()})

    options = {"num_steps": 3, "total_timesteps": 24, "moa_buffer": "positive"}
    script.train(small(env_id="msh-9x9-3p-0h1s", **options), watch)
    first, second = runs
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------
# Memory and history
# ------------------------------------------------------------------------------------------------
def step_feature(play, step):
    """[N, E + 1]: what one step of one game adds to the memory."""
    own, others = play.game.features(step["state"])
    moa = play.agent.moa
    actions = step["action"].unsqueeze(0)
    alive = step["alive"].unsqueeze(0)
    with torch.no_grad():
        return moa.step_features(own, others, actions, alive)[0]


def memory_of(play, b, end):
    """[N, 2, E + 1]: sums over the match, over the episode of game b, of steps before `end`."""
    match = torch.zeros_like(play.player.memory[b, :, 0])
    episode = torch.zeros_like(match)
    steps = play.history[b]
    number = play.match[b] if end == len(steps) else steps[end]["match"]
    episode_number = play.episode[b] if end == len(steps) else steps[end]["episode"]
    for step in steps[:end]:
        if step["match"] == number:
            feature = step_feature(play, step)
            match = match + feature
            if step["episode"] == episode_number:
                episode = episode + feature
    return torch.stack([match, episode], 1)


@pytest.mark.parametrize("env_id", [HUNT, DRIFTS, SMALL_ENV])
def test_memory_is_the_same_by_steps_and_in_a_loop(play, env_id):
    """Of the running match and episode; empty where a match has just begun."""
    horizon = None if env_id == SMALL_ENV else 9
    one = play(steps=24, env_id=env_id, horizon=horizon, match_episodes=2)
    begun = 0
    differ = 0
    largest = torch.zeros(len(one.player.memory[0, 0, 0]))
    for _ in range(13):
        one.step()
        end = len(one.history[0])
        match, episode = one.player.memory.unbind(2)
        differ += not torch.equal(match, episode)
        for b in range(5):
            looped = memory_of(one, b, end)
            torch.testing.assert_close(one.player.memory[b], looped, rtol=1e-4, atol=1e-4)
            if one.history[b][-1]["match"] < one.match[b]:
                assert not one.player.memory[b].any()
                begun += 1
        largest = largest.maximum(match.abs().amax((0, 1)))
    assert largest[:-1].min() > 0.5
    assert largest[-1] > 8  # steps in which the player was there
    assert min(begun, differ) > 0


@dataclasses.dataclass
class Captured:
    loss: torch.Tensor
    terms: dict
    memory: torch.Tensor  # inputs of the encoder
    own: torch.Tensor
    others: torch.Tensor
    mean: torch.Tensor  # outputs of the encoder
    log_std: torch.Tensor


def captured_loss(play, batch, pretraining=False):
    """`moa_loss`, and what went into the encoder and came out, in the order of the rows."""
    moa = play.agent.moa
    encode = moa.encode
    shown = []

    def noting(memory, own, others):
        mean, log_std = encode(memory, own, others)
        shown.append((memory, own, others, mean, log_std))
        return mean, log_std

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moa, "encode", noting)
        patch.setattr(play.script, "uniform", in_order)
        loss, terms = play.script.moa_loss(play.agent, batch, pretraining, generator_of(0))
    ((memory, own, others, mean, log_std),) = shown
    return Captured(loss, terms, memory, own, others, mean, log_std)


def weighted_rows(batch):
    """(match, step, seat) of the rows that are learnt from, in the order of the loss."""
    return batch["weight"].nonzero().tolist()


@pytest.mark.parametrize("env_id", [HUNT, SMALL_ENV])
def test_the_loss_reads_the_history_that_the_agent_had(play, env_id):
    """For every step and seat the encoder's input in training is that in acting."""
    one = play(env_id=env_id, horizon=None if env_id == SMALL_ENV else 9, rule="positive")
    spans = one.spans()
    batch = one.read(spans)
    captured = captured_loss(one, batch)
    rows = weighted_rows(batch)
    assert len(rows) > 60
    assert len(rows) == len(captured.own)
    for r, (s, t, i) in enumerate(rows):
        b, start, _ = spans[s]
        step = one.history[b][start + t]
        past = step["memory"][i]
        torch.testing.assert_close(captured.memory[r], past, rtol=1e-3, atol=1e-4)
        own, others = one.game.features(step["state"])
        torch.testing.assert_close(captured.own[r], own[0, i])
        torch.testing.assert_close(captured.others[r], others[0, i])


def test_encodings_know_nothing_of_the_present_or_the_future(play):
    """Other actions from step t on leave all encodings up to t as they are."""
    one = play(steps=40)
    batch = one.read(one.spans())
    where = torch.tensor(weighted_rows(batch))
    plain = captured_loss(one, batch)
    for t in (0, 3, 11):
        actions = batch["action"].clone()
        actions[:, t:] = (actions[:, t:] + 1) % 7
        changed = captured_loss(one, {**batch, "action": actions})
        past = where[:, 1] <= t
        torch.testing.assert_close(changed.mean[past], plain.mean[past], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(changed.log_std[past], plain.log_std[past], rtol=1e-4, atol=1e-4)
        was_there = batch["active"][where[:, 0], t, where[:, 2]]
        after = (where[:, 1] == t + 1) & was_there
        difference = (changed.mean[after] - plain.mean[after]).abs().max(1).values
        assert len(difference) > 0
        assert (difference > 3e-4).all()
    actions = batch["action"].clone()
    actions[:, 2, 0] = (actions[:, 2, 0] + 1) % 7
    changed = captured_loss(one, {**batch, "action": actions})
    elsewhere = where[:, 2] != 0  # what is inferred of a seat depends on its own actions alone
    torch.testing.assert_close(changed.mean[elsewhere], plain.mean[elsewhere])
    assert not torch.allclose(changed.mean[~elsewhere], plain.mean[~elsewhere])


def test_a_memory_counts_as_forty_steps_at_most(script, lively):
    """That of the match and that of the episode each for itself; the rest is plain formulas."""
    game, agent = lively(env_id=HUNT)
    moa = agent.moa
    assert moa.memory_steps == 40
    own, others = game.features(situations(game, batch=1, steps=1))
    means = torch.randn(2, moa.memory_size - 1, generator=generator_of(0))
    for counts in ((0, 0), (1, 1), (40, 7), (41, 41), (100, 40), (60, 8), (5000, 3000)):
        count = torch.tensor(counts).float().unsqueeze(1)
        memory = torch.cat([means * count, count], 1)
        reads = []
        for k, steps in enumerate(min(number, 40) for number in counts):
            sums = means[k] * steps
            logarithm = torch.tensor([math.log(1 + steps) / 4])
            reads += [sums / (1 + steps), sums / (10 + 0.2 * steps), logarithm]
        with torch.no_grad():
            got = torch.cat(moa.encode(memory.expand(1, 3, -1, -1), own, others), -1)
            mean, log_std = moa.encoder(own, others, torch.cat(reads)).chunk(2, -1)
            plain = torch.cat([mean, log_std.clamp(-6, 2)], -1)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# The MOA's loss
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pretraining", [False, True])
@pytest.mark.parametrize("env_id", [HUNT, SMALL_ENV])
def test_moa_loss_is_its_formula(play, script, monkeypatch, env_id, pretraining):
    """-log pi_hat + alpha KL(q || N(0, I)) + c * reconstruction: means over rows, one by one."""
    one = play(env_id=env_id, horizon=None if env_id == SMALL_ENV else 9, rule="positive")
    game = one.game
    moa = one.agent.moa
    one.agent.args = dataclasses.replace(one.agent.args, moa_alpha=0.3)
    monkeypatch.setattr(script, "SUBGOAL_COEF", 0.7)
    spans = one.spans()
    batch = one.read(spans)
    captured = captured_loss(one, batch, pretraining)
    noise = torch.randn(captured.mean.shape, generator=generator_of(0))
    goal = (captured.mean + captured.log_std.exp() * noise).detach()
    std = captured.log_std.exp().detach()
    mean = captured.mean.detach()
    kl = 0.5 * (std**2 + mean**2 - 1).sum(1) - std.log().sum(1)
    nll = []
    recon = []
    unknown = 0
    for r, (s, t, i) in enumerate(weighted_rows(batch)):
        b, start, end = spans[s]
        steps = one.history[b][start:end]
        step = steps[t]
        own, others = game.features(step["state"])
        features, present = game.subgoals(step["state"])
        with torch.no_grad():
            logits = moa.decoder(own[0, i], others[0, i], goal[r])
            chances = moa.subgoal_logits(
                own[0, i], others[0, i], goal[r], features[0, i], present[0, i]
            )
        policy = probabilities(logits, game.action_mask(step["state"])[0, i])
        nll.append(-math.log(policy[int(step["action"][i])]))
        episode = [k for k in range(t, len(steps)) if steps[k]["episode"] == step["episode"]]
        reached = [k for k in episode if steps[k]["reached"][i] >= 0]
        if step["episode"] == one.episode[b]:
            unknown += 1
        else:
            there = torch.cat([present[0, i], torch.tensor([True])])
            item = int(steps[reached[0]]["reached"][i]) if reached else len(there) - 1
            recon.append(-math.log(probabilities(chances, there)[item]))
    assert unknown > 3
    assert len(recon) > 10
    expected = {
        "moa/nll": sum(nll) / len(nll),
        "moa/kl": float(kl.mean()),
        "moa/recon": sum(recon) / len(nll),  # 0 where it is not known
    }
    terms = {name: float(term.detach()) for name, term in captured.terms.items()}
    assert terms == pytest.approx(expected, rel=1e-3)
    whole = 0.3 * terms["moa/kl"] + 0.7 * terms["moa/recon"]
    if not pretraining:
        whole += terms["moa/nll"]
    assert float(captured.loss.detach()) == pytest.approx(whole, rel=1e-5)
    captured.loss.backward()
    learnt = [parameter.grad for parameter in moa.decoder.parameters()]
    if pretraining:
        assert all(grad is None or not grad.any() for grad in learnt)
    else:
        assert all(grad.any() for grad in learnt)
    parts = [moa.encoder, moa.step_feature] + [moa.subgoal] * (env_id != SMALL_ENV)
    for part in parts:
        assert all(parameter.grad.any() for parameter in part.parameters())


def test_no_goal_and_many_rows(play, monkeypatch, script):
    """With `--goal none` the goal is zero and there is no KL; at most MOA_ROWS rows are read."""
    one = play(goal="none")
    batch = one.read(one.spans())
    moa = one.agent.moa
    _, terms = script.moa_loss(one.agent, batch, False, generator_of(0))
    assert float(terms["moa/kl"]) == 0.0
    own, others = batch["own"], batch["others"]
    logits = moa.decoder(own, others, own.new_zeros(*own.shape[:3], moa.goal_size))
    logits = logits.masked_fill(~batch["mask"], -1e9)
    rows = batch["weight"]
    nll = functional.cross_entropy(logits[rows], batch["action"][rows])
    assert float(terms["moa/nll"].detach()) == pytest.approx(float(nll.detach()), rel=1e-5)
    inferring = play()
    batch = inferring.read(inferring.spans())
    whole = captured_loss(inferring, batch)
    monkeypatch.setattr(script, "MOA_ROWS", 50)
    part = captured_loss(inferring, batch)
    assert len(part.own) == 50 < len(whole.own)
    everything = torch.cat([whole.memory.flatten(1), whole.own], 1)
    for row in torch.cat([part.memory.flatten(1), part.own], 1):
        assert (everything - row).abs().max(1).values.min() < 1e-5


@DISCRETE
@pytest.mark.parametrize("goal_training", ["gumbel", "em"])
def test_who_has_left_tells_nothing_of_its_goal(script, play, goal_training):
    """What it is said to see and do then is in no loss of the MOA, and in no belief."""
    one = play(steps=40)
    agent = one.agent
    agent.args = dataclasses.replace(agent.args, goal_training=goal_training)
    batch = one.read(one.spans())
    left = ~batch["active"]
    assert 0.05 < left.float().mean() < 0.95
    losses = []
    for others in (torch.zeros_like(left), left, ~left):
        torch.manual_seed(0)  # of the draws of goals
        own = batch["own"] + others.unsqueeze(3)
        action = torch.where(others, STAY - 1, batch["action"])
        changed = {**batch, "own": own, "action": action}
        loss, terms = script.moa_loss(agent, changed, False, generator_of(0))
        losses.append(torch.stack([loss, *terms.values()]).detach())
    assert torch.equal(losses[0], losses[1])
    assert (losses[0] != losses[2]).all()
    state = situations(one.game)
    own, views = one.game.features(state)
    alive = one.game.alive(state)
    player = player_of(script, agent, len(own))
    mask = torch.ones(*alive.shape, 7, dtype=torch.bool)
    player.decision = {"own": own, "views": views, "mask": mask, "alive": alive}
    with torch.no_grad():
        player.remember(torch.full(alive.shape, STAY))
        belief = agent.moa.belief(player.memory)
    assert torch.allclose(belief[~alive], torch.ones(()) / agent.args.goals)
    assert (belief[alive].amax(1) > 1.01 / agent.args.goals).float().mean() > 0.9
    assert 10 < alive.sum() < alive.numel() - 10


def test_oracle_goals_in_the_buffer_are_those_acted_on(script, small, decisions):
    """Kinds and targets of scripted co-players at each step; of the learner nothing."""
    runs = []
    options = {"env_id": "msh-4x4-3p-2h1s", "co_players": "ns,nh-noisy,self", "num_steps": 40}

    def watch(buffer, game, **others):
        runs.append((game, {name: field.clone() for name, field in buffer.ring.items()}))

    script.train(small(goal="oracle", total_timesteps=160, **options), watch)
    game, ring = runs[0]
    for t in range(40):
        oracle = game.oracle(decisions[t]["state"], *decisions[t]["scripted"])
        assert torch.equal(ring["goals"][t], oracle)
        learner = decisions[t]["seats"]
        own = ring["goals"][t][learner]
        assert own[:, 3].all()  # no scripted kind
        assert own.sum() == len(own)
    kinds = ring["goals"][:40].flatten(0, 2)[:, :4].sum(0)
    assert (kinds[[0, 1, 3]] > 10).all()
    assert kinds[2] == 0  # `random`, which is not in the pool


def test_goals_that_are_inferred_predict_better_than_none(script, lively, monkeypatch):
    """Hunters of stags and hunters of hares: who is who shows in what they did in the match. Judged
    on matches never seen, after their first episode; so are the targets of the stags' hunters."""
    monkeypatch.setattr(script, "SUBGOAL_COEF", 0.3)
    kinds = ["ns", "nh"]
    nll = {}
    shares = {}
    for goal in ("inferred", "none"):
        options = {"env_id": "msh-5x5-3p-2h2s", "goal": goal, "hidden_size": 32}
        game, agent = lively(goal_size=4, moa_alpha=0.003, **options)
        moa = script.MOA(game, agent.args)
        agent.moa = moa
        seen = Play(script, game, agent, 64, 3, kinds=kinds, seed=1).run(130)
        unseen = Play(script, game, agent, 32, 3, kinds=kinds, seed=2).run(90)
        optimizer = torch.optim.Adam(moa.parameters(), 1e-2)
        generator = generator_of(0)
        for _ in range(250):
            batch = seen.buffer.sample(12, generator)
            loss, _ = script.moa_loss(agent, batch, False, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moa.parameters(), 1.0)
            optimizer.step()
        spans = unseen.spans()
        batch = unseen.read(spans)
        kind = torch.zeros_like(batch["action"])
        for s, (b, start, end) in enumerate(spans):
            steps = unseen.history[b][start:end]
            kind[s, : len(steps)] = torch.stack([step["kind"] for step in steps])
        later = batch["active"] & (batch["first"] > 0)
        counted = {**batch, "weight": later & (kind > 0)}
        with torch.no_grad():
            _, terms = script.moa_loss(agent, counted, False, generator_of(0))
        nll[goal] = float(terms["moa/nll"])
        hunters = later & (kind == 1) & batch["ended"] & (batch["subgoal"] >= 0)
        shares[goal] = subgoal_accuracy(agent, batch, hunters)
    assert nll["inferred"] < nll["none"] - 0.08, nll
    accuracy, chance = shares["inferred"]
    assert accuracy > chance + 0.4, shares
    assert accuracy > shares["none"][0] + 0.05, shares


@torch.no_grad()
def subgoal_accuracy(agent, batch, where):
    """Share of the rows bool [S, L, N] `where` whose subgoal is the likeliest by the MOA, and of a
    guess among the items that are there."""
    moa = agent.moa
    seen = (batch["own"], batch["others"])
    goal = seen[0].new_zeros(*where.shape, moa.goal_size)
    if agent.args.goal == "inferred":
        step = moa.step_features(*seen, batch["action"], batch["active"])
        before = step.cumsum(1) - step
        within = before - before.gather(1, batch["first"].unsqueeze(3).expand_as(before))
        goal, _ = moa.encode(torch.stack([before, within], 3), *seen)
    logits = moa.subgoal_logits(*seen, goal, batch["features"], batch["present"])
    right = logits[..., :-1].argmax(3) == batch["subgoal"]
    chance = 1.0 / batch["present"].sum(3)
    return float(right[where].float().mean()), float(chance[where].mean())


# ------------------------------------------------------------------------------------------------
# The planner
# ------------------------------------------------------------------------------------------------
GRIDS = [HUNT, "msh-2x3-4p-2h2s", DRIFTS]


def situations(game, batch=40, steps=6, seed=0):
    """States of games under way, many of them just before an end."""
    generator = generator_of(seed)
    state = game.start(batch, generator)
    if game.simulates:
        time = torch.randint(game.horizon - 1, (batch,), generator=generator)
        late = torch.rand(batch, generator=generator) < 0.3
        state = state._replace(time=torch.where(late, game.horizon - 2, time))
    kept = []
    for _ in range(steps):
        kept.append(state)
        actions = draw(likely(game, state, 12.0), generator)
        after, _, terminated, truncated = game.step(state, actions)
        ended = (terminated | truncated).all(1)
        state = game.restart(after, ended, generator)
    fields = []
    for parts in zip(*kept, strict=True):
        fields.append(torch.cat(parts))
    return type(state)(*fields)


def joint_actions(game, state, samples, seed=1):
    """int64 [B, K, N] legal joint actions, interactions likely."""
    logits = likely(game, state, 12.0).unsqueeze(1).expand(-1, samples, -1, -1)
    return draw(logits, generator_of(seed))


def choices(game, state):
    """Games and seats [D] of all players that have a choice."""
    return (game.action_mask(state).sum(2) > 1).nonzero(as_tuple=True)


def some_goals(agent, state, seed=2):
    shape = (len(state[0]), agent.game.num_players, agent.moa.goal_size)
    return torch.randn(shape, generator=generator_of(seed))


@torch.no_grad()
def scores_of(script, agent, state, goal, joint, games, seats):
    """The planner's scores [D, A] with these joint actions sampled."""
    seen = (*agent.game.features(state), goal, torch.zeros_like(goal))
    with mock.patch.object(script, "sample_joint_actions", lambda *given: joint):
        return script.scores(agent, state, seen, (games, seats), None)


@torch.no_grad()
def scores_in_a_loop(agent, state, goal, joint, games, seats):
    """[D, A]: the transition network for each decision, own action and sample, one at a time."""
    game = agent.game
    scores = torch.zeros(len(games), game.num_actions)
    own, views = game.features(state)
    n = game.num_players
    identity = torch.eye(game.num_actions)
    for d, (b, i) in enumerate(zip(games.tolist(), seats.tolist(), strict=True)):
        for action, played in itertools.product(range(game.num_actions), joint[b]):
            company = []
            for slot in range(n - 1):
                j = (i + 1 + slot) % n
                company.append(torch.cat([views[b, i, slot], goal[b, j], identity[played[j]]]))
            reads = (own[b, i], torch.stack(company), identity[action])
            reward, value = agent.transition(*reads).tolist()
            scores[d, action] += (reward + agent.args.gamma * value) / len(joint[b])
    return scores


@pytest.mark.parametrize("env_id", [*GRIDS, SMALL_ENV])
def test_scores_equal_a_plain_loop(script, lively, env_id):
    """Of every own action, legal or not, at the same sampled joint actions."""
    game, agent = lively(env_id=env_id, plan_update="offset", gamma=GAMMA)
    state = situations(game, batch=4, steps=4)
    goal = some_goals(agent, state)
    joint = joint_actions(game, state, 3)
    games, seats = choices(game, state)
    scores = scores_of(script, agent, state, goal, joint, games, seats)
    expected = scores_in_a_loop(agent, state, goal, joint, games, seats)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05
    assert expected.std(1).max() > 0.05  # own actions differ
    other = scores_of(script, agent, state, -goal, joint, games, seats)
    assert (other - expected).abs().max() > 0.01  # what is inferred counts
    other = scores_of(script, agent, state, goal, joint.flip(0), games, seats)
    assert (other - expected).abs().max() > 0.01  # and what the others do


def test_transition_network_reads_every_action_and_no_order(script, lively):
    """Reward and value depend on each action, and not on the order of the co-players."""
    game, agent = lively(env_id="msh-3x3-4p-2h1s")
    generator = generator_of(0)

    def outcome(own, others, action, company):
        return script.outcome(agent.transition, own, others, company, action)

    rows = torch.arange(50)
    own = torch.randn(50, game.own_size, generator=generator)
    size = game.other_size + agent.moa.goal_size
    others = torch.randn(50, 3, size, generator=generator)
    action = torch.randint(7, (50,), generator=generator)
    company = torch.randint(7, (50, 3), generator=generator)
    order = torch.rand(50, 3, generator=generator).argsort(1)
    with torch.no_grad():
        plain = torch.stack(outcome(own, others, action, company), 1)
        moved = outcome(own, others[rows.unsqueeze(1), order], action, company.gather(1, order))
        changed = [outcome(own, others, (action + 1) % 7, company)]
        for slot in range(3):
            different = company.clone()
            different[:, slot] = (different[:, slot] + 1) % 7
            changed.append(outcome(own, others, action, different))
    torch.testing.assert_close(torch.stack(moved, 1), plain, rtol=1e-5, atol=1e-5)
    for results in changed:
        difference = (torch.stack(results, 1) - plain).abs()
        assert (difference > 1e-4).all(1).float().mean() > 0.9


def test_the_planner_scores_by_what_the_player_infers(script, lively, monkeypatch):
    """Its decision's scores are those at the goals of its memory, and at its own seats alone."""
    game, agent = lively(env_id=HUNT, plan_update="offset")
    state = situations(game, batch=6, steps=3)
    joint = joint_actions(game, state, 4)
    monkeypatch.setattr(script, "sample_joint_actions", lambda *inputs: joint)
    memory = script.Player(agent, 18).memory
    memory = torch.randn(memory.shape, generator=generator_of(1)).abs()
    seats = torch.rand(18, 3, generator=generator_of(5)) < 0.7
    decision = decision_of(script, agent, state, seats, memory)
    chosen = (seats & game.alive(state)).nonzero(as_tuple=True)
    looped = [agent, state, decision["goals"], joint, *chosen]
    expected = torch.zeros_like(decision["q_plan"])
    expected[chosen] = scores_in_a_loop(*looped)
    torch.testing.assert_close(decision["q_plan"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("env_id", GRIDS)
def test_scores_do_not_depend_on_the_rest_of_the_batch(script, lively, env_id):
    """Each game alone, games in another order, seats relabelled."""
    game, agent = lively(env_id=env_id, plan_update="offset")
    state = situations(game, batch=4)
    batch, n = state.players.shape
    goal = some_goals(agent, state)
    joint = joint_actions(game, state, 20)
    games, seats = choices(game, state)
    scores = scores_of(script, agent, state, goal, joint, games, seats)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    for b in (0, 7, batch - 1):
        one = torch.tensor([b])
        mine = games == b
        zeros = torch.zeros_like(games[mine])
        alone = (rows_of(state, one), goal[one], joint[one], zeros, seats[mine])
        torch.testing.assert_close(scores_of(script, agent, *alone), scores[mine], **tolerance)
    order = torch.randperm(batch, generator=generator_of(3))
    turned = torch.randperm(len(games), generator=generator_of(4))
    chosen = (order.argsort()[games[turned]], seats[turned])
    moved = (rows_of(state, order), goal[order], joint[order], *chosen)
    torch.testing.assert_close(scores_of(script, agent, *moved), scores[turned], **tolerance)
    seat = torch.tensor([1, 0, *range(2, n)])  # no rotation
    other = state._replace(players=state.players[:, seat])
    relabelled = (other, goal[:, seat], joint[:, :, seat], games, seat.argsort()[seats])
    torch.testing.assert_close(scores_of(script, agent, *relabelled), scores, **tolerance)


def test_many_samples_give_the_exact_expectation(script, lively):
    """Two players: the expectation over the co-player's known probabilities, by hand."""
    samples = 4000
    options = {"env_id": "msh-2x2-2p-1h1s", "goal": "none"}
    game, agent = lively(gamma=GAMMA, plan_samples=samples, plan_update="offset", **options)
    state = situations(game, batch=3, steps=4)
    mask = game.action_mask(state)
    count = len(mask)
    decision = decision_of(script, agent, state)
    goal = torch.zeros(count, 2, agent.moa.goal_size)
    own, others = game.features(state)
    with torch.no_grad():
        logits = agent.moa.decoder(own, others, goal).masked_fill(~mask, -1e9)
    games, seats = choices(game, state)
    outcomes = []  # [D, A] for each action of the co-player
    for action in range(game.num_actions):
        joint = torch.full((count, 1, 2), action)
        outcomes.append(scores_in_a_loop(agent, state, goal, joint, games, seats))
    outcomes = torch.stack(outcomes, 2)  # [D, A, A']
    weight = logits.softmax(2)[games, 1 - seats].unsqueeze(1)
    expected = (outcomes * weight).sum(2)
    variance = ((outcomes - expected.unsqueeze(2)).square() * weight).sum(2)
    error = (decision["q_plan"][games, seats] - expected).abs()
    assert (error <= 4.5 * (variance / samples).sqrt() + 1e-5).all()
    assert variance.max().sqrt() > 0.05  # there was something to average


def test_joint_actions_are_drawn_from_the_moa_at_drawn_goals(script, lively):
    """E_z[pi_hat(a | o, z)], z ~ N(mean, std), each sample and seat with a z of its own."""
    samples = 6000
    game, agent = lively(env_id=HUNT, plan_samples=samples, goal_size=2)
    with torch.no_grad():
        agent.moa.decoder.goal.weight.mul_(6.0)
    state = situations(game, batch=2, steps=2)
    mask = game.action_mask(state)
    own, others = game.features(state)
    mean = some_goals(agent, state)
    log_std = torch.full((4, 3, 2), 0.3)
    generator = generator_of(0)
    with torch.no_grad():
        seen = (own, others, mean, log_std)
        joint = script.sample_joint_actions(agent, mask, seen, generator)
        noise = torch.randn(4, 3, samples, 2, generator=generator)
        goals = mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * noise
        features = (own.unsqueeze(2), others.unsqueeze(2))
        logits = agent.moa.decoder(*features, goals).masked_fill(~mask.unsqueeze(2), -1e9)
        at_mean = agent.moa.decoder(own, others, mean).masked_fill(~mask, -1e9).softmax(2)
    assert joint.shape == (4, samples, 3)
    policy = logits.softmax(3).mean(2)
    share = functional.one_hot(joint, game.num_actions).float().mean(1)
    deviation = (2 * policy * (1 - policy) / samples).sqrt()
    assert ((share - policy).abs() <= 5 * deviation + 5e-3).all()
    assert (at_mean - policy).abs().max() > 0.1  # the mean goal alone would be seen
    for i, j in ((0, 1), (1, 2)):  # seats are drawn independently
        agree = (joint[:, :, i] == joint[:, :, j]).float().mean(1)
        chance = (policy[:, i] * policy[:, j]).sum(1)
        assert ((agree - chance).abs() <= 5 * 0.5 / samples**0.5 + 5e-3).all()


@EVERY
def test_goals_are_those_of_the_memory(script, lively, monkeypatch):
    """What a player reads, and a planner samples from, is the posterior of the memory: mean and
    standard deviation, or shares of goals."""
    game, agent = lively(env_id=HUNT, plan_update="offset")
    state = situations(game, batch=3, steps=3)
    own, others = game.features(state)
    shape = script.Player(agent, 9).memory.shape
    memory = torch.randn(shape, generator=generator_of(1)).abs()
    shown = []

    def noting(agent, state, seen, chosen, generator):
        shown.append(seen[2:])
        return torch.zeros(len(chosen[0]), game.num_actions)

    monkeypatch.setattr(script, "scores", noting, raising=plans(script))
    decision = decision_of(script, agent, state, memory=memory)
    with torch.no_grad():
        mean, log_std = agent.moa.encode(memory, own, others)
    assert bool(shown) == plans(script)
    if shown:
        torch.testing.assert_close(shown[0][0], mean)
        torch.testing.assert_close(shown[0][1], log_std)
    assert log_std.std() > 0.05
    assert mean.std() > 0.05
    for i in range(3):
        company = [j for j in range(3) if j != i]
        torch.testing.assert_close(decision["goal"][:, i], mean[:, company].sum(1))
        for slot, j in enumerate(game.others[i].tolist()):
            seen = decision["others"][:, i, slot, game.other_size :]
            torch.testing.assert_close(seen, mean[:, j])


# ------------------------------------------------------------------------------------------------
# From scores to a policy
# ------------------------------------------------------------------------------------------------
@PLANNERS
@pytest.mark.parametrize("mode", ["offset", "hop", "none"])
@pytest.mark.parametrize("slope, share", [(0.6, 0.6), (1.8, 1.0), (-0.5, 0.0)])
def test_the_policy_that_acts(script, lively, mode, slope, share):
    """log pi_theta plus beta times centred Q, or that alone; beta by the slope."""
    game, agent = lively(env_id=HUNT, plan_update=mode, plan_beta=6.0)
    agent.plan_slope.fill_(slope)
    state = situations(game, batch=60)
    seats = torch.rand(360, 3, generator=generator_of(5)) < 0.7
    decision = decision_of(script, agent, state, seats)
    mask = game.action_mask(state)
    with torch.no_grad():
        logits = agent.actor(*map(decision.get, ["own", "others", "goal"]))
        value = agent.critic(*map(decision.get, ["own", "others", "goal"])).squeeze(2)
    torch.testing.assert_close(decision["value"], value)
    prior = logits.masked_fill(~mask, -1e9).log_softmax(2)
    torch.testing.assert_close(decision["prior"], prior)
    for b, i in itertools.product(range(0, 360, 3), range(3)):
        legal = mask[b, i].nonzero().flatten().tolist()
        plans = mode != "none" and seats[b, i] and game.alive(state)[b, i]
        q_plan = decision["q_plan"][b, i]
        assert q_plan.any() == plans
        mean = float(q_plan[legal].mean())
        exponents = torch.full((7,), -1e9)
        for a in range(7):
            offset = 0.0
            if plans and a in legal:
                offset = 6.0 * share * (float(q_plan[a]) - mean)
            assert float(decision["offset"][b, i, a]) == pytest.approx(offset, abs=1e-3)
            if a in legal:
                exponents[a] = offset if mode == "hop" else float(logits[b, i, a]) + offset
        policy = exponents.log_softmax(0)
        action = int(decision["action"][b, i])
        assert action in legal
        assert float(decision["log_prob"][b, i]) == pytest.approx(float(policy[action]), abs=1e-3)
        expected = float((policy.exp() * q_plan).sum())
        assert float(decision["expected"][b, i]) == pytest.approx(expected, abs=1e-3)


@DISCRETE
@pytest.mark.parametrize("assignment", ["soft", "hard", "exclusive"])
def test_the_policy_that_acts_on_assigned_goals(script, lively, assignment):
    """pi_theta of own features, and co-players' with the goals that are assigned to them."""
    game, agent = lively(env_id=HUNT, assignment=assignment)
    state = situations(game, batch=20)
    memory = torch.randn(script.Player(agent, 120).memory.shape, generator=generator_of(1))
    decision = decision_of(script, agent, state, memory=memory)
    mask = game.action_mask(state)
    own, others = game.features(state)
    with torch.no_grad():
        goals = agent.moa.encode(memory, own, others)[0]
        theirs = goals[:, game.others]
        seen = (own, torch.cat([others, theirs], 3), theirs.sum(2))
        policy = agent.actor(*seen).masked_fill(~mask, -1e9).log_softmax(2)
        value = agent.critic(*seen).squeeze(2)
    torch.testing.assert_close(decision["value"], value)
    action = decision["action"].unsqueeze(2)
    assert mask.gather(2, action).all()
    torch.testing.assert_close(decision["log_prob"], policy.gather(2, action).squeeze(2))


@EVERY
def test_actions_are_drawn_from_that_policy(script, lively):
    game, agent = lively(env_id=HUNT, plan_update="offset", plan_beta=1.5)
    one = rows_of(situations(game, batch=8), torch.tensor([7]))
    state = rows_of(one, torch.zeros(6000, dtype=torch.int64))
    decision = decision_of(script, agent, state)
    mask = game.action_mask(state)
    with torch.no_grad():
        prior = agent.actor(*map(decision.get, ["own", "others", "goal"]))
    logits = (prior + offset_of(decision, prior)).masked_fill(~mask, -1e9)
    policy = logits.softmax(2).mean(0)
    share = functional.one_hot(decision["action"], 7).float().mean(0)
    assert ((share - policy).abs() <= 5 * (policy * (1 - policy) / 6000).sqrt() + 1e-6).all()
    assert policy.amax(1).min() < 0.9  # of one player at least


def test_calibration_in_closed_form(script):
    """Regression through the origin of the advantage on Q(a) - E_pi Q."""
    generator = generator_of(0)
    count = 300
    q_plan = torch.randn(count, 5, generator=generator)
    expected = torch.randn(count, generator=generator)
    action = draw(torch.zeros(count, 5), generator)
    advantage = torch.randn(count, generator=generator)
    rows = {"q_plan": q_plan, "expected": expected, "action": action, "advantage": advantage}
    gains = [float(q_plan[r, action[r]] - expected[r]) for r in range(count)]
    top = sum(gain * float(a) for gain, a in zip(gains, advantage, strict=True))
    bottom = sum(gain**2 for gain in gains)
    assert float(script.calibration(rows)) == pytest.approx(top / bottom, rel=1e-4)
    rows["advantage"] = 1.7 * torch.tensor(gains)
    assert float(script.calibration(rows)) == pytest.approx(1.7, rel=1e-4)


@PLANNERS
def test_hop_learns_the_mean_of_return_and_plan(script, small):
    """V's target: half the lambda-return, half E_pi Q under the planner's policy."""
    runs = []

    def watch(storage, rows, **others):
        learner = torch.stack(storage["learner"])
        fields = {}
        for name in ("q_plan", "offset", "mask", "value"):
            fields[name] = torch.stack(storage[name])[learner]
        runs.append((fields, rows))

    options = {"env_id": HUNT, "co_players": "nh", "horizon": 9, "num_steps": 40}
    args = small(plan_update="hop", plan_until=1.0, total_timesteps=480, **options)
    script.train(args, watch)
    assert len(runs) == 3
    for fields, rows in runs:
        returned = rows["advantage"] + fields["value"]
        for r in range(len(returned)):
            planned = probabilities(fields["offset"][r], fields["mask"][r])
            expected = sum(p * float(fields["q_plan"][r, a]) for a, p in planned.items())
            target = 0.5 * (float(returned[r]) + expected)
            assert float(rows["return"][r]) == pytest.approx(target, abs=1e-4)
    assert len(runs[2][1]["return"]) > 20


# ------------------------------------------------------------------------------------------------
# No seat is special
# ------------------------------------------------------------------------------------------------
@PLANNERS
def test_relabelled_seats_give_the_same_decisions(script, lively):
    check_relabelled_decisions(script, lively, plan_update="none")


@DISCRETE
@pytest.mark.parametrize("assignment", ["soft", "hard", "exclusive"])
def test_relabelled_seats_give_the_same_assignments(script, lively, assignment):
    check_relabelled_decisions(script, lively, assignment=assignment, goals=5)


def check_relabelled_decisions(script, lively, **options):
    """Features, goals, priors, values of the players, whatever their seats are called."""
    game, agent = lively(env_id="msh-4x4-4h1s", **options)
    state = situations(game, batch=20)
    order = torch.tensor([2, 0, 3, 1])  # no rotation
    other = state._replace(players=state.players[:, order])
    shape = script.Player(agent, 120).memory.shape
    memory = torch.randn(shape, generator=generator_of(1)).abs()
    results = []
    for one, remembered in ((state, memory), (other, memory[:, order])):
        decision = decision_of(script, agent, one, memory=remembered)
        value = player_of(script, agent, 120, remembered).value(one, None)
        torch.testing.assert_close(value, decision["value"])
        with torch.no_grad():
            prior = agent.actor(*map(decision.get, ["own", "others", "goal"]))
        prior = prior.masked_fill(~decision["mask"], -1e9).log_softmax(2)
        torch.testing.assert_close(decision.get("prior", prior), prior)
        results.append({**decision, "prior": prior})
    plain, moved = results
    for name in ("own", "goal", "mask", "prior", "value"):
        field = plain[name][:, order]
        torch.testing.assert_close(moved[name], field, rtol=1e-4, atol=1e-5)
    slots = slot_order(order.tolist())
    for k in range(4):
        seen = plain["others"][:, order[k]][:, slots[k]]
        torch.testing.assert_close(moved["others"][:, k], seen, rtol=1e-4, atol=1e-5)
    assert plain["goal"].std() > 0.01
    assert plain["value"].std() > 0.05


def gradients(networks):
    parts = []
    for network in networks:
        for parameter in network.parameters():
            if parameter.grad is not None:  # else it is not read
                parts.append(parameter.grad.flatten())
                parameter.grad = None
    return torch.cat(parts)


@PLANNERS
def test_relabelled_seats_give_the_same_training(script, play, monkeypatch):
    check_relabelled_training(script, play, monkeypatch)


@DISCRETE
@pytest.mark.parametrize("options", [{}, {"goal_training": "em", "pg": True}], ids=["ppo", "pg"])
def test_relabelled_seats_give_the_same_training_of_goals(script, play, monkeypatch, options):
    check_relabelled_training(script, play, monkeypatch, **options)


MODELS = {"hop_onestep": "transition", "latent_world_model": "model"}  # of a planner


def check_relabelled_training(script, play, monkeypatch, **options):
    """Matches of random players with the seats in another order: the same losses of the MOA, of PPO
    and of a planner's model, and the same gradients."""
    one = play(env_id="msh-3x3-4p-3h1s", match_episodes=2)
    game = one.game
    agent = one.agent
    agent.args = dataclasses.replace(agent.args, **options)
    ring = one.buffer.ring
    plain_ring = dict(ring)
    order = torch.tensor([2, 0, 3, 1])  # no rotation
    shape = one.read(one.spans())["action"].shape
    generator = generator_of(7)
    advantage = torch.randn(shape, generator=generator)
    returns = torch.randn(shape, generator=generator)
    rewards = torch.randn(shape, generator=generator)
    results = defaultdict(list)

    def constant(size, **options):  # noise of the goals, the same for every row
        return torch.full(size, 0.3)

    def likeliest(logits, tau, hard):  # the same, of discrete goals
        share = (logits / tau).softmax(1)
        return functional.one_hot(share.argmax(1), share.shape[1]) + share - share.detach()

    for place in (torch.arange(4), order):
        for name in ("players", "action", "alive", "reward", "reached"):
            ring[name] = plain_ring[name][:, :, place]
        batch = one.read(one.spans())
        own = batch["own"].flatten(0, 1)
        others = batch["others"].flatten(0, 1)
        mask = batch["mask"].flatten(0, 1)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", constant)
            patch.setattr(functional, "gumbel_softmax", likeliest)
            loss, terms = script.moa_loss(agent, batch, False, generator_of(0))
        loss.backward()
        results["moa"].append(torch.stack([loss, *terms.values()]).detach())
        results["moa gradients"].append(gradients([agent.moa]))
        with torch.no_grad():
            memory = script.Player(agent, len(own)).memory
            goal, _ = agent.moa.encode(memory, own, others)
            others, total = agent.inputs(others, goal)
            log_policy = agent.actor(own, others, total).masked_fill(~mask, -1e9)
            log_policy = log_policy.log_softmax(2)
        actions = batch["action"].flatten(0, 1)
        log_prob = log_policy.gather(2, actions.unsqueeze(2)).squeeze(2) + 0.1
        rows = {
            "own": own,
            "others": others,
            "goal": total,
            "mask": mask,
            "offset": torch.zeros_like(log_policy),
            "action": actions,
            "log_prob": log_prob,
            "advantage": advantage[:, :, place].flatten(0, 1),
            "return": returns[:, :, place].flatten(0, 1),
        }
        active = batch["active"].flatten(0, 1)
        part = {name: field[active] for name, field in rows.items()}
        agent.plan_mode = "offset"
        loss, terms = script.ppo_loss(agent, part, torch.tensor(0.02))
        loss.backward()
        results["ppo"].append(torch.stack([loss, *terms.values()]).detach())
        results["ppo gradients"].append(gradients([agent.actor, agent.critic]))
        if script.SCRIPT not in MODELS:
            continue
        model = getattr(agent, MODELS[script.SCRIPT])
        part["other_actions"] = actions[:, game.others][active]
        reads = map(part.get, ["own", "others", "other_actions", "action"])
        reward, value = script.outcome(model, *reads)
        target = rewards[:, :, place].flatten(0, 1)[active]
        loss = (reward - target).square().mean() + (value - target).square().mean()
        loss.backward()
        results["model"].append(loss.detach())
        results["model gradients"].append(gradients([model]))
    for name, (first, second) in results.items():
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)
        assert first.abs().max() > 1e-3, name
    assert not batch["active"].all()


def test_the_value_at_the_time_limit_is_one_that_is_trained(script, lively):
    """No step begins with 0 steps left: V of a truncated game is read as with 1 left."""
    game, agent = lively(env_id=DRIFTS, horizon=12)
    state = game.start(8, generator_of(0))
    player = script.Player(agent, 8)
    values = []
    for time in (12, 11, 8):
        values.append(player.value(state._replace(time=torch.full((8,), time)), None))
    at_limit, before, earlier = values
    small_change = (at_limit - before).abs().mean()
    assert small_change < 0.5 * (at_limit - earlier).abs().mean()
