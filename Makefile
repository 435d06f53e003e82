TORCH ?= 2.13.0
PYTHON := .venv/bin/python
# rolling-digits begins from the weights of wan-moving-digits
REFERENCES := dit-digits unet-digits flux-digits wan-moving-digits reacher fill-forward rolling-digits

.PHONY: help venv test contracts aot kernels-full bench-kernels demo lint format bench-overhead bench-gpu profiles evaluate evaluate-grid finals evaluate-full ablation coverage publish-demo reproduce routers shipped-routers shipped-choices train clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-18s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/.stamp ## create .venv with the package and its development tools

.venv/.stamp: pyproject.toml scripts/setup_venv.sh
	scripts/setup_venv.sh $(TORCH)
	@touch $@

test: venv ## run the tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

contracts: venv ## run the contract tests for every combination of methods, scopes and models
	OMP_NUM_THREADS=1 DIFFUSION_CACHE_ALL_CASES=1 $(PYTHON) -m pytest -q -n 2 --dist worksteal tests/contracts

aot: venv ## compile every kernel for GPUs that need not be here, and read the machine code
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 tests/kernels/test_aot.py --full

kernels-full: venv aot ## the same, every kernel by Triton's interpreter (and on a GPU if there is one), and the GPU benchmark, tiny
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 tests/kernels tests/gpu tests/integration/test_bench_gpu.py --ignore tests/kernels/test_aot.py --full

demo: venv ## generate with and without the cache and report speed and quality
	.venv/bin/diffusion-cache demo --out demo_output

lint: venv ## check style, types and the layers
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	.venv/bin/lint-imports

format: venv ## format the code and apply safe fixes
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

bench-overhead: venv ## measure what the cache layer costs per step
	$(PYTHON) scripts/bench_overhead.py

bench-gpu: venv ## measure full-size denoisers with random weights on a GPU (up to 9 minutes)
	$(PYTHON) scripts/bench_gpu.py --budget-seconds 520 --out results/gpu

bench-kernels: venv ## time every kernel on a GPU against a copy of the same bytes (up to 10 minutes)
	$(PYTHON) scripts/bench_kernels.py

evaluate: venv ## compare all methods and rivals on the shipped models, each at its best settings of the grid
	.venv/bin/diffusion-cache evaluate experiment=reference_all launcher=joblib -m
	.venv/bin/diffusion-cache report outputs/evaluate/reference_all --out results/reference_all

evaluate-grid: venv ## every setting of all methods and rivals, publish the report and what `recommend` says
	.venv/bin/diffusion-cache evaluate experiment=reference_grid launcher=joblib -m
	.venv/bin/diffusion-cache report outputs/evaluate/reference_grid --out results/reference_grid
	cp results/reference_grid/advice.json diffusion_cache/advice.json

finals: venv ## compare plans with what came near the best in the grid, on 256 images or 32 videos
	.venv/bin/diffusion-cache evaluate experiment=finals launcher=joblib -m
	.venv/bin/diffusion-cache report outputs/evaluate/finals --out results/finals

reproduce: venv ## check the published systems' claims on the shipped models
	$(PYTHON) scripts/reproduce.py

profiles: venv ## profile the shipped models and make their plans (hours on a CPU)
	$(PYTHON) scripts/make_profiles.py

ablation: venv ## measure what each part of a plan is worth, on flux-digits
	.venv/bin/diffusion-cache evaluate experiment=ablation model=flux-digits -m
	$(PYTHON) scripts/ablate.py
	for stage in schedule fitted refined regressors polished sigmas; do \
	  .venv/bin/diffusion-cache evaluate experiment=ablation model=flux-digits method=planned \
	    method.profile=outputs/ablation/$$stage/flux-digits-flow-euler method.label="plan $$stage" -m || exit 1; done
	.venv/bin/diffusion-cache report outputs/evaluate/ablation --out results/ablation

evaluate-full: venv ## `evaluate` with 256 images and 32 videos each
	.venv/bin/diffusion-cache evaluate experiment=reference_full launcher=joblib -m
	.venv/bin/diffusion-cache report outputs/evaluate/reference_full --out results/reference_full

routers: venv ## compare learned routers with other schedules (hours; goes on where it was stopped)
	OMP_NUM_THREADS=1 $(PYTHON) scripts/compare_routers.py

shipped-routers: venv ## train the routers that come with the package and compare them (20 minutes)
	.venv/bin/diffusion-cache train-router model=dit-digits scope=branch out=outputs/shipped/dit-digits-ddim-router
	.venv/bin/diffusion-cache train-router model=unet-digits scope=block out=outputs/shipped/unet-digits-ddim-router
	.venv/bin/diffusion-cache train-router model=flux-digits scope=block out=outputs/shipped/flux-digits-flow-euler-router
	for folder in outputs/shipped/*-router; do \
	  mkdir -p profiles/$$(basename $$folder) && cp $$folder/profile.json $$folder/arrays.safetensors profiles/$$(basename $$folder)/ || exit 1; done
	.venv/bin/diffusion-cache evaluate experiment=routers -m
	.venv/bin/diffusion-cache report outputs/evaluate/routers --out results/routers/report

shipped-choices: venv ## fit plans that come with the package to each class, and learn to choose among them
	.venv/bin/diffusion-cache select profiles/dit-digits-ddim --nfe 12,17,25 --threads 1 --out profiles/dit-digits-ddim-select
	.venv/bin/diffusion-cache select profiles/unet-digits-ddim --nfe 12,16,25 --threads 1 --out profiles/unet-digits-ddim-select
	.venv/bin/diffusion-cache select profiles/flux-digits-flow-euler --nfe 10,13,20 --threads 1 --out profiles/flux-digits-flow-euler-select

coverage: venv ## measure every denoiser and pipeline class and write docs/coverage.md
	OMP_NUM_THREADS=1 $(PYTHON) scripts/coverage.py

publish-demo: demo ## run the demo and put its table, picture and figures where the README shows them
	cp demo_output/table.md docs/demo.md
	cp demo_output/demo.png docs/demo.png
	cp demo_output/summary.json results/demo.json

train: venv ## train the shipped reference models (hours on a CPU)
	for name in $(REFERENCES); do $(PYTHON) scripts/train_reference.py reference=$$name || exit 1; done

clean: ## remove the venv, caches and build outputs (trained checkpoints in runs/ stay)
	rm -rf .venv build dist *.egg-info .*_cache .hypothesis demo_output
	find . -name __pycache__ -prune -exec rm -rf {} +
