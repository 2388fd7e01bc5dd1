"""The paper's ablations of MSDM: one training recipe, one change an arm, several seeds, one table.

The arms are those of the paper's text (CEUR-WS 3740, paper 142): self-conditioning, dropout 0.1, changes of
brightness and contrast, all three; and its three strategies for paraphrased prompts. Each is held against the
baseline of the same seed, which shares its data, its autoencoder and, image by image, its sampling noise.
"""

from command import BadInput, at_least_one

import random
import re
import sys
from argparse import Namespace
from pathlib import Path

import classifier
import data
import duplicates
import judges
import msdm
import sampler
import spaces
import trials
import vae
import wording
from files import file_hash, read_json, write_csv
from tables import wilson

# Mixed in with probability 0, paraphrases are never drawn: a training is validated on them all the same, and
# its tokenizer is learnt from them too. None is not given, as to strategies other than mix.
OFF = {"self-conditioning": False, "dropout": 0.0, "jitter": 0.0, "views": 1, "strategy": "mix", "mix-p": 0}
LIGHT = {"jitter": 0.4, "views": 8}  # brightness and contrast, as in the preset paper
ARMS = {  # what differs from the baseline
    "baseline": {},
    "self-conditioning": {"self-conditioning": True},
    "dropout-0.1": {"dropout": 0.1},
    "brightness-contrast": LIGHT,
    "all-three": {"self-conditioning": True, "dropout": 0.1} | LIGHT,
    "paraphrases-add": {"strategy": "add", "mix-p": None},
    "paraphrases-mix": {"mix-p": 0.5},
    "paraphrases-replace": {"strategy": "replace", "mix-p": None},
}
# What an arm gives itself, so that the further flags of each cannot.
OWN = {"training": ("--preset", "--data", "--captions", "--vae", "--init", "--from-run", "--paraphrases",
                    "--seed", "--out", "--steps", "--minutes", "--no-self-conditioning",
                    *(f"--{name}" for name in OFF)),
       "sampling": ("--ckpt", "--prompt", "--prompts", "-n", "--seed", "--out"),
       "judging": ("--real", "--fake", "--classifier", "--json")}
SAMPLING = {"tiny": "--solver dpmpp --steps 20", "demo": "--solver dpmpp --steps 20", "paper": ""}
COLUMNS = {  # figure of a result: heading
    "loss": "held-out loss",
    "loss_paraphrases": "held-out loss, paraphrases",
    "faithfulness": "faithfulness",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
}
FIGURES = ("step", "loss", "loss_paraphrases", "n_judged", "n_shown")  # of every result
ENDS = [f"{key}_{end}" for key in ("fid", "precision", "recall") for end in ("low", "high")]


def flags_of(arm):
    """The flags of msdm.py for an arm: every setting that an arm changes, said in each."""
    words = []
    for name, value in (OFF | ARMS[arm]).items():
        is_switch = isinstance(value, bool)
        words += [f"--{'' if value else 'no-'}{name}"] if is_switch else trials.given(f"--{name}", value)
    return words


# An arm


def prompts_of(records, n):
    """n prompts: of n images of records, again and again if these are fewer, a prompt of each."""
    rng, found = random.Random(0), []
    while len(found) < n:
        found += [rng.choice(r.prompts) for r in rng.sample(records, len(records))]
    return [sampler.one_line(prompt) for prompt in found[:n]]


def write_prompts(file, prompts):
    """A csv of the prompts that every arm is sampled with; BadInput where it is there and holds others."""
    if not file.exists():
        write_csv(file, ["Prompt"], [[p] for p in prompts])
    elif data.read_prompts(file) != prompts:
        raise BadInput(f"{file}: not the prompts of this experiment, which its other arms were sampled with; "
                       "remove the file, and the same command writes it again")


def training_flags(args, arm, seed, folder):
    """Those of msdm.py that the experiment gives itself, OWN."""
    return ["--preset", args.preset, "--data", args.data, "--vae", args.vae, "--paraphrases",
            args.paraphrases, *flags_of(arm), "--seed", seed, "--out", folder / "run",
            *trials.given("--steps", args.steps)]


