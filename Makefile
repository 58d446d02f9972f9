# Two commands do everything on a fresh Debian or Ubuntu machine with Rust and Python 3:
#
#   make train [DATA=path]   set-up, release build, then the main job on a small machine
#   make test                set-up, build, all tests
#
# And for longer:
#
#   make soak [SEEDS=200000]  simulations with fresh seeds
#   make compare [DATA=path] [SEEDS="1 2 3"]  pretrained against scratch; see tools/compare.sh
#   make bench DATA=path [PEER=peer.py PYTHON=python] [ARGS=--append]  all benchmarks in a quarter of an hour
#   make mutants              shows that each invariant of the simulation can fail
#   make test-extra           checks with a browser, foreign clients, other libraries at full size, longer fuzzing
#
# The first two are quick the second time.

DATA ?= data/synth
JOB ?= jobs/small.toml
WORKERS ?= 2
ARGS ?=
# Of soak how many, of compare which.
SEEDS ?=

BIN := target/release

JUST_NOW := $(shell date +%s)

.PHONY: train test test-extra bench compare soak mutants setup build lint clean

train: build $(if $(filter data/synth,$(DATA)),data/synth)
	@if [ -e runs/small ]; then mv runs/small runs/small-$(JUST_NOW) && echo "the run before is in runs/small-$(JUST_NOW)"; fi
	$(BIN)/musher launch $(JOB) --workers $(WORKERS) --run-dir runs/small --set data.root=$(DATA) $(ARGS)
	@echo "weights: runs/small/best.safetensors   predictions beside the truth: runs/small/samples/best.png"

data/synth: | build
	$(BIN)/musher data synth $@

build: setup
	cargo build --release --locked -p musher-coordinator -p musher-worker

# Builds the programs too, with the features that tests ask of dependencies: not all of them twice.
test: setup
	cargo test --release --locked --workspace --no-fail-fast

# The Python that has torch, torchvision, keras, h5py and safetensors.
MUSHER_ORACLE_PYTHON ?=

test-extra: build
	tools/extra/run.sh
	MUSHER_FUZZ_CASES=1000000 cargo test --release --locked -p musher-weights --test fuzz
ifeq ($(MUSHER_ORACLE_PYTHON),)
	@echo "SKIPPED: full-size encoders against torchvision and Keras: set MUSHER_ORACLE_PYTHON to a Python that has them"
else
	$(MUSHER_ORACLE_PYTHON) tools/encoder_reference.py --full target/encoders
	MUSHER_ENCODERS=$(CURDIR)/target/encoders cargo test --release --locked -p musher-model --test pretrained -- --nocapture
endif

compare: build $(if $(filter data/synth,$(DATA)),data/synth)
	BIN=$(BIN) JOB=$(JOB) DATA=$(DATA) WORKERS=$(WORKERS) SEEDS="$(or $(SEEDS),44)" ARGS="$(ARGS)" tools/compare.sh

# Of PyTorch, for `make bench`: the script to measure against, and a Python that has what it needs.
PEER ?=
PYTHON ?=

# All with one set of features, that of the tests.
bench: setup
	cargo build --release --locked --workspace --bins --examples
	tools/bench.py --data $(DATA) $(and $(PEER),$(PYTHON),--peer $(PEER) --python $(PYTHON)) $(ARGS)

soak:
	cargo run --release --locked -p musher-tests --bin simulate -- --seeds $(JUST_NOW)000000..+$(or $(SEEDS),200000)

mutants:
	tools/mutants.sh

lint: setup
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo "skipped: cargo deny (cargo install cargo-deny)"; fi

setup:
	@tools/setup.sh

clean:
	cargo clean
	rm -rf .libtorch data/synth runs
