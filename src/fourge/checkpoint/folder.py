"""Which files of a checkpoint directory may be opened, and what each of them is for."""

import os
import re
from pathlib import Path

from fourge.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

CARD = "README.md"
PROVENANCE = "fourge.json"
PAGE = "fourge.html"
SIGNATURE = "model.sig"
SBOM = "fourge.cdx.json"

CARD_MARKER = "<!-- fourge:card -->"
"""In a `CARD` that `fourge card` wrote, so that it is told from the source's."""

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_OTHER_WEIGHTS = frozenset({".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"})
_ABOUT_ONE_DIRECTORY = frozenset({PROVENANCE, PAGE, SIGNATURE, SBOM})
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def regular_file(directory: Path, name: str) -> Path:
    """`directory / name`, a regular file that lies in the directory, or where the hub cache puts its content.

    Raises InputError where it is missing, no regular file, or a symlink that leads elsewhere: a checkpoint
    comes from others, and what it links to would be read, and copied to the output, with the user's rights.
    """
    path = directory / name
    root, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    if not target.is_relative_to(root) and not _is_hub_blob(root, target):
        raise InputError(f"{path}: a symlink out of the directory, to {target}; put the file itself there")
    if not target.is_file():
        state = "not a regular file" if target.exists() else "missing"
        raise InputError(f"{path}: {state}; download it again")
    return path


def _is_hub_blob(root: Path, target: Path) -> bool:
    """Whether `root` is a snapshot of the hub cache and `target` one of the cache's blobs.

    The layout is `models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`. Since huggingface_hub 2 the
    blob may itself be a link into a store that all models of the cache share: `blobs/XX/HASH` beside them.
    """
    model = root.parent.parent
    if root.parent.name != "snapshots" or not model.name.startswith("models--"):
        return False
    if target.parent == model / "blobs":
        return True
    shared = model.parent / "blobs"
    return target.is_relative_to(shared) and bool(_SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix()))


def has_own_card(directory: Path) -> bool:
    """Whether the directory's `README.md` is one that `fourge card` wrote."""
    path = directory / CARD
    return path.is_file() and CARD_MARKER in path.read_text(encoding="utf-8", errors="replace")


def list_sidecars(directory: Path) -> list[Path]:
    """Every file that an output takes over as it is: tokenizer, chat template, generation config, licence, …

    Not among them: weights in any format, their indexes, `config.json`, hidden files, folders, and what says where
    this very directory comes from (provenance, signature, bill of materials, page). Sorted by name. Raises
    InputError for a file that `regular_file` refuses.
    """
    names = sorted(path.name for path in directory.iterdir() if not path.is_dir())
    return [regular_file(directory, name) for name in names if _is_sidecar(name)]


def _is_sidecar(name: str) -> bool:
    if name.startswith(".") or name == CONFIG or name.endswith(".index.json") or name in _ABOUT_ONE_DIRECTORY:
        return False
    return Path(name).suffix.lower() not in _PICKLES | _OTHER_WEIGHTS


def no_weights_error(directory: Path) -> InputError:
    """What to say of a directory with neither `model.safetensors` nor its index."""
    names = sorted(path.name for path in directory.iterdir())
    if any(Path(name).suffix == ".safetensors" for name in names):
        found = next(name for name in names if Path(name).suffix == ".safetensors")
        return InputError(
            f"{directory}: has {found} but neither {SINGLE} nor {INDEX}; give the model in transformers' layout"
        )
    pickles = [name for name in names if Path(name).suffix.lower() in _PICKLES]
    if not pickles:
        return InputError(f"{directory}: has neither {SINGLE} nor {INDEX}; give a directory with a checkpoint")
    refusal = f"{directory}: has only pickles ({pickles[0]}), which can run code when opened, and is refused"
    if any(name.startswith("consolidated") for name in pickles):
        return InputError(f"{refusal}; take the model in transformers' layout, as safetensors")
    script = (
        f"from transformers import AutoModelForCausalLM as M; d = '{directory}'; "
        "M.from_pretrained(d, dtype='auto').save_pretrained(d)"
    )
    return InputError(f'{refusal}; if you trust it, convert it to safetensors: python -c "{script}"')
