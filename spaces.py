"""Feature spaces by name: which network turns the images of a distance into features.

inception        the FID network (inception.py), which metrics.py loads: the space of published FIDs
classifier:FILE  the features of an attribute classifier that judges.py trained (classifier.py)
NAME or FOLDER   a vision model of transformers with its image processor: DINOv2, CLIP, ViT (inception.py)

No space is right by itself: on natural images Stein et al. 2023 (arXiv:2306.04675) find that Inception's
misranks generators which people rank otherwise. So a figure always stands with its space.
"""

from command import BadInput

import torch
import torch.nn.functional as F
from torch import nn

from classifier import VALUES, Classifier, is_judge
from files import file_hash, load_metadata, load_safetensors
from inception import ImageEncoder
from weights import described_by, load_state


class ClassifierFeatures(nn.Module):
    """The space of an attribute classifier: uint8 (b, 3, h, w) -> {"features": (b, 256) float32}."""

    features = "features before the last layer"

    def __init__(self, file):
        super().__init__()
        if not is_judge(file):
            raise BadInput(f"{file}: expected an attribute classifier, as judges.py faithfulness writes it "
                           "(FOLDER.judge-64.safetensors beside the folder)")
        meta = load_metadata(file)
        if meta.get("values", known := [list(v) for v in VALUES]) != known:
            raise BadInput(f"{file}: made by another version, whose values are not this one's; train it "
                           "again with judges.py faithfulness")
        with described_by(file), torch.device("meta"):
            self.size = int(meta["size"])
            if self.size < 32 or self.size % 16:
                raise ValueError(f"size={self.size}, expected a multiple of 16 from 32")
            net = Classifier(self.size)
        self.net = load_state(net, load_safetensors(file)[0], file).eval()
        self.source, self.published = file_hash(file), None

    @torch.inference_mode()
    def forward(self, images, resize=None):
        """resize is not used: images of another size are resized to the classifier's, with antialiasing."""
        x, size = images.to(self.net.out.weight.device).float(), (self.size, self.size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        return {"features": self.net.embed(x)}


def load(name):
    """The network of a feature space other than Inception's: its forward, `features`, `source`."""
    kind, _, file = name.partition(":")
    return ClassifierFeatures(file) if kind == "classifier" else ImageEncoder(name)
