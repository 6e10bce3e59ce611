"""A recipe file, JSON or YAML: a scheme, a method or BF16 for modules by their names.

    rules:
      - targets: 're:.*\\.down_proj'      # a name, a class, or a regular expression; or a list of them
        scheme: FP8                      # NVFP4, NVFP4A16, FP8, or BF16 to leave them as they are
      - targets: ['re:model\\.layers\\.[01]\\.']
        method: replay

For each Linear, the first rule that matches and has a scheme decides the scheme, the first that has a method decides
the method; where none does, `--scheme` and `--method` do.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from fourge.errors import InputError
from fourge.settings import Rule, RuleScheme

_KEYS = {"targets", "scheme", "method"}


def read_recipe_file(path: Path) -> tuple[Rule, ...]:
    """The rules, in order. InputError, with the file and the rule's number, for anything that is not as above."""
    content = _parse(path)
    if not isinstance(content, dict) or content.keys() != {"rules"} or not isinstance(content["rules"], list):
        raise InputError(f"{path}: must be a table with one key, rules, and a list of rules under it")
    if not content["rules"]:
        raise InputError(f"{path}: has no rule; leave --recipe-file out to quantize all alike")
    return tuple(_rule(entry, f"{path}: rule {number}") for number, entry in enumerate(content["rules"], 1))


def write_recipe_file(path: Path, rules: Iterable[Rule], comment: str) -> None:
    """Puts a file down that `read_recipe_file` reads as `rules`; JSON by its name, else YAML under `comment`."""
    import yaml

    from fourge.checkpoint.durable import json_text, replaced

    content = {"rules": [{key: value for key, value in asdict(rule).items() if value is not None} for rule in rules]}
    for rule in content["rules"]:
        rule["targets"] = list(rule["targets"])
    if path.suffix == ".json":
        text = json_text(content)
    else:
        text = "".join(f"# {line}\n" for line in comment.splitlines()) + yaml.safe_dump(content, sort_keys=False)
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _parse(path: Path) -> Any:
    """JSON where the name says so, YAML otherwise: JSON is YAML, but for tabs."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe-file {path} cannot be read: {error}") from error
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise InputError(f"{path}: not {kind}: {' '.join(str(error).split())}") from error


def _rule(entry: Any, where: str) -> Rule:
    from fourge.methods import METHODS

    if not isinstance(entry, dict) or not entry.keys() <= _KEYS or "targets" not in entry:
        raise InputError(f"{where}: must be a table of targets, and scheme or method or both; it is {entry!r}")
    targets = [entry["targets"]] if isinstance(entry["targets"], str) else entry["targets"]
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{where}: targets must be a name or pattern, or a list of them; it is {entry['targets']!r}")
    scheme, method = entry.get("scheme"), entry.get("method")
    if scheme is None and method is None:
        raise InputError(f"{where}: says nothing of {', '.join(targets[:3])}; give a scheme or a method")
    if scheme is not None and scheme not in get_args(RuleScheme):
        raise InputError(f"{where}: scheme {scheme!r} is not known; known are: {', '.join(get_args(RuleScheme))}")
    if method is not None and not (isinstance(method, str) and method in METHODS):
        raise InputError(f"{where}: method {method!r} is not known; known are: {', '.join(METHODS)}")
    if method is not None and scheme in ("FP8", "BF16"):
        raise InputError(f"{where}: {scheme} has no methods to choose from; leave method out")
    return Rule(tuple(targets), scheme, method)
