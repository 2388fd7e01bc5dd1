# make help lists the targets. Override: make train-msdm DATA=data/mine PRESET=paper OUT=runs/mine STEPS=1000

PRESET ?= tiny
SIZE   ?= $(if $(filter paper,$(PRESET)),256,64)
DATA   ?= data/phantom
OUT    ?= runs/msdm
VAE    ?= $(OUT)/vae/best.safetensors
CKPT   ?= $(OUT)/best.safetensors
STEPS  ?=
PROMPT ?= Generate an image with 2 polyps.

PY     := .venv/bin/python

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

.venv/installed: requirements.txt constraints.txt
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

# The built-in data; any other DATA must be there already.
data/phantom/prompt-gt.csv: .venv/installed
	$(PY) phantom.py --out data/phantom --n 8000 --size $(SIZE) --seed 0

phantom: data/phantom/prompt-gt.csv  ## draw the built-in data: 8,000 phantoms

train-vae: .venv/installed $(if $(filter data/phantom,$(DATA)),phantom)  ## train the autoencoder on DATA
	$(PY) vae.py --preset $(PRESET) --data $(DATA) --out $(OUT)/vae

$(OUT)/vae/best.safetensors:
	$(MAKE) train-vae

train-msdm: .venv/installed $(if $(filter data/phantom,$(DATA)),phantom) $(VAE)  ## train MSDM on DATA, its autoencoder first
	$(PY) msdm.py --preset $(PRESET) --data $(DATA) --vae $(VAE) --out $(OUT) $(if $(STEPS),--steps $(STEPS))

sample: .venv/installed  ## draw PROMPT with CKPT, 16 pictures
	$(PY) sampler.py --ckpt $(CKPT) --prompt "$(PROMPT)" -n 16 --grid --out out/sample

test: .venv/installed  ## ruff and pytest
	.venv/bin/ruff check .
	$(PY) -m pytest

bench: .venv/installed  ## speed of the networks and metrics against this machine's matmul rate
	$(PY) tests/bench.py

metrics: .venv/installed  ## FID, precision, recall and more of FAKE= against REAL= [WEIGHTS=file or rule]
	$(PY) metrics.py --real $(REAL) --fake $(FAKE) $(if $(WEIGHTS),--weights $(WEIGHTS))

clean:  ## remove what the commands made, but not the installation
	rm -rf data/phantom runs out .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: help phantom train-vae train-msdm sample metrics test bench clean
.DEFAULT_GOAL := help
