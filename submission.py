"""The task's submission: one image a prompt and a zip of them; submissions held against each other.

The task wanted 5,000 images for 5,000 prompts. Its organisers' measure is metrics.py --protocol imageclef;
imageclef-resized is the same without their numpy.resize, which re-flows an image instead of resizing it.
"""

from command import BadInput

import re
import sys
import zipfile
from pathlib import Path

import data
import inception
import msdm
import sampler
import trials
from classifier import default_file
from files import check_replaced, file_hash, folder_hash, read_json, replacing, text_hash
from metrics import SOFTMAX
from pixels import open_image
from tables import is_number

MADE_BY = b"experiments.py submission"  # the comment of its zip files
OWN = ("--ckpt", "--prompt", "--prompts", "-n", "--out")  # what sampler.py gets here, and --sampling cannot
OFFICIAL = ("imageclef: the organisers' protocol of 2024; distances of softmax outputs, from 0 to 2. "
            "imageclef-resized: the same with images really resized. Neither compares with an FID of pooled "
            "features, and the organisers had Keras' weights, not torchvision's.")
NOT_OFFICIAL = "Not the official protocol, and comparable with nothing outside of this table."


def is_submission(path):
    """Whether a file is a zip that write_zip wrote."""
    try:
        with zipfile.ZipFile(path) as z:
            return z.comment == MADE_BY
    except (OSError, zipfile.BadZipFile):
        return False


def write_zip(path, files):
    """The files, by their names alone, in order; the same files give the same bytes."""
    with replacing(path) as tmp, zipfile.ZipFile(tmp, "w") as z:  # stored: a PNG is compressed already
        z.comment = MADE_BY
        for file in files:
            z.writestr(zipfile.ZipInfo(file.name), file.read_bytes())


def submission(args):
    """Sample an image for each prompt of a file, those that are missing, and zip them in order."""
    out = Path(args.out)
    if not out.name:
        raise BadInput(f"--out {args.out}: expected a folder with a name, which the zip gets too")
    file = out.with_name(f"{out.name}.zip")
    trials.words_of("--sampling", args.sampling, OWN)
    prompts = data.read_prompts(args.prompts)
    if file.exists() and not out.exists():
        raise BadInput(f"{file}: is there, and the folder {out} of its images is not; move it, or give "
                       "another --out")
    data.check_writable(out=file)
    check_replaced(out=(file, "a zip of experiments.py submission", is_submission))
    trials.run("sampler.py", "--ckpt", args.ckpt, "--prompts", args.prompts, "--out", out,
               *trials.words_of("--sampling", args.sampling), processes=trials.devices())
    images = sorted((out / "images").glob("[0-9]*.png"))
    if [f.name for f in images] != [f"{i:06d}.png" for i in range(len(prompts))]:
        raise BadInput(f"{out}: {len(images)} images, expected {len(prompts)}, as many as {args.prompts}")
    for image in images:
        open_image(image)
    write_zip(file, images)
    print(f"{file}: {len(images)} images, {images[0].name} to {images[-1].name}, in order of {args.prompts}")


# Table 3


def name_of(source):
    """A folder's name for a checkpoint or a folder of images: its path, without what no file name holds."""
    return re.sub(r"\W+", "-", str(source).removesuffix(".safetensors")).strip("-")


def hash_of(source):
    """Of a checkpoint, of the images and prompts of a folder of sampler.py, or of a published folder; None of
    a name on the hub."""
    source = Path(source)
    if (source / "prompts.csv").exists():
        return data.fingerprint(data.read_folder(source))
    file = msdm.checkpoint_in(source) if source.is_dir() else source
    if file and Path(file).is_file():
        return file_hash(file)
    return folder_hash(source) if source.is_dir() else None


def measure(args, source, folder):
    """Sample a checkpoint, or take the folder of images that is given, and measure it; its figures."""
    images = Path(source)
    if not images.is_dir() or not (images / "prompts.csv").exists():
        images = folder / "images"
        trials.run("sampler.py", "--ckpt", source, "--prompts", args.prompts, "--out", images,
                   *trials.words_of("--sampling", args.sampling), processes=trials.devices())
    result = {"source": str(source), "hash": hash_of(source), "n": len(data.read_folder(images))}
    for name, flags in args.measures.items():
        if flags[1].startswith("classifier:") and not Path(flags[1].partition(":")[2]).exists():
            trials.run("judges.py", "faithfulness", "--real", args.data, "--fake", images)  # trains it
        file = folder / f"{name}.json"
        trials.run("metrics.py", "--real", args.data, "--fake", images, *flags, "--cache", args.out / "cache",
                   "--json", file, processes=trials.devices())
        result[name] = {k: v for k, v in read_json(file).items() if k in (
            "fid", "fid_fake_half", "fid_real_half", "n_half", "inception_score", "precision", "recall",
            "weights", "space")}
    return result


def measures_of(args):
    """{name: flags of metrics.py}: both protocols, or else, said in a line, the space that is there."""
    if args.features:
        trials.check_space(args)
        return {"features": ["--features", args.features, *trials.given("--weights", args.weights)]}
    if args.weights:
        inception.ImageNetInception(args.weights)  # now, not when the images are made
    if args.weights or inception.cached_file("imagenet"):
        return {p: ["--protocol", p, *trials.given("--weights", args.weights)] for p in SOFTMAX}
    published = inception.PUBLISHED["imagenet"]
    address = published["url"] + published["files"][0]
    print("not the official protocol but the attribute classifier's space: torchvision's ImageNet "
          f"Inception is not in torch's cache; fetch {address} and name it by --weights",
          file=sys.stderr)
    return {"classifier": ["--features", f"classifier:{default_file(args.data, 64)}"]}


