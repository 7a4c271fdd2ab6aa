"""The command line: how options are read, what is refused, a copy under another name."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from conftest import HUNT, SCRIPTS, one_script
from run_tools import arguments, run

SHARES = ["gamma", "gae_lambda", "prosocial", "plan_until", "inter_om_alpha"]
FROM_0 = ["seed", "env_workers", "pretrain_moa_steps", "snapshot_every"]
TAG = "--env-id mpe2.simple_tag_v3"
WRONG = {  # and what the line says
    "--hidden-size 9999": "--hidden-size must be 1 to 8192, not 9999",
    "--total-timesteps 100 --num-envs 8 --num-steps 16": "total-timesteps",
    "--env-id chess": "chess",
    "--env-id no_such_package.module": "no_such_package",
    "--env-id json:no_such_function": "no_such_function",
    f'{TAG} --env-kwargs {{"no_such":1}}': "no_such",
    '--env-kwargs {"N":4}': "--env-kwargs is for PettingZoo",
    f"{TAG} --goal oracle": "oracle",
    f"{TAG} --co-players ns": "'ns'",
    "--co-players nh,.": "no checkpoint at './checkpoint.pt'",  # an empty folder
    f"--co-players x:{'y' * 5000}": "x:y",
    "--freeze-moa": "--load-moa",
    "--goal none --pretrain-moa-steps 100": "--pretrain-moa-steps",
    "--evaluate DONE --cuda": "CUDA",
    "--num-envs 1 --num-steps 8": "cannot write",  # a file is where the folder should be
    "--resume DONE --env-id msg": "'nh' is no co-player",
    "--resume DONE --num-envs 5": "--num-envs was 4",
    "--resume DONE --learning-rate 0.5": "--learning-rate was 0.001",
    "--resume DONE --hidden-size 17": "--hidden-size was 16",
    "--init DONE --hidden-size 17": "does not fit",
    "--load-moa DONE --env-id msg": "--load-moa",
    f"--env-id {HUNT} --hidden-size 16 --goal-size 3 --load-moa DONE --goal oracle": "--load-moa",
    "--env-id msg --co-players DONE": "does not fit",
    "--evaluate DONE --eval-episodes 0": "at least 1",
    "--evaluate DONE --horizon 9 --num-steps 8": "reads no --horizon, --num-steps",
}


def test_every_option_can_be_given(script, typed, command):
    """By its name with hyphens, and it arrives; the help names it."""
    values = {}
    for field in dataclasses.fields(script.Args):
        kind = str(field.type)
        if "Literal" in kind:
            choices = kind.split("Literal[")[1].split("]")[0].replace("'", "").split(", ")
            values[field.name] = next(choice for choice in choices if choice != field.default)
        elif isinstance(field.default, bool):
            values[field.name] = not field.default
        elif "int" in kind or "float" in kind:
            values[field.name] = 3
        elif field.name not in ("evaluate", "resume", "init"):
            values[field.name] = "word"
    assert dataclasses.asdict(typed(**values)) == {**dataclasses.asdict(script.Args()), **values}
    status, out, _ = command("--help")
    assert status == 0 and all(f"--{name.replace('_', '-')}" in out for name in values)


@one_script
def test_switches_take_a_value_as_well(script, typed):
    """`--cuda False` is `--no-cuda`, `--cuda True` is `--cuda`."""
    other = dataclasses.replace(script.Args(), seed=3, anneal=False, track=True)
    for words in ("--anneal false --track True --seed 3", "--seed 3 --no-anneal --track"):
        assert typed(words) == other
    assert typed("--exp-name true-goals").exp_name == "true-goals"


@one_script
@pytest.mark.parametrize(
    "words",
    """--no-such-option=1 stray --num-envs=1.5 --learning-rate=fast --moa-buffer=balanced
    --plan-update=search --num-simulations=4 --resume= --init= --evaluate= --load-moa= --env-id=
    --co-players= --exp-name= --resume=a\0b --env-id=a\0b --exp-name=a\0b""".split(),
)
def test_words_that_are_no_options(command, tmp_path, words):
    """The message names them, and nothing is written; also what an empty shell variable gives."""
    status, out, error = command(*words.split("=", 1))
    assert status == 2 and out == ""
    assert words.split("=")[0] in error or "Unrecognized options: b" in error
    assert "Traceback" not in error and not list(tmp_path.iterdir())


def test_wrong_numbers(script):
    """Every number has bounds, and a message names the option and the bounds."""
    game = script.GridGame(HUNT)
    for field in dataclasses.fields(script.Args):
        kind = str(field.type)
        if "int" not in kind and "float" not in kind or "Literal" in kind:
            continue
        number = float if "float" in kind else int
        values = [-1, 1.01 if field.name in SHARES else 10**30]
        values += [float("nan")] if number is float else [0] * (field.name not in FROM_0)
        option = field.name.replace("_", "-")
        for value in map(number, values):
            with pytest.raises(script.UsageError, match=f"--{option} must be"):
                script.checked(dataclasses.replace(script.Args(), **{field.name: value}), game)
        args = dataclasses.replace(script.Args(), **{field.name: number(field.name not in FROM_0)})
        assert field.name == "total_timesteps" or script.checked(args, game)


@one_script
@pytest.mark.parametrize("words", WRONG)
def test_wrong_command_lines(done, refuse, monkeypatch, words):
    """DONE is a run: some do not go together with it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "cannot write" in WRONG[words]:
        open("runs", "w").close()
    line = refuse(words.replace("DONE", str(done)))
    assert WRONG[words] in line and len(line) < 700


