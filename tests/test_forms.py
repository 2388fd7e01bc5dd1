"""Every form in which Kandinsky is published: what is read is the same model, the rest is one line."""

from command import BadInput

import json
import shutil

import pytest
import torch
from helpers import fixture, manifest
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

import sampler
from encoders import load_transformer
from files import load_safetensors, save_safetensors, write_json
from kandinsky import Kandinsky3, Kandinsky22, Schedule, read_schedule
from kandinsky_networks import build_decoder, build_prior, load_decoder, load_unet3
from movq import build_movq, load_movq
from weights import rename

PROMPT = "Generate an image with 1 polyp."
WEIGHTS = "diffusion_pytorch_model"
FORMAT = {"format": "pt"}  # metadata, without which transformers reads no file
PARTS = {"prior": ("text_encoder", "image_encoder", "prior"), "decoder": ("unet", "movq"),
         "3": ("text_encoder", "unet", "movq")}


@pytest.fixture
def folders(tmp_path):
    """Copies of 2.2's prior and decoder and of Kandinsky 3, to change."""
    names = {"prior": "kandinsky-2-2-prior", "decoder": "kandinsky-2-2-decoder", "3": "kandinsky-3"}
    for name, published in names.items():
        shutil.copytree(fixture(published), tmp_path / name)
        for file in (tmp_path / name).rglob("*"):  # the fixtures may be read-only
            file.chmod(0o755 if file.is_dir() else 0o644)
    return tmp_path


def load_22(folders):
    return Kandinsky22.from_pretrained(folders / "prior", folders / "decoder")


def assert_same(pipeline, other):
    """All that images depend on. Not the images: where weights lie in memory moves them in the last bit."""
    other = vars(other)
    for name, part in vars(pipeline).items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = part.state_dict(), other[name].state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
        elif isinstance(part, Schedule):
            assert torch.equal(part.timesteps(7), other[name].timesteps(7))
            assert str(vars(part)) == str(vars(other[name]))
        elif name == "tokenizer":
            assert part(PROMPT, padding="max_length", max_length=77).data == other[name](
                PROMPT, padding="max_length", max_length=77).data


def weights_of(folders, *kinds):
    """The files of weights of these folders, networks and encoders."""
    parts = [folders / kind / part for kind in kinds for part in PARTS[kind]]
    return [next(part.glob("*.safetensors")) for part in parts]


