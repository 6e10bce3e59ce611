"""The Triton loops on a GPU: the CPU's bits first, then GB/s beside a copy and other tools' kernels, then Schur replay.

    python benchmarks/gpu.py [--json FILE]

needs a CUDA device and nothing else. Every rate is of one run on one device: bytes that an operation must read and
write over the median of its repeats, launches prepared ahead, beside the rate of a device-to-device copy of the same
weight, which is the bound. Replay is that of the seven Linears of one decoder layer of a 405B Llama, beside the time in
which their products take the calibration's tokens, measured on one micro-batch. `--interpret` runs all of it on the CPU
in Triton's interpreter, on a few values: whether this file runs is all that it shows.
"""

import argparse
import io
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
from peers import gpu_kernels

WINDOW = 8  # codes to both sides of a proposal, as in the method


@dataclass(frozen=True)
class Shapes:
    """What is computed: a weight `[rows, columns]`; a layer's groups of Linears, (columns, rows of each); tokens."""

    rows: int
    columns: int
    layer: dict[str, tuple[int, list[int]]]
    hessian_tokens: int
    micro_batch: int
    tokens: int
    window: int
    repeats: int


LLAMA_405B = Shapes(
    rows=53248,
    columns=16384,
    layer={
        "q/k/v": (16384, [16384, 1024, 1024]),
        "o": (16384, [16384]),
        "gate/up": (16384, [53248, 53248]),
        "down": (53248, [16384]),
    },
    hessian_tokens=8192,
    micro_batch=8192,
    tokens=512 * 2048,
    window=WINDOW,
    repeats=20,
)
INTERPRETED = Shapes(
    rows=9,
    columns=64,
    layer={"q/k/v": (16, [8]), "down": (32, [8])},
    hessian_tokens=40,
    micro_batch=8,
    tokens=32,
    window=1,
    repeats=1,
)


@dataclass(frozen=True)
class Rate:
    """One operation: bytes that it must move, seconds; `error` where a peer's kernel does not run."""

    operation: str
    whose: str
    bytes: int
    seconds: float | None
    error: str | None = None

    @property
    def gb_per_second(self) -> float | None:
        return None if self.seconds is None else self.bytes / self.seconds / 1e9


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of `repeats`, or of as many as fit into some two seconds.

    On a GPU after one that compiles, and each behind another one, so that its launch is prepared while the GPU is busy.
    """
    if device.type != "cuda":
        return statistics.median(_host_seconds(run) for _ in range(repeats))
    run()
    torch.cuda.synchronize()
    spent, times = 0.0, []
    while len(times) < repeats and spent < 2:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        run()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        spent += time.perf_counter() - began
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def _host_seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def random_weight(rows: int, columns: int, device: torch.device, seed: int = 0) -> Tensor:
    """BF16 `[rows, columns]`, as a Linear's are."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=device).mul_(0.02).bfloat16()


def everything(weight: Tensor, h: Tensor) -> dict[str, Tensor]:
    """What the loops make of a weight, by name."""
    from fourge.methods.scale_search import search_scales
    from fourge.nvfp4.quantize import (
        amax,
        dequantize_weight,
        fake_quantize,
        global_scale,
        quantize_weight,
        squared_errors,
    )

    divisor = global_scale(amax(weight)).reshape(1)
    plain, searched = quantize_weight(weight, divisor), search_scales(weight, divisor, h)
    chosen = quantize_weight(weight, divisor, searched)
    errors, norms = squared_errors(weight, chosen)
    return {
        "amax": divisor,
        "encode": plain.packed,
        "scales": plain.scale,
        "encode, scales given": chosen.packed,
        "decode to BF16": dequantize_weight(plain, dtype=torch.bfloat16),
        "decode to FP32": dequantize_weight(plain),
        "fake-quantize": fake_quantize(weight, divisor / 2),
        "search": search_scales(weight, divisor),
        "weighted search": searched,
        "squared errors": errors,
        "squared norms": norms,
    }


def replayed(weight: Tensor, curvature: Any, window: int) -> Any:
    """Schur replay as the method runs it, from max calibration's scales."""
    from fourge.methods.replay import replay
    from fourge.nvfp4.quantize import amax, global_scale, group_scales

    divisor = global_scale(amax(weight)).reshape(1)
    return replay(weight, group_scales(weight.float(), divisor), divisor, curvature, window)


def curvature_of(columns: int, tokens: int, device: torch.device) -> tuple[Any, float]:
    """Of random inputs whose channels differ by their size, and the seconds of the factorization."""
    from fourge.methods.hessian import HessianAccumulator, by_activity, factorize

    generator = torch.Generator(device).manual_seed(1)
    sizes = torch.exp(torch.randn(columns, generator=generator, device=device))
    hessian = HessianAccumulator(columns, device)
    for start in range(0, tokens, 4096):
        rows = min(4096, tokens - start)
        hessian.add(torch.randn(rows, columns, generator=generator, device=device) * sizes)
    order = by_activity(hessian.diagonal)
    began = time.perf_counter()
    curvature = factorize(hessian.matrix, order, [], "linear")
    float(curvature.cost[0])  # waits for the device
    return curvature, time.perf_counter() - began


