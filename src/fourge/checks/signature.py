"""An OpenSSF model signature over a directory: who signed, and whether every file is the one that was signed."""

import re
from collections.abc import Sequence
from pathlib import Path

from fourge.checkpoint.folder import SIGNATURE
from fourge.checks.report import Check, conclude
from fourge.errors import InputError
from fourge.progress import announced

NEEDS = "pip install 'fourge[sign]'"

_CHANGED = re.compile(r"Hash mismatch for \\?'(.+?)\\?': Expected")
_OTHERS = re.compile(r"(Extra|Missing) files (?:found )?in model \\?'.*?\\?': ([^\"\]]*)")


def check_signature(
    output: Path, signature_file: Path | None, public_key: Path | None, certificate_chain: Sequence[Path]
) -> Check:
    """Whether `signature_file` (by default `OUT/model.sig`) is by that key, or by one that the certificates vouch for.

    Either `public_key` or `certificate_chain` is there; PEM files, nothing is asked of a network. What is wrong with
    those raises InputError; what is wrong with the signature, or with a file under it, is a failure that names it.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying
        from OpenSSL.crypto import X509StoreContextError
    except ImportError as error:
        raise InputError(f"--public-key, --certificate-chain: need a library; {NEEDS}") from error

    signature = output / SIGNATURE if signature_file is None else signature_file
    by = "certificates" if public_key is None else str(public_key)
    detail = f"{signature.name} by {by}"
    if not signature.is_file():
        return conclude("signature", detail, [f"{signature} is missing; sign with `fourge sign`"])
    try:
        if public_key is None:
            verifier = verifying.Config().use_certificate_verifier(certificate_chain=list(certificate_chain))
        else:
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{by}: cannot be read as PEM ({error}); give the signer's") from error
    with announced(f"Checking {signature.name}"):
        try:
            verifier.verify(output, signature)
        except InvalidSignature:
            return conclude("signature", detail, [f"{signature} was not made with this key"])
        except (ValueError, X509StoreContextError) as error:
            return conclude("signature", detail, _differences(str(error)) or [f"{signature}: {error}"])
    return conclude("signature", detail, [])


def _differences(message: str) -> list[str]:
    """A failure a file, from the library's one message of all of them with their digests; empty for another message."""
    changed = [f"{name} is not the file that was signed" for name in _CHANGED.findall(message)]
    others = [f"{kind.lower()} since it was signed: {names}" for kind, names in _OTHERS.findall(message)]
    return changed + others
