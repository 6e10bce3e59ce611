"""`fourge page`: the figures are those of the files, nothing from a file becomes markup, and nothing is loaded."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from page_job import HOSTILE, ITEMS, TASK, add_evaluation, quantize_pico
from safetensors import safe_open
from typer.testing import CliRunner

import fourge
from fourge.cli import app
from fourge.errors import InputError
from fourge.publishing.page_axes import power
from fourge.publishing.page_build import build_page
from fourge.publishing.page_live import follow


class _Reader(HTMLParser):
    """A page as a browser would take it apart: elements with their attributes, and the text of each table cell."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def job(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = quantize_pico(pico("llama"), tmp_path_factory.mktemp("page") / "quantized")
    add_evaluation(output)
    return output


@pytest.fixture(scope="module")
def read(job: Path) -> _Reader:
    return _Reader(fourge.page(job).path.read_text())


def test_weight_errors_are_the_jobs(job: Path, read: _Reader) -> None:
    steps = json.loads((job / ".fourge/job.json").read_text())["steps"]
    row = next(row for row in read.rows if row[:2] == ["layer", "self_attn.q_proj"])
    for layer in (0, 1):
        shown = next(cells for cells in read.rows[read.rows.index(row) :] if cells[0] == str(layer))
        for name, cell in zip(row[1:8], shown[1:8], strict=True):
            assert cell == f"{100 * steps[layer + 1]['measures']['linears'][name]['weight_error']:.2f} %"


def test_a_heat_map_cell_knows_amax_and_the_range_of_its_scale(job: Path) -> None:
    cells = json.loads(re.search(r'id="cells">(.*?)</script>', (job / "fourge.html").read_text())[1])
    steps = json.loads((job / ".fourge/job.json").read_text())["steps"]
    assert len(cells) == 14
    with safe_open(job / steps[2]["shard"], "pt") as shard:
        stored = shard.get_tensor("model.layers.1.mlp.down_proj.input_global_scale").item()
    facts = dict(cells["1/mlp.down_proj"])
    amax = steps[2]["measures"]["linears"]["mlp.down_proj"]["input_amax"]
    assert facts["largest calibrated input"] == f"{amax:.5g}"
    assert facts["largest input the scale represents"] == f"{2688 / stored:.5g}"


def test_tokens_are_counted_by_their_divergence(job: Path, read: _Reader) -> None:
    fidelity = json.loads((job / ".fourge/job.json").read_text())["result"]["fidelity"]
    start = read.rows.index(["KL from", "to", "tokens"])
    shown = read.rows[start + 1 : start + 1 + len(fidelity["kl_histogram"]["counts"])]
    assert sum(int(tokens.replace(",", "")) for *_, tokens in shown) == fidelity["kl_div"]["tokens"]
    low, high = (sum(float(row[at]) * int(row[2]) for row in shown if int(row[2])) for at in (0, 1))
    assert low <= fidelity["kl_div"]["mean"] * fidelity["kl_div"]["tokens"] <= high


def test_every_figure_names_its_file_and_what_writes_that(read: _Reader) -> None:
    assert "From fourge.json (KL, top-1 agreement, perplexity), the files of weights as they lie there" in read.text
    assert "are written by fourge quantize with the settings above; evaluation.json and the samples by" in read.text


def test_an_axis_of_powers_is_read_without_exponents(job: Path) -> None:
    assert [power(value) for value in (0.0, 2.0**-10, 0.5, 4.0, float("inf"))] == ["0", "1/1,024", "1/2", "4", "∞"]
    figure = (job / "fourge.html").read_text().partition('id="divergence"')[2].partition("</svg>")[0]
    edges = re.findall(r'class="tick">([^<%]+)</text>', figure)
    assert edges and all(re.fullmatch(r"0|∞|\d+|1/[\d,]+", edge) for edge in edges)


