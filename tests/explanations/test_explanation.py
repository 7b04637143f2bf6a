import dataclasses
import io
import json
import os
import re
import stat

import numpy as np
import pytest
from PIL import Image

from captum_m2ib.encoders.regions import Region
from captum_m2ib.explanations.explanation import Explanation

MEASURED = {"score": 0.3, "closed": 0.1, "range": 0.2, "kept": 1 / 3, "lost_top": 1.1, "lost_random": -1e-17}
CHECK = {
    "image": {**MEASURED, "verdict": "weak"},
    "text": {**MEASURED, "kept": 1.0, "verdict": "holds"},
    "verdict": "weak",
}
# The model saw the right half of a picture, and as much padding below.
REGION = Region(50.0, 0.0, 100.0, 30.0, 100, 20)


def make(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "image": rng.integers(0, 256, (30, 50, 3), dtype=np.uint8),
        "caption": "a <script>alert(1)</script> café 狗\x00",
        "tokens": ("[startoftext]", "a", "<script>", "café", "[endoftext]"),
        "special": (True, False, False, False, True),
        "score": 0.1 + 0.2,
        "image_bits": rng.random((12, 20)).astype(np.float32),
        "patch_bits": rng.random((3, 5)).astype(np.float32),
        "token_bits": np.array([0, 1 / 3, 2.5, 1e-30, 7], np.float32),
        "settings": {"beta": (0.1, 0.2), "model": "é</pre><b>", "seed": None},
        "record": {"score": [0.1, 0.2], "score_after": 1e-17},
        "check": CHECK,
        "unit": "score",
        "region": REGION,
    }
    return Explanation(**{**fields, **changes})


def assert_equal(first, second):
    for field in dataclasses.fields(Explanation):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("suffix", [".npz", ".json", ".NPZ"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_bits": None, "record": None, "check": None, "region": None, "unit": "bits"},
        {"caption": "\ud800 lone", "unit": "relative"},
    ],
)
def test_round_trip_is_exact(tmp_path, suffix, changes):
    explanation = make(**changes)
    path = explanation.save(tmp_path / f"pair{suffix}")
    assert_equal(Explanation.load(str(path)), explanation)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_files_of_earlier_versions_are_read(tmp_path, suffix, version):
    path = make(unit="bits").save(tmp_path / f"pair{suffix}")
    if suffix == ".json":
        header = json.loads(path.read_text())
    else:
        with np.load(path) as stored:
            arrays = dict(stored)
        header = json.loads(str(arrays["header"]))
    assert header["version"] == 4 and header["check"] == CHECK and header["unit"] == "bits"
    assert header["region"] == list(REGION) and header.pop("timeline") is None
    header["version"] = version
    for name in {1: ("check", "unit", "region"), 2: ("unit", "region")}.get(version, ()):
        del header[name]
    if suffix == ".json":
        path.write_text(json.dumps(header))
    else:
        np.savez(path, **{**arrays, "header": np.array(json.dumps(header))})
    check, region = None if version == 1 else CHECK, REGION if version == 3 else None
    assert_equal(Explanation.load(path), make(check=check, unit="bits", region=region))


def test_files_hold_no_pickles(tmp_path):
    with np.load(make().save(tmp_path / "pair.npz"), allow_pickle=False) as stored:
        assert all(stored[name].dtype.kind in "fuU" for name in stored)
    json.loads((make().save(tmp_path / "pair.json")).read_text())


def test_totals_and_top_tokens():
    explanation = make()
    assert explanation.image_total_bits == pytest.approx(float(explanation.image_bits.astype(float).sum()))
    assert explanation.token_total_bits == pytest.approx(7 + 2.5 + 1 / 3)
    assert [token for token, _ in explanation.top_tokens(2)] == ["<script>", "a"]
    assert explanation.top_tokens(1, include_special=True) == [("[endoftext]", 7.0)]
    assert len(explanation.top_tokens(99)) == 3 and explanation.top_tokens(0) == []
    with pytest.raises(ValueError, match="negative"):
        explanation.top_tokens(-1)
    assert len(repr(explanation)) < 200


