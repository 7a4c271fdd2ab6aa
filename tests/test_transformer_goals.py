"""The transformer over a match: in play as in training, and each by a slow way to the same."""

import math

import pytest
import torch

import transformer_goals as script
from conftest import SMALL
from run_tools import shake

WINDOW = 12
HUNT = "msh-3x3-3p-2h1s"
PARTS = "own views action active first".split()


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    monkeypatch.setattr(script.MOA, "window", WINDOW)


def agent_of(env_id=HUNT, **options):
    """A game and an agent whose networks all say something."""
    options = {**SMALL, "num_envs": 3, "match_episodes": 4, "horizon": 9, **options}
    args = script.Args(env_id=env_id, plan_update="none", **options)
    game = script.make_game(args, "cpu")
    torch.manual_seed(1)
    return game, shake(script.Agent(game, script.checked(args, game)))


@torch.no_grad()
def played(game, agent, steps=150):
    """A MatchBuffer of a few games; mean and log std [T, B, N, 2 Z] that the player inferred."""
    generator = torch.Generator().manual_seed(2)
    args = agent.args
    kinds = [kind for kind in game.kinds if kind != "random"]
    co_players = script.CoPlayers(game, kinds, args.num_envs, args.match_episodes, generator)
    player = co_players.agents[0] = script.Player(agent, args.num_envs)
    buffer = script.MatchBuffer(game, args)
    state = game.start(args.num_envs, generator)
    inferred = []
    for _ in range(steps):
        inferred.append(torch.cat(player.infer(state, co_players)[2:], -1))
        actions = co_players.act(state, game.action_mask(state))
        after, reward, terminated, truncated = game.step(state, actions)
        step = {"action": actions, "alive": game.alive(state), "reward": reward}
        step["reached"] = game.reached(state, actions, after)
        ended = (terminated | truncated).all(1)
        buffer.add(state, step, ended, co_players.advance(ended))
        state = game.restart(after, ended, generator)
    return buffer, torch.stack(inferred)


@pytest.mark.parametrize("env_id", [HUNT, "msg-3x3-3p-2d"])
def test_play_infers_what_training_infers(env_id):
    """Of every step of every match: with episodes and matches that end, players that leave, and
    matches longer than the window."""
    game, agent = agent_of(env_id)
    buffer, inferred = played(game, agent)
    lengths = []
    episodes = 0
    for number in range(3):
        number = torch.tensor([number])
        for start in buffer.ring["match"][:150, number].unique():
            batch = buffer.read(number, start[None])
            summary = agent.moa.summaries(*map(batch.get, PARTS))
            encoded = torch.cat(agent.moa.encode(summary, batch["own"], batch["views"]), -1)[0]
            lengths.append(len(encoded))
            expected = inferred[start : start + len(encoded), number.item()]
            torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-4)
            episodes += len(batch["first"].unique())
    assert sum(lengths) == 450
    assert max(lengths) > 2 * WINDOW and episodes > len(lengths) > 9
    assert inferred.std(0).min() > 1e-3


def test_the_loss_reads_each_row_s_own_history():
    """KL of q(z | h) in closed form, over all steps that are learnt from."""
    game, agent = agent_of()
    buffer, _ = played(game, agent)
    batch = buffer.sample(script.MOA_MATCHES, torch.Generator().manual_seed(5))
    summary = agent.moa.summaries(*map(batch.get, PARTS))
    mean, log_std = agent.moa.encode(summary, batch["own"], batch["views"])
    prior = torch.distributions.Normal(0.0, 1.0)
    q = torch.distributions.Normal(mean, log_std.exp())
    kl = torch.distributions.kl_divergence(q, prior).sum(-1)[batch["weight"]].mean()
    loss, terms = script.moa_loss(agent, batch, False, torch.Generator().manual_seed(6))
    torch.testing.assert_close(terms["moa/kl"], kl, rtol=1e-4, atol=1e-5)
    weights = {"nll": 1.0, "kl": agent.args.moa_alpha, "recon": script.SUBGOAL_COEF}
    whole = sum(weight * terms[f"moa/{name}"] for name, weight in weights.items())
    torch.testing.assert_close(loss, whole)


