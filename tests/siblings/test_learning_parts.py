"""Advantages, rollouts and losses; the MOA's histories, subgoals and buffer: each against a slow way to the same."""

import itertools
import math
from collections import defaultdict

import pytest
import torch

from siblings.conftest import shake

SMALL_HUNT, SMALL_DRIFTS = "msh-3x3-3p-2h1s", "msg-2x2-3p-3d"


def shaken(trainer, shake_scale=0.2):
    """The trainer with parameters that differ from their first values, its planner in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.agent.parameters():
            parameter.add_(shake_scale * torch.randn(parameter.shape, generator=generator))
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------------
def test_advantages_by_hand(script):
    """Player 0 leaves with reward 5 in its second step; player 1 is terminated after three, and then plays one step
    more; player 2 is truncated after three (bootstrap 4); player 3 goes on after the rollout (bootstrap 2)."""
    nan = float("nan")
    rewards = [[1.0, 0.0, 1.0, 0.0], [5.0, 2.0, 0.0, 1.0], [0.0, 3.0, 1.0, 0.0], [0.0, 7.0, 0.0, 1.0]]
    values = [[2.0, 1.0, 3.0, 1.0], [4.0, 1.0, 2.0, 0.5], [0.0, 2.0, 1.0, 2.0], [0.0, 3.0, 0.0, 1.0]]
    following = [[4.0, 1.0, 2.0, 0.5], [0.0, 2.0, 1.0, 2.0], [0.0, 0.0, 4.0, 1.0], [0.0, 0.0, 0.0, 2.0]]
    goes_on = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    g, gl = 0.9, 0.9 * 0.5
    expected = [[nan] * 4 for _ in range(4)]
    expected[1][0] = 5 - 4
    expected[0][0] = (1 + g * 4 - 2) + gl * 1
    expected[3][1] = 7 - 3  # an episode of its own
    expected[2][1] = 3 - 2
    expected[1][1] = (2 + g * 2 - 1) + gl * 1
    expected[0][1] = (0 + g * 1 - 1) + gl * expected[1][1]
    expected[2][2] = 1 + g * 4 - 1
    expected[1][2] = (0 + g * 1 - 2) + gl * expected[2][2]
    expected[0][2] = (1 + g * 2 - 3) + gl * expected[1][2]
    expected[3][3] = 1 + g * 2 - 1
    expected[2][3] = (0 + g * 1 - 2) + gl * expected[3][3]
    expected[1][3] = (1 + g * 2 - 0.5) + gl * expected[2][3]
    expected[0][3] = (0 + g * 0.5 - 1) + gl * expected[1][3]
    inputs = [torch.tensor(x, dtype=torch.float64).unsqueeze(1) for x in (rewards, values, following)]
    result = script.generalised_advantages(*inputs, torch.tensor(goes_on).bool().unsqueeze(1), g, 0.5).squeeze(1)
    for t, i in itertools.product(range(4), range(4)):
        if not math.isnan(expected[t][i]):
            assert float(result[t, i]) == pytest.approx(expected[t][i])


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_advantages_in_closed_form(script, gae_lambda):
    """The sum of (gamma lambda)^k delta to the end of the episode; with lambda 1 the discounted return less V."""
    steps, generator, gamma = 20, torch.Generator().manual_seed(0), 0.9
    shape = (steps, 3, 2)
    rewards, values, ends = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    goes_on = torch.rand(shape, generator=generator) < 0.8
    following = torch.where(goes_on, values.roll(-1, 0), ends * (torch.rand(shape, generator=generator) < 0.5))
    following[-1] = ends[-1]
    result = script.generalised_advantages(rewards, values, following, goes_on, gamma, gae_lambda)
    for t, b, i in itertools.product(range(steps), range(3), range(2)):
        last = next((s for s in range(t, steps) if not goes_on[s, b, i]), steps - 1)
        delta = [float(rewards[s, b, i] + gamma * following[s, b, i] - values[s, b, i]) for s in range(t, last + 1)]
        whole = sum((gamma * gae_lambda) ** k * d for k, d in enumerate(delta))
        assert float(result[t, b, i]) == pytest.approx(whole, rel=1e-5, abs=1e-6)
        if gae_lambda == 1.0:
            returned = sum(gamma**k * float(rewards[t + k, b, i]) for k in range(last - t + 1))
            returned += gamma ** (last - t + 1) * float(following[last, b, i])
            assert float(result[t, b, i]) == pytest.approx(returned - float(values[t, b, i]), rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts
# ---------------------------------------------------------------------------------------------------------------------
def watched(trainer):
    """Notes what the agent is shown at each step of the rollouts that follow: (state, mask, memory, seats, oracle)."""
    shown, act = [], trainer.agent.act

    def watching(state, mask, memory, seats, generator, oracle):
        shown.append((state, mask, memory, seats, oracle))
        return act(state, mask, memory, seats, generator, oracle)

    trainer.agent.act = watching
    return shown


@pytest.mark.parametrize(
    "options",
    [
        {"env_id": SMALL_HUNT, "co_players": "self,nh,random", "plan_update": "offset"},
        {"env_id": SMALL_HUNT, "co_players": "nh,ns", "prosocial": 0.3, "reward_scale": 2.0, "goal": "oracle"},
        {"env_id": SMALL_DRIFTS, "co_players": "self,exploiter", "prosocial": 1.0, "goal": "none"},
    ],
    ids=["inferred", "oracle", "none"],
)
def test_rollout_step_by_step(script, small, options):
    """Every stored row against a replay of one game at a time."""
    trainer = shaken(script.Trainer(small(num_envs=6, num_steps=70, total_timesteps=1000, **options)))
    args, game, agent = trainer.args, trainer.game, trainer.agent
    late = game.horizon - 1 - torch.arange(6) // 2  # some games are truncated soon
    trainer.state = trainer.state._replace(time=late)
    shown, kinds, targets, initial = watched(trainer), [], [], trainer.state
    co_act = trainer.co_players.act

    def acting(*inputs):  # kinds and targets, as they are in this step
        kinds.append(trainer.co_players.kind.clone())
        actions = co_act(*inputs)
        targets.append(trainer.co_players.target.clone())
        return actions

    trainer.co_players.act = acting
    rows = trainer.rollout()
    steps, games, n = args.num_steps, args.num_envs, game.num_players
    assert all(torch.equal(a, b) for a, b in zip(shown[0][0], initial, strict=True)) and len(shown) == steps
    count, returns, log = defaultdict(int), torch.zeros(games, n), defaultdict(list)
    for t in range(steps):
        state, mask, memory, seats, oracle = shown[t]
        assert torch.equal(mask, game.action_mask(state)) and torch.equal(rows["mask"][t], mask)
        assert torch.equal(seats & (state.players >= 0), rows["learner"][t])
        assert torch.equal(rows["learner"][t], (kinds[t] == 0) & (state.players >= 0))
        assert torch.equal(rows["active"][t], state.players >= 0)
        torch.testing.assert_close(rows["value"][t], agent.value(state, memory, oracle), rtol=1e-5, atol=1e-5)
        none = torch.zeros(games, dtype=torch.bool)
        after, *_ = game.step(state, rows["action"][t])
        told = [field[kinds[t]] for field in (trainer.co_players.script, trainer.co_players.noisy)]
        oracle = None if oracle is None else script.true_goals(agent.relative, after, *told, targets[t])
        final = agent.value(after, agent.remember(memory, state, rows["action"][t], none, none), oracle)
        for b in range(games):
            one, reward, over, cut = game.step(state.rows(torch.tensor([b])), rows["action"][t, b].unsqueeze(0))
            ended, reward = bool(over | cut), reward[0]
            following = shown[t + 1][0] if t + 1 < steps else trainer.state
            if ended:
                assert following.time[b] == 0 and (following.players[b] >= 0).all() and (following.items[b] >= 0).all()
            else:
                assert all(torch.equal(x[b], y[0]) for x, y in zip(following, one, strict=True))
            returns[b] += reward
            for i in range(n):
                alive = bool(one.players[0, i] >= 0)
                learnt = (1 - args.prosocial) * reward[i] + args.prosocial * reward.mean()
                assert float(rows["reward"][t, b, i]) == pytest.approx(float(learnt) * args.reward_scale, abs=1e-6)
                goes_on, next_value = alive and not ended, float(rows["next_value"][t, b, i])
                assert bool(rows["goes_on"][t, b, i]) == goes_on
                if goes_on and t + 1 < steps:
                    assert next_value == float(rows["value"][t + 1, b, i])
                elif goes_on:
                    last = agent.value(trainer.state, trainer.memory, trainer.co_players.oracle(agent, trainer.state))
                    assert next_value == pytest.approx(float(last[b, i]), abs=1e-5)
                    count["goes on after the rollout"] += 1
                elif alive and cut:
                    assert next_value == pytest.approx(float(final[b, i]), abs=1e-5) and abs(next_value) > 1e-6
                    count["truncated"] += 1
                else:
                    assert next_value == 0.0
                    why = "left" if not ended else "terminated" if over else "left before"
                    count[why] += bool(state.players[b, i] >= 0)
                others = [int(rows["action"][t, b, (i + k) % n]) for k in range(1, n)]
                assert rows["other_actions"][t, b, i].tolist() == others
            if ended:
                log["charts/episodic_length"].append(int(one.time))
                for i in range(n):
                    kind, total = int(kinds[t][b, i]), float(returns[b, i])
                    log[f"returns/{trainer.co_players.names[kind]}"].append(total)
                    if kind == 0:
                        log[f"returns/seat_{i}"].append(total)
                        log["charts/episodic_return"].append(total)
                returns[b] = 0.0
    names = ["truncated", "goes on after the rollout", "terminated"] + ["left"] * (game.family == "msh")
    assert all(count[name] > 2 for name in names), count
    expected = {name: pytest.approx(sorted(values), abs=1e-4) for name, values in log.items()}
    assert {name: sorted(values) for name, values in trainer.log.items()} == expected
    assert torch.allclose(trainer.returns, returns, atol=1e-4) and trainer.global_step == steps * games


def test_only_the_learners_rows_are_learnt_from(script, small):
    """Co-players' and leavers' rows reach neither the policy's loss nor its advantages' normalisation."""
    args = small(env_id=SMALL_HUNT, co_players="nh,self", num_steps=60, num_minibatches=3, total_timesteps=500)
    trainer, parts = shaken(script.Trainer(args)), []
    loss, rollout, rows = trainer.ppo_loss, trainer.rollout, {}
    trainer.rollout = lambda: rows.update(rollout()) or dict(rows)
    trainer.ppo_loss = lambda *inputs: parts.append(inputs[2]) or loss(*inputs)
    trainer.iterate()
    learner = rows["learner"]
    assert sum(len(part["value"]) for part in parts) == args.update_epochs * int(learner.sum())
    assert 0 < int(learner.sum()) < int(rows["active"].sum()) < learner.numel()
    expected = sorted(rows["value"][learner].tolist())
    for epoch in range(args.update_epochs):  # every row once in each pass
        passed = torch.cat([part["value"] for part in parts[3 * epoch : 3 * epoch + 3]])
        assert sorted(passed.tolist()) == expected
    assert [part["value"].tolist() for part in parts[:3]] != [part["value"].tolist() for part in parts[3:6]]


def test_relabelled_seats_give_the_same_training_data(script, small):
    """The same games with the seats in another order and the same actions: the same rows in that order."""
    options = {"env_id": "msh-4x4-4h1s", "co_players": "self,nh,ns", "plan_update": "none", "reward_scale": 0.3}
    args = small(num_steps=60, total_timesteps=500, match_episodes=100, **options)
    order = torch.tensor([2, 0, 3, 1])  # no rotation
    played, runs, gradients = [], [], []
    for relabelled in (False, True):
        trainer = shaken(script.Trainer(args))
        game, players, agent = trainer.game, trainer.co_players, trainer.agent
        players.act = lambda state, mask: torch.zeros_like(state.players)  # replaced below
        place = order if relabelled else torch.arange(4)
        if relabelled:
            trainer.state = trainer.state._replace(players=trainer.state.players[:, order])
            players.kind, rank = players.kind[:, order], torch.empty(4, dtype=torch.int64)
            rank[order] = torch.arange(4)
            players.seat = rank[players.seat]
            assert torch.equal(players.kind.gather(1, players.seat[:, :1]), torch.zeros(args.num_envs, 1).long())
        initial, act, step = game.initial_state, agent.act, itertools.count()

        def fresh(batch, generator, initial=initial, place=place, trainer=trainer):
            state = initial(batch, torch.Generator().manual_seed(trainer.global_step))
            return state._replace(players=state.players[:, place])

        def acting(state, mask, *rest, act=act, step=step, place=place, relabelled=relabelled):
            decision, t = act(state, mask, *rest), next(step)
            if not relabelled:  # mostly interactions, so that players leave
                weight = torch.tensor([1.0] * 5 + [9.0, 9.0]).log()
                played.append(script.sample(weight.masked_fill(~mask, -1e9), torch.Generator().manual_seed(t)))
            action = played[t][:, place]
            log_prob = decision.prior.gather(2, action.unsqueeze(2)).squeeze(2)
            return decision._replace(action=action, log_prob=log_prob)

        game.initial_state, agent.act = fresh, acting
        players.act = lambda state, mask, place=place, step=step: torch.zeros_like(state.players)
        learner = players.kind == 0
        players.kind = torch.zeros_like(players.kind)  # every action is the given one
        rows = trainer.rollout()
        rows["learner"] = rows["learner"] & learner
        values = rows["value"], rows["next_value"]
        rows["advantage"] = script.generalised_advantages(rows["reward"], *values, rows["goes_on"], args.gamma, 0.9)
        rows["return"] = rows["advantage"] + rows["value"]
        runs.append({**rows, "memory": torch.cat(list(trainer.memory), -1).unsqueeze(0)})
        joined, total = agent.with_goals(rows["others"], rows["goal"])
        part = {**rows, "others": joined, "goal": total}
        part = {
            name: part[name][rows["learner"]]
            for name in ("own", "others", "goal", "mask", "offset", "action", "log_prob", "advantage", "return")
            if name in part
        }
        loss, _ = script.ppo_loss(agent.actor, agent.critic, part, args, torch.tensor(0.01), False)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for net in (agent.actor, agent.critic) for p in net.parameters()]))
    plain, other = runs
    names = "own goal mask prior value next_value reward goes_on active learner action advantage memory"
    for name in names.split():
        field = plain[name][:, :, order]
        torch.testing.assert_close(other[name], field, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other["others"].sum(3), plain["others"].sum(3)[:, :, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert not plain["active"].all() and plain["goal"].std() > 0.01 and gradients[0].abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# PPO's loss
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm_adv", [True, False])
def test_ppo_loss_row_by_row(script, lively, norm_adv):
    """Clipped surrogate, value loss, entropy, approximate KL and share of clipped ratios, in plain Python."""
    agent = lively(env_id=SMALL_HUNT, clip_coef=0.15, vf_coef=0.7, norm_adv=norm_adv, plan_update="none")
    generator, count, n = torch.Generator().manual_seed(0), 40, 3
    y, z = agent.relative.other_size + agent.moa.goal_size, agent.moa.goal_size
    rows = {"own": torch.randn(count, agent.relative.own_size, generator=generator)}
    rows["others"] = torch.randn(count, n - 1, y, generator=generator)
    rows["goal"] = torch.randn(count, z, generator=generator)
    rows["mask"] = torch.rand(count, 7, generator=generator) < 0.7
    rows["mask"][:, 4] = True
    rows["offset"] = torch.randn(count, 7, generator=generator) * rows["mask"]
    with torch.no_grad():
        logits = agent.actor(rows["own"], rows["others"], rows["goal"]) + rows["offset"]
        value = agent.critic(rows["own"], rows["others"], rows["goal"]).squeeze(1)
    log_policy = logits.masked_fill(~rows["mask"], -1e9).log_softmax(1)
    rows["action"] = script.sample(log_policy, generator)
    chosen = log_policy.gather(1, rows["action"].unsqueeze(1)).squeeze(1)
    rows["log_prob"] = chosen + 0.3 * torch.randn(count, generator=generator)
    rows["advantage"], rows["return"] = (2 * torch.randn(count, generator=generator) + 1 for _ in range(2))
    loss, terms = script.ppo_loss(agent.actor, agent.critic, rows, agent.args, torch.tensor(0.03), False)
    mean = float(rows["advantage"].mean())
    std = (sum((a - mean) ** 2 for a in rows["advantage"].tolist()) / count) ** 0.5
    expected = defaultdict(list)
    for r in range(count):
        log_ratio = float(chosen[r] - rows["log_prob"][r])
        ratio, advantage = math.exp(log_ratio), float(rows["advantage"][r])
        advantage = (advantage - mean) / std if norm_adv else advantage
        expected["policy"].append(-min(ratio * advantage, min(max(ratio, 0.85), 1.15) * advantage))
        expected["value"].append(0.5 * float(value[r] - rows["return"][r]) ** 2)
        probs = [math.exp(float(x)) for x, legal in zip(log_policy[r], rows["mask"][r], strict=True) if legal]
        expected["entropy"].append(-sum(p * math.log(p) for p in probs))
        expected["approx_kl"].append(ratio - 1 - log_ratio)
        expected["clip_fraction"].append(float(abs(ratio - 1) > 0.15))
    for name, values in expected.items():
        assert terms[name].tolist() == pytest.approx(values, rel=1e-4, abs=1e-5)
    means = {name: sum(values) / count for name, values in expected.items()}
    whole = means["policy"] + 0.7 * means["value"] - 0.03 * means["entropy"]
    assert float(loss.detach()) == pytest.approx(whole, rel=1e-4) and 0.1 < means["clip_fraction"] < 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------
def test_features_of_who_has_left_and_what_is_gone_are_zero(script):
    """A game with a left player and a gone item is seen as one without them; what lies equally far is seen alike."""
    full, fewer = script.GridGame("msh-4x5-3p-3h2s"), script.GridGame("msh-4x5-2p-2h1s")
    zero, time = torch.tensor([0]), torch.tensor([7])
    state = script.GameState(torch.tensor([[6, -1, 13]]), torch.tensor([[-1, 9, 2, -1, 17]]), time, zero)
    other = script.GameState(torch.tensor([[6, 13]]), torch.tensor([[9, 2, 17]]), time, zero)
    own, others = script.RelativeFeatures(full)(state)
    own_fewer, others_fewer = script.RelativeFeatures(fewer)(other)
    assert torch.equal(own[0, [0, 2]], own_fewer[0]) and own.abs().sum() > 0
    assert torch.equal(others[0, 0, 1], others_fewer[0, 0, 0]) and torch.equal(others[0, 2, 0], others_fewer[0, 1, 0])
    size = script.RelativeFeatures(full).size
    assert not others[0, 0, 0].any() and not others[0, 1, :, :size].any()  # the left player is not seen and sees none
    assert not own[0, 1, -2 * size :].any() and own[0, 1].any()  # it still has the clock


def test_features_depend_on_relative_cells_alone(script):
    """The whole scene one row down and two columns to the right: only the walls are seen differently."""
    game, zero = script.GridGame("msh-6x8-3p-2h1s"), torch.tensor([0])
    relative = script.RelativeFeatures(game)
    players, items = torch.tensor([[9, 20, 26]]), torch.tensor([[18, 25, 10]])
    own, others = relative(script.GameState(players, items, zero, zero))
    moved, others_moved = relative(script.GameState(players + 10, items + 10, zero, zero))
    assert torch.equal(own[..., 15:], moved[..., 15:]) and torch.equal(others, others_moved)
    sizes = relative.own_size, relative.other_size
    assert sizes == (own.shape[2], others.shape[3]) and own[..., 15:].shape[2] == 2 * relative.size
    differ, _ = relative(script.GameState(players, items + 1, zero, zero))
    assert not torch.equal(own, differ)
    cells = torch.arange(48)
    seen = relative.cells(torch.tensor([27]).unsqueeze(1), cells.unsqueeze(0))[0]
    assert len({tuple(row) for row in seen.tolist()}) == 48  # every relative cell looks different


# ---------------------------------------------------------------------------------------------------------------------
# Matches in the MOA's buffer
# ---------------------------------------------------------------------------------------------------------------------
def play(script, small, matches=5, likely=6.0, **options):
    """A trainer whose games were played by random players, with whole matches as lists of steps in the order in which
    they ended: [(state, actions, memory before, reward, after, episode)], one game in each tensor."""
    args = small(num_envs=5, num_steps=40, total_timesteps=10**6, **options)
    trainer = shaken(script.Trainer(args))
    add, shown, running, ended = trainer.buffer.add, watched(trainer), defaultdict(list), []
    act, generator = trainer.agent.act, torch.Generator().manual_seed(3)

    def acting(state, mask, *rest):
        decision = act(state, mask, *rest)
        weight = torch.tensor([1.0] * 5 + [likely] * (trainer.game.num_actions - 5)).log()
        return decision._replace(action=script.sample(weight.masked_fill(~mask, -1e9), generator))

    def adding(state, actions, co_players, reward, after):
        memory, steps = shown[-1][2], torch.arange(args.num_envs)
        for b in steps.tolist():
            one = torch.tensor([b])
            past = script.Memory(*(total[b].clone() for total in memory))
            step = state.rows(one), actions[b], past, reward[b], after.rows(one), int(co_players.episode[b])
            running[b].append((*step, co_players.kind[b], co_players.target[b]))
        return add(state, actions, co_players, reward, after)

    end = trainer.buffer.end

    def ending(which, step):
        for b in which.nonzero().flatten().tolist():
            ended.append((running.pop(b), step))
        return end(which, step)

    trainer.agent.act, trainer.buffer.add, trainer.buffer.end = acting, adding, ending
    while len(ended) < matches:
        trainer.rollout()
    return trainer, [match for match, _ in ended], [step for _, step in ended], running


def test_memory_is_the_same_by_steps_and_from_the_buffer(script, small):
    """`remember` step by step, `MOABuffer.memory`, and sums over the match and over the episode in a plain loop."""
    trainer, matches, _, running = play(script, small, env_id=SMALL_HUNT, co_players="self", match_episodes=3)
    agent, rebuilt = trainer.agent, trainer.buffer.memory(trainer.agent.moa, trainer.co_players.episode)
    for whole, other in zip(trainer.memory, rebuilt, strict=True):
        torch.testing.assert_close(whole, other, rtol=1e-4, atol=1e-4)
    assert trainer.memory.match.abs().max() > 0.5 and (trainer.memory.match != trainer.memory.episode).any()
    episodes = set()
    for b, steps in running.items():
        now = [torch.zeros_like(trainer.memory.match[b]) for _ in range(2)]
        for k, (state, actions, memory, _, _, episode, _, _) in enumerate(steps):
            if k and episode != steps[k - 1][5]:
                now[1] = torch.zeros_like(now[1])
            for total, past in zip(now, memory, strict=True):
                torch.testing.assert_close(total, past, rtol=1e-4, atol=1e-4)
            seen = agent.moa.seen(*agent.relative(state))
            with torch.no_grad():
                feature = agent.moa.features(seen, actions.unsqueeze(0), state.players >= 0)[0]
            assert feature[:, -1].tolist() == (state.players[0] >= 0).float().tolist()
            now = [total + feature for total in now]
            episodes.add(episode)
    assert len(episodes) == 3 and len(matches) >= 5


@pytest.mark.parametrize("env_id", [SMALL_HUNT, SMALL_DRIFTS])
def test_value_at_the_time_limit_is_one_that_is_trained(lively, env_id):
    """No row of a rollout has 0 steps left, so V there, by which truncation bootstraps, is V with 1 step left."""
    agent = lively(env_id=env_id)
    relative, horizon = agent.relative, agent.game.horizon
    cells, limit = torch.zeros(1, dtype=torch.int64), torch.tensor([[horizon, 0]])
    at_limit = relative.clock_and_walls(cells, limit)
    assert torch.equal(at_limit, relative.clock_and_walls(cells, torch.tensor([[horizon, 1]])))
    before = relative.clock_and_walls(cells, torch.tensor([[horizon - 1, 1]]))
    assert (at_limit != before).sum() <= 2  # the steps done, and that the end is the horizon's
    assert (at_limit != relative.clock_and_walls(cells, torch.tensor([[horizon, 2]]))).any()


def test_memory_of_many_games(script, small):
    """Rebuilt from the buffer, whose games are read in several parts, the memory is that of `remember` step by step."""
    options = {"env_id": SMALL_HUNT, "co_players": "ns,nh", "num_envs": 150, "num_steps": 60, "match_episodes": 3}
    trainer = script.Trainer(small(**options, total_timesteps=9000))
    shake(trainer.agent, seed=0)
    trainer.rollout()
    rebuilt = trainer.buffer.memory(trainer.agent.moa, trainer.co_players.episode)
    for whole, other in zip(trainer.memory, rebuilt, strict=True):
        torch.testing.assert_close(whole, other, rtol=1e-4, atol=1e-4)
    assert len(trainer.co_players.episode.unique()) == 3


def captured_loss(script, trainer, batch, pretraining=False, seed=0):
    """Loss and terms of a batch of matches, with the encoder's inputs and outputs."""
    moa, seen, encode = trainer.agent.moa, [], trainer.agent.moa.encode
    moa.encode = lambda memory, now: seen.append((memory, now, encode(memory, now))) or seen[-1][2]
    try:
        generator = torch.Generator().manual_seed(seed)
        loss, terms = script.moa_loss(moa, batch, 0.3, 0.7, pretraining, generator)
    finally:
        del moa.encode
    return loss, terms, *seen[0]


