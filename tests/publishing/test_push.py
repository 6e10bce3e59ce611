"""`fourge push` against a stand-in of the hub's API, through huggingface_hub itself."""

import json
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from finished import CARD, flip_bit, quantize, with_card
from huggingface_hub import constants
from stand_in_hub import StandInHub
from typer.testing import CliRunner

import fourge
from fourge import InputError
from fourge.cli import app
from fourge.publishing.notice import BEGIN, with_notice
from fourge.push import push

TOKEN = "hf_SecretSecretSecretSecretSecret1234"
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def finished(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(pico(), tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return with_card(finished, tmp_path / "out")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    """A running hub that huggingface_hub takes for the real one, by the API that knows no Xet storage."""
    with StandInHub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "*")
        huggingface_hub.close_session()
        yield server
        server.shutdown()
    huggingface_hub.close_session()


def on_disk(output: Path) -> dict[str, bytes]:
    files = [path for path in output.rglob("*") if path.is_file() and ".fourge" not in path.parts]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def received(hub: StandInHub, revision: str = "main") -> dict[str, bytes]:
    return {key.partition(":")[2]: raw for key, raw in hub.files.items() if key.startswith(f"{revision}:")}


def test_everything_but_the_job_arrives(output: Path, hub: StandInHub) -> None:
    (output / "pictures").mkdir()
    (output / "pictures" / "layers.png").write_bytes(b"a picture")
    result = push(output, "org/model", threads=1)
    assert received(hub) == on_disk(output)
    assert dict(result.files) == {name: len(raw) for name, raw in sorted(on_disk(output).items())}
    assert result.total_bytes == sum(map(len, on_disk(output).values()))
    assert hub.private == {"org/model": False} and result.url == f"{hub.url}/org/model"
    assert f"Bearer {TOKEN}" in hub.tokens
    assert (output / "README.md").read_text() == CARD


def test_a_branch_of_a_private_repository(output: Path, hub: StandInHub) -> None:
    push(output, "org/model", private=True, revision="v1", threads=1)
    assert hub.private == {"org/model": True}
    assert "POST /api/models/org/model/branch/v1" in hub.requests
    assert received(hub, "v1") == on_disk(output)


def test_private_weights_do_not_go_to_a_repository_that_is_public(output: Path, hub: StandInHub) -> None:
    hub.private["org/model"] = False
    with pytest.raises(InputError, match="org/model is there already and public"):
        push(output, "org/model", private=True, threads=1)
    assert not hub.files and not hub.objects


def test_a_stopped_upload_is_continued_by_the_same_command(output: Path, hub: StandInHub) -> None:
    hub.drop_after_objects = 2
    with pytest.raises(InputError, match="the same command continues"):
        push(output, "org/model", threads=1)
    assert len(hub.objects) == 2 and not hub.files
    hub.drop_after_objects = None
    push(output, "org/model", threads=1)
    assert received(hub) == on_disk(output)


def test_a_dry_run_lists_and_touches_nothing(output: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = on_disk(output)
    done = CliRunner().invoke(app, ["push", str(output), "org/model", "--dry-run", "--threads", "1"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line for line in lines if len(line) == 2] == [
        [f"{len(raw):,}", name] for name, raw in sorted(before.items())
    ]
    assert lines[-1][-3:] == ["nothing", "was", "sent"]
    assert not hub.requests and on_disk(output) == before


def test_what_fails_verification_is_refused(output: Path, hub: StandInHub) -> None:
    flip_bit(output / SHARD)
    with pytest.raises(InputError, match=r"fails verification .*digests.*, nothing was sent"):
        push(output, "org/model", threads=1)
    assert not hub.requests and (output / "README.md").read_text() == CARD


def test_force_pushes_it_and_the_card_says_so_until_it_passes(output: Path, hub: StandInHub) -> None:
    flip_bit(output / SHARD)
    result = push(output, "org/model", force=True, threads=1)
    assert result.failed_checks == ("digests",)
    card = received(hub)["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\ntags:\n- nvfp4\n---\n" + BEGIN)
    assert "**Not verified.**" in card and "digests" in card and "# A model\n\nWhat it is.\n" in card
    flip_bit(output / SHARD)
    push(output, "org/model", threads=1)
    assert received(hub)["README.md"].decode() == CARD


def test_force_does_not_break_a_signature(output: Path, hub: StandInHub) -> None:
    flip_bit(output / SHARD)
    (output / "model.sig").write_text("{}")
    with pytest.raises(InputError, match=r"model\.sig would no longer hold"):
        push(output, "org/model", force=True, threads=1)
    assert not hub.requests


@pytest.mark.parametrize("failures", [[], ["digests"], ["digests", "scales"]])
@pytest.mark.parametrize("card", [CARD, "no metadata\n", "---\nonly: this\n---\n"])
def test_the_notice_goes_in_and_comes_out_again(card: str, failures: list[str]) -> None:
    noticed = with_notice(card, failures)
    assert with_notice(noticed, failures) == noticed
    assert with_notice(noticed, []) == card
    assert all(name in noticed for name in failures)


def test_without_a_card_of_ours_the_command_for_it_is_named(output: Path, hub: StandInHub) -> None:
    (output / "README.md").write_text("# The source's card")
    with pytest.raises(InputError, match=f"is the source's: .* `fourge card {output} --repository org/model`"):
        push(output, "org/model", force=True, threads=1)
    (output / "README.md").unlink()
    with pytest.raises(InputError, match="is missing: write the model card first"):
        push(output, "org/model", force=True, threads=1)
    assert not hub.requests


def test_a_card_for_another_name_is_not_pushed(output: Path, hub: StandInHub) -> None:
    """Its title and its commands would name what nobody can load."""
    fourge.card(output, quantized_by="org")
    with pytest.raises(InputError, match=f"to load org/out: .* `fourge card {output} --repository org/model`"):
        push(output, "org/model", force=True, threads=1)
    assert not hub.requests
    fourge.card(output, repository="org/model")
    fourge.page(output, no_histograms=True)
    push(output, "org/model", threads=1)
    card, page = (received(hub)[name].decode() for name in ("README.md", "fourge.html"))
    assert "\n# model\n" in card and "vllm serve org/model " in card and "<h1>model</h1>" in page
    fourge.card(output)
    assert (output / "README.md").read_text() == card, "what was said once is remembered"


def test_keys_and_links_out_of_the_directory_stay_here(output: Path, hub: StandInHub, tmp_path: Path) -> None:
    (output / "key.pem").write_text("-----BEGIN EC PRIVATE KEY-----\n")
    with pytest.raises(InputError, match=r"key\.pem: holds a private key"):
        push(output, "org/model", force=True, threads=1)
    (output / "key.pem").unlink()
    (tmp_path / "secret").write_text("secret")
    (output / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"notes\.txt: a symlink out of the directory"):
        push(output, "org/model", force=True, threads=1)
    assert not hub.requests


@pytest.mark.parametrize("name", ["model", "a/b/c", "org/mo del", ""])
def test_a_name_that_is_none(name: str, output: Path, hub: StandInHub) -> None:
    with pytest.raises(InputError, match="ORG/NAME"):
        push(output, name, threads=1)


def test_without_a_token_it_says_how_to_get_one(output: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="`hf auth login`, or set HF_TOKEN"):
        push(output, "org/model", threads=1)
    assert not hub.requests


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_no_token_is_shown_even_where_the_hub_repeats_it(
    status: int, output: Path, hub: StandInHub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.refuse = status
    with pytest.raises(InputError, match="org/model: the hub did not take it") as caught:
        push(output, "org/model", threads=1)
    assert f"Bearer {TOKEN}" in hub.tokens, "it was sent, and repeated"
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert "sent Bearer …" in shown and TOKEN not in shown
    done = CliRunner().invoke(app, ["push", str(output), "org/model", "--threads", "1"])
    assert done.exit_code == 2 and TOKEN not in done.output and done.stderr.count("\nfourge: ") <= 1


def test_the_result_as_json_has_no_token(output: Path, hub: StandInHub) -> None:
    done = CliRunner().invoke(app, ["push", str(output), "org/model", "--json", "--threads", "1"])
    assert done.exit_code == 0 and TOKEN not in done.output
    assert json.loads(done.stdout)["files"][SHARD] == (output / SHARD).stat().st_size