def test_attention_by_hand():
    """Rotary positions as complex numbers; the softmax with a one for the token of zeros."""
    torch.manual_seed(7)
    attention = shake(script.Attention(6)).double()
    size = script.HEAD_SIZE
    tokens, query = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    steps = torch.tensor([[3, 4, 5, 9, 11]])
    readable = torch.rand(1, 2, 5, 5) < 0.6
    cache = [
        torch.nn.functional.pad(x, (0, 0, 1, 0)) for x in attention.keys_and_values(tokens, steps)
    ]
    got = attention(query, steps, *cache, script.attention_mask(readable).double())
    frequency = torch.tensor([1000 ** (-k / (size // 2)) for k in range(size // 2)])

    def turned(vector, step):
        pair = torch.complex(*vector.view(2, -1)) * torch.polar(torch.ones(1), frequency * step)
        return torch.cat([pair.real, pair.imag])

    for i in range(5):
        read = []
        for head, part in enumerate(torch.arange(2 * size).split(size)):
            asked = turned(attention.query(attention.norm(query[0, i]))[part], steps[0, i])
            total, weight = torch.zeros(size), 1.0
            for s in range(5):
                if readable[0, head, i, s]:
                    seen = attention.norm(tokens[0, s])
                    key = turned(attention.key(seen)[part], steps[0, s])
                    score = (asked @ key / math.sqrt(size)).exp()
                    total, weight = total + score * attention.value(seen)[part], weight + score
            read.append(total / weight)
        expected = attention.mix(torch.cat(read))
        torch.testing.assert_close(got[0, i], expected, rtol=1e-5, atol=1e-5)


def test_a_layer_adds_to_its_tokens():
    torch.manual_seed(8)
    block = shake(script.Block(6))
    tokens = torch.randn(1, 5, 6)
    steps = torch.arange(5)[None]
    mask = torch.zeros(1, 2, 5, 5)
    context = (steps, *block.attention.keys_and_values(tokens, steps), mask)
    read = tokens + block.attention(tokens, *context)
    torch.testing.assert_close(block(tokens, *context), read + block.mlp(read))


def test_seats_and_games_do_not_mix():
    """Other numbers of seats and of games: the same, in that order; one seat of one game changed:
    no other changes."""
    game, agent = agent_of()
    moa = agent.moa
    buffer, _ = played(game, agent)
    batch = buffer.read(torch.tensor([0, 1]), torch.tensor([0, 0]))
    args = [batch[name] for name in PARTS]
    summary = moa.summaries(*args)
    order = torch.tensor([2, 0, 1])
    relabelled = moa.summaries(*(x.flip(0)[:, :, order] for x in args))
    torch.testing.assert_close(relabelled, summary.flip(0)[:, :, order], rtol=1e-4, atol=1e-5)
    step = int(batch["active"][1, 3:, 2].int().argmax()) + 3
    sole = torch.zeros_like(batch["active"])
    sole[1, step, 2] = True
    args[2] = (args[2] + 1).where(sole, args[2]) % game.num_actions
    changed = (moa.summaries(*args) - summary).abs().amax(3) > 1e-5  # [2, L, N]
    assert not changed[0].any() and not changed[1, :, :2].any() and not changed[1, : step + 1].any()
    assert changed[1, step + 1, 2]


@torch.no_grad()
def test_a_long_match_in_a_bounded_cache():
    """2,400 steps; what lies behind the windows of all layers is forgotten, to the number."""
    game, agent = agent_of(match_episodes=9999)
    moa = agent.moa
    generator = torch.Generator().manual_seed(3)
    own, others = (x.expand(2, *x.shape[1:]) for x in game.features(game.start(1, generator)))
    memory = moa.empty_memory(6)
    sizes = {name: x.shape for name, x in memory.items()}
    alive = torch.ones(2, 3).bool()
    differs = []  # between the games, which differ in the actions of the first steps alone
    for step in range(2400):
        actions = torch.randint(game.num_actions, (1, 3), generator=generator).repeat(2, 1)
        actions[1] *= step >= 2400 - 2 * WINDOW
        moa.append(memory, own, others, actions, alive)
        summary = moa.summary(memory, own, others)
        differs.append(float((summary[0] - summary[1]).abs().max()))
    assert {name: x.shape for name, x in memory.items()} == sizes
    assert differs[-2 * WINDOW - 1] > 1e-2 and differs[-WINDOW - 2] > 1e-4
    assert differs[-1] == 0.0


def test_it_trains_goes_on_and_plays():
    """Every part learns; a run that goes on is the same to the bit; a checkpoint is a co-player."""
    options = {**SMALL, "env_id": HUNT, "horizon": 9, "plan_samples": 4, "plan_update": "offset"}
    first = {}

    def watch(agent, **names):
        for name, value in agent.moa.state_dict().items():
            first.setdefault(f"moa.{name}", value.clone())

    run = script.train(script.Args(**options), watch)["run"]
    whole = script.load_checkpoint(run)
    assert [name for name, x in first.items() if torch.equal(whole["agent"][name], x)] == []
    half = script.train(script.Args(**{**options, "total_timesteps": 64}))["run"]
    script.train(script.Args(**{**options, "resume": half}))
    again = script.load_checkpoint(half)
    for part in (lambda content: content["agent"], lambda content: content["memory"][0]):
        for name, value in part(whole).items():
            assert torch.equal(part(again)[name], value), name
    assert whole["memory"][0]["readable"].any()
    evaluated = script.evaluate(run, run, episodes=6, num_envs=2, match_episodes=3)
    assert len(evaluated["focal_returns"]) == 6
