"""Rollouts, advantages, losses, match buffer and planner, each by a slow way to the same.

`record` plays a short run and notes every step of it; most tests compute from these steps what the
script made of them."""

import itertools
import math
import types
from collections import Counter, defaultdict

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn.functional import one_hot

from conftest import HUNT, SCRIPTS, plans
from run_tools import PLAYED, History, generator_of, policy_of, situations, stacked

pytestmark = pytest.mark.only("hop_onestep")  # most are of what is the same text in all scripts
EVERY = pytest.mark.only(*SCRIPTS)
PLAYS = [{"co_players": "self,nh,random", "plan_update": "offset", "prosocial": 0.3}]
PLAYS += [{"co_players": "self,nh-noisy,ns", "goal": "oracle", "plan_update": "hop"}]
ORDER = torch.tensor([2, 0, 3, 1])  # new seat k is old seat ORDER[k]; no rotation


@torch.no_grad()
def decision_of(script, agent, state, seats=None):
    """What a Player with some memory decides, planning at `seats` or at all of them; the Player."""
    mask = agent.game.action_mask(state)
    players = script.CoPlayers(agent.game, ["self"], len(mask), 1, generator_of(0))
    player = script.Player(agent, len(mask))
    player.memory = torch.randn(player.memory.shape, generator=generator_of(1)).abs()
    seats = torch.ones_like(mask[..., 0]) if seats is None else seats
    return player.act(state, mask, seats, players), player


# ---- Advantages and rollouts ---------------------------------------------------------------------
@pytest.mark.parametrize("gae_lambda", [0.6, 1.0])
def test_advantages_in_closed_form(script, gae_lambda):
    """Sums of (gamma lambda)^k delta to the end of the player's episode."""
    shape = (20, 3, 2)
    generator = generator_of(0)
    rewards, values, ends = torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    goes_on = torch.rand(shape, generator=generator) < 0.8
    truncated = torch.rand(shape, generator=generator) < 0.5
    following = torch.where(goes_on, values.roll(-1, 0), ends * truncated)
    following[-1] = ends[-1]
    result = script.generalised_advantages(rewards, values, following, goes_on, 0.9, gae_lambda)
    delta = rewards + 0.9 * following - values
    for t, b, i in itertools.product(*map(range, shape)):
        last = t
        while last < 19 and goes_on[last, b, i]:
            last += 1
        spans = range(t, last + 1)
        total = sum((0.9 * gae_lambda) ** (s - t) * float(delta[s, b, i]) for s in spans)
        assert float(result[t, b, i]) == pytest.approx(total, rel=1e-5)


@EVERY
@pytest.mark.parametrize("options", PLAYS)
def test_rollout_step_by_step(script, record, options):
    """Every row of the second iteration against a replay: games that go on and begin, the learner's
    rows alone, V of the last state at truncation and nothing at an end, the reward learnt from."""
    args = dict(num_steps=30, total_timesteps=360, plan_until=0.8, plan_beta=3.0)
    steps, (first, second) = record(**args, **options)
    steps = steps[30:]
    args, game = second.args, second.game
    agent = script.Agent(game, args)
    agent.load_state_dict(first.weights)  # with which the second rollout was played
    states = [*(step["state"] for step in steps), second.state]
    values = [*(step["value"] for step in steps), second.last_value]
    following = []
    for t, step in enumerate(steps):
        after, reward, terminated, truncated = game.step(states[t], step["action"])
        ended = (terminated | truncated).all(1)
        assert torch.equal(step["reward"], reward)
        assert torch.equal(step["learner"], (step["kind"] == 0) & game.alive(states[t]))
        assert torch.equal(step["goes_on"], ~(terminated | truncated))
        assert torch.equal(step["other_actions"], step["action"][:, [[1, 2], [2, 0], [0, 1]]])
        for field, new in zip(after, states[t + 1]):
            assert torch.equal(field[~ended], new[~ended])
        assert not states[t + 1].time[ended].any()
        told = types.SimpleNamespace(scripted=lambda step=step: step["scripted"])
        player = script.Player(agent, 6)
        player.memory = step["memory"]
        torch.testing.assert_close(step["value"], player.value(states[t], told))
        player.decision = step
        player.remember(step["action"])
        final = player.value(after, told) * truncated
        torch.testing.assert_close(step["final_value"], final)
        following.append(torch.where(step["goes_on"], values[t + 1], final))
        if args.goal == "oracle":
            assert torch.equal(step["goals"], game.oracle(states[t], *step["scripted"]))
            if plans(script):
                assert torch.equal(second.buffer.ring["goals"][30 + t], step["goals"])
    reward = stacked(steps, "reward")
    learnt = 0.7 * reward + 0.3 * reward.mean(2, keepdim=True) if args.prosocial else reward
    learnt = args.reward_scale * learnt
    if script.SCRIPT == "hop_onestep":  # its planner learns the reward without the bonus
        assert torch.equal(second.moves["reward"], learnt[stacked(steps, "alive")])
    if plans(script) and args.plan_update == "hop":  # the entropy bonus, till 0.8 of the run
        learnt = learnt - (1 - 0.5 / 0.8) / 3.0 * stacked(steps, "log_prob")
    given = (learnt, stacked(steps, "value"), torch.stack(following), stacked(steps, "goes_on"))
    advantage = script.generalised_advantages(*given, args.gamma, args.gae_lambda)
    learner = stacked(steps, "learner")
    torch.testing.assert_close(second.rows["advantage"], advantage[learner], rtol=1e-4, atol=1e-4)
    target = (advantage + given[1])[learner]
    if plans(script) and args.plan_update == "hop":  # V learns the mean of return and plan
        target = 0.5 * (target + stacked(steps, "expected")[learner])
    torch.testing.assert_close(second.rows["return"], target, rtol=1e-4, atol=1e-4)
    assert 0 < learner.sum() < stacked(steps, "alive").sum() < learner.numel()
    assert (stacked(steps, "final_value")[learner] != 0).any()


