"""What the tests of runs share: runs in folders of their own, their networks and logs, `main`."""

import contextlib
import io
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def arguments(**options):
    """The words of a command line with these options."""
    words = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def run(script, args, folder, watch=None):
    """A run of `args` in `folder`: its metrics, its own folder (absolute), and what it printed."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        metrics = script.train(args, watch)
    path = Path(folder, metrics.pop("run"))
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


def broken_run(script, args, folder, iteration):
    """A run of `args` that dies after `iteration`, as if it were killed; the path of its folder."""

    def watch(**names):
        if names["iteration"] == iteration:
            raise InterruptedError(names["folder"])

    with pytest.raises(InterruptedError) as broken:
        run(script, args, folder, watch)
    return Path(folder, str(broken.value))


def parsed(script, folder, *words):
    """Args of the command line `words`, read in `folder`."""
    with contextlib.chdir(folder):
        return script.parse_arguments([str(word) for word in words])


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
        assert first.dtype == second.dtype and first.shape == second.shape, path
        assert torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True), path
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert_equal(dict(enumerate(first)), dict(enumerate(second)), path)
    else:
        assert first == second, path


def assert_same_run(script, first, second):
    """Two runs' last checkpoints are the same to the bit, but for options that may change, and the
    folders of their snapshots."""
    contents = [script.load_checkpoint(path) for path in (first, second)]
    for content in contents:
        content["args"] = {k: v for k, v in content["args"].items() if k not in script.FREE}
        content["pool"] = [Path(name).name for name in content["pool"]]
    assert_equal(*contents)


def main(script, monkeypatch, capsys, *words):
    """Status, standard output and standard error of `main` with these words."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *[str(word) for word in words]])
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
