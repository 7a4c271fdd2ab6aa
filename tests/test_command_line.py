"""The command line: how options are read, what is refused, a copy under another name."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import SCRIPTS, plans
from run_tools import arguments, main, refused, run, weights_of

ENV_ID = "msh-3x3-3p-2h1s"
PLAYERS = """
import torch


def raises(observation, action_mask, clock, generator):
    raise KeyError("what it needs")


def too_many(observation, action_mask, clock, generator):
    return torch.zeros(len(observation) + 1, dtype=torch.int64)


def real(observation, action_mask, clock, generator):
    return torch.zeros(len(observation))


def takes_less(observation):
    return torch.zeros(len(observation), dtype=torch.int64)


def outside(observation, action_mask, clock, generator):
    return torch.full((len(observation),), 99)


class NeverMade:
    def __init__(self):
        raise RuntimeError("no weights here")


number = 3
"""
BAD_PLAYERS = {
    "raises": "what it needs",
    "too_many": "",
    "real": "",
    "takes_less": "argument",
    "outside": "",
    "NeverMade": "no weights here",
    "number": "",
    "missing": "missing",
}


@pytest.fixture(scope="module")
def done(script, small, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("done")
    options = {"env_id": ENV_ID, "co_players": "self,nh", "update_epochs": 1}
    return run(script, small(**options, plan_update="offset", plan_until=1.0), folder).path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty folder to work in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ------------------------------------------------------------------------------------------------
# How options are read
# ------------------------------------------------------------------------------------------------
def test_every_option_can_be_given(script):
    """By its name with hyphens, and it arrives."""
    values = {}
    for field in dataclasses.fields(script.Args):
        default = field.default
        kind = str(field.type)
        if "Literal" in kind:
            choices = kind.split("Literal[")[1].split("]")[0].replace("'", "").split(", ")
            values[field.name] = next(choice for choice in choices if choice != default)
        elif isinstance(default, bool):
            values[field.name] = not default
        elif "int" in kind:
            values[field.name] = 3
        elif "float" in kind:
            values[field.name] = 0.5
        elif field.name not in ("evaluate", "resume", "init"):
            values[field.name] = "word"
    args = script.parse_arguments(arguments(**values))
    assert dataclasses.asdict(args) == {**dataclasses.asdict(script.Args()), **values}


def test_switches_take_a_value_as_well(script):
    """`--cuda False` is `--no-cuda`, `--cuda True` is `--cuda`."""
    base = script.Args()
    assert script.parse_arguments(["--cuda", "False"]) == base
    other = dataclasses.replace(base, seed=3)
    assert script.parse_arguments(["--cuda", "false", "--seed", "3"]) == other
    for words in (["--track", "True"], ["--track"], ["--track", "true"]):
        assert script.parse_arguments(words).track
    for words in (["--seed", "3", "--anneal", "False"], ["--no-anneal"]):
        assert not script.parse_arguments(words).anneal
    assert script.parse_arguments(["--anneal", "True", "--cuda", "False"]) == base
    for name in ("true-goals", "false-start"):
        assert script.parse_arguments(["--exp-name", name]).exp_name == name


def test_options_of_a_run_to_go_on_from(script, done):
    """Those of the run, with what is given replaced."""
    stored = json.loads((done / "args.json").read_text())
    for option in ("resume", "init"):
        args = script.parse_arguments([f"--{option}", str(done), "--total-timesteps", "999"])
        new = {k: v for k, v in script.INIT.items() if k in stored and option == "init"}
        changed = {option: str(done), "total_timesteps": 999}
        assert dataclasses.asdict(args) == {**stored, **new, **changed}


def test_help_names_every_option(script, monkeypatch, capsys):
    status, out, error = main(script, monkeypatch, capsys, "--help")
    assert status == 0 and error == ""
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in out


# ------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------
WRONG = [
    ("--no-such-option", "no-such-option"),
    ("stray", "stray"),
    ("--num-envs", "num-envs"),
    ("--num-envs 1.5", "num-envs"),
    ("--learning-rate fast", "learning-rate"),
    ("--moa-buffer balanced", "moa-buffer"),
    ("--plan-update search", "plan-update"),
]
WRONG_OWN = {  # of one script
    "hop_onestep": [("--num-simulations 4", "num-simulations")],
    "hop_mcts": [("--plan-samples 4", "plan-samples")],
    "hop_ppo_gumbel": [
        ("--assignment none", "assignment"),
        ("--goal-training vae", "goal-training"),
        ("--inter-om mean", "inter-om"),
        ("--goals some", "goals"),
        ("--pg 2", "2"),
        ("--plan-update none", "plan-update"),
    ],
    "latent_world_model": [("--td-target both", "td-target"), ("--offline", "offline")],
}


def test_words_that_are_no_options(script, nowhere, monkeypatch, capsys):
    """The parser's own message names them; status 2, and nothing is written."""
    for words, fragment in [*WRONG, *WRONG_OWN[script.SCRIPT]]:
        status, out, error = main(script, monkeypatch, capsys, *words.split())
        assert status == 2 and out == "", words
        assert fragment in error and "Traceback" not in error, words
    assert not list(nowhere.iterdir())


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
@pytest.mark.parametrize(
    "option", ["evaluate", "resume", "load-moa", "init", "env-id", "co-players", "exp-name"]
)
@pytest.mark.parametrize("text", ["", "a\0b"])
@pytest.mark.parametrize("rest", [[], ["--total-timesteps", "4096"]])
def test_empty_text_or_a_zero_in_it(script, nowhere, monkeypatch, capsys, option, text, rest):
    """As a variable of the shell that is not set gives it: nothing is trained or written."""
    words = [f"--{option}", text, *rest]
    status, out, error = main(script, monkeypatch, capsys, *words)
    assert status == 2 and out == "", error
    assert f"--{option}" in error or "Unrecognized options: b" in error
    assert "Traceback" not in error
    assert not list(nowhere.iterdir())