def test_logged_returns(record):
    """By kind and by seat, and lengths: of the episodes that ended in an iteration."""
    steps, iterations = record(co_players="nh,self", num_steps=60, total_timesteps=720)
    returns = torch.zeros(6, 3)
    for k, one in enumerate(iterations):
        totals = defaultdict(list)
        for step in steps[60 * k : 60 * k + 60]:
            returns += step["reward"]
            for b in step["ended"].nonzero().flatten().tolist():
                totals["charts/episodic_length"].append(float(step["state"].time[b] + 1))
                for i, value in enumerate(returns[b].tolist()):
                    kind = int(step["kind"][b, i])
                    names = [f"returns/{one.co_players.names[kind]}"]
                    if kind == 0:
                        names += ["charts/episodic_return", f"returns/seat_{i}"]
                    for name in names:
                        totals[name].append(value)
            returns[step["ended"]] = 0.0
        expected = {name: sum(values) / len(values) for name, values in totals.items()}
        logged = {name for name in one.metrics if name.startswith(("returns/", "charts/episodic"))}
        assert {name: one.metrics[name] for name in logged} == pytest.approx(expected, abs=1e-4)
        assert len(expected) == 7


@EVERY
@pytest.mark.parametrize("alone", [False, True])
def test_policy_loss_is_its_formula(script, lively, alone):
    """Clipped surrogate of the policy with the planner's offset; imitation of a planner that acts
    alone; or plain policy gradient. And V's loss, entropy, approximate KL."""
    mode = ("hop" if plans(script) else "pg") if alone else "ppo"
    options = {} if plans(script) else {"pg": alone}
    game, agent = lively(clip_coef=0.15, vf_coef=0.7, **options)
    agent.plan_mode = mode
    decision, _ = decision_of(script, agent, situations(script, game, batch=20))
    rows = {name: value.flatten(0, 1) for name, value in decision.items()}
    mask, action = rows["mask"], rows["action"]
    seen = [rows[name] for name in ("own", "others", "goal")]
    noise, advantage, returns = 2 * torch.randn(3, 60, generator=generator_of(0)) + 1
    offset = noise[:, None] * torch.arange(7) * mask * plans(script) / 7
    prior = agent.actor(*seen)
    policy = policy_of(prior if mode == "hop" else prior + offset, mask)
    before = policy.log_prob(action).detach() + 0.2 * noise
    rows |= {"offset": offset, "log_prob": before, "advantage": advantage, "return": returns}
    expected = {"losses/value": 0.5 * (agent.critic(*seen)[:, 0] - returns).square().mean()}
    expected["losses/entropy"] = policy.entropy().mean()
    advantage = (advantage - advantage.mean()) / advantage.std(correction=0)
    ratio = (policy.log_prob(action) - before).exp()
    if mode == "hop":
        planned = policy_of(offset, mask)
        loss = planned.entropy() + kl_divergence(planned, policy)  # the cross-entropy
    elif mode == "pg":
        loss = -policy.log_prob(action) * advantage
    else:
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.85, 1.15) * advantage)
        expected["losses/approx_kl"] = (ratio - 1 - ratio.log()).mean()
    expected["losses/policy"] = loss.mean()
    bonus = 0.0 if mode == "hop" else 0.03
    whole = loss.mean() + 0.7 * expected["losses/value"] - bonus * expected["losses/entropy"]
    found, terms = script.ppo_loss(agent, rows, torch.tensor(0.03))
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(found, whole)
    assert 0.1 < ((ratio - 1).abs() > 0.15).float().mean() < 0.9


