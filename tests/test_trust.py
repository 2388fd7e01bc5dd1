"""Short forms of `make test-kill` and `make test-fuzz`: killed commands go on, hostile files are refused."""

import fuzz
import resume_after_kill


def test_killed_commands_end_with_the_same_files(tmp_path):
    """test_commands.py does the same to msdm.py."""
    lines = []
    faults = resume_after_kill.run_kills(tmp_path, 4, 1, ["sampler", "phantom"], lines.append)
    assert not faults, "\n".join(lines)


def test_a_hundred_damaged_files_end_no_command_with_a_traceback():
    lines = []
    assert not fuzz.run_cases(range(100), show=lines.append), "\n".join(lines)
