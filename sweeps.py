"""The paper's sweeps of LoRA on Kandinsky 2.2: ranks of the prior, then of the decoder; alpha, DoRA, rsLoRA.

Stage 1 of the paper is a decoder's adapter of rank 32, trained for 40 epochs. Table 1 trains the prior's with
each rank and samples with that decoder, table 2 the decoder's with the best prior of table 1. The paper does
not say at which rank it tried alpha, DoRA and rsLoRA; here it is VARIED.
"""

from command import BadInput, at_least_one, check_range

import sys
from pathlib import Path

import adapters
import data
import finetune
import sampler
import trials
from files import folder_hash, load_safetensors, read_json, text_hash
from tables import is_number

RANKS = (4, *range(8, 65, 8), 128)
VARIED = 32
VARIANTS = {"alpha-double": ["--alpha", 2 * VARIED], "alpha-half": ["--alpha", VARIED / 2],
            "dora": ["--dora"], "rslora": ["--rslora"]}
CELLS = {f"rank-{r}": ["--rank", r] for r in RANKS} | {
    name: ["--rank", VARIED, *flags] for name, flags in VARIANTS.items()}
STAGE_1 = {"rank": 32, "epochs": 40}
# What a cell gives itself, so that the further flags of each cannot.
OWN = {"training": ("--model", "--prior", "--decoder", "--data", "--captions", "--from-run", "--cache",
                    "--out", "--shown", "--rank", "--alpha", "--dora", "--rslora", "--steps", "--epochs",
                    "--minutes"),
       "sampling": ("--ckpt", "--decoder", "--prior-lora", "--decoder-lora", "--prompt", "--prompts",
                    "--out")}
MODELS = ("prior", "decoder")
METRICS = ("fid", "precision", "recall")
FIGURES = ("rank", "alpha", "parameters", "val_loss")


def training_flags(args, network, flags, folder, epochs=None):
    """Those of finetune.py that the experiment gives itself, OWN."""
    models = {"prior": args.prior, "decoder": args.decoder}
    other = "decoder" if network == "prior" else "prior"
    length = ["--steps", args.steps] if args.steps else ["--epochs", epochs or args.epochs]
    return [network, "--model", models[network], f"--{other}", models[other], "--data", args.data, "--cache",
            args.out / "cache", *flags, *length, "--out", folder, "--shown", 0]


def sampling_flags(args, prior_lora, decoder_lora, images):
    """Those of sampler.py, likewise."""
    return ["--ckpt", args.prior, "--decoder", args.decoder, "--prior-lora", prior_lora, "--decoder-lora",
            decoder_lora, "--prompts", args.prompts, "--out", images]


def train(args, network, flags, folder, epochs=None):
    """Train an adapter of a network into folder; returns its trainable parameters and validation loss."""
    trials.run("finetune.py", *training_flags(args, network, flags, folder, epochs),
               *trials.words_of("--training", args.training))
    tensors, _ = load_safetensors(folder / "best/adapter_model.safetensors")
    config, line = read_json(folder / "best/adapter_config.json"), trials.validation(folder)
    return {"rank": config["r"], "alpha": config["lora_alpha"], "dora": config["use_dora"],
            "rslora": config["use_rslora"], "parameters": sum(x.numel() for x in tensors.values()),
            "val_loss": line["val_loss"], "step": line["step"]}


def make_cell(args, name, folder):
    """Train, sample and measure one cell; returns its figures."""
    result = {"cell": name} | train(args, args.network, CELLS[name], folder / "run")
    if args.space is None:
        return result | dict.fromkeys(METRICS)
    own = {f"{args.network}_lora": folder / "run/best"}
    prior_lora, decoder_lora = (own.get(k) or getattr(args, k) for k in ("prior_lora", "decoder_lora"))
    trials.run("sampler.py", *sampling_flags(args, prior_lora, decoder_lora, folder / "images"),
               *trials.words_of("--sampling", args.sampling), processes=trials.devices())
    trials.run("metrics.py", "--real", args.data, "--fake", folder / "images", *args.space, "--cache",
               args.out / "cache", "--json", folder / "metrics.json")
    found = read_json(folder / "metrics.json")
    return result | {k: found[k] for k in METRICS} | {
        "space": trials.space_of(folder / "metrics.json")}


def check_strings(args):
    """BadInput for further flags that their command would refuse, hours later."""
    has_stage_1 = args.network == "prior" and not args.decoder_lora
    for network in (args.network, *["decoder"] * has_stage_1):
        trials.parsed("--training", args.training, OWN["training"], finetune.parse,
                      *training_flags(args, network, [], args.out))
    trials.parsed("--sampling", args.sampling, OWN["sampling"], sampler.parse,
                  *sampling_flags(args, "prior", "decoder", args.out))


def prepare(args, other):
    """Check the flags; returns the settings of the folder. other: the adapter that is not trained here."""
    at_least_one(args, "steps")
    check_range(args, 0, float("inf"), "epochs")
    args.out = Path(args.out)
    check_strings(args)
    trials.check_space(args)
    args.space = trials.space_flags(args)
    if args.space is None:
        print(trials.NO_SPACE, file=sys.stderr)
    settings = {k: getattr(args, k) for k in ("steps", "epochs", "training", "sampling", "space")}
    models = {k: getattr(args, k) for k in MODELS}  # a name on the hub stands for itself
    return settings | {k: folder_hash(v) if Path(v).is_dir() else v for k, v in models.items()} | {
        "data": data.fingerprint(data.read_folder(args.data)),
        "real_images": None if args.space is None else trials.real_images(args.data),
        "prompts": text_hash(*data.read_prompts(args.prompts)),
        "drawn_with": other and adapters.adapter_hash(adapters.located(other))}


