"""metrics.py against recorded reference outputs and as mathematics: identities, exactness, files, errors."""

from command import BadInput

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import ROOT, ranks, two_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import distances
import inception
import metrics

GOLDEN = Path(__file__).parent / "golden" / "metrics"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "metrics"


def normal(n, d, seed=0, shift=0.0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype) + shift


# ---------------------------------------------------------------- the network

@pytest.fixture(scope="module")
def net():
    return inception.Inception("rule")


def test_inception_meets_the_reference(net):
    folder = SHARED if SHARED.is_dir() else GOLDEN  # three images of each size, or one
    recorded = load_file(folder / "inception-recorded.safetensors")
    for size in ("small", "big"):
        for resize in ("tf1", "antialias"):
            features = net(recorded[f"images_{size}"], resize)
            assert list(features) == ["64", "192", "768", "2048", "logits_unbiased", "logits"]
            for name, x in features.items():
                torch.testing.assert_close(x, recorded[f"{resize}.{size}.{name}"], rtol=0, atol=2e-5)


def test_tf1_bilinear_starts_at_the_corner():
    x = torch.tensor([[0.0, 4.0]]).view(1, 1, 1, 2)
    assert inception.tf1_bilinear(x, 4)[0, 0, 0].tolist() == [0, 2, 4, 4]
    x = normal(2, 3 * 7 * 7).view(2, 3, 7, 7).float()
    assert torch.equal(inception.tf1_bilinear(x, 7), x)


def test_weights_of_other_names_and_of_other_networks(tmp_path):
    def first_layers(weights):
        net = inception.Inception(weights)
        return net, net.Conv2d_2a_3x3.conv.weight

    state = published_names()
    net, expected = first_layers(dict(state))
    assert net.source == "state dict" and not net.published

    older = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "older.pth")
    assert torch.equal(first_layers(tmp_path / "older.pth")[1], expected)

    to_position = {name: position for position, name in inception.BY_POSITION.items()}
    wrapped = {k.replace(p := k.split(".")[0] + ".", to_position[p], 1): v for k,
               v in state.items() if k[:3] != "fc."}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    net, found = first_layers(tmp_path / "wrapped.safetensors")
    assert torch.equal(found, expected)
    assert list(net(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))) == ["64", "192", "768",
                                                                     "2048"]    # holds no logits

    with pytest.raises(BadInput, match="expected torchvision's ImageNet Inception-v3"):
        inception.ImageNetInception(tmp_path / "wrapped.safetensors")
    with pytest.raises(BadInput, match=r"fc.weight is \(1000, 2048\), expected \(1008, 2048\)"):
        inception.Inception(state | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    with pytest.raises(BadInput, match="another network.*missing.*unknown, first conv1.weight"):
        inception.Inception({"conv1.weight": torch.zeros(1)})
    with pytest.raises(BadInput, match="1 tensors hold NaN or infinity, first fc.bias"):
        inception.Inception(state | {"fc.bias": torch.full((1008,), torch.nan)})
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(BadInput, match="broken.pth"):
        inception.Inception(tmp_path / "broken.pth")
    torch.save({"a": Path("x")}, tmp_path / "pickle.pth")
    with pytest.raises(BadInput, match="tensors only"):
        inception.Inception(tmp_path / "pickle.pth")
    with pytest.raises(BadInput, match="no such file"):
        inception.Inception(tmp_path / "absent.pth")


def published_names():
    """A rule-made state dict under the published names, as in the file: before the norms are folded in."""
    kept = {}
    fold, inception.Conv.fold = inception.Conv.fold, lambda self: None
    try:
        kept = {k: v.contiguous() for k, v in inception.Inception("rule").state_dict().items()}
    finally:
        inception.Conv.fold = fold
    assert len(kept) == 94 * 6 + 2
    return kept


def test_published_file_is_found_checked_or_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(inception.urllib.request, "urlopen", offline)
    with pytest.raises(BadInput, match="no route.*https://.*6726825d.pth.*--weights"):
        inception.published_file("fid")
    assert inception.cached_file("fid") is None
    path = tmp_path / "checkpoints" / inception.PUBLISHED["fid"]["files"][1]
    path.write_bytes(b"half a file")
    with pytest.raises(BadInput, match="SHA-256"):
        inception.published_file("fid")
    monkeypatch.setitem(inception.PUBLISHED["fid"], "sha256", inception.file_hash(path))
    assert inception.published_file("fid") == inception.cached_file("fid") == path


def test_images_must_be_uint8(net):
    with pytest.raises(BadInput, match="expected uint8"):
        net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(BadInput, match="resize"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "bicubic")


# ---------------------------------------------------------------- statistics

@pytest.fixture(scope="module")
def recorded():
    values = json.loads((GOLDEN / "metrics-recorded.json").read_text())
    return load_file(GOLDEN / "features.safetensors"), values


def test_statistics_meet_the_reference(recorded):
    sets, expected = recorded
    real, fake = sets["real"], sets["fake"]
    assert metrics.fid(real, fake) == pytest.approx(expected["fid"], rel=1e-9)
    moments = [f(x.double().numpy()) for x in (real, fake)
               for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))]
    assert metrics.frechet_distance(*moments) == pytest.approx(expected["fid"], rel=1e-9)
    precision, recall = metrics.precision_recall(real, fake, expected["k"])
    assert (precision, recall) == (expected["precision"], expected["recall"])
    assert metrics.f1_score(precision, recall) == pytest.approx(expected["f1"], abs=1e-12)
    mean, std = metrics.inception_score(sets["logits"], expected["splits"])
    assert mean == pytest.approx(expected["inception_score"]["inception_score_mean"], abs=1e-9)
    assert std == pytest.approx(expected["inception_score"]["inception_score_std"], abs=1e-9)
    assert metrics.kid(real, fake)[0] == pytest.approx(expected["kid_full"], abs=1e-12)
    assert all(type(x) is float for x in (metrics.fid(real, fake), *metrics.kid(real, fake), precision,
                                          recall, mean))



