"""The one-step planner against slow loops and exact expectations, and the ways from its scores to a policy."""

import itertools
import math
from collections import Counter

import pytest
import torch

GAMES = ["msh-3x3-3p-2h1s", "msh-2x3-4p-2h2s", "msg-2x3-3p-3d"]
GAMMA = 0.9


@pytest.fixture
def one_step(script):
    """The scripts that plan one step ahead, by a network or by the simulator."""
    if not hasattr(script.Agent, "score_simulator"):
        assert script.__name__ != "hop_onestep"
        pytest.skip("another planner")
    return script


@pytest.fixture
def planning(script):
    """The scripts that have a planner."""
    if "q_plan" not in script.Decision._fields:
        assert script.__name__ == "hop_ppo_gumbel"
        pytest.skip("no planner")
    return script


def situations(script, env_id, batch=40, steps=6, seed=0):
    """States of games under way, many of them just before an end; players prefer to interact."""
    game, generator = script.GridGame(env_id), torch.Generator().manual_seed(seed)
    state, kept = game.initial_state(batch, generator), []
    state = state._replace(time=torch.randint(game.horizon - 1, (batch,), generator=generator))
    late = torch.rand(batch, generator=generator) < 0.3
    state = state._replace(time=torch.where(late, game.horizon - 2, state.time))
    for _ in range(steps):
        kept.append(state)
        actions = script.sample(likely(game, state), generator)
        after, _, terminated, truncated = game.step(state, actions)
        state = after.replaced(terminated | truncated, game.initial_state(batch, generator))
    state = script.GameState(*(torch.cat(field) for field in zip(*kept, strict=True)))
    return game, state


def likely(game, state):
    """Logits [B, N, A] of legal actions, interactions far ahead of moves."""
    weight = torch.tensor([1.0] * 5 + [12.0] * (game.num_actions - 5))
    return weight.log().masked_fill(~game.action_mask(state), -1e9)


def joint_actions(script, game, state, samples, seed=1):
    """int64 [B, K, N] legal joint actions, interactions likely."""
    logits = likely(game, state).unsqueeze(1).expand(-1, samples, -1, -1)
    return script.sample(logits, torch.Generator().manual_seed(seed))


def decisions(game, state):
    """Games and seats [D] of all players that have a choice."""
    return ((state.players >= 0) & (game.action_mask(state).sum(2) > 1)).nonzero(as_tuple=True)


