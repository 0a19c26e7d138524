import json
from pathlib import Path

import pytest

SENTENCES = {
    "en": [
        "The file could not be saved because the disk is full.",
        "Please enter a valid address and try again.",
        "All the changes were lost when the window closed.",
        "You have three new messages in your inbox.",
        "The password that you have chosen is too short.",
        "OK",
    ],
    "de": [
        "Die Datei konnte nicht gespeichert werden, weil die Platte voll ist.",
        "Bitte geben Sie eine gültige Adresse ein und versuchen Sie es erneut.",
        "Alle Änderungen gingen verloren, als das Fenster geschlossen wurde.",
        "Sie haben drei neue Nachrichten in Ihrem Posteingang.",
        "Das Passwort, das Sie gewählt haben, ist zu kurz.",
        "OK",
    ],
    "mk": [
        "Датотеката не може да се зачува бидејќи дискот е полн.",
        "Ве молиме внесете важечка адреса и обидете се повторно.",
        "Сите промени беа изгубени кога прозорецот се затвори.",
        "Имате три нови пораки во вашето сандаче.",
        "Лозинката што ја избравте е прекратка.",
        "OK",
    ],
}


def write_data(folder: Path, *, repeat: int = 1) -> Path:
    """Prepared data as `mtmoe prepare` leaves it, as far as evaluation reads it."""
    pairs = {"de-en": 5000, "en-mk": 300, "de-mk": 100}
    directions = ["de-en", "de-mk", "en-de", "en-mk", "mk-de", "mk-en"]
    (folder / "text").mkdir(parents=True)
    (folder / "languages.json").write_text(json.dumps({"languages": ["de", "en", "mk"], "directions": directions}))
    description = {
        "format": 1,
        "recipe": "tiny",
        "fingerprint": "f" * 64,
        "pairs": {pair: {"train": train, "valid": 2, "test": 6 * repeat} for pair, train in pairs.items()},
        "resource": {"de": "high", "en": "high", "mk": "very_low"},
    }
    (folder / "data.json").write_text(json.dumps(description))
    for pair in pairs:
        for language in pair.split("-"):
            for split, lines in (("test", SENTENCES[language] * repeat), ("valid", SENTENCES[language][:2])):
                path = folder / "text" / f"{split}.{pair}.{language}"
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


class FakeModel:
    """Translates by table; `wrong` makes it spoil every n-th segment. Counts what it was asked for."""

    def __init__(self, wrong: int = 0, fail_at: str = "") -> None:
        self.wrong, self.fail_at, self.asked = wrong, fail_at, []

    def __call__(self, texts, source, target, advance):
        direction = f"{source}-{target}"
        if direction == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(direction)
        table = dict(zip(SENTENCES[source], SENTENCES[target], strict=True))
        outputs = [
            table[text][: len(table[text]) // 2] if self.wrong and index % self.wrong == 0 else table[text]
            for index, text in enumerate(texts)
        ]
        advance(len(texts) // 2)
        return outputs


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def fake_model():
    return FakeModel


@pytest.fixture
def make_data():
    return write_data
