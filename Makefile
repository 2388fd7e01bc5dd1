# `make` lists the targets. Values are given as NAME=VALUE, for example: make train-msdm DATA=data/mine OUT=runs/mine

VALUES := PRESET DATA OUT VAE STEPS SIZE CKPT PROMPT SAMPLES PRIOR DECODER KANDINSKY3 REAL FAKE WEIGHTS PROMPTS RUN FEATURES

# A value that is given reaches the commands as it stands, through the environment: quotes, spaces and $ included.
# But CKPT of table3, which may hold several: for a name with a space or * take experiments.py itself.
$(foreach v,$(VALUES),$(eval override $(v) := $$(value $(v))))
override PRESET := $(or $(PRESET),tiny)
export $(VALUES)

PY       := .venv/bin/python
PHANTOM  := data/phantom/prompt-gt.csv
SMALL    := data/phantom-small/prompt-gt.csv
OTHERS   := data/phantom-others/prompt-gt.csv
JUDGED   := data/phantom-judges/prompt-gt.csv
INSTALL  := .venv/installed
OUT_MSDM := $${OUT:-runs/msdm}
OUT22    := $${OUT:-runs/kandinsky22}
OUT3     := $${OUT:-runs/kandinsky3}
prompt    = $${PROMPT:-Generate an image with $(1).}
needs     = @test -n "$$$(1)" || { echo "make $@ needs $(1)=$(2)" >&2; exit 2; }

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-20s%s\n", $$1, $$2 }' Makefile

.venv/installed: requirements.txt constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, python3 is %d.%d" % sys.version_info[:2])'
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

# Built-in data: phantoms, rendered endoscopy images with exactly known contents.

$(PHANTOM): | $(INSTALL)
	$(PY) phantom.py --out data/phantom --n 8000 --size 64 --seed 0

$(SMALL): | $(INSTALL)
	$(PY) phantom.py --out data/phantom-small --n 1000 --size 64 --seed 0

$(OTHERS): | $(INSTALL)
	$(PY) phantom.py --out data/phantom-others --n 6000 --size 64 --seed 1

# For a judge: it can tell three polyps only if it has seen four.
$(JUDGED): | $(INSTALL)
	$(PY) phantom.py --out data/phantom-judges --n 6000 --size 64 --seed 2 --max-polyps 8

phantom: $(PHANTOM)  ## render the built-in data: 8,000 phantoms

# MSDM

DEMO := runs/demo/msdm/best.safetensors

define train_demo
	$(PY) vae.py --preset demo --data data/phantom-small --out runs/demo/vae --perceptual off
	$(PY) msdm.py --preset demo --data data/phantom-small --vae runs/demo/vae/best.safetensors --out runs/demo/msdm
endef

$(DEMO): | $(INSTALL) $(SMALL)
	$(train_demo)

demo: $(INSTALL) $(SMALL)  ## the whole path in five minutes: phantoms, autoencoder, diffusion, a sheet of images
	$(train_demo)
	$(PY) sampler.py --ckpt runs/demo/msdm/best.safetensors --prompts docs/demo.txt -n 4 --solver dpmpp --steps 20 --grid --out out/demo
	@echo "the sheet is out/demo/grid.png, a row for each line of docs/demo.txt; a page: make report RUN=runs/demo/msdm"

# FLAGS are further flags of a target's last command: make train-msdm DATA=DIR FLAGS="--batch-size 8 --accumulate 2"

TRAIN_VAE = $(PY) vae.py --preset "$$PRESET" --data "$${DATA:-data/phantom}" --out "$(OUT_MSDM)/vae" $${SIZE:+--size "$$SIZE"}

train-vae: $(INSTALL) $(if $(DATA),,$(PHANTOM))  ## train the autoencoder on DATA (phantoms without it)
	$(TRAIN_VAE) $(FLAGS)

train-msdm: $(INSTALL) $(if $(DATA),,$(PHANTOM))  ## train MSDM on DATA at SIZE pixels, its autoencoder first unless VAE=FILE
	$(if $(VAE),,$(TRAIN_VAE))
	$(PY) msdm.py --preset "$$PRESET" --data "$${DATA:-data/phantom}" --vae "$${VAE:-$(OUT_MSDM)/vae/best.safetensors}" \
	  --out "$(OUT_MSDM)" $${STEPS:+--steps "$$STEPS"} $${SIZE:+--size "$$SIZE"} $(FLAGS)

