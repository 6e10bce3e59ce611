"""The command line: one command a verb, made from the verb's own signature."""

import atexit
import dataclasses
import functools
import gc
import inspect
import json
import shlex
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

from fourge._version import __version__
from fourge.card import card
from fourge.chat import chat
from fourge.compare import compare
from fourge.convert import convert
from fourge.errors import InputError, TogetherError
from fourge.evaluate import evaluate
from fourge.launch import Launch, read_launch
from fourge.page import page
from fourge.plan import plan
from fourge.push import push
from fourge.quantize import quantize
from fourge.report.card_text import card_summary
from fourge.report.evaluate_text import evaluate_summary
from fourge.report.evaluation_text import evaluation_summary
from fourge.report.page_text import page_summary
from fourge.report.plan_text import plan_summary
from fourge.report.publish_text import push_summary, sbom_summary, sign_summary
from fourge.report.sensitivity_text import sensitivity_summary
from fourge.report.serve_text import chat_summary, serve_summary
from fourge.report.text import convert_summary, quantize_summary, verify_summary
from fourge.sbom import sbom
from fourge.sensitivity import sensitivity
from fourge.serve import serve
from fourge.sign import sign
from fourge.verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fourge {__version__}")
        raise typer.Exit


@app.callback()
def _fourge(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """BF16 language models of any size to verified NVFP4 checkpoints, on one ordinary machine."""


def _command(
    verb: Callable[..., Any],
    show: Callable[[Any], str],
    exit_code: Callable[[Any], int] = lambda result: 0,
    stopped: str = "again",
    ranks: bool = False,
) -> None:
    """Registers `verb` as a command with `--json` added.

    `show` makes the text for people; `stopped` says, after Ctrl-C, what the same command would do now;
    `ranks` says that torchrun may start it several times for one job.
    """

    @functools.wraps(verb)
    def run(*args: Any, json_output: bool, **options: Any) -> None:
        launch = Launch()
        try:
            launch = read_launch()
            if launch.size > 1 and not ranks:
                raise InputError(f"{verb.__name__} is work for one process: leave torchrun out")
            result = verb(*args, **options)
        except InputError as error:
            if launch.rank == 0 or not isinstance(error, TogetherError):
                print(f"fourge: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            command = shlex.join(["fourge", *sys.argv[1:]])
            if launch.rank == 0:
                print(f"\nfourge: stopped; {stopped} with: {command}", file=sys.stderr)
            raise typer.Exit(2) from None
        text = json.dumps(dataclasses.asdict(result), default=str) if json_output else show(result)
        if text and launch.rank == 0:
            print(text)
        raise typer.Exit(exit_code(result))

    own = inspect.Parameter(
        "json_output",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")],
    )
    signature = inspect.signature(verb)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), own], return_annotation=None
    )
    run.__annotations__ = {name: p.annotation for name, p in run.__signature__.parameters.items()}  # type: ignore[attr-defined]
    app.command(verb.__name__)(run)


_command(plan, plan_summary)
_command(sensitivity, sensitivity_summary, stopped="the layers that were walked are kept, continue")
_command(quantize, quantize_summary, stopped="what was committed is kept, continue", ranks=True)
_command(verify, verify_summary, lambda report: 0 if report.passed else 1)
_command(convert, convert_summary, stopped="the shards that were written are kept, continue")
_command(evaluate, evaluate_summary, stopped="the layers that were walked are kept, continue", ranks=True)
_command(compare, evaluation_summary)
_command(serve, serve_summary, lambda result: result.exit_code)
_command(chat, chat_summary)
_command(card, card_summary)
_command(page, page_summary)
_command(sbom, sbom_summary)
_command(sign, sign_summary)
_command(push, push_summary, stopped="what was sent is kept, continue")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _collect_rarely() -> None:
    """Modules, classes and functions stay as long as the process: to look through them for garbage again and again as
    they are imported, and once more at the exit, took a third of a short command's CPU time."""
    gc.set_threshold(20_000, 50, 100)
    atexit.register(gc.freeze)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 verification failed, 2 for what the user can mend and for Ctrl-C."""
    _collect_rarely()
    signal.signal(signal.SIGTERM, _interrupt)
    app()
