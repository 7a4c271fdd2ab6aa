"""What tests share: runs in folders of their own, their networks, logs and history, `main`."""

import contextlib
import io
import itertools
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def arguments(*words, **options):
    """The words of a command line: those of one text, or `words`, and options by name."""
    words = words[0].split() if len(words) == 1 else [str(word) for word in words]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def run(script, args, watch=None, folder="."):
    """A run of `args` in `folder`: its metrics, its own folder (absolute), and what it printed."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        metrics = script.train(args, watch)
    path = Path(folder, metrics.pop("run")).absolute()
    return types.SimpleNamespace(metrics=metrics, path=path, printed=printed.getvalue())


def trust(agent, **others):
    """For `watch`: the planner, if there is one, counts from the next iteration on."""
    if hasattr(agent, "plan_slope"):
        agent.plan_slope.fill_(1.0)


def shake(module, seed=0):
    """Gives all parameters normal values of a fan-in's scale, so that no output is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            size = parameter.shape[-1] if parameter.dim() > 1 else 100
            parameter.normal_(0.0, size**-0.5, generator=generator)
    return module


def broken_run(script, args, iteration):
    """A run of `args` that dies after `iteration`, as if it were killed; the path of its folder."""

    def watch(**names):
        if names["iteration"] == iteration:
            raise InterruptedError(names["folder"])

    with pytest.raises(InterruptedError) as broken:
        run(script, args, watch)
    return Path(str(broken.value)).absolute()


def parsed(script, *words, **options):
    """Args of this command line."""
    return script.parse_arguments(arguments(*words, **options))


def networks(agent):
    """{network: its parameters in one vector} of an agent, or of its state dict."""
    weights = agent if isinstance(agent, dict) else agent.state_dict()
    parts = defaultdict(list)
    for name, value in weights.items():
        network, *rest = name.split(".")
        if rest:
            parts[network].append(value.flatten())
    return {network: torch.cat(values) for network, values in parts.items()}


def weights_of(script, path):
    return networks(script.load_checkpoint(path)["agent"])


def scalars(path):
    """{name: {step: value}} of the TensorBoard events in a run's folder, each step logged once."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    series = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        series[name] = {point.step: point.value for point in points}
        assert len(series[name]) == len(points), name
    return series


def assert_equal(first, second, path=""):
    """Nested containers of tensors and plain values are the same to the bit, types included."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True, msg=path or None)
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert_equal(dict(enumerate(first)), dict(enumerate(second)), path)
    else:
        assert first == second, path


def assert_same_run(script, first, second):
    """Two runs' last checkpoints are the same to the bit, but for FREE options, and folders."""
    contents = [script.load_checkpoint(path) for path in (first, second)]
    for content in contents:
        content["args"] = {k: v for k, v in content["args"].items() if k not in script.FREE}
        content["pool"] = [Path(name).name for name in content["pool"]]
    assert_equal(*contents)


def main(script, monkeypatch, capsys, *words, **options):
    """Status, standard output and standard error of `main` with this command line."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments(*words, **options)])
    capsys.readouterr()
    status = 0
    try:
        script.main()
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def refused(script, monkeypatch, capsys, *words):
    """`main` says one line on standard error, ends with status 2 and writes nothing; the line."""
    before = sorted(Path().rglob("*"))
    status, out, error = main(script, monkeypatch, capsys, *words)
    assert (status, out, error.count("\n")) == (2, "", 1), (words, error)
    assert sorted(Path().rglob("*")) == before, words
    return error


def stacked(steps, name):
    return torch.stack([step[name] for step in steps])


def situations(script, game, batch=40):
    """States of games under way, some players gone, some steps just before an end."""
    generator = generator_of(0)
    state = game.start(batch, generator)
    state = state._replace(time=torch.randint(20, game.horizon - 1, (batch,), generator=generator))
    for _ in range(12):
        actions = script.random_actions(game.action_mask(state), generator)
        state, _, terminated, truncated = game.step(state, actions)
        state = game.restart(state, (terminated | truncated).all(1), generator)
    return state


def policy_of(logits, mask):
    return Categorical(logits=logits.masked_fill(~mask, -1e9))


PLAYED = {"num_steps": 10, "moa_learning_rate": 0.0, "plan_update": "none", "co_players": "self"}


class History:
    """What is held of a run by its buffer, read in plain loops."""

    def __init__(self, script, steps, buffer):
        self.steps = steps
        self.buffer = buffer
        self.limit = script.HISTORY
        self.oldest = max(0, len(steps) - buffer.size)
        self.running = (steps[-1]["episode"] + steps[-1]["ended"]).tolist()

    def span(self, b, t):
        """(game, start, end) of what is read of the match that step t of game b belongs to: all
        that is held, of a long match the steps up to t."""
        match = self.steps[t]["match"][b]
        same = [s for s, step in enumerate(self.steps) if step["match"][b] == match]
        start = max(same[0], t - self.limit + 1, self.oldest)
        return b, start, min(same[-1] + 1, start + self.limit)

    def spans(self):
        """Those of all that is held."""
        held = itertools.product(range(len(self.running)), range(self.oldest, len(self.steps)))
        return [self.span(b, t) for b, t in held]

    def read(self):
        """All different spans, and what the buffer reads of them."""
        spans = sorted(set(self.spans()))
        return spans, self.buffer.read(*torch.tensor(spans).T[:2])

    def later(self, span, t):
        """Steps of the same episode within a span, from step t on, counted from its start."""
        b, start, end = span
        episode = [int(step["episode"][b]) for step in self.steps[start:end]]
        return [k for k in range(t, end - start) if episode[k] == episode[t]]

    def known(self, span, t):
        """Whether what the episode of step t reaches is known: it has ended, and is not cut."""
        b, start, end = span
        cut = end - start == self.limit and (end - start - 1) in self.later(span, t)
        return int(self.steps[start + t]["episode"][b]) < self.running[b] and not cut

    def subgoal(self, span, t, i):
        b, start, _ = span
        reached = [int(self.steps[start + k]["reached"][b, i]) for k in self.later(span, t)]
        return next((item for item in reached if item >= 0), -1)