sample: $(INSTALL)  ## sample 16 images of PROMPT with CKPT into SAMPLES
	$(PY) sampler.py --ckpt "$${CKPT:-$(OUT_MSDM)/best.safetensors}" --prompt "$(call prompt,1 instrument)" -n 16 --grid \
	  --out "$${SAMPLES:-out/sample}" $(FLAGS)

EVAL := out/faithfulness

faithfulness: $(INSTALL) $(JUDGED)  ## what images of CKPT show of what they were asked for, by a judge of other phantoms
	$(PY) judges.py prompts --out $(EVAL).csv
	$(PY) sampler.py --ckpt "$${CKPT:-$(OUT_MSDM)/best.safetensors}" --prompts $(EVAL).csv --seed 10000 --solver dpmpp --steps 20 \
	  --out "$${SAMPLES:-$(EVAL)}"
	$(PY) judges.py faithfulness --real data/phantom-judges --fake "$${SAMPLES:-$(EVAL)}" $(FLAGS)

metrics: $(INSTALL)  ## FID, precision, recall and more of FAKE against REAL (WEIGHTS=FILE or rule)
	$(call needs,REAL,FOLDER)
	$(call needs,FAKE,FOLDER)
	$(PY) metrics.py --real "$$REAL" --fake "$$FAKE" $${WEIGHTS:+--weights "$$WEIGHTS"} $(FLAGS)

report: $(INSTALL)  ## the page of a training, RUN/report.html: settings, curves, images, metrics, failures
	$(call needs,RUN,runs/NAME)
	$(PY) report.py --run "$$RUN" $${SAMPLES:+--samples "$$SAMPLES"} $(FLAGS)

# LoRA on Kandinsky: PRIOR, DECODER and KANDINSKY3 are published folders, or their names on the hub. FLAGS go to finetune.py.

LORA22 = --data "$$DATA" --cache "$(OUT22)/cache" $(FLAGS)
SMALL_SAMPLE = --prompt "$(call prompt,1 polyp)" -n 4 --grid

train-kandinsky22: $(INSTALL)  ## LoRA on Kandinsky 2.2's prior and decoder: PRIOR, DECODER, DATA
	$(call needs,PRIOR,FOLDER or kandinsky-community/kandinsky-2-2-prior)
	$(call needs,DECODER,FOLDER or kandinsky-community/kandinsky-2-2-decoder)
	$(call needs,DATA,FOLDER)
	$(PY) finetune.py prior --model "$$PRIOR" --decoder "$$DECODER" --out "$(OUT22)/prior" $(LORA22)
	$(PY) finetune.py decoder --model "$$DECODER" --prior "$$PRIOR" --out "$(OUT22)/decoder" $(LORA22)
	$(PY) sampler.py --ckpt "$$PRIOR" --decoder "$$DECODER" --prior-lora "$(OUT22)/prior/best" \
	  --decoder-lora "$(OUT22)/decoder/best" $(SMALL_SAMPLE) --out "$(OUT22)/sample"

train-kandinsky3: $(INSTALL)  ## LoRA on Kandinsky 3's U-Net: KANDINSKY3, DATA
	$(call needs,KANDINSKY3,FOLDER or kandinsky-community/kandinsky-3)
	$(call needs,DATA,FOLDER)
	$(PY) finetune.py unet3 --model "$$KANDINSKY3" --data "$$DATA" --out "$(OUT3)" $(FLAGS)
	$(PY) sampler.py --ckpt "$$KANDINSKY3" --lora "$(OUT3)/best" --size 256 --offload $(SMALL_SAMPLE) --out "$(OUT3)/sample"

# The paper's three stages: a decoder, a prior judged with it, a decoder judged with that prior. After each stage come the
# images of PROMPTS (SAMPLING: further flags of sampler.py) and, where the Inception weights are there, their metrics.

STAGES = $${OUT:-runs/paper-kandinsky22}
STAGE_DATA = --data "$$DATA" --cache "$(STAGES)/cache" --save-every 2000 $(FLAGS)