def sweep(args, network, name):
    """Every cell of a table, which is written after each."""
    args.network = network
    other = args.decoder_lora if network == "prior" else args.prior_lora
    settings = prepare(args, other)
    with trials.claimed(args.out, settings, older={k: getattr(args, k) for k in MODELS}):
        if not other:
            trials.cell(args.out / "stage-1", lambda folder: train(
                args, "decoder", ["--rank", STAGE_1["rank"]], folder / "run", STAGE_1["epochs"]))
            args.decoder_lora = args.out / "stage-1/run/best"
        if any((args.out / cell / "result.json").exists() for cell in CELLS):
            write_table(args, name)  # is what is there of use? now, not after a training
        for i, cell in enumerate(args.cells, 1):
            print(f"\n{args.out}: {i} of {len(args.cells)}, {cell}", file=sys.stderr)
            trials.cell(args.out / cell, lambda folder, cell=cell: make_cell(args, cell, folder))
            write_table(args, name)
    print((args.out / f"{name}.md").read_text(encoding="utf-8"))


def table1(args):
    """Ranks of the prior's adapter, sampled with the decoder of stage 1."""
    args.prior_lora = None
    sweep(args, "prior", "table1")


def table2(args):
    """Ranks of the decoder's adapter, sampled with the best prior."""
    args.prior_lora, args.decoder_lora = args.prior_lora or best_prior(args.table1), None
    sweep(args, "decoder", "table2")


def best_prior(folder):
    """The adapter of table 1 with the lowest FID, or validation loss where it has no FID."""
    file = Path(folder) / "table1.json"
    if not file.exists():
        raise BadInput(f"{file}: no such file, expected the result of table1; run that first, or give the "
                       "prior's adapter by --prior-lora FOLDER")
    rows = read_json(file).get("results") or []
    if not isinstance(rows, list) or not rows or not all(
            isinstance(row, dict) and row.get("cell") in list(CELLS) and is_number(row.get("val_loss"))
            and (row.get("fid", "") is None or is_number(row.get("fid"))) for row in rows):
        raise BadInput(f"{file}: expected the result of table1, with cells in its results; run table1 again "
                       "in its folder")
    key = "fid" if all(row["fid"] is not None for row in rows) else "val_loss"
    best = min(rows, key=lambda row: row[key])
    print(f"the best prior of {file} by {key} is {best['cell']}, of {len(rows)} of {len(CELLS)} cells",
          file=sys.stderr)
    return str(Path(folder) / best["cell"] / "run/best")


def write_table(args, name):
    """NAME.md and NAME.json of the cells in the folder, those of other starts too."""
    results = trials.results({cell: args.out / cell for cell in CELLS}, FIGURES, METRICS)
    found = [r | {"cell": cell} for cell, r in results.items()]  # the place says which it is
    space = trials.one_space(args.out, [r["space"] for r in found if "space" in r])
    heads = ["adapter", "rank", "alpha", "trainable parameters", "validation loss", "FID", "precision",
             "recall"]
    rows = [[r["cell"], r["rank"], f"{r['alpha']:g}", f"{r['parameters']:,}", trials.number(r["val_loss"]),
             *(trials.number(r[k]) for k in METRICS)] for r in found]
    length = f"{args.steps} steps" if args.steps else f"{args.epochs:g} epochs"
    stage = (f"decoder's adapter {args.decoder_lora}" if args.network == "prior"
             else f"prior's adapter {args.prior_lora}")
    sampling = args.sampling or "the defaults of sampler.py"
    metrics = (f"FID (lower is better), precision, recall against {args.data}, space: {space}; "
               f"images: {args.prompts}, {sampling}, sampled with the {stage}.")
    notes = [
        f"{len(found)} of {len(CELLS)} cells, one seed each, so neighbours may differ by chance; {length} "
        f"a cell{', ' + args.training if args.training else ''}.",
        "Validation loss (lower is better): the lowest on the held-out tenth of the data.",
        metrics if space else f"{trials.NO_SPACE}.",
    ]
    text = f"# {name}: ranks of the {args.network}\n\n{trials.markdown(heads, rows)}\n"
    trials.write_table(args.out, name, text + "".join(f"- {note}\n" for note in notes),
                       {"network": args.network, "space": space, "notes": notes, "results": found})


def add_flags(parser, network):
    flag = parser.add_argument
    flag("--prior", required=True, help="prior folder of Kandinsky 2.2, or its name on the hub")
    flag("--decoder", required=True, help="decoder folder of Kandinsky 2.2, or its name on the hub")
    flag("--data", required=True, help="data folder to train on, and real images of the metrics")
    flag("--out", required=True, help="folder of the table; the same command goes on in it")
    if network == "prior":
        flag("--decoder-lora", help="adapter of the decoder to sample with; None: stage 1 is trained")
    else:
        flag("--prior-lora", help="adapter of the prior to sample with; None: the best of --table1")
        flag("--table1", default="runs/tables/table1", help="folder of table 1")
    flag("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL",
         help="which, for several machines on one folder")
    flag("--epochs", type=float, default=100, help="passes over the pairs of image and prompt")
    flag("--steps", type=int, help="steps of each training instead, that of stage 1 too")
    flag("--prompts", default="docs/paper-prompts.txt", help="prompts of the images")
    flag("--training", default="", help="further flags of finetune.py, as one string")
    flag("--sampling", default="-n 40", help="further flags of sampler.py, as one string")
    trials.add_space_flags(parser)
