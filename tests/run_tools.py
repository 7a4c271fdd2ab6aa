"""What the tests of runs share: runs in folders of their own, their networks and logs, `main`."""

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BAR = re.compile(r"[^\r\n]*?\d+%\|[^\r\n]*?\[[^\r\n]*?\] ?")  # a progress bar
NETWORKS = ("actor", "critic", "moa", "transition", "model")  # those of all scripts


def arguments(**options):
    """The words of a command line with these options."""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def run(script, args, folder, watch=None):
    """A run of `args` in `folder`: its metrics, its own folder (absolute), and what it printed."""
    printed = io.StringIO()
    errors = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(errors))
        metrics = script.train(args, watch)
    path = Path(folder, metrics.pop("run"))
    return types.SimpleNamespace(
        metrics=metrics, path=path, printed=printed.getvalue(), errors=errors.getvalue()
    )


def trust(agent, **others):
    """For `watch`: the planner, if there is one, counts from the next iteration on."""
    if hasattr(agent, "plan_slope"):
        agent.plan_slope.fill_(1.0)


def shake(module, seed=0):
    """Gives all parameters normal values of a fan-in's scale, so that no output is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            wide = parameter.dim() > 1
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if wide else 0.1 * noise)
    return module


class BreakError(Exception):
    """What ends a run at once, as a kill would: nothing is written after it."""


def broken_run(script, args, folder, iteration):
    """A run of `args` in `folder` that dies after `iteration`; the path of its folder."""

    def watch(**names):
        if names["iteration"] == iteration:
            raise BreakError(str(names["folder"]))

    with pytest.raises(BreakError) as broken:
        run(script, args, folder, watch)
    return Path(folder, str(broken.value))


def parsed(script, folder, *words):
    """Args of the command line `words`, read in `folder`."""
    with contextlib.chdir(folder):
        return script.parse_arguments([str(word) for word in words])


def networks(agent):
    """{network: its parameters in one vector} of an agent, or of its state dict."""
    weights = agent if isinstance(agent, dict) else agent.state_dict()
    vectors = {}
    for network in NETWORKS:
        names = [name for name in weights if name.startswith(f"{network}.")]
        if names:
            vectors[network] = torch.cat([weights[name].flatten() for name in names])
    return vectors


def weights_of(script, path):
    return networks(script.load_checkpoint(path)["agent"])


def scalars(path):
    """{name: [(step, value)]} of the TensorBoard events in a run's folder."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    series = {}
    for name in events.Tags()["scalars"]:
        series[name] = [(event.step, event.value) for event in events.Scalars(name)]
    return series


def assert_equal(first, second, path=""):
    """Nested containers of tensors and plain values are the same to the bit, types included."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{path}/{place}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, path
        assert torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True), path
    else:
        assert first == second, path


def assert_same_run(script, first, second):
    """Two runs' last checkpoints are the same to the bit, but for options that may change, and the
    folders of their snapshots."""
    contents = []
    for path in (first, second):
        content = script.load_checkpoint(path)
        args = {name: value for name, value in content["args"].items() if name not in script.FREE}
        names = [Path(name).name for name in content["pool"]]
        contents.append({**content, "args": args, "pool": names})
    assert_equal(*contents)


def main(script, monkeypatch, capsys, *words):
    """Status, standard output and standard error, without progress bars, of `main` with `words`."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *[str(word) for word in words]])
    capsys.readouterr()
    try:
        script.main()
    except SystemExit as stopped:
        status = stopped.code
    else:
        status = 0
    captured = capsys.readouterr()
    lines = BAR.sub("", captured.err).replace("\r", "\n").splitlines(keepends=True)
    return status, captured.out, "".join(line for line in lines if line.strip())


def refused(script, monkeypatch, capsys, *words):
    """`main` says one line on standard error, ends with status 2 and writes nothing; the line."""
    before = sorted(Path().rglob("*"))
    status, out, error = main(script, monkeypatch, capsys, *words)
    assert status == 2, (words, error)
    assert out == "", (words, out)
    assert error.count("\n") == 1 and error.endswith("\n"), (words, error)
    assert sorted(Path().rglob("*")) == before, words
    return error