@pytest.mark.parametrize(
    "option", ["evaluate", "resume", "load-moa", "init", "env-id", "co-players"]
)
def test_text_longer_than_any_path(script, nowhere, monkeypatch, capsys, option):
    line = refused(script, monkeypatch, capsys, f"--{option}", "x" * 5000)
    assert "xxx" in line
    assert option == "env-id" or len(line) < 700


PLAIN = ["--plan-update", "none"]
SHARES = ["gamma", "gae_lambda", "prosocial", "plan_until", "inter_om_alpha"]
FROM_0 = ["seed", "env_workers", "pretrain_moa_steps", "snapshot_every"]


def wrong_numbers(script):
    """(option, value, the bounds that the message names) of every number."""
    cases = []
    for field in dataclasses.fields(script.Args):
        kind = str(field.type)
        if "int" not in kind and "float" not in kind or "Literal" in kind:
            continue
        values = [-1, 10**30]
        if field.name in SHARES:
            values += [-0.01, 1.01]
        elif "float" not in kind and field.name not in FROM_0:
            values += [0]
        if "float" in kind:
            values += ["nan", "inf", "-inf"]
        cases += [(field.name.replace("_", "-"), value) for value in values]
    return cases


def test_wrong_numbers(script, nowhere, monkeypatch, capsys):
    """Every number has bounds, and a message names the option and the bound."""
    cases = wrong_numbers(script)
    assert len(cases) > 90
    for option, value in cases:
        words = [f"--{option}={value}"]
        line = refused(script, monkeypatch, capsys, *words)
        assert f"--{option} must lie between" in line, (words, line)
    for option, value, bound in (
        ("hidden-size", 9999999, "8192"),
        ("total-timesteps", 99999999999, "1000000000"),
        ("gamma", 1.5, "1"),
        ("num-steps", 0, "1"),
    ):
        line = refused(script, monkeypatch, capsys, f"--{option}", value)
        assert bound in line.split("between")[1] and str(value) in line


