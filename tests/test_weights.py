import pytest
import torch
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
    assert files.file_hash(tmp_path / "again.safetensors") == files.file_hash(tmp_path / "a" / "f.safetensors")
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
    tensors = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "1.weight": torch.zeros(1, 3), "2.x": torch.zeros(1)}
    with pytest.raises(BadInput, match=r"not set: 1.bias; not read: 2.x; other shapes: 0.bias expected \(3,\), got \(4,\)"):
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


def test_a_folder_that_cannot_be_written_is_one_line(capsys):
    def main():
        raise PermissionError(13, "Permission denied", "/runs/mine")

    with pytest.raises(SystemExit) as left:
        command.run_command(main)
    assert left.value.code == 2 and capsys.readouterr().err == "error: /runs/mine: Permission denied\n"