def make_arm(args, arm, seed, folder):
    """Train, sample and judge one arm with one seed; returns its figures."""
    trials.run("msdm.py", *training_flags(args, arm, seed, folder),
               *trials.words_of("--training", args.training))
    result = {"arm": arm, "seed": seed}
    line = trials.validation(folder / "run", "val_loss_paraphrases")
    result |= {"step": line["step"], "loss": line["val_loss"],
               "loss_paraphrases": line["val_loss_paraphrases"]}
    for i, name in enumerate(("faithfulness", "images")):  # 100,000 seeds each, the same in every arm
        trials.run("sampler.py", "--ckpt", folder / "run/best.safetensors", "--prompts",
                   args.out / f"prompts-{name}.csv", "--seed", 100_000 * (2 * seed + i + 1), "--out",
                   folder / name, *trials.words_of("--sampling", args.sampling), processes=trials.devices())
    trials.run("judges.py", "faithfulness", "--real", args.judge, "--fake", folder / "faithfulness",
               "--classifier", args.classifier, *trials.words_of("--judging", args.judging),
               "--json", folder / "faithfulness.json")
    values = read_json(folder / "faithfulness.json")["values"]
    n = sum(v["n"] for v in values)
    hits = round(sum(v["n"] * v["share"] for v in values))
    result |= {"n_judged": n, "n_shown": hits, "faithfulness": hits / n if n else None}
    space = trials.space_flags(args, args.classifier)
    trials.run("metrics.py", "--real", args.real, "--fake", folder / "images", *space, "--cache",
               args.out / "cache", "--json", folder / "metrics.json")
    found = read_json(folder / "metrics.json")
    return result | {k: found[k] for k in ("fid", "precision", "recall", *ENDS) if k in found} | {
        "space": trials.space_of(folder / "metrics.json")}


# The experiment


def make_vae(args, folder):
    trials.run("vae.py", "--preset", args.preset, "--data", args.data, "--out", folder)
    return trials.validation(folder)


def check_strings(args):
    """BadInput for further flags that their command would refuse, hours later; returns those of the judge."""
    trained = trials.parsed("--training", args.training, OWN["training"], msdm.parse,
                            *training_flags(args, "baseline", 0, args.out))
    if args.vae:
        msdm.check_size(trained, vae.load(args.vae))
    elif trained.size != (size := vae.TRAINING[args.preset]["size"]):
        raise BadInput(f"--training {args.training!r}: the autoencoder is trained at {size} px; give one of "
                       f"{trained.size} px by --vae")
    trials.parsed("--sampling", args.sampling, OWN["sampling"], sampler.parse, "--ckpt", "best.safetensors",
                  "--out", args.out)
    return trials.parsed("--judging", args.judging, OWN["judging"], judges.parse, "faithfulness", "--real",
                         args.judge, "--fake", args.out)


def check_files(args, judging):
    """BadInput for files of the flags that a later command would refuse, hours later."""
    if judging.held_out or args.classifier:
        records, *_ = judges.real_records(args.judge, judging.held_out, judging.size, judging.mirror)
    if args.classifier:
        spaces.load(f"classifier:{args.classifier}")
        readable = [r for r, (_, _, why) in zip(records, duplicates.seen(records), strict=True) if not why]
        made_of, ours = classifier.made_from(args.judge, readable, judging)
        if other := classifier.other_than(made_of, args.classifier):
            raise BadInput(f"{args.classifier}: holds a classifier of {other}; --judge and --judging need "
                           f"one of {ours}")
    if args.paraphrases:
        check_paraphrases(args)
    trials.check_space(args)


def check_paraphrases(args):
    """BadInput for paraphrases that a training of the data refuses."""
    wording.read(Namespace(paraphrases=args.paraphrases, data=args.data, captions=None, strategy=None,
                           mix_p=None))


def prepare(args):
    """Check the flags; returns (settings of the folder, records of the real images)."""
    at_least_one(args, "steps", "seeds", "images", "per_value")
    args.out, args.real = Path(args.out), args.real or args.data
    args.judge = args.judge or args.real
    if args.sampling is None:
        args.sampling = SAMPLING[args.preset]
    judging = check_strings(args)
    if args.images < 10:
        raise BadInput(f"--images {args.images}: expected 10 or more")
    files = ("vae", "paraphrases", "classifier")
    hashes = {k: getattr(args, k) and file_hash(getattr(args, k)) for k in files}
    check_files(args, judging)
    records = {folder: data.read_folder(folder) for folder in {args.data, args.real, args.judge}}
    settings = {k: getattr(args, k) for k in ("preset", "steps", "images", "per_value", "training",
                                              "sampling", "judging")}
    settings["space"] = trials.space_flags(args, "the judge")  # by its hash, if it was given
    prints = {k: data.fingerprint(records[getattr(args, k)]) for k in ("data", "real", "judge")}
    prints["real_images"] = trials.real_images(args.real)
    args.judge_is_data = prints["judge"] == prints["data"]
    return settings | hashes | prints, records[args.real]


