"""`fourge sign`: an OpenSSF model signature over a checkpoint, with a key or certificate from a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fourge.errors import InputError


@dataclass(frozen=True)
class SignResult:
    """The signature's file, and what it covers. `sbom` is None unless `--sbom` wrote one."""

    output: Path
    signature: Path
    sbom: Path | None
    files: int
    total_bytes: int


def sign(
    output: Annotated[Path, typer.Argument(help="The checkpoint's directory.")],
    *,
    key: Annotated[Path, typer.Option(help="The private key: elliptic curve, PEM, not encrypted.")],
    certificate: Annotated[Path | None, typer.Option(help="The certificate of that key, PEM.")] = None,
    certificate_chain: Annotated[
        list[Path] | None, typer.Option(help="Intermediate certificates above it, PEM; may be repeated.")
    ] = None,
    signature_file: Annotated[Path | None, typer.Option(help="Where to [default: OUT/model.sig].")] = None,
    sbom: Annotated[bool, typer.Option("--sbom", help="Write the bill of materials first, as `fourge sbom`.")] = False,
) -> SignResult:
    """Sign every file of a checkpoint, for whoever verifies with `fourge verify --signature` or model-signing.

    Sign last: whatever changes after it, the card too, breaks it. `.fourge` and the signature itself are left out.
    Nothing is asked of a network. Raises InputError for what the caller can mend.
    """
    from fourge.checkpoint.folder import INDEX, SIGNATURE, SINGLE
    from fourge.progress import announced, format_bytes
    from fourge.publishing.published_files import published_files
    from fourge.publishing.signing import open_signer, sign_files
    from fourge.sbom import sbom as write_sbom

    output = Path(output)  # a script may well give a string
    if not (output / INDEX).is_file() and not (output / SINGLE).is_file():
        raise InputError(f"{output}: no finished checkpoint; give the directory that `fourge quantize` wrote")
    if certificate is None and certificate_chain:
        raise InputError("--certificate-chain: leads up from a certificate; name that one with --certificate")
    target = output / SIGNATURE if signature_file is None else Path(signature_file)
    signer = open_signer(Path(key), certificate, certificate_chain or [])
    materials = write_sbom(output).sbom if sbom else None
    files = {name: size for name, size in published_files(output).items() if output / name != target}
    files.pop(SIGNATURE, None)
    with announced(f"Signing {len(files)} files, {format_bytes(sum(files.values()))}"):
        sign_files(output, target, signer)
    return SignResult(output, target, materials, len(files), sum(files.values()))