def change_json(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


# What is read


def in_shards(folders):
    for file in weights_of(folders, "prior", "decoder"):
        tensors, stem = load_safetensors(file)[0], file.stem
        index = {k: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(sorted(tensors))}
        for name in set(index.values()):
            save_file({k: v for k, v in tensors.items() if index[k] == name}, file.with_name(name), FORMAT)
        write_json(file.with_name(f"{stem}.safetensors.index.json"), {"metadata": {}, "weight_map": index})
        file.unlink()


def beside_half_precision(folders):
    for file in weights_of(folders, "prior", "decoder"):
        wrong = {k: torch.full_like(v, torch.nan) for k, v in load_safetensors(file)[0].items()}
        save_safetensors(file.with_name(f"{file.stem}.fp16.safetensors"), wrong)


def of_older_names(folders):
    """Of MoVQ's attention, as the first checkpoints have them."""
    file = folders / f"decoder/movq/{WEIGHTS}.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_safetensors(file)[0]
    renamed = {rename(k, tuple(older.items())): v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_safetensors(file, renamed)


def averaged(folders):
    """As diffusers' training scripts save unet_ema."""
    notes = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 9, "power": 2 / 3,
             "update_after_step": 0, "use_ema_warmup": False}
    for part in ("prior/prior", "decoder/unet"):
        change_json(folders / part / "config.json", **notes)


def of_another_solver(folders):
    """A scheduler as diffusers saves it after from_config: old settings stay, the solver's own are added."""
    file = folders / "decoder/scheduler/scheduler_config.json"
    change_json(file, _class_name="DPMSolverMultistepScheduler",
                algorithm_type="dpmsolver++", euler_at_final=False, final_sigmas_type="zero", flow_shift=1.0,
                lambda_min_clipped=-float("inf"), lower_order_final=True, solver_order=2,
                solver_type="midpoint", time_shift_type="exponential", use_beta_sigmas=False,
                use_dynamic_shifting=False, use_exponential_sigmas=False, use_flow_sigmas=False,
                use_karras_sigmas=True, use_lu_lambdas=False)


def tokenizer_of_two_files(folders):
    (folders / "prior/tokenizer/tokenizer.json").unlink()


def through_links(folders):
    """As the hub's cache: snapshots link to blobs."""
    for kind in ("prior", "decoder"):
        repository = folders / f"models--owner--{kind}"
        for file in [f for f in (folders / kind).rglob("*") if f.is_file()]:
            link = repository / "snapshots/0123" / file.relative_to(folders / kind)
            link.parent.mkdir(parents=True, exist_ok=True)
            (repository / "blobs").mkdir(exist_ok=True)
            blob = repository / "blobs" / file.relative_to(folders / kind).as_posix().replace("/", "-")
            file.rename(blob)
            link.symlink_to(blob)
        shutil.rmtree(folders / kind)
        (repository / "snapshots/0123").rename(folders / kind)


@pytest.mark.parametrize("form", [in_shards, beside_half_precision, of_older_names, averaged,
                                  of_another_solver, tokenizer_of_two_files, through_links])
def test_a_published_form_is_the_same_model(form, folders):
    form(folders)
    original = Kandinsky22.from_pretrained(fixture("kandinsky-2-2-prior"), fixture("kandinsky-2-2-decoder"))
    assert_same(load_22(folders), original)


def combined(folders):
    """The folder that diffusers' combined pipeline saves."""
    for part in (folders / "prior").iterdir():
        if part.is_dir():
            part.rename(folders / "decoder" / f"prior_{part.name}")
    return folders / "decoder"


def test_the_combined_layout_is_enough_by_itself(folders):
    def pixels(out, *flags):
        common = ["--prompt", PROMPT, "--steps", "2", "--size", "64"]
        sampler.main([*flags, *common, "--out", str(folders / out)])
        return (folders / out / "config.json"), sampler.data.open_image(folders / out / "images/000000.png")

    _, expected = pixels("two", "--ckpt", str(folders / "prior"), "--decoder", str(folders / "decoder"))
    shutil.copytree(folders / "decoder", folders / "alone")
    both = combined(folders)
    config, image = pixels("one", "--ckpt", str(both))
    assert image.tobytes() == expected.tobytes() and "decoder" not in json.loads(config.read_text())
    _, image = pixels("other", "--ckpt", str(both), "--decoder", str(folders / "alone"))
    assert image.tobytes() == expected.tobytes()


def rounded_to_half(folders, *kinds):
    """Round all weights to half precision; afterwards the folders hold a variant of the same values too."""
    for file in weights_of(folders, *kinds):
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_safetensors(file)[0].items()}
        save_file(tensors, file.with_name(f"{file.stem}.fp16.safetensors"), FORMAT)
        full = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(full, file, FORMAT)


def test_folders_of_half_precision_alone_are_read_encoders_too(folders):
    rounded_to_half(folders, "prior", "decoder", "3")
    expected = load_22(folders), Kandinsky3.from_pretrained(folders / "3")
    expected[1].prepare([PROMPT])
    for file in [f for f in folders.rglob("*.safetensors") if ".fp16" not in f.name]:
        file.unlink()
    found = load_22(folders), Kandinsky3.from_pretrained(folders / "3")
    found[1].prepare([PROMPT])
    for pipelines in zip(found, expected, strict=True):
        assert_same(*pipelines)
    torch.testing.assert_close(found[1].texts, expected[1].texts, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "read"), [(torch.float32, 1.0), (torch.bfloat16, 2.0),
                                             (torch.float16, 2.0)])
def test_of_two_precisions_an_encoder_reads_the_one_that_is_downloaded(folders, dtype, read):
    file = folders / "prior/text_encoder/model.safetensors"
    tensors = load_safetensors(file)[0]
    for name, value in ((file.name, 1.0), ("model.fp16.safetensors", 2.0)):
        marked = torch.full_like(tensors["text_projection.weight"], value)
        save_file(tensors | {"text_projection.weight": marked}, file.with_name(name), FORMAT)
    encoder = load_transformer(CLIPTextModelWithProjection, file.parent, dtype)
    assert (encoder.text_projection.weight == read).all() and encoder.dtype == dtype


def test_an_encoder_of_half_precision_in_shards_is_read(folders):
    folder = folders / "3/text_encoder"
    whole = load_transformer(T5EncoderModel, folder, torch.float16)
    shutil.rmtree(folder)
    whole.save_pretrained(folder, variant="fp16", max_shard_size="50KB")
    assert len(list(folder.glob("*.fp16*"))) > 2
    again = load_transformer(T5EncoderModel, folder, torch.bfloat16)
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a.bfloat16(), b) for a, b in pairs)


