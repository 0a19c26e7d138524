import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sentencepiece

from mtmoe.data import load_recipe, prepare
from mtmoe.data import prepare as prepare_function
from mtmoe.data.mmap_dataset import read_dataset
from mtmoe.data.progress import Progress
from mtmoe.data.stages import Stages
from mtmoe.errors import DataError

SAMPLE = Path(__file__).parents[2] / "data" / "sample.yaml"


class Recorder(Progress):
    def __init__(self):
        self.steps = []

    def start(self, title, total=None):
        self.steps.append(title)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "data"
    return prepare(load_recipe(SAMPLE), folder)


def test_the_folder_holds_what_it_should(sample):
    data = json.loads((sample.folder / "data.json").read_text())
    assert data["pairs"]["de-en"] == {"train": 200, "valid": 20, "test": 25}
    assert data["resource"] == {"de": "high", "en": "high", "ru": "high"}
    languages = json.loads((sample.folder / "languages.json").read_text())
    assert languages["languages"] == ["de", "en", "ru"]
    assert languages["directions"] == ["de-en", "de-ru", "en-de", "en-ru", "ru-de", "ru-en"]
    assert not list(sample.folder.glob("**/.*")), "no traces of the work"
    assert not sample.folder.with_name("data.partial").exists()
    assert data["vocabulary_size"] == 504
    assert "| de-en | 200 | 20 | 25 | 245 |" in (sample.folder / "summary.md").read_text()


def test_text_and_datasets_agree_line_by_line(sample):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sample.folder / "spm.model"))
    symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    symbols += [line.rsplit(" ", 1)[0] for line in (sample.folder / "dict.txt").read_text().splitlines()]
    for split in ("train", "valid", "test"):
        for side in ("de", "ru"):
            lines = (sample.folder / "text" / f"{split}.de-ru.{side}").read_text(encoding="utf-8").splitlines()
            ids, sizes = read_dataset(sample.folder / "bin" / f"{split}.de-ru.{side}")
            ends = sizes.cumsum()
            assert len(lines) == len(sizes)
            for line, end, size in zip(lines, ends, sizes, strict=True):
                pieces = [symbols[number] for number in ids[end - size : end]]
                assert pieces[-1] == "</s>"
                assert processor.decode(pieces[:-1]) == line


def test_fairseq_reads_the_dictionary(sample):
    fairseq_data = pytest.importorskip("fairseq.data")
    dictionary = fairseq_data.Dictionary.load(str(sample.folder / "dict.txt"))
    assert len(dictionary) == sample.data["vocabulary_size"]
    assert dictionary.index("__ru__") == len(dictionary) - 1
    assert dictionary.string(dictionary.encode_line("__de__ ▁", add_if_not_exist=False)) == "__de__ ▁"


def test_the_same_bytes_every_time(sample, tmp_path, snapshot):
    again = prepare(load_recipe(SAMPLE), tmp_path / "again")
    assert snapshot(again.folder) == snapshot(sample.folder)


def test_nothing_to_do(sample, snapshot):
    before = {path: path.stat().st_mtime_ns for path in sample.folder.rglob("*")}
    recorder = Recorder()
    assert not prepare(load_recipe(SAMPLE), sample.folder, progress=recorder).fresh
    assert recorder.steps == []
    assert {path: path.stat().st_mtime_ns for path in sample.folder.rglob("*")} == before


