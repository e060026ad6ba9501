from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.core.keyed_heap import KeyedHeap


@given(
    seed=st.integers(0, 1 << 32),
    names=st.integers(1, 300),
    ranks=st.integers(1, 5),
    removals=st.sampled_from((0.0, 0.1, 0.5)),
    asked=st.sampled_from((0.0, 0.05, 1.0)),
)
def test_it_is_a_dictionary_that_knows_its_least_key(seed, names, ranks, removals, asked):
    """Against a dictionary. Few ranks: keys that come back are those that two entries can have."""
    chance = random.Random(seed)
    heap: KeyedHeap[int] = KeyedHeap()
    model: dict[int, tuple[int, int]] = {}

    def check_first() -> None:
        least = min(model, key=model.__getitem__, default=None)
        assert heap.first() == (None if least is None else (model[least], least))

    for _ in range(1000):
        name = chance.randrange(names)
        if chance.random() < removals:
            assert heap.remove(name) == (model.pop(name, None) is not None)
        else:
            key = (chance.randrange(ranks), name)
            assert heap.put(name, key) == (model.get(name) != key)
            model[name] = key
        assert heap.key(name) == model.get(name)
        assert (name in heap) == (name in model)
        if chance.random() < asked:
            check_first()
    assert len(heap) == len(model)
    assert heap.ordered() == sorted(model, key=model.__getitem__)
    while model:
        check_first()
        name = min(model, key=model.__getitem__)
        heap.remove(name)
        del model[name]
    check_first()


def test_however_often_keys_change_it_stays_small_and_no_change_goes_through_all():
    heap: KeyedHeap[int] = KeyedHeap()
    names = 2000
    for name in range(names):
        heap.put(name, (1, name))
    for step in range(20 * names):
        # There and back: of two entries with the same key one is dead.
        for rank in (0, 1):
            before = len(heap._heap) + len(heap._swept)
            heap.put(step % names, (rank, step % names))
            after = len(heap._heap) + len(heap._swept)
            assert before - after < 5
            assert after <= 3 * names
    assert len(heap) == names
