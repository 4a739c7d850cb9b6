# make setup | demo | imagewoof-cpu | gpu | bench | test-fast | test | test-all | test-cluster | lint | format; each does the
# set-up it needs.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
RANKS := 2
JOB = OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) -m

.PHONY: setup demo imagewoof-cpu gpu bench test-fast test test-all test-cluster lint format clean-demo

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,study,bench,export,hf]'
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

# All that only a GPU can show: tests, benchmark rows, the whole Imagewoof study. One call takes at most nine minutes and saves
# what it has; type it again until it says that the page in docs/results/ is written. GPU="--minutes 0" runs to the end at once.
gpu: setup
	$(BIN)/python -m benchmarks.gpu $(GPU)

# Ratios measured in turns, a quarter of an hour on two idle cores or minutes on a GPU. On real images where KD_DIST_DATA names a
# folder of them or KD_DIST_IMAGEWOOF an archive. BENCH="--rows 1 3" for some rows; benchmarks/setup_peers.sh adds FFCV and torchdistill.
bench: setup
	$(BIN)/python -m benchmarks.bench $(BENCH)

# Two tests at a time, a file's tests in one process. "test-fast" leaves out ranks and jobs, "test" what is marked slow.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-fast: setup
	$(PYTEST) -m unit

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

# A real two-node Slurm on this machine: installs Debian's packages and changes a line in /etc/hosts, so it needs root.
test-cluster: setup
	tests/cluster/setup.sh install
	KD_DIST_CLUSTER_TESTS=1 $(BIN)/python -m pytest tests/cluster; status=$$?; tests/cluster/setup.sh remove; exit $$status

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
