# The targets are the only commands anyone has to know; the work is done by Go
# programs, so that it is the same everywhere.
GO ?= go
BIN ?= bin
FUZZTIME ?= 3s
BENCH_KERNELS ?= 7 6.12
SOAK ?= 30m
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
export KERNELS VMTEST_PKG VMTEST_RUN VMTEST_WITHOUT VMTEST_VERBOSE VMTEST_JSON VMTEST_MIRROR KERNEL MODULES

.PHONY: help build demo drill peers faults soak test fuzz vmtest lint bench bogo

help: ## what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/ktlsvisor and the example workers
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/ ./cmd/... ./examples/...

demo: build ## everything at once on this machine, with real clients
	$(BIN)/ktlsvisor demo

drill: build ## a thousand clients through upgrades and kills: how long anyone had to wait
	$(GO) run ./internal/e2e/cmd/drill -bin $(BIN)

faults: ## kills, stops and errors at every step of an upgrade, an adoption and a succession, into docs/faults.md: FAULT_RUN= FAULT_KERNELS=7
	$(GO) run ./internal/e2e/cmd/faults -only '$(FAULT_RUN)' -kernels '$(FAULT_KERNELS)' $(if $(FAULT_RUN),,-o docs/faults.md)

soak: build ## anything at any moment, with every byte checked: SOAK=30m SOAK_ARGS='-seed 1'
	$(GO) run ./internal/e2e/cmd/soak -bin $(BIN) -time $(SOAK) $(SOAK_ARGS)

test: ## vet, a short fuzzing, host tests with the race detector, then the guests
	$(GO) vet ./...
	$(GO) run ./internal/vmtest/cmd/fuzz -time $(FUZZTIME)
	$(GO) run ./internal/vmtest/cmd/vmtest -host

fuzz: ## every fuzz target for FUZZTIME each: FUZZTIME=1m FUZZ_RUN=ktls/FuzzWire
	$(GO) run ./internal/vmtest/cmd/fuzz -time $(FUZZTIME) -run '$(FUZZ_RUN)'

vmtest: ## the tests on real kernels in QEMU: KERNELS="6.1 7" VMTEST_PKG= VMTEST_RUN= VMTEST_VERBOSE=1
	$(GO) run ./internal/vmtest/cmd/vmtest

lint: ## gofmt, vet, and golangci-lint if it is installed, else staticcheck
	@bad=$$(gofmt -l .); if [ -n "$$bad" ]; then echo "gofmt -w these files:"; echo "$$bad"; exit 1; fi
	$(GO) vet ./...
	@if command -v golangci-lint >/dev/null; then golangci-lint run; else $(GO) run $(STATICCHECK) ./...; fi

bench: build ## speed and memory against crypto/tls, into docs/benchmarks: BENCH_RUN=pingpong-tls13 BENCH_KERNELS="7 6.12"
	$(GO) run ./internal/bench/cmd/bench -o docs/benchmarks -readme README.md -bin $(BIN) -run '$(BENCH_RUN)' -kernels '$(BENCH_KERNELS)'

peers: build ## what a reload of tableflip, nginx and HAProxy does to the same clients, into docs/benchmarks/peers.md (Debian)
	$(GO) run ./internal/e2e/cmd/peers -bin $(BIN) -o docs/benchmarks/peers.md

bogo: ## BoringSSL's test runner, which you have, against the record layers: RUNNER=PATH LAYER=software|kernel BOGO_TESTS=GLOB MOVE=1 GUEST=7 (docs/conformance.md)
	$(GO) run ./internal/bogo/cmd/bogo -runner '$(RUNNER)' -layer '$(or $(LAYER),software)' -tests '$(BOGO_TESTS)' $(if $(MOVE),-move) -guest '$(GUEST)'