def identity(device: torch.device, interpreted: bool) -> int:
    """How many results of Triton's are torch's to the bit; SystemExit names those that are not.

    The loops' are held to torch's on the CPU. Replay's to torch's on the same device: the matrix products between its
    turns sum in an order that is a device's own.
    """
    from fourge.nvfp4 import backend

    shapes = [(3, 48)] if interpreted else [(129, 1040), (64, 16384)]
    equal, differing = 0, []
    for rows, columns in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            generator = torch.Generator().manual_seed(rows)
            weight = torch.randn(rows, columns, generator=generator)
            weight = (weight * torch.exp(2 * torch.randn(rows, 1, generator=generator))).to(dtype)
            h = torch.exp(torch.randn(columns, generator=generator))
            with backend.using("torch"):
                expected = everything(weight, h)
            with backend.using("triton"):
                got = everything(weight.to(device), h.to(device))
            for name, value in expected.items():
                same = value.view(torch.uint8).equal(got[name].cpu().view(torch.uint8))
                equal += same
                differing += [] if same else [f"{name} of {rows} × {columns} in {dtype}"]
    rows, columns = (5, 32) if interpreted else (300, 1024)
    weight, (curvature, _) = random_weight(rows, columns, device), curvature_of(columns, 4 * columns, device)
    turns = []
    for name in ("torch", "triton"):
        with backend.using(name):
            turns.append(replayed(weight, curvature, 1 if interpreted else WINDOW))
    for part in ("packed", "scale"):
        one, other = (getattr(turn, part).view(torch.uint8) for turn in turns)
        equal += one.equal(other)
        differing += [] if one.equal(other) else [f"{part} of replay"]
    if differing:
        raise SystemExit(f"Triton's bits are not torch's on {device}: {'; '.join(differing)}")
    return equal


def bandwidth(shapes: Shapes, device: torch.device) -> tuple[list[Rate], gpu_kernels.Operations]:
    """Our rates on one weight, the copy first, and what the peers have for the same weight."""
    from fourge.methods.scale_search import search_scales
    from fourge.nvfp4.quantize import (
        amax,
        dequantize_weight,
        fake_quantize,
        global_scale,
        quantize_weight,
        squared_errors,
    )

    weight = random_weight(shapes.rows, shapes.columns, device)
    target, h = torch.empty_like(weight), torch.rand(shapes.columns, device=device) + 0.1
    divisor = global_scale(amax(weight)).reshape(1)
    quantized = quantize_weight(weight, divisor)
    scales = quantized.scale.float()
    source, packed = weight.nbytes, quantized.packed.nbytes + quantized.scale.nbytes
    ours: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2 * source, lambda: target.copy_(weight)),
        "amax": (source, lambda: amax(weight)),
        "encode": (source + packed, lambda: quantize_weight(weight, divisor)),
        "encode, scales given": (source + packed + scales.nbytes, lambda: quantize_weight(weight, divisor, scales)),
        "decode": (source + packed, lambda: dequantize_weight(quantized, dtype=torch.bfloat16)),
        "fake-quantize": (2 * source, lambda: fake_quantize(weight, divisor)),
        "squared errors": (source + packed + 2 * scales.nbytes, lambda: squared_errors(weight, quantized)),
        "search": (source + scales.nbytes, lambda: search_scales(weight, divisor)),
        "weighted search": (source + scales.nbytes, lambda: search_scales(weight, divisor, h)),
    }
    theirs = gpu_kernels.operations(weight, divisor, quantized.packed, quantized.scale)
    rates = []
    for operation, (moved, run) in ours.items():
        whose = "torch" if operation == "copy" else "fourge"
        rates.append(Rate(operation, whose, moved, seconds_of(run, device, shapes.repeats)))
        print_rate(rates[-1], rates[0])
    return rates, theirs


def peers_bandwidth(theirs: gpu_kernels.Operations, ours: list[Rate], device: torch.device, repeats: int) -> list[Rate]:
    """The peers' rates beside ours; tool after tool, for the last of them takes seconds for a search."""
    rates = []
    for peer in gpu_kernels.PEERS:
        for rate in ours:
            if peer in theirs.get(rate.operation, {}):
                run = theirs[rate.operation][peer]
                rates.append(peer_rate(rate.operation, peer, rate.bytes, run, device, repeats))
                print_rate(rates[-1], ours[0])
    return rates


def peer_rate(
    operation: str, peer: str, moved: int, run: Callable[[], object], device: torch.device, repeats: int
) -> Rate:
    """A peer's rate, or why it has none here; the code that its compiler prints when it gives up is kept out."""
    from triton.errors import TritonError

    try:
        with redirect_stdout(io.StringIO()):
            return Rate(operation, peer, moved, seconds_of(run, device, repeats))
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError, TritonError) as error:
        assembler = re.search(r"; error\s*: (.*)", str(error))
        reason = assembler[1] if assembler else (str(error).splitlines() or [""])[0]
        return Rate(operation, peer, moved, None, f"{type(error).__name__}: {reason}")