def test_other_settings_need_force(moses, write_recipe, tmp_path, snapshot):
    out = tmp_path / "out"
    prepare(moses, out)
    before = snapshot(out)
    (tmp_path / "all.de").write_text((tmp_path / "all.de").read_text().replace("Haus", "Heim"), encoding="utf-8")
    with pytest.raises(DataError, match="holds prepared data from other settings or inputs; use --force"):
        prepare(moses, out)
    assert snapshot(out) == before
    assert prepare(moses, out, force=True).fresh
    assert snapshot(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.de", "all.en", "out", "recipe.yaml"]


def test_force_keeps_the_old_data_if_the_new_fails(moses, tmp_path, snapshot):
    out = tmp_path / "out"
    prepare(moses, out)
    before = snapshot(out)
    (tmp_path / "all.de").write_text("one line\n")
    with pytest.raises(DataError, match="equally many lines"):
        prepare(moses, out, force=True)
    assert snapshot(out) == before


def test_a_foreign_folder_is_left_alone(moses, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty and holds no prepared data"):
        prepare(moses, tmp_path / "out", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file; give a folder"):
        prepare(moses, tmp_path / "file")
    assert (tmp_path / "out" / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    assert prepare(moses, tmp_path / "empty").fresh


# Kills the process the n-th time that a file is moved into place: before each file that is written atomically.
KILLER = """
import os, signal, sys
from mtmoe.data import load_recipe, prepare
left = int(sys.argv[3])
replace = os.replace
def counted(*paths):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = counted
prepare(load_recipe(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("survived", [0, 1, 2, 3, 4, 9, 17, 21, 23, 26])
def test_killed_at_any_moment_and_run_again(sample, tmp_path, snapshot, survived):
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(SAMPLE), str(out), str(survived)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not out.exists()
    recorder = Recorder()
    prepared = prepare(load_recipe(SAMPLE), out, progress=recorder)
    assert snapshot(prepared.folder) == snapshot(sample.folder)
    assert ("cleaning train" in recorder.steps) == (survived < 1)
    assert any("SentencePiece" in step for step in recorder.steps) == (survived < 4)


def test_killed_between_the_renames(moses, tmp_path, snapshot):
    out = tmp_path / "out"
    prepare(moses, out)
    expected = snapshot(out)
    out.rename(tmp_path / "out.old")
    assert not prepare(moses, out).fresh
    assert snapshot(out) == expected
    assert not (tmp_path / "out.old").exists()


def test_left_over_work_of_other_settings_does_not_mix(moses, write_recipe, tmp_path, snapshot):
    other = write_recipe(
        "- {type: moses, paths: [all.de, all.en], languages: [de, en], split: auto}", vocabulary="{size: 40}"
    )
    prepare(moses, tmp_path / "expected")
    out = tmp_path / "out"
    for recipe in (moses, other):
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe, out, progress=Interrupting("binarising"))
    prepare(moses, out)
    assert snapshot(out) == snapshot(tmp_path / "expected")


class Interrupting(Progress):
    def __init__(self, step):
        self.step = step
        self.current = ""

    def start(self, title, total=None):
        self.current = title

    def advance(self, units=1):
        if self.current == self.step:
            raise KeyboardInterrupt


def test_two_processes_do_not_mix(moses, tmp_path):
    partial = tmp_path / "out.partial"
    with Stages(partial).locked(), pytest.raises(DataError, match="another process is preparing this data"):
        prepare(moses, tmp_path / "out")


def test_nothing_left(write_recipe, tmp_path):
    (tmp_path / "x.tsv").write_text("same\tsame\n")
    recipe = write_recipe("- {type: tsv, path: x.tsv, columns: [text_a, text_b], languages: [de, en]}")
    with pytest.raises(DataError, match="nothing is left to train on"):
        prepare(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pair_for_evaluation_only(write_recipe, tmp_path):
    lines = [f"en\tde\tword{n} thing{n % 5} tree\tWort{n} Ding{n % 5} Baum" for n in range(60)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.tsv").write_text("fr\tde\tune chose\tein Dingelchen\n")
    columns = "columns: [language_a, language_b, text_a, text_b]"
    recipe = write_recipe(
        f"- {{type: tsv, path: train.tsv, {columns}}}\n- {{type: tsv, path: test.tsv, split: test, {columns}}}",
        languages="[de, en, fr]",
        vocabulary="{size: 30}",
    )
    prepared = prepare_function(recipe, tmp_path / "out")
    assert prepared.data["pairs"]["de-fr"] == {"train": 0, "valid": 0, "test": 1}
    names = sorted(path.name for path in (prepared.folder / "bin").iterdir())
    assert [name for name in names if "de-fr" in name] == [
        "test.de-fr.de.bin", "test.de-fr.de.idx", "test.de-fr.fr.bin", "test.de-fr.fr.idx",
    ]  # fmt: skip
    assert "valid.de-en.de.bin" not in names, "fairseq cannot map an empty file"