define judge_stage
	$(PY) sampler.py --ckpt "$$PRIOR" --decoder "$$DECODER" $(2) --prompts "$${PROMPTS:-docs/paper-prompts.txt}" -n 40 \
	  --out "$(STAGES)/stage-$(1)/sample" $(SAMPLING)
	@if test -n "$$WEIGHTS" || $(PY) -c "import inception; raise SystemExit(not inception.cached_file('fid'))"; then \
	  $(PY) metrics.py --real "$$DATA" --fake "$(STAGES)/stage-$(1)/sample" --cache "$(STAGES)/cache" \
	    $${WEIGHTS:+--weights "$$WEIGHTS"} --json "$(STAGES)/stage-$(1)/metrics.json"; \
	else echo "stage $(1): no metrics, the Inception weights are not in torch's cache: give WEIGHTS=FILE" >&2; fi
endef

paper-kandinsky22: $(INSTALL)  ## the paper's three stages on Kandinsky 2.2, images and metrics of each: PRIOR, DECODER, DATA
	$(call needs,PRIOR,FOLDER or kandinsky-community/kandinsky-2-2-prior)
	$(call needs,DECODER,FOLDER or kandinsky-community/kandinsky-2-2-decoder)
	$(call needs,DATA,FOLDER)
	$(PY) finetune.py decoder --model "$$DECODER" --prior "$$PRIOR" --rank 32 --epochs 40 --out "$(STAGES)/stage-1/decoder" $(STAGE_DATA)
	$(call judge_stage,1,--decoder-lora "$(STAGES)/stage-1/decoder/best")
	$(PY) finetune.py prior --model "$$PRIOR" --decoder "$$DECODER" --decoder-lora "$(STAGES)/stage-1/decoder/best" \
	  --rank 128 --epochs 100 --out "$(STAGES)/stage-2/prior" $(STAGE_DATA)
	$(call judge_stage,2,--prior-lora "$(STAGES)/stage-2/prior/best" --decoder-lora "$(STAGES)/stage-1/decoder/best")
	$(PY) finetune.py decoder --model "$$DECODER" --prior "$$PRIOR" --rank 128 --epochs 100 --out "$(STAGES)/stage-3/decoder" $(STAGE_DATA)
	$(call judge_stage,3,--prior-lora "$(STAGES)/stage-2/prior/best" --decoder-lora "$(STAGES)/stage-3/decoder/best")

# The same commands on tiny checkpoints of random weights: they prove the machinery and sample noise.

TRY    := --data data/phantom-small --steps 300 --batch-size 16 --log-every 25 --save-every 100
TINY22 := runs/tiny-kandinsky22
TINY3  := runs/tiny-kandinsky3

$(TINY22) $(TINY3): | $(INSTALL)
	$(PY) tests/tiny_kandinsky.py --kind $(if $(filter $(TINY3),$@),3,2.2) --out $@

try-kandinsky22: $(INSTALL) $(SMALL) $(TINY22)  ## the commands of train-kandinsky22 on a tiny random model
	$(PY) finetune.py prior --model $(TINY22)/prior --decoder $(TINY22)/decoder --size 64 --out runs/try-kandinsky22/prior $(TRY) --lr 1e-3 $(FLAGS)
	$(PY) finetune.py decoder --model $(TINY22)/decoder --prior $(TINY22)/prior --size 64 --out runs/try-kandinsky22/decoder $(TRY) --lr 1e-3 $(FLAGS)
	$(PY) sampler.py --ckpt $(TINY22)/prior --decoder $(TINY22)/decoder --prior-lora runs/try-kandinsky22/prior/best \
	  --decoder-lora runs/try-kandinsky22/decoder/best --size 64 --prompt "$(call prompt,1 polyp)" -n 4 --steps 20 --solver dpmpp --grid \
	  --out out/try-kandinsky22
	@echo "the sheet is out/try-kandinsky22/grid.png"

try-kandinsky3: $(INSTALL) $(SMALL) $(TINY3)  ## the commands of train-kandinsky3 on a tiny random model
	$(PY) finetune.py unet3 --model $(TINY3) --size 64 --out runs/try-kandinsky3 $(TRY) --lr 3e-3 $(FLAGS)
	$(PY) sampler.py --ckpt $(TINY3) --lora runs/try-kandinsky3/best --size 64 --prompt "$(call prompt,1 polyp)" -n 4 --steps 20 --solver dpmpp \
	  --grid --out out/try-kandinsky3
	@echo "the sheet is out/try-kandinsky3/grid.png"

# The paper's experiments. Without DATA, PRIOR and DECODER they run on built-in data and tiny models. Each goes on where
# it was; its table is OUT/NAME.md. FLAGS go to experiments.py; table2's to table1 too, which it runs first.