OLDER = {  # a network: settings that its file lacks as first published, others that it has
    "kandinsky-2-2-prior": (["added_emb_type", "clip_embed_dim", "embedding_proj_dim", "time_embed_act_fn",
                             "embedding_proj_norm_type", "encoder_hid_proj_type", "norm_in_type",
                             "time_embed_dim"], {}),
    "kandinsky-2-2-movq": (["mid_block_add_attention", "lookup_from_codebook", "force_upcast"], {}),
    "kandinsky-2-2-unet": (["addition_time_embed_dim", "attention_type", "dropout", "num_attention_heads",
                            "reverse_transformer_layers_per_block", "transformer_layers_per_block"],
                           {"class_embeddings_concat": None, "_name_or_path": "/home/someone"})}


@pytest.mark.parametrize("name", OLDER)
def test_the_settings_of_the_first_published_files(name):
    lacking, more = OLDER[name]
    config = manifest(name)["config"]
    older = {k: v for k, v in config.items() if k not in lacking} | more
    build = {"prior": build_prior, "movq": build_movq, "unet": build_decoder}[name.split("-")[-1]]
    with torch.device("meta"):
        shapes = [[(k, v.shape) for k, v in build(c).state_dict().items()] for c in (config, older)]
    assert shapes[0] == shapes[1] and set(lacking) <= config.keys()


