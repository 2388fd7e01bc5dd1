"""No test goes to the network: set here, before transformers and huggingface_hub are imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
