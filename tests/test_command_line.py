"""A run that is interrupted or finds the disk full ends in one line and loses nothing it measured.

Interruptions are real signals to real processes; a full disk is a limit on the size of files, or
/dev/full, and neither needs root.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from specrepro import __main__ as command_line
from specrepro import checkpoints, eagle3, experiment, figures, measure, target_model

ONE_LINE = "reproduce.sh: interrupted; nothing measured is lost, go on with --resume\n"


class Started:
    """A process in a session of its own, as from a terminal."""

    def __init__(self, *command: str):
        self._process = subprocess.Popen(
            [sys.executable, *command], cwd=experiment.ROOT, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._heard = b""

    def interrupt_at(self, words: str) -> None:
        """Ctrl-C once `words` were printed on stderr."""
        while words.encode() not in self._heard:
            chunk = os.read(self._process.stderr.fileno(), 65536)
            assert chunk, f"it ended without {words!r}: {self._heard[-2000:].decode()}"
            self._heard += chunk
        os.killpg(self._process.pid, signal.SIGINT)

    def interrupt_at_its_first_child(self) -> None:
        """Ctrl-C as soon as it has started a process."""
        pid = self._process.pid
        while not Path(f"/proc/{pid}/task/{pid}/children").read_text():
            time.sleep(0.01)
        os.killpg(pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """The exit status and everything that was printed on stderr."""
        self._heard += self._process.stderr.read()
        return self._process.wait(), self._heard.decode()

    def kill(self) -> None:
        """Its notebook's process sees that it is gone, and goes too."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """Starts processes that heed Ctrl-C, even where a shell's background job, and so the tests
    themselves, would not; they do not outlive the test.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started: list[Started] = []

    def begin(*command: str) -> Started:
        started.append(Started(*command))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
    signal.signal(signal.SIGINT, before)


PARAMETERS = (
    'tier: str = "smoke"\nresume: bool = False\nfrom_scratch: bool = False\nfigures_dir: str = ""'
)
MAIN = (
    "import sys; from pathlib import Path; from specrepro import __main__ as command_line;"
    " command_line.ROOT = Path(sys.argv[1]); sys.exit(command_line.main(sys.argv[2:]))"
)


