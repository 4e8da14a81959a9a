"""What nobody wants any longer is ended: a task, or a group of workers with the cores that they hold."""

from typing import Any

GRACE_SECONDS = 3


def end_task(reference: Any, *, force: bool) -> None:
    """Cancel the task `reference` unless it has ended.

    Ray hands out a task's result a moment before it strikes the task off its list. A task that is cancelled in that
    moment is struck off twice, and Ray ends the whole driver for it ("Tried to complete task that was not pending").
    """
    import ray

    if not ray.wait([reference], timeout=0)[0]:
        ray.cancel(reference, force=force)


def end_group(reference: Any, board: Any, key: str) -> None:
    """End the group held together by the task `reference`, if it has not ended, and free its cores.

    Asked to, Ray Train ends it in order. Where the task is gone or does not answer, nobody else would free the cores
    before the driver ends: Ray Train's own watchman needs the dashboard.
    """
    import ray

    end_task(reference, force=False)
    if not ray.wait([reference], timeout=GRACE_SECONDS)[0]:
        end_task(reference, force=True)
    for reservation in ray.get(board.take_places.remote(key)):
        ray.util.remove_placement_group(reservation)
