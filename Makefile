# make setup | demo | imagewoof-cpu | imagewoof-h100 | bench | test | test-cluster | lint; each does the set-up it needs.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
RANKS := 2
JOB = OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) -m

.PHONY: setup demo imagewoof-cpu imagewoof-h100 bench test test-cluster lint format clean-demo

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

# Teacher -> cache -> hard-label baseline and distilled student, on a generated set. Run it again to resume; clean-demo starts over.
demo: setup
	$(JOB) kd_dist.teacher --preset demo --data data --out $(DEMO)/teacher
	$(JOB) kd_dist.distill --preset demo --data data --cache $(DEMO)/teacher/logits.h5 --alpha 0 --out $(DEMO)/hard
	$(JOB) kd_dist.distill --preset demo --data data --cache $(DEMO)/teacher/logits.h5 --out $(DEMO)/distilled
	$(BIN)/python -m kd_dist.report $(DEMO)/teacher $(DEMO)/hard $(DEMO)/distilled

clean-demo:
	rm -rf $(DEMO)

# The README's first table: real Imagewoof on a CPU box, four hours; resumes. KD_DIST_DATA names the image folder.
# A CPU with AVX512-BF16 computes in bfloat16, twice as fast; others would be ten times slower in it.
WOOF := runs/imagewoof-cpu
WOOF_ARMS := baseline baseline-cached smooth class-mean shuffled-within shuffled-view shuffled-all one-view distilled online no-gradient \
  baseline-wd=baseline,weight-decay=0.002 distilled-alpha1=distilled,alpha=1
WOOF_PRECISION := $(shell grep -qs avx512_bf16 /proc/cpuinfo && echo bf16 || echo fp32)
imagewoof-cpu: setup
	$(JOB) kd_dist.teacher --preset cpu-64px --precision $(WOOF_PRECISION) --out $(WOOF)/teacher
	$(JOB) kd_dist.study --preset cpu-64px --precision $(WOOF_PRECISION) --cache $(WOOF)/teacher/logits.h5 \
	  --teacher-model $(WOOF)/teacher/model.pt --arms $(WOOF_ARMS) --seeds 0 1 2 --out $(WOOF)/study

# The whole study on GPUs, a rank each: five seeds of the two arms that it is for, three of the others. Not measured yet.
# In pieces: `timeout 590 make imagewoof-h100`, again and again; each goes on where the last one stopped.
H100 := runs/imagewoof-h100
imagewoof-h100: RANKS := $(or $(filter-out 0,$(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)),1)
imagewoof-h100: setup
	$(JOB) kd_dist.teacher --preset h100 --out $(H100)/teacher
	$(JOB) kd_dist.study --preset h100 --cache $(H100)/teacher/logits.h5 --arms distilled baseline \
	  --seeds 0 1 2 3 4 --out $(H100)/study
	$(JOB) kd_dist.study --preset h100 --cache $(H100)/teacher/logits.h5 --teacher-model $(H100)/teacher/model.pt \
	  --seeds 0 1 2 --out $(H100)/study
	test -f $(H100)/mixed.h5 || $(JOB) kd_dist.cache write --teacher $(H100)/teacher/model.pt --views 200 --mixed-views 0.5 -o $(H100)/mixed.h5
	$(JOB) kd_dist.study --preset h100 --cache $(H100)/teacher/logits.h5 --seeds 0 1 2 --out $(H100)/study \
	  --arms mixed=distilled,cache=$(H100)/mixed.h5

# Ratios measured in turns, a quarter of an hour on two idle cores or minutes on a GPU. On real pictures where KD_DIST_DATA names a
# folder of them or KD_DIST_IMAGEWOOF an archive. BENCH="--rows 1 3" for some rows; benchmarks/setup_peers.sh adds FFCV and torchdistill.
bench: setup
	$(BIN)/python -m benchmarks.bench $(BENCH)

test: setup
	$(BIN)/python -m pytest tests

# A real two-node Slurm on this machine: installs Debian's packages and changes a line in /etc/hosts, so it needs root.
test-cluster: setup
	tests/cluster/setup.sh install
	KD_DIST_CLUSTER_TESTS=1 $(BIN)/python -m pytest tests/cluster; status=$$?; tests/cluster/setup.sh remove; exit $$status

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
