import pytest
from cases import CASES, Subject

_subjects: dict[str, Subject] = {}


@pytest.fixture
def subject(case) -> Subject:
    if case.model not in _subjects:
        _subjects[case.model] = Subject(case.model)
    return _subjects[case.model]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=str)
