import command
from command import BadInput

import argparse
import errno
import json
import os
import stat
import struct
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from torch import nn

import files
import weights


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
    (OSError(errno.ENOSPC, "No space left"), f"error: [Errno {errno.ENOSPC}] No space left\n"),
    (BadInput("a\nb\x1b[2J\udce9.png"), "error: a?b?[2J?.png\n")])
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


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_too_little_memory_is_one_line_with_the_ways_out(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        command.run_command(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith("error: out of memory (")
    assert all(flag in said for flag in ("--batch-size", "--accumulate", "--size"))


def test_a_console_without_a_character_prints_a_question_mark():
    code = "import command\ncommand.run_command(lambda: print('\\U0001fa7a caf\\udce9'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stdout.strip()) == (0, b"? caf?"), done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 1.5, 10**400])
def test_a_number_outside_its_range_is_one_line(value):
    args = argparse.Namespace(p_uncond=value)
    with pytest.raises(BadInput, match="--p-uncond .*expected a finite number from 0 up to 1"):
        command.check_range(args, 0, 1, "p_uncond")
    for fine in (None, 0, 1, 0.5):
        command.check_range(argparse.Namespace(p_uncond=fine), 0, 1, "p_uncond")


def test_a_disk_error_names_the_file(tmp_path):
    """Not the hidden one beside it, and not none, as the error of a write does."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), None):
        with pytest.raises(OSError) as kept, files.replacing(tmp_path / "f.bin") as tmp:
            raise error or OSError(errno.EACCES, "Permission denied", str(tmp))
        assert kept.value.filename == str(tmp_path / "f.bin")


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.save_safetensors(tmp_path / "w.safetensors", {"w": torch.zeros(2)})
        files.write_json(tmp_path / "c.json", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {0o640}


def header(content, body=b""):
    return struct.pack("<Q", len(content)) + content + body


def one_tensor(metadata):
    meta = json.dumps({"json": metadata})
    content = b'{"__metadata__":%s,"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}' % meta.encode()
    return header(content, b"x")


@pytest.mark.parametrize("content, said", [
    (b"", "not a whole safetensors file"), (struct.pack("<Q", 2**60) + b"{}", "not a whole safetensors file"),
    (header(b"[" * 100_000), "not a whole safetensors file"),
    (header(b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', b"1234"), "not a whole safetensors"),
    (one_tensor("{"), "expected a JSON object as its metadata"),
    (one_tensor("[" * 100_000), "expected a JSON object as its metadata"),
    (one_tensor("[1]"), "expected a JSON object as its metadata"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-lfs pointer")])
def test_a_broken_safetensors_file_is_one_line_and_made_again_in_a_cache(tmp_path, content, said):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    for read in (files.load_safetensors, files.load_metadata, files.read_state):
        with pytest.raises(BadInput, match=f"w.safetensors: {said}"):
            read(path)
    tensors, _ = files.cached(path, lambda: ({"w": torch.ones(2)}, None))
    assert torch.equal(files.load_safetensors(path)[0]["w"], tensors["w"])


@pytest.mark.parametrize("content", ["[1]", "3", "[" * 100_000, '{"a":' * 100_000, "{", "\udce9"])
def test_a_json_file_that_is_no_object_is_one_line(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(BadInput, match="c.json: ") as error:
        files.read_json(tmp_path / "c.json")
    assert len(str(error.value)) < 300


def test_a_pickle_of_objects_is_not_unpickled(tmp_path):
    torch.save({"w": argparse.Namespace()}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="w.pth: not a file of tensors only: the rest is not unpickled"):
        files.read_state(tmp_path / "w.pth")
    for content in (b"", b"\x80", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(BadInput, match="w.pth: "):
            files.read_state(tmp_path / "w.pth")


def test_a_name_that_is_not_utf8_has_a_hash_of_its_own():
    assert files.text_hash("caf\udce9") not in (files.text_hash("caf"), files.text_hash("caf\udcea"))
    assert files.text_hash("a", 1) == "8bf19097aa1a235b"  # names of caches stay


def test_one_of_two_processes_creates_a_file(tmp_path):
    assert files.create_json(tmp_path / "o/c.json", {"a": 1})
    assert not files.create_json(tmp_path / "o/c.json", {"a": 2})
    assert files.read_json(tmp_path / "o/c.json") == {"a": 1}
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["c.json"]


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """The names of the files whose content is hashed; the memory of hashes is in tmp_path."""
    names, whole = [], files._hash
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_hash", lambda path: names.append(path.name) or whole(path))
    return names


def test_a_checkpoint_is_read_once_and_again_when_it_changes(tmp_path, reads):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    for name in ("unet/w.safetensors", "config.json"):
        (folder / name).write_bytes(b"x" * 100)
    first = files.folder_hash(folder)
    assert sorted(reads) == ["config.json", "w.safetensors"]
    reads.clear()
    assert files.folder_hash(folder) == first and reads == []
    (folder / "unet/w.safetensors").write_bytes(b"y" * 100)
    times = (folder / "config.json").stat()
    os.utime(folder / "unet/w.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    second = files.folder_hash(folder)
    assert second != first and reads == ["w.safetensors"]
    (folder / "unet/w.safetensors").rename(folder / "unet/v.safetensors")
    assert files.folder_hash(folder) not in (first, second)


def test_a_large_file_is_read_once_and_a_cache_that_cannot_be_written_is_done_without(tmp_path, reads):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(2 << 20))
    small.write_bytes(b"x")
    assert files.file_hash(large) == files.file_hash(large)
    assert files.file_hash(small) == files.file_hash(small)
    assert reads == ["large", "small", "small"]
    for note in (tmp_path / "cache/msdm/hashes").iterdir():
        note.write_text("[")
    assert files.file_hash(large) == files._hash(large)
    for note in (tmp_path / "cache/msdm/hashes").iterdir():
        note.unlink()
    (tmp_path / "cache/msdm/hashes").rmdir()
    (tmp_path / "cache/msdm/hashes").write_text("no folder")
    assert files.file_hash(large) == files._hash(large)


def test_hidden_files_and_folders_are_no_part_of_a_model(tmp_path, reads):
    for name in ("unet/w", ".git/lfs/w", "unet/.cache/huggingface/w.metadata", ".DS_Store"):
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text("x")
    files.folder_hash(tmp_path / "m")
    assert reads == ["w"]


def test_a_file_is_replaced_by_its_own_kind_only(tmp_path):
    contents = {"own.json": '{"fid": 1}', "other.json": '{"step": 1}', "list.json": "[1]", "x": "x"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)

    def check(**paths):
        files.check_replaced(**{flag: (path, "a result", lambda p: files.is_json_with(p, "fid"))
                                for flag, path in paths.items()})

    check(json=tmp_path / "own.json", sheet=None, out=tmp_path / "new.json")
    for name in ("other.json", "list.json", "x", "."):
        with pytest.raises(BadInput, match="--real-stats .*would be replaced and is not a result"):
            check(real_stats=tmp_path / name)
    with pytest.raises(BadInput, match="--a and --b both name"):
        check(a=tmp_path / "new", b=tmp_path / "." / "new")


def test_a_cache_removes_what_a_killed_process_left_of_it_and_nothing_else(tmp_path):
    left, other = tmp_path / ".c[1].99999999000001.safetensors", tmp_path / ".d.99999999000001.safetensors"
    left.touch()
    other.touch()
    files.cached(tmp_path / "c[1].safetensors", lambda: ({"x": torch.ones(2)}, None))
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "c[1].safetensors"]
