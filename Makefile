# make setup | demo | test | test-cluster | lint | bench; each does the set-up it needs.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
RANKS := 2
DEMO_JOB := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) -m

.PHONY: setup demo test test-cluster lint format clean-demo

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

# Teacher -> cache -> hard-label twin and distilled student, on a generated set. Run it again to resume; clean-demo starts over.
demo: setup
	$(DEMO_JOB) kd_dist.teacher --preset demo --out $(DEMO)/teacher
	$(DEMO_JOB) kd_dist.distill --preset demo --cache $(DEMO)/teacher/logits.h5 --alpha 0 --out $(DEMO)/hard
	$(DEMO_JOB) kd_dist.distill --preset demo --cache $(DEMO)/teacher/logits.h5 --out $(DEMO)/distilled
	$(BIN)/python -m kd_dist.report $(DEMO)/teacher $(DEMO)/hard $(DEMO)/distilled

clean-demo:
	rm -rf $(DEMO)

test: setup
	$(BIN)/python -m pytest tests

# A real two-node Slurm on this machine; installs Debian's packages, so it asks for root.
test-cluster: setup
	tests/cluster/setup.sh
	$(BIN)/python -m pytest tests/cluster

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
