"""The ``mtmoe`` command: what it says, what it loads, and its exit status."""

import subprocess
import sys
import types

import pytest

from mtmoe import __version__, cli
from mtmoe.errors import CheckpointError, ConfigError, DataError, MtmoeError, UnknownLanguage


@pytest.fixture
def command(monkeypatch):
    """A command ``fake`` whose run() does what the test says."""
    module = types.ModuleType("fake_command", "Do what the test says.")
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int, default=3, help="a number")
    module.run = lambda args: 0
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setattr(cli, "COMMANDS", {"fake": ("fake_command", "do it"), "other": ("no_such_module", "do that")})
    return module


def usage_error(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, summary) in cli.COMMANDS.items():
        assert name in text
        assert summary in text


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"mtmoe {__version__}\n"


def test_no_command_is_a_usage_error(capsys):
    assert "COMMAND" in usage_error(capsys)


def test_unknown_command_lists_the_known_ones(capsys):
    error = usage_error(capsys, "trian")
    assert "trian" in error
    for name in cli.COMMANDS:
        assert name in error


def test_command_gets_its_arguments_and_gives_its_status(command):
    seen = []
    command.run = lambda args: seen.append(args.number) or 7
    assert cli.main(["fake", "--number", "5"]) == 7
    assert seen == [5]


def test_help_of_a_command_shows_defaults(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fake", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "Do what the test says." in text
    assert "a number (default: 3)" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--number", "five"], "mtmoe fake: error: argument --number: invalid int value: 'five'"),
        (["--unknown"], "error: unrecognized arguments: --unknown"),
        (["--num", "5"], "error: unrecognized arguments: --num 5"),  # an abbreviation may mean another option tomorrow
    ],
)
def test_wrong_usage_of_a_command(command, capsys, words, text):
    assert text in usage_error(capsys, "fake", *words)


@pytest.mark.parametrize("kind", [MtmoeError, ConfigError, DataError, UnknownLanguage, CheckpointError])
def test_our_errors_are_one_line_and_status_1(command, capsys, kind):
    def run(args):
        raise kind("file.tsv, line 3: two columns, expected three")

    command.run = run
    assert cli.main(["fake"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "mtmoe fake: error: file.tsv, line 3: two columns, expected three\n"
    assert captured.out == ""


def test_bugs_keep_their_traceback(command):
    def run(args):
        raise KeyError("a bug")

    command.run = run
    with pytest.raises(KeyError):
        cli.main(["fake"])


def test_interrupt_is_130(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command.run = run
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "mtmoe fake: interrupted\n"


def test_only_the_called_command_is_imported(command):
    assert cli.main(["fake"]) == 0  # "other" has no module: importing it would raise


def test_a_reader_that_left_is_no_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, types\n"
        "from mtmoe import cli\n"
        "module = types.ModuleType('chatty')\n"
        "module.add_arguments = lambda parser: None\n"
        "def run(args):\n"
        "    for number in range(10**6):\n"
        "        print(number, flush=True)\n"
        "    return 0\n"
        "module.run = run\n"
        "sys.modules['chatty'] = module\n"
        "cli.COMMANDS = {'chatty': ('chatty', 'talk')}\n"
        "sys.exit(cli.main(['chatty']))\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == 1


def test_help_from_outside_loads_nothing_heavy():
    script = (
        "import sys; sys.argv = ['mtmoe', '--help']\n"
        "import atexit; heavy = {'torch', 'fairseq', 'fastapi', 'numpy', 'polars', 'sentencepiece', 'sacrebleu'}\n"
        "atexit.register(lambda: print('loaded:', sorted(heavy & set(sys.modules))))\n"
        "import runpy; runpy.run_module('mtmoe', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "loaded: []" in done.stdout
    assert "usage: mtmoe" in done.stdout


def test_module_and_script_are_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "mtmoe", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"mtmoe {__version__}\n"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mtmoe {name}")
    assert len(text.splitlines()) > 5
