"""`fourge sign` and `fourge verify --signature`, and OpenSSF's own command on what they wrote."""

import datetime
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from finished import failed, flip_bit, quantize, with_card
from typer.testing import CliRunner

import fourge
from fourge import InputError
from fourge.cli import app

NO_ENCRYPTION = serialization.NoEncryption()


def write_key(
    path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, encryption: object = NO_ENCRYPTION
) -> Path:
    pkcs8 = serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, encryption))  # type: ignore[arg-type]
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, info))
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine.pem` and `other.pem` with their `.pub`; `rsa.pem`; `locked.pem`."""
    directory = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        write_key(directory / f"{name}.pem", ec.generate_private_key(ec.SECP256R1()))
    write_key(directory / "rsa.pem", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    locked = serialization.BestAvailableEncryption(b"password")
    write_key(directory / "locked.pem", ec.generate_private_key(ec.SECP256R1()), locked)
    return directory


@pytest.fixture(scope="module")
def finished(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(pico(), tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return with_card(finished, tmp_path / "out")


def test_what_was_signed_verifies_without_its_job_and_after_a_download(
    output: Path, keys: Path, tmp_path: Path
) -> None:
    result = fourge.sign(output, key=keys / "mine.pem")
    assert result.signature == output / "model.sig" and result.files == len(list(output.glob("*"))) - 2
    assert not failed(output, public_key=keys / "mine.pub")
    shutil.rmtree(output / ".fourge")
    (output / ".cache").mkdir()
    (output / ".cache" / "download.lock").touch()
    (output / ".gitattributes").write_text("*.safetensors filter=lfs")
    (downloaded := tmp_path / "elsewhere").symlink_to(output)
    assert not failed(downloaded.resolve(), public_key=keys / "mine.pub")
    fourge.sign(output, key=keys / "mine.pem")
    assert not failed(output, public_key=keys / "mine.pub")


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "README.md", "tokenizer.json", "fourge.json"])
def test_one_byte_fails_and_names_the_file(name: str, output: Path, keys: Path) -> None:
    fourge.sign(output, key=keys / "mine.pem")
    flip_bit(output / name, -2)
    (failure,) = failed(output, public_key=keys / "mine.pub")["signature"]
    assert failure == f"{name} is not the file that was signed"


def test_an_added_and_a_missing_file(output: Path, keys: Path) -> None:
    fourge.sign(output, key=keys / "mine.pem")
    (output / "modeling.py").write_text("import os")
    (output / "LICENSE").unlink()
    assert failed(output, public_key=keys / "mine.pub")["signature"] == (
        *("extra since it was signed: modeling.py", "missing since it was signed: LICENSE"),
    )


def test_another_key_and_a_changed_signature(output: Path, keys: Path) -> None:
    fourge.sign(output, key=keys / "mine.pem")
    assert "signature" in failed(output, public_key=keys / "other.pub")
    text = (output / "model.sig").read_text()
    (output / "model.sig").write_text(text.replace('"payload":', '"payloads":'))
    assert "signature" in failed(output, public_key=keys / "mine.pub")
    (output / "model.sig").unlink()
    assert "is missing" in failed(output, public_key=keys / "mine.pub")["signature"][0]


def test_openssf_s_own_command_agrees(output: Path, keys: Path) -> None:
    fourge.sign(output, key=keys / "mine.pem")
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(output)]
    options = ["--signature", str(output / "model.sig"), "--public_key", str(keys / "mine.pub")]
    assert subprocess.run(command + options, capture_output=True, check=False).returncode == 0
    flip_bit(output / "config.json", -2)
    assert subprocess.run(command + options, capture_output=True, check=False).returncode != 0


def certify(directory: Path, name: str, issuer: str | None = None) -> None:
    """Writes `NAME.pem` and `NAME.crt`, signed by `issuer`, or by itself: an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_key(directory / f"{name}.pem", key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, by = key, subject
    if issuer is not None:
        signer = serialization.load_pem_private_key((directory / f"{issuer}.pem").read_bytes(), None)  # type: ignore[assignment]
        by = x509.load_pem_x509_certificate((directory / f"{issuer}.crt").read_bytes()).subject
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(by).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    builder = builder.add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    usage = dict.fromkeys(
        [
            *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"),
            "decipher_only",
        ],
        False,
    )
    usage |= {"digital_signature": True, "key_cert_sign": issuer is None, "crl_sign": issuer is None}
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    if issuer is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    (directory / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def test_certificates(output: Path, tmp_path: Path) -> None:
    certify(tmp_path, "authority")
    certify(tmp_path, "stranger")
    certify(tmp_path, "signer", "authority")
    fourge.sign(output, key=tmp_path / "signer.pem", certificate=tmp_path / "signer.crt")
    assert not failed(output, certificate_chain=[tmp_path / "authority.crt"])
    assert "signature" in failed(output, certificate_chain=[tmp_path / "stranger.crt"])
    with pytest.raises(InputError, match=r"or not the key of .*stranger\.crt"):
        fourge.sign(output, key=tmp_path / "signer.pem", certificate=tmp_path / "stranger.crt")


@pytest.mark.parametrize(
    ("name", "said"),
    [("rsa.pem", "not an elliptic-curve"), ("locked.pem", "is encrypted"), ("gone.pem", "no such file")],
)
def test_keys_that_cannot_sign(name: str, said: str, output: Path, keys: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: {said}"):
        fourge.sign(output, key=keys / name)
    assert not (output / "model.sig").exists() and not list(output.glob("*.tmp"))


def test_a_private_key_in_the_published_directory_is_refused(output: Path, keys: Path) -> None:
    shutil.copy(keys / "mine.pem", output / "mine.pem")
    with pytest.raises(InputError, match="holds a private key"):
        fourge.sign(output, key=output / "mine.pem")


def test_options_that_do_not_go_together(output: Path, keys: Path) -> None:
    for asked in ({"signature": True}, {"signature_file": output / "model.sig"}):
        with pytest.raises(InputError, match="--signature: whose"):
            fourge.verify(output, threads=1, **asked)
    with pytest.raises(InputError, match=r"rsa\.pem: cannot be read as PEM|no such|missing"):
        fourge.sign(output, key=keys / "mine.pem")
        fourge.verify(output, public_key=keys / "rsa.pem", threads=1)


def test_the_command_lines(output: Path, keys: Path, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere.sig")
    sign = ["sign", str(output), "--key", str(keys / "mine.pem"), "--signature-file", elsewhere]
    verify = ["verify", str(output), "--signature", "--signature-file", elsewhere, "--public-key"]
    assert CliRunner().invoke(app, sign).exit_code == 0
    passed = CliRunner().invoke(app, [*verify, str(keys / "mine.pub"), "--threads", "1"])
    assert passed.exit_code == 0 and "passed   signature        elsewhere.sig" in passed.stdout
    assert CliRunner().invoke(app, [*verify, str(keys / "other.pub"), "--threads", "1"]).exit_code == 1
    whose = CliRunner().invoke(app, ["verify", str(output), "--signature"])
    assert whose.exit_code == 2 and "--signature: whose?" in whose.stderr


def test_what_is_signed_is_not_written_over(output: Path, keys: Path) -> None:
    result = fourge.sign(output, key=keys / "mine.pem", sbom=True)
    assert result.sbom == output / "fourge.cdx.json" and not failed(output, public_key=keys / "mine.pub")
    signed = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    fourge.sbom(output)
    for write in (partial(fourge.sbom, name="another"), partial(fourge.page, no_histograms=True), fourge.card):
        with pytest.raises(InputError, match=r"model\.sig would no longer hold"):
            write(output)
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == signed
    fourge.page(output, output=keys / "page.html", no_histograms=True)


def test_nothing_is_asked_of_a_network(output: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    fourge.sign(output, key=keys / "mine.pem")
    assert not failed(output, public_key=keys / "mine.pub")


def test_without_the_library_the_extra_is_named(output: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(InputError, match=r"pip install 'fourge\[sign\]'"):
        fourge.sign(output, key=keys / "mine.pem")
    with pytest.raises(InputError, match=r"pip install 'fourge\[sign\]'"):
        fourge.verify(output, public_key=keys / "mine.pub", threads=1)
