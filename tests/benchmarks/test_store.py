"""JSON lines that survive a killed run."""

from benchmarks.store import Store


def test_records_come_back_whatever_the_order_of_a_key(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    store = Store(path)
    store.add({"a": 1, "b": [2]}, value=3)
    assert {"b": [2], "a": 1} in store
    again = Store(path)
    assert again[{"b": [2], "a": 1}]["value"] == 3
    assert {"a": 2, "b": [2]} not in again
    assert again.select([{"a": 9}, {"a": 1, "b": [2]}]) == [{"key": {"a": 1, "b": [2]}, "value": 3}]


def test_a_half_written_last_line_is_forgotten_and_not_glued_to_the_next(tmp_path):
    path = tmp_path / "results.jsonl"
    Store(path).add({"a": 1}, value=1)
    with path.open("a") as file:
        file.write('{"key": {"a": 2}, "val')
    store = Store(path)
    assert {"a": 1} in store
    assert {"a": 2} not in store
    store.add({"a": 3}, value=3)
    assert set(Store(path).records) == {'{"a": 1}', '{"a": 3}'}


def test_the_latest_record_of_a_key_counts(tmp_path):
    store = Store(tmp_path / "results.jsonl")
    store.add({"a": 1}, value=1)
    store.add({"a": 1}, value=2)
    assert Store(tmp_path / "results.jsonl")[{"a": 1}]["value"] == 2
