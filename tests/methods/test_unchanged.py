"""Patterns of objects: the native check and the one in Python say the same."""

import gc
import weakref

import pytest
import torch

from peftkern.methods import unchanged as u

NATIVE = pytest.param(
    u.Unchanged,
    marks=pytest.mark.skipif(u.Unchanged is None, reason="the native code is not built"),
    id="native",
)
BOTH = pytest.mark.parametrize("Unchanged", [NATIVE, pytest.param(u.PythonUnchanged, id="python")])


class Thing:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Sub(Thing):
    pass


class Refuses:
    def __getattr__(self, name):
        raise RuntimeError("no")

    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None


LIST, OBJECT = [1, "a"], object()
X = torch.zeros(2, 3)
# pattern, what matches it, what does not
CASES = {
    "same": (u.same(OBJECT), [OBJECT], [object(), None]),
    "equal": (u.equal(0.5), [0.5, float("0.5")], [0.25, 1, None]),
    "equal is of one type": (u.equal(1), [1], [True, 1.0, 2]),
    "equal list": (u.equal(LIST), [[1, "a"]], [[1], (1, "a"), [1, "b"], [1, "a", 2]]),
    "equal that raises": (u.equal(Refuses()), [], [Refuses()]),
    "empty": (u.EMPTY, [{}, [], ()], [{1: 2}, [0], 3, None]),
    "last": (u.last(3), [(3,), (1, 3), torch.Size([2, 3])], [(), (3, 1), [3], 3]),
    "items": (u.items({"a": u.same(1), "b": u.ABSENT}), [{"a": 1}, {"a": 1, "c": 2}], [{}, {"a": 2}, {"a": 1, "b": None}, 1]),
    "nested": (u.items({"a": u.items({"b": u.EMPTY})}), [{"a": {"b": []}}], [{"a": {}}, {"a": {"b": [1]}}, {"a": 1}]),
    "instance": (
        u.instance(Thing, {"a": u.equal(1), "forward": u.ABSENT}, {}),
        [Thing(a=1), Thing(a=1, b=2)],
        [Thing(), Thing(a=2), Sub(a=1), Thing(a=1, forward=None), {"a": 1}],
    ),
    "attributes": (u.instance(torch.Tensor, {}, {"shape": u.last(3), "dtype": u.same(torch.float32)}),
                   [X, X[0]], [X.t(), X.double(), torch.nn.Parameter(X), 1]),
    "attribute that raises": (u.instance(Refuses, {}, {"a": u.EMPTY}), [], [Refuses()]),
    "at": (u.at({"a": 1}, u.items({"a": u.equal(1)})), [None, 5], []),
    "at another": (u.at({"a": 2}, u.items({"a": u.equal(1)})), [], [None, 5]),
    "call": (u.call(len, ("abc",), u.equal(3)), [None], []),
    "call of another answer": (u.call(len, ("abc",), u.equal(2)), [], [None]),
    "call that raises": (u.call(len, (3,), u.equal(2)), [], [None]),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_pattern(Unchanged, case):
    pattern, fitting, others = CASES[case]
    match = Unchanged(pattern).match
    for x in fitting:
        assert match(x) == (), x
    for x in others:
        assert match(x) is None, x


@BOTH
def test_what_is_kept(Unchanged):
    a, b = Thing(w=X), Thing(w=None)
    parts = u.keep(1, u.instance(torch.Tensor, {}, {})), u.keep(0, u.same(None))
    pattern = [u.instance(Thing, {"w": part}, {}) for part in parts]
    match = Unchanged(*pattern, u.at(OBJECT, u.keep(2, u.same(OBJECT)))).match
    none, kept, held = match(a, b)
    assert none is None and kept is X and held is OBJECT
    assert match(b, a) is None
    a.w = torch.ones(1)
    assert match(a, b)[1] is a.w


@BOTH
def test_a_list_is_compared_with_what_it_held(Unchanged):
    names = ["a"]
    match = Unchanged(u.equal(names)).match
    names.append("b")
    assert match(names) is None and match(["a"]) == ()


@BOTH
def test_a_pattern_may_change_afterwards(Unchanged):
    fields = {"a": u.equal("some " + "text")}
    match = Unchanged(u.items(fields)).match
    fields.clear()
    gc.collect()
    assert match({"a": "some text"}) == ()


@BOTH
def test_nothing_is_kept_alive(Unchanged):
    thing = Thing(w=Thing())
    match = Unchanged(u.instance(Thing, {"w": u.keep(0, u.instance(Thing, {}, {}))}, {})).match
    assert match(thing) is not None
    inner = weakref.ref(thing.w)
    thing.w = None
    assert inner() is None and match(thing) is None


@BOTH
def test_a_cycle_is_collected(Unchanged):
    thing = Thing()
    thing.check = Unchanged(u.at(thing, u.instance(Thing, {}, {})))
    assert thing.check.match() == ()
    gone = weakref.ref(thing)
    del thing
    gc.collect()
    assert gone() is None


@BOTH
def test_more_objects_than_patterns(Unchanged):
    with pytest.raises(TypeError, match="at most 1 objects, got 2"):
        Unchanged(u.EMPTY).match([], [])


@pytest.mark.parametrize("Unchanged", [NATIVE])
@pytest.mark.parametrize(
    "pattern", [3, (), (3,), ("strange",), ("same",), ("empty", 1), ("items", 3), ("object", 3, {}, {}), ("object", int, 3, {}),
                ("keep", "a", u.EMPTY), ("keep", -1, u.EMPTY), ("call", len, [], u.EMPTY), ("items", {"a": 3})],
)  # fmt: skip
def test_what_is_no_pattern(Unchanged, pattern):
    with pytest.raises((TypeError, SystemError)):
        Unchanged(pattern)