def test_wrong_command_lines_of_one_script(script, refuse):
    words = {
        "hop_mcts": f"{TAG} --plan-update hop",
        "hop_ppo_gumbel": "--assignment exclusive --goals 3",  # of four players
        "latent_world_model": "--co-player-model cleaner",
    }
    line = refuse(words.get(script.SCRIPT, "--plan-samples 0"))
    if script.SCRIPT == "hop_ppo_gumbel":
        assert "at most 6" in line and line == refuse("--assignment exclusive --goals 7")
    if script.SCRIPT == "hop_mcts":  # the line names those that need no simulator
        assert all(f"{name}.py" in line for name in set(SCRIPTS) - {"hop_mcts"})


@one_script
def test_name_of_an_experiment(script, small, tmp_path):
    """Any text; a slash makes no folder within the runs. Two runs at once have two folders."""
    paths = [run(script, small(exp_name="a/b ü", total_timesteps=64)).path for _ in range(2)]
    assert sorted(tmp_path.glob("runs/*")) == sorted(paths)
    assert "__a_b ü__" in paths[0].name and paths[0] != paths[1]


def failing(observation, action_mask, clock, generator):
    raise KeyError("what it needs")


@one_script
def test_co_player_that_fails(done, refuse):
    """It is named, in training before anything is written."""
    for words in (f"--env-id {HUNT}", f"--evaluate {done} --eval-episodes 2"):
        line = refuse(f"{words} --co-players test_command_line:failing")
        assert "test_command_line:failing" in line and "what it needs" in line


@one_script
@pytest.mark.parametrize("option", "--resume --init --load-moa --evaluate --co-players".split())
def test_wrong_checkpoints(script, done, refuse, tmp_path, option):
    """One line with the path; code in a file is not run."""

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harmed"),))

    content = script.load_checkpoint(done)
    contents = {
        "bare": {"script": content["script"]},
        "weights": {**content, "agent": {"x": torch.zeros(3)}},
        "options": {**content, "args": [1]},
        "other_script": {**content, "script": "another_script", "agent": {}},
        "bomb": {**content, "played": Bomb()},
    }
    if option in ("--resume", "--init", "--evaluate"):  # else what is read of it fits
        contents["newer"] = {**content, "args": {**content["args"], "no_such_option": 1}}
    for name, value in contents.items():
        torch.save(value, tmp_path / f"{name}.pt")
    (tmp_path / "half.pt").write_bytes((done / "checkpoint.pt").read_bytes()[:9999])
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "folder.pt").mkdir()
    for path in [*tmp_path.glob("*.pt"), tmp_path / "missing.pt"]:
        assert path.name in refuse("--env-id", HUNT, option, path)
    assert not (tmp_path / "harmed").exists()


def test_run_of_another_script_is_no_run_of_this_one(script, sibling, refuse):
    """To evaluate, to go on with or to start from."""
    options = {"env_id": HUNT, "num_envs": 1, "num_steps": 4, "total_timesteps": 4}
    foreign = run(sibling, sibling.Args(**options, hidden_size=8)).path
    for option in ("--evaluate", "--resume", "--init"):
        assert "run of other options" in refuse(option, foreign)


@one_script
def test_killed_run_of_a_copy_under_another_name(script, done, typed, tmp_path):
    """It began from a run of the original and has that among its co-players; while it lives its
    run is its own. The original plays its run and goes on from it. What the shell sees of a
    refusal: status 2, one line, nothing on standard output."""
    copied = shutil.copy(script.__file__, tmp_path / "my-exp.py")
    options = {"init": done, "co_players": f"self,{done}", "num_steps": 64}
    options |= {"total_timesteps": 10**7, "checkpoint_every": 1, "snapshot_every": 1}
    where = {"cwd": tmp_path, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    where |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, copied, *arguments(**options)], **where)
    try:
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("runs/*/*.pt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        (path,) = tmp_path.glob("runs/*")
        args = typed(resume=path)
        with pytest.raises(script.UsageError, match=path.name):
            run(script, args)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    step = script.load_checkpoint(path)["progress"][0] + 64
    assert run(script, dataclasses.replace(args, total_timesteps=step)).path == path
    assert script.load_checkpoint(path)["progress"][0] == step
    assert len(script.evaluate(path, str(path), episodes=2)["focal_returns"]) == 2
    finished = subprocess.run([sys.executable, copied, "--resume", "nowhere"], **where)
    assert finished.returncode == 2 and finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("my-exp.py: error: ") and "nowhere" in line