@pytest.mark.parametrize(
    "words, fragment",
    [
        (["--total-timesteps", "100", "--num-envs", "8", "--num-steps", "16"], "total-timesteps"),
        (["--env-id", "chess"], "chess"),
        (["--env-id", "msh-4x"], "msh-4x"),
        (["--env-id", "msh-0x4"], "msh-0x4"),
        (["--env-id", "msg-2x2-5d"], "msg-2x2-5d"),
        (["--env-id", "msh-6d"], "msh-6d"),
        (["--env-id", "msh-99x99"], "1024"),
        (["--env-id", "no_such_package.module"], "no_such_package"),
        (["--env-id", "json:no_such_function"], "no_such_function"),
        (["--env-id", "math:pi"], "math:pi"),
        (["--env-id", "mpe2.simple_tag_v3", "--env-kwargs", "{"], "JSON"),
        (["--env-id", "mpe2.simple_tag_v3", "--env-kwargs", '{"no_such": 1}'], "no_such"),
        (["--env-id", "mpe2.simple_tag_v3", "--goal", "oracle"], "oracle"),
        (["--env-id", "mpe2.simple_tag_v3", *PLAIN, "--goal", "oracle"], "oracle"),
        (["--env-id", "mpe2.simple_tag_v3", *PLAIN, "--co-players", "ns"], "'ns'"),
        (["--co-players", "nobody"], "nobody"),
        (["--co-players", "ns,,nh"], "co-player"),
        (["--co-players", "cleaner"], "cleaner"),
        (["--co-players", "nh,."], "no checkpoint at './checkpoint.pt'"),  # an empty folder
        (["--co-players", "no_such_module:player"], "no_such_module"),
        (["--co-players", "json:nobody"], "nobody"),
        (["--co-players", "x:" + "y" * 5000], "x:y"),
        (["--freeze-moa"], "--load-moa"),
        (["--load-moa", "nowhere"], "nowhere"),
        (["--goal", "none", "--pretrain-moa-steps", "100"], "--pretrain-moa-steps"),
        (["--goal", "oracle", "--pretrain-moa-steps", "100"], "--pretrain-moa-steps"),
        (["--goal", "none", "--plan-update", "none", "--freeze-moa"], "--freeze-moa"),
        (["--goal", "none", "--plan-update", "none", "--load-moa", "."], "no checkpoint"),
    ],
)
def test_wrong_command_lines(script, nowhere, monkeypatch, capsys, words, fragment):
    if "--plan-update" in words and not plans(script):
        place = words.index("--plan-update")
        words = [*words[:place], *words[place + 2 :]]
    assert fragment in refused(script, monkeypatch, capsys, *words)


@pytest.mark.only("hop_ppo_gumbel")
@pytest.mark.parametrize("goals", [3, 7])
def test_one_goal_for_each_needs_as_many_and_not_too_many(
    script, nowhere, monkeypatch, capsys, goals
):
    words = ["--assignment", "exclusive", "--goals", goals]  # four players
    assert "--assignment exclusive" in refused(script, monkeypatch, capsys, *words)


@pytest.mark.only("hop_mcts")
@pytest.mark.parametrize("words", [[], ["--plan-update", "hop"], ["--plan-update", "offset"]])
def test_the_search_is_of_the_grid_games(script, nowhere, monkeypatch, capsys, words):
    """The line names the scripts that need no simulator of the environment."""
    words = ["--env-id", "mpe2.simple_tag_v3", *words]
    line = refused(script, monkeypatch, capsys, *words)
    for name in set(SCRIPTS) - {"hop_mcts"}:
        assert f"{name}.py" in line
    assert "tree search" in line and "msh and msg" in line


def test_name_of_an_experiment(script, small, nowhere):
    """Any text; a slash makes no folder within the runs."""
    finished = run(script, small(exp_name="a/b ü", total_timesteps=64), nowhere)
    assert "__a_b ü__" in finished.path.name
    assert [path.name for path in nowhere.glob("runs/*")] == [finished.path.name]


def test_runs_folder_that_cannot_be_written(script, nowhere, monkeypatch, capsys):
    """A file is where the folder should be."""
    (nowhere / "runs").write_text("not a folder")
    assert "cannot write" in refused(script, monkeypatch, capsys, "--num-envs", 1, "--num-steps", 8)


