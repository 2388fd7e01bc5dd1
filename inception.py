"""Networks that turn images into features: the Inceptions with their weights, and encoders of transformers.

Inception arXiv:1512.00567

FID was defined on TensorFlow's graph of December 2015, 299 px, which is not torchvision's network: Inception
below has its average pooling, its last maximum pooling and its 1,008 classes. ImageNetInception is
torchvision's. ImageEncoder is any vision model that transformers has the code of.
"""

from command import BadInput, reason

import math
import re
import shutil
import urllib.request
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from encoders import load_image_processor, load_transformer
from files import file_hash, folder_hash, read_json, read_state, replacing
from weights import fetch


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_ch, out_ch, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_ch, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        """Fold the norm into the convolution: the same function with one pass over memory less."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


def avg_pool(x):
    """3x3 mean without the padding: TensorFlow does not count it, torchvision's Inception does."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    """35 x 35, after arXiv:1512.00567, Fig. 5, with a 5x5 branch as in TensorFlow's graph."""

    def __init__(self, in_ch, pool_ch):
        super().__init__()
        self.branch1x1 = Conv(in_ch, 64, 1)
        self.branch5x5_1 = Conv(in_ch, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(in_ch, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(in_ch, pool_ch, 1)

    def forward(self, x):
        return torch.cat([
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(avg_pool(x)),
        ], 1)


class InceptionB(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, in_ch):
        super().__init__()
        self.branch3x3 = Conv(in_ch, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(in_ch, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, stride=2),
        ], 1)


class InceptionC(nn.Module):
    """17 x 17, 7x7 convolutions as rows and columns (Fig. 6)."""

    def __init__(self, ch):
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, ch, 1)
        self.branch7x7_2 = Conv(ch, ch, **row)
        self.branch7x7_3 = Conv(ch, 192, **column)
        self.branch7x7dbl_1 = Conv(768, ch, 1)
        self.branch7x7dbl_2 = Conv(ch, ch, **column)
        self.branch7x7dbl_3 = Conv(ch, ch, **row)
        self.branch7x7dbl_4 = Conv(ch, ch, **column)
        self.branch7x7dbl_5 = Conv(ch, 192, **row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x):
        y = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(y)),
            self.branch_pool(avg_pool(x)),
        ], 1)


class InceptionD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x):
        y = self.branch7x7x3_2(self.branch7x7x3_1(x))
        return torch.cat([
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(y)),
            F.max_pool2d(x, 3, stride=2),
        ], 1)


class InceptionE(nn.Module):
    """8 x 8, branches that fan out (Fig. 7). In the last block the graph of 2015 has maximum pooling."""

    def __init__(self, in_ch, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(in_ch, 320, 1)
        self.branch3x3_1 = Conv(in_ch, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(in_ch, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(in_ch, 192, 1)

    def forward(self, x):
        y = self.branch3x3_1(x)
        z = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([
            self.branch1x1(x),
            self.branch3x3_2a(y), self.branch3x3_2b(y),
            self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z),
            self.branch_pool(self.pool(x)),
        ], 1)


class Inception(nn.Module):
    """The FID network: uint8 (b, 3, h, w) of any size -> its features by width, and logits of 1,008 classes.

    weights: a file in the published names, "rule" for random ones that a rule makes, a state dict, or None
    for the published file, from the user's cache or downloaded into it. `source` names the weights (fill),
    `published` is True for the published file.
    """

    def __init__(self, weights=None):
        super().__init__()
        with torch.device("meta"):                          # shapes only: the values come from the file
            self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
            self.Conv2d_2a_3x3 = Conv(32, 32, 3)
            self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
            self.Conv2d_3b_1x1 = Conv(64, 80, 1)
            self.Conv2d_4a_3x3 = Conv(80, 192, 3)
            self.Mixed_5b = InceptionA(192, 32)
            self.Mixed_5c = InceptionA(256, 64)
            self.Mixed_5d = InceptionA(288, 64)
            self.Mixed_6a = InceptionB(288)
            self.Mixed_6b = InceptionC(128)
            self.Mixed_6c = InceptionC(160)
            self.Mixed_6d = InceptionC(160)
            self.Mixed_6e = InceptionC(192)
            self.Mixed_7a = InceptionD()
            self.Mixed_7b = InceptionE(1280, avg_pool)
            self.Mixed_7c = InceptionE(2048, max_pool)
            self.fc = nn.Linear(2048, 1008)
        self.source = fill(self, weights, "fid")
        self.published = self.source == PUBLISHED["fid"]["sha256"]
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()
        self.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images, resize="tf1"):
        x = (resized(images, resize, self.Conv2d_1a_3x3.conv.weight.device) - 128) / 128
        features = {}
        with no_tf32():
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, stride=2)
            features["64"] = x.mean((2, 3))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, stride=2)
            features["192"] = x.mean((2, 3))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
            features["768"] = x.mean((2, 3))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
            features["2048"] = x.mean((2, 3))
            if self.fc is not None:
                # without the bias, for the Inception Score
                features["logits_unbiased"] = F.linear(features["2048"], self.fc.weight)
                features["logits"] = features["logits_unbiased"] + self.fc.bias
        return features


class ImageNetInception(nn.Module):
    """torchvision's Inception-v3, as trained on ImageNet: uint8 (b, 3, h, w) -> {"logits": (b, 1000)}."""

    def __init__(self, weights=None):
        super().__init__()
        from torchvision.models import inception_v3  # here, so that FID does not need its 150 MB of memory

        with torch.device("meta"):
            self.net = inception_v3(weights=None, aux_logits=False, init_weights=False)
        self.source = fill(self.net, weights, "imagenet")
        self.published = self.source.startswith(PUBLISHED["imagenet"]["sha256"])
        self.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images, resize="antialias"):
        x = resized(images, resize, self.net.fc.weight.device) / 127.5 - 1  # as in its training, and Keras
        with no_tf32():
            return {"logits": self.net(x)}