SPACE  = $${FEATURES:+--features "$$FEATURES"} $${WEIGHTS:+--weights "$$WEIGHTS"} $(FLAGS)
LENGTH = $${STEPS:+--steps "$$STEPS"}

ablation: $(INSTALL) $(if $(DATA),,$(PHANTOM) $(OTHERS) $(JUDGED))  ## MSDM's ablations, three seeds: hours on a CPU, in the background
	$(PY) experiments.py ablation --preset "$$PRESET" --data "$${DATA:-data/phantom}" --real "$${REAL:-$${DATA:-data/phantom-others}}" \
	  $(if $(DATA),,--judge data/phantom-judges) --out "$${OUT:-runs/ablation}" $${VAE:+--vae "$$VAE"} $(LENGTH) $(SPACE)

TINY_TABLE = $(if $(PRIOR),,--steps 50 --training="--size 64 --batch-size 16 --lr 1e-3 --log-every 25 --save-every 25" \
  --sampling="--size 64 --steps 10 --solver dpmpp")
TABLE = --prior "$${PRIOR:-$(TINY22)/prior}" --decoder "$${DECODER:-$(TINY22)/decoder}" --data "$${DATA:-data/phantom-small}" \
  $${PROMPTS:+--prompts "$$PROMPTS"} $(TINY_TABLE) $(LENGTH) $(SPACE)
TABLE_NEEDS = $(INSTALL) $(if $(PRIOR),,$(TINY22)) $(if $(DATA),,$(SMALL))

table1: $(TABLE_NEEDS)  ## ranks of the prior's adapter: PRIOR, DECODER, DATA; tiny random models without
	$(PY) experiments.py table1 --out "$${OUT:-runs/tables}/table1" $(TABLE)

table2: $(TABLE_NEEDS) table1  ## ranks of the decoder's adapter, with the best prior of table1
	$(PY) experiments.py table2 --table1 "$${OUT:-runs/tables}/table1" --out "$${OUT:-runs/tables}/table2" $(TABLE)

submission: $(INSTALL) $(if $(CKPT),,$(DEMO))  ## one image a prompt of PROMPTS by CKPT (the demo's without), and a zip of them
	$(PY) experiments.py submission --ckpt "$${CKPT:-$(DEMO)}" --prompts "$${PROMPTS:-docs/paper-prompts.txt}" \
	  --out "$${OUT:-out/submission}" $(FLAGS)

table3: $(INSTALL) $(if $(CKPT),,$(DEMO)) $(if $(DATA),,$(SMALL))  ## CKPTs and folders of images by the official protocol of 2024
	$(PY) experiments.py table3 $${CKPT:-$(DEMO)} --prompts "$${PROMPTS:-docs/paper-prompts.txt}" \
	  --data "$${DATA:-data/phantom-small}" --out "$${OUT:-runs/tables/table3}" $(SPACE)

# Development

FIRST_HALF := $(wildcard tests/test_[a-f]*.py tests/test_[jk]*.py)

test: $(INSTALL)  ## ruff, and pytest in two processes of one thread
	.venv/bin/ruff check .
	@$(MAKE) --no-print-directory --jobs 2 test-first-half test-second-half

test-first-half:
	OMP_NUM_THREADS=1 $(PY) -m pytest $(FIRST_HALF)

test-second-half:
	OMP_NUM_THREADS=1 $(PY) -m pytest $(filter-out $(FIRST_HALF),$(wildcard tests/test_*.py))

test-kill: $(INSTALL)  ## kill the commands a hundred times at random moments and let them go on: half an hour
	$(PY) tests/resume_after_kill.py $(FLAGS)

test-fuzz: $(INSTALL)  ## a thousand damaged and hostile files: ten minutes
	$(PY) tests/fuzz.py $(FLAGS)

bench: $(INSTALL)  ## speed and memory of networks, trainings, sampling and metrics as ratios: ten minutes
	$(PY) tests/bench.py

clean:  ## remove the built-in data, but no run, no image and not the installation
	rm -rf data/phantom data/phantom-small data/phantom-others data/phantom-judges .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: help phantom demo train-vae train-msdm train-kandinsky22 train-kandinsky3 paper-kandinsky22 try-kandinsky22 try-kandinsky3 sample \
  ablation table1 table2 table3 submission \
  faithfulness metrics report test test-first-half test-second-half test-kill test-fuzz bench clean
.DEFAULT_GOAL := help
