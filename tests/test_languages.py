import pytest

from mtmoe import languages
from mtmoe.errors import UnknownLanguage


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("de", "de"),
        ("deu", "de"),
        ("deu_Latn", "de"),
        ("DE", "de"),
        ("de-DE", "de"),
        ("de-Latn-AT", "de"),
        ("ger", "de"),
        ("zh", "zh"),
        ("zh-Hans", "zh"),
        ("zh-Hant", "zh_Hant"),
        ("zho_Hant", "zh_Hant"),
        ("zh-TW", "zh_Hant"),
        ("cmn", "zh"),
        ("sr-Latn", "sr_Latn"),
        ("srp", "sr"),
        ("srp_Cyrl", "sr"),
        ("mlg", "mg"),
        ("plt_Latn", "mg"),
        ("lav", "lv"),
        ("tgl", "tl"),
        ("chr", "chr"),
        ("pon", "pon"),
        ("ceb", "ceb"),
        ("mya", "my"),
        ("es-419", "es"),
        ("pt-BR", "pt"),
        ("no", "nb"),
        ("sat_Beng", "sat"),
        ("ara", "ar"),
        ("ajp_Arab", "ajp"),
        ("kas_Deva", "ks_Deva"),
    ],
)
def test_canonical(given, expected):
    assert languages.canonical(given) == expected


def test_all_codes_resolve_both_ways():
    table = languages.all_languages()
    assert len(table) == len({row.code for row in table}) == len({row.flores for row in table})
    for row in table:
        for code in (row.code, row.flores, row.code.replace("_", "-"), *row.aliases):
            assert languages.canonical(code) == row.code
        assert languages.flores(row.code) == row.flores
        assert languages.script(row.flores) == row.flores[-4:]
        assert languages.tag(row.flores) == f"__{row.code}__"
    assert sum(row.flores not in ADDED for row in table) == 204, "FLORES-200 has 204 language and script pairs"


ADDED = {
    "chr_Cher",
    "pon_Latn",
    "srp_Latn",
    "fry_Latn",
    "gsw_Latn",
    "bre_Latn",
    "lat_Latn",
    "cos_Latn",
    "arg_Latn",
    "chv_Cyrl",
    "ina_Latn",
    "haw_Latn",
}


def test_names_and_iso():
    assert languages.name("deu") == "German"
    assert languages.iso639_3("mg") == "plt"


@pytest.mark.parametrize(
    ("code", "text"),
    [("gerrman", "'de' \\(German, deu_Latn\\)"), ("deu_Latm", "'de'"), ("qqq9", "unknown"), ("de-Cyrl", "did you")],
)
def test_unknown_language_helps(code, text):
    with pytest.raises(UnknownLanguage, match=text):
        languages.canonical(code)


def test_directions():
    assert languages.parse_direction("en-de") == ("en", "de")
    assert languages.parse_direction("zh-Hant-eng_Latn") == ("zh_Hant", "en")
    for wrong in ("en", "en-xx9", "en-eng", "", "pt-BR-en"):
        with pytest.raises(UnknownLanguage):
            languages.parse_direction(wrong)


def test_require_lists_what_exists():
    assert languages.require("deu_Latn", ["de", "en"]) == "de"
    with pytest.raises(UnknownLanguage, match=r"target 'fr' is not in this model; it knows de, en\."):
        languages.require("fr", ["en", "de"], "target")
    with pytest.raises(UnknownLanguage, match=r"Did you mean 'de'\?"):
        languages.require("germann", ["en", "de"])
