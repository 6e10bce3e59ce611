"""Names, dtypes and shapes, from headers alone; and on how many GPUs the shapes can be spread."""

from collections.abc import Iterator

from fourge.checkpoint.compressed_tensors import COLUMNS_PER_RANK_MULTIPLE
from fourge.checkpoint.reader import Checkpoint
from fourge.checks.expected import Expected
from fourge.checks.report import Check, conclude, count
from fourge.nvfp4.quantize import GROUP_SIZE

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8, 16, 32)

# How engines cut a decoder layer's Linears: these by input columns, all others by output rows. Key and value
# heads that are fewer than the ranks are copied to several of them.
_ROW_PARALLEL = ("o_proj", "down_proj")
_REPLICATED = ("k_proj", "v_proj")


def check_tensors(checkpoint: Checkpoint, expected: Expected) -> tuple[Check, frozenset[str]]:
    """Every tensor that should be there is, as it should be, and no other; also the names of those that are.

    The byte size follows from dtype and shape, and opening the file has held the offsets against both.
    """
    failures: list[str] = []
    sound: set[str] = set()
    if not expected.quantized:
        failures.append("targets and ignore of quantization_config leave no Linear that is quantized")
    misfits = [linear for linear in sorted(expected.quantized) if expected.shapes[f"{linear}.weight"][1] % GROUP_SIZE]
    failures += [
        f"{linear} has K not a multiple of {GROUP_SIZE}, which is not {expected.schemes[linear]}" for linear in misfits
    ]
    for name, spec in expected.specs.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            if not spec.optional:
                failures.append(f"{name} is missing")
        elif info.dtype not in spec.dtypes:
            failures.append(f"{name} is {info.dtype}, expected {' or '.join(spec.dtypes)} ({info.path.name})")
        elif info.shape != spec.shape:
            failures.append(f"{name} has shape {list(info.shape)}, expected {list(spec.shape)} ({info.path.name})")
        elif name.rpartition(".")[0] not in misfits:
            sound.add(name)
    failures += [
        f"{name} is not part of the model that config.json describes ({info.path.name})"
        for name, info in checkpoint.tensors.items()
        if name not in expected.specs
    ]
    kept = count(len(expected.shapes) - len(expected.quantized), "other tensor")
    detail = f"{count(len(expected.quantized), 'quantized Linear')}, {kept}: names, dtypes, shapes"
    return conclude("tensors", detail, failures), frozenset(sound)


def check_tensor_parallel(expected: Expected) -> Check:
    """On which of the usual numbers of GPUs an engine can spread the model; fails when not even on one.

    FP4 kernels take K in steps of 32 on each rank, so 16, the group size, is not enough.
    """
    obstacles = {size: list(_obstacles(expected, size)) for size in TENSOR_PARALLEL_SIZES}
    works = [str(size) for size, found in obstacles.items() if not found]
    detail = f"tensor-parallel size {', '.join(works) or 'none'}"
    hindered = next((size for size, found in obstacles.items() if found), None)
    if hindered is not None:
        detail += f"; not {hindered}: {obstacles[hindered][0]}"
    return conclude("tensor_parallel", detail, obstacles[1])


def _obstacles(expected: Expected, size: int) -> Iterator[str]:
    """What keeps the model from being spread over `size` ranks."""
    heads, kv_heads = expected.config.num_attention_heads, expected.config.num_key_value_heads
    if heads % size:
        yield f"{heads} attention heads do not divide by {size}"
    if kv_heads % size and size % kv_heads:
        yield f"{kv_heads} key-value heads neither divide by {size} nor divide it"
    for linear in expected.linears:
        rows, columns = expected.shapes[f"{linear}.weight"]
        by_columns = linear.endswith(_ROW_PARALLEL)
        cut = columns if by_columns else rows
        if cut % size and not linear.endswith(_REPLICATED):
            yield f"{linear} has {cut} {'input columns' if by_columns else 'rows'}, not a multiple of {size}"
            continue
        per_rank = columns // size if by_columns else columns
        if expected.schemes.get(linear, "FP8") != "FP8" and per_rank % COLUMNS_PER_RANK_MULTIPLE:
            yield (f"{linear} has {per_rank} input columns per rank, not a multiple of {COLUMNS_PER_RANK_MULTIPLE}")
