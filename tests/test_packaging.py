"""Two commands from a fresh machine: the pins agree, and `reproduce.sh` does what its help says.

`reproduce.sh` runs here in a copy beside a stand-in for Python that only notes how it was called,
so setting up takes milliseconds and needs no network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import specrepro

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PINS = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]

# notes its arguments; `-m venv` makes an environment of itself; `-m pip` ends as the test says
STAND_IN = """#!/bin/sh
echo "$*" >> calls
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip "*) echo "pip was here"; eval "$DURING_PIP" ;;
  "-m "*) echo "interpret=${TRITON_INTERPRET-unset} $*" ;;
esac
"""
NO_PYTHON = "#!/bin/sh\nexit 1\n"


@dataclass(frozen=True, slots=True)
class FreshMachine:
    """A folder with the project's set-up files, and a PATH on which our stand-ins come first."""

    folder: Path
    bin: Path

    def has(self, *commands: str, script: str = STAND_IN) -> None:
        for command in commands:
            (self.bin / command).write_text(script)
            (self.bin / command).chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.bin), "/usr/bin", "/bin"])
        return subprocess.run(
            [str(self.folder / "reproduce.sh"), *arguments],
            env={"PATH": path, "DURING_PIP": "exit 0"} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installations(self) -> int:
        """How often pip was asked to install since the machine was new."""
        return (self.folder / "calls").read_text().count("-m pip install")


@pytest.fixture
def machine(tmp_path: Path) -> FreshMachine:
    fresh = FreshMachine(tmp_path / "project", tmp_path / "bin")
    fresh.folder.mkdir()
    fresh.bin.mkdir()
    for name in ("reproduce.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, fresh.folder)
    fresh.has("python3.11", "python3.12", "python3", "python")
    return fresh


def test_conda_and_pip_install_the_same_pins() -> None:
    *pins, ourselves = ENVIRONMENT["dependencies"][-1]["pip"]
    assert sorted(pins) == sorted(PINS)
    assert ourselves == "-e ."


@pytest.mark.parametrize("pin", PINS)
def test_pin_is_exact(pin: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)+", pin)


def test_version_is_written_once() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", specrepro.__version__)


def test_license_is_the_plain_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


@pytest.mark.parametrize("script", ["reproduce.sh", ".ci/run"])
def test_script_is_executable_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_printed_before_anything_is_set_up(option: str, machine: FreshMachine) -> None:
    answer = machine.run(option)
    assert answer.returncode == 0
    assert answer.stdout.startswith("usage: ./reproduce.sh <paper>")
    assert not (machine.folder / ".venv").exists()


@pytest.mark.parametrize("arguments", [[], ["--tier", "smoke"]])
def test_call_without_a_paper_exits_2_with_the_usage(
    arguments: list[str], machine: FreshMachine
) -> None:
    answer = machine.run(*arguments)
    assert answer.returncode == 2
    assert "usage: ./reproduce.sh <paper>" in answer.stderr
    assert not (machine.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "handed_over"),
    [
        (["list"], "-m specrepro list"),
        (
            ["cast", "--tier", "smoke", "-p", "seed", "1"],
            "-m specrepro cast --tier smoke -p seed 1",
        ),
        (["test", "-k", "imports"], "-m pytest -k imports"),
        (["lab"], "-m jupyterlab --ip=127.0.0.1"),
    ],
)
def test_arguments_are_handed_to_python_unchanged(
    arguments: list[str], handed_over: str, machine: FreshMachine
) -> None:
    answer = machine.run(*arguments)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == f"interpret=unset {handed_over}\n"


def test_argument_with_spaces_stays_one_argument(machine: FreshMachine) -> None:
    machine.has("python3.11", script=STAND_IN.replace('$*" ;;\nesac', '$#" ;;\nesac'))
    answer = machine.run("cast", "-p", "target", "a folder")
    assert answer.stdout == "interpret=unset 6\n"


def test_second_run_installs_nothing(machine: FreshMachine) -> None:
    assert "setting up" in machine.run("list").stderr
    assert machine.run("list").stderr == ""
    assert machine.installations() == 1


def test_changed_pins_are_installed_into_the_same_environment(machine: FreshMachine) -> None:
    machine.run("list")
    (machine.folder / ".venv" / "kept").touch()
    with (machine.folder / "pyproject.toml").open("a") as project:
        project.write("# another pin\n")
    machine.run("list")
    assert machine.installations() == 2
    assert (machine.folder / ".venv" / "kept").exists()


def test_failed_installation_is_shown_and_tried_again(machine: FreshMachine) -> None:
    answer = machine.run("list", DURING_PIP="exit 1")
    assert answer.returncode == 1
    assert "pip was here" in answer.stderr
    assert "the installation failed" in answer.stderr
    assert answer.stdout == "", "nothing may run on half an environment"
    (machine.folder / ".venv" / "kept").touch()
    assert machine.run("list").returncode == 0
    assert machine.installations() == 2
    assert (machine.folder / ".venv" / "kept").exists(), (
        "what pip left in good order was thrown away"
    )


def test_killed_installation_is_started_from_nothing(machine: FreshMachine) -> None:
    killed = machine.run("list", DURING_PIP="touch .venv/half; kill -9 $PPID; exit 1")
    assert killed.returncode != 0
    assert (machine.folder / ".venv" / "half").exists(), "the kill came too early to matter"
    assert machine.run("list").returncode == 0
    assert not (machine.folder / ".venv" / "half").exists()


def test_active_environment_with_specrepro_is_used_as_it_is(machine: FreshMachine) -> None:
    answer = machine.run("list", VIRTUAL_ENV="elsewhere")
    assert answer.stdout == "interpret=unset -m specrepro list\n"
    assert not (machine.folder / ".venv").exists()


def test_active_environment_without_specrepro_is_left_alone(machine: FreshMachine) -> None:
    machine.has("python", script=NO_PYTHON)
    assert machine.run("list", CONDA_PREFIX="elsewhere").returncode == 0
    assert (machine.folder / ".venv").exists()


def test_machine_without_a_fitting_python_is_told_so(machine: FreshMachine) -> None:
    machine.has("python3.11", "python3.12", "python3", script=NO_PYTHON)
    answer = machine.run("list")
    assert answer.returncode == 1
    assert "needs Python 3.11 or 3.12" in answer.stderr
    assert not (machine.folder / ".venv").exists()


def test_missing_debian_packages_are_named_in_one_line(machine: FreshMachine) -> None:
    lacks_both = '#!/bin/sh\ncase "$*" in *ensurepip*|*Python.h*) exit 1 ;; esac\n'
    machine.has("python3.11", script=lacks_both)
    answer = machine.run("list")
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "apt-get install python3.11-venv python3.11-dev" in answer.stderr
