"""An OpenSSF model signature over what is published: one file that names every other by its digest."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fourge.checkpoint.durable import replaced
from fourge.checkpoint.folder import SIGNATURE
from fourge.checks.signature import NEEDS
from fourge.errors import InputError

if TYPE_CHECKING:
    from model_signing.signing import Config

_NEVER_SIGNED = frozenset({SIGNATURE, ".fourge", ".cache"})
"""What comes and goes beside a published checkpoint: the job, what a download leaves, the signature itself."""


def sign_files(output: Path, signature: Path, signer: "Config") -> None:
    """Hashes all of `output` but what stays hidden or is a signature, signs, and replaces `signature` durably."""
    from model_signing import hashing

    hidden = {path.relative_to(output).as_posix() for path in output.rglob(".*")}
    ignored = [output / name for name in sorted(_NEVER_SIGNED | hidden)]
    if signature.resolve().is_relative_to(output.resolve()):
        ignored.append(output / signature.resolve().relative_to(output.resolve()))
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    config.set_ignored_paths(paths=[path.relative_to(output) for path in ignored])
    with replaced(signature) as temporary:
        signer.set_hashing_config(config).sign(output, temporary)


def open_signer(key: Path, certificate: Path | None, chain: Sequence[Path]) -> "Config":
    """A signer with a private key, and with the certificate of its public half where there is one; PEM files.

    Raises InputError for files that are missing, encrypted, of another kind, or that do not belong together.
    """
    try:
        from model_signing import signing
    except ImportError as error:
        raise InputError(f"fourge sign needs a library; {NEEDS}") from error

    for path in (key, certificate, *chain):
        if path is not None and not path.is_file():
            raise InputError(f"{path}: no such file; give a PEM file")
    config = signing.Config()
    try:
        if certificate is None:
            return config.use_elliptic_key_signer(private_key=key)
        # The library takes no empty chain; the certificate itself adds nothing to it.
        return config.use_certificate_signer(
            private_key=key, signing_certificate=certificate, certificate_chain=chain or [certificate]
        )
    except TypeError:
        raise InputError(f"{key}: is encrypted; give it decrypted (openssl ec -in {key} -out FILE)") from None
    except (ValueError, AttributeError):
        pair = "" if certificate is None else f", or not the key of {certificate}"
    raise InputError(f"{key}: not an elliptic-curve private key in PEM (P-256, P-384 or P-521){pair}")
