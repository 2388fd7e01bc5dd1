"""What a run left on disk: its settings and log, its sheets, images of its weights, results of the judges.

Reads the folder of a training, folders of sampler.py and --json files of metrics.py and judges.py, checks
them, and finds those that belong together: images say by hashes which checkpoint they are of.
"""

from command import BadInput

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import adapters
import data
from files import file_hash, read_json
from judges import JUDGEMENT
from metrics import RESULT
from runfolder import read_log
from tables import is_number

KEYS = {"metrics": RESULT} | {k: JUDGEMENT[k] for k in ("faithfulness", "memorisation")}


@dataclass
class Samples:
    """A folder of sampler.py: its settings and (image file, prompt) in order; ours: of this run's weights."""
    folder: Path
    config: dict
    images: list
    ours: bool


@dataclass
class Found:
    """Everything that a page is made of; failures: lines about files that could not be used."""
    run: Path
    kind: str                                               # "vae", "msdm" or "adapter of NETWORK"
    config: dict
    log: list
    sheets: list
    samples: Samples | None = None
    metrics: list = field(default_factory=list)             # (file, its object)
    faithfulness: tuple | None = None
    memorisation: tuple | None = None
    failures: list = field(default_factory=list)

    @property
    def settings(self):
        return self.config["settings"]

    @property
    def images_a_step(self):
        """Over all processes; an older run tells only the number of each."""
        return self.config.get("images_a_step") or self.settings.get("batch_size")


def gather(run, samples=None, metrics=(), faithfulness=None, memorisation=None) -> Found:
    """What lies in the run's folder, what is named here, and what can be found of the rest."""
    run = Path(run)
    config = read_config(run)
    log, unfinished = read_log(run)
    sheets = sorted((p for p in run.glob("samples/*.png") if p.stem.isdecimal()), key=lambda p: int(p.stem))
    found = Found(run, kind_of_run(config["settings"]), config, log, sheets)
    if not (run / "metrics.jsonl").is_file():
        found.failures.append(f"{run / 'metrics.jsonl'} is not there: the run ended before its first line")
    if unfinished:
        found.failures.append(f"{run / 'metrics.jsonl'}, row {unfinished}: unfinished, left out")
    weights = hashes_of(run)
    folders = [read_samples(samples, weights)] if samples else find_samples(run, weights, found.failures)
    found.samples = next(iter(folders), None)
    results = find_results([run, *(s.folder for s in folders)], found.failures)
    found.metrics = [read_result(p, "metrics") for p in metrics] or results["metrics"]
    for kind, given in (("faithfulness", faithfulness), ("memorisation", memorisation)):
        setattr(found, kind, read_result(given, kind) if given else next(iter(results[kind]), None))
    return found


# The run


def read_config(run):
    """config.json of a training's folder; BadInput names the runs inside a folder that is none itself."""
    if not (run / "config.json").is_file():
        inside = sorted(str(p.parent) for p in run.glob("*/config.json")) if run.is_dir() else []
        hint = f"; runs inside it: {', '.join(inside[:5])}" if inside else ""
        raise BadInput(f"{run}: expected the folder of a training, with config.json{hint}")
    config = read_json(run / "config.json")
    if not isinstance(config.get("settings"), dict):
        raise BadInput(f"{run / 'config.json'}: expected that of a training, with settings; a folder of "
                       "sampler.py is given by --samples")
    return config


def kind_of_run(settings):
    if "kl_weight" in settings:
        return "vae"
    return f"adapter of {settings.get('network')}" if "rank" in settings else "msdm"


def hashes_of(run):
    """Hashes of the run's checkpoints, as sampler.py writes them into the config.json of its images."""
    files = [run / f"{name}.safetensors" for name in ("best", "last", "best-fid")]
    folders = [run / name for name in ("best", "last", "best-fid")]
    return {file_hash(f) for f in files if f.is_file()} | {
        adapters.adapter_hash(f) for f in folders if (f / "adapter_config.json").is_file()}


# Images


def read_samples(folder, weights):
    """The Samples of a folder of sampler.py. weights: hashes of the run's checkpoints."""
    folder = Path(folder)
    if not is_samples(folder):
        raise BadInput(f"{folder}: expected a folder of sampler.py, with prompts.csv and config.json")
    config = read_json(folder / "config.json")
    rows = data.csv_rows(folder / "prompts.csv", (data.FILE_COLUMNS, True), (data.PROMPT_COLUMNS, True))
    images = [(folder / "images" / Path(data.plain_name(name)).name, prompt) for _, (name, prompt) in rows]
    return Samples(folder, config, images, any(isinstance(v, str) and v in weights for v in config.values()))


def is_samples(folder):
    return (folder / "prompts.csv").is_file() and (folder / "config.json").is_file()


def find_samples(run, weights, failures):
    """The Samples of this run's weights in out/ and beside the run, those of the most images first.

    failures: a list that gets a line for each folder that cannot be read.
    """
    roots = [Path("out"), *(p.parent / "out" for p in run.absolute().parents if p.name == "runs")]
    places = [p for root in roots if root.is_dir() for p in sorted(root.iterdir())]
    places = {p.resolve(): p for p in reversed([*places, run / "sample", run.parent / "sample"])}
    found = []
    for place in filter(is_samples, places.values()):
        try:
            found.append(read_samples(place, weights))
        except BadInput as error:  # it was not named, only searched
            failures.append(f"left out: {error}")
    found = [s for s in found if s.ours]
    return sorted(found, key=lambda s: (-len(s.images), str(s.folder)))


# Results


def read_result(path, kind):
    """(file, its object); BadInput if it lacks one of the KEYS of its kind."""
    value = read_json(path)
    if missing := [k for k in KEYS[kind] if k not in value]:
        raise BadInput(f"{path}: expected the --json file of {kind}, with {', '.join(KEYS[kind])}; it has "
                       f"no {missing[0]}")
    return Path(path), value


def find_results(folders, failures):
    """{kind: [(file, object), ...]} of the .json files in these folders that hold the KEYS of a kind.

    failures: a list that gets a line for each file that cannot be read.
    """
    found = {kind: [] for kind in KEYS}
    for folder in folders:
        for path in sorted(p for p in Path(folder).glob("*.json") if p.name != "config.json"):
            try:
                value = read_json(path)
            except BadInput as error:  # it was not named, only searched
                failures.append(f"left out: {error}")
                continue
            for kind, keys in KEYS.items():
                if value.keys() >= set(keys):
                    found[kind].append((path, value))
    return found


def number(path, values, key):
    """A number of a file of results; None where it is null, not finite or absent."""
    value = values.get(key)
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return None
    if not is_number(value):
        raise BadInput(f"{path}: {key}: expected a number, got {json.dumps(value)[:80]}")
    return value


def rows_of(path, values, key, *names):
    """The list of objects under a key, each with these names."""
    rows = values[key]
    if not isinstance(rows, list) or not all(isinstance(r, dict) and r.keys() >= set(names) for r in rows):
        raise BadInput(f"{path}: {key}: expected a list of objects with {', '.join(names)}, "
                       f"got {json.dumps(rows)[:80]}")
    return rows
