"""The tree search of hop_mcts.py: against a sequential one, in closed form, and batched."""

from copy import deepcopy

import pytest
import torch

import planner_speed
from run_tools import generator_of

pytestmark = pytest.mark.only("hop_mcts")
SIMULATIONS = 30
PAIR = {"env_id": "msh-2x2-2p-2h1s", "num_envs": 2, "num_steps": 4, "total_timesteps": 16}
GAMES = [("msh-4x4-4h1s", {}), ("msg-4x4-3p-2d", {"prosocial": 0.3})]
GAMES += [("msh-3x3-2p-1h2s", {"max_depth": 2}), ("msh-3x2-6p-2h2s", {"max_depth": 1})]
BANDITS = [
    ([-4.0, -3.0, -4.0, 9.0], [0.5, 0.2, 0.3, -1.0], 10, 0.0, [1, 8, 1, 0]),
    ([1.0, 3.0, 2.0], [0.5, 0.2, 0.3], 2, 1.25, [1, 0, 1]),
    ([0.0, 0.0, 0.0], [0.6, 0.3, 0.1], 1000, 1.25, [600, 300, 100]),
]


class Scene:
    """Trees of one game, some steps after its start, with networks in float64."""

    def __init__(self, script, monkeypatch, env_id, **options):
        plain = script.clock_features
        monkeypatch.setattr(script, "clock_features", lambda *given: plain(*given).double())
        self.script = script
        game = script.GridGame(env_id, horizon=6)
        game.relative = game.relative.double()
        options = {"env_id": env_id, "horizon": 6, "num_simulations": SIMULATIONS, **options}
        self.args = script.checked(script.Args(**options), game)
        torch.manual_seed(3)
        self.agent = script.Agent(game, self.args).double()
        for weight in self.agent.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        generator = generator_of(5)
        state = game.start(200, generator)
        for _ in range(2):
            actions = script.random_actions(game.action_mask(state), generator)
            state, _, terminated, truncated = game.step(state, actions)
        plays = (~terminated & ~truncated)[:, 0].nonzero()[:12, 0]
        self.state = type(state)(*(field[plays] for field in state))
        sizes = (len(plays), game.num_players, self.agent.moa.goal_size)
        self.goals, self.drawn = torch.randn((2, *sizes), generator=generator, dtype=torch.float64)
        self.draws = torch.rand((SIMULATIONS + 1, *sizes[:2]), generator=generator).double()

    @torch.no_grad()
    def search(self, which=slice(None), sequential=False):
        """Q and visits of the trees `which`."""
        agent, goals = self.agent, self.goals[which]
        state = type(self.state)(*(field[which] for field in self.state))
        own, views = agent.game.features(state)
        others, goal = agent.inputs(views.double(), goals)
        value = agent.critic(own.double(), others, goal)[:, 0, 0]
        given = (agent, state, goals, self.drawn[which], self.draws[:, which].flatten(0, 1))
        if sequential:
            return planner_speed.sequential_search(given, value, self.args)
        return self.script.search(self.script.Model(*given), value, self.args)


@pytest.mark.parametrize("env_id, options", GAMES)
def test_search_equals_a_sequential_one(script, monkeypatch, env_id, options):
    """Visit counts, and but for rounding mean returns, of every tree, wherever in a batch."""
    scene = Scene(script, monkeypatch, env_id, **options)
    q, visits = scene.search()
    expected, counts = scene.search(sequential=True)
    assert torch.equal(visits, counts)
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=0)
    order = torch.randperm(len(q), generator=generator_of(1))
    for which in (order[:3], torch.cat([order, order])):
        again = scene.search(which)
        assert torch.equal(again[1], visits[which])
        torch.testing.assert_close(again[0], q[which], atol=1e-9, rtol=0)


class Bandit:
    """A model without state: each action pays what `payoffs` [1, A] say, and nothing follows."""

    def __init__(self, payoffs, prior):
        self.payoffs = payoffs
        self.num_actions = payoffs.shape[1]
        self.expand = lambda nodes: prior

    def step(self, nodes, actions, new):
        reward = self.payoffs[0, actions]
        return reward, torch.zeros_like(reward), torch.zeros_like(actions) > 0


@pytest.mark.parametrize("payoffs, prior, simulations, constant, expected", BANDITS)
def test_bandit(script, payoffs, prior, simulations, constant, expected):
    """Each legal action once, then the best; the likely ones alone; as the prior says."""
    tensors = [torch.tensor([row], dtype=torch.float64) for row in (payoffs, prior)]
    args = script.Args(num_simulations=simulations, puct_c=constant, gamma=0.9)
    q, visits = script.search(Bandit(*tensors), tensors[0].new_zeros(1), args)
    assert visits[0].tolist() == pytest.approx(expected, abs=3 * (simulations > 99))
    # what was not tried counts as the mean of all returns and V, which is 0
    mean = float((visits * tensors[0]).sum()) / (simulations + 1)
    assert q[0].tolist() == pytest.approx([p if n else mean for p, n in zip(payoffs, visits[0])])