def test_movq_with_other_groups_in_its_encoder(folders):
    """The decoder's norms have 32 groups in the reference, whatever the file says."""
    file = folders / "decoder/movq/config.json"
    change_json(file, norm_num_groups=8)
    movq = load_movq(file.parent)
    norms = {k: m.num_groups for k, m in movq.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert {n for k, n in norms.items() if k.startswith("encoder")} == {8}
    assert {n for k, n in norms.items() if k.startswith("decoder")} == {32}
    img = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(movq.encode(img), load_movq(fixture("kandinsky-2-2-decoder") / "movq").encode(img))


# Schedules


@pytest.mark.parametrize(("kind", "clip", "spacing"), [
    ("DDPMScheduler", 1.0, "leading"), ("DDIMScheduler", 1.0, "leading"), ("PNDMScheduler", None, "leading"),
    ("DPMSolverMultistepScheduler", None, "linspace"), ("EulerDiscreteScheduler", None, "linspace"),
    ("EulerAncestralDiscreteScheduler", None, "linspace"), ("UniPCMultistepScheduler", None, "linspace"),
    ("LMSDiscreteScheduler", None, "linspace"), ("DEISMultistepScheduler", None, "linspace"),
    ("DPMSolverSinglestepScheduler", None, "linspace")])
def test_a_schedule_has_the_defaults_of_its_class(kind, clip, spacing, tmp_path):
    file = tmp_path / "scheduler_config.json"
    write_json(file, {"_class_name": kind, "variance_type": None})
    s = read_schedule(tmp_path)
    assert (s.clip, s.spacing, s.prediction, s.variance, s.unclip) == (clip, spacing, "eps", "small", False)
    write_json(file, {"_class_name": kind, "beta_schedule": "scaled_linear", "beta_start": 0.001,
                      "prediction_type": "v_prediction", "clip_sample": True, "clip_sample_range": 2.0,
                      "variance_type": "fixed_large", "timestep_spacing": "trailing", "thresholding": True})
    s = read_schedule(tmp_path)
    assert (s.clip, s.spacing, s.prediction, s.variance) == (2.0, "trailing", "v", "large")
    assert s.threshold == (0.995, 1.0) and s.alpha_bar[0] == pytest.approx(1 - 0.001)


# What is refused


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def pickled(path):
    """The weights beside it as a pickle, in their place."""
    (file,) = path.parent.glob("*.safetensors")
    torch.save(load_safetensors(file)[0], path)
    file.unlink()


def original(path):
    torch.save({"w": torch.ones(2)}, path)


def setting(**changes):
    return lambda path: change_json(path, **changes)


def without_merges(path):
    """Half of a vocabulary: transformers would spell every word."""
    (path.parent / "tokenizer.json").unlink()
    path.unlink()


INPAINTING = "an inpainting U-Net, which also reads a mask; expected that of a model from text to image"
LFS = "a git-lfs pointer instead of the file: run `git lfs pull`"


@pytest.mark.parametrize(("kind", "file", "change", "said"), [
    *(("2.2", f"{part}.safetensors", pointer, LFS) for part in (
        f"prior/prior/{WEIGHTS}", f"decoder/movq/{WEIGHTS}", "prior/text_encoder/model",
        "prior/image_encoder/model")),
    ("3", "3/tokenizer/spiece.model", pointer, LFS), ("3", "3/tokenizer/tokenizer.json", pointer, LFS),
    ("2.2", "decoder/unet/config.json", pointer, LFS),
    ("2.2", f"decoder/unet/{WEIGHTS}.bin", pickled, f"unet: holds pickles only ({WEIGHTS}.bin), which may "
     "run code and are not read: save it as safetensors"),
    ("2.2", "prior/image_encoder/pytorch_model.bin", pickled, "image_encoder: holds pickles only (pytorch"),
    ("2.2", "decoder/unet/config.json", setting(in_channels=9), INPAINTING),
    ("3", "3/unet/config.json", setting(in_channels=9), INPAINTING),
    ("2.2", "decoder/unet/config.json", setting(in_channels=8, addition_embed_type="image_hint"),
     "addition_embed_type='image_hint': a ControlNet, which also reads a hint image; expected"),
    *((kind, f"{folder}/unet/config.json", setting(_class_name="UNet2DConditionModel", addition_embed_type=
                                                   "text_image", encoder_hid_dim_type="text_image_proj"),
       "a U-Net of Kandinsky 2.1; expected") for kind, folder in (("2.2", "decoder"), ("3", "3"))),
    *((kind, "kandinsky3.pt", original, "kandinsky3.pt: a pickle of torch.save (.pt, .ckpt, .bin), which may")
      for kind in ("2.2", "3")),
    ("3", "3/text_encoder", shutil.rmtree, "text_encoder: no such folder, expected the model's text_encoder"),
    ("3", "3/text_encoder/model.safetensors", pointer, LFS),
    *((kind, f"{folder}/tokenizer", shutil.rmtree, "tokenizer: no such folder, expected the model's "
       "tokenizer there, as published: download") for kind, folder in (("2.2", "prior"), ("3", "3"))),
    ("2.2", "prior/tokenizer/merges.txt", without_merges, "no vocabulary, expected tokenizer.json, "
     "or vocab.json and merges.txt, or spiece.model: download"),
    ("3", "3/tokenizer/tokenizer_config.json", setting(extra_ids=2**31), "extra_ids is 2147483648, expected"),
])
def test_what_is_not_read_is_named_in_one_line(kind, file, change, said, folders):
    change(folders / file)
    model = ["--ckpt", folders / "prior", "--decoder", folders / "decoder"] if kind == "2.2" else [
        "--ckpt", folders / "3"]
    if change is original:
        model[-1] = folders / file  # as --decoder, as --ckpt
    flags = [*model, "--prompt", "x", "--size", 64, "--out", folders / "out"]
    with pytest.raises(BadInput) as error:
        sampler.main([str(flag) for flag in flags])
    assert said in str(error.value) and "\n" not in str(error.value) and not (folders / "out").exists()


def test_a_folder_of_original_checkpoints_is_named(folders):
    original(folders / "decoder/movq/movq.ckpt")
    (folders / "original").mkdir()
    original(folders / "original/kandinsky3.pt")
    for cls in (Kandinsky3, Kandinsky22):
        with pytest.raises(BadInput, match=r"original: holds pickles \(kandinsky3.pt\), an original check"):
            cls.from_pretrained(folders / "original")
    assert load_movq(folders / "decoder/movq")  # beside safetensors they are no matter


@pytest.mark.parametrize(("build", "found", "expected"), [
    (lambda f: Kandinsky3.from_pretrained(f / "prior"), "the prior of Kandinsky 2.2", "Kandinsky 3"),
    (lambda f: Kandinsky3.from_pretrained(combined(f)), "the prior and the decoder of", "Kandinsky 3"),
    (lambda f: Kandinsky22.from_pretrained(f / "3"), "Kandinsky 3", "the decoder of Kandinsky 2.2"),
    (lambda f: Kandinsky22.from_pretrained(f / "decoder", f / "decoder"), "the decoder", "the prior of Kan"),
    (lambda f: Kandinsky22.from_pretrained(f / "prior", f / "3"), "Kandinsky 3", "the decoder of Kandinsky")])
def test_another_model_is_named(build, found, expected, folders):
    with pytest.raises(BadInput, match=f"holds {found}.*; expected {expected}"):
        build(folders)


def test_networks_of_each_other_are_refused(folders):
    """Without a pipeline, whose folder would be named."""
    for load, part, kind in ((load_decoder, "3/unet", "UNet2DConditionModel, got Kandinsky3UNet"),
                             (load_unet3, "decoder/unet", "Kandinsky3UNet, got UNet2DConditionModel")):
        with pytest.raises(BadInput, match=f"expected the config of a {kind}"):
            load(folders / part)
