"""Feature spaces other than Inception's, and the protocol of 2025, on tiny networks and known arrays."""

from command import BadInput

import csv
import json
import math

import numpy as np
import pytest
import torch
import transformers
from helpers import ROOT, judge_file, two_ranks
from PIL import Image

import imageclef
import metrics
import spaces
from classifier import Classifier
from files import load_safetensors, save_safetensors

VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20,
          "image_size": 32, "patch_size": 8}
PROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20,
        "vocab_size": 50}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders as transformers writes them, of random weights."""
    root, t = tmp_path_factory.mktemp("encoders"), transformers
    torch.manual_seed(0)
    models = {
        "vit": (t.ViTForImageClassification(t.ViTConfig(**VISION)),
                t.ViTImageProcessor(size={"height": 32, "width": 32})),
        "dinov2": (t.Dinov2Model(t.Dinov2Config(**VISION)), t.BitImageProcessor(**PROCESSOR)),
        "clip": (t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
                 t.CLIPImageProcessor(**PROCESSOR)),
        "tower": (t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**VISION, projection_dim=8)),
                  t.CLIPImageProcessor(**PROCESSOR)),
        "convnext": (t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),
                     t.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0)),
    }
    for name, (model, processor) in models.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


def images(n=3, side=48, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "features", "width"), [
    ("vit", "CLS state", 16), ("dinov2", "CLS state", 16), ("clip", "image embedding", 8),
    ("tower", "image embedding", 8), ("convnext", "pooled state", 8)])
def test_a_vision_model_of_transformers_is_a_space(encoders, name, features, width):
    net = spaces.load(str(encoders / name))
    x = net(images())["features"]
    assert net.features == features and x.shape == (3, width) and x.isfinite().all()
    torch.testing.assert_close(net(images()[1:2])["features"], x[1:2], atol=1e-5, rtol=1e-4)
    pixels = net.processor(images=[img.permute(1, 2, 0).numpy() for img in images()], return_tensors="pt")
    with torch.no_grad():
        if name == "clip":
            expected = net.net.visual_projection(net.net.vision_model(**pixels).pooler_output)
        elif name == "tower":
            expected = net.net(**pixels).image_embeds
        else:
            out = net.net(**pixels)
            expected = out.last_hidden_state[:, 0] if features == "CLS state" else out.pooler_output
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-4)


def test_a_folder_that_is_no_space_is_one_line(encoders, tmp_path):
    def error(change, of="vit"):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in (encoders / of).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
        with pytest.raises(BadInput) as caught:
            spaces.load(str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def without(*names):
        def change(folder):
            tensors, _ = load_safetensors(folder / "model.safetensors")
            kept = {k: v.clone() for k, v in tensors.items() if not k.endswith(names)}
            save_safetensors(folder / "model.safetensors", kept, header={"format": "pt"})
        return change

    def pickled(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def own_code(folder):
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
        config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    assert "no such file" in error(lambda folder: (folder / "preprocessor_config.json").unlink())
    assert "no such file" in error(lambda folder: (folder / "config.json").unlink())
    assert "lacks weights of ViTModel: embeddings.cls_token" in error(without("cls_token"))
    assert "pickles only" in error(pickled)
    assert "does not load" in error(own_code) and not (tmp_path / "ran").exists()
    with pytest.raises(BadInput, match="no such folder"):
        spaces.load(str(tmp_path / "absent"))
    for file in (tmp_path / "absent", encoders / "vit/model.safetensors"):
        with pytest.raises(BadInput, match="expected an attribute classifier"):
            spaces.load(f"classifier:{file}")
    t = transformers
    t.BertModel(t.BertConfig(**TEXT)).save_pretrained(tmp_path / "text")
    t.ViTImageProcessor().save_pretrained(tmp_path / "text")
    with pytest.raises(BadInput, match="BertModel reads input_ids, expected a model of images"):
        spaces.load(str(tmp_path / "text"))


@pytest.mark.parametrize(("change", "words"), [
    ("random", "ViTMAEModel, .*other features of the same image each time"),
    ("no pooled state", "SegformerModel, .*gives no features of an image"),
    ("films", "VideoMAEModel, .*gives no features of an image"),
    ("another size", r"ViTModel, .*gives no features of an image \(Input image size \(48\*48\)"),
    ("infinite", r"ViTModel, .*gives features \(1, 16\) of one image, expected a row of finite numbers")])
def test_a_model_that_makes_no_features_or_others_each_time_is_no_space(tmp_path, change, words):
    t = transformers
    width, side = {f"decoder_{k}": v for k, v in VISION.items() if "size" not in k} | {
        "decoder_hidden_size": 16, "decoder_intermediate_size": 16}, 48 if change == "another size" else 32
    model = {
        "random": lambda: t.ViTMAEModel(t.ViTMAEConfig(**VISION, **width)),
        "no pooled state": lambda: t.SegformerModel(t.SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4,
                                                                      num_attention_heads=[1] * 4)),
        "films": lambda: t.VideoMAEModel(t.VideoMAEConfig(**VISION, num_frames=2)),
    }.get(change, lambda: t.ViTModel(t.ViTConfig(**VISION)))()
    if change == "infinite":
        torch.nn.init.constant_(model.layernorm.weight, 3e38)
    model.save_pretrained(tmp_path)
    t.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=words):
        spaces.load(str(tmp_path))


def test_a_classifier_of_another_version_says_the_way_out(tmp_path):
    tensors, meta = load_safetensors(judge_file(tmp_path / "j.safetensors"))
    save_safetensors(tmp_path / "j.safetensors", tensors, meta | {"values": meta["values"][1:]})
    with pytest.raises(BadInput, match="j.safetensors: made by another version.*again with judges"):
        spaces.load(f"classifier:{tmp_path / 'j.safetensors'}")


def test_the_attribute_classifier_is_a_space(tmp_path):
    file = judge_file(tmp_path / "a.safetensors")
    net, own = spaces.load(f"classifier:{file}"), Classifier(32).eval()
    own.load_state_dict(load_safetensors(file)[0])
    with torch.no_grad():
        torch.testing.assert_close(net(images(side=32))["features"], own.embed(images(side=32)))
    save_safetensors(tmp_path / "b.safetensors", own.state_dict(), {"kind": "judge", "size": 33})
    with pytest.raises(BadInput, match="do not describe a model .size=33"):
        spaces.load(f"classifier:{tmp_path / 'b.safetensors'}")
    flat = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    large = flat.repeat(1, 1, 2, 2)  # resized to the classifier's own size: the same flat image
    torch.testing.assert_close(net(large)["features"], net(flat)["features"], atol=1e-4, rtol=1e-4)


# The command

PROMPTS = ["one polyp", "a single polyp", "no polyp", "a clean colon"]


@pytest.fixture()
def folders(tmp_path):
    """Twelve images each: real ones of the prompts 0 and 2, fakes of all four; the pairs are 0-1 and 2-3."""
    rng = np.random.default_rng(0)
    for name, n_prompts, column in (("real", 2, "Filename"), ("fake", 4, "Filename")):
        (tmp_path / name / "images").mkdir(parents=True)
        rows = []
        for i in range(12):
            img = rng.integers(0, 200 if name == "real" else 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(img).save(tmp_path / name / "images" / f"{i:02}.png")
            rows.append([f"{i:02}.png", PROMPTS[(4 // n_prompts) * (i % n_prompts)]])
        with open(tmp_path / name / "prompts.csv", "w", newline="") as f:
            csv.writer(f).writerows([[column, "Prompt"], *rows])
    (tmp_path / "pairs.csv").write_text("Prompt,Paraphrase\none polyp,a single polyp\n"
                                        "a single polyp,one polyp\n"
                                        "no polyp,a clean colon\ntwo polyps,a pair of polyps\n")
    return tmp_path


def command(folder, *more):
    out = folder / "out.json"
    metrics.main(["--real", str(folder / "real"), "--fake", str(folder / "fake"), "--workers", "0",
                  "--device", "cpu", "--json", str(out), *map(str, more)])
    return json.loads(out.read_text())


def both_features(net, folder):
    """Of the real and of the fake images, one image at a time."""
    for name in ("real", "fake"):
        pixels = (np.array(Image.open(p)) for p in metrics.image_files(folder / name))
        yield torch.cat([net(torch.from_numpy(x).permute(2, 0, 1)[None])["features"] for x in pixels])


def test_the_table_of_another_space_names_it(folders, encoders, capsys):
    numbers = command(folders, "--features", encoders / "dinov2")
    text = capsys.readouterr().out
    for word in ("Frechet distance", "KID", "precision", "recall", "density", "coverage", "95 %: ",
                 f"features  {encoders / 'dinov2'}: CLS state", "image processor", "comparable neither",
                 "small sets: 12 images for 16 features"):
        assert word in text, word
    assert "FID  " not in text and "Inception Score" not in text and "published file" not in text
    net = spaces.load(str(encoders / "dinov2"))
    real, fake = both_features(net, folders)
    assert numbers["fid"] == pytest.approx(metrics.fid(real, fake), rel=1e-4)
    assert numbers["fid_low"] <= numbers["fid"] <= numbers["fid_high"]
    assert numbers["features"] == str(encoders / "dinov2") and numbers["n_fake"] == 12
    without = command(folders, "--features", encoders / "dinov2", "--bootstrap", 0)
    assert without["coverage"] == numbers["coverage"] and not any(k.endswith("_low") for k in without)
    by_judge = command(folders, "--features", f"classifier:{judge_file(folders / 'j.safetensors')}")
    assert by_judge["fid"] != numbers["fid"] and "before the last layer" in by_judge["space"]


def test_two_processes_give_the_figures_of_one_in_another_space(folders, encoders):
    flags = ["--real", folders / "real", "--fake", folders / "fake", "--features", encoders / "vit",
             "--batch-size", 4, "--device", "cpu", "--workers", 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # as under torchrun
    metrics.main([*map(str, flags), "--json", str(folders / "one.json")])
    torch.set_num_threads(threads)
    two_ranks(ROOT / "metrics.py", *flags, "--cache", folders / "two", "--json", folders / "two.json")
    one, two = (json.loads((folders / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one | {"seconds": 0} == two | {"seconds": 0}


@pytest.mark.parametrize(("flags", "words"), [
    (["--features", "X", "--weights", "rule"], "--weights rule: is of the Inception"),
    (["--features", "X", "--resize", "antialias"], "--resize antialias: is of the Inception"),
    (["--features", "X", "--protocol", "imageclef"], "--protocol imageclef has features of its own"),
    (["--protocol", "imageclef2025"], "expected --pairs FILE"),
    (["--pairs", "p.csv"], "--pairs p.csv: only --protocol imageclef2025 reads it"),
    (["--protocol", "imageclef2025", "--pairs", "p.csv", "--real-stats", "s.safetensors"],
     "not --real-stats"),
    (["--protocol", "imageclef2025", "--pairs", "absent.csv"], "absent.csv: no such file"),
    (["--protocol", "imageclef2025", "--pairs", "p.csv", "--kid-subset-size", "10"], "2025 has no KID"),
    (["--bootstrap", "-1"], "--bootstrap -1: expected at least 20 resamples"),
    (["--bootstrap", "1"], "--bootstrap 1: expected at least 20 resamples"),
    (["--bootstrap", "1000000"], "--bootstrap 1000000: expected at most 100000 resamples"),
    (["--features", ""], "--features '': expected inception, a vision model"),
    (["--features", "classifier:"], "--features 'classifier:': expected .* classifier:FILE"),
])
def test_flags_that_do_not_belong_together(folders, flags, words):
    with pytest.raises(BadInput, match=words) as error:
        command(folders, *flags)
    assert "\n" not in str(error.value) and not list(folders.rglob(".features"))


# The protocol of 2025

def unit(angles):
    a = torch.tensor(angles, dtype=torch.float64) * math.pi / 180
    return torch.stack([a.cos(), a.sin()], 1)


def test_the_formulas_of_2025_on_known_features():
    real = {"a": unit([0, 90]), "b": unit([0, 90]), "c": unit([0])}
    fake = {"a": unit([0, 90]), "b": unit([180, 270]), "c": unit([0, 60]), "d": unit([45])}
    # b: the mean is the opposite, (-1/2, -1/2) for (1/2, 1/2), the covariance the same: distance 2
    assert imageclef.fidelity(real, fake).tolist() == pytest.approx([100, 100 / 3])
    # a with c: cosines of 0 and 60 degrees to 0, of 90 and 30 degrees to 90; a with d: of 45 degrees
    pairs = [("a", "c"), ("a", "d"), ("a", "absent")]
    cosines = [(1 + 0.5 + 0 + 3**0.5 / 2) / 4, 0.5**0.5]
    assert imageclef.agreement(fake, pairs).tolist() == pytest.approx(cosines)
    # chords of 90, 90 and 60 degrees; d has one image
    assert imageclef.diversity(fake).tolist() == pytest.approx([2**0.5, 2**0.5, 1])
    assert imageclef.diversity({"a": unit([0, 120, 240])}).item() == pytest.approx(3**0.5)


def test_features_of_any_length_count_as_directions():
    x = torch.cat([unit([0, 90]), unit([0, 60])])
    groups = [("a", "b")], {"a": [0, 1], "b": [0, 1]}, {"a": [0, 1], "b": [2, 3]}
    numbers = imageclef.evaluate(x[:2], x, groups)
    scaled = imageclef.evaluate(x[:2] * torch.tensor([[3.0], [0.2]]), x * 7, groups)
    assert scaled == pytest.approx(numbers, rel=1e-6)
    assert numbers["fidelity"] == pytest.approx((100 + 100 / (1 + metrics.fid(x[:2], x[2:]))) / 2)
    assert numbers["fid"] == pytest.approx(metrics.fid(x[:2], x))
    assert (numbers["n_fidelity"], numbers["n_agreement"], numbers["n_diversity"]) == (2, 1, 2)


def test_a_bootstrap_of_a_few_prompts_has_no_interval():
    x = unit(range(0, 50, 5))
    for n in (4, 5):
        own = {f"p{k}": [2 * k, 2 * k + 1] for k in range(n)}
        numbers = imageclef.evaluate(x, x.flip(0), ([("p0", "p1")], own, own), resamples=100)
        assert ("fidelity_low" in numbers) == ("diversity_high" in numbers) == (n == 5)
        assert "agreement_low" not in numbers and numbers["n_agreement"] == 1
    assert numbers["fidelity_low"] < numbers["fidelity"] < numbers["fidelity_high"]


def test_the_command_of_2025(folders, encoders, capsys):
    flags = "--protocol", "imageclef2025", "--features", encoders / "vit", "--pairs", folders / "pairs.csv"
    numbers = command(folders, *flags)
    text = capsys.readouterr().out
    for word in ("fidelity", "agreement", "diversity", "Frechet distance of all", "4 of 4 prompts",
                 "2 pairs of prompts", "CLS state, at unit length", imageclef.ENCODER):
        assert word in text, word
    net = spaces.load(str(encoders / "vit"))
    real, fake = (torch.nn.functional.normalize(x.double(), dim=1) for x in both_features(net, folders))
    # row i of the fakes has prompt i % 4, of the reals prompt 2 (i % 2): a paraphrase has its prompt's images
    expected = [100 / (1 + metrics.fid(real[k // 2::2], fake[k::4])) for k in range(4)]
    assert numbers["fidelity"] == pytest.approx(np.mean(expected), rel=1e-4)
    cosines = [(fake[k::4] @ fake[k + 1::4].T).mean().item() for k in (0, 2)]
    assert numbers["agreement"] == pytest.approx(np.mean(cosines), rel=1e-5)
    apart = [torch.pdist(fake[k::4]).mean().item() for k in range(4)]
    assert numbers["diversity"] == pytest.approx(np.mean(apart), rel=1e-4)
    assert numbers["fid"] == pytest.approx(metrics.fid(real, fake), rel=1e-4)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("pairs.csv", "Prompt,Other\na,b\n", "pairs.csv, row 1: expected a column paraphrase"),
    ("pairs.csv", "Prompt,Paraphrase\na,a\n", "pairs.csv: every row repeats its prompt"),
    ("pairs.csv", "Prompt,Paraphrase\na,\n", "pairs.csv, row 2: the prompt is empty"),
    ("pairs.csv", "Prompt,Paraphrase\n", "pairs.csv: no rows"),
    ("pairs.csv", "Prompt,Paraphrase\nx,y\n", "no row has images of both prompts"),
    ("real/prompts.csv", "Filename,Prompt\n00.png,else\n", "no prompt has 2 images and 2 real ones"),
    ("fake/prompts.csv", "Filename,Prompt\n00.png,one polyp\n", "01.png: has no prompt"),
    ("real/images/00.png", None, "00.png: no such image"),
])
def test_pairs_and_captions_that_do_not_fit(folders, encoders, name, content, words):
    if content is None:  # a link to nowhere
        (folders / name).unlink()
        (folders / name).symlink_to("nowhere.png")
    else:
        (folders / name).write_text(content)
    with pytest.raises(BadInput, match=words) as error:
        command(folders, "--protocol", "imageclef2025", "--features", encoders / "vit", "--pairs",
                folders / "pairs.csv")
    assert "\n" not in str(error.value) and not list(folders.rglob(".features"))
