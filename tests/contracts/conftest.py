import pytest
from cases import CASES, Subject

_subjects: dict[str, Subject] = {}


@pytest.fixture
def subject(case) -> Subject:
    if case.model not in _subjects:
        _subjects[case.model] = Subject(case.model)
    return _subjects[case.model]


def pytest_generate_tests(metafunc):
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "case" in metafunc.fixturenames and "case" not in chosen:
        metafunc.parametrize("case", CASES, ids=str)