def make_shared(args, real):
    """What all arms share: autoencoder, paraphrases, prompts; real: the records that these are of."""
    args.classifier = args.classifier or args.out / "judge.safetensors"
    if not args.paraphrases:
        args.paraphrases = args.out / "paraphrases.csv"
        trials.run("experiments.py", "paraphrase", "--data", args.data, "--out", args.paraphrases)
        check_paraphrases(args)
    if not args.vae:
        args.vae = args.out / "vae/best.safetensors"
        trials.cell(args.out / "vae", lambda folder: make_vae(args, folder))
    write_prompts(args.out / "prompts-faithfulness.csv", judges.repeated_prompts(args.per_value))
    write_prompts(args.out / "prompts-images.csv", prompts_of(real, args.images))


def ablation(args):
    """Every arm with the first seed, then with the next: a table that is not complete is of use."""
    settings, real = prepare(args)
    cells = {(seed, arm): args.out / f"seed-{seed}" / arm for seed in range(args.seeds) for arm in args.arms}
    with trials.claimed(args.out, settings):
        make_shared(args, real)
        if any(args.out.glob("seed-*/*/result.json")):
            write_tables(args)  # is what is there of use? now, not after a training
        for i, ((seed, arm), folder) in enumerate(cells.items(), 1):
            print(f"\n{args.out}: {i} of {len(cells)}, {arm}, seed {seed}", file=sys.stderr)
            trials.cell(folder, lambda folder, arm=arm, seed=seed: make_arm(args, arm, seed, folder))
            write_tables(args)
    print((args.out / "ablation.md").read_text(encoding="utf-8"))


# The tables


def write_tables(args):
    """ablation.md and ablation.json of all arms and seeds in the folder, those of other starts too."""
    places = sorted(p.parent for p in args.out.glob("seed-*/*/result.json")
                    if p.parent.name in ARMS and re.fullmatch(r"seed-\d+", p.parent.parent.name))
    found = [arm_result(p) for p in places]
    by_arm = {arm: {r["seed"]: r for r in found if r["arm"] == arm} for arm in ARMS}
    by_arm = {arm: seeds for arm, seeds in by_arm.items() if seeds}
    means = {arm: means_of(seeds) for arm, seeds in by_arm.items()}
    one = {arm: next(iter(seeds.values())) for arm, seeds in by_arm.items() if len(seeds) == 1}
    baseline = by_arm.get("baseline", {})
    gaps = {arm: gap for arm, seeds in by_arm.items()
            if arm != "baseline" and (gap := less_baseline(seeds, baseline))}
    space = trials.one_space(args.out, [r["space"] for r in found])
    steps = sorted({r["step"] for r in found})
    notes = notes_of(args, found, space, gaps)
    heads = ["arm", "seeds", *COLUMNS.values()]
    rows = [[arm, len(by_arm[arm]), *(cell_text(means[arm], key, one.get(arm, {})) for key in COLUMNS)]
            for arm in by_arm]
    text = f"# Ablation of MSDM, preset {args.preset}\n\n{trials.markdown(heads, rows)}\n"
    if gaps:
        rows = [[arm, gap["n"], *(trials.number(*gap[key]) for key in COLUMNS)] for arm, gap in gaps.items()]
        text += f"Less the baseline of the same seed:\n\n{trials.markdown(heads, rows)}\n"
    table = {"preset": args.preset, "steps": args.steps, "best_steps": steps, "space": space, "notes": notes,
             "means": means, "less_baseline": gaps, "results": found}
    trials.write_table(args.out, "ablation", text + "".join(f"- {note}\n" for note in notes), table)


def arm_result(folder):
    """The result of an arm's folder, with arm, seed and space; BadInput for what cannot be one."""
    r = trials.result(folder, FIGURES, (*COLUMNS, *ENDS))
    shown, judged = r["n_shown"], r["n_judged"]
    if not (isinstance(shown, int) and isinstance(judged, int) and 0 <= shown <= judged):
        raise BadInput(f"{folder / 'result.json'}: expected n_shown and n_judged, whole numbers, the first "
                       f"up to the second, got {shown} and {judged}; remove the file, and the same command "
                       "makes it again")
    space = r.get("space") or trials.space_of(folder / "metrics.json")  # older versions kept it there alone
    return r | {"arm": folder.name, "seed": int(folder.parent.name[5:]), "space": space}


