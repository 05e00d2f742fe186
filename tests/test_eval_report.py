"""The report: tables and plots of finished runs, and a page that fits a phone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from eval.report import write
from eval.report.plots import MARKERS, PLAIN
from eval.report.tables import NOTHING, Table, break_even, digits, quality, seconds, size
from eval.run_folder import ASKED, RunFolder
from hf_cachegen.errors import ConfigError

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
PHONE = 390
FIGURES = 3 * 3 + 4 + 2
"""Width of a phone's screen in pixels."""
WAIT = 120


def estimate(mean: float, difference: float | None = None) -> dict[str, float]:
    found = {"mean": mean, "low": mean - 0.02, "high": mean + 0.01}
    if difference is not None:
        found.update(difference=difference, difference_low=difference - 0.01, difference_high=difference + 0.01)
    return found


def variant(codec: str, level: int | None, bits: float, score: float | None, loss: float, kl: float) -> dict[str, Any]:
    own = codec in ("delta", "identity", "klt")
    layers = [{"k_bits": bits, "v_bits": bits / 2, "k_error": kl, "v_error": kl} for _ in range(4)] if own else []
    found: dict[str, Any] = {
        "codec": codec, "level": level, "bytes": 1e5 * bits, "bits_per_element": bits, "ratio_to_fp16": 16 / bits,
        "encode_seconds": 0.2 if own else None, "decode_seconds": None if codec == "released" else 0.01,
        "prefill_seconds": 0.0, "kl": estimate(kl), "agreement": estimate(1 - loss), "scores": {}, "layers": layers,
    }  # fmt: skip
    if score is None:
        return {**found, "perplexity": estimate(10 * (1 + loss), loss)}
    return {**found, "scores": {"line": estimate(score - loss, -loss)}, "same_answer": estimate(1 - loss)}


def made_run(root: Path, name: str, score: float | None) -> Path:
    """Write a finished run with invented numbers."""
    rows = [
        ("exact", None, 16.0, 0.0, 0.0), ("text", None, 0.03, 0.0, 0.0), ("uniform-8", None, 8.5, 0.0, 0.001),
        ("uniform-4", None, 4.5, 0.02, 0.03), ("released", None, 4.4, 0.02, 0.02), ("delta", 2, 3.0, 0.01, 0.2),
        ("delta", 1, 1.7, 0.2, 0.9), ("klt", 2, 1.2, 0.0, 0.007), ("klt", 1, 0.6, 0.005, 0.03),
    ]  # fmt: skip
    folder = RunFolder(root)
    scores = [] if score is None else ["line"]
    session = {
        "time": "2026-11-23T12:00:00+00:00", "processes": 1, "revision": "0123456789abcdef",
        "command": ["python", "-m", "eval", "run", "--dataset", "x:path=$D/y.jsonl"],
        "versions": {"torch": "2.13"}, "processor": "A <fast> processor", "cores": 2, "threads": 1, "gpu": None,
    }  # fmt: skip
    asked = {
        "model": "some/model", "dtype": "bfloat16", "max_tokens": 4096, "include_question": False,
        "profile": {"digest": "0", "bytes": 2_700_000}, "unavailable": {"quanto-4": "optimum is not installed"},
        "dataset": {"name": name, "scores": scores, "too_long": ["3"]},
    }  # fmt: skip
    folder.begin(asked, session)
    folder.finish({
        "examples": 5, "questions": 40, "context_tokens": 1075.0, "exact_bits": 16.0, "fp16_bytes": 1.6e6,
        "prefill_seconds": 0.2, "first_token_seconds": 0.03,
        "variants": [variant(codec, level, bits, score, loss, kl) for codec, level, bits, loss, kl in rows],
    })  # fmt: skip
    return root


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    runs = [made_run(root / "a", "Record lines & more", 1.0), made_run(root / "b", "WikiText-2", None),
            made_run(root / "c", "Too hard", 0.05)]  # fmt: skip
    adaptation = root / "adaptation.json"
    rows = [
        {"contestant": name, "slo": slo, "violations": 0.12345, "kl": 0.01, "ttft_mean": 1.5, "ttft_p95": 2.5}
        for name in ("adaptive", "paper", "level 1", "text", "uniform 8-bit", "a new one") for slo in (1.0, 2.0)
    ]  # fmt: skip
    steady = [{"contestant": "adaptive", "bits_per_second": rate, "ttft": 1.0} for rate in (1e8, 1e9)]
    adaptation.write_text(json.dumps({"rows": rows, "steady": steady}))
    write(runs, root / "out", "A title <here>", adaptation)
    return root / "out"


