import json
import multiprocessing
import resource

from mtmoe.training.run_log import RunLog

LINE = '2026-01-02 03:04:05 | INFO | train_inner | {{"loss": "2.5", "num_updates": "{update}"}}'


def test_a_full_disk_costs_lines_and_no_training(tmp_path):
    def fill():
        said = []
        with RunLog(tmp_path, said.append) as log:
            log.line(LINE.format(update=1))
            room = (tmp_path / "train.log").stat().st_size + 10  # the limit stands for the end of the disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            log.line(LINE.format(update=2))
            log.line(LINE.format(update=3))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            log.line(LINE.format(update=4))
        (tmp_path / "said").write_text("\n".join(said))

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "train.log").read_text().splitlines() == [LINE.format(update=update) for update in (1, 4)]
    updates = [json.loads(line)["num_updates"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert updates[0] == 1
    assert updates[-1] == 4
    said = (tmp_path / "said").read_text()
    assert said.count("train.log cannot be written: File too large; lines are left out") == 1
    assert "train.log can be written again; 2 lines were left out" in said