def write_notebook(root: Path, *cells: str) -> list[str]:
    """A paper's notebook of these cells below `root`; the arguments that run it there."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in (PARAMETERS, *cells)]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    (root / "notebooks").mkdir()
    nbformat.write(notebook, root / "notebooks" / "eagle3.ipynb")
    return ["eagle3", "-p", "figures_dir", str(root / "figures")]


# --- Ctrl-C


WAITS = "import sys, time\nprint('measuring', file=sys.stderr, flush=True)\ntime.sleep(600)"
IS_CUT_SHORT = """import sys
print("chat: 50%", end="", file=sys.stderr)
raise ValueError("too long")
"""
IS_DEAF = """import sys, time
for what in ("measuring", "deaf"):
    try:
        print(what, file=sys.stderr, flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        pass
"""


def test_ctrl_c_while_a_cell_runs_leaves_one_line(start, tmp_path):
    arguments = write_notebook(tmp_path, WAITS, "print('a cell after the interruption')")
    run = start("-c", MAIN, str(tmp_path), *arguments)
    run.interrupt_at("measuring\n")
    assert run.end() == (130, "measuring\n" + ONE_LINE)
    executed = (tmp_path / "figures" / "eagle3" / "executed.ipynb").read_text()
    assert "KeyboardInterrupt" in executed, "the cell was not ended but abandoned"


def test_a_second_ctrl_c_ends_what_does_not_heed_the_first(start, tmp_path):
    run = start("-c", MAIN, str(tmp_path), *write_notebook(tmp_path, IS_DEAF))
    run.interrupt_at("measuring\n")
    run.interrupt_at("deaf\n")
    assert run.end() == (130, "measuring\ndeaf\n" + ONE_LINE)


def test_ctrl_c_before_the_first_cell_leaves_one_line(start, tmp_path):
    run = start("-c", MAIN, str(tmp_path), *write_notebook(tmp_path, WAITS))
    run.interrupt_at_its_first_child()
    assert run.end() == (130, ONE_LINE)


@pytest.mark.parametrize(("num_interrupts", "ends"), [(1, KeyboardInterrupt), (0, RuntimeError)])
def test_a_process_that_dies_of_the_ctrl_c_before_it_answers_was_interrupted(
    num_interrupts, ends, monkeypatch
):
    def dies(client, **_):
        client.num_interrupts = num_interrupts
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(command_line.PapermillNotebookClient, "execute", dies)
    with pytest.raises(ends):
        command_line._Client.__new__(command_line._Client).execute()


def test_ctrl_c_during_the_imports_leaves_one_line(start):
    run = start("-X", "importtime", "-m", "specrepro", "eagle3", "--dry-run")
    run.interrupt_at(" nbclient\n")
    status, printed = run.end()
    lines = [line for line in printed.splitlines(True) if not line.startswith("import time:")]
    assert (status, lines) == (130, [ONE_LINE])


def test_the_line_stands_by_itself_below_a_bar_that_was_cut_short(tmp_path, monkeypatch, capsys):
    arguments = write_notebook(tmp_path, IS_CUT_SHORT)
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.main(arguments) == 1
    assert capsys.readouterr().err.startswith("chat: 50%\nreproduce.sh: ValueError: too long (see")


def test_a_process_that_dies_by_itself_is_told_from_an_interruption(tmp_path, monkeypatch, capsys):
    arguments = write_notebook(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("reproduce.sh: the process of eagle3.ipynb died, most likely for want")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_every_record_and_keeps_those_it_had(
    start, tiny_chat_folder, tmp_path
):
    target, head = long_context(tiny_chat_folder, tmp_path / "target"), tmp_path / "head"
    save_some_head(target, head)
    command = ["-m", "specrepro", "eagle3", "--tier", "smoke", "-p", "target", str(target)]
    command += ["-p", "checkpoint", str(head), "-p", "figures_dir", str(tmp_path)]
    run = start(*command)
    run.interrupt_at("maths, T = 1:")
    status, printed = run.end()
    assert status == 130 and printed.endswith("\n" + ONE_LINE) and "Traceback" not in printed
    records = tmp_path / "eagle3" / "records" / "smoke" / "decoded.jsonl"
    kept = records.read_bytes()
    assert len(measure.read_records(records)) >= 8
    assert start(*command, "--resume").end()[0] == 0
    assert records.read_bytes().startswith(kept), "a record was lost or measured again"
    found = [record.key for record in measure.read_records(records)]
    assert len(set(found)) == len(found) >= 20
    assert json.loads((tmp_path / "eagle3" / "verdict.json").read_text())["claims"]


def long_context(folder: Path, copy: Path) -> Path:
    """The same target with room for the longest prompt in characters."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return copy


def save_some_head(target: Path, folder: Path) -> None:
    loaded = target_model.load(str(target), dtype="float32")
    head = eagle3.DraftHead(eagle3.head_config(loaded, loaded.vocab_size))
    eagle3.save_head(head, folder, eagle3.TreeConfig(depth=2, top_k=2, total_tokens=5))


def test_braces_in_a_folder_are_no_parameters(tmp_path, monkeypatch, capsys):
    arguments = write_notebook(tmp_path, "raise ValueError('reached')")
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.main([*arguments[:-1], str(tmp_path / "of {x}")]) == 1
    assert "reproduce.sh: ValueError: reached (see" in capsys.readouterr().err
    assert (tmp_path / "of {x}" / "eagle3" / "executed.ipynb").is_file()


# --- a full disk


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """No file grows beyond this, as where a disk or a quota is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def a_record(number: int) -> measure.Record:
    return measure.Record(
        method="Autoregressive", prompts="chat", prompt_id=f"q{number}", temperature=0.0, seed=0,
        batch=1, repeat=0, group=f"q{number}", max_new_tokens=8, top_p=1.0, top_k=0, target="tiny",
        dtype="float32", tokens=[5, 6, 7], new_tokens=3, seconds=0.5,
    )  # fmt: skip


def test_records_appended_before_the_disk_filled_stay_readable(tmp_path):
    path = tmp_path / "decoded.jsonl"
    with files_of_at_most(10_000), pytest.raises(OSError) as refusal:
        for number in range(1000):
            measure.append_record(path, a_record(number))
    assert tmp_path.name in experiment.no_room(str(refusal.value), tmp_path)
    whole = measure.read_records(path)
    assert whole == [a_record(number) for number in range(len(whole))] and len(whole) > 5
    assert path.stat().st_size == 10_000, "no record was torn, so nothing was tried"
    measure.append_record(path, a_record(1000))
    assert measure.read_records(path) == [*whole, a_record(1000)]


def save_tensors(folder: Path, size: int) -> None:
    checkpoints.save_tensors(folder / "model.safetensors", {"weight": torch.ones(size)})


def save_table(folder: Path, size: int) -> None:
    table = pd.DataFrame({"tier": ["smoke"] * size, "tau": range(size)})
    experiment.replace_rows(folder / "results.csv", table, "smoke")


@pytest.mark.parametrize("save", [save_tensors, save_table])
def test_what_is_replaced_in_one_step_stays_as_it_was_when_the_disk_is_full(save, tmp_path):
    save(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_of_at_most(5_000), pytest.raises(Exception) as refusal:
        save(tmp_path, 5_000)
    assert "make room there" in experiment.no_room(str(refusal.value), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_figure_that_does_not_fit_is_told_as_a_full_disk(tmp_path):
    with files_of_at_most(100), pytest.raises(OSError) as refusal:
        figures.save(Figure(), tmp_path, "fig_1")
    assert "make room there" in experiment.no_room(str(refusal.value), tmp_path)


def test_the_line_names_the_folder_and_the_remedy_for_a_full_device_alone(tmp_path):
    with pytest.raises(OSError) as refusal, open("/dev/full", "w") as full:
        full.write("a row")
        full.flush()
    assert experiment.no_room(str(refusal.value), tmp_path) == (
        f"cannot write to {tmp_path} (No space left on device); make room there and go on with"
        " --resume, or choose another with -p figures_dir FOLDER"
    )
    assert experiment.no_room("unknown dtype 'int3'", tmp_path) is None


def test_a_full_cache_is_told_from_a_full_folder(tmp_path, monkeypatch):
    disk = tmp_path / "disk of the cache"
    disk.mkdir()
    monkeypatch.setenv("SPECREPRO_CACHE", str(disk / "not yet there"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: SimpleNamespace(free=0 if place == disk else 10**9)
    )
    line = experiment.no_room("[Errno 28] No space left on device", tmp_path / "figures")
    assert line.startswith(f"cannot write to {disk / 'not yet there'} (No space left on device)")
    assert line.endswith("or set SPECREPRO_CACHE to a larger disk")


FILLS_THE_DISK = """import resource
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
with (Path(figures_dir) / "rows").open("w", buffering=1) as file:
    while True:
        file.write("a row\\n")
"""


def test_a_run_that_fills_the_disk_ends_in_one_line(tmp_path, monkeypatch, capsys):
    arguments = write_notebook(tmp_path, FILLS_THE_DISK)
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    assert command_line.main(arguments) == 1
    folder = tmp_path / "figures" / "eagle3"
    said = capsys.readouterr().err
    assert said.startswith(f"reproduce.sh: cannot write to {folder} (File too large); make room")
    assert said.count("\n") == 1
    assert (tmp_path / "figures" / "rows").read_text().startswith("a row\n" * 800)


def test_a_notebook_that_cannot_be_kept_ends_in_the_same_line(tmp_path, monkeypatch, capsys):
    arguments = write_notebook(tmp_path, "print('a row ' * 2000)")
    monkeypatch.setattr(command_line, "ROOT", tmp_path)
    with files_of_at_most(8_000):
        assert command_line.main(arguments) == 1
    said = capsys.readouterr().err
    assert f"cannot write to {tmp_path / 'figures' / 'eagle3'} (File too large)" in said
    assert "Traceback" not in said
