SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# torch, and what its builds alone ask for. See the first lines of constraints.txt.
OF_TORCH := torch torchvision triton sympy mpmath networkx

# Words that the code, the messages and the README avoid, as regular expressions. "." is a space, "_" or "-".
AVOIDED := the.host a.training trainings told tells kept held lies stands whole beside behind in.front.of troubles? \
	faults? remed(y|ies) ways?.out by.halves cut.short spoilt anew afresh goes.on left.out passed.over so.many so.much \
	pictures savers? deviations? published.models? data.sets? sub.folders? \
	(recogn|summar|normal|initial|optim|visual|organ|general|synchron)is(e|ed|es|ing|ations?) colou(r|rs|red) grey \
	licen(ce|ces|ced) behaviours? neighbours? centred? labelled misspelt
# Standard terms that contain one of these words. They are not counted.
TERMS := standard.deviations?|held.out|a.training.(run|step|set|split|dataset|image|batch|loop|log|script|epoch|folder)s?
WORDS_IN := src scripts tests docs README.md CONTRIBUTING.md CHANGELOG.md

.PHONY: quality style test test-slow benchmark-gpu docs constraints words

# Checks the source code without changing it.
quality:
	ruff check .
	ruff format --check .
	mypy

# Fixes what ruff can fix.
style:
	ruff check --fix .
	ruff format .

# The quick tests: no network, no GPU.
test:
	pytest -n auto --dist loadfile

# Tests that start several processes or kill runs; about half an hour on two cores.
test-slow:
	pytest -m slow

# Measurements on a GPU: launches, compiler modes, copies, the assignment, precisions, and determinism. Results are in
# GPU_RESULTS as JSON. A failed measurement, such as one without enough memory, does not stop the others.
GPU_RESULTS := runs/benchmark-gpu
benchmark-gpu:
	@python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "There is no CUDA device to measure.")'
	@failed=""; cct="--model cct-7-3x1 --batch_size 128"; \
	measure() { \
		python scripts/benchmark.py --device cuda --rho 0 --rounds 10 --json "$(GPU_RESULTS)/$$1.json" "$${@:2}" \
			|| failed+=" $$1"; \
	}; \
	measure cct-launches $$cct --part training --dtype bf16 --systems_only --compile_mode eager default reduce-overhead; \
	measure cct-tf32 $$cct --part training --dtype tf32 --systems_only; \
	measure cct-detection $$cct --part detection; \
	for batch in 126 504; do \
		vit="--model vit-base --batch_size $$batch"; \
		measure "vit-copies-$$batch" $$vit --part copies --dtype bf16; \
		measure "vit-assignment-$$batch" $$vit --part step training --dtype bf16 --easy_fraction 0.4; \
		measure "vit-bf16-$$batch" $$vit --part training --dtype bf16 --systems_only; \
		measure "vit-tf32-$$batch" $$vit --part detection training --dtype tf32 --systems_only; \
	done; \
	pytest -m gpu || failed+=" tests"; \
	if [ -n "$$failed" ]; then echo "These failed:$$failed"; exit 1; fi

# Builds the documentation into site/. Needs pip install -e ".[docs]". `mkdocs serve` shows it while you write.
docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# Writes constraints.txt with the newest versions. Needs Python and pip alone.
constraints:
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	python3 -m venv "$$folder/venv"; \
	"$$folder/venv/bin/pip" install --quiet uv; \
	"$$folder/venv/bin/uv" pip compile setup.py constraints.in --extra demo --extra dev --extra docs --extra lora --universal \
		--python-version 3.10 --no-annotate --no-header --quiet --output-file "$$folder/versions.txt" \
		$(addprefix --no-emit-package ,$(OF_TORCH)) >/dev/null; \
	{ echo "# Exact versions that are tested together, for \`pip install -c constraints.txt ...\`. Renew: make constraints"; \
	  echo "# torch, torchvision and what only torch asks for are not here: a machine's own build of torch takes precedence."; \
	  grep -vE '^(nvidia|cuda)-' "$$folder/versions.txt"; } > "$$folder/constraints.txt"; \
	mv "$$folder/constraints.txt" constraints.txt

# Counts the avoided words in WORDS_IN. `make words WORD=told` lists the lines that have one of them.
words:
	@text=$$(mktemp); trap 'rm -f "$$text"' EXIT; \
	pattern() { echo "(^|[^[:alpha:]])($${1//./[ _-]})([^[:alpha:]]|$$)"; }; \
	terms=$$(pattern '$(TERMS)'); \
	grep -rHIniE --exclude='*.json' --exclude-dir='__pycache__' --exclude-dir='*.egg-info' '[a-z]' $(WORDS_IN) \
		| sed -E "s/$$terms/\1 \4/gI" >"$$text"; \
	if [ -n '$(WORD)' ]; then grep -iE "^[^:]*:[0-9]+.*$$(pattern '$(WORD)')" "$$text" || true; exit; fi; \
	for word in $(foreach word,$(AVOIDED),'$(word)'); do \
		echo "$$(cut -d: -f3- "$$text" | { grep -oiE "$$(pattern "$$word")" || true; } | wc -l) $$word"; \
	done | sort -rn | awk '{ total += $$1; print } END { print total, "in total" }'
