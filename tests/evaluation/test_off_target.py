import sys

import pytest

from mtmoe.evaluation import off_target
from mtmoe.evaluation.off_target import LanguageChecker, OffTarget


@pytest.fixture(scope="module")
def checker():
    return LanguageChecker(["en", "de", "fr", "hu", "ro", "mk", "chr", "pon"])


@pytest.mark.parametrize(
    ("text", "target", "verdict"),
    [
        ("Die Datei konnte nicht gespeichert werden.", "de", "on"),
        ("Le fichier n'a pas pu être enregistré.", "de", "off"),
        ("Датотеката не може да се зачува.", "mk", "on"),
        ("Датотеката не може да се зачува.", "ro", "off"),  # Cyrillic where Latin belongs
        ("The file could not be saved.", "mk", "off"),
        ("ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", "chr", "on"),  # no identifier knows Cherokee, but nothing else here has its script
        ("The file could not be saved.", "chr", "off"),
        ("Kitail kin kapwaiada mepwukat", "pon", "unsure"),  # Latin, and py3langid does not know Pohnpeian
        ("Датотеката", "pon", "off"),
        ("OK", "de", "unsure"),
        ("", "de", "unsure"),
        ("%(count)s / {name} <b>42</b> https://example.org/the/file", "de", "unsure"),
        ("Abbrechen %(name)s der Datei", "de", "on"),
    ],
)
def test_known_sentences(checker, text, target, verdict):
    assert checker.judge(text, target) == verdict


def test_scripts_made_of_several():
    checker = LanguageChecker(["ja", "zh", "ko", "en"])
    assert checker.judge("ファイルを保存できませんでした。", "ja") == "on"
    assert checker.judge("ファイルを保存できませんでした。", "zh") == "off"
    assert checker.judge("파일을 저장할 수 없습니다.", "ko") == "on"
    assert checker.judge("無法儲存檔案，因為磁碟已滿。", "zh") == "on"
    assert checker.judge("The file could not be saved.", "ja") == "off"


def test_two_scripts_of_one_language():
    checker = LanguageChecker(["sr", "sr_Latn", "en"])
    assert checker.judge("Датотека није могла бити сачувана.", "sr") == "on"
    assert checker.judge("Датотека није могла бити сачувана.", "sr_Latn") == "off"


def test_a_reference_that_does_not_pass_makes_the_segment_unsure(checker):
    outputs = ["The file could not be saved.", "PostgreSQL connection settings", "Die Datei wurde gespeichert.", "OK"]
    references = ["Датотеката не може да се зачува.", "PostgreSQL connection settings", "Датотеката е зачувана.", "OK"]
    counts = checker.count(outputs, "mk", references)
    assert counts == OffTarget(off=2, judged=2, unsure=2)
    assert counts.share == 1.0
    assert checker.count(outputs, "mk").off == 3


def test_no_judgement_has_no_share(checker):
    assert checker.count(["OK", "42"], "de", ["OK", "42"]).share is None


def test_method_names_what_goes_by_script(checker):
    assert checker.method == "script, then py3langid among de, en, fr, hu, mk, ro; by script only: chr, pon"


def test_without_identifier_the_script_still_counts(monkeypatch):
    off_target._load_identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    checker = LanguageChecker(["en", "de", "mk"])
    off_target._load_identifier.cache_clear()
    assert checker.method.startswith("script only")
    assert checker.judge("The file could not be saved.", "mk") == "off"
    assert checker.judge("Датотеката не може да се зачува.", "mk") == "on"
    assert checker.judge("The file could not be saved.", "de") == "unsure"


def test_unknown_target(checker):
    with pytest.raises(ValueError, match="target='fi' is not a language of this checker"):
        checker.judge("Tiedostoa ei voitu tallentaa.", "fi")
