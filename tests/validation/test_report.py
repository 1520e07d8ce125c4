"""Reports as data and as pages."""

import html.parser
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trtforge.runtime.errors import ArtifactError, ParityError
from trtforge.validation.compare import compare
from trtforge.validation.golden import GoldenSet, Sample
from trtforge.validation.histogram import count_exponents
from trtforge.validation.pages import render_page, write_page
from trtforge.validation.parity import Candidate, Verdict
from trtforge.validation.proof import Proof
from trtforge.validation.report import PlanException, ReportData, sample_facts
from trtforge.validation.tolerance import DEFAULTS

STORED = Path(__file__).parent / "data" / "report-v1.json"

FACTS = {
    "created": "2026-11-22T20:00:00+00:00",
    "precision": "fp16",
    "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 3]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 10]}],
    "profiles": [{"batch": [1, 4, 8]}],
    "opset": 23,
    "graphs": {"reference": "ab" * 32, "model": "cd" * 32},
    "engine": {
        "sha256": "ef" * 32,
        "size": 345678,
        "backend": "tensorrt-rtx",
        "version": "1.6.1",
        "compute_capabilities": ["9.0"],
        "warnings": ["a warning"],
    },
    "device": {"name": "NVIDIA H100", "compute_capability": "9.0", "sm_count": 132},
    "source": {"factory": "models:net", "kwargs": {"layers": 3}, "hash": None},
    "versions": {"torch": "2.14.1"},
    "command": "trtforge convert net.yaml --only net",
    "unknown": {"kept": True},
}


def golden_set(samples=2, outputs=("y",), size=10):
    rng = np.random.default_rng(0)
    return GoldenSet(
        tuple(
            Sample(
                f"s{i}",
                {"batch": 4},
                None if i else 0,
                {"image": np.full((4, 3), i, np.float32)},
                {name: rng.standard_normal((4, size)).astype(np.float32) for name in outputs},
            )
            for i in range(samples)
        ),
        "torch",
        "2.14.1",
    )


def parity(stage, error, golden=None, spoil=lambda outputs: outputs):
    golden = golden or golden_set()
    rng = np.random.default_rng(1)
    outputs = {
        s.name: {n: (a + error * rng.standard_normal(a.shape)).astype(np.float32) for n, a in s.outputs.items()}
        for s in golden.samples
    }
    precision = "fp32" if stage == "export" else "fp16"
    runner = "tensorrt-rtx" if stage == "engine" else "onnxruntime"
    candidate = Candidate(stage, runner, "1.6", precision, {"graph": "12" * 32}, "a note" if stage == "engine" else "")
    return compare(golden, spoil(outputs), DEFAULTS[precision], candidate)


def report_data(engine_error=1e-3, spoil=lambda outputs: outputs, name="net", golden=None):
    proof = Proof(
        (parity("export", 1e-7, golden), parity("engine", engine_error, golden, spoil)), notes=("of the proof",)
    )
    error = None
    try:
        proof.raise_unless_passed()
    except ParityError as caught:
        error = {"what": caught.what, "why": caught.why, "fix": caught.fix}
    return ReportData(
        name,
        "failed" if error else "validated",
        proof,
        FACTS,
        (PlanException("module: head, op: Softmax", "fp32", 3, "overflow", "activations reach 71234"),),
        sample_facts(golden or golden_set()),
        {"Compare with Polygraphy": "polygraphy run --load-outputs a.json b.json"},
        error,
    )


def spoil_nan(outputs):
    outputs["s0"]["y"][0, 0] = np.nan
    return outputs


def spoil_shape(outputs):
    outputs["s0"]["y"] = outputs["s0"]["y"][:2]
    return outputs


