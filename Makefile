SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# torch, and what its builds alone ask for. See the first lines of constraints.txt.
OF_TORCH := torch torchvision triton sympy mpmath networkx

.PHONY: quality style test test-slow constraints

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
	pytest

# Tests that start several processes or kill runs; about half an hour on two cores.
test-slow:
	pytest -m slow

# Writes constraints.txt with the newest versions. Needs Python and pip alone.
constraints:
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	python3 -m venv "$$folder/venv"; \
	"$$folder/venv/bin/pip" install --quiet uv; \
	"$$folder/venv/bin/uv" pip compile setup.py constraints.in --extra dev --extra lora --universal \
		--python-version 3.10 --no-annotate --no-header --quiet --output-file "$$folder/versions.txt" \
		$(addprefix --no-emit-package ,$(OF_TORCH)) >/dev/null; \
	{ echo "# Exact versions that are tested together, for \`pip install -c constraints.txt ...\`. Renew: make constraints"; \
	  echo "# torch, torchvision and what only torch asks for are not here: a machine's own build of torch takes precedence."; \
	  grep -vE '^(nvidia|cuda)-' "$$folder/versions.txt"; } > "$$folder/constraints.txt"; \
	mv "$$folder/constraints.txt" constraints.txt
