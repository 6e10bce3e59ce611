"""`fourge page`: everything known of a checkpoint as one HTML page that loads nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourge.errors import InputError

if TYPE_CHECKING:
    from fourge.publishing.evidence import Evidence


@dataclass(frozen=True)
class PageResult:
    """What `fourge page` wrote: the file, its size in bytes, and the finding above each section, by its topic."""

    path: Path
    nbytes: int
    findings: dict[str, str]


def page(
    out: Annotated[Path, typer.Argument(help="The quantized directory.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write [default: OUT/fourge.html].")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Follow a job at work: write the page again after every step, until it ends.")
    ] = False,
    no_histograms: Annotated[
        bool, typer.Option("--no-histograms", help="Do not read the weights to count codes and scales.")
    ] = False,
    max_flips: Annotated[int, typer.Option(min=0, help="Changed answers a task, at most.")] = 100,
) -> PageResult:
    """Show a quantized model: recovery, error by layer, histograms, changed answers, cost and plan, in one HTML file.

    Reads OUT's files and, for the histograms, its weights once. The page needs no network and no server. Raises
    InputError where OUT is no checkpoint directory or a file in it is damaged.
    """
    from fourge.checkpoint.folder import CONFIG, PAGE
    from fourge.publishing.evidence import read_evidence
    from fourge.publishing.page_live import unfinished_evidence

    out = Path(out)
    if output is not None and not Path(output).parent.is_dir():
        raise InputError(f"--output {output}: its folder is not there; make it, or name another")
    target = out / PAGE if output is None else Path(output)
    if live:
        _follow(out, target, open_browser)
    if live and not (out / CONFIG).is_file():
        return _write(unfinished_evidence(out), target, False, max_flips)
    result = _write(read_evidence(out), target, not no_histograms, max_flips)
    if open_browser and not live:
        _open(target)
    return result


def _follow(out: Path, target: Path, open_browser: bool) -> None:
    """Writes a page that the browser reads again by itself, as long as the job is at work."""
    from fourge.publishing.page_live import REFRESH_SECONDS, follow, unfinished_evidence

    opened = not open_browser
    try:
        for evidence in follow(out):
            _write(evidence, target, False, 0, REFRESH_SECONDS)
            if not opened:
                _open(target)
                opened = True
    except KeyboardInterrupt:
        _write(unfinished_evidence(out), target, False, 0)  # one that the browser does not read again for ever
        raise


def _write(
    evidence: "Evidence", target: Path, with_histograms: bool, max_flips: int, refresh_seconds: int | None = None
) -> PageResult:
    from fourge.checkpoint.durable import replaced
    from fourge.publishing.page_build import build_page
    from fourge.publishing.signed import require_unsigned

    built = build_page(evidence, with_histograms=with_histograms, max_flips=max_flips, refresh_seconds=refresh_seconds)
    content = built.html.encode()
    require_unsigned(evidence.output, target, content)
    with replaced(target) as temporary:
        temporary.write_bytes(content)
    return PageResult(target, target.stat().st_size, built.findings)


def _open(target: Path) -> None:
    import webbrowser

    if not webbrowser.open(target.resolve().as_uri()):
        raise InputError(f"--open: no browser was found; open {target} yourself")
