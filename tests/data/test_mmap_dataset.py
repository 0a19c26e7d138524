import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtmoe.data.mmap_dataset import number_type, read_dataset, write_dataset
from mtmoe.errors import DataError

items = st.lists(st.lists(st.integers(0, 65_000), min_size=1, max_size=9), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None)
@given(items=items, dtype=st.sampled_from([np.uint16, np.int32, np.int64]))
def test_fairseq_reads_it_back(tmp_path_factory, items, dtype):
    indexed_dataset = pytest.importorskip("fairseq.data.indexed_dataset")
    prefix = tmp_path_factory.mktemp("mmap") / "train.de-en.de"
    sizes = np.array([len(item) for item in items])
    write_dataset(prefix, np.concatenate(items).astype(np.int64), sizes, np.dtype(dtype))
    dataset = indexed_dataset.MMapIndexedDataset(str(prefix))
    assert indexed_dataset.infer_dataset_impl(str(prefix)) == "mmap"
    assert [dataset[number].tolist() for number in range(len(dataset))] == items
    assert dataset.sizes.tolist() == sizes.tolist()
    ids, read_sizes = read_dataset(prefix)
    assert ids.dtype == dtype
    assert ids.tolist() == [number for item in items for number in item]
    assert read_sizes.tolist() == sizes.tolist()


def test_number_type():
    assert number_type(65_499) == np.uint16
    assert number_type(65_500) == np.int32


def test_damage_is_noticed(tmp_path):
    prefix = tmp_path / "x"
    with pytest.raises(DataError, match=r"x\.idx is missing; copy it again, or run `mtmoe prepare` again"):
        read_dataset(prefix)
    write_dataset(prefix, np.arange(6), np.array([2, 4]), np.dtype(np.uint16))
    data = prefix.with_name("x.bin")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"x\.bin has 11 bytes, its index says 12: it is not whole"):
        read_dataset(prefix)
    index = prefix.with_name("x.idx")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"x\.idx is damaged, or of a version"):
        read_dataset(prefix)
    index.write_bytes(b"TNTIDX\x00\x00")
    with pytest.raises(DataError, match="not an index"):
        read_dataset(prefix)
    with pytest.raises(ValueError, match="the sizes add up to 3, but there are 2 ids"):
        write_dataset(prefix, np.arange(2), np.array([3]), np.dtype(np.uint16))