VARIANTS = {
    "passed": report_data(),
    "failed": report_data(engine_error=1.0),
    "nan": report_data(spoil=spoil_nan),
    "shape": report_data(spoil=spoil_shape),
    "no outputs": report_data(spoil=lambda outputs: {}),
    "exact": report_data(engine_error=0.0),
    "nothing": ReportData("net", "failed", Proof(())),
    "vacuous": ReportData("net", "failed", Proof((parity("export", 0.0, golden_set(samples=1)),))),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_json_round_trip(tmp_path, variant):
    data = VARIANTS[variant]
    data.save(tmp_path / "report.json")
    assert ReportData.load(tmp_path / "report.json") == data
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["verdict"] == data.proof.verdict.value


def test_facts_stand_beside_the_reports_keys_and_cannot_replace_them():
    data = replace(VARIANTS["passed"], facts={"status": "validated", "verdict": "passed", "extra": 1})
    stored = replace(data, status="failed").to_json()
    assert (stored["status"], stored["extra"]) == ("failed", 1)


def test_report_of_schema_1_is_read():
    """Written once by this schema's first code; every later one has to read it."""
    data = ReportData.load(STORED)
    assert data.proof.verdict is Verdict.FAILED
    assert data.proof.reports[1].outputs[0].samples[0].measures.candidate_nonfinite == 1
    assert data.facts["unknown"] == {"kept": True}
    assert "Not equal" in render_page(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "not a JSON object"),
        ('{"schema": 7}', "has schema 7"),
        ('{"schema": 1}', "damaged"),
    ],
)
def test_damaged_reports_are_refused(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        ReportData.load(tmp_path / "report.json")


def test_missing_folder_is_an_artifact_error(tmp_path):
    for write in (VARIANTS["passed"].save, lambda path: write_page(VARIANTS["passed"], path)):
        with pytest.raises(ArtifactError, match="cannot write"):
            write(tmp_path / "absent" / "report")


class Page(html.parser.HTMLParser):
    """Text, tags, and whether every element was closed in order."""

    void = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("variant", VARIANTS)
def test_page_is_whole_and_alone(variant):
    text = render_page(VARIANTS[variant])
    page = Page(text)
    assert not set(page.tags) & {"script", "link", "img", "iframe"}
    assert not [name for name, _ in page.attributes if name in ("src", "srcset") or name.startswith("on")]
    links = {value for name, value in page.attributes if name == "href"}
    assert links <= {f"#{value}" for name, value in page.attributes if name == "id"}
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text
    assert "prefers-color-scheme: dark" in text
    assert text == render_page(VARIANTS[variant])


@pytest.mark.parametrize(
    ("variant", "headline"),
    [("passed", "Proved equal"), ("failed", "Not equal"), ("nan", "Not equal"), ("vacuous", "Not proved"),
     ("nothing", "Not proved")],
)  # fmt: skip
def test_verdict_comes_first(variant, headline):
    page = Page(render_page(VARIANTS[variant]))
    assert page.text.index(headline) < 120


def test_page_shows_what_one_asks_it():
    text = Page(render_page(VARIANTS["failed"])).text
    for expected in (
        "TensorRT's build is to blame",
        "does not equal torch 2.14.1",
        "SQNR ≥ 30 dB (24 in one sample alone)",
        "validation: {tolerance: …}",
        "batch\N{MULTIPLICATION SIGN}3",
        "the loader",
        "seed 0",
        "activations reach 71234",
        "NVIDIA H100",
        "ef" * 32,
        "12" * 32,
        "torch 2.14.1",
        "trtforge convert net.yaml --only net",
        "polygraphy run --load-outputs",
        "of the proof",
        "a note",
        "337.6 KiB",
        "layers: 3",
    ):
        assert expected in text, expected


def test_nan_is_shown_as_counts():
    text = Page(render_page(VARIANTS["nan"])).text
    assert "1 / 0 NaN or Inf: candidate / reference" in text
    assert "1 of 40 values are NaN or Inf in sample 's0'" in text


def test_structural_failures_are_shown():
    assert "its shape is [2, 10], the reference's is [4, 10]" in Page(render_page(VARIANTS["shape"])).text
    assert "the candidate has 0 of 2 samples" in Page(render_page(VARIANTS["no outputs"])).text


def test_markup_in_names_is_escaped():
    attack = "<script>alert(1)</script>"
    data = report_data(name=attack, golden=golden_set(outputs=(attack, '"><img src=x onerror=y>')), engine_error=1.0)
    facts = {**FACTS, "versions": {attack: attack}, "source": {"`" + attack: attack}, "command": attack}
    exceptions = (PlanException(attack, attack, 1, attack, attack),)
    text = render_page(
        replace(
            data, facts=facts, exceptions=exceptions, error={"what": "`" + attack + "`", "why": attack, "fix": attack}
        )
    )
    assert "<script" not in text
    assert "<img" not in text
    Page(text)


def test_outlier_is_marked_in_the_histogram():
    def spoil(outputs):
        outputs["s0"]["y"][0, 0] += 5
        return outputs

    text = render_page(report_data(spoil=spoil, engine_error=1e-3))
    assert len(re.findall(r'class="bar beyond"', text)) == 1
    assert "<title>greatest error asked</title>" in text


def test_large_page_is_quick():
    golden = golden_set(samples=20, outputs=[f"output_{i}" for i in range(10)])
    data = report_data(golden=golden)
    render_page(VARIANTS["passed"])
    start = time.perf_counter()
    text = render_page(data)
    assert time.perf_counter() - start < 1.0, "0.05 s on an idle core"
    assert text.count("<h3>output_9</h3>") == 2


def test_exponents_count_errors_by_power_of_two():
    reference = np.zeros(6, np.float32)
    candidate = np.array([0, 0.5, 0.75, 1.0, -3.0, np.nan], np.float32)
    assert count_exponents([(reference, candidate)]) == ((0, 2), (1, 1), (2, 1))
    assert count_exponents([(reference, candidate)] * 2) == ((0, 4), (1, 2), (2, 2))
    assert count_exponents([(reference, reference)]) == ()
    assert count_exponents([]) == ()
    assert count_exponents([(np.zeros(1), np.full(1, 1e-300))]) == ((-64, 1),)
