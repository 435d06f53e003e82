"""Ranks that share the work on a sample decide alike, and nothing is sent where they need not.

Each scenario runs in two processes over gloo, forked so that they need not import and load everything again.
"""

import datetime
import functools
import math
import os
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine.ranks import agreement, sharding_group

RANKS, SECONDS = 2, 120
LABELS, SEEDS, STEPS = (3, 8, 1, 5), (5, 6, 7, 8), 10

# what a rank does: scenarios by name, each giving what the test compares


load = functools.cache(reference.load)  # once, before the ranks are forked


def count_all_reduces():
    """A list that grows by the element count of every all-reduce from here on."""
    sent, original = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    return sent


def generate(name, pipe, rows=slice(None)):
    return reference.images(name, pipe(**reference.inputs(name, LABELS[rows], SEEDS[rows], steps=STEPS)))


def records(pipe):
    return [tuple(record) for record in dc.summary(pipe).records]


def context_parallel(name, threshold, **parallel):
    """One pipeline, first on a rank alone and then, still enabled, sharded over both."""
    from diffusers import ContextParallelConfig

    sent, tokens = count_all_reduces(), set()
    pipe = load(name)
    block = (getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.blocks)[1]
    block.register_forward_hook(
        lambda module, args, output: tokens.add((output[-1] if isinstance(output, tuple) else output).shape[1])
    )
    session = dc.enable(pipe, "first_block", "reuse", threshold=threshold)
    alone = {"images": generate(name, pipe), "records": records(pipe), "sent": [*sent], "agree": session.agree}
    alone["tokens"] = [*tokens]
    tokens.clear()

    torch.accelerator.device_count = lambda: 1  # diffusers counts devices, and divides by none without an accelerator
    mesh = dist.init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=RANKS, mesh=mesh, **parallel)
    pipe.transformer.enable_parallelism(config=config)
    sharded = {"images": generate(name, pipe), "records": records(pipe), "sent": [*sent], "tokens": [*tokens]}

    sent.clear()
    dc.enable(pipe, "interval", every=2)
    generate(name, pipe)
    planned = {"records": records(pipe), "sent": [*sent]}
    dc.disable(pipe)
    uncached = generate(name, pipe)
    return {"alone": alone, "sharded": sharded, "planned": planned, "uncached": uncached}


# thresholds well between the values that are measured, some of them between those of a batch's samples


def flux():
    return context_parallel("flux-digits", 0.416, ulysses_anything=True)  # three heads over two ranks


def wan():
    return context_parallel("wan-moving-digits", 0.11)


def ring():
    """Ring attention on the CPU: what diffusers says to it."""
    from diffusers import ContextParallelConfig

    pipe = load("flux-digits")
    torch.accelerator.device_count = lambda: 1
    mesh = dist.init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("ring", "ulysses"))
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=RANKS, mesh=mesh))
    try:
        generate("flux-digits", pipe)
    except ValueError as error:
        return str(error)
    return "it runs"


def data_parallel():
    """A batch of four: all of it on each rank, and half of it on each."""
    name, rank = "flux-digits", dist.get_rank()
    sent = count_all_reduces()
    pipe = load(name)
    session = dc.enable(pipe, "first_block", "reuse", threshold=0.5)
    whole = generate(name, pipe)
    together = records(pipe)
    half = slice(2 * rank, 2 * rank + 2)
    return {
        "whole": whole[half],
        "half": generate(name, pipe, half),
        "together": together,
        "apart": records(pipe),
        "agree": session.agree,
        "sent": sent,
    }


class Block(nn.Module):
    """A residual block that adds what it knows of the whole sequence: of all ranks' parts, or of its own."""

    def __init__(self, gathers):
        super().__init__()
        self.gathers = gathers
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states):
        mean = hidden_states.mean(1, keepdim=True)
        if self.gathers:
            parts = [torch.empty_like(mean) for _ in range(RANKS)]
            dist.all_gather(parts, mean)
            mean = sum(parts) / RANKS
        return hidden_states + self.linear(hidden_states).tanh() + mean


class SequenceSharded(nn.Module):
    def __init__(self, gathers):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(gathers) for _ in range(4))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@torch.no_grad()
def loop(gathers, policy="first_block", poison=None, **options):
    """Steps at which a sharded denoiser was computed: its input changes fast on one rank and slowly on the other."""
    model, rank = SequenceSharded(gathers), dist.get_rank()
    start = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(rank))
    change = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(10 + rank))
    with dc.run(model, policy, "reuse", num_steps=8, **options) as run:
        for i in range(8):
            x = start + change * i * (0.2, 0.05)[rank]
            # where a value on one rank alone is not known
            model(x * math.nan if poison == (rank, i) else x, timestep=torch.tensor([8.0 - i]))
            run.next_step()
        return [record.step for record in run.summary().records if record.computed]


