"""The metrics rows of the benchmark: time and peak memory of the statistics, the Inception's rate.

Each row runs in a process of its own: its peak memory is that of the process, with torch and the two sets.

    python tests/bench_metrics.py
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROWS = {                                                    # name: what, limit in seconds, limit in GiB
    "fid": ("FID, two sets of 10,000 x 2,048", 6.0, 1.3),
    "precision_recall": ("precision and recall, two sets of 10,000 x 2,048", 12.0, 1.0),
    "kid": ("KID over whole sets of 2,000 and 5,000 x 2,048", None, None),
    "inception": ("FID Inception on CPU, images/s, beside torchvision's plain inception_v3", None, None),
}


def two_sets(n_real=10_000, n_fake=10_000, d=2_048):
    """Like pooled features: not negative, of very different scales. Made row by row, to waste no memory."""
    import torch
    scale, sets = torch.rand(d) ** 3, []
    for n, shift in ((n_real, 0.0), (n_fake, 0.02)):
        x = torch.empty(n, d)
        for row in x:
            row.copy_((torch.randn(d) * scale + shift).relu_())
        sets.append(x)
    return sets


def measure(name):
    import torch

    import metrics
    torch.manual_seed(0)
    if name == "inception":
        return rates()
    sets = two_sets() if name != "kid" else two_sets(2_000, 5_000)
    start = time.perf_counter()
    value = getattr(metrics, name)(*sets)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gib": peak_gib(), "value": value, "threads": torch.get_num_threads()}


def peak_gib():
    """The most memory that this program held. Linux' ru_maxrss would count its parent's, too."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rates(n=8, repeats=3):
    """Images per second of both networks, in turns, the best of each: ours resizes from 256 to 299 px."""
    import torch
    from torchvision.models import inception_v3

    import inception
    ours, theirs = inception.Inception("rule"), inception_v3(weights=None, init_weights=False).eval()
    images, pixels = torch.randint(0, 256, (n, 3, 256, 256), dtype=torch.uint8), torch.randn(n, 3, 299, 299)
    best = {"ours": 0.0, "torchvision": 0.0}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for key, run in (("ours", lambda: ours(images)), ("torchvision", lambda: theirs(pixels))):
                start = time.perf_counter()
                run()
                best[key] = max(best[key], n / (time.perf_counter() - start))
    return best | {"ratio": best["ours"] / best["torchvision"], "threads": torch.get_num_threads()}


def rows():
    """[(what, result, within its limits)], one process each."""
    out = []
    for name, (what, seconds, gib) in ROWS.items():
        run = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        result = json.loads(run.stdout.splitlines()[-1])
        good = result["ratio"] >= 1 if name == "inception" else \
            seconds is None or result["seconds"] < seconds and result["peak_gib"] < gib
        out.append((what, result, good))
    return out


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        for what, result, good in rows():
            figures = ", ".join(f"{k} {v:.3g}" for k, v in result.items() if isinstance(v, (int, float)))
            print(f"{'ok  ' if good else 'MISS'} {what}: {figures}")