def means_of(seeds):
    """{figure: (mean over the seeds, half its interval)} of an arm, and Wilson's interval of faithfulness."""
    out = {key: trials.over_seeds([r[key] for r in seeds.values()]) for key in COLUMNS}
    n, hits = (sum(r[k] for r in seeds.values()) for k in ("n_judged", "n_shown"))
    return out | {"wilson": wilson(hits, n) if n else (None, None), "n_judged": n}


def less_baseline(seeds, baseline):
    """{figure: (mean difference from the baseline, half its interval)} over common seeds, None without."""
    common = [s for s in seeds if s in baseline]
    if not common:
        return None
    pairs = [(seeds[s], baseline[s]) for s in common]
    return {"n": len(common)} | {key: trials.over_seeds([
        None if None in (own[key], base[key]) else own[key] - base[key] for own, base in pairs])
        for key in COLUMNS}


def cell_text(mean, key, only):
    """A figure with its interval over seeds or, of an arm with one, whose result is only, over images."""
    low, high = only.get(f"{key}_low"), only.get(f"{key}_high")
    if only and key == "faithfulness":
        low, high = mean["wilson"]
    if low is None:
        return trials.number(*mean[key])
    return f"{trials.number(mean[key][0])} ({trials.number(low)}-{trials.number(high)})"


def notes_of(args, found, space, gaps):
    """What the figures are of, in sentences."""
    n_seeds = len({r["seed"] for r in found})
    judged = found[0]["n_judged"] if found else 0
    recipe = f"{args.steps} steps instead of the recipe's" if args.steps else "the preset's whole recipe"
    more = f"; further flags of each: {args.training}" if args.training else ""
    n_gaps = sum(gap[key][1] is not None for gap in gaps.values() for key in COLUMNS)
    by_chance = f"; of {n_gaps} such intervals about {0.05 * n_gaps:.1g} would miss 0 by chance"
    notes = [
        f"Trainings: {len(found)}, of {n_seeds} seed{'s' * (n_seeds != 1)}, on {args.data}; {recipe}{more}; "
        "one autoencoder.",
        "± is half of the 95 % interval of the mean by Student's t over the seeds, wide for three. "
        "Differences are of pairs that share seed, data and sampling noise; one whose interval holds 0 shows "
        f"nothing{by_chance * bool(n_gaps)}.",
        "In brackets, for an arm with one seed: the 95 % over its images, which says nothing of another "
        "training with another seed.",
        "Held-out loss (lower is better): of the best checkpoint on the held-out tenth of the data, with "
        "the original prompts, which choose that checkpoint, and with their paraphrases; self-conditioning "
        "feeds no estimate back there. The tokenizer is learnt from both in every arm.",
        f"Faithfulness (higher is better): share of {judged} requested attributes an arm and seed that the "
        f"judge's classifier, trained on {args.judge}, finds in the image.",
        f"FID (lower is better), precision, recall: {args.images} images of as many prompts against "
        f"{args.real}, in the space: {space}. An FID of so few is too large: it compares in this table only. "
        f"Sampling: {args.sampling or 'the defaults of sampler.py'}.",
    ]
    if args.judge_is_data:
        notes.append("The judge was trained on the images that the model was trained on: a model that copies "
                     "them looks faithful. Give images of others by --judge.")
    return notes


def add_flags(parser):
    flag = parser.add_argument
    flag("--data", required=True, help="data folder to train on")
    flag("--real", help="data folder of the real images of the metrics; None: --data")
    flag("--judge", help="data folder that the judge's classifier is trained on; None: --real")
    flag("--out", required=True, help="folder of the experiment; the same command goes on in it")
    flag("--preset", choices=sorted(SAMPLING), default="tiny", help="network and training settings")
    flag("--vae", help="checkpoint of vae.py that all arms share; None: one is trained")
    flag("--classifier", help="classifier of judges.py, trained on --judge, that all arms share; None: "
         "one is trained")
    flag("--paraphrases", help="csv of experiments.py paraphrase; None: one is made of the grammar")
    flag("--steps", type=int, help="steps of each training; None: the preset's")
    flag("--seeds", type=int, default=3, help="trainings of each arm")
    flag("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
         help="which, for several machines on one folder")
    flag("--images", type=int, default=500, help="images of an arm for FID, precision and recall")
    flag("--per-value", type=int, default=10, help="images for each value that faithfulness asks for")
    flag("--training", default="", help="further flags of msdm.py, as one string; another --size needs a "
         "--vae that was trained at it")
    flag("--sampling", help="more flags of sampler.py, as one string; None: 20 dpmpp steps, but for paper")
    flag("--judging", default="", help="further flags of judges.py faithfulness, as one string")
    trials.add_space_flags(parser)