def sharded_by_hand():
    sent = count_all_reduces()
    group = dist.group.WORLD
    fast = dict(threshold=0.25)
    found = {"without": loop(False, **fast), "without sent": [*sent]}
    found |= {"with": loop(False, group=group, **fast), "with sent": [*sent]}
    found |= {"meeting": loop(True, group=group, **fast)}
    sent.clear()
    found |= {"planned": loop(True, "interval", every=3, group=group), "planned sent": [*sent]}
    # a large threshold: nothing but a value that is not known asks
    found |= {"lone": loop(False, threshold=100.0, poison=(1, 4)), "all": loop(False, threshold=100.0, group=group)}
    found |= {"poisoned": loop(False, threshold=100.0, poison=(1, 4), group=group)}
    return found


def agreements():
    """The agreed values themselves."""
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig, TensorParallelConfig

    rank, nan, inf = dist.get_rank(), math.nan, math.inf
    mine = torch.tensor([[1.0, nan, 0.5, inf, 0.25], [2.0, 7.0, 0.25, 1.0, -inf]][rank], dtype=torch.bfloat16)
    before = mine.clone()
    mesh = dist.init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("ring", "ulysses"))

    def denoiser(**kinds):
        config = ParallelConfig(**{f"{kind}_parallel_config": given for kind, given in kinds.items()})
        config.setup(rank, RANKS, torch.device("cpu"), mesh=mesh["ulysses"] if "tensor" in kinds else mesh)
        return SimpleNamespace(_parallel_config=config)

    context = denoiser(context=ContextParallelConfig(ulysses_degree=RANKS))
    tensor = denoiser(tensor=TensorParallelConfig(RANKS))
    plain, compiled = SimpleNamespace(_parallel_config=None), SimpleNamespace(_orig_mod=context)
    own = [dist.new_group([0]), dist.new_group([1])]
    sent = count_all_reduces()
    found = {
        "mean": agreement([plain, context])(mine),
        "largest": agreement([], dist.group.WORLD)(mine),
        "unchanged": torch.equal(mine.nan_to_num(), before.nan_to_num()),
        "sent": sent,
        "sizes": [sharding_group(model).size() for model in (context, tensor, compiled)],
        "none": [agreement([]), agreement([plain, nn.Linear(1, 1)]), agreement([context], own[rank])],
        "named": agreement([context], dist.group.WORLD)(mine),
    }
    errors = []
    for group in (own[1 - rank], mesh):
        try:
            dc.enable(load("flux-digits"), group=group)
        except dc.ConfigError as error:
            errors.append(str(error))
    return found | {"errors": errors}


