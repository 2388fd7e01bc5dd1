"""The Makefile hands its values to the commands as they stand."""

import subprocess

import pytest
from helpers import ROOT


def made_commands(*words):
    """The lines that make would run, without running them: python is replaced by echo."""
    done = subprocess.run(["make", "--silent", "--old-file", ".venv/installed", "PY=echo", *words], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("given, preset", [([], "tiny"), (["PRESET=paper"], "paper"), (["PRESET="], "tiny")])
def test_preset_reaches_both_trainings(given, preset):
    vae, unet = made_commands("train-msdm", "DATA=some $folder", *given)
    assert vae == f"vae.py --preset {preset} --data some $folder --out runs/msdm/vae"
    assert unet.startswith(f"msdm.py --preset {preset} --data some $folder --vae runs/msdm/vae/best.saf")
