"""The scenario of a simulation, shared by all policies: load, KV geometry and cost model."""

import math
from dataclasses import dataclass

from mellmpi.costs import CostModel
from mellmpi.protocol import ModelKv
from mellmpi.sim.bound import Load, make_load, mean_context_bytes
from mellmpi.sim.options import SimulateOptions
from mellmpi.sim.profiles import BLOCK_SIZE
from mellmpi.workload import load


@dataclass(frozen=True)
class Scenario:
    """Load, KV geometry by model, and cost model."""

    load: Load
    kvs: dict[str, ModelKv]
    cost: CostModel | None  # None: idealised, nothing but decoding takes time
    source: str  # description of the trace, one line


def read_scenario(options: SimulateOptions) -> Scenario:
    """Read the trace and build load and cost model.

    ValueError names the file and the line, or the flag to change.
    """
    workload = load(options.trace).faster(options.rate_scale)
    sizes, capacity = options.token_bytes, int(options.gpu_kv_gib * 2**30)
    if options.ideal:
        kvs = {name: ModelKv(name, 1, size) for name, size in sizes.items()}
        ideal_load = make_load(workload, sizes, capacity, options.decode_rate)
        return Scenario(ideal_load, kvs, None, workload.source)
    cost = options.cost(mean_context_bytes(workload, sizes))
    kvs = _in_blocks(sizes)
    alone = 1 / cost.forward_s(0, 1)  # tokens/s of a request that has a GPU to itself
    block_sizes = {name: kv.block_size for name, kv in kvs.items()}
    timed_load = make_load(workload, sizes, capacity, alone, block_sizes)
    return Scenario(timed_load, kvs, cost, workload.source)


def _in_blocks(sizes: dict[str, int]) -> dict[str, ModelKv]:
    """Return blocks of equal bytes for all models, each of at least `BLOCK_SIZE` tokens.

    ValueError if the sizes of the models have no small common multiple.
    """
    one = math.lcm(*sizes.values())
    block_bytes = one * -(-BLOCK_SIZE * max(sizes.values()) // one)
    if block_bytes > 64 * BLOCK_SIZE * max(sizes.values()):
        raise ValueError(
            "models of one cluster share blocks: one size of --kv-bytes-per-token "
            "must be a multiple of the others, or nearly so"
        )
    return {name: ModelKv(name, block_bytes // size, block_bytes) for name, size in sizes.items()}
