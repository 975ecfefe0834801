"""`ditattn compare` as a user types it: page, numbers, table, cache, errors; and the page in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditattn.devices.cpu import multiplies_bfloat16

pytest.importorskip("torchmetrics", reason="SSIM and MS-SSIM come from torchmetrics")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")

# 4 frames of 64 x 64 pixels: 1024 tokens, 8 blocks
CALL = ("--height", 64, "--width", 64, "--num-frames", 4, "--num-inference-steps", 2, "--guidance-scale", 1)


@pytest.fixture(scope="module")
def options(wan_folder: Path) -> list[Any]:
    return ["compare", "--model-path", wan_folder, *CALL, "--attention-backend", "rain_fusion_attn"]


@pytest.fixture(scope="module")
def made(options, tmp_path_factory) -> Path:
    """A comparison of two settings over two clips; the folder of its files and of its cache."""
    from ditattn.cli.app import run

    folder = tmp_path_factory.mktemp("compare")
    arguments = [
        *options,
        "--prompt",
        'a "red" <circle>',
        "--seed",
        1,
        "--seed",
        2,
        "--output-path",
        folder,
        "--output-file-name",
        "page.html",
    ]
    arguments += ["--grid", "sparsity=0.0,0.7", "--attention-backend-config", "skip_first_steps=0,min_tokens=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert run([str(one) for one in arguments]) == 0
    return folder


class Page(HTMLParser):
    """Cells of the table of numbers, embedded record, addresses of media."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[list[tuple[str, str]]] = []
        self.sources: list[str] = []
        self.record = ""
        self._metric: str | None = None
        self._in_record = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._in_record = tag == "script" and values.get("id") == "record"
        # a small text elsewhere is no worst clip
        self._metric = values.get("data-metric") if tag == "td" else "worst" if tag == "small" and self._metric else None
        if self._metric == "psnr":
            self.cells.append([])
        self.sources += [value for key, value in attrs if key in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        if self._in_record:
            self.record += data
        elif self._metric and data.strip():
            self.cells[-1].append((self._metric, data.strip()))


def test_the_pages_numbers_are_the_jsons(made):
    record = json.loads((made / "page.json").read_text())
    page = Page((made / "page.html").read_text())
    assert json.loads(page.record) == record
    divisors = {"attention_ms": 1000, "total_ms": 1000}
    assert len(page.cells) == len(record["settings"]) == 2
    for cells, setting in zip(page.cells, record["settings"], strict=True):
        metric = ""
        for name, text in cells:
            metric = metric if name == "worst" else name
            if setting["statistics"][metric] is None:
                # no call ran sparse
                assert (metric, text) == ("sparse_density", "-")
                continue
            value = float(setting["statistics"][metric]["worst" if name == "worst" else "median"]) / divisors.get(metric, 1)
            digits = len(text.partition(".")[2])
            assert text == ("identical" if value == float("inf") else f"{value:.{digits}f}"), metric
        assert {name for name, _ in cells} >= {"psnr", "ssim", "ms_ssim", "overall_density", "speed_up", "total_ms", "worst"}


def test_numbers_are_consistent_and_complete(made):
    record = json.loads((made / "page.json").read_text())
    assert record["clips"] == [{"prompt": 'a "red" <circle>', "seed": seed} for seed in (1, 2)]
    whole, sparse = record["settings"]
    assert (whole["name"], sparse["name"]) == ("rain_fusion_attn sparsity=0.0", "rain_fusion_attn sparsity=0.7")
    assert float(whole["statistics"]["psnr"]["worst"]) > (60 if multiplies_bfloat16() else 80)
    assert all(len(clip["psnr_by_frame"]) == 4 for clip in sparse["clips"])
    for clip, dense in zip(sparse["clips"], record["reference"]["clips"], strict=True):
        assert clip["speed_up"] == pytest.approx(dense["total_ms"] / clip["total_ms"])
        assert clip["attention"]["components"]["transformer"]["sparse"] == 2
    assert sparse["statistics"]["psnr"]["worst"] == min(clip["psnr"] for clip in sparse["clips"])
    computed = sparse["overall_density_by_step_and_layer"]["transformer"]
    assert [cell[:2] for cell in computed] == [[one["step"], one["layer"]] for one in sparse["probe"]] == [[0, 0], [1, 0]]
    assert all(0.3 < share < 1 for _, _, share in computed)
    assert 0 < sparse["probe"][0]["dropped_mass"] < 1
    assert {"model", "settings", "sampling", "versions", "device", "dtype", "created"} < set(record)
    assert record["settings"][1]["config"] == {"skip_first_steps": 0, "min_tokens": 0, "sparsity": 0.7}


def test_the_page_needs_no_network(made):
    page = Page((made / "page.html").read_text())
    assert page.sources
    assert all(source.startswith("data:") for source in page.sources)
    text = (made / "page.html").read_text()
    assert not re.search(r"""(?:@import|url\(|fetch\(|https?://(?!www\.w3\.org))""", text.replace(page.record, ""))
    # what the user typed is text, not markup
    assert "&lt;circle&gt;" in text
    assert sum(source.startswith("data:video/mp4") for source in page.sources) == 2 * (1 + 2 * 2)


def browser_command(tmp_path: Path, page: Path, *more: str) -> list[str]:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found (looked for {', '.join(BROWSERS)})")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=20000", "--timeout=60000"]
    return [*command, *more, page.as_uri()]