def test_is_a_copy_that_cannot_change():
    settings, bits = {"layers": [1]}, np.ones((2, 2), np.float32)
    explanation = make(settings=settings, image_bits=bits)
    settings["layers"].append(2)
    bits[:] = 5
    assert explanation.settings == {"layers": [1]} and explanation.image_total_bits == 4
    with pytest.raises(ValueError, match="read-only"):
        explanation.image_bits[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.score = 1.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": np.zeros((3, 8, 8), np.uint8)}, "image must be uint8"),
        ({"image": np.zeros((8, 8, 3))}, "image must be uint8"),
        ({"image_bits": np.full((2, 2), np.nan)}, "image_bits must be finite"),
        ({"image_bits": np.ones((3, 2, 2))}, "image_bits must have 2"),
        ({"patch_bits": np.full((2, 2), np.inf)}, "patch_bits must be finite"),
        ({"token_bits": np.ones(4)}, "one length, got 5, 5 and 4"),
        ({"special": (True,)}, "one length, got 5, 1 and 5"),
        ({"score": float("nan")}, "score must be finite"),
        ({"settings": {"model": object()}}, "settings must hold only what JSON can"),
        ({"settings": None}, "settings must be a dict"),
        ({"check": {"verdict": "holds"}}, "check: expected figures and a verdict of the image"),
        ({"record": {"loss": float("inf")}}, "record must hold only what JSON can"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**changes)


def test_a_notebook_shows_the_figure():
    from IPython.core.formatters import DisplayFormatter

    shown, _ = DisplayFormatter().format(make())
    assert shown["image/png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("changes", [{}, {"patch_bits": None}, {"image_bits": np.zeros((4, 4)), "patch_bits": None}])
def test_png_is_a_picture(tmp_path, changes):
    with Image.open(make(**changes).save(tmp_path / "pair.png")) as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert np.asarray(picture.convert("L")).std() > 5


def test_the_page_tells_the_check(tmp_path):
    page = make().save(tmp_path / "pair.html").read_text(encoding="utf-8")
    assert "<li>check: image map is weak: hiding what it marks takes 110 % of what the score can lose" in page
    assert "<li>check: text map holds: " in page and "figures of the check" in page
    assert "check:" not in make(check=None).save(tmp_path / "pair.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("changes", [{}, {"patch_bits": None, "record": None, "check": None}, {"caption": ""}])
def test_html_is_one_safe_page(tmp_path, changes):
    page = make(**changes).save(tmp_path / "pair.html").read_text(encoding="utf-8")
    # Its data and its own script; the policy lets no other in.
    assert page.count("<script") == 2 and "script-src 'sha256-" in page and "</pre><b>" not in page
    assert "&lt;script&gt;" in page
    assert 'name="viewport"' in page and "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page) and "url(" not in page
    assert page.count("data:image/jpeg;base64,") == 2


@pytest.mark.parametrize("name", ["pair.pkl", "pair", "pair.jpg", ".png"])
def test_unknown_suffix_names_the_known_ones(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.png, \.pdf, \.svg, \.html, \.npz, \.json"):
        make().save(tmp_path / name)
    with pytest.raises(ValueError, match=r"\.npz, \.json"):
        Explanation.load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_directory_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
        make().save(tmp_path / "nowhere" / "pair.npz")
    with pytest.raises(FileNotFoundError):
        Explanation.load(tmp_path / "pair.npz")


@pytest.mark.parametrize("suffix", [".png", ".html", ".npz", ".json"])
def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"pair{suffix}"

    def fail(source, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            make().save(path)
        assert list(tmp_path.iterdir()) == []
        path.write_text("old")
        with pytest.raises(OSError, match="disk full"):
            make().save(path)
        assert path.read_text() == "old"
    make().save(path)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size > 1000


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_new_files_follow_the_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    path = make().save(tmp_path / "pair.json")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\x80\x04N.", b'{"format": "captum_m2ib.explanation", "version": 99}']
)
@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_other_files_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold an explanation"):
        Explanation.load(path)


def test_pickled_arrays_are_refused(tmp_path):
    path = make().save(tmp_path / "pair.npz")
    with np.load(path) as stored:
        arrays = dict(stored)
    buffer = io.BytesIO()
    np.savez(buffer, **{**arrays, "image_bits": np.array([{}], dtype=object)})
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Explanation.load(path)


def whole(width=100, height=20):
    picture = np.full((height, width, 3), 200, np.uint8)
    picture[:, width // 2 :] = 60
    return picture


def test_a_map_is_laid_over_the_whole_picture():
    bits = np.zeros((12, 20), np.float32)
    bits[3, 4:6] = 1.0  # in the picture: 10 columns to the right of the middle, 7.5 rows down
    bits[9, 3] = 5.0  # on padding
    found = make(image_bits=bits).bits_over(whole())
    assert found.shape == (20, 100) and found.dtype == np.float32
    assert not found[:, :50].any() and found.sum() == pytest.approx(2.0, rel=1e-3)
    rows, columns = np.indices(found.shape) + 0.5
    middle = (rows * found).sum() / found.sum(), (columns * found).sum() / found.sum()
    assert middle == pytest.approx((8.75, 62.5), abs=0.3)
    twice = make(image_bits=bits).bits_over(Image.fromarray(whole(200, 40)))
    assert twice.shape == (40, 200) and twice.sum() == pytest.approx(2.0, rel=1e-3)
    small = make(image_bits=bits).bits_over(whole(25, 5))
    assert small.shape == (5, 25) and small.sum() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_figures_and_pages_of_the_whole_picture(tmp_path, suffix):
    explanation = make()
    picture, bits = explanation.shown(whole())
    np.testing.assert_array_equal(picture, whole())
    np.testing.assert_array_equal(bits, explanation.bits_over(whole()))
    large, bits = explanation.shown(whole(3000, 600))
    assert large.shape == (144, 720, 3) and bits.shape == (144, 720)
    panels = [axes.images[0].get_array() for axes in explanation.plot(whole()).axes[1:3]]
    assert all(panel.shape == (144, 720, 3) for panel in panels)
    # What the model did not see has no heat.
    assert np.ptp(panels[1][:, :350].astype(int)) <= 1 < np.ptp(panels[1][:, 370:].astype(int))
    path = explanation.save(tmp_path / f"pair{suffix}", whole())
    assert path.read_bytes() != explanation.save(tmp_path / f"seen{suffix}").read_bytes()


def test_totals_are_the_same_in_both_figures():
    words = [
        [text.get_text() for text in figure.axes[0].texts if "image " in text.get_text()]
        for figure in (make().plot(), make().plot(whole()))
    ]
    assert words[0] == words[1] != []


@pytest.mark.parametrize(
    ("changes", "original", "message"),
    [
        ({"region": None}, whole(), r"^original: where the map lies in the whole picture is not known.*leave original"),
        ({}, whole(50, 20), r"^original: expected the whole picture .* 100 x 20 pixels or .* got 50 x 20"),
        ({}, "none.png", r"^original: there is no file none.png"),
    ],
)
def test_originals_that_cannot_be(changes, original, message):
    with pytest.raises(ValueError, match=message):
        make(**changes).plot(original)


def test_data_holds_no_original(tmp_path):
    for suffix in (".npz", ".json"):
        with pytest.raises(ValueError, match=rf"^original: {suffix} holds what the model saw"):
            make().save(tmp_path / f"pair{suffix}", whole())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "nats"}, "^unit must be one of bits, score, relative, got 'nats'"),
        ({"region": (1, 2, 3)}, "^region: expected left, top, right, bottom, width and height"),
        ({"region": (0, 0, "a", 1, 1, 1)}, "^region: expected left"),
        ({"region": (5, 0, 5, 10, 20, 10)}, "^region: expected a part of a picture"),
        ({"region": (0, 0, float("nan"), 10, 20, 10)}, "^region: expected a part of a picture"),
        ({"region": (30, 0, 40, 10, 20, 10)}, "^region: expected a part of a picture"),
    ],
)
def test_units_and_regions_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_its_short_form_names_the_unit():
    assert "units of the score over 12 x 20 pixels" in repr(make())
    assert "image: relative values over" in repr(make(unit="relative")) and "bits over" in repr(make(unit="bits"))