@EVERY
def test_ratios_and_passes(script, record, monkeypatch):
    """Before any step of the optimiser PPO's policy is the one that acted, planner included. The
    learner's rows are learnt from, co-players' and leavers' rows are not."""
    parts = []
    plain = script.ppo_loss

    def noting(agent, rows, *rest):
        prior = agent.actor(rows["own"], rows["others"], rows["goal"]).detach()
        policy = policy_of(prior + rows.get("offset", 0.0), rows["mask"])
        parts.append((rows, (policy.log_prob(rows["action"]) - rows["log_prob"]).abs().max()))
        return plain(agent, rows, *rest)

    monkeypatch.setattr(script, "ppo_loss", noting)
    options = {"num_steps": 30, "total_timesteps": 540, "num_minibatches": 3, "plan_beta": 3.0}
    steps, iterations = record(co_players="nh,self", plan_update="offset", **options)
    epochs = iterations[0].args.update_epochs
    assert len(parts) == 3 * epochs * 3
    for k, one in enumerate(iterations):
        assert len(one.rows["advantage"]) == stacked(steps[30 * k : 30 * k + 30], "learner").sum()
        for epoch in range(3 * epochs * k, 3 * epochs * (k + 1), 3):
            passed = torch.cat([rows["advantage"] for rows, _ in parts[epoch : epoch + 3]])
            assert torch.equal(passed.sort().values, one.rows["advantage"].sort().values)
        assert parts[3 * epochs * k][1] < 2e-5
    assert max(distance for _, distance in parts) > 0.01
    if plans(script):
        assert max(float(rows["offset"].abs().max()) for rows, _ in parts) > 0.02


@EVERY
def test_rollouts_in_which_there_is_nothing_to_learn(script, record):
    """The others go on for some steps after the learner has left; nobody has been paid yet, and the
    MOA learns from episodes with a reward alone."""
    options = {"num_envs": 1, "num_steps": 1, "total_timesteps": 40, "update_epochs": 1}
    options |= {"moa_buffer": "positive", "plan_update": "hop", "moa_updates": 1}
    options |= {"env_id": "msh-2x2-3p-2h1s", "co_players": "random", "plan_until": 1.0}
    steps, iterations = record(seed=5, **options, plan_beta=0.0)  # which acts at random
    learnt = [len(one.rows["advantage"]) for one in iterations]
    assert set(learnt) == {0, 1}
    paid = stacked(steps, "reward").any(2).flatten().int().argmax()  # in which iteration
    for k, one in enumerate(iterations):
        assert k > paid or ("moa/nll" in one.metrics) == (k == paid)
        for name in ["losses/policy", "losses/plan_slope"][: 1 + plans(script)]:
            assert (name in one.metrics) == (learnt[k] > 0)


