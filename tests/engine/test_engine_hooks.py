"""Results of evaluations as flat numbers, and the choice of the best."""

import pytest

from the_mask.engine.hooks import EvalHook, find_metric, flatten_results

RESULTS = {
    "camvid_val": {"sem_seg": {"mIoU": 40, "VC8": 50.5, "IoU-sky": 3.0, "IoU-road/lane": 1.0}},
    "note": "text",
    "flag": True,
}


def test_flatten() -> None:
    assert flatten_results(RESULTS) == {
        "camvid_val/sem_seg/mIoU": 40.0,
        "camvid_val/sem_seg/VC8": 50.5,
        "camvid_val/sem_seg/IoU-sky": 3.0,
        "camvid_val/sem_seg/IoU-road/lane": 1.0,
    }


@pytest.mark.parametrize(
    ("metric", "found"),
    [
        ("mIoU", "camvid_val/sem_seg/mIoU"),
        ("camvid_val/sem_seg/VC8", "camvid_val/sem_seg/VC8"),
        ("IoU", None),
        ("sem_seg/mIoU", "camvid_val/sem_seg/mIoU"),
        ("IoU-road/lane", "camvid_val/sem_seg/IoU-road/lane"),
        ("seg/mIoU", None),
    ],
)
def test_find(metric: str, found: str | None) -> None:
    result = find_metric(flatten_results(RESULTS), metric)
    assert (result[0] if result else None) == found


def test_state_of_another_metric_is_not_taken() -> None:
    hook = EvalHook(1, "mIoU")
    hook.load_state_dict({"best": 80.0, "best_iteration": 3, "metric": "VC8"})
    assert hook.best is None
    hook.load_state_dict({"best": 30.0, "best_iteration": 3, "metric": "mIoU"})
    assert hook.best == 30.0
    hook.take_best({"sem_seg/mIoU": 20.0}, 9)
    assert (hook.best, hook.best_iteration) == (30.0, 3)
    hook.take_best({"sem_seg/mIoU": 35.0}, 9)
    assert (hook.best, hook.best_iteration) == (35.0, 9)
