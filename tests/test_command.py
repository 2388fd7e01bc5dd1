"""What every command shares, and who imports whom."""

import ast
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

COMMANDS = sorted(f.name for f in ROOT.glob("*.py") if "    run_command(main)" in f.read_text("utf-8"))


@pytest.mark.parametrize("script", COMMANDS)
def test_commands_import_command_before_torch(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert getattr(first, "module", None) == "command"


@pytest.mark.parametrize("own, expected", [({}, ["3000"]), ({"GOMP_SPINCOUNT": "7"}, ["7"]),
                                           ({"OMP_WAIT_POLICY": "PASSIVE"}, ["None"])])
def test_waiting_threads_spin_shortly_unless_the_user_says_otherwise(own, expected):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | own
    code = ("import sys; from importlib.abc import MetaPathFinder\n"
            "class Watch(MetaPathFinder):\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'torch':\n"
            "            import os; print(os.environ.get('GOMP_SPINCOUNT')); sys.exit()\n"
            "sys.meta_path.insert(0, Watch())\n"
            "import msdm")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout.split() == expected, done.stderr


def test_every_file_has_a_floor_in_the_readme_and_imports_only_from_below_or_along_an_arrow():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    floors, arrows = {}, set()
    for floor, files in re.findall(r"^\| (\d) \| (.*) \|$", readme, re.MULTILINE):
        for entry in files.split(" · "):
            floors |= dict.fromkeys(re.findall(r"`(\w+)\.py`", entry), int(floor))
            own, arrow, others = entry.partition(" → ")
            if arrow:
                named = re.match(r"(`\w+\.py`(, )?)+", others)[0]
                arrows |= {(own.strip("`").removesuffix(".py"), x) for x in re.findall(r"(\w+)\.py", named)}
    imported = set()
    for file in ROOT.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [
                a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported |= {(file.stem, x) for x in names if (ROOT / f"{x}.py").is_file()}
    assert {f.stem for f in ROOT.glob("*.py")} == floors.keys()
    assert {pair for pair in imported if floors[pair[0]] <= floors[pair[1]]} == arrows


def test_arguments_that_are_not_utf_8_and_links_in_a_circle_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for real, said in ((b"caf\xe9", "expected UTF-8; rename"), (b"loop", "Symlink loop|no such")):
        done = subprocess.run([sys.executable, ROOT / "judges.py", "faithfulness", "--fake", "x", "--real",
                               real], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert re.fullmatch(f"error: .*(?:{said}).*\n", done.stderr), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["loop"]