def some_goals(agent, state, seed=2):
    return torch.randn(*state.players.shape, agent.moa.goal_size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_loop(agent, state, goal, joint, games, seats, events=None):
    """float32 [D, A]: for each decision, own action and sample one step of one game, and the critic on what follows."""
    game, events = agent.game, Counter() if events is None else events
    scores, mask = torch.zeros(len(games), game.num_actions), game.action_mask(state)
    for d, (b, i) in enumerate(zip(games.tolist(), seats.tolist(), strict=True)):
        here = state.rows(torch.tensor([b]))
        for action in mask[b, i].nonzero().flatten().tolist():
            for k in range(joint.shape[1]):
                played = joint[b, k].clone()
                played[i] = action
                after, reward, terminated, truncated = game.step(here, played.unsqueeze(0))
                own, others = agent.relative(after)
                value = agent.critic(own, *agent.with_goals(others, goal[b : b + 1]))[0, i, 0]
                left = bool(after.players[0, i] < 0)
                if left or terminated:
                    value = 0.0
                scores[d, action] += (reward[0, i] * agent.args.reward_scale + GAMMA * value) / joint.shape[1]
                events["left"] += left
                events["others left"] += bool(((after.players < 0) & (here.players >= 0)).any()) and not left
                events["terminated"] += bool(terminated)
                events["truncated"] += bool(truncated)
                events["taken by others"] += action < 5 and bool((after.items != here.items).any())
                events["taken"] += action >= 5 and bool((after.items != here.items).any())
                events["interaction in vain"] += action >= 5 and not bool((after.items != here.items).any())
                events["someone is away"] += bool((here.players < 0).any())
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# The simulator
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", GAMES)
def test_simulator_equals_a_plain_loop(one_step, lively, env_id):
    """Same states, same sampled joint actions: every score, whatever happens in the step."""
    agent = lively(env_id=env_id, transition="simulator", gamma=GAMMA, reward_scale=0.37)
    game, state = situations(one_step, env_id, batch=12)
    goal, joint = some_goals(agent, state), joint_actions(one_step, game, state, 3)
    games, seats = decisions(game, state)
    events = Counter()
    expected = plain_loop(agent, state, goal, joint, games, seats, events)
    with torch.no_grad():
        scores = agent.score_simulator(state, game.action_mask(state), goal, joint, games, seats)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    wanted = ["terminated", "truncated", "taken by others", "taken"]
    wanted += ["left", "others left", "interaction in vain", "someone is away"] if game.family == "msh" else []
    assert min(events[name] for name in wanted) > 5, events
    other_goals = agent.score_simulator(state, game.action_mask(state), -goal, joint, games, seats)
    assert (other_goals - expected).abs().max() > 0.01  # what is inferred counts


@pytest.mark.parametrize("transition", ["simulator", "network"])
def test_many_samples_give_the_exact_expectation(one_step, lively, transition):
    """Two players: the expectation over the co-player's known action probabilities, by hand."""
    env_id, samples = "msh-2x2-2p-1h1s", 4000
    agent = lively(env_id=env_id, transition=transition, gamma=GAMMA, plan_samples=samples, goal="none")
    game, state = situations(one_step, env_id, batch=3, steps=4)
    mask, generator = game.action_mask(state), torch.Generator().manual_seed(0)
    memory, everyone = agent.moa.initial_memory(len(mask)), torch.ones(len(mask), 2, dtype=torch.bool)
    q_plan = agent.act(state, mask, memory, everyone, generator, None).q_plan
    goal = torch.zeros(len(mask), 2, agent.moa.goal_size)
    own, others = agent.relative(state)
    with torch.no_grad():
        logits = agent.moa.decoder(own, others, goal).masked_fill(~mask, -1e9)
    probs, expected, spread = logits.softmax(2), torch.zeros_like(q_plan), torch.zeros_like(q_plan)
    games, seats = decisions(game, state)
    outcomes = []  # [D, A] for each action of the co-player
    for action in range(game.num_actions):
        joint = torch.full((len(mask), 1, 2), action)
        if transition == "simulator":
            outcomes.append(plain_loop(agent, state, goal, joint, games, seats))
        else:
            outcomes.append(loop_over_network(agent, state, goal, joint, games, seats))
    weight = probs[games, 1 - seats]  # [D, A]
    outcomes = torch.stack(outcomes, 2)  # [D, A, A']
    expected = (outcomes * weight.unsqueeze(1)).sum(2)
    spread = (((outcomes - expected.unsqueeze(2)).square() * weight.unsqueeze(1)).sum(2) / samples).sqrt()
    error = (q_plan[games, seats] - expected).abs()
    assert (error <= 4.5 * spread + 1e-5).all()
    assert spread.max() * samples**0.5 > 0.1 and (weight.max(1).values < 0.9).any()  # there was something to average


@torch.no_grad()
def loop_over_network(agent, state, goal, joint, games, seats):
    """float32 [D, A]: TransitionNetwork.forward for each decision, own action and sample, one at a time."""
    scores, mask = torch.zeros(len(games), agent.game.num_actions), agent.game.action_mask(state)
    own, others = agent.relative(state)
    joined, _ = agent.with_goals(others, goal)
    for d, (b, i) in enumerate(zip(games.tolist(), seats.tolist(), strict=True)):
        company = [(i + k) % agent.game.num_players for k in range(1, agent.game.num_players)]
        for action in mask[b, i].nonzero().flatten().tolist():
            for played in joint[b]:
                inputs = own[b, i][None], joined[b, i][None], torch.tensor([action]), played[company][None]
                reward, value = agent.transition(*inputs)
                scores[d, action] += (reward + GAMMA * value)[0] / joint.shape[1]
    return scores


def test_logged_error_is_that_of_the_rollout_alone(one_step, small):
    """Surprising transitions of earlier rollouts are learnt from, and are not in the figure."""
    trainer = one_step.Trainer(
        small(plan_update="offset", num_steps=40, total_timesteps=999, transition_learning_rate=1e-12)
    )
    trainer.iterate()
    network, rows = trainer.agent.transition, trainer.rollout()
    rows["others"], rows["goal"] = trainer.agent.with_goals(rows["others"], rows["goal"])
    trainer.surprising["reward"] += 5.0
    with torch.no_grad():
        inputs = [rows[name][rows["active"]] for name in ("own", "others", "action", "other_actions")]
        error = (network(*inputs)[0] - rows["reward"][rows["active"]]).square().mean()
    logged = trainer.update_transition(rows)["losses/transition_reward"]
    assert float(logged) == pytest.approx(float(error), rel=0.02)


@pytest.mark.parametrize("env_id", GAMES)
def test_network_equals_a_plain_loop(one_step, lively, env_id):
    agent = lively(env_id=env_id, transition="network", gamma=GAMMA)
    game, state = situations(one_step, env_id, batch=5)
    goal, joint = some_goals(agent, state), joint_actions(one_step, game, state, 3)
    games, seats = decisions(game, state)
    own, others = agent.relative(state)
    joined, _ = agent.with_goals(others, goal)
    with torch.no_grad():
        scores = agent.score_network(own, joined, game.action_mask(state), joint, games, seats)
    torch.testing.assert_close(scores, loop_over_network(agent, state, goal, joint, games, seats), rtol=1e-5, atol=1e-5)


def test_transition_network_reads_every_action_and_no_order(one_step, lively):
    """Reward and value depend on the own action and on each co-player's, and not on the order of the co-players."""
    agent = lively(env_id="msh-3x3-4p-2h1s")
    network, relative, generator = agent.transition, agent.relative, torch.Generator().manual_seed(0)
    own, rows = torch.randn(50, relative.own_size, generator=generator), torch.arange(50)
    others = torch.randn(50, 3, relative.other_size + agent.moa.goal_size, generator=generator)
    action, company = torch.randint(7, (50,), generator=generator), torch.randint(7, (50, 3), generator=generator)
    with torch.no_grad():
        plain = torch.stack(network(own, others, action, company), 1)
        order = torch.rand(50, 3, generator=generator).argsort(1)
        moved = network(own, others[rows.unsqueeze(1), order], action, company.gather(1, order))
        torch.testing.assert_close(torch.stack(moved, 1), plain, rtol=1e-5, atol=1e-5)
        changed = [network(own, others, (action + 1) % 7, company)]
        for slot in range(3):
            different = company.clone()
            different[:, slot] = (different[:, slot] + 1) % 7
            changed.append(network(own, others, action, different))
    for one in changed:
        assert ((torch.stack(one, 1) - plain).abs() > 1e-4).all(1).float().mean() > 0.9


def scores_of(agent, state, goal, joint, games, seats):
    mask, (own, others) = agent.game.action_mask(state), agent.relative(state)
    with torch.no_grad():
        if agent.args.transition == "simulator":
            return agent.score_simulator(state, mask, goal, joint, games, seats)
        return agent.score_network(own, agent.with_goals(others, goal)[0], mask, joint, games, seats)


@pytest.mark.parametrize("transition", ["simulator", "network"])
@pytest.mark.parametrize("env_id", GAMES)
def test_scores_do_not_depend_on_the_rest_of_the_batch(one_step, lively, env_id, transition):
    """Each game alone, the games in another order, the seats relabelled, and samples enough for several chunks."""
    agent = lively(env_id=env_id, transition=transition)
    game, state = situations(one_step, env_id, batch=5)
    batch, n = state.players.shape
    goal, joint = some_goals(agent, state), joint_actions(one_step, game, state, 300)
    games, seats = decisions(game, state)
    scores = scores_of(agent, state, goal, joint, games, seats)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    for b in (0, 7, batch - 1):  # alone
        one, mine = torch.tensor([b]), games == b
        alone = scores_of(agent, state.rows(one), goal[one], joint[one], torch.zeros_like(games[mine]), seats[mine])
        torch.testing.assert_close(alone, scores[mine], **tolerance)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(3))
    rank = order.argsort()
    turned = torch.randperm(len(games), generator=torch.Generator().manual_seed(4))
    moved = scores_of(agent, state.rows(order), goal[order], joint[order], rank[games[turned]], seats[turned])
    torch.testing.assert_close(moved, scores[turned], **tolerance)
    seat = torch.tensor([1, 0, *range(2, n)])  # no rotation
    place = seat.argsort()
    other = state._replace(players=state.players[:, seat])
    relabelled = scores_of(agent, other, goal[:, seat], joint[:, :, seat], games, place[seats])
    torch.testing.assert_close(relabelled, scores, **tolerance)


