"""AutoRound's tuning and export on the tokens of one of our jobs. Runs in AutoRound's environment.

    python autoround_export.py MODEL OUTPUT TOKENS.safetensors [--iterations 200]

Prints one JSON line: seconds of tuning and saving together, peak resident bytes, version.
"""

import tempfile
import time
from pathlib import Path

import auto_round
import torch
from auto_round import AutoRound
from common import parse_arguments, read_calibration, report


def main() -> None:
    options = parse_arguments(__doc__, ("signround",), iterations=200)
    if options.threads:
        torch.set_num_threads(options.threads)
    sequences = read_calibration(options.tokens)
    began = time.monotonic()
    tuner = AutoRound(
        options.model,
        scheme=options.scheme,
        # Tensors: their list is the data loader, and none of its text handling is met.
        dataset=[torch.tensor([sequence]) for sequence in sequences],
        iters=options.iterations,
        seqlen=min(map(len, sequences)),
        nsamples=len(sequences),
        device_map=options.device,
    )
    with tempfile.TemporaryDirectory(dir=Path(options.output).parent) as folder:
        # It writes into a folder whose name it makes up.
        tuner.quantize_and_save(output_dir=folder, format="llm_compressor")
        (written,) = Path(folder).iterdir()
        written.rename(options.output)
    report(time.monotonic() - began, 0.0, auto_round=auto_round.__version__)


if __name__ == "__main__":
    main()