# ---- Match buffer, memory and the MOA's loss -----------------------------------------------------
@pytest.mark.parametrize("rule", ["all", "positive"])
@pytest.mark.parametrize("match_episodes", [2, 99])
def test_matches_are_read_as_they_were_played(script, record, monkeypatch, rule, match_episodes):
    """After the ring has gone round; some matches are longer than what is read of one."""
    monkeypatch.setattr(script, "HISTORY", 25)
    options = {"match_episodes": match_episodes, "moa_buffer": rule, "moa_capacity": 3 * 30}
    steps, iterations = record(num_envs=3, total_timesteps=30 * 7, **PLAYED, **options)
    buffer, game = iterations[-1].buffer, iterations[-1].game
    history = History(script, steps, buffer)
    assert buffer.size == 30
    spans, batch = history.read()
    seen = Counter()
    for s, span in enumerate(spans):
        b, start, end = span
        assert not batch["active"][s, end - start :].any()
        assert not batch["weight"][s, end - start :].any()
        for t, step in enumerate(steps[start:end]):
            state = type(step["state"])(*(field[b : b + 1] for field in step["state"]))
            views = [*game.features(state), game.action_mask(state), *game.subgoals(state)]
            for name, view in zip(["own", "views", "mask", "features", "present"], views):
                assert torch.equal(batch[name][s, t], view[0])
            for name in ("action", "reward", "reached"):
                assert torch.equal(batch[name][s, t], step[name][b])
            assert torch.equal(batch["active"][s, t], step["alive"][b])
            first = next(k for k in range(t + 1) if t in history.later(span, k))
            assert (batch["first"][s, t] == first).all()
            assert (batch["ended"][s, t] == history.known(span, t)).all()
            rewards = [steps[start + k]["reward"][b] for k in history.later(span, first)]
            learns = (rule == "all") | (sum(rewards) > 1e-6)
            assert torch.equal(batch["weight"][s, t], step["alive"][b] & learns)
            subgoals = [history.subgoal(span, t, i) for i in range(3)]
            assert batch["subgoal"][s, t].tolist() == subgoals
            seen.update([f"known {history.known(span, t)}", f"reached {max(subgoals) >= 0}"])
    assert len(seen) == 4 and min(seen.values()) > 5


@pytest.mark.parametrize("match_episodes", [2, 99])
def test_sampled_matches(script, record, monkeypatch, match_episodes):
    """A step of a game is drawn, all as likely, and its match is read."""
    monkeypatch.setattr(script, "HISTORY", 15)
    options = {"match_episodes": match_episodes, "moa_capacity": 3 * 33}
    steps, iterations = record(num_envs=3, total_timesteps=30 * 5, **PLAYED, **options)
    buffer = iterations[-1].buffer
    assert buffer.size == 33
    drawn = []
    monkeypatch.setattr(buffer, "read", lambda *which: drawn.append(torch.stack(which, 1)))
    buffer.sample(20000, generator_of(0))
    found = Counter(tuple(row) for row in drawn[0].tolist())
    spans = History(script, steps, buffer).spans()
    expected = Counter((b, start) for b, start, _ in spans)
    assert set(found) == set(expected)
    for key, number in expected.items():
        mean = 20000 * number / len(spans)
        assert abs(found[key] - mean) < 5 * mean**0.5


def test_memory_sums_what_was_seen_and_done(record):
    """Over the match and over the episode: a feature of each step, and how many there were; of who
    has left nothing. Empty where a match has just begun."""
    steps, iterations = record(total_timesteps=60 * 3, match_episodes=2, **PLAYED)
    game, moa = iterations[-1].game, iterations[-1].agent.moa
    memory = torch.zeros_like(steps[0]["memory"])
    for step, coming in itertools.pairwise(steps):
        own, others = game.features(step["state"])
        seen = torch.cat([own, others.sum(2), one_hot(step["action"], 7)], 2)
        feature = moa.step_feature(seen).tanh().detach()
        feature = torch.cat([feature, torch.ones(6, 3, 1)], 2) * step["alive"][..., None]
        memory = memory + feature[:, :, None]
        memory[step["ended"], :, 1] = 0.0
        memory[coming["match"] > step["match"]] = 0.0
        torch.testing.assert_close(coming["memory"], memory)
    assert stacked(steps, "memory")[..., -1].max() > 8