# resolves when every video has a frame to show
LOADED = """const all = selector => [...document.querySelectorAll(selector)];
    const pause = time => new Promise(done => setTimeout(done, time));
    const ready = async video => { while (video.readyState < 2 && !video.error) await pause(20); };
    const loaded = () => Promise.all(all("video").map(ready)).then(() => pause(200));"""


def test_a_browser_shows_it(made, tmp_path):
    # collects errors from the first line on, and in the end writes down what the page shows
    before = """<script>window.problems = [];
    window.addEventListener("error", event => problems.push(String(event.message || event.target.src)), true);</script>"""
    after = f"""<pre id="seen"></pre><script>{{ {LOADED}
    window.addEventListener("load", async () => {{
      await loaded();
      const playing = all("video").map(video => !video.paused);
      const clip = [...document.querySelector(".clip").querySelectorAll("video")];
      clip[0].currentTime = 0;
      clip[1].currentTime = clip[1].duration / 2;
      clip[0].dispatchEvent(new Event("ended"));
      const places = clip.map(video => video.currentTime);
      const seek = document.querySelector(".clip .seek");
      seek.value = 1000;
      seek.dispatchEvent(new Event("input"));
      clip[0].dispatchEvent(new Event("ended"));
      const stays = clip.every(video => video.paused);
      document.querySelector(".differ").click();
      const press = key => document.querySelector(".divide").dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true }}));
      const frame = () => document.querySelector("#wipe .frame").textContent;
      press(" ");
      const paused = all("#wipe video").every(video => video.paused);
      press("."); press("."); press(",");
      const second = frame();
      const minor = () => getComputedStyle(document.querySelector("td.minor")).display;
      const before = minor();
      document.getElementById("more").click();
      document.getElementById("seen").textContent = JSON.stringify({{
        problems, playing, stays, spread: Math.max(...places) - Math.min(...places), paused, second, minor: [before, minor()],
        pictures: all("img").map(one => one.naturalWidth), videos: all("video").map(one => one.videoWidth),
        shown: all(".clip video.difference").map(one => one.offsetHeight > 50),
        choices: all(".of-b option").map(one => one.text), chosen: all("#wipe .choose select").map(one => one.selectedIndex),
        wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        dots: all("svg.wide circle").length, maps: all(".heat").map(one => [one.naturalWidth, one.naturalHeight]) }});
    }}); }}</script>"""
    text = (made / "page.html").read_text()
    page = tmp_path / "page.html"
    page.write_text(text.replace("<head>", "<head>" + before).replace("</body>", after + "</body>"))
    done = subprocess.run(browser_command(tmp_path, page, "--dump-dom"), capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="seen">(\{.*?\})</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1])
    assert seen["problems"] == []
    assert "CONSOLE" not in done.stderr
    assert len(seen["pictures"]) >= 2 * 5
    assert min(seen["pictures"]) > 0
    # ten of the clips, and A and B
    assert seen["videos"] == [192] * 12
    assert seen["playing"] == [True] * 12
    assert seen["stays"], "drawn to the end, they show the last frame"
    # they turn round together
    assert seen["spread"] < 0.05, seen["spread"]
    assert seen["paused"]
    assert re.fullmatch(r"frame [234] of 4", seen["second"])
    # the box of the first clip was ticked, the second's was not
    assert seen["shown"] == [True, True, False, False]
    assert seen["choices"] == [
        *("torch_sdpa, dense reference", "rain_fusion_attn, sparsity 0.0", "rain_fusion_attn, sparsity 0.7"),
        *("difference of rain_fusion_attn, sparsity 0.0", "difference of rain_fusion_attn, sparsity 0.7"),
    ]
    assert seen["chosen"] == [0, 1, 0]
    assert seen["minor"] == ["none", "table-cell"]
    assert seen["wide"] <= 0, "the page is wider than the window"
    assert seen["dots"] == 2
    # 2 steps, 1 layer; computed and dropped for each of two settings
    assert seen["maps"] == [[2, 1]] * 4


