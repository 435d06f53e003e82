"""Class patches: counted, routed, and taken out exactly."""

import functools
import inspect

import pytest

from diffusion_cache.engine import patches


@pytest.fixture(autouse=True)
def nothing_left():
    before = dict(patches._patches)
    yield
    assert patches._patches == before


def make_classes():
    class Base:
        def step(self, x, *, gain=2):
            """Doubles."""
            if x is None:
                raise KeyError("x")
            return x * gain

    class Child(Base):
        pass

    return Base, Child


def plus(amount):
    def make(original):
        def step(self, *args, **kwargs):
            return original(self, *args, **kwargs) + amount

        return step

    return make


def test_patch_and_release():
    Base, _ = make_classes()
    original, instance = Base.step, Base()
    patches.acquire(Base, "step", plus(1))
    assert instance.step(3) == 7  # of instances made before, too
    assert instance.step(3, gain=3) == 10
    assert Base.step is not original
    patches.release(Base, "step")
    assert Base.step is original
    assert instance.step(3) == 6


def test_signature_and_name_stay():
    Base, _ = make_classes()
    signature = inspect.signature(Base.step)
    patches.acquire(Base, "step", plus(1))
    assert inspect.signature(Base.step) == signature
    assert (Base.step.__name__, Base.step.__doc__) == ("step", "Doubles.")
    patches.release(Base, "step")


def test_uses_are_counted():
    Base, _ = make_classes()
    original = Base.step
    for _ in range(3):
        patches.acquire(Base, "step", plus(1))
        assert Base().step(3) == 7  # one patch for all
    for _ in range(2):
        patches.release(Base, "step")
        assert Base().step(3) == 7
    patches.release(Base, "step")
    assert Base.step is original
    patches.acquire(Base, "step", plus(5))  # and again, with another
    assert Base().step(3) == 11
    patches.release(Base, "step")
    assert Base.step is original


def test_inherited_attribute_is_restored_by_deletion():
    Base, Child = make_classes()
    original = Base.step
    patches.acquire(Child, "step", plus(1))
    assert (Child().step(3), Base().step(3)) == (7, 6)
    patches.release(Child, "step")
    assert "step" not in vars(Child)
    assert Child.step is Base.step is original


@pytest.mark.parametrize("acquired", [("Base", "Child"), ("Child", "Base")])
@pytest.mark.parametrize("released", [("Base", "Child"), ("Child", "Base")])
def test_parent_and_child_in_any_order(acquired, released):
    classes = dict(zip(("Base", "Child"), make_classes(), strict=True))
    original, calls = classes["Base"].step, []

    def noted(name):
        def make(inner):
            def step(self, x):
                calls.append(name)
                return inner(self, x)

            return step

        return make

    for name in acquired:
        patches.acquire(classes[name], "step", noted(name))
    assert classes["Child"]().step(3) == 6
    assert "Child" in calls
    patches.release(classes[released[0]], "step")
    calls.clear()
    assert classes["Child"]().step(3) == classes["Base"]().step(3) == 6
    assert released[0] not in calls
    patches.release(classes[released[1]], "step")
    calls.clear()
    assert classes["Child"]().step(3) == 6
    assert calls == []
    assert classes["Base"].step is original
    assert "step" not in vars(classes["Child"])


def test_wrapped_by_someone_else_meanwhile():
    """Their wrapper stays, and what it wraps behaves as the original."""
    Base, _ = make_classes()
    patches.acquire(Base, "step", plus(1))
    patched = Base.step

    @functools.wraps(patched)
    def theirs(self, x):
        return patched(self, x) * 100

    Base.step = theirs
    assert Base().step(3) == 700
    patches.release(Base, "step")
    assert Base.step is theirs
    assert Base().step(3) == 600
    patches.acquire(Base, "step", plus(1))  # a new patch goes around theirs, once
    assert Base().step(3) == 601
    patches.release(Base, "step")
    assert Base.step is theirs
    Base.step = patched  # they take theirs out again and leave what they found
    assert Base().step(3) == 6


def test_replaced_by_someone_else_meanwhile():
    Base, _ = make_classes()
    patches.acquire(Base, "step", plus(1))
    Base.step = replacement = lambda self, x: "theirs"
    patches.release(Base, "step")
    assert Base.step is replacement


def test_exceptions_pass_through_and_leave_the_patch():
    Base, _ = make_classes()
    patches.acquire(Base, "step", plus(1))
    with pytest.raises(KeyError, match="x"):
        Base().step(None)
    assert Base().step(3) == 7
    patches.release(Base, "step")
    with pytest.raises(KeyError, match="x"):
        Base().step(None)


def test_nothing_is_left_where_the_patch_cannot_be_made():
    Base, _ = make_classes()
    original = Base.step

    def broken(original):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        patches.acquire(Base, "step", broken)
    with pytest.raises(AttributeError):
        patches.acquire(Base, "missing", plus(1))
    assert Base.step is original
    assert "missing" not in vars(Base)


def test_release_without_acquire():
    Base, _ = make_classes()
    with pytest.raises(KeyError):
        patches.release(Base, "step")


def test_attributes_of_one_class_are_apart():
    class Pipe:
        def __call__(self):
            return 1

        def progress_bar(self):
            return 2

    patches.acquire(Pipe, "__call__", plus(10))
    patches.acquire(Pipe, "progress_bar", plus(20))
    pipe = Pipe()
    assert (pipe(), pipe.progress_bar()) == (11, 22)
    patches.release(Pipe, "__call__")
    assert (pipe(), pipe.progress_bar()) == (1, 22)
    patches.release(Pipe, "progress_bar")
    assert (pipe(), pipe.progress_bar()) == (1, 2)
