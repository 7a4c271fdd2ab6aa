"""The ways from a planner's scores to a policy, in the script that has one."""

import itertools
import math

import pytest
import torch


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


# ---------------------------------------------------------------------------------------------------------------------
# From scores to a policy
# ---------------------------------------------------------------------------------------------------------------------
def test_centred(script):
    q_plan = torch.tensor([[[1.0, 2.0, 6.0, 50.0], [4.0, 7.0, 7.0, 7.0]]])
    mask = torch.tensor([[[True, True, True, False], [True, False, False, False]]])
    expected = [[[-2.0, -1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]
    assert script.centred(q_plan, mask).tolist() == expected
    assert script.centred(q_plan + 100.0, mask).tolist() == expected


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
def test_policy_formula(script, lively, mode, slope, share):
    """The policy that acted, from the fields of the Decision: pi ~ mask exp(log pi_theta + beta (Q - mean Q))."""
    agent = lively(env_id="msh-3x3-3p-2h1s", plan_update=mode, plan_beta=3.0)
    agent.plan_slope.fill_(slope)
    agent.plan_rms.fill_(0.25)
    _, mask, _, d = decide(script, agent)
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
        assert (script.centred(d.q_plan, mask).abs().sum(2) > 1e-3).float().mean() > 0.5
    else:
        assert not d.q_plan.any() and not d.offset.any()


def in_order(rows, epochs, parts, generator):
    """In place of `minibatches`: the rows as they are, all at once."""
    return itertools.repeat(rows, epochs)


@pytest.mark.parametrize("mode", ["offset", "none"])
def test_first_ratio_of_ppo_is_one(script, small, mode, monkeypatch):
    """Before the first update of the policy the recomputed log-probability is that of the policy that acted, for every
    row of a rollout, though MOA and transition network have been updated in between."""
    monkeypatch.setattr(script, "minibatches", in_order)
    args = small(env_id="msh-3x3-3p-2h1s", plan_update=mode, update_epochs=2, co_players="self,nh", total_timesteps=512)
    trainer, calls = script.Trainer(args), []
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


def test_imitation_is_the_cross_entropy_towards_the_planner(script, lively, small):
    """`hop`: loss = -sum_a p(a) log pi_theta(a) + vf_coef / 2 (V - target)^2, p ~ mask exp(beta Q); no entropy."""
    agent = lively(env_id="msh-3x3-3p-2h1s", plan_update="hop", vf_coef=0.7, plan_beta=3.0)
    agent.plan_slope.fill_(1.0)
    *_, d = decide(script, agent)
    d = d._replace(others=agent.with_goals(d.others, d.goal)[0], goal=agent.with_goals(d.others, d.goal)[1])
    rows = {name: field.flatten(0, 1) for name, field in d._asdict().items()}
    rows["return"] = torch.randn(len(rows["value"]), generator=torch.Generator().manual_seed(0))
    rows["advantage"] = rows["return"] - rows["value"]
    loss, terms = script.ppo_loss(agent.actor, agent.critic, rows, agent.args, torch.tensor(5.0), True)
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


def test_hop_updates_towards_the_planner_and_a_mean_of_two_returns(script, small, monkeypatch):
    """What `hop` passes to the loss: imitation, and V's target, (lambda-return + E_pi Q_plan) / 2."""
    monkeypatch.setattr(script, "minibatches", in_order)
    args = small(env_id="msh-3x3-3p-2h1s", plan_update="hop", update_epochs=1, co_players="self")
    trainer, calls = script.Trainer(args), []
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


def test_calibration(script, small):
    """Slope and scale by plain sums; a planner whose scores predict the advantage c times too small has slope c."""
    trainer = script.Trainer(small(plan_update="offset"))
    generator, rows = torch.Generator().manual_seed(0), {}
    mask = torch.rand(60, 7, generator=generator) < 0.6
    mask[:, 4] = True
    mask[:5] = torch.arange(7) == 4  # rows without a choice, which count for nothing
    rows["mask"], rows["q_plan"] = mask, torch.randn(60, 7, generator=generator) * mask
    rows["offset"] = script.centred(rows["q_plan"], mask)
    rows["prior"] = torch.randn(60, 7, generator=generator).masked_fill(~mask, -1e9).log_softmax(1)
    logits = (rows["prior"] + rows["offset"]).masked_fill(~mask, -1e9)
    rows["action"] = script.sample(logits, generator)
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