def test_a_memory_counts_as_forty_steps_at_most(script, lively):
    """That of the match and that of the episode each for itself; the rest is plain formulas."""
    game, agent = lively()
    moa = agent.moa
    own, others = game.features(situations(script, game, batch=20))
    means = torch.randn(2, moa.memory_size - 1, generator=generator_of(0))
    for counts in ((0, 0), (40, 7), (41, 41), (60, 8), (5000, 3000)):
        count = torch.tensor(counts).float().unsqueeze(1)
        memory = torch.cat([means * count, count], 1)
        reads = []
        for mean, steps in zip(means, (min(number, 40) for number in counts)):
            reads += [mean * steps / (1 + steps), mean * steps / (10 + 0.2 * steps)]
            reads.append(torch.tensor([math.log(1 + steps) / 4]))
        mean, log_std = moa.encoder(own, others, torch.cat(reads)).chunk(2, -1)
        found = moa.encode(memory.expand(20, 3, -1, -1), own, others)
        torch.testing.assert_close(found, (mean, log_std.clamp(-6, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pretraining", [False, True])
@pytest.mark.parametrize("goal", ["inferred", "none"])
def test_moa_loss_is_its_formula(script, record, monkeypatch, goal, pretraining):
    """-log pi_hat + alpha KL(q || N(0, I)) + c * reconstruction: a mean over rows. q is by what the
    player remembered when it acted: nothing of the present or the future, nor of other seats."""
    options = {"moa_alpha": 0.3, "goal": goal, "moa_buffer": "positive", "match_episodes": 2}
    options |= {**PLAYED, "plan_update": "offset"}
    steps, iterations = record(total_timesteps=60 * 5, **options)
    agent = iterations[-1].agent
    moa = agent.moa
    history = History(script, steps, iterations[-1].buffer)
    spans, batch = history.read()
    games, starts, _ = torch.tensor(spans).T
    assert batch["action"].shape[1] == max(end - start for _, start, end in spans)
    rows = batch["weight"].nonzero().flip(0)[:90]  # as they come by the numbers below
    monkeypatch.setattr(script, "SUBGOAL_COEF", 0.7)
    monkeypatch.setattr(script, "MOA_ROWS", 90)
    monkeypatch.setattr(script, "uniform", lambda shape, _: -torch.arange(*shape).float())
    loss, terms = script.moa_loss(agent, batch, pretraining, generator_of(0))
    s, t, i = rows.T
    own, views, mask = (batch[name][s, t, i] for name in ("own", "views", "mask"))
    z = torch.zeros(90, moa.goal_size)
    kl = torch.tensor(0.0)
    if goal == "inferred":
        memory = [steps[starts[a] + b]["memory"][games[a], c] for a, b, c in rows.tolist()]
        mean, log_std = moa.encode(torch.stack(memory), own, views)
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=generator_of(0))
        kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(1).mean()
    nll = -policy_of(moa.decoder(own, views, z), mask).log_prob(batch["action"][s, t, i]).mean()
    features, present = batch["features"][s, t, i], batch["present"][s, t, i]
    items = Categorical(logits=moa.subgoal_logits(own, views, z, features, present))
    subgoals = [history.subgoal(spans[a], b, c) for a, b, c in rows.tolist()]
    known = torch.tensor([history.known(spans[a], b) for a, b, _ in rows.tolist()])
    subgoals = torch.tensor(subgoals) % 4  # none is the last
    recon = -(items.log_prob(subgoals) * known).mean()
    assert known.any() and not known.all()
    expected = {"moa/nll": nll, "moa/kl": kl, "moa/recon": recon}
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-5)
    whole = 0.3 * kl + 0.7 * recon + (0.0 if pretraining else nll)
    torch.testing.assert_close(loss, whole, rtol=1e-4, atol=1e-5)


def test_goals_that_are_inferred_predict_better_than_none(script, record):
    """Hunters of stags and hunters of hares: who is who shows in what they did in the match."""
    options = {"env_id": "msh-5x5-3p-2h2s", "co_players": "ns,nh", "horizon": 9, "num_envs": 16}
    options |= {"num_steps": 32, "total_timesteps": 32 * 16 * 8, "moa_updates": 30}
    options |= {"learning_rate": 0.0, "plan_update": "offset", "plan_beta": 0.0, "plan_samples": 1}
    options |= {"moa_learning_rate": 1e-2, "hidden_size": 32, "match_episodes": 4}
    last = {}
    for goal in ("inferred", "none"):
        steps, iterations = record(goal=goal, **options)
        last[goal] = iterations[-1].metrics
        assert stacked(steps, "goals").any() == (goal == "inferred")
    for name, least in {"moa/nll": 0.05, "moa/recon": 0.05}.items():
        assert last["inferred"][name] < last["none"][name] - least, last


@pytest.mark.parametrize("env_id", [HUNT, "msh-2x3-4p-2h2s", "msg-2x3-3p-3d"])
def test_scores_equal_a_plain_loop(script, lively, monkeypatch, env_id):
    """A decision's scores: the transition network for each seat, own action, legal or not, and
    sample, at what is inferred of the co-players, one at a time."""
    game, agent = lively(env_id=env_id, plan_update="offset", gamma=0.9)
    state = situations(script, game, batch=10)
    n = game.num_players
    likely = game.action_mask(state).float()[:, None].expand(-1, 3, -1, -1)
    joint = likely.flatten(0, 2).multinomial(1).view(10, 3, n)  # [B, K, N]
    monkeypatch.setattr(script, "sample_joint_actions", lambda *given: joint)
    seats = torch.rand(10, n, generator=generator_of(5)) < 0.7
    decision, _ = decision_of(script, agent, state, seats)
    own, views = game.features(state)
    identity = torch.eye(game.num_actions)
    expected = torch.zeros(10, n, game.num_actions)
    for b, i in (seats & game.alive(state)).nonzero().tolist():
        for action, played in itertools.product(range(game.num_actions), joint[b]):
            company = []
            for slot in range(n - 1):
                j = (i + 1 + slot) % n
                goal = decision["goals"][b, j]
                company.append(torch.cat([views[b, i, slot], goal, identity[played[j]]]))
            reads = (own[b, i], torch.stack(company), identity[action])
            reward, value = agent.transition(*reads).detach()
            expected[b, i, action] += (reward + 0.9 * value) / 3
    torch.testing.assert_close(decision["q_plan"], expected, rtol=1e-4, atol=1e-5)
    assert expected.std(2).max() > 0.05  # own actions differ


@torch.no_grad()
def test_joint_actions_are_drawn_from_the_moa_at_drawn_goals(script, lively):
    """E_z[pi_hat(a | o, z)], z ~ N(mean, std), each sample and seat with a z of its own."""
    samples = 6000
    game, agent = lively(plan_samples=samples, goal_size=2)
    agent.moa.decoder.goal.weight.mul_(6.0)
    state = situations(script, game, batch=4)
    mask = game.action_mask(state)
    own, others = game.features(state)
    mean = torch.randn(4, 3, 2, generator=generator_of(2))
    log_std = torch.full((4, 3, 2), 0.3)
    generator = generator_of(0)
    joint = script.sample_joint_actions(agent, mask, (own, others, mean, log_std), generator)
    noise = torch.randn(4, 3, samples, 2, generator=generator)
    goals = mean[:, :, None] + log_std.exp()[:, :, None] * noise
    logits = agent.moa.decoder(own[:, :, None], others[:, :, None], goals)
    policy = policy_of(logits, mask[:, :, None]).probs.mean(2)
    share = one_hot(joint, 7).float().mean(1)
    deviation = (2 * policy * (1 - policy) / samples).sqrt()
    assert ((share - policy).abs() <= 5 * deviation + 5e-3).all()
    at_mean = policy_of(agent.moa.decoder(own, others, mean), mask).probs
    assert (at_mean - policy).abs().max() > 0.1  # the mean goal alone would be seen
    for i, j in ((0, 1), (1, 2)):  # seats are drawn independently
        agree = (joint[:, :, i] == joint[:, :, j]).float().mean(1)
        chance = (policy[:, i] * policy[:, j]).sum(1)
        assert ((agree - chance).abs() <= 2.5 / samples**0.5 + 5e-3).all()


@EVERY
@pytest.mark.parametrize("mode, slope", [("offset", 0.6), ("hop", 1.8), ("offset", -0.5)])
def test_the_policy_that_acts(script, lively, mode, slope):
    """pi_theta of own features, of co-players' with the goals inferred, and of their sum; in the
    logits beta times centred Q, or that alone; beta by the slope. Actions are drawn from it."""
    game, agent = lively(plan_update=mode, plan_beta=6.0)
    state = situations(script, game, batch=120)
    seats = torch.rand(120, 3, generator=generator_of(5)) < 0.7
    if plans(script):
        agent.plan_slope.fill_(slope)
    decision, player = decision_of(script, agent, state, seats)
    mask = game.action_mask(state)
    own, views = game.features(state)
    goals = agent.moa.encode(player.memory, own, views)[0]
    prior = torch.zeros(120, 3, 7)
    for i in range(3):
        theirs = goals[:, [(i + 1) % 3, (i + 2) % 3]]
        seen = (own[:, i], torch.cat([views[:, i], theirs], 2), theirs.sum(1))
        prior[:, i] = agent.actor(*seen)
        torch.testing.assert_close(decision["value"][:, i], agent.critic(*seen)[:, 0])
    logits = prior
    if plans(script):
        q = decision["q_plan"]
        assert torch.equal(q.any(2), seats & game.alive(state))
        mean = (q * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True)
        offset = 6.0 * min(1.0, max(0.0, slope)) * (q - mean) * mask
        torch.testing.assert_close(decision["offset"], offset, rtol=1e-4, atol=1e-4)
        logits = offset if mode == "hop" else prior + offset
    policy = policy_of(logits, mask)
    action = decision["action"]
    assert mask.gather(2, action[..., None]).all()
    log_prob = policy.log_prob(action)
    torch.testing.assert_close(decision["log_prob"], log_prob, rtol=1e-3, atol=1e-4)
    if plans(script):
        expected = (policy.probs * q).sum(2)
        torch.testing.assert_close(decision["expected"], expected, rtol=1e-3, atol=1e-4)
    surprise = (policy.probs * policy.logits.clamp(min=-99).square()).sum(2) - policy.entropy() ** 2
    assert (log_prob + policy.entropy()).sum().abs() < 4 * surprise.sum().sqrt()


def test_calibration_in_closed_form(script):
    """Regression through the origin of the advantage on Q(a) - E_pi Q; 0 if that is rounding."""
    q_plan = torch.randn(300, 5, generator=generator_of(0))
    expected, advantage = torch.randn(2, 300, generator=generator_of(1))
    action = torch.randint(5, (300,), generator=generator_of(2))
    rows = {"q_plan": q_plan, "expected": expected, "action": action, "advantage": advantage}
    gain = q_plan[torch.arange(300), action] - expected
    slope = float(torch.linalg.lstsq(gain[:, None], advantage[:, None]).solution)
    assert float(script.calibration(rows)) == pytest.approx(slope, rel=1e-4)
    assert abs(script.calibration({**rows, "q_plan": 0 * q_plan, "expected": expected / 1e7})) < 1


@EVERY
def test_relabelled_seats_give_the_same_decisions(script, lively):
    """Goals and V of the players, and what they are likely to do, whatever their seats."""
    options = {} if plans(script) else {"assignment": "exclusive", "goals": 5}
    game, agent = lively(env_id="msh-4x4-4h1s", plan_update="none", **options)
    state = situations(script, game)
    moved = state._replace(players=state.players[:, ORDER])
    _, player = decision_of(script, agent, state)
    results = []
    for one, memory in ((state, player.memory), (moved, player.memory[:, ORDER])):
        player.memory = memory
        own, views, goals, _ = player.infer(one, None)
        others, total = agent.inputs(views, goals)
        policy = policy_of(agent.actor(own, others, total), game.action_mask(one))
        results.append([own, goals, total, policy.probs, player.value(one, None)])
    for before, after in zip(*results):
        torch.testing.assert_close(after, before[:, ORDER], rtol=1e-4, atol=1e-5)
        assert before.std() > 0.01


@pytest.mark.only("hop_onestep", "hop_ppo_gumbel")
@pytest.mark.parametrize("training", ["gumbel", "em"])
def test_relabelled_seats_give_the_same_training_of_goals(script, record, monkeypatch, training):
    """The same losses of the MOA, and the same gradients, from matches with the seats moved."""
    options = {} if plans(script) else {"goal_training": training}
    options |= {"env_id": "msh-3x3-4p-3h1s", "match_episodes": 2, **PLAYED}
    steps, iterations = record(total_timesteps=60 * 3, **options)
    agent = iterations[-1].agent
    history = History(script, steps, iterations[-1].buffer)
    _, batch = history.read()
    ring = history.buffer.ring
    for name in ("players", "action", "alive", "reward", "reached"):
        ring[name] = ring[name][:, :, ORDER]
    monkeypatch.setattr(torch, "randn", lambda shape, **rest: torch.full(shape, 0.3))
    monkeypatch.setattr("torch.nn.functional.gumbel_softmax", lambda x, tau, hard: x.softmax(1))
    results = []
    for one in (batch, history.read()[1]):
        loss, terms = script.moa_loss(agent, one, False, generator_of(0))
        gradients = torch.autograd.grad(loss, [*agent.moa.parameters()], allow_unused=True)
        results.append([loss, terms, [g for g in gradients if g is not None]])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    assert not batch["active"].all()
