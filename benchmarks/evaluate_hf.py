"""lm-eval's own `hf` model on the benchmark's task: in memory, or what does not fit offloaded to disk by accelerate.

Run by `evaluate.py`, in the folder of the task's data; prints one line of JSON.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKPOINT_ITEM_BYTES = 2  # the benchmark's checkpoints are BF16, whatever a read widens them to


class WeightReads:
    """Bytes of weights read from the checkpoint: at loading, and again each time that an offloaded one is needed."""

    def __init__(self) -> None:
        self.total = 0

    def add_loaded(self, model: Any) -> None:
        """Counts what loading left in memory; offloaded parameters are on the meta device."""
        kept = (parameter for parameter in model.parameters() if parameter.device.type != "meta")
        self.total += sum(parameter.numel() for parameter in kept) * CHECKPOINT_ITEM_BYTES

    @contextmanager
    def counting_offloaded(self) -> Iterator[None]:
        """Counts within what accelerate fetches; it maps files, which the kernel's own count of reads leaves out."""
        from accelerate.utils.offload import OffloadedWeightsLoader

        fetch = OffloadedWeightsLoader.__getitem__

        def counted(loader: OffloadedWeightsLoader, key: str) -> Any:
            tensor = fetch(loader, key)
            self.total += tensor.numel() * CHECKPOINT_ITEM_BYTES
            return tensor

        OffloadedWeightsLoader.__getitem__ = counted
        try:
            yield
        finally:
            OffloadedWeightsLoader.__getitem__ = fetch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--offload-folder", type=Path, help="offload to disk; default: all in memory")
    parser.add_argument("--max-memory", help="what may stay in memory with --offload-folder, as accelerate reads it")
    options = parser.parse_args()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    placement: dict[str, Any] = {"device": "cpu"}
    if options.offload_folder is not None:
        placement |= {"parallelize": True, "device_map": "auto", "max_cpu_memory": options.max_memory}
        placement |= {"offload_folder": str(options.offload_folder)}
    lm = HFLM(pretrained=str(options.model), dtype=options.dtype, batch_size=options.batch_size, **placement)
    reads = WeightReads()
    reads.add_loaded(lm.model)
    tasks = Path(lm_eval.tasks.__file__).parent / options.task
    with reads.counting_offloaded():
        results = lm_eval.simple_evaluate(
            lm,
            tasks=[options.task],
            num_fewshot=0,
            limit=options.items,
            task_manager=TaskManager(include_defaults=False, include_path=str(tasks)),
            bootstrap_iters=0,
        )
    scores = {key: value for key, value in results["results"][options.task].items() if key.startswith("acc")}
    print(json.dumps({"scores": scores, "bytes_read": reads.total}))


if __name__ == "__main__":
    main()