def test_covariances_of_float32_with_fewer_images_than_dimensions_are_taken():
    x = torch.randn(100, 512, generator=torch.Generator().manual_seed(0)).relu()
    mu, cov = x.mean(0), torch.cov(x.T)  # singular, and by rounding not quite without negative eigenvalues
    assert abs(metrics.frechet_distance(mu, cov, mu, cov)) < 1e-2
    assert metrics.frechet_distance(mu, cov, mu + 1, cov) == pytest.approx(512, rel=1e-3)


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    m = np.array([3.0, -4.0, 0.0])
    assert metrics.frechet_distance(np.zeros(3), np.eye(3), m, np.eye(3)) == pytest.approx(25)
    assert metrics.frechet_distance(m, np.zeros((3, 3)), m,
                                    4 * np.eye(3)) == pytest.approx(12)        # tr of the other


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_frechet_distance_equals_the_matrix_root(seed, rank_1, rank_2):
    """Also of singular covariances, where the root needs complex numbers."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank_1, 8)), rng.normal(size=(rank_2, 8))
    cov_1, cov_2 = a.T @ a, b.T @ b
    values = np.linalg.eigvals(cov_1 @ cov_2).real.clip(0)
    expected = np.trace(cov_1) + np.trace(cov_2) - 2 * np.sqrt(values).sum()
    assert metrics.frechet_distance(np.zeros(8), cov_1, np.zeros(8), cov_2) == pytest.approx(expected,
                                                                                             abs=2e-5)


def test_frechet_distance_equals_scipy_where_scipy_is_well_behaved():
    a, b = (np.cov(normal(100, 12, seed).numpy().T) for seed in (1, 2))
    expected = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert metrics.frechet_distance(np.zeros(12), a, np.zeros(12), b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n", [5, 40, 400])
def test_fid_of_a_set_with_itself_is_zero(n):
    x = normal(n, 64).exp() * 3
    assert metrics.fid(x, x) < 1e-6
    moments = x.mean(0), torch.from_numpy(np.cov(x.numpy().T))
    assert metrics.frechet_distance(*moments, *moments) < 1e-4


def test_fid_from_rows_equals_fid_from_covariances():
    """Fewer rows than columns take another way to the same number."""
    for n_1, n_2 in ((20, 30), (20, 300), (300, 20)):
        x, y = normal(n_1, 50, 1), normal(n_2, 50, 2, shift=0.3)
        moments = (m for z in (x, y) for m in (z.mean(0), np.cov(z.numpy().T)))
        assert metrics.fid(x, y) == pytest.approx(metrics.frechet_distance(*moments), rel=1e-7)


def test_arrays_of_any_kind_give_the_same():
    x, y = normal(30, 8, 1, dtype=torch.float32), normal(30, 8, 2, dtype=torch.float32)
    assert metrics.fid(x.numpy(), y) == metrics.fid(x, y.numpy()) == metrics.fid(x, y)
    assert metrics.fid(x.tolist(), y.double()) == pytest.approx(metrics.fid(x, y), rel=1e-6)


# ---------------------------------------------------------------- precision and recall

def brute_force(real, fake, k):
    def covered(a, b):
        ball = (b[:, None] - b[None]).square().sum(2).sort(1).values[:, k]
        return ((a[:, None] - b[None]).square().sum(2) <= ball).any(1).double().mean().item()
    return covered(fake.double(), real.double()), covered(real.double(), fake.double())


@given(st.integers(0, 10**6), st.integers(4, 30), st.integers(4, 30), st.integers(1, 3),
       st.sampled_from([0, 1e2, 1e4]))
@settings(max_examples=60, deadline=None)
def test_precision_and_recall_are_exact(seed, n_real, n_fake, k, offset):
    """On integers every distance is a tie with many others, rims count; far from 0 float32 would fail."""
    rng = torch.Generator().manual_seed(seed)
    real = torch.randint(0, 4, (n_real, 3), generator=rng).float() + offset
    fake = torch.randint(0, 5, (n_fake, 3), generator=rng).float() + offset
    expected = brute_force(real, fake, k)
    assert metrics.precision_recall(real, fake, k) == expected
    assert metrics.precision_recall(fake, real, k) == expected[::-1]


def test_precision_and_recall_in_strips():
    """More rows than a strip of the distance matrix holds."""
    real, fake = normal(600, 5, 1, dtype=torch.float32), normal(530, 5, 2, shift=0.5, dtype=torch.float32)
    assert metrics.precision_recall(real, fake) == brute_force(real, fake, 3)


def test_a_set_covers_itself():
    x = normal(40, 6)
    assert metrics.precision_recall(x, x) == (1, 1)
    copies = torch.ones(20, 6) / 3
    assert metrics.precision_recall(copies, copies) == (1, 1)


def test_a_collapsed_fake_is_precise_and_recalls_nothing():
    real = normal(300, 8)
    collapsed = real[:1] + 1e-3 * normal(300, 8, seed=1)
    precision, recall = metrics.precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.02
    far = normal(300, 8, shift=100.0)
    assert metrics.precision_recall(real, far) == (0, 0) and metrics.f1_score(0, 0) == 0


# ---------------------------------------------------------------- density, coverage, intervals

@given(st.integers(0, 10**6), st.integers(6, 30), st.integers(6, 30), st.integers(1, 5),
       st.sampled_from([0, 1e2, 1e4]))
@settings(max_examples=60, deadline=None)
def test_density_and_coverage_are_exact(seed, n_real, n_fake, k, offset):
    """By the formula of Naeem et al., on integers, where every distance is a tie and rims count."""
    rng = torch.Generator().manual_seed(seed)
    real = torch.randint(0, 4, (n_real, 3), generator=rng).float() + offset
    fake = torch.randint(0, 5, (n_fake, 3), generator=rng).float() + offset
    a, b = real.double(), fake.double()
    ball = (a[:, None] - a[None]).square().sum(2).sort(1).values[:, k]
    within = (b[:, None] - a[None]).square().sum(2) <= ball
    expected = within.sum().item() / (k * n_fake), within.any(0).double().mean().item()
    assert metrics.density_coverage(real, fake, k) == pytest.approx(expected, abs=1e-12)


def test_density_and_coverage_in_strips():
    real, fake = normal(600, 5, 1, dtype=torch.float32), normal(530, 5, 2, shift=0.5, dtype=torch.float32)
    a, b = real.double(), fake.double()
    ball = (a[:, None] - a[None]).square().sum(2).sort(1).values[:, 5]
    within = (b[:, None] - a[None]).square().sum(2) <= ball
    expected = within.sum().item() / (5 * 530), within.any(0).double().mean().item()
    assert metrics.density_coverage(real, fake) == pytest.approx(expected, abs=1e-12)


def test_density_and_coverage_of_known_sets():
    x = normal(400, 8)
    density, coverage = metrics.density_coverage(x, x)
    assert coverage == 1 and density == pytest.approx(6 / 5)  # each real's ball holds itself and five others
    assert metrics.density_coverage(x, normal(400, 8, shift=100.0)) == (0, 0)
    same = [metrics.density_coverage(normal(400, 8, 2 * i), normal(400, 8, 2 * i + 1)) for i in range(10)]
    density, coverage = np.mean(same, 0)
    assert density == pytest.approx(1, abs=0.05) and coverage == pytest.approx(1 - 2**-5, abs=0.02)
    outlier = torch.cat([x, x[:1] + 50])  # a ball that the outlier makes wide adds at most 1 / k a fake
    assert metrics.density_coverage(outlier, normal(400, 8, shift=20.0))[0] <= 1 / 5


def test_intervals_hold_the_mean_of_other_sets_of_the_same_size():
    """95 % intervals of every figure of two Gaussians, and of a share: most of 40 hold it, and they are about
    as wide as the figure varies."""
    n, d = 60, 4

    def pair(i):
        return normal(n, d, 2 * i), normal(n, d, 2 * i + 1, shift=0.7)

    def figures(real, fake):
        return {"fid": metrics.fid(real, fake)} | metrics.neighbours(real, fake)

    true = [figures(*pair(i)) for i in range(1000, 1200)]
    ends = [metrics.intervals(figures, *pair(i), resamples=60) for i in range(40)]
    for name in true[0]:
        values = np.array([t[name] for t in true])
        assert np.mean([e[name][0] <= values.mean() <= e[name][1] for e in ends]) >= 0.8, name
        width = np.mean([high - low for low, high in (e[name] for e in ends)]) / (2 * 1.96 * values.std())
        assert 0.8 < width < 1.3, (name, width)
    shares = [distances.mean_interval(torch.rand(80, generator=torch.Generator().manual_seed(i)) < 0.3)
              for i in range(100)]
    assert np.mean([low <= 0.3 <= high for low, high in shares]) >= 0.87
    width = np.mean([high - low for low, high in shares])
    assert width == pytest.approx(2 * 1.96 * (0.21 / 80)**0.5, rel=0.1)
    wide, narrow = (np.subtract(*metrics.intervals(figures, *(x[:m] for x in pair(0)))["fid"])
                    for m in (15, 60))
    assert wide < narrow < 0
    assert metrics.intervals(figures, *pair(0), resamples=60) == ends[0]
    few = metrics.intervals(figures, *(x[:10] for x in pair(0)))
    assert {"density", "coverage"}.isdisjoint(few) and "fid" in few


@pytest.mark.parametrize("shift", [0.0, 3.0, 4.0])
def test_an_interval_holds_its_figure_and_stays_in_range(shift):
    """Where figures saturate, too: no fake near a real, all reals near a fake."""
    y, x = {"features": normal(100, 4, 1)}, {"features": normal(100, 4, 2, shift=shift)}
    for fake in (x, y):
        found = metrics.evaluate(y, fake, resamples=20)
        ends = [k.removesuffix("_low") for k in found if k.endswith("_low")]
        assert "fid" in ends
        for k in ends:
            assert 0 <= found[f"{k}_low"] <= found[k] <= found[f"{k}_high"], k
            assert found[f"{k}_low"] < found[f"{k}_high"] <= (1 if k[0] in "prc" else math.inf), k


# ---------------------------------------------------------------- KID and Inception Score

def test_kid_is_unbiased_and_knows_its_error():
    """Over many pairs of sets: the mean is 0 where distributions agree, the error is the measured spread."""
    same = [metrics.kid(normal(30, 4, 2 * i), normal(40, 4, 2 * i + 1)) for i in range(300)]
    values = np.array([v for v, _ in same])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    apart = np.array([metrics.kid(normal(60, 4, 2 * i), normal(50, 4, 2 * i + 1, shift=0.7))
                      for i in range(300)])
    assert apart[:, 0].std() == pytest.approx(apart[:, 1].mean(), rel=0.2)


def test_kid_over_subsets():
    real, fake = normal(60, 4, 1), normal(80, 4, 2, shift=0.5)
    whole, error = metrics.kid(real, fake)
    mean, subset_error = metrics.kid(real, fake, subset_size=20)
    assert abs(mean - whole) < 3 * error and 0.3 < subset_error / error < 3
    assert metrics.kid(real, fake, subset_size=20) == (mean, subset_error)
    with pytest.raises(BadInput, match="subset size from 2 to 60"):
        metrics.kid(real, fake, subset_size=61)


def test_inception_score_of_known_predictions():
    sure = 1e3 * torch.eye(10).repeat(10, 1)                # certain and even over ten classes: ten
    mean, std = metrics.inception_score(sure)
    assert mean == pytest.approx(10) and std == pytest.approx(0, abs=1e-9)
    assert metrics.inception_score(torch.zeros(20, 7), splits=2) == pytest.approx((1, 0))


# ---------------------------------------------------------------- bad arrays

@pytest.mark.parametrize(("call", "words"), [
    (lambda x: metrics.fid(x, x[:1]), "fake: expected at least 2 images, got 1"),
    (lambda x: metrics.fid(x[:0], x), "real: expected at least 2 images, got 0"),
    (lambda x: metrics.precision_recall(x[:3], x), "real: expected at least 4 images, got 3"),
    (lambda x: metrics.inception_score(x), "logits: expected at least 10 images, got 9"),
    (lambda x: metrics.fid(x, x[:, :3]), "different widths: real 4, fake 3"),
    (lambda x: metrics.fid(x[0], x), r"real: expected an array \(images, features\)"),
    (lambda x: metrics.kid(x, torch.where(x == x[2, 1], math.nan, x)), "fake: row 2 holds NaN"),
    (lambda x: metrics.frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)), "equal widths"),
    (lambda x: metrics.frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(4)[:3]),
     "cov_2: .*square"),
    (lambda x: metrics.frechet_distance(np.zeros(3), np.tri(3), np.zeros(3), np.eye(3)),
     "cov_1: not symmetric"),
    (lambda x: metrics.frechet_distance(np.zeros(3), -np.eye(3), np.zeros(3), np.eye(3)),
     "cov_1: .*negative"),
])
def test_bad_arrays_are_named(call, words):
    with pytest.raises(BadInput, match=words) as error:
        call(normal(9, 4))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- folders and the command line

class Stand(torch.nn.Module):
    """Stands in for a network: a fixed random projection of the pixels."""

    def __init__(self, weights=None):
        super().__init__()
        self.source, self.published, self.calls = "rule", False, 0
        Stand.last = self

    def forward(self, images, resize):
        self.calls += 1
        x = torch.nn.functional.interpolate(images.float(), (8, 8)).flatten(1) / 255
        return {"2048": x @ normal(192, 16).float(), "logits_unbiased": x @ normal(192, 10, 1).float(),
                "logits": x @ normal(192, 10, 1).float()}


@pytest.fixture()
def folders(tmp_path, monkeypatch):
    """Reals of many sizes and modes, and fakes of one size, read through a network that costs nothing."""
    monkeypatch.setattr(metrics, "Inception", Stand)
    monkeypatch.setattr(metrics, "ImageNetInception", Stand)
    rng = np.random.default_rng(0)
    real, fake = tmp_path / "real" / "images", tmp_path / "fake" / "images"
    real.mkdir(parents=True)
    fake.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(fake / f"{i}.png")
        Image.fromarray(rng.integers(0, 200, (20 + i, 31, 3), dtype=np.uint8)).save(real / f"{i}.jpg")
    Image.open(real / "0.jpg").convert("L").save(real / "grey.png")
    Image.open(real / "1.jpg").convert("CMYK").save(real / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 2**16, (9, 9), dtype=np.uint16)).save(real / "deep.png")
    (fake.parent / "prompts.csv").write_text("Filename,Prompt,Seed\n")
    return tmp_path


def command(folder, *more):
    out = folder / "out.json"
    metrics.main(["--real", str(folder / "real"), "--fake", str(folder / "fake"), "--workers", "0",
                  "--device", "cpu",
                  "--weights", "rule", "--json", str(out), *map(str, more)])
    return json.loads(out.read_text())


def test_command_reports_every_number_with_its_protocol(folders, capsys):
    numbers = command(folders)
    text = capsys.readouterr().out
    for word in ("FID", "real half", "disjoint", "KID", "precision", "recall", "F1", "Inception Score",
                 "15 real, 12 fake", "tf1", "rule", "not comparable", "24 px", " s on cpu"):
        assert word in text
    assert numbers["n_real"] == 15 and numbers["n_fake"] == 12 and numbers["n_half"] == 7
    assert all(math.isfinite(numbers[name])
               for name in ("fid", "fid_real_half", "fid_parts_std", "kid", "f1"))
    features = metrics.extract(Stand(), metrics.image_files(folders / "real"), 24, workers=0)["2048"]
    fakes = metrics.extract(Stand(), metrics.image_files(folders / "fake"), 24, workers=0)["2048"]
    assert numbers["fid"] == pytest.approx(metrics.fid(features, fakes))


def test_features_are_cached_until_a_file_changes(folders):
    first = command(folders)
    assert Stand.last.calls == 2 and len(list((folders / ".features").iterdir())) == 2
    again = command(folders)
    assert Stand.last.calls == 0 and again["fid"] == first["fid"]
    command(folders, "--resize", "antialias")
    assert Stand.last.calls == 2
    Image.new("RGB", (30, 30), "red").save(folders / "real" / "images" / "0.jpg")
    assert command(folders)["fid"] != first["fid"] and Stand.last.calls == 1
    command(folders, "--cache", folders / "elsewhere")
    assert Stand.last.calls == 2 and len(list((folders / "elsewhere").iterdir())) == 2
    next(iter((folders / "elsewhere").glob("fake-*"))).write_bytes(b"broken")
    command(folders, "--cache", folders / "elsewhere")
    assert Stand.last.calls == 1


def test_real_stats_replace_the_real_images(folders, capsys):
    stats = folders / "real.safetensors"
    first = command(folders, "--real-stats", stats)
    arguments = ["--fake", str(folders / "fake"), "--workers", "0", "--device", "cpu"]
    metrics.main([*arguments, "--real-stats", str(stats), "--json", str(folders / "b.json")])
    second = json.loads((folders / "b.json").read_text())
    assert {k: v for k, v in first.items() if k in ("fid", "kid", "recall")}.items() <= second.items()
    with pytest.raises(BadInput, match="made with resize tf1, this run has antialias"):
        metrics.main([*arguments, "--real-stats", str(stats), "--resize", "antialias"])

    x = load_file(stats)["features"].double().numpy()
    np.savez(folders / "moments.npz", mu=x.mean(0), sigma=np.cov(x.T))
    capsys.readouterr()
    metrics.main([*arguments, "--real-stats", str(folders / "moments.npz"), "--json",
                  str(folders / "c.json")])
    third = json.loads((folders / "c.json").read_text())
    assert third["fid"] == pytest.approx(first["fid"], rel=1e-6) and "recall" not in third
    assert f"{first['fid']:.4f}" in capsys.readouterr().out
    for mu, said in ((x.mean(0) * np.nan, "broken.npz: mu: holds NaN"),
                     (x, "broken.npz: mu: expected a vector"),
                     (x.mean(0) + 1j, "broken.npz: mu: expected real numbers, got complex128")):
        np.savez(folders / "broken.npz", mu=mu, sigma=np.cov(x.T))
        with pytest.raises(BadInput, match=said):
            metrics.main([*arguments, "--real-stats", str(folders / "broken.npz")])
    (folders / "broken.npz").write_bytes(b"PK")
    with pytest.raises(BadInput, match="mu and sigma"):
        metrics.main([*arguments, "--real-stats", str(folders / "broken.npz")])
    with pytest.raises(BadInput, match="no such file"):
        metrics.main([*arguments, "--real-stats", str(folders / "absent.safetensors")])


def test_the_official_protocol_reflows_the_buffer(folders, capsys):
    path = folders / "real" / "images" / "3.jpg"
    pixels = np.asarray(Image.open(path))
    flow = metrics.read(path, None)
    assert np.array_equal(flow.permute(1, 2, 0).numpy().ravel()[:pixels.size],
                          pixels.ravel())        # no interpolation
    assert np.array_equal(flow.permute(1, 2, 0).numpy(), np.resize(pixels, (299, 299, 3)))
    numbers = command(folders, "--protocol", "imageclef")
    text = capsys.readouterr().out
    assert "numpy.resize" in text and "Keras" in text and "softmax" in text and "precision" not in text
    assert 0 <= numbers["fid"] <= 2 and "kid" not in numbers
    resized = command(folders, "--protocol", "imageclef-resized")
    assert resized["fid"] != numbers["fid"] and "not comparable" in capsys.readouterr().out


def test_fakes_are_not_touched_by_preprocessing(folders):
    path = folders / "fake" / "images" / "0.png"
    assert np.array_equal(metrics.read(path, 24).permute(1, 2, 0).numpy(),
                          np.asarray(Image.open(path)))


def test_workers_are_threads_and_change_nothing(folders, monkeypatch):
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", None)              # no process is begun
    results = []
    for workers in (0, 3):
        flags = "--workers", workers, "--batch-size", 5, "--cache", folders / f"cache{workers}"
        numbers = command(folders, *flags)
        results.append({k: v for k, v in numbers.items() if k != "seconds"})
    assert results[0] == results[1]


def test_two_processes_share_the_images_and_give_the_numbers_of_one(folders, monkeypatch):
    monkeypatch.undo()                                      # the network itself
    (folders / "fake/images/notes.txt").touch()
    common = ["--real", folders / "real", "--fake", folders / "fake", "--weights", "rule", "--batch-size", 4,
              "--device", "cpu", "--workers", 0]

    def flags(name):
        files = "--json", folders / f"{name}.json", "--real-stats", folders / f"{name}.safetensors"
        return [str(x) for x in (*common, *files, "--cache", folders / f"cache-{name}")]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # as under torchrun
    metrics.main(flags("one"))
    torch.set_num_threads(threads)
    done = two_ranks(ROOT / "metrics.py", *flags("two"))
    assert done.stdout.count("precision  ") == done.stderr.count("1 other files left out") == 1
    assert "8/8" in done.stderr and "4/4" not in done.stderr    # the bar of the first alone
    one, two = (json.loads((folders / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one | {"seconds": 0} == two | {"seconds": 0} and one["n_fake"] == 12 and one["n_real"] == 15
    for path in ("one.safetensors", *(f"cache-one/{p.name}" for p in (folders / "cache-one").iterdir())):
        assert (folders / path).read_bytes() == (folders / path.replace("one", "two")).read_bytes()

    whole = (folders / "fake/images/9.png").read_bytes()
    (folders / "fake/images/z.png").write_bytes(whole[:len(whole) // 2])        # in the share of the second
    ended = ranks(2, ROOT / "metrics.py", *common, "--cache", folders / "cache-two")
    assert [done.returncode for done in ended] == [2, 2], ended
    assert "error: another process of this command stopped" in ended[0].stderr
    assert ended[1].stderr.count("\n") == 1 and "z.png: " in ended[1].stderr


def test_a_result_that_cannot_be_kept_is_refused_before_the_work(folders):
    (folders / "file").touch()
    for flag in ("--json", "--real-stats"):
        with pytest.raises(BadInput, match=f"{flag} .*: cannot be written"):
            command(folders, flag, folders / "file" / "x.safetensors")
    assert not list(folders.rglob(".features"))


def test_only_a_result_of_metrics_is_replaced(folders):
    command(folders)
    command(folders)                                        # its own result is
    for name in ("config.json", "prompt-gt.csv", "x.safetensors"):
        (folders / name).write_text(content := '{"steps": 1}')
        with pytest.raises(BadInput, match=f"--json .*{name}: would be replaced and is not a result"):
            command(folders, "--json", folders / name)
        assert (folders / name).read_text() == content
    (folders / "link.safetensors").symlink_to(folders / "absent")
    with pytest.raises(BadInput, match="--real-stats .*: would be replaced"):
        command(folders, "--real-stats", folders / "link.safetensors")
    with pytest.raises(BadInput, match="--json and --real-stats both name"):
        command(folders, "--real-stats", folders / "z.safetensors", "--json", folders / "z.safetensors")


def test_images_in_subfolders_are_mentioned(folders, capsys):
    (folders / "real/images/more").mkdir()
    for name in ("1.png", "2.JPG", "notes.txt"):
        (folders / "real/images/more" / name).touch()
    assert command(folders)["n_real"] == 15
    assert f"{folders / 'real/images'}: 2 images in subfolders not read\n" in capsys.readouterr().err


def test_images_against_themselves_are_said_to_be(folders, capsys):
    (folders / "real").rename(folders / "given")
    for linked, said in (("fake", 1), ("given", 0)):
        (folders / "real").symlink_to(folders / linked)
        assert (command(folders)["fid"] < 1e-9) == said
        assert capsys.readouterr().err.count("are one folder: the figures are of images") == said
        (folders / "real").unlink()


def test_bad_folders_are_named_in_one_line(folders, capsys):
    fake, real = folders / "fake" / "images", folders / "real" / "images"

    def error(*more):
        with pytest.raises(BadInput) as caught:
            command(folders, *more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (real / "notes.txt").write_text("x")
    command(folders)
    assert "1 other files left out, first notes.txt" in capsys.readouterr().err
    assert "no such folder" in error("--real", folders / "absent")
    (folders / "empty").mkdir()
    assert "no images" in error("--fake", folders / "empty")
    (folders / "one").mkdir()
    Image.new("RGB", (24, 24)).save(folders / "one" / "a.png")
    assert "at least 10 images" in error("--fake", folders / "one")
    assert "at least 4 images" in error("--real", folders / "one")
    assert "--kid-subset-size from 2 to 12" in error("--kid-subset-size", 100)
    (real / "zero.png").write_bytes(b"")
    assert "zero.png" in error() and "empty" in error("--workers", 1)
    (real / "zero.png").unlink()
    Image.new("RGB", (25, 24)).save(fake / "z.png")
    assert "one size" in error() and "25x24" in error()
    (fake / "z.png").write_bytes(b"\x89PNG")
    assert "z.png: " in error()


def test_imagenet_inception_takes_torchvisions_weights(tmp_path):
    state = inception.ImageNetInception("rule").net.state_dict()
    extra = {"AuxLogits.fc.bias": torch.zeros(1000)}
    net = inception.ImageNetInception({**state, **extra})
    assert net.net.fc.out_features == 1000 and not net.published
    with pytest.raises(BadInput, match="expected torchvision's ImageNet"):
        inception.ImageNetInception({**state, "fc.weight": torch.zeros(1008, 2048)})
    assert net(torch.zeros(1, 3, 30, 40, dtype=torch.uint8))["logits"].shape == (1, 1000)
