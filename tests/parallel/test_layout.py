import pytest

from mtmoe.errors import ConfigError
from mtmoe.parallel import Layout


def layout(world: int, size: int, rank: int, **options) -> Layout:
    return Layout(world_size=world, expert_parallel_size=size, rank=rank, **options)


def test_consecutive_ranks_share_out_the_experts():
    fifth = layout(8, 4, 5)
    assert list(fifth.expert_parallel_ranks) == [4, 5, 6, 7]
    assert list(fifth.data_parallel_ranks) == [1, 5]
    assert (fifth.expert_parallel_rank, fifth.data_parallel_size) == (1, 2)
    assert list(fifth.local_experts(8)) == [2, 3]


@pytest.mark.parametrize(("world", "size"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)])
def test_every_expert_is_once_in_each_group_and_groups_are_a_partition(world, size):
    layouts = [layout(world, size, rank) for rank in range(world)]
    for groups in (layouts[0].expert_parallel_groups(), layouts[0].data_parallel_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(world))
    for each in layouts:
        assert each.expert_parallel_ranks in each.expert_parallel_groups()
        assert each.data_parallel_ranks in each.data_parallel_groups()
        experts = [number for rank in each.expert_parallel_ranks for number in layouts[rank].local_experts(12)]
        assert experts == list(range(12))
        assert {layouts[rank].local_experts(12) for rank in each.data_parallel_ranks} == {each.local_experts(12)}


def test_hosts_tell_near_ranks_from_far_ones():
    assert layout(4, 4, 1, hosts=(0, 0, 1, 1)).on_own_host(range(4)) == (True, True, False, False)
    assert layout(4, 2, 3, hosts=(0, 1, 0, 1)).on_own_host([2, 3]) == (False, True)
    assert layout(4, 2, 3).on_own_host([2, 3]) == (True, True)


def test_hosts_cut_groups_into_nodes_and_places():
    both = layout(8, 4, 0, hosts=(0, 0, 1, 1, 2, 2, 0, 0))
    assert both.nodes == 2
    assert [list(group) for group in both.across_groups()] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert [list(group) for group in both.within_groups()] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(group) for group in layout(2, 2, 0, hosts=(0, 1)).across_groups()] == [[0, 1]]
    assert (layout(4, 4, 0).nodes, layout(4, 2, 0, hosts=(0, 0, 1, 1)).nodes) == (1, 1)


@pytest.mark.parametrize(
    ("size", "hosts"),
    [
        (4, (0, 1, 0, 1)),  # not one after the other
        (4, (0, 0, 0, 1)),  # unequally many
        (4, (0, 0, 1, 2)),
        (2, (0, 0, 1, 2)),  # one group on one host, one on two
    ],
)
def test_unlike_hosts_are_refused(size, hosts):
    text = f"equally many consecutive ranks of each group of {size}, but the hosts of the ranks are 0, "
    with pytest.raises(ConfigError, match=text):
        _ = layout(4, size, 0, hosts=hosts).nodes


@pytest.mark.parametrize(
    ("world", "size", "rank", "options", "text"),
    [
        (6, 4, 0, {}, "expert_parallel_size=4 must divide the 6 processes.*choose one of: 1, 2, 3, 6"),
        (2, 4, 0, {}, "expert_parallel_size=4 must divide"),
        (2, 0, 0, {}, "expert_parallel_size=0 must divide"),
        (0, 1, 0, {}, "world_size=0 must be at least 1"),
        (2, 1, 2, {}, "rank=2 must be from 0"),
        (2, 1, 0, {"hosts": (0,)}, "hosts names 1 ranks; there are 2"),
    ],
)
def test_what_cannot_be_is_refused(world, size, rank, options, text):
    with pytest.raises(ConfigError, match=text):
        layout(world, size, rank, **options)


def test_experts_must_divide_evenly():
    with pytest.raises(ConfigError, match="num_experts=6 must be a multiple of expert_parallel_size=4"):
        layout(4, 4, 0).local_experts(6)
