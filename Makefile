# Every check that CI runs is a target here; `.ci/run` and the workflow call these.
PYTHON ?= python

.PHONY: install style quality test chaos docs bench demo

install:            ## everything that developing needs
	$(PYTHON) -m pip install --editable ".[test]" pre-commit

style:              ## rewrite the code in the project's style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quality:            ## style, types and layers, changing nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-cache

test:               ## the test command of the README, after `make install`
	$(PYTHON) -m pytest

chaos:              ## 200 pushes and merges with random faults and kills; HF_DATAVEC_CHAOS_SEED=N repeats a run
	seed=$${HF_DATAVEC_CHAOS_SEED:-$$(date +%s)}; echo "HF_DATAVEC_CHAOS_SEED=$$seed"; \
	HF_DATAVEC_CHAOS_SEED=$$seed HF_DATAVEC_CHAOS_ROUNDS=$${HF_DATAVEC_CHAOS_ROUNDS:-200} \
	$(PYTHON) -m pytest -q tests/test_chaos.py

docs:               ## write the generated parts of the docs anew
	$(PYTHON) docs/generate.py

bench:              ## merges against mergekit (MERGEKIT=.../mergekit-pytorch), a naive script and plain copies
	$(PYTHON) bench/speed.py --network vit-base --methods mean ties dare_ties median trimmed_mean $(if $(MERGEKIT),--mergekit $(MERGEKIT))

demo:               ## the main command of the README
	hf-datavec demo