@pytest.fixture(scope="module")
def image(flux_folder, tmp_path_factory) -> Path:
    """A comparison of an image under a sparse backend and a dense one; the folder of its files."""
    from ditattn.cli.app import run

    folder = tmp_path_factory.mktemp("image")
    arguments = ["--model-path", flux_folder, "--prompt", "a", "--height", 64, "--width", 96, "--num-inference-steps", 2, "--no-probe"]
    arguments += ["--attention-backend", "rain_fusion_attn", "--attention-backend", "fa"]
    arguments += ["--output-path", folder, "--output-file-name", "x", "--no-reference-cache"]
    assert run(["compare", *map(str, arguments)]) == 0
    return folder


def test_the_divider_shows_a_on_its_left_and_b_on_its_right(image, tmp_path):
    """A is the dense picture, B the grey one of a difference. A picture, not a clip, since a browser shows it when it is told to."""
    from PIL import Image

    seen = {}
    for at in (0, 50, 100):
        script = f"""<script>{{
        const [of, divide] = [".of-b", ".divide"].map(one => document.querySelector(one));
        of.value = "2 difference";
        of.dispatchEvent(new Event("change"));
        divide.value = {at};
        divide.dispatchEvent(new Event("input"));
        const place = document.querySelector(".stage").getBoundingClientRect();
        document.title = [place.left, place.top, place.width, place.height].join(" ");
        }}</script>"""
        page = tmp_path / f"at{at}.html"
        page.write_text((image / "x.html").read_text().replace("</body>", script + "</body>"))
        picture = tmp_path / f"at{at}.png"
        done = subprocess.run(
            browser_command(tmp_path, page, "--dump-dom", f"--screenshot={picture}"), capture_output=True, text=True, timeout=180
        )
        left, top, width, height = map(float, re.search(r"<title>([\d. ]+)</title>", done.stdout)[1].split())
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        # what lies between the letters on top and the handle in the middle
        middle = pixels[int(top + 0.2 * height) : int(top + 0.4 * height)]
        seen[at] = [middle[:, int(left + a * width) : int(left + b * width)] for a, b in ((0.05, 0.45), (0.55, 0.95))]
    a, b = seen[100], seen[0]
    for side in (0, 1):
        # a difference to what is all but equal is grey everywhere
        assert np.abs(b[side] - 128).max() < 12
        assert np.abs(a[side] - b[side]).mean() > 5
    assert np.abs(seen[50][0] - a[0]).mean() < 1
    assert np.abs(seen[50][1] - b[1]).mean() < 1