def all_matches(trainer, count):
    buffer = trainer.buffer
    assert len(buffer) >= count
    return buffer.batch_of(buffer.batch + torch.arange(count), trainer.agent.relative, trainer.args.goal == "oracle")


def test_the_loss_reads_the_history_that_the_agent_had(script, small):
    """For every step and seat, the encoder's input in training is that in acting: strictly before the action."""
    trainer, matches, _, _ = play(script, small, env_id=SMALL_HUNT, co_players="self", match_episodes=3)
    batch = all_matches(trainer, len(matches))
    _, _, history, now, _ = captured_loss(script, trainer, batch)
    expected, seen, steps = [], [], 0
    for s, match in enumerate(matches):
        steps += len(match)
        for t, (state, actions, memory, *_) in enumerate(match):
            assert torch.equal(batch.actions[s, t], actions)
            here = state.players[0] >= 0
            assert torch.equal(batch.active[s, t], here)
            expected.append(torch.stack(list(memory))[:, here])
            seen.append(trainer.agent.moa.seen(*trainer.agent.relative(state))[0][here])
        assert not batch.active[s, len(match) :].any()
    torch.testing.assert_close(torch.stack(list(history)), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(now, torch.cat(seen), rtol=1e-5, atol=1e-5)
    assert steps > 60


def test_encodings_know_nothing_of_the_present_or_the_future(script, small):
    """Other actions from step t on leave all encodings up to t as they are; the loss's gradient says the same."""
    trainer, matches, _, _ = play(script, small, env_id=SMALL_HUNT, co_players="self", match_episodes=3)
    batch = all_matches(trainer, len(matches))
    where = batch.active.nonzero()  # [R, 3]
    _, _, _, _, (mean, log_std) = captured_loss(script, trainer, batch)
    for t in (0, 3, 11):
        changed = batch.actions.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 7
        _, _, _, _, (other, other_std) = captured_loss(script, trainer, batch._replace(actions=changed))
        past = where[:, 1] <= t
        torch.testing.assert_close(other[past], mean[past], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other_std[past], log_std[past], rtol=1e-4, atol=1e-4)
        after = (where[:, 1] == t + 1) & batch.active[where[:, 0], t, where[:, 2]]
        assert ((other[after] - mean[after]).abs().max(1).values > 1e-3).all()
    changed = batch.actions.clone()
    changed[:, 2, 0] = (changed[:, 2, 0] + 1) % 7
    _, _, _, _, (other, _) = captured_loss(script, trainer, batch._replace(actions=changed))
    elsewhere = where[:, 2] != 0  # what is inferred of a seat depends on its own actions alone
    torch.testing.assert_close(other[elsewhere], mean[elsewhere])


@pytest.mark.parametrize("pretraining", [False, True])
def test_moa_loss_is_its_formula(script, small, pretraining):
    """-log pi_hat + alpha KL(q || N(0, I)) + c * reconstruction, a weighted mean; without the first in pretraining."""
    trainer, matches, _, _ = play(script, small, env_id=SMALL_HUNT, co_players="self", moa_buffer="balanced")
    batch, moa, relative = all_matches(trainer, len(matches)), trainer.agent.moa, trainer.agent.relative
    loss, terms, _, _, (mean, log_std) = captured_loss(script, trainer, batch, pretraining)
    weight = batch.weight[batch.active]
    weight = weight / weight.sum()
    assert weight.std() > 0
    normal = torch.distributions.Normal
    prior = normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(normal(mean, log_std.exp()), prior).sum(1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    goal = mean + log_std.exp() * noise
    nll, recon = [], []
    with torch.no_grad():
        own, others = relative(batch.state)
        mask, length = trainer.game.action_mask(batch.state), batch.actions.shape[1]
        for r, (s, t, i) in enumerate(batch.active.nonzero().tolist()):
            row = s * length + t
            logits = moa.decoder(own[row, i], others[row, i], goal[r])
            legal = mask[row, i].nonzero().flatten().tolist()
            log_probs = dict(zip(legal, logits[legal].log_softmax(0).tolist(), strict=True))
            nll.append(-log_probs[int(batch.actions[s, t, i])])
            items = batch.state.items[row]
            scores = moa.subgoal_logits(batch.state.players[row, i], items, own[row, i], others[row, i], goal[r])
            there = [*(items >= 0).nonzero().flatten().tolist(), len(items)]
            log_probs = dict(zip(there, scores[there].log_softmax(0).tolist(), strict=True))
            recon.append(-log_probs[int(batch.subgoal[s, t, i])])
    for name, values in {"moa/kl": kl.detach(), "moa/nll": torch.tensor(nll), "moa/recon": torch.tensor(recon)}.items():
        assert float(terms[name]) == pytest.approx(float((weight * values).sum()), rel=1e-4)
    whole = 0.3 * terms["moa/kl"] + 0.7 * terms["moa/recon"] + (0.0 if pretraining else terms["moa/nll"])
    assert float(loss.detach()) == pytest.approx(float(whole), rel=1e-5)
    loss.backward()
    decoder = [p.grad for p in moa.decoder.parameters()]
    assert all(g is None or not g.any() for g in decoder) if pretraining else any(g.any() for g in decoder)
    others = [*moa.encoder.parameters(), *moa.step_feature.parameters(), *moa.subgoal.parameters()]
    assert all(p.grad.any() for p in others)


@pytest.mark.parametrize("env_id, likely", [("msh-3x3-3p-2h2s", 6.0), (SMALL_DRIFTS, 2.0)])
def test_subgoals_are_the_next_items_taken(script, small, env_id, likely):
    """The item of each seat's next successful interaction in the episode, this step's included, or none."""
    trainer, matches, _, _ = play(script, small, likely=likely, env_id=env_id, co_players="self", match_episodes=3)
    batch, found = all_matches(trainer, len(matches)), defaultdict(int)
    taking = {m: int(a) for m, a in enumerate(trainer.game.item_action)}
    for s, match in enumerate(matches):
        for t, (state, _, _, _, _, episode, _, _) in enumerate(match):
            for i in (state.players[0] >= 0).nonzero().flatten().tolist():
                expected = trainer.game.num_items
                for now, actions, _, _, after, number, _, _ in match[t:]:
                    gone = [m for m in taking if now.items[0, m] >= 0 and after.items[0, m] < 0]
                    mine = [m for m in gone if now.players[0, i] == now.items[0, m] and actions[i] == taking[m]]
                    if number != episode:
                        break
                    if mine:
                        (expected,) = mine
                        break
                assert int(batch.subgoal[s, t, i]) == expected
                found[expected] += 1
    assert len(found) == trainer.game.num_items + 1 and min(found.values()) > 2


def test_subgoal_logits(script, lively):
    """Gone items have no probability; the order of items of a kind is that of their logits; the rest is untouched."""
    agent = lively(env_id="msh-4x4-3p-3h2s")
    players, items = torch.tensor([[5, 0, 7]]), torch.tensor([[1, 14, 3, -1, 9]])
    state = script.GameState(players, items, torch.tensor([4]), torch.tensor([0]))
    own, others = agent.relative(state)
    goal = torch.randn(1, 3, agent.moa.goal_size, generator=torch.Generator().manual_seed(0))
    items = state.items.unsqueeze(1).expand(-1, 3, -1)
    with torch.no_grad():
        logits = agent.moa.subgoal_logits(state.players, items, own, others, goal)
        order = torch.tensor([1, 0, 4, 2, 3])
        moved = agent.moa.subgoal_logits(state.players, items[..., order], own, others, goal)
    assert logits.shape == (1, 3, 6) and not logits.softmax(2)[..., 3].any()
    torch.testing.assert_close(moved, logits[..., [*order.tolist(), 5]])
    assert logits[..., [0, 1, 2, 4, 5]].std(2).min() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Rules of the buffer
# ---------------------------------------------------------------------------------------------------------------------
def outcome(family, match, episode, seat, game):
    """Reward of a player's episode, and the class of its outcome: 0 nothing taken, 1 and 2 by what or how much was."""
    reward, taken = 0.0, []
    for now, actions, _, r, after, number, _, _ in match:
        if number == episode:
            reward += float(r[seat])
            taken += [
                game.item_names[int(game.item_kind[m])]
                for m in range(game.num_items)
                if now.items[0, m] >= 0 > after.items[0, m]
                and now.players[0, seat] == now.items[0, m]
                and actions[seat] == game.item_action[m]
            ]
    if family == "msg":
        return reward, min(2, len(taken))
    return reward, {"stag": 1, "hare": 2}[taken[0]] if taken else 0


@pytest.mark.parametrize("rule", ["all", "positive", "balanced"])
@pytest.mark.parametrize("env_id", ["msh-3x3-3p-1h1s", "msh-2x2-2p-0h1s", "msg-2x3-3p-2d", "msg-2x2-3p-1d"])
def test_rules_of_collection(script, small, env_id, rule):
    """Which episodes are kept and with what weight, by counting; fill, share kept and age with them."""
    options = {"co_players": "self", "match_episodes": 1, "moa_buffer": rule, "moa_capacity": 200}
    trainer, matches, steps, _ = play(script, small, matches=12, likely=2.0, env_id=env_id, **options)
    buffer, game, n = trainer.buffer, trainer.game, trainer.game.num_players
    results = [[outcome(game.family, match, 0, i, game) for i in range(n)] for match in matches]
    if rule == "positive":
        kept = [[reward > 0 for reward, _ in result] for result in results]
    else:
        kept = [[True] * n for _ in results]
    stored = [k for k, keeps in enumerate(kept) if any(keeps)]
    assert len(buffer) == len(stored) and len(stored) > 0
    counts = [sum(c == k for s in stored for _, c in results[s]) for k in range(3)]
    for s, k in enumerate(stored):
        batch = buffer.batch_of(
            buffer.batch + torch.tensor([s]), trainer.agent.relative
        )  # weighed by all that are held
        assert torch.equal(batch.actions[0], torch.stack([step[1] for step in matches[k]]))
        for i in range(n):
            if rule == "balanced":
                share = sum(counts) / (sum(c > 0 for c in counts) * counts[results[k][i][1]])
                weight = min(4.0, share)
            else:
                weight = float(kept[k][i])
            active = batch.active[0, :, i]
            assert batch.weight[0, :, i].tolist() == pytest.approx((weight * active.float()).tolist(), rel=1e-5)
    assert sum(c > 0 for c in counts) >= (1 if rule == "positive" else 2)
    fill = buffer.statistics(10**6)
    number = sum(map(sum, kept))
    assert fill["moa/buffer_fill"] == pytest.approx(number / (buffer.capacity * n))
    assert fill["moa/buffer_kept"] == pytest.approx(number / (len(matches) * n))
    assert fill["moa/buffer_age"] == pytest.approx(10**6 - sum(steps[k] for k in stored) / len(stored), rel=1e-5)
    if rule == "positive" and game.family == "msh":  # with a drift removed everyone gets something
        assert number < len(matches) * n and (len(stored) < len(matches) or env_id != "msh-2x2-2p-0h1s")


def test_episodes_that_are_not_kept_still_serve_as_history(script, small):
    """`positive` in matches of three episodes: weight 0 or 1 by a player's episode, and the match stored whole."""
    trainer, matches, _, _ = play(
        script, small, likely=2.0, env_id="msh-3x3-3p-1h1s", co_players="self", match_episodes=3, moa_buffer="positive"
    )
    game, n, seen = trainer.game, trainer.game.num_players, set()
    stored = [m for m in matches if any(outcome("msh", m, e, i, game)[0] > 0 for e in range(3) for i in range(n))]
    batch = all_matches(trainer, len(stored))
    for s, match in enumerate(stored):
        for t, step in enumerate(match):
            for i in range(n):
                keep = outcome("msh", match, step[5], i, game)[0] > 0
                assert float(batch.weight[s, t, i]) == float(keep and bool(step[0].players[0, i] >= 0))
                assert int(batch.start[s, t]) == next(k for k, other in enumerate(match) if other[5] == step[5])
                seen.add(keep)
    assert seen == {True, False}


def test_the_buffer_is_a_ring(script, small):
    """With room for three matches it holds the three last."""
    trainer, matches, steps, _ = play(
        script, small, matches=11, env_id=SMALL_HUNT, co_players="self", match_episodes=1, moa_capacity=3
    )
    buffer = trainer.buffer
    assert len(buffer) == 3 and buffer.statistics(500)["moa/buffer_fill"] == 1.0
    batch, last = all_matches(trainer, 3), matches[-3:]
    held = {tuple(batch.actions[s][batch.active[s].any(1)].flatten().tolist()) for s in range(3)}
    assert held == {tuple(torch.stack([step[1] for step in match]).flatten().tolist()) for match in last}
    assert buffer.statistics(500)["moa/buffer_age"] == pytest.approx(500 - sum(steps[-3:]) / 3)
    drawn = buffer.sample(2000, trainer.agent.relative, False, torch.Generator().manual_seed(0))
    ways = defaultdict(int)
    for s in range(2000):
        ways[tuple(drawn.actions[s][drawn.active[s].any(1)].flatten().tolist())] += 1
    assert set(ways) == held and all(abs(k - 2000 / 3) < 5 * (2000 * 2 / 9) ** 0.5 for k in ways.values())


def test_oracle_goals_in_the_buffer_are_those_that_were_acted_on(script, small):
    """Kinds and targets of scripted co-players, as the agent was told them at each step; nothing of the learner's."""
    options = {"env_id": "msh-4x4-3p-2h1s", "co_players": "ns,nh-noisy,self,random", "goal": "oracle"}
    trainer, matches, _, _ = play(script, small, matches=12, **options)
    batch, relative, told = all_matches(trainer, len(matches)), trainer.agent.relative, defaultdict(int)
    names = trainer.co_players.names
    for s, match in enumerate(matches):
        for t, (state, *_, kinds, targets) in enumerate(match):
            for i in (state.players[0] >= 0).nonzero().flatten().tolist():
                name, target = names[int(kinds[i])], int(targets[i])
                truth = batch.oracle[s, t, i]
                kind, flags, cell = truth.split([len(script.SCRIPTED) + 1, 2, relative.size])
                stem = name.removesuffix("-noisy")
                assert kind.tolist() == [float(stem == k) for k in ("self", *script.SCRIPTED)]
                walks = stem in ("ns", "nh") and target >= 0
                assert flags.tolist() == [float(name.endswith("-noisy")), float(walks)]
                item = state.items[0, target] if walks else torch.tensor(-1)
                assert torch.equal(cell, relative.cells(state.players[0, i], item))
                told[name, walks] += 1
    assert told["ns", True] and told["nh-noisy", True] and told["self", False] and told["random", False]


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------
def test_inferred_goals_predict_better_than_none(script, small):
    """Hunters of stags, hunters of hares and random players: after a match's first episode the MOA knows who is who, if
    z is inferred from it or told, and without z it does not. Judged on matches that it never saw."""
    options = {"env_id": "msh-5x5-3p-2h2s", "co_players": "ns,nh,random", "match_episodes": 3, "total_timesteps": 10**6}
    options |= {"num_envs": 48, "num_steps": 64, "moa_capacity": 1000, "plan_update": "offset"}
    options |= {
        "goal_size": 4,
        "moa_hidden_size": 32,
        "moa_learning_rate": 1e-2,
        "moa_updates": 100,
        "moa_alpha": 0.003,
    }
    nll = {}
    for goal in ("inferred", "none", "oracle"):
        args = small(goal=goal, seed=3, moa_matches=16, **options)
        trainer, test = script.Trainer(args), script.Trainer(script.dataclasses.replace(args, seed=4))
        for one in (trainer, test):
            one.agent.plan_mode = "none"  # plays by the first policy, almost at random
            for _ in range(4):
                one.rollout()
        trainer.update_moa(pretraining=False)
        batch = all_matches(test, len(test.buffer))
        script_of = test.buffer.data["script"][test.buffer.batch :][: len(test.buffer)].unsqueeze(1)
        counted = batch.active & (script_of >= 0) & (batch.start > 0).unsqueeze(2)
        batch = batch._replace(weight=counted.float())
        with torch.no_grad():
            _, terms = script.moa_loss(trainer.agent.moa, batch, 0.0, 0.0, False, torch.Generator().manual_seed(0))
        nll[goal] = float(terms["moa/nll"])
    assert nll["inferred"] < nll["none"] - 0.08 and nll["oracle"] < nll["none"] - 0.15, nll