def test_the_simulator_plans_for_the_reward_that_is_learnt(one_step, lively):
    """With `--prosocial 1` every player's reward is the mean of all; that is what the planner has to expect."""
    agent = lively(env_id="msg-1x2-2p-1d", transition="simulator", gamma=GAMMA, prosocial=1.0, reward_scale=0.5)
    state = one_step.GameState(torch.tensor([[0, 0]]), torch.tensor([[0]]), torch.tensor([3]), torch.tensor([0]))
    joint, games, seats = torch.tensor([[[4, 4]]]), torch.tensor([0, 0]), torch.tensor([0, 1])
    scores = scores_of(agent, state, some_goals(agent, state), joint, games, seats)
    assert scores[:, 5].tolist() == pytest.approx([0.5 * (2 + 6) / 2] * 2)  # the remover's 2, the other's 6


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------
def test_joint_actions_are_drawn_from_the_moa_at_drawn_goals(one_step, lively):
    """Frequencies are E_z[pi_hat(a | o, z)], z ~ N(mean, std), each sample and seat with its own z."""
    samples = 6000
    agent = lively(env_id="msh-3x3-3p-2h1s", plan_samples=samples, goal_size=2)
    with torch.no_grad():
        agent.moa.decoder.goal.weight.mul_(6.0)
    game, state = situations(one_step, "msh-3x3-3p-2h1s", batch=2, steps=2)
    mask, (own, others) = game.action_mask(state), agent.relative(state)
    mean, log_std = some_goals(agent, state), torch.full((4, 3, 2), 0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        joint = agent.sample_joint_actions(own, others, mean, log_std, mask, generator)
        assert joint.shape == (4, samples, 3)
        z = mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * torch.randn(4, 3, samples, 2, generator=generator)
        probs = agent.moa.decoder(own, others, z).masked_fill(~mask.unsqueeze(2), -1e9).softmax(3).mean(2)
        at_mean = agent.moa.decoder(own, others, mean).masked_fill(~mask, -1e9).softmax(2)
    share = torch.nn.functional.one_hot(joint, game.num_actions).float().mean(1)
    assert ((share - probs).abs() <= 5 * (2 * probs * (1 - probs) / samples).sqrt() + 5e-3).all()
    assert (at_mean - probs).abs().max() > 0.1  # the mean goal alone would be seen
    agree = (joint[:, :, 0] == joint[:, :, 1]).float().mean(1)  # seats are drawn independently
    chance = (probs[:, 0] * probs[:, 1]).sum(1)
    assert ((agree - chance).abs() <= 5 * 0.5 / samples**0.5 + 5e-3).all()


def test_inferred_goals_are_drawn_with_their_spread(one_step, lively):
    """What `act` samples from is the posterior of the memory: its mean and its standard deviation."""
    agent = lively(env_id="msh-3x3-3p-2h1s")
    game, state = situations(one_step, "msh-3x3-3p-2h1s", batch=3, steps=3)
    mask, (own, others) = game.action_mask(state), agent.relative(state)
    memory = agent.moa.initial_memory(len(mask))
    for total in memory:
        total.copy_(torch.randn(total.shape, generator=torch.Generator().manual_seed(1)).abs())
    seen = []
    agent.sample_joint_actions = lambda *inputs: seen.append(inputs) or joint_actions(one_step, game, state, 4)
    everyone = torch.ones_like(mask[..., 0])
    decision = agent.act(state, mask, memory, everyone, torch.Generator().manual_seed(0), None)
    with torch.no_grad():
        mean, log_std = agent.moa.encode(memory, agent.moa.seen(own, others))
    torch.testing.assert_close(seen[0][2], mean)
    torch.testing.assert_close(seen[0][3], log_std)
    torch.testing.assert_close(decision.goal, mean)
    assert log_std.std() > 0.05 and mean.std() > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# From scores to a policy
# ---------------------------------------------------------------------------------------------------------------------
def test_centred(planning):
    q_plan = torch.tensor([[[1.0, 2.0, 6.0, 50.0], [4.0, 7.0, 7.0, 7.0]]])
    mask = torch.tensor([[[True, True, True, False], [True, False, False, False]]])
    expected = [[[-2.0, -1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]
    assert planning.centred(q_plan, mask).tolist() == expected
    assert planning.centred(q_plan + 100.0, mask).tolist() == expected


def decide(script, agent, batch=30, seed=0, seats=None):
    """A decision in many situations, with what it was made of."""
    game, state = situations(script, agent.game.id, batch=batch, steps=4)
    mask, memory = game.action_mask(state), agent.moa.initial_memory(4 * batch)
    for total in memory:
        total.copy_(torch.randn(total.shape, generator=torch.Generator().manual_seed(seed)).abs())
    seats = torch.ones_like(mask[..., 0]) if seats is None else seats(state)
    with torch.no_grad():
        return state, mask, seats, agent.act(state, mask, memory, seats, torch.Generator().manual_seed(seed), None)


@pytest.mark.parametrize("slope, share", [(0.6, 0.6), (1.8, 1.0), (-0.5, 0.0)])
@pytest.mark.parametrize("mode", ["offset", "hop", "none"])
def test_policy_formula(planning, lively, mode, slope, share):
    """The policy that acted, from the fields of the Decision: pi ~ mask exp(log pi_theta + beta (Q - mean Q))."""
    agent = lively(env_id="msh-3x3-3p-2h1s", plan_update=mode, plan_beta=3.0)
    agent.plan_slope.fill_(slope)
    agent.plan_rms.fill_(0.25)
    _, mask, _, d = decide(planning, agent)
    inputs = d.own, *agent.with_goals(d.others, d.goal)
    with torch.no_grad():
        logits = agent.actor(*inputs)
        torch.testing.assert_close(d.value, agent.critic(*inputs).squeeze(2))
    beta, policies = 3.0 * share / 0.25, torch.zeros(mask.shape)
    assert torch.equal(d.mask, mask) and logits.std() > 0.1
    for b, i in itertools.product(range(len(mask)), range(3)):
        legal = mask[b, i].nonzero().flatten().tolist()
        q, mean = d.q_plan[b, i].tolist(), sum(d.q_plan[b, i, legal].tolist()) / len(legal)
        plan = {a: beta * (q[a] - mean) for a in legal}
        assert [d.offset[b, i, a].item() for a in legal] == pytest.approx(list(plan.values()), abs=1e-4)
        score = {a: (0.0 if mode == "hop" else logits[b, i, a].item()) + plan[a] for a in legal}
        top = max(score.values())
        whole = sum(math.exp(s - top) for s in score.values())
        policies[b, i, legal] = torch.tensor([math.exp(score[a] - top) / whole for a in legal])
        action = int(d.action[b, i])
        assert action in legal
        assert d.log_prob[b, i].item() == pytest.approx(score[action] - top - math.log(whole), abs=1e-4)
    drawn = torch.nn.functional.one_hot(d.action, 7).float()
    away = (drawn - policies).sum((0, 1)) / (policies * (1 - policies)).sum((0, 1)).clamp(min=1e-9).sqrt()
    assert (away.abs() < 4.5).all()
    if mode != "none":
        assert (planning.centred(d.q_plan, mask).abs().sum(2) > 1e-3).float().mean() > 0.5
    else:
        assert not d.q_plan.any() and not d.offset.any()


@pytest.mark.parametrize("transition", ["simulator", "network"])
def test_the_planner_runs_where_it_is_asked_to(one_step, lively, transition):
    """Scores of the seats asked for, in the game and with a choice; zeros elsewhere and for illegal actions."""
    agent = lively(env_id="msh-2x3-4p-2h2s", transition=transition, plan_update="offset")
    agent.plan_slope.fill_(1.0)
    generator = torch.Generator().manual_seed(9)
    state, mask, seats, d = decide(
        one_step, agent, seats=lambda state: torch.rand(state.players.shape, generator=generator) < 0.5
    )
    wanted = seats & (state.players >= 0)
    assert (d.q_plan.abs().sum(2) > 0).tolist() == wanted.tolist()
    assert not d.q_plan[~mask].any() and not d.offset[~wanted].any()
    assert ((d.q_plan != 0) == (mask & wanted.unsqueeze(2))).all()


def in_order(rows, epochs, parts, generator):
    """In place of `minibatches`: the rows as they are, all at once."""
    return itertools.repeat(rows, epochs)


@pytest.mark.parametrize("mode", ["offset", "none"])
def test_first_ratio_of_ppo_is_one(planning, small, mode, monkeypatch):
    """Before the first update of the policy the recomputed log-probability is that of the policy that acted, for every
    row of a rollout, though MOA and transition network have been updated in between."""
    monkeypatch.setattr(planning, "minibatches", in_order)
    args = small(env_id="msh-3x3-3p-2h1s", plan_update=mode, update_epochs=2, co_players="self,nh", total_timesteps=512)
    trainer, calls = planning.Trainer(args), []
    with torch.no_grad():
        for parameter in trainer.agent.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        trainer.agent.plan_slope.fill_(1.0)
    rollout, loss = trainer.rollout, trainer.ppo_loss

    def watched_rollout():
        rows.update(rollout())
        return dict(rows)

    def watched_loss(actor, critic, part, *rest):
        result = loss(actor, critic, part, *rest)
        calls.append((part, result[1]))
        return result

    for _ in range(3):  # with the MOA's buffer filled, so that the MOA is updated
        rows, trainer.rollout, trainer.ppo_loss = {}, watched_rollout, watched_loss
        calls.clear()
        before = [parameter.clone() for parameter in trainer.agent.parameters()]
        trainer.iterate()
        part, terms = calls[0]
        learner = rows["learner"]
        assert len(part["action"]) == int(learner.sum()) > 20
        assert terms["approx_kl"].abs().max() < 1e-6 and not terms["clip_fraction"].any()
        assert torch.equal(part["action"], rows["action"][learner])
        assert calls[1][1]["approx_kl"].max() > 1e-5  # after an update it is not
        assert any((a != b).any() for a, b in zip(before, trainer.agent.parameters(), strict=True))
    if mode == "offset":
        assert part["offset"].abs().max() > 0.5
        alone = (part["prior"].gather(1, part["action"].unsqueeze(1)).squeeze(1) - part["log_prob"]).abs()
        assert alone.max() > 0.1  # without the offset the ratio would be wrong


def test_imitation_is_the_cross_entropy_towards_the_planner(planning, lively, small):
    """`hop`: loss = -sum_a p(a) log pi_theta(a) + vf_coef / 2 (V - target)^2, p ~ mask exp(beta Q); no entropy."""
    agent = lively(env_id="msh-3x3-3p-2h1s", plan_update="hop", vf_coef=0.7, plan_beta=3.0)
    agent.plan_slope.fill_(1.0)
    *_, d = decide(planning, agent)
    d = d._replace(others=agent.with_goals(d.others, d.goal)[0], goal=agent.with_goals(d.others, d.goal)[1])
    rows = {name: field.flatten(0, 1) for name, field in d._asdict().items()}
    rows["return"] = torch.randn(len(rows["value"]), generator=torch.Generator().manual_seed(0))
    rows["advantage"] = rows["return"] - rows["value"]
    loss, terms = planning.ppo_loss(agent.actor, agent.critic, rows, agent.args, torch.tensor(5.0), True)
    with torch.no_grad():
        logits = agent.actor(rows["own"], rows["others"], rows["goal"]).double()
        value = agent.critic(rows["own"], rows["others"], rows["goal"]).squeeze(1).double()
    entropies, squares = [], []
    for r in range(len(logits)):
        legal = rows["mask"][r].nonzero().flatten()
        p = rows["offset"][r, legal].double().exp() / rows["offset"][r, legal].double().exp().sum()
        log_pi = logits[r, legal] - logits[r, legal].exp().sum().log()
        entropies.append(-float((p * log_pi).sum()))
        squares.append(0.5 * float(rows["return"][r] - value[r]) ** 2)
    assert terms["policy"].tolist() == pytest.approx(entropies, abs=1e-4)
    mean = sum(entropies) / len(entropies) + 0.7 * sum(squares) / len(squares)
    assert float(loss.detach()) == pytest.approx(mean, rel=1e-4)


def test_hop_updates_towards_the_planner_and_a_mean_of_two_returns(planning, small, monkeypatch):
    """What `hop` passes to the loss: imitation, and V's target, (lambda-return + E_pi Q_plan) / 2."""
    monkeypatch.setattr(planning, "minibatches", in_order)
    args = small(env_id="msh-3x3-3p-2h1s", plan_update="hop", update_epochs=1, co_players="self")
    trainer, calls = planning.Trainer(args), []
    trainer.agent.plan_slope.fill_(1.0)
    rollout, loss, rows = trainer.rollout, trainer.ppo_loss, {}
    trainer.rollout = lambda: rows.update(rollout()) or dict(rows)
    trainer.ppo_loss = lambda *inputs: calls.append(inputs) or loss(*inputs)
    trainer.iterate()
    _, _, part, _, _, imitate = calls[0]
    learner = rows["learner"]
    delta = rows["reward"] + args.gamma * rows["next_value"] - rows["value"]
    advantage, running = torch.zeros_like(delta), 0.0
    for t in reversed(range(len(delta))):
        running = delta[t] + args.gamma * args.gae_lambda * rows["goes_on"][t] * running
        advantage[t] = running
    q_plan, mask = rows["q_plan"][learner], rows["mask"][learner]
    policy = rows["offset"][learner].masked_fill(~mask, -1e9).softmax(1)
    lambda_return = (advantage + rows["value"])[learner]
    expected = torch.where(mask.sum(1) > 1, (lambda_return + (policy * q_plan).sum(1)) / 2, lambda_return)
    assert imitate and torch.allclose(part["return"], expected, atol=1e-5)
    assert (expected - lambda_return).abs().max() > 1e-3


def test_calibration(planning, small):
    """Slope and scale by plain sums; a planner whose scores predict the advantage c times too small has slope c."""
    trainer = planning.Trainer(small(plan_update="offset"))
    generator, rows = torch.Generator().manual_seed(0), {}
    mask = torch.rand(60, 7, generator=generator) < 0.6
    mask[:, 4] = True
    mask[:5] = torch.arange(7) == 4  # rows without a choice, which count for nothing
    rows["mask"], rows["q_plan"] = mask, torch.randn(60, 7, generator=generator) * mask
    rows["offset"] = planning.centred(rows["q_plan"], mask)
    rows["prior"] = torch.randn(60, 7, generator=generator).masked_fill(~mask, -1e9).log_softmax(1)
    logits = (rows["prior"] + rows["offset"]).masked_fill(~mask, -1e9)
    rows["action"] = planning.sample(logits, generator)
    gain = rows["q_plan"][torch.arange(60), rows["action"]] - (logits.softmax(1) * rows["q_plan"]).sum(1)
    rows["advantage"] = 0.7 * gain
    rows["advantage"][:5] = 100.0
    agent = trainer.agent
    agent.plan_mode = "offset"
    slope, rms = float(agent.plan_slope), float(agent.plan_rms)
    metrics = trainer.calibrate(rows)
    scores = [float(c) for q, m in zip(rows["q_plan"][5:], mask[5:], strict=True) for c in q[m] - q[m].mean()]
    scale = (sum(c * c for c in scores) / len(scores)) ** 0.5
    assert float(metrics["losses/plan_slope"]) == pytest.approx(0.7, rel=1e-4)
    assert float(metrics["losses/plan_rms"]) == pytest.approx(scale, rel=1e-4)
    assert float(agent.plan_slope) == pytest.approx(slope + 0.2 * (0.7 - slope), rel=1e-4)
    assert float(agent.plan_rms) == pytest.approx(rms + 0.2 * (scale - rms), rel=1e-4)
    beta = agent.args.plan_beta * float(agent.plan_slope) / float(agent.plan_rms)
    assert float(metrics["losses/plan_beta"]) == pytest.approx(beta, rel=1e-4)
