import errno
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from torch import nn

import command
import files
import weights
from command import BadInput


def test_tensors_and_typed_metadata_come_back(tmp_path):
    meta = {"n": 3, "x": 0.5, "config": {"channels": [1, 2]}, "none": None, "text": "a\nb"}
    files.save_safetensors(tmp_path / "a" / "f.safetensors", {"w": torch.arange(6).view(2, 3).T}, meta)
    tensors, read = files.load_safetensors(tmp_path / "a" / "f.safetensors")
    assert read == meta == files.load_metadata(tmp_path / "a" / "f.safetensors")
    files.save_safetensors(tmp_path / "again.safetensors", {"w": torch.arange(6).view(2, 3).T}, meta)
    one, again = (files.file_hash(tmp_path / name) for name in ("a/f.safetensors", "again.safetensors"))
    assert one == again
    assert list(tensors) == ["w"] and torch.equal(tensors["w"], torch.arange(6).view(2, 3).T)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "f.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(file) as tmp:
        tmp.write_text("half")
        raise RuntimeError("disk full")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_a_load_that_does_not_fit_lists_everything(tmp_path):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    tensors = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "1.weight": torch.zeros(1, 3),
               "2.x": torch.zeros(1)}
    expected = r"not set: 1.bias; not read: 2.x; other shapes: 0.bias expected \(3,\), got \(4,\)"
    with pytest.raises(BadInput, match=expected):
        weights.load_state(net, tensors, "f.safetensors")


@pytest.mark.parametrize("error, status, said", [
    (BadInput("no such thing"), 2, "error: no such thing\n"), (KeyboardInterrupt(), 130, None)])
def test_exit_status_of_a_command(error, status, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        command.run_command(main)
    assert stopped.value.code == status
    if said:
        assert capsys.readouterr().err == said


def test_a_device_that_is_not_here_is_one_line():
    assert command.best_device("cpu") == torch.device("cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(BadInput, match=f"--device {name}: not a device of this machine"):
            command.best_device(name)


@pytest.mark.parametrize("error, line", [
    (PermissionError(errno.EACCES, "Permission denied", "/runs/x"), "error: /runs/x: Permission denied\n"),
    (OSError(errno.ENOSPC, "No space left"), f"error: [Errno {errno.ENOSPC}] No space left\n")])
def test_a_folder_or_disk_that_cannot_be_written_is_one_line(error, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        command.run_command(main)
    assert stopped.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.parametrize("error", [OSError("a worker died"), ConnectionError(errno.ECONNRESET, "reset")])
def test_an_os_error_without_a_file_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(OSError) as kept:
        command.run_command(main)
    assert kept.value is error


def test_a_closed_pipe_ends_a_command_quietly():
    """As in `command | head -1`: status 141, as of any program that a closed pipe ends, and no traceback."""
    code = ("import command\n"
            "def main():\n"
            "    while True:\n"
            "        print('a line', flush=True)\n"
            "command.run_command(main)\n")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr.read() == ""