def test_the_page_is_one_file(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["']?(?!#)[^"'\s>]+""", re.sub(r"<svg.*?</svg>", "", page, flags=re.S))
    assert "A title &lt;here&gt;" in page
    assert "A &lt;fast&gt; processor" in page
    assert page.count("<svg ") == page.count("</svg>") == FIGURES
    assert "prefers-color-scheme: dark" in page
    ids = re.findall(r'\bid="?([\w.-]+)', page)
    assert len(ids) == len(set(ids))
    for color in PLAIN.values():
        assert color not in re.sub(r"<style>.*?</style>", "", page, flags=re.S), "the page's own colours everywhere"


def test_the_page_shows_the_findings(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert "26.7×" in page  # klt, level 1: 16 / 0.6
    assert "klt, level 1" in page
    assert "cannot do this task" in page
    assert "cannot do the tasks of these data sets: Too hard." in page
    assert page.count("class=card ") == 2
    assert "optimum is not installed" in page
    assert '"x:path=$D/y.jsonl"' in html.unescape(page)
    assert "1 longer than the model’s 4,096 tokens left out" in page.replace("model's", "model’s")
    assert "12.3% / 0.0100" in page
    assert "SLO 2 s" in page


def test_the_markdown_has_the_tables_and_links_its_plots(report: Path) -> None:
    text = (report / "report.md").read_text()
    share, kl = "99.5% [97.5, 100.5]", "0.0300 [0.0100, 0.0400]"
    klt = "| klt, level 1 | 60.0 kB | 26.7× | 0.60 | 2.70 MB | 7 |"
    assert f"{klt} {share} | -0.5 [-1.5, +0.5] | {share} | {share} | {kl} |" in text
    assert f"{klt} 10.05 | +0.50 [-0.50, +1.50] | {share} | {kl} |" in text
    assert "| CacheGen as released | 1.17 ms | – | 30.0 ms | – | – |" in text
    assert "Intervals are 95 %, percentile bootstrap over contexts; differences" in text  # a run of an older form
    for name in re.findall(r"\]\(([^)]+\.svg)\)", text):
        root = ElementTree.parse(report / name).getroot()
        assert root.tag.endswith("svg")
        assert "var(--" not in (report / name).read_text()
    assert "| adaptive | 1.50 / 2.50 | 1.50 / 2.50 |" in text


def test_every_line_of_a_plot_has_a_colour_in_the_page() -> None:
    style = (Path(__file__).parents[1] / "eval" / "report" / "page.css").read_text()
    for name in (*PLAIN, *MARKERS):
        assert style.count(f"--{name}:") == 2, "a light and a dark one"


def test_numbers_are_short() -> None:
    assert [size(n) for n in (12, 1234, 56_789_000, 7.25e9)] == ["12 B", "1.23 kB", "56.8 MB", "7.25 GB"]
    assert [seconds(n) for n in (None, 0.0123, 1.5, 250)] == ["–", "12.3 ms", "1.50 s", "250 s"]
    assert digits(99.96) == "100.0"
    table = Table("t", ("a", "b"), (("<x>", "1"),))
    assert "&lt;x&gt;" in table.html()
    assert table.markdown() == "| a | b |\n|---|---:|\n| <x> | 1 |\n"


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.json"):
        write([tmp_path], tmp_path / "out", "t", None)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="expected results of"):
        write([made_run(tmp_path / "run", "x", 1.0)], tmp_path / "out", "t", tmp_path / "bad.json")


def test_runs_of_two_models_make_no_report(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / "a", "x", 1.0), made_run(tmp_path / "b", "y", 1.0)]
    config = RunFolder(runs[1]).config()
    config[ASKED]["model"] = "another/model"
    (runs[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="of one model"):
        write(runs, tmp_path / "out", "t", None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page's layout is NOT tested")
@pytest.mark.parametrize("width", [PHONE, 768, 1280])
def test_nothing_overflows_sideways(report: Path, width: int, tmp_path: Path) -> None:
    """Lay the page out in a frame of this width with Chromium, and list the elements that exceed it."""
    page = html.escape((report / "index.html").read_text(), quote=True)
    frame = f"""<iframe id=f style="border:0;width:{width}px;height:800px" srcdoc="{page}"></iframe><pre id=found></pre>
    <script>document.getElementById("f").onload = () => {{
      const inside = document.getElementById("f").contentDocument;
      const scrolls = e => e && (getComputedStyle(e).overflowX === "auto" || scrolls(e.parentElement));
      const out = [...inside.body.querySelectorAll("*")].filter(
        e => !e.closest("svg") && e.getBoundingClientRect().right > {width} + 0.5 && !scrolls(e.parentElement));
      const small = [...inside.querySelectorAll("figure svg text")].map(e => e.getBoundingClientRect().height);
      document.getElementById("found").textContent = JSON.stringify({{
        width: inside.documentElement.scrollWidth, out: out.map(e => e.tagName + "." + e.className).slice(0, 5),
        figures: inside.querySelectorAll("figure").length, smallest: Math.min(...small),
        background: getComputedStyle(inside.body).backgroundColor}});
    }};</script>"""
    (tmp_path / "frame.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}")
    backgrounds = set()
    for scheme in ("1", "0"):  # Blink's numbers: 1 light, 0 dark
        found = shown(tmp_path, scheme)
        assert found["width"] <= width
        assert found["out"] == []
        assert found["figures"] == FIGURES
        assert found["smallest"] >= 9, "text of the plots can be read"
        backgrounds.add(found["background"])
    assert len(backgrounds) == 2, "light and dark differ"


def shown(root: Path, scheme: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(CHROMIUM), *QUIET, f"--user-data-dir={root / f'profile-{scheme}'}",
         f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1400,1000", "--virtual-time-budget=8000",
         "--dump-dom", (root / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=WAIT, check=True, env={**os.environ, "HOME": str(root)},
    )  # fmt: skip
    dumped = re.findall(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.S)
    assert "".join(dumped), done.stderr[-1000:]
    found: dict[str, Any] = json.loads(html.unescape(dumped[0]))
    return found


def test_a_profile_is_priced_beside_the_caches_that_need_it() -> None:
    metrics = {"variants": [{"codec": "uniform-4", "bytes": 500}, {"codec": "klt", "bytes": 100}]}
    klt = metrics["variants"][1]
    assert break_even(metrics, klt, 4001) == "11"
    assert break_even(metrics, {"codec": "klt", "bytes": 500}, 4001) == "never"
    assert break_even({"variants": [klt]}, klt, 4001) == NOTHING


def test_the_table_names_the_profile_only_where_a_run_used_one(tmp_path: Path) -> None:
    metrics = RunFolder(made_run(tmp_path, "lines", 0.9)).metrics()
    without, priced = quality("lines", metrics, ["line"]), quality("lines", metrics, ["line"], 2_800_000)
    assert "profile" not in without.heads
    at = priced.heads.index("profile")
    cells = {row[0]: row[at : at + 2] for row in priced.rows}
    assert cells["klt, level 1"] == ("2.80 MB", "8"), "2.8 MB / (450 kB - 60 kB)"
    assert cells["delta (our reading of section 5.2), level 2"] == ("", "")
