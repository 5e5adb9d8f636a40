import pytest

from distributed.coordinator import Coordinator


@pytest.fixture
def coordinator(tmp_path):
    """Makes coordinators of a run in tmp_path; closes them."""
    made = []

    def make(config):
        made.append(Coordinator(config, tmp_path))
        made[-1].start(resume=False)
        return made[-1]

    yield make
    for each in made:
        each.close()
