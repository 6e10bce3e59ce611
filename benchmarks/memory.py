"""Does memory grow with depth? Quantizes synthetic Llamas of one width at several depths, each in its own process,
or ranks their Linears with `--verb sensitivity`.

The promise: the peak does not grow with depth (within 5 %) and stays under one and a half layers in BF16, the
micro-batch and 700 MB. Exits with 1 where it is broken.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from synthetic import llama_config, write_llama

BUILD = Path(__file__).resolve().parents[1] / "build" / "memory"
BASE = 700e6


HELD_OUT = {"quantize": "--num-probe-samples", "sensitivity": "--num-validation-samples"}


def peak_of(verb: str, model: Path, output: Path, length: int, threads: int) -> tuple[int, float]:
    """Peak resident bytes and seconds of one `fourge VERB` in a fresh process."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "fourge", verb, str(model), "-o", str(output), "--json", "--method", "max"]
    command += ["--calibration", "random", "--num-calibration-samples", "2", HELD_OUT[verb], "1"]
    command += ["--max-seq-length", str(length), "--micro-batch-tokens", str(length), "--threads", str(threads)]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result["peak_resident_bytes"], result["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verb", choices=HELD_OUT, default="quantize")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    # The residual stream and its relatives at the hidden width, gate, up and their product at the other, in FP32.
    micro_batch = options.tokens * (6 * options.hidden + 4 * options.intermediate) * 4
    rows = []
    for depth in options.depths:
        config = llama_config(options.hidden, options.intermediate, depth, options.hidden // 64, 8, 4096)
        layer = write_llama(BUILD / "model", config)
        peak, seconds = peak_of(options.verb, BUILD / "model", BUILD / "out", options.tokens, options.threads)
        rows.append((depth, layer, peak, 1.5 * layer + micro_batch + BASE, seconds))
    shutil.rmtree(BUILD)
    print(f"{'layers':>6} {'model MB':>9} {'layer MB':>9} {'peak RSS MB':>12} {'promise MB':>11} {'seconds':>8}")
    for depth, layer, peak, promise, seconds in rows:
        sizes = f"{depth * layer / 1e6:>9.0f} {layer / 1e6:>9.1f} {peak / 1e6:>12.1f} {promise / 1e6:>11.1f}"
        print(f"{depth:>6} {sizes} {seconds:>8.1f}")
    growth = max(row[2] for row in rows) / rows[0][2]
    within = all(peak <= promise for _, _, peak, promise, _ in rows)
    print(f"growth with depth {growth:.3f} (at most 1.05), within the promise: {'yes' if within else 'no'}")
    sys.exit(0 if growth <= 1.05 and within else 1)


if __name__ == "__main__":
    main()