class ImageEncoder(nn.Module):
    """A vision model of transformers, by folder or name: uint8 (b, 3, h, w) -> {"features": (b, d)}.

    Its own image processor makes the pixels. The features are the image embedding of a model of images and
    texts (CLIP), else the state of the CLS token (ViT, DINOv2), else the pooled state; `features` says which.
    A pooling layer on top of the CLS state is left out: many checkpoints come without one. BadInput for a
    folder that transformers cannot load as it is, without code of the folder and without pickles, and for a
    model that makes no features of an image, or others each time (ViTMAE hides random parts of it).
    """

    def __init__(self, name):
        super().__init__()
        import transformers  # here: the Inceptions do not need it

        transformers.logging.set_verbosity_error()          # it would report weights that play no part here
        folder = fetch(name, torch.float32)
        self.processor = load_image_processor(folder)
        kind = str(read_json(folder / "config.json").get("architectures"))
        projects = re.search(r"\w+VisionModelWithProjection", kind)    # AutoModel would drop its projection
        cls = getattr(transformers, projects[0] if projects else "AutoModel", transformers.AutoModel)
        self.net = load_transformer(cls, folder, torch.float32)
        has_cls = any(k.endswith(("cls_token", "class_embedding")) for k, _ in self.net.named_parameters())
        embeds = cls is not transformers.AutoModel or hasattr(self.net, "get_image_features")
        if not embeds and self.net.main_input_name != "pixel_values":
            raise BadInput(f"{name}: {type(self.net).__name__} reads {self.net.main_input_name}, expected a "
                           "model of images")
        self.features = "image embedding" if embeds else "CLS state" if has_cls else "pooled state"
        self._try(name)
        self.source, self.published = folder_hash(folder), None     # None: nobody's protocol names it

    def _try(self, name):
        what = f"{name}: {type(self.net).__name__}, after the pixels of its preprocessor_config.json,"
        image = torch.arange(3 * 64 * 64, dtype=torch.uint8).view(1, 3, 64, 64)
        try:
            first, again = (self(image)["features"] for _ in range(2))
        except MemoryError:
            raise
        except Exception as error:                          # whatever a model raises that wants other input
            raise BadInput(f"{what} gives no features of an image ({reason(error)}); expected a model of "
                           "single images with its own image processor") from None
        if len(first) != 1 or first.numel() < 2 or not first.isfinite().all():
            raise BadInput(f"{what} gives features {tuple(first.shape)} of one image, expected a row of "
                           "finite numbers")
        if not first.equal(again):
            raise BadInput(f"{what} gives other features of the same image each time; expected a model that "
                           "draws nothing at random")

    @torch.inference_mode()
    def forward(self, images, resize=None):
        """resize is not used: the image processor has its own."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.net.device)
        with no_tf32():
            if hasattr(self.net, "get_image_features"):
                out = self.net.get_image_features(pixel_values=pixels)
            else:
                out = self.net(pixel_values=pixels)
        if self.features == "CLS state":
            return {"features": out.last_hidden_state[:, 0]}
        x = out.image_embeds if "image_embeds" in out else out.pooler_output
        return {"features": x.flatten(1)}                   # convolutional ones pool to (b, d, 1, 1)


def no_tf32():
    """float32 convolutions: TF32, cuDNN's default, has 10 bits of mantissa and changes the third digit."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def resized(images, how, device):
    """uint8 (b, 3, h, w) -> float (b, 3, 299, 299), still 0 to 255."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise BadInput(f"images: expected uint8 (b, 3, h, w), got {images.dtype} {tuple(images.shape)}")
    x = images.to(device).float()
    if how == "tf1":
        x = tf1_bilinear(x, 299)
    elif how == "antialias":
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False, antialias=True)
    else:
        raise BadInput(f'resize: expected "tf1" or "antialias", got {how!r}')
    return x.contiguous(memory_format=torch.channels_last)


def tf1_bilinear(x, size):
    """TensorFlow 1's resize_bilinear: pixel i is at i * n / size, no half-pixel centres, no antialiasing."""
    for dim in (2, 3):
        n = x.shape[dim]
        where = torch.arange(size, device=x.device) * (n / size)
        low = where.long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        weight = (where - low).view(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


# Weights


PUBLISHED = {
    "fid": {
        # two names of one content
        "files": ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        "url": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
        "sha256": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    },
    "imagenet": {
        "files": ("inception_v3_google-0cc3c7bd.pth",),
        "url": "https://download.pytorch.org/models/",
        "sha256": "0cc3c7bd",                # torchvision publishes the first digits, in the file's name
    },
}
# The published file has torchvision's names. pytorch-fid's module names layers by position and has no logits.
BY_POSITION = {
    f"blocks.{block}.{i}.": f"{name}."
    for block, names in enumerate((
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3",
        "Conv2d_3b_1x1 Conv2d_4a_3x3",
        "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e",
        "Mixed_7a Mixed_7b Mixed_7c",
    ))
    for i, name in enumerate(names.split())
}


def fill(net, weights, which):
    """Fill a network on the meta device, strictly. Returns the file's SHA-256, "rule" or "state dict"."""
    if isinstance(weights, dict):
        tensors, source, name = weights, "state dict", "weights"
    elif weights == "rule":
        tensors, source, name = rule_weights(net.state_dict()), "rule", "rule"
    else:
        path = Path(weights) if weights else published_file(which)
        tensors, source, name = read_state(path), file_hash(path), path
    found, positions = {}, BY_POSITION if which == "fid" else {}
    for key, value in tensors.items():
        prefix = next((p for p in positions if key.startswith(p)), None)
        if not key.startswith("AuxLogits."):                # torchvision's training head
            found[BY_POSITION[prefix] + key.removeprefix(prefix) if prefix else key] = value
    if which == "fid" and "blocks.0.0.conv.weight" in tensors:
        net.fc = None
    own = net.state_dict()
    for key in own:
        if key.endswith("num_batches_tracked"):             # older files lack it; nothing reads it
            found.setdefault(key, torch.tensor(0))
    missing, extra = [k for k in own if k not in found], [k for k in found if k not in own]
    shapes = [k for k in own if k in found and own[k].shape != found[k].shape]
    problems = [f"{len(keys)} {what}, first {keys[0]}"
                for keys, what in ((missing, "tensors missing"), (extra, "unknown")) if keys]
    problems += [f"{k} is {tuple(found[k].shape)}, expected {tuple(own[k].shape)}" for k in shapes[:2]]
    if broken := [k for k in own if k in found and not found[k].isfinite().all()]:
        raise BadInput(f"{name}: {len(broken)} tensors hold NaN or infinity, first {broken[0]}")
    if problems:
        kind = {"fid": "the FID Inception", "imagenet": "torchvision's ImageNet Inception-v3"}[which]
        raise BadInput(f"{name}: weights of another network, expected {kind}: " + "; ".join(problems))
    net.load_state_dict({k: v if k.endswith("tracked") else v.float() for k, v in found.items()}, assign=True)
    net.eval().requires_grad_(False)
    return source


def cached_file(which):
    """Path of the published weights in torch's cache, where other libraries put them too; None: not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in PUBLISHED[which]["files"] if (folder / name).is_file()), None)


def published_file(which):
    """Path of the published weights in torch's cache, else downloaded into it."""
    known, folder = PUBLISHED[which], Path(torch.hub.get_dir()) / "checkpoints"
    if path := cached_file(which):
        return checked(path, known["sha256"])
    path, url = folder / known["files"][0], known["url"] + known["files"][0]
    try:
        with replacing(path) as tmp:
            with urllib.request.urlopen(url, timeout=30) as source, open(tmp, "wb") as out:
                size = int(source.headers.get("Content-Length", 0))
                with tqdm.wrapattr(out, "write", total=size, desc=path.name) as target:
                    shutil.copyfileobj(source, target)
            if file_hash(tmp) != known["sha256"]:
                raise OSError("the download has another SHA-256")
    except OSError as error:                                # URLError and time-outs are OSErrors
        raise BadInput(f"Inception weights: not in {folder} and the download failed ({error}); fetch {url} "
                       "elsewhere and put it there, or name it with --weights") from None
    return path


def checked(path, sha256):
    found = file_hash(path)
    if not found.startswith(sha256):
        raise BadInput(f"{path}: SHA-256 is {found}, expected {sha256}: "
                       "delete it, it is not the published file")
    return path


def rule_weights(state):
    """Random weights of the same shapes: keys in sorted order, one generator seeded 0, He initialisation."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for key in sorted(state):
        shape = state[key].shape
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
        elif key.endswith("running_var"):
            weights[key] = 1 + 0.2 * torch.rand(shape, generator=generator)
        elif key.endswith(("running_mean", "bias")):
            weights[key] = 0.05 * torch.randn(shape, generator=generator)
        elif len(shape) == 1:
            weights[key] = torch.ones(shape)
        else:
            weights[key] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
    return weights
