"""What every command shares: how its threads wait."""

import ast
import os
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


@pytest.mark.parametrize("own, expected", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(own, expected):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": own} if own else {}
    code = ("import sys; from importlib.abc import MetaPathFinder\n"
            "class Watch(MetaPathFinder):\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'torch':\n"
            "            import os; print(os.environ.get('OMP_WAIT_POLICY')); sys.exit()\n"
            "sys.meta_path.insert(0, Watch())\n"
            "import msdm")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout.split() == [expected], done.stderr