def test_scores_of_any_seat(script, monkeypatch):
    """Relabelling the seats of a game changes no scores: the order of co-players is cyclic. They
    are means of trees, each of which has goals of its own."""
    scene = Scene(script, monkeypatch, "msh-4x4-4h1s", num_goal_samples=2)
    game, goals = scene.agent.game, scene.goals
    uniform, search = script.uniform, script.search
    trees = []

    def noted(model, *inputs):
        trees.append((model.moa.goal, search(model, *inputs)))
        return trees[-1][1]

    def scores(shift, log_std):
        state = scene.state._replace(players=scene.state.players.roll(shift, 1))
        features = (x.double() for x in game.features(state))
        seen = (*features, goals.roll(shift, 1), torch.full_like(goals, log_std))
        chosen = (torch.arange(len(goals)), torch.full((len(goals),), shift))
        with torch.no_grad():
            return script.scores(scene.agent, state, seen, chosen, generator_of(2))

    monkeypatch.setattr(script, "uniform", lambda *given: uniform(*given).double())
    monkeypatch.setattr(script, "search", noted)
    plain = scores(0, -30.0)
    for shift in range(game.num_players):
        torch.testing.assert_close(scores(shift, -30.0), plain, atol=1e-9, rtol=0)
    assert plain.std() > 0.01
    wide = scores(0, 0.0)
    drawn, (q, _) = trees[-1]
    first, second = drawn.unflatten(0, (-1, 2)).unbind(1)
    assert (first - second).abs().min() > 0.0
    torch.testing.assert_close(wide, q.unflatten(0, (-1, 2)).mean(1))


def test_a_search_is_trusted_within_a_match(script, small, typed):
    """With --init it acts alone, trusted. V learns from all steps since the match began: from
    lambda-returns (lambda 0.8) by V as it is now."""
    seen = []

    def watch(agent, match, last_value, **names):
        seen.append((agent.plan_mode, float(agent.plan_slope), len(match.get("reward", []))))
        if match:
            for gae_lambda in (0.8, 1.0):
                check_rows(script, agent, match, last_value, gae_lambda)

    run = script.train(small(**PAIR, co_players="self"), watch)["run"]
    assert all(slope != 1.0 and not kept for _, slope, kept in seen)
    seen.clear()
    words = f"--init {run} --num-steps 8 --total-timesteps 24 --co-players nh --horizon 5"
    script.train(typed(words), watch)
    assert seen == [("hop", 1.0, 8), ("hop", 1.0, 16), ("hop", 1.0, 24)]
    seen.clear()
    words = f"--init {run} --num-envs 400 --num-steps 4 --total-timesteps 4800 --plan-update none"
    script.train(typed(words), watch)
    assert seen == [("none", 1.0, 4), ("none", 1.0, 6), ("none", 1.0, 6)]  # 2,400 of all games


def test_pretraining_and_a_search_that_has_stopped_within_a_match(script, small, typed):
    """V does not learn while goals alone do. Once off, the search stays off in a longer run, that
    of the networks from before the match as well."""
    run = script.train(small(**PAIR, co_players="self"))["run"]
    modes = []

    def watch(agent, two, pretraining, **names):
        pairs = zip(two[0].critic.parameters(), agent.critic.parameters())
        assert all(torch.equal(*pair) for pair in pairs) == pretraining
        modes.append([one.plan_mode for one in two])

    options = {"num_steps": 5, "total_timesteps": 10, "plan_until": 0.5, "pretrain_moa_steps": 5}
    run = script.train(typed(init=run, **options), watch)["run"]
    script.train(typed(resume=run, total_timesteps=40), watch)
    assert modes == [["hop"] * 2] + [["none"] * 2] * 7


@pytest.mark.parametrize("rate, learnt_acts", [(3e-3, {True}), (100.0, {False})])
def test_in_a_match_the_agent_that_foresees_more_acts(script, small, typed, rate, learnt_acts):
    """V as it was before the match and as it is learnt are compared on steps that neither has
    seen yet; the better one's policy and search act. Opponent models are the same, and learn."""
    run = script.train(small(**PAIR, co_players="self"))["run"]
    before = script.load_player(run, script.GridGame(PAIR["env_id"]), 1).agent
    learnt = [before.critic]
    acts = []

    def watch(agent, player, match, storage, two, last_value, **names):
        assert two[1] is agent and two[0].moa is agent.moa
        for name, weight in two[0].critic.state_dict().items():
            assert torch.equal(weight, before.critic.state_dict()[name])
        new = {name: torch.stack(storage[name]) for name in ("own", "others", "goal")}.values()
        for k, critic in enumerate([before.critic, learnt[-1]]):
            torch.testing.assert_close(match["v"][-20:, ..., k], critic(*new)[..., 0].detach())
        rows = script.match_rows(agent, match, last_value, 1.0)
        errors = [(rows["v"][:, k] - rows["return"]).square().sum() for k in (0, 1)]
        assert player.agent is two[int(errors[1] < errors[0])]
        learnt.append(deepcopy(agent.critic))
        acts.append(player.agent is agent)

    options = {"co_players": "nh", "num_steps": 20, "learning_rate": rate}
    script.train(typed(init=run, **options, total_timesteps=400), watch)
    assert not acts[0] and set(acts[5:]) == learnt_acts


def check_rows(script, agent, match, last_value, gae_lambda):
    """Of the learner, backwards step by step."""
    value = agent.critic(*(match[name] for name in ("own", "others", "goal")))[..., 0].detach()
    expected = torch.zeros_like(value)
    coming = following = last_value
    for t in reversed(range(len(value))):
        after = torch.lerp(following, coming, gae_lambda)
        after = torch.where(match["goes_on"][t], after, match["final_value"][t])
        coming = expected[t] = match["reward"][t] + agent.args.gamma * after
        following = value[t]
    rows = script.match_rows(agent, match, last_value, gae_lambda)
    learner = match["learner"]
    torch.testing.assert_close(rows["return"], expected[learner])
    assert torch.equal(rows["own"], match["own"][learner])
    assert learner.any() and not learner.all()