def test_a_target_is_in_the_first_sentence_the_record_and_the_page(ditattn, made, options, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    more = ["--prompt", 'a "red" <circle>', "--seed", 2, "--no-probe", "--attention-backend-config", "sparsity=0.5,min_tokens=0"]
    done = ditattn(*options, *more, "--output-path", made, "--output-file-name", "target", "--target-psnr", 100)
    assert done.status == 0, done.err
    record = json.loads((made / "target.json").read_text())
    assert record["target_psnr"] == 100
    assert record["verdict"] in done.out.splitlines()
    text = (made / "target.html").read_text()
    assert f'<h1 id="verdict">{html.escape(record["verdict"])}</h1>' in text
    assert text.count('class="target"') == 2
    assert 'class="target"' not in (made / "page.html").read_text()


def test_table_and_cache(ditattn, made, options, monkeypatch):
    """The same question again takes its references from the cache and says so; another seed does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    again = [*options, "--prompt", 'a "red" <circle>', "--output-path", made, "--output-file-name", "again", "--no-probe"]
    again += ["--attention-backend-config", "sparsity=0.5,skip_first_steps=0,min_tokens=0"]
    done = ditattn(*again, "--seed", 2)
    assert done.status == 0, done.err
    assert "clip 1 of 1: rain_fusion_attn" in done.err
    assert "torch_sdpa (reference)" not in done.err
    lines = done.out.splitlines()
    assert lines[0].split()[:3] == ["setting", "PSNR", "dB"]
    assert lines[1].startswith("torch_sdpa")
    assert lines[2].startswith("rain_fusion_attn sparsity=0.5")
    assert lines[-1] == f"wrote {made / 'again.html'} and again.json"
    record = json.loads((made / "again.json").read_text())
    assert record["reference"]["clips"][0]["cached"] is True
    assert record["settings"][0]["probe"] is None
    assert "come from an earlier run" in (made / "again.html").read_text()
    assert "--no-reference-cache makes them anew" in done.err
    assert "torch_sdpa (reference)" in ditattn(*again, "--seed", 3).err
    assert "torch_sdpa (reference)" in ditattn(*again, "--seed", 2, "--no-reference-cache").err
    assert "torch_sdpa (reference)" in ditattn(*again, "--seed", 2, "--num-inference-steps", 3).err


def test_every_clip_is_written_where_it_is_asked_for(ditattn, options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = ["--prompt", "a circle", "--seed", 1, "--seed", 2, "--no-probe", "--attention-backend-config", "sparsity=0.5,min_tokens=0"]
    done = ditattn(*options, *more, "--output-path", tmp_path, "--output-file-name", "x", "--save-videos")
    assert done.status == 0, done.err
    videos = sorted(path.name for path in tmp_path.glob("*.mp4"))
    assert videos == [f"x-{name}-{n}.mp4" for name in ("rain_fusion_attn-sparsity=0.5-min_tokens=0", "torch_sdpa") for n in (1, 2)]
    assert all(name in done.out for name in videos)


def test_an_image_pipeline(image):
    record = json.loads((image / "x.json").read_text())
    assert [setting["name"] for setting in record["settings"]] == ["rain_fusion_attn", "fa"]
    assert record["settings"][1]["statistics"]["flicker_ratio"] is None
    assert "<video class" not in (image / "x.html").read_text()


def test_two_transformers_each_with_its_own_map(ditattn, wan22_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = ditattn(
        *("compare", "--model-path", wan22_folder, "--prompt", "a", "--height", 64, "--width", 64, "--num-frames", 9),
        *("--num-inference-steps", 4, "--attention-backend", "rain_fusion_attn", "--output-path", tmp_path, "--output-file-name", "x"),
        *("--attention-backend-config", "skip_first_steps=0,min_tokens=0,sparsity=0.5"),
        *("--component-attention-backends", "transformer_2=torch_sdpa"),
    )
    assert done.status == 0, done.err
    setting = json.loads((tmp_path / "x.json").read_text())["settings"][0]
    steps = {name: {step for step, _, _ in cells} for name, cells in setting["overall_density_by_step_and_layer"].items()}
    assert steps["transformer"] | steps["transformer_2"] == {0, 1, 2, 3}
    assert not steps["transformer"] & steps["transformer_2"]
    assert {one["component"] for one in setting["probe"]} == {"transformer"}
    assert "overall density, transformer_2" in (tmp_path / "x.html").read_text()


def test_a_dense_backend_beside_a_sparse_one_goes_without_its_keys(ditattn, wan_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--attention-backend", "fa", "--attention-backend", "rain_fusion_attn", "--grid", "sparsity=0.0,0.5", "--no-probe"]
    arguments += ["--attention-backend-config", "min_tokens=0", "--output-path", tmp_path, "--output-file-name", "x"]
    done = ditattn("compare", "--model-path", wan_folder, "--prompt", "a", *CALL, *arguments)
    assert done.status == 0, done.err
    assert "fa has no min_tokens, sparsity: it is compared without" in done.err
    settings = json.loads((tmp_path / "x.json").read_text())["settings"]
    assert [one["name"] for one in settings] == ["fa", "rain_fusion_attn sparsity=0.0", "rain_fusion_attn sparsity=0.5"]


def test_a_step_cache_alone_and_beside_a_backend(ditattn, wan_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keys = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [0, 1001]}
    done = ditattn(
        *("compare", "--model-path", wan_folder, "--prompt", "a", *CALL, "--num-inference-steps", 4, "--no-probe"),
        *("--attention-backend", "rain_fusion_attn", "--attention-backend-config", "skip_first_steps=0,min_tokens=0,sparsity=0.5"),
        *("--cache", "pyramid_attention_broadcast", "--cache-config", json.dumps(keys)),
        *("--output-path", tmp_path, "--output-file-name", "x"),
    )
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "x.json").read_text())
    alone, sparse, _ = record["settings"]
    own = "rain_fusion_attn sparsity=0.5,skip_first_steps=0,min_tokens=0"
    assert [one["name"] for one in record["settings"]] == [
        *("torch_sdpa + pyramid_attention_broadcast", own, f"{own} + pyramid_attention_broadcast")
    ]
    assert (alone["step_cache"], sparse["step_cache"]) == ({"name": "pyramid_attention_broadcast", "keys": keys}, None)
    # of the calls of every layer the cache leaves out the second and the fourth
    assert [one["statistics"]["attention_calls"]["median"] for one in record["settings"]] == [0.5, 1.0, 0.5]
    counts = [one["clips"][0]["attention"]["components"]["transformer"] for one in record["settings"]]
    assert [(one["calls"], one["sparse"]) for one in counts] == [(2, 0), (4, 4), (2, 2)]
    # each of them changes the clip, and both change it as neither does
    assert len({one["statistics"]["psnr"]["worst"] for one in record["settings"]} - {"inf"}) == 3
    assert "calls" in done.out.splitlines()[0]
    assert 'data-metric="attention_calls"' in (tmp_path / "x.html").read_text()


def test_caches_go_without_each_others_keys(ditattn, wan_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = ditattn(
        *("compare", "--model-path", wan_folder, "--prompt", "a", *CALL, "--output-path", tmp_path, "--output-file-name", "x"),
        *("--cache", "mag", "--cache", "taylorseer", "--no-probe"),
        *("--cache-config", json.dumps({"cache_interval": 2, "cache_identifiers": [".*\\.attn1"], "mag_ratios": [1.0, 1.0]})),
    )
    assert done.status == 0, done.err
    assert "mag has no cache_interval, cache_identifiers: it is compared without" in done.err
    assert "taylorseer has no mag_ratios: it is compared without" in done.err
    settings = json.loads((tmp_path / "x.json").read_text())["settings"]
    assert [one["name"] for one in settings] == ["torch_sdpa + mag", "torch_sdpa + taylorseer"]


WRONG = {
    "nothing to compare": ([], ["--attention-backend rain_fusion_attn"]),
    "unknown backend": (["--attention-backend", "rain"], ["no attention backend 'rain'"]),
    "unknown key in the grid": (["--attention-backend", "rain_fusion_attn", "--grid", "sparsty=0.5"], ["did you mean 'sparsity'"]),
    "value out of range": (["--attention-backend", "rain_fusion_attn", "--grid", "sparsity=0.5,2"], ["sparsity"]),
    "grid without values": (["--attention-backend", "rain_fusion_attn", "--grid", "sparsity"], ["key=value,value"]),
    "grid with a value that is none": (["--attention-backend", "rain_fusion_attn", "--grid", "skip_layers=*"], ["'*' cannot be read"]),
    "key set twice": (
        ["--attention-backend", "rain_fusion_attn", "--grid", "sparsity=0.5", "--attention-backend-config", "sparsity=0.5"],
        ["sparsity is set by", "--grid"],
    ),
    "dense backend with a key": (["--attention-backend", "fa", "--grid", "sparsity=0.5"], ["no configuration keys"]),
    "key of no backend": (
        ["--attention-backend", "fa", "--attention-backend", "rain_fusion_attn", "--attention-backend-config", "sparsty=0.5"],
        ["unknown key 'sparsty'"],
    ),
    "folder in the name": (["--attention-backend", "fa", "--output-file-name", "a/b"], ["plain name"]),
    "size": (["--attention-backend", "fa", "--height", "60"], ["height must be a multiple of 16"]),
    "unknown cache": (["--cache", "second_block"], ["no step cache 'second_block'", "first_block"]),
    "unknown key of a cache": (
        ["--cache", "mag", "--cache", "faster", "--cache-config", "treshold=1"],
        ["mag", "did you mean 'threshold'"],
    ),
    "keys of no cache": (
        ["--attention-backend", "fa", "--cache-config", "threshold=1"],
        ["--cache-config is for a step cache: name it with --cache"],
    ),
    "cache that finds no layer": (["--cache", "taylorseer"], ["found no layer", "cache_identifiers"]),
    "no such layer": (["--attention-backend", "rain_fusion_attn", "--attention-backend-config", "skip_layers=7"], ["skip_layers names 7"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_in_one_line(case, ditattn, wan_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments, words = WRONG[case]
    done = ditattn("compare", "--model-path", wan_folder, "--prompt", "a", *CALL, "--output-path", tmp_path / "out", *arguments)
    assert done.status == 2
    assert len(done.error_lines) == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.error_lines[0]
    assert not (tmp_path / "out").exists()


def test_no_cache_is_nothing_to_compare(ditattn):
    for more, text in (([], "what shall be compared?"), (["--cache-config", "threshold=1"], "--cache-config is for a step cache")):
        done = ditattn("compare", "--prompt", "a blue circle", "--cache", "none", *more)
        assert done.status != 0
        assert text in done.err
