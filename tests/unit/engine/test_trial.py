"""Two ways of computing logits are told apart by what they compute, and by nothing that is no number."""

import pytest
import torch

from server.engine.trial import NUM_STEPS, Trial, difference_of_logits

NAN, INF = float("nan"), float("inf")


def logits(rows: int = 3, vocab_size: int = 50) -> torch.Tensor:
    return torch.randn((rows, vocab_size), generator=torch.Generator().manual_seed(rows))


def test_difference_is_relative_to_the_spread() -> None:
    expected = logits()
    assert difference_of_logits(expected, expected) == 0
    assert difference_of_logits(expected + 0.5 * expected.std(correction=0), expected) == pytest.approx(0.5)
    assert difference_of_logits(100 * expected + 7, 100 * expected) == pytest.approx(
        7 / float(100 * expected.std()), 1e-2
    )


@pytest.mark.parametrize("spoiled", [NAN, INF])
@pytest.mark.parametrize("row", [0, 2])
def test_row_without_numbers_in_the_eager_answer_is_left_out(spoiled: float, row: int) -> None:
    found, expected = logits() + 0.1, logits()
    wanted = difference_of_logits(found[[i for i in range(3) if i != row]], expected[[i for i in range(3) if i != row]])
    expected[row, 7] = spoiled

    assert difference_of_logits(found, expected) == pytest.approx(wanted)
    found[row] = NAN
    assert difference_of_logits(found, expected) == pytest.approx(wanted)


@pytest.mark.parametrize("spoiled", [NAN, INF, -INF])
@pytest.mark.parametrize("row", [0, 2])
def test_row_without_numbers_in_the_compiled_answer_alone_differs_by_infinity(spoiled: float, row: int) -> None:
    found = logits()
    found[row, 7] = spoiled

    assert difference_of_logits(found, logits()) == INF


def test_nothing_is_said_of_steps_in_which_no_row_has_numbers() -> None:
    assert difference_of_logits(logits(), torch.full_like(logits(), NAN)) is None
    assert difference_of_logits(logits(), torch.full_like(logits(), -INF)) is None


@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_masked_tokens_neither_count_nor_widen_the_spread(mask: float) -> None:
    found, expected = logits() + 0.1, logits()
    wanted = difference_of_logits(found[:, :40], expected[:, :40])
    found[:, 40:] = expected[:, 40:] = mask

    assert difference_of_logits(found, expected) == pytest.approx(wanted)
    found[1, 45] = -INF
    assert difference_of_logits(found, expected) == pytest.approx(wanted)


def test_mask_on_other_tokens_is_an_infinite_difference() -> None:
    found, expected = logits(), logits()
    found[:, 40:] = expected[:, 40:] = -INF
    found[1, 45] = 3.0

    assert difference_of_logits(found, expected) == INF
    assert difference_of_logits(expected, found) == INF


def trial_of(differences: list[float]) -> Trial:
    trial = Trial()
    for difference in differences:
        trial.add(eager_s=1.0, compiled_s=0.5, difference=difference)
    return trial


def test_trial_lets_rounding_pass() -> None:
    trial = trial_of([0.01, 0.04, 0.0] * (NUM_STEPS // 3))
    assert trial.is_over
    assert trial.is_faster
    assert trial.fault(0.01) is None


@pytest.mark.parametrize("bad", [NAN, INF, 1.0])
@pytest.mark.parametrize("place", [0, 3, NUM_STEPS - 1])
def test_one_step_far_off_is_a_fault_wherever_it_comes(bad: float, place: int) -> None:
    differences = [0.0] * NUM_STEPS
    differences[place] = bad
    for count in range(place + 1, NUM_STEPS + 1):
        assert trial_of(differences[:count]).fault(0.01) is not None
    assert trial_of(differences[:place]).fault(0.01) is None


@pytest.mark.parametrize("place", range(NUM_STEPS))
def test_steps_that_nearly_all_differ_a_little_are_a_fault_at_the_end(place: int) -> None:
    differences = [0.03] * NUM_STEPS
    differences[place] = 0.0
    assert trial_of(differences).fault(0.01) is not None
    assert trial_of(differences[:-1]).fault(0.01) is None


@pytest.mark.parametrize(("ratio", "is_faster"), [(0.9, True), (0.99, False), (1.1, False)])
def test_faster_way_is_the_faster_one_on_most_steps_however_long_these_are(ratio: float, is_faster: bool) -> None:
    trial = Trial()
    for number in range(NUM_STEPS):
        eager_s = 0.01 * (1 + number % 5)
        # A pause of the machine in a few of them, now in this way and now in that, decides nothing.
        pause_s = 1.0 if number % 4 == 0 else 0.0
        trial.add(
            eager_s=eager_s + (pause_s if number % 8 else 0.0),
            compiled_s=ratio * eager_s + (0.0 if number % 8 else pause_s),
            difference=0.0,
        )
    assert trial.is_faster is is_faster
