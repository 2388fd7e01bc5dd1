# make help lists the targets. Override: make train-msdm DATA=data/mine PRESET=paper OUT=runs/mine STEPS=1000

PRESET ?= tiny
SIZE   ?= $(if $(filter paper,$(PRESET)),256,64)
PHANTOM := data/phantom$(if $(filter-out 64,$(SIZE)),-$(SIZE))
DATA   ?= $(PHANTOM)
OUT    ?= runs/msdm
VAE    ?= $(OUT)/vae/best.safetensors
CKPT   ?= $(OUT)/best.safetensors
STEPS  ?=
SAMPLES ?= out/sample
PROMPT ?= Generate an image with 2 polyps.

# Kandinsky: published folders, or their names on the hub. Without them tiny random ones, which only prove that the commands work.
PRIOR      ?= runs/tiny-kandinsky22/prior
DECODER    ?= runs/tiny-kandinsky22/decoder
KANDINSKY3 ?= runs/tiny-kandinsky3
LORA_RANK  ?= 128
LORA_FIRST ?= 32
TRIAL      := --steps 300 --batch-size 16 --lr 1e-3 --log-every 25 --save-every 100
FLAGS22    ?= $(if $(filter runs/tiny-%,$(PRIOR)),$(TRIAL),--epochs 100)
FLAGS3     ?= $(if $(filter runs/tiny-%,$(KANDINSKY3)),$(TRIAL) --lr 3e-3,--epochs 100)
SIZE22     ?= $(if $(filter runs/tiny-%,$(PRIOR)),64,512)
SIZE3      ?= $(if $(filter runs/tiny-%,$(KANDINSKY3)),64,256)
OUT22       = $(if $(filter file,$(origin OUT)),runs/kandinsky22,$(OUT))
OUT3        = $(if $(filter file,$(origin OUT)),runs/kandinsky3,$(OUT))
KDATA       = $(if $(filter file,$(origin DATA)),data/phantom-small,$(DATA))
SMALL       = $(if $(filter data/phantom-small,$(KDATA)),data/phantom-small/prompt-gt.csv)

PY     := .venv/bin/python

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

.venv/installed: requirements.txt constraints.txt
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

# The built-in data; any other DATA must be there already.
$(PHANTOM)/prompt-gt.csv: | .venv/installed
	$(PY) phantom.py --out $(PHANTOM) --n 8000 --size $(SIZE) --seed 0

phantom: $(PHANTOM)/prompt-gt.csv  ## draw the built-in data: 8,000 phantoms

train-vae: .venv/installed $(if $(filter $(PHANTOM),$(DATA)),phantom)  ## train the autoencoder on DATA
	$(PY) vae.py --preset $(PRESET) --size $(SIZE) --data $(DATA) --out $(OUT)/vae

# A checkpoint is there long before the training is over, so it cannot be make's target.
$(OUT)/vae/finished:
	$(MAKE) train-vae
	touch $@

train-msdm: .venv/installed $(if $(filter $(PHANTOM),$(DATA)),phantom) $(if $(filter $(OUT)/vae/best.safetensors,$(VAE)),$(OUT)/vae/finished,$(VAE))  ## train MSDM on DATA, its autoencoder first
	$(PY) msdm.py --preset $(PRESET) --size $(SIZE) --data $(DATA) --vae $(VAE) --out $(OUT) $(if $(STEPS),--steps $(STEPS))

data/phantom-small/prompt-gt.csv: | .venv/installed
	$(PY) phantom.py --out data/phantom-small --n 400 --size 64 --seed 0

runs/tiny-kandinsky22: | .venv/installed
	$(PY) tests/tiny_kandinsky.py --kind 2.2 --out $@

runs/tiny-kandinsky3: | .venv/installed
	$(PY) tests/tiny_kandinsky.py --kind 3 --out $@

# In the paper's order: a decoder of small rank, the prior, then the decoder again.
LORA22 = --data $(KDATA) --cache $(OUT22)/cache $(FLAGS22)
train-kandinsky22: .venv/installed $(SMALL) $(if $(filter runs/tiny-%,$(PRIOR)),runs/tiny-kandinsky22)  ## LoRA on Kandinsky 2.2 (PRIOR, DECODER)
	$(PY) finetune.py decoder --model $(DECODER) --prior $(PRIOR) --size $(SIZE22) --rank $(LORA_FIRST) --out $(OUT22)/decoder-first $(LORA22)
	$(PY) finetune.py prior --model $(PRIOR) --rank $(LORA_RANK) --out $(OUT22)/prior $(LORA22)
	$(PY) finetune.py decoder --model $(DECODER) --prior $(PRIOR) --size $(SIZE22) --rank $(LORA_RANK) --out $(OUT22)/decoder $(LORA22)
	$(PY) sampler.py --ckpt $(PRIOR) --decoder $(DECODER) --prior-lora $(OUT22)/prior/best --decoder-lora $(OUT22)/decoder/best \
	  --size $(SIZE22) --prompt "$(PROMPT)" -n 4 --steps 20 --solver dpmpp --grid --out $(OUT22)/sample

train-kandinsky3: .venv/installed $(SMALL) $(filter runs/tiny-%,$(KANDINSKY3))  ## LoRA on Kandinsky 3 (KANDINSKY3)
	$(PY) finetune.py unet3 --model $(KANDINSKY3) --size $(SIZE3) --rank $(LORA_RANK) --data $(KDATA) --out $(OUT3) $(FLAGS3)
	$(PY) sampler.py --ckpt $(KANDINSKY3) --lora $(OUT3)/best --size $(SIZE3) --prompt "$(PROMPT)" -n 4 --steps 20 --solver dpmpp \
	  --grid --out $(OUT3)/sample

sample: .venv/installed  ## draw PROMPT with CKPT, 16 pictures, into SAMPLES
	$(PY) sampler.py --ckpt $(CKPT) --prompt "$(PROMPT)" -n 16 --grid --out $(SAMPLES)

test: .venv/installed  ## ruff and pytest
	.venv/bin/ruff check .
	$(PY) -m pytest

bench: .venv/installed  ## speed of the networks and metrics against this machine's matmul rate
	$(PY) tests/bench.py

metrics: .venv/installed  ## FID, precision, recall and more of FAKE= against REAL= [WEIGHTS=file or rule]
	$(PY) metrics.py --real $(REAL) --fake $(FAKE) $(if $(WEIGHTS),--weights $(WEIGHTS))

clean:  ## remove what the commands made, but not the installation
	rm -rf data/phantom data/phantom-256 data/phantom-small runs out .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: help phantom train-vae train-msdm train-kandinsky22 train-kandinsky3 sample metrics test bench clean
.DEFAULT_GOAL := help