def test_codes_and_scales_are_counted_as_they_lie_in_the_files(job: Path, read: _Reader) -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    codes: Counter[float] = Counter()
    scales: Counter[float] = Counter()
    for path in job.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                if name.endswith(".weight_packed"):
                    for byte in shard.get_tensor(name).flatten().tolist():
                        codes.update((values[byte % 16], values[byte // 16]))
                if name.endswith(".weight_scale"):
                    scales.update(shard.get_tensor(name).float().flatten().tolist())
    shown = [row for row in read.rows if len(row) == 2]
    first, second = shown.index(["code's value", "weights"]), shown.index(["group scale", "groups"])
    assert shown[first + 1 : first + 16] == [[f"{value:g}", f"{count:,}"] for value, count in sorted(codes.items())]
    assert shown[second + 1 : second + 1 + len(scales)] == [
        [f"{v:g}", f"{count:,}"] for v, count in sorted(scales.items())
    ]


def test_the_heading_counts_only_benchmarks_that_can_show_damage(job: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(job, copy)
    path = copy / ".fourge/evaluate/animals/evaluation.json"
    content = json.loads(path.read_text())

    def heading(**changes: Any) -> str:
        content["tasks"][0] |= changes
        path.write_text(json.dumps(content))
        return fourge.page(copy, no_histograms=True).findings["Recovery"]

    assert heading() == "No benchmark can show damage: the baseline is nowhere above chance"
    assert "66.7" not in (copy / "fourge.html").read_text(), "the ratio of two guesses is no recovery"
    kept, lost = (f"The one benchmark above chance {falls} significantly" for falls in ("does not fall", "falls"))
    assert heading(at_chance=False, recovery={"value": 0.9, "se": 0.04}, holm_p=0.06).startswith(kept)
    assert heading(holm_p=0.04).startswith(lost)
    assert heading(holm_p=None).startswith(lost)
    assert heading(recovery={"value": 0.9, "se": 0.06}).startswith(kept)


def test_flips_are_the_items_on_which_the_models_part(read: _Reader) -> None:
    flips = [attributes for tag, attributes in read.elements if tag == "article"]
    expected = ["lost" if first[1] else "won" for *_, first, second in ITEMS if first[1] != second[1]]
    assert [flip["data-side"] for flip in flips] == expected
    assert all(flip["data-task"] == TASK for flip in flips)
    assert all(item[0] in read.text for item in ITEMS[:3])
    picked = [attributes for tag, attributes in read.elements if tag == "tr" and attributes.get("class") == "picked"]
    assert len(picked) == 2 * len(flips)


def test_no_text_of_a_file_becomes_markup(job: Path, read: _Reader) -> None:
    assert read.text.count(HOSTILE) >= 4
    names = Counter(tag for tag, _ in read.elements)
    assert names["img"] == names["i"] == 0
    assert names["script"] == 2  # the heat map's data, and our own
    assert not any(key.startswith("on") for _, attributes in read.elements for key in attributes)


def test_nothing_is_loaded(read: _Reader) -> None:
    for tag, attributes in read.elements:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for t, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe-inline'; script" not in policy.partition("style-src")[0]


def test_the_same_files_give_the_same_page(job: Path, tmp_path: Path) -> None:
    pages = [fourge.page(job, output=tmp_path / name).path.read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_no_folder_of_this_machine_is_on_the_page(job: Path, read: _Reader, pico: Callable[..., Path]) -> None:
    assert str(pico("llama").parent) not in (job / "fourge.html").read_text()
    assert f"from {pico('llama').name} " in read.text


def test_the_checkpoint_still_verifies(job: Path, pico: Callable[..., Path]) -> None:
    fourge.page(job)
    assert fourge.verify(job, source=str(pico("llama"))).passed


def test_flips_beyond_the_limit_are_counted_and_said(job: Path, tmp_path: Path) -> None:
    text = fourge.page(job, output=tmp_path / "page.html", max_flips=1, no_histograms=True).path.read_text()
    assert text.count("<article") == 1
    assert "1 of 3 are here, the first 1 of a task" in text
    assert "--no-histograms" in text


def test_a_published_directory_without_its_job_says_what_is_missing(job: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    for path in job.iterdir():
        if path.is_file():
            (published / path.name).write_bytes(path.read_bytes())
    findings = fourge.page(published).findings
    assert findings["Weight errors"] == "The directory has no job.json, so nothing is known of single layers"
    assert findings["Recovery"] == "No benchmark was run on both models"
    assert "metrics.jsonl" in findings["Cost"]


def test_live_follows_a_job_at_work_to_its_end(pico: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "quantized"
    code = (
        "import sys, time, fourge; from fourge.walk.steps import QuantizingWalk as W; run = W._run_one\n"
        "W._run_one = lambda *a: (run(*a), time.sleep(1.5))\n"
        "fourge.quantize(sys.argv[1], sys.argv[2], calibration='random', num_calibration_samples=2,"
        " num_probe_samples=2, max_seq_length=32, threads=1, device='cpu')"
    )
    job = subprocess.Popen([sys.executable, "-c", code, str(pico("llama")), str(output)], stderr=subprocess.DEVNULL)
    while not (output / ".fourge/job.json").exists():
        assert job.poll() is None
        time.sleep(0.05)
    pages = []
    for evidence in follow(output):
        pages.append(_Reader(build_page(evidence, with_histograms=False, max_flips=0, refresh_seconds=5).html))
    job.wait()
    assert (output / "model.safetensors.index.json").is_file() and job.returncode == 0
    done = [int(found[1]) for page in pages if (found := re.search(r"finished: (\d) of 4 steps", page.text))]
    assert len(set(done)) >= 3 and done == sorted(done)
    assert all(any(a.get("http-equiv") == "refresh" for _, a in page.elements) for page in pages)
    final = fourge.page(output, live=True)
    assert 'http-equiv="refresh"' not in final.path.read_text() and "%" in final.findings["Codes and scales"]


def test_open_shows_the_file(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    written = fourge.page(job, output=tmp_path / "page.html", no_histograms=True, open_browser=True)
    assert opened == [written.path.as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    with pytest.raises(InputError, match="no browser was found"):
        fourge.page(job, output=tmp_path / "page.html", no_histograms=True, open_browser=True)


def test_live_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no job is there to follow"):
        fourge.page(tmp_path, live=True)


@pytest.mark.parametrize(
    ("options", "said"), [([], "no such directory"), (["-o", "nowhere/page.html"], "--output nowhere/page.html")]
)
def test_what_the_user_can_mend_is_said_in_one_line(options: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["page", str(tmp_path / "none"), *options])
    assert done.exit_code == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