def table3(args):
    """Checkpoints, or folders of images, by the official protocol of 2024."""
    args.out = Path(args.out)
    trials.parsed("--sampling", args.sampling, OWN, sampler.parse, "--ckpt", args.ckpts[0], "--out", args.out)
    folders = {source: args.out / name_of(source) for source in args.ckpts}
    if taken := [source for source in folders if name_of(source) in ("", "cache")]:
        raise BadInput(f"{taken[0]}: expected a path with a name, and another one than cache")
    if len(set(folders.values())) < len(folders):
        raise BadInput(f"{', '.join(args.ckpts)}: expected names that differ in more than their signs")
    for source in folders:
        if not Path(source).exists() and source.endswith(".safetensors"):
            raise BadInput(f"{source}: no such file, expected a checkpoint or a folder of sampler.py")
    args.measures = measures_of(args)
    prompts = data.read_prompts(args.prompts)
    settings = {"data": data.fingerprint(data.read_folder(args.data)),
                "real_images": trials.real_images(args.data), "sampling": args.sampling,
                "prompts": text_hash(*prompts), "measures": args.measures}
    with trials.claimed(args.out, settings, older={"prompts": prompts}):
        for source, folder in folders.items():
            made = trials.cell(folder, lambda folder, source=source: measure(args, source, folder))
            was, now = made.get("hash"), hash_of(source)  # None: of the hub, or by an earlier version
            if was is not None and was != now:
                raise BadInput(f"{folder}: holds the figures of {made.get('source')} with hash {was!r:.12}, "
                               f"{source} has {now!r:.12}; remove that folder, or give another --out")
            write_table(args)
    print((args.out / "table3.md").read_text(encoding="utf-8"))


def write_table(args):
    """table3.md and table3.json of everything in the folder."""
    found = [trials.result(file.parent, ["n"]) for file in sorted(args.out.glob("*/result.json"))]
    for r in found:
        missing = [name for name in args.measures if not isinstance(r.get(name), dict)]
        if missing or "source" not in r:
            raise BadInput(f"{args.out}: a result.json without {(*missing, 'source')[0]}, expected those of "
                           "table3; the folder is to hold nothing else")
        for name in args.measures:
            if wrong := [k for k, v in r[name].items() if k not in ("space", "weights")
                         and v is not None and not is_number(v)]:
                raise BadInput(f"{args.out}: the result.json of {r['source']}: expected {name}, {wrong[0]}, "
                               f"a finite number, got {r[name][wrong[0]]!r:.60}")
    for name in args.measures:
        trials.one_space(args.out, [trials.space_name(r[name], args.out) for r in found])
    keys = {"fid": "FID", "fid_fake_half": "FID, equal n", "fid_real_half": "FID of real images, equal n",
            "inception_score": "Inception Score", "precision": "precision", "recall": "recall"}
    shown = {name: [k for k in keys if any(r[name].get(k) is not None for r in found)]
             for name in args.measures}
    heads = ["images of", "n", *(f"{keys[k]}, {name}" for name in shown for k in shown[name])]
    rows = [[r["source"], r["n"], *(trials.number(r[name].get(k)) for name in shown for k in shown[name])]
            for r in found]
    notes = [f"Real images: {args.data}. Checkpoints were sampled here: prompts {args.prompts}, one image "
             f"each, {args.sampling or 'the defaults of sampler.py'}; folders as their config.json says."]
    sizes = sorted({r[name]["n_half"] for r in found for name in args.measures
                    if r[name].get("n_half") is not None})
    if sizes:
        notes.append(f"Equal n: {', '.join(map(str, sizes))} images of either side, since the distance "
                     "of fewer is larger: compare these two columns, the second is a perfect model's.")
    notes += [OFFICIAL] if SOFTMAX[0] in args.measures else [NOT_OFFICIAL]
    if any(r[name]["weights"] == "rule" for r in found for name in args.measures):
        notes.append("Features of random weights: no figure here says anything.")
    text = f"# table3: submissions\n\n{trials.markdown(heads, rows)}\n" + "".join(f"- {n}\n" for n in notes)
    table = {"measures": args.measures, "notes": notes, "results": found}
    trials.write_table(args.out, "table3", text, table)


def add_flags(parser):
    flag = parser.add_argument
    flag("--ckpt", required=True, help="checkpoint of msdm.py, or a folder, as sampler.py --ckpt")
    flag("--prompts", required=True, help="file of prompts: .txt, one a line, or .csv with a Prompt column")
    flag("--out", required=True, help="folder of the images; the zip is OUT.zip")
    flag("--sampling", default="", help="further flags of sampler.py, as one string")


def add_table3_flags(parser):
    flag = parser.add_argument
    flag("ckpts", nargs="+", metavar="CKPT", help="a checkpoint of msdm.py, or a folder that sampler.py made")
    flag("--data", required=True, help="data folder of the real images")
    flag("--prompts", required=True, help="file of prompts that checkpoints are sampled with, one image each")
    flag("--out", required=True, help="folder of the table; the same command goes on in it")
    flag("--sampling", default="", help="further flags of sampler.py, as one string")
    trials.add_space_flags(parser)
