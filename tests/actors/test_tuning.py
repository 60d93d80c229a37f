"""The window with the least expected time a token, found by trying."""

from mara.actors.decoding.tuning import TRIES, TRY_AGAIN, WindowTuner


def run(tuner, seconds, num_passes, num_rows=4):
    """Let the tuner choose for so many passes; what it chose."""
    chosen = []
    for _ in range(num_passes):
        window = tuner.window(num_rows)
        tuner.measured(num_rows, window, seconds(window))
        chosen.append(window)
    return chosen


def test_where_wider_passes_cost_the_same_the_widest_that_helps_is_taken():
    tuner = WindowTuner(8)
    tuner.taken([0] * 70 + [1] * 10 + [2] * 10 + [3] * 10)
    assert run(tuner, lambda window: 1.0 + 0.01 * window, 40)[-20:] == [4] * 20


def test_where_each_candidate_costs_as_much_one_is_examined_and_windows_that_cannot_pay_are_not_tried():
    tuner = WindowTuner(8)
    tuner.taken([0] * 90 + [1] * 10)
    chosen = run(tuner, lambda window: float(window), 40)
    assert chosen == [1] * TRIES + [2] * TRIES + [1] * (40 - 2 * TRIES)


def test_a_window_that_pays_is_found_behind_one_that_does_not():
    """An agent that ends at the first or at the eighth candidate."""
    tuner = WindowTuner(8)
    tuner.taken([0] * 500 + [7] * 500)
    assert run(tuner, lambda window: 1.0 + 0.25 * (window > 1), 40)[-1] == 8


def test_all_candidates_at_once_are_tried_where_they_are_few():
    tuner = WindowTuner(5)
    tuner.taken([0] * 60 + [4] * 40)
    assert run(tuner, lambda window: 1.0 + 0.01 * window, 40)[-1] == 5


def test_a_window_wider_than_the_sets_is_not_tried_for_ever():
    """The passes examine three candidates at most, and cost accordingly."""
    tuner = WindowTuner(8)
    tuner.taken([0] * 900 + [1] * 80 + [2] * 20)
    assert run(tuner, lambda window: float(min(window, 3)), 60)[-1] == 1


def test_it_changes_its_mind_when_the_agent_does():
    tuner = WindowTuner(8)
    tuner.taken([0] * 100)
    cost = {1: 1.0, 2: 1.3, 4: 1.9, 8: 3.0}.__getitem__
    assert run(tuner, cost, 20)[-1] == 1
    tuner.taken([1] * 2000)
    assert run(tuner, cost, 20)[-1] == 2


def test_it_measures_again_after_a_while():
    tuner = WindowTuner(4)
    tuner.taken([0] * 80 + [1] * 20)
    assert run(tuner, lambda window: float(window), TRY_AGAIN)[-1] == 1
    assert run(tuner, lambda window: 1.0, 20)[-1] > 1


def test_windows_are_learnt_apart_for_few_and_many_rows():
    tuner = WindowTuner(4)
    tuner.taken([0] * 60 + [3] * 40)
    assert run(tuner, lambda window: 1.0, 20, num_rows=1)[-1] == 4
    assert run(tuner, lambda window: float(window) ** 2, 20, num_rows=64)[-1] == 1


def test_no_window_is_wider_than_the_candidate_set():
    assert set(run(WindowTuner(3), lambda window: 1.0, 20)) <= {1, 2, 3}
