# Every check that CI runs is a target here; `.ci/run` and the workflow call these.
PYTHON ?= python

.PHONY: install style quality test docs bench demo

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

docs:               ## write the generated parts of the docs anew
	$(PYTHON) docs/generate.py

bench:              ## a merge against the scripts a user would write
	$(PYTHON) bench/merge.py

demo:               ## the main command of the README
	hf-datavec demo
