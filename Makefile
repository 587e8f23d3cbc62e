# Everything runs in one environment, .venv/, made on first use and kept until what it holds changes.
#
# PYTHON=/path/to/python3.12 chooses the Python of a new .venv (delete the old one first).
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu leaves out the CUDA libraries.

PYTHON ?= python3.13 python3.12 python3.11 python3
BIN    := .venv/bin
STAMP  := .venv/.installed
DOCS   := .venv/.docs-installed

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

quickstart: env  ## train the small model, no GPU needed; write images and captions to runs/quickstart
	$(BIN)/tf-lightning fit -c configs/quickstart.yaml --ckpt_path last

emoji: env  ## train on emoji of the system's font, no GPU needed; write images to runs/emoji
	$(BIN)/tf-lightning fit -c configs/autoencoder/emoji.yaml --ckpt_path last
	$(BIN)/tf-lightning fit -c configs/emoji.yaml --ckpt_path last

test: env  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: env  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(DOCS)  ## build the documentation into site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

env: $(STAMP)  ## make .venv, or bring it up to date; the other targets do this themselves

# The stamp is written last and holds the checkout's path. If its Python cannot read that path back, .venv is
# unfinished, its Python is gone or the checkout has moved: it is made again from nothing.
ifneq ($(shell $(BIN)/python -c "print(open('$(STAMP)').read(), end='')" 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
NEW_VENV := yes
endif

$(STAMP): pyproject.toml constraints.txt
ifdef NEW_VENV
	@for python in $(PYTHON); do \
	    if $$python -c 'import sys, ensurepip, venv; exit(not (3, 11) <= sys.version_info < (3, 14))' \
	        2>/dev/null; then \
	        echo "Making .venv with $$($$python -V): some minutes and about 6 GB, once."; \
	        exec $$python -m venv --clear .venv; \
	    fi; \
	done; \
	echo "No usable Python among '$(PYTHON)': install Python 3.11, 3.12 or 3.13 with its venv module" \
	    "(Debian, Ubuntu: apt install python3-venv) or name one with make PYTHON=/path/to/python3.12." >&2; \
	exit 1
endif
	@rm -f $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]' -c constraints.txt
	@printf '%s' '$(CURDIR)' > $(STAMP)

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@touch $(DOCS)

.PHONY: help quickstart emoji test lint docs env
