"""Evaluations that the coordinator plays itself, without a cluster."""

from types import SimpleNamespace

from distributed.evaluating import Evaluating


class Own:
    """Plays evaluations as an env actor in this process does: `slices` calls give one."""

    def __init__(self, slices, at_each=lambda played: None):
        self.slices, self.at_each, self.begun, self.played = slices, at_each, 0, 0

    def evaluate(self, weights, server=None):
        self.begun += weights is not None
        self.played += 1
        self.at_each(self.played)
        return "result" if self.played == self.slices else None


def evaluating():
    recorded = []
    recorder = SimpleNamespace(evaluated=lambda steps, evaluation: recorded.append((steps, evaluation)))
    launcher = SimpleNamespace(result=lambda reference, name: reference)
    state = SimpleNamespace(run=SimpleNamespace(recorder=recorder), launcher=launcher, server=None, weights="weights")
    return Evaluating(state), recorded


def test_an_evaluation_in_this_process_is_played_to_its_end():
    played, recorded = evaluating()
    played.due, own = 300, Own(slices=4)
    played.begin(None, own)
    assert (own.begun, own.played, recorded, played.pending) == (1, 4, [(300, "result")], False)


def test_ctrl_c_ends_an_evaluation_in_this_process():
    played, recorded = evaluating()

    def interrupt_at(slice_number):
        played.stop.requested = slice_number == 2

    played.due, own = 300, Own(slices=4, at_each=interrupt_at)
    played.begin(None, own)
    played.begin(None, own)  # nothing begins it again
    assert (own.played, recorded, played.pending) == (2, [], True)