def work(scenario, rank, folder):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(folder / f"{rank}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    found = folder / f"{rank}.part"
    torch.save(scenario(), found)
    found.rename(found.with_suffix(".pt"))
    while len([*folder.glob("*.pt")]) < RANKS:
        time.sleep(0.05)  # another may still be reading what this one sent
    os._exit(0)  # gloo's threads can end a process that shuts down by an abort


# what comes of it


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Runs a scenario on two ranks, once, and gives what each found; a hang fails."""
    for name in ("flux-digits", "wan-moving-digits"):
        load(name)

    @functools.cache
    def run(scenario):
        tmp_path = tmp_path_factory.mktemp(scenario.__name__)
        context = torch.multiprocessing.get_context("fork")
        processes = [context.Process(target=work, args=(scenario, rank, tmp_path)) for rank in range(RANKS)]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + SECONDS
            while any(process.exitcode is None for process in processes):
                if time.monotonic() > deadline or any(process.exitcode for process in processes):
                    break
                time.sleep(0.05)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        told = "\n".join(log.read_text()[-3000:] for log in tmp_path.glob("*.log"))
        assert codes == [0] * RANKS, f"{scenario.__name__}: exit codes {codes}, None for a hang\n{told}"
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]

    return run


def largest_difference(a, b):
    return float((a - b).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [flux, wan])
def test_context_parallel_ranks_decide_alike_and_as_one_rank_alone(ranks, scenario):
    first, second = ranks(scenario)
    alone, sharded = first["alone"], first["sharded"]
    for found in (first, second):
        assert (found["alone"]["agree"], found["alone"]["sent"]) == (None, [])
        assert found["sharded"]["records"] == sharded["records"]  # with the reasons, and so the values
        assert largest_difference(found["sharded"]["images"], alone["images"]) <= 1e-4

    def decisions(run):
        return [(step, name, computed, reused) for step, name, _, computed, _, _, reused, *_ in run["records"]]

    assert decisions(sharded) == decisions(alone)
    computed = [record[3] for record in sharded["records"]]
    assert True in computed
    assert False in computed
    assert largest_difference(alone["images"], first["uncached"]) > 1e-3  # the cache was at work
    assert [2 * count for count in sharded["tokens"]] == alone["tokens"]
    # at most one all-reduce a call, of one number a sample; besides one for each span and pass, whether rows are apart
    decided = [count for count in sharded["sent"] if count == len(LABELS)]
    assert 0 < len(decided) <= len(sharded["records"])
    assert set(sharded["sent"]) - {len(LABELS)} <= {1}
    assert len(sharded["sent"]) - len(decided) <= 2


@pytest.mark.slow
def test_context_parallel_computes_samples_apart_and_sends_nothing_for_planned_policies(ranks):
    found = ranks(flux)
    assert any("of 4 samples" in record[4] for record in found[0]["sharded"]["records"])
    for rank in found:
        assert [record[3] for record in rank["planned"]["records"]] == [i % 2 == 0 for i in range(STEPS)]
        assert rank["planned"]["sent"] == []


@pytest.mark.slow
def test_ring_attention_does_not_run_on_the_cpu(ranks):
    # why the tests above are of Ulysses alone; when this fails, add a ring scenario
    assert ranks(ring) == ["Native attention does not support return_lse=True"] * RANKS


@pytest.mark.slow
def test_data_parallel_ranks_need_no_agreement(ranks):
    found = ranks(data_parallel)
    for rank in found:
        assert largest_difference(rank["half"], rank["whole"]) <= 1e-4
        assert (rank["agree"], rank["sent"]) == (None, [])
    assert any("of 4 samples" in record[4] for record in found[0]["together"])
    assert found[0]["apart"] != found[1]["apart"]


def test_ranks_that_the_user_shards_disagree_without_a_group_and_agree_with_it(ranks):
    first, second = ranks(sharded_by_hand)
    assert first["without"] != second["without"]
    assert first["without sent"] == second["without sent"] == []
    # any rank that asks has all compute
    assert first["with"] == second["with"] == first["without"]
    assert len(second["without"]) < len(first["without"]) < 8
    assert set(first["with sent"]) == {2}
    assert len(first["with sent"]) < 8
    # with collectives in the blocks it would hang
    assert first["meeting"] == second["meeting"]
    assert 1 < len(first["meeting"]) < 8
    for rank in (first, second):
        assert (rank["planned"], rank["planned sent"]) == ([0, 3, 6], [])


def test_what_one_rank_does_not_know_is_computed_on_all(ranks):
    first, second = ranks(sharded_by_hand)
    assert first["all"] == second["all"] == first["lone"]
    assert second["lone"] != first["lone"]
    assert first["poisoned"] == second["poisoned"]
    assert 4 in first["poisoned"]


def test_agreed_values(ranks):
    for rank in ranks(agreements):
        nan, inf = math.nan, math.inf
        torch.testing.assert_close(rank["mean"], torch.tensor([1.5, nan, 0.375, inf, -inf]), equal_nan=True)
        torch.testing.assert_close(rank["largest"], torch.tensor([2.0, nan, 0.5, inf, 0.25]), equal_nan=True)
        torch.testing.assert_close(rank["named"], rank["largest"], equal_nan=True)
        assert rank["unchanged"]
        assert rank["sent"] == [5, 10, 10]
        assert rank["sizes"] == [RANKS] * 3
        assert rank["none"] == [None] * 3
        assert len(rank["errors"]) == 2
        assert all("process group" in error.lower() or "ProcessGroup" in error for error in rank["errors"])


@pytest.mark.parametrize("group", [0, "world", [0, 1]])
def test_what_is_no_process_group_is_told(group):
    pipe = reference.load("dit-digits")
    with pytest.raises(dc.ConfigError, match="ProcessGroup that this rank belongs to"):
        dc.enable(pipe, group=group)
    with pytest.raises(dc.ConfigError, match="not enabled"):
        dc.summary(pipe)
    with (
        pytest.raises(dc.ConfigError, match="ProcessGroup that this rank belongs to"),
        dc.run(pipe.transformer, group=group),
    ):
        pass