def test_no_gpu(script, done, nowhere, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in refused(script, monkeypatch, capsys, "--cuda")
    assert "CUDA" in refused(script, monkeypatch, capsys, "--cuda", "--evaluate", done)


# ------------------------------------------------------------------------------------------------
# Users' co-players
# ------------------------------------------------------------------------------------------------
@pytest.fixture
def players(tmp_path, monkeypatch):
    (tmp_path / "bad_players.py").write_text(PLAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "bad_players"
    sys.modules.pop("bad_players", None)


def test_bad_co_players_in_training(script, players, nowhere, monkeypatch, capsys):
    """Before anything is written, by their names."""
    for name, text in BAD_PLAYERS.items():
        words = ["--env-id", ENV_ID, "--co-players", f"self,{players}:{name}"]
        line = refused(script, monkeypatch, capsys, *words)
        assert f"{players}:{name}" in line and text in line, line


def test_bad_co_players_in_an_evaluation(script, done, players, nowhere, monkeypatch, capsys):
    for name, text in BAD_PLAYERS.items():
        words = ["--evaluate", done, "--co-players", f"{players}:{name}", "--eval-episodes", 2]
        status, out, error = main(script, monkeypatch, capsys, *words)
        assert status == 2 and out == "", name
        assert error.count("\n") == 1, error
        assert f"{players}:{name}" in error and text in error


# ------------------------------------------------------------------------------------------------
# Checkpoints that do not fit
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(script, done, tmp_path_factory):
    """Paths that are no checkpoints of this script, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("files")
    whole = (done / "checkpoint.pt").read_bytes()
    contents = {
        "half": whole[: len(whole) // 2],
        "garbage": b"\x80garbage" * 99,
        "empty": b"",
        "text": b"text\n",
    }
    for name, data in contents.items():
        (folder / f"{name}.pt").write_bytes(data)
    content = script.load_checkpoint(done)
    args = content["args"]
    foreign = {
        "list": [1, 2],
        "bare": {"script": content["script"]},
        "newer": {**content, "args": {**args, "no_such_option": 1}},
        "weights": {**content, "agent": {"x": torch.zeros(3)}},
        "options": {**content, "args": [1]},
        "other_script": {**content, "script": "another_script", "agent": {}},
    }
    for name, value in foreign.items():
        torch.save(value, folder / f"{name}.pt")
    (folder / "folder.pt").mkdir()
    paths = sorted(folder.iterdir())
    assert len(paths) == 11
    return [*paths, folder / "missing.pt"]


@pytest.mark.parametrize(
    "option", ["--resume", "--init", "--load-moa", "--evaluate", "--co-players"]
)
def test_wrong_checkpoints(script, files, nowhere, monkeypatch, capsys, recwarn, option):
    """One line with the path; beside it torch warns of a file that begins like an odd pickle."""
    for path in files:
        if path.name == "newer.pt" and option in ("--load-moa", "--co-players"):
            continue  # what is read of it fits
        line = refused(script, monkeypatch, capsys, "--env-id", ENV_ID, option, path)
        assert path.name in line, line
    warned = ["pickle protocol 103" in str(warning.message) for warning in recwarn]
    assert len(warned) <= 1 and all(warned)  # of the garbage


WRONG_PLAY = {  # options of --evaluate
    "hop_onestep": ["--plan-samples 0"],
    "hop_mcts": ["--num-simulations 0", "--num-goal-samples 0"],
    "hop_ppo_gumbel": ["--assignment exclusive --env-id msh-3x3-4p-2h1s"],  # of three goals
    "latent_world_model": ["--plan-samples 0", "--co-player-model cleaner"],
}


def test_checkpoints_of_other_runs(script, done, nowhere, monkeypatch, capsys):
    base = ["--env-id", ENV_ID]
    sizes = ["--hidden-size", 16, "--goal-size", 3]
    for words in (
        ["--resume", done, "--env-id", "msg"],
        ["--resume", done, "--num-envs", 5],
        ["--init", done, "--hidden-size", 17],
        ["--init", done, "--env-id", "msg", "--co-players", "self"],
        ["--load-moa", done, "--env-id", "msg"],
        [*base, "--load-moa", done, "--hidden-size", 9, "--goal-size", 3],
        [*base, *sizes, "--load-moa", done, "--goal", "oracle"],
        ["--env-id", "msg", "--co-players", done],
        ["--evaluate", done, "--env-id", "msg", "--co-players", "cleaner"],
        ["--evaluate", done, "--co-players", "cleaner"],
        ["--evaluate", done, "--co-players", "nh,nh,nh"],
        ["--evaluate", done, "--eval-episodes", 0],
        ["--evaluate", done, "--num-envs", 0],
        ["--evaluate", done, "--match-episodes", 0],
        *(["--evaluate", done, *words.split()] for words in WRONG_PLAY[script.SCRIPT]),
    ):
        line = refused(script, monkeypatch, capsys, *words)
        assert "error: " in line


def test_pickles_are_not_run(script, nowhere, monkeypatch, capsys):
    """A file that would run code when it is loaded by Python's pickle."""

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, ("harmed",))

    torch.save({"script": Bomb(), "args": {}, "agent": {}}, nowhere / "bomb.pt")
    refused(script, monkeypatch, capsys, "--evaluate", "bomb.pt")
    assert not (nowhere / "harmed").exists()


# ------------------------------------------------------------------------------------------------
# As a process, under another name
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def experiment(script, done, tmp_path_factory):
    """A copy of the script, `my-exp.py`, in a folder of its own; its run, which began from a run of
    the original and had that among its co-players, was ended by SIGTERM: status, output, path."""
    folder = tmp_path_factory.mktemp("experiment")
    copied = folder / "my-exp.py"
    shutil.copy(script.__file__, copied)
    options = {"init": done, "co_players": f"self,{done}", "num_steps": 64}
    options |= {"total_timesteps": 10**7, "checkpoint_every": 10**6}
    process = subprocess.Popen(
        [sys.executable, copied, *arguments(**options)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob("runs/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    (path,) = folder.glob("runs/*")
    return {"copy": copied, "status": process.returncode, "out": out, "error": error, "path": path}


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_sigterm_ends_a_process_with_a_checkpoint(script, experiment):
    assert experiment["status"] == 143, experiment["error"]
    assert "ends after this iteration" in experiment["error"]
    assert "Traceback" not in experiment["error"]
    global_step, *_ = script.load_checkpoint(experiment["path"])["progress"]
    assert global_step > 0
    assert f"stopped at step {global_step}:" in experiment["out"]


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_run_of_a_copy_under_another_name(script, done, experiment):
    assert experiment["path"].name.startswith(f"{ENV_ID}__")
    content = script.load_checkpoint(experiment["path"])
    assert content["script"] == "my-exp"
    assert not torch.equal(
        weights_of(script, experiment["path"])["actor"], weights_of(script, done)["actor"]
    )


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_original_plays_and_goes_on_from_a_copys_run(script, experiment, tmp_path, monkeypatch):
    path = str(experiment["path"])
    result = script.evaluate(path, path, episodes=4, match_episodes=2)
    assert len(result["focal_returns"]) == 4
    monkeypatch.chdir(tmp_path)
    options = {"co_players": f"self,{path}", "num_steps": 64, "total_timesteps": 64}
    words = arguments(init=path, **options)
    finished = run(script, script.parse_arguments(words), tmp_path)
    assert script.load_checkpoint(finished.path)["progress"][0] == 64
    steps = script.load_checkpoint(path)["progress"][0]
    words = ["--resume", path, "--total-timesteps", str(steps + 64)]
    resumed = run(script, script.parse_arguments(words), tmp_path)
    assert resumed.path == experiment["path"]
    assert script.load_checkpoint(path)["progress"][0] == steps + 64


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_refusal_as_a_process(experiment):
    """What the shell sees: status 2, one line, nothing on standard output, nothing written."""
    folder = experiment["copy"].parent
    before = sorted(folder.rglob("*"))
    words = [sys.executable, experiment["copy"], "--resume", "nowhere"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    finished = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 2 and finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("my-exp.py: error: ") and "nowhere" in line
    assert sorted(folder.rglob("*")) == before
