"""A single command ends in its result, or in one line that says what to do: never in a traceback.

Sceptical questions: is a bug of ours hidden by it? does every command have it?
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from specrepro import assets, commands

PACKAGE = Path(commands.__file__).parent
OWN_WAY = {"__main__", "tree_kernel"}  # the last runs kernel_timings


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("share is 3; give a part"), 1),
        (FileNotFoundError(2, "No such file", "runs/corpus"), 1),
        (assets.AssetError("the target is not there; set SPECREPRO_CACHE"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_could_be_foreseen_is_one_line(error, status, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        commands.run(raising, error)
    told = capsys.readouterr().err
    assert left.value.code == status and told.count("\n") == 1 and str(error) in told


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(error) -> None:
    with pytest.raises(type(error)):
        commands.run(raising, error)


def test_exit_status_is_the_commands_own_or_0() -> None:
    for returned, status in ((None, 0), (3, 3), ({"rows": 1}, 0)):
        with pytest.raises(SystemExit) as left:
            commands.run(lambda returned=returned: returned)
        assert left.value.code == status


def test_every_command_ends_so() -> None:
    ending = re.compile(r'if __name__ == "__main__":\n(.*)', re.DOTALL)
    found = {path.stem: ending.search(path.read_text()) for path in PACKAGE.glob("*.py")}
    others = {name for name, end in found.items() if end and "commands.run(" not in end[1]}
    assert others == OWN_WAY


@pytest.mark.parametrize("flags", [[], ["-X", "dev", "-W", "ignore"]])
def test_real_command_names_the_folder_that_is_not_there(flags, tmp_path) -> None:
    command = [sys.executable, *flags, "-m", "specrepro.eagle3_variants", str(tmp_path / "absent")]
    ran = subprocess.run(
        [*command, "--work", str(tmp_path / "work")], capture_output=True, text=True
    )
    assert ran.returncode == 1 and "absent" in ran.stderr
    assert ("Traceback" in ran.stderr) == bool(flags)
