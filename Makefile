# Two commands on a fresh machine with Python >= 3.11, make and git:
#   make demo    the whole story on a small model: which examples taught it flattery (leaves four files in demo/)
#   make test    the tests
# Both set .venv up first when it is missing or out of date. `make help` lists the rest.

SHELL := /bin/bash
PYTHON ?=
BIN := .venv/bin
# Files of tests are dealt to as many processes as there are cores, four at most; a file stays with one of them.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
STAMP := .venv/.set-up-done

.PHONY: help demo test test-all docs readme export clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        fine-tune, score, compare, filter and train again on the bundled data; results in demo/"
	@echo "make test        the tests that take seconds (pytest's closing line comes last)"
	@echo "make test-all    the slow tests too"
	@echo "make docs        the documentation site in _docs/ (Quarto where installed, otherwise pure Python)"
	@echo "make readme      README.md from nbs/index.ipynb"
	@echo "make export      concept_tda/ from the notebooks in nbs/, notebooks cleaned, table of public names, picture of the house"
	@echo "make clean       remove what the commands made, except .venv (rm -rf .venv starts from nothing)"

# Quick when repeated: runs only when one of the files that decide the environment has changed.
$(STAMP): settings.ini setup.py pyproject.toml tools/constraints.txt tools/set_up.sh
	@PYTHON="$(PYTHON)" bash tools/set_up.sh
	@touch $@

demo: $(STAMP)
	@$(BIN)/concept-tda demo

test: $(STAMP)
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-all: $(STAMP)
	@$(BIN)/python -m pytest $(PARALLEL)

# A real quarto on PATH is used; otherwise tools/stand_in/quarto stands in for it (see its head).
docs: $(STAMP)
	@rm -rf _proc  # nbdev would keep pages whose code has changed under them
	@bash tools/with_quarto.sh $(BIN)/nbdev-docs --n-workers 1
	@$(BIN)/python tools/finish_site.py _docs
	@$(BIN)/python tools/check_links.py _docs
	@$(BIN)/python tools/check_pages.py _docs
	@echo "The site: file://$(CURDIR)/_docs/index.html"

# Always by the stand-in, so that README.md does not depend on what is installed.
readme: $(STAMP)
	@STAND_IN=1 bash tools/with_quarto.sh $(BIN)/nbdev-readme

export: $(STAMP)
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean
	@$(BIN)/python tools/widget_state.py
	@$(BIN)/python tools/public_names.py
	@$(BIN)/python tools/house_figure.py

clean:
	rm -rf _docs _proc demo build dist *.egg-info .pytest_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