def layer_times(shapes: Shapes, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of the forward's products, of the factorization and of replay, for each group of a layer's Linears."""
    rows = []
    for name, (columns, outputs) in shapes.layer.items():
        weights = [random_weight(n, columns, device, seed) for seed, n in enumerate(outputs)]
        x = torch.randn(shapes.micro_batch, columns, device=device).bfloat16()

        def forward(weights: list[Tensor] = weights, x: Tensor = x) -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

        batches = shapes.tokens / shapes.micro_batch
        forward_seconds = batches * seconds_of(forward, device, min(5, shapes.repeats))
        curvature, factorized = curvature_of(columns, shapes.hessian_tokens, device)
        if device.type == "cuda":
            replayed(random_weight(16, columns, device), curvature, shapes.window)  # compiles
        began = time.perf_counter()
        for weight in weights:
            done = replayed(weight, curvature, shapes.window)
        int(done.packed[0, 0])  # waits for the device
        took = time.perf_counter() - began
        rows.append({"group": name, "forward": forward_seconds, "factorize": factorized, "replay": took})
        print(
            f"  {name:8} forward {forward_seconds:8.2f} s  factorize {factorized:7.2f} s  replay {took:8.2f} s",
            flush=True,
        )
        del curvature, weights, x
    return rows


def print_rate(rate: Rate, copy: Rate) -> None:
    """A line."""
    figures = f"does not run: {rate.error}"
    if rate.gb_per_second is not None and copy.gb_per_second is not None:
        share = rate.gb_per_second / copy.gb_per_second
        figures = f"{rate.gb_per_second:9.1f} GB/s  {share:6.1%} of copy  {1e3 * (rate.seconds or 0):9.3f} ms"
    print(f"  {rate.operation:22} {rate.whose:19} {figures}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="of the weight whose rates are measured [53248]")
    parser.add_argument("--columns", type=int, help="likewise [16384]")
    parser.add_argument("--no-replay", action="store_true", help="leaves out the layer, which takes minutes and 40 GB")
    parser.add_argument("--json", type=Path, help="every figure, as JSON, into this file")
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py needs a CUDA device and torch sees none (--interpret tries the file itself)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    import triton

    from fourge.nvfp4 import backend

    device = torch.device("cpu" if options.interpret else "cuda")
    shapes = INTERPRETED if options.interpret else LLAMA_405B
    chosen = {key: value for key in ("rows", "columns") if (value := getattr(options, key)) is not None}
    shapes = Shapes(**(vars(shapes) | chosen))
    name = "Triton's interpreter: no figure means anything" if options.interpret else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}, {datetime.now(UTC):%Y-%m-%d}", flush=True)
    equal = identity(device, options.interpret)
    print(f"{equal} results of Triton's are torch's, bit for bit\n{shapes.rows} × {shapes.columns}, BF16:", flush=True)
    for line in gpu_kernels.not_installed():
        print(f"  {line}")
    with backend.using("triton"):
        rates, theirs = bandwidth(shapes, device)
        layer = [] if options.no_replay else layer_times(shapes, device)
        rates += peers_bandwidth(theirs, rates, device, shapes.repeats)
    if options.json:
        figures = [asdict(rate) | {"gb_per_second": rate.gb_per_second} for rate in rates]
        facts = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "equal": equal}
        document = facts | {"date": f"{datetime.now(UTC):%Y-%m-%d}", "bandwidth": figures, "layer": layer}
        options.json.write_text(json.dumps(document | {"shapes": asdict(shapes)}, indent=1) + "\n")
    print_summary(rates, layer, name)


def print_summary(rates: list[Rate], layer: list[dict[str, Any]], name: str) -> None:
    """The short table that goes into a log, in Markdown."""
    copy = rates[0].gb_per_second or 0.0
    print(f"\n| {name} | GB/s | of copy | others' time over ours |\n|---|---|---|---|\n| copy | {copy:.0f} | 1 | |")
    for ours in (rate for rate in rates if rate.whose == "fourge"):
        speed = ours.gb_per_second or 0.0
        peers = [rate for rate in rates if rate.operation == ours.operation and rate.whose not in ("fourge", "torch")]
        times = [f"{peer.whose} {peer.seconds / (ours.seconds or 1):.1f}" for peer in peers if peer.seconds]
        print(f"| {ours.operation} | {speed:.0f} | {speed / copy:.2f} | {', '.join(times)} |")
    if layer:
        total = {key: sum(row[key] for row in layer) for key in ("forward", "factorize", "replay")}
        print(
            f"| a layer's Linears: forward {total['forward']:.2f} s, factorize {total['factorize']:.2f} s, replay "
            f"{total['replay']:.2f} s | | {total['replay'] / total['forward']:.2f} of forward | |"
        )


if __name__ == "__main__":
    main()
