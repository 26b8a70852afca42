"""How fast a run goes: the bar, the time left, and what limits it."""

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

from accelerate import Accelerator
from tqdm import tqdm

from mixup_recipes.recipe import Recipe

T = TypeVar("T")


class Progress:
    """A bar with images/s and the time left on a terminal; a line per evaluation in a pipe; silence on other ranks."""

    NOTICE, SOON = 20, 30.0  # updates or seconds, whichever pass first, after which the limiting stage is named

    def __init__(self, accelerator: Accelerator, recipe: Recipe, start: int, total: int):
        self.main, self.images, self.left = accelerator.is_main_process, recipe.batch_size, total - start
        hidden = not self.main or not sys.stderr.isatty()
        self.bar = tqdm(
            total=total * self.images, initial=start * self.images, unit=" images", disable=hidden, dynamic_ncols=True
        )
        self.noticed = False
        self.updates = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new window of time: after a log line, an evaluation, a checkpoint."""
        if self.updates:
            self.notice()
        self.began, self.waited, self.updates = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; how long each is waited for is counted."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def update(self) -> None:
        """One update is done."""
        self.updates += 1
        self.left -= 1
        self.bar.update(self.images)
        if not self.noticed and (self.updates >= self.NOTICE or time.perf_counter() - self.began > self.SOON):
            self.notice()

    def notice(self) -> None:
        """Say once what limits the run: loading above a third of the time means that it does."""
        if self.noticed:
            return
        self.noticed = True
        rate, share = self.speed()
        stage = "loading images" if share > 1 / 3 else "the model"
        minutes = self.left * self.images / rate / 60
        left = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
        pace = f"{rate:.0f}" if rate > 10 else f"{rate:.2g}"
        self.say(
            f"{pace} images/s, {share:.0%} of the time waiting for images: limited by {stage}; "
            f"about {left} of training left"
        )

    def speed(self) -> tuple[float, float]:
        """Images per second over all processes, and the share of time spent waiting for images."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        return self.updates * self.images / elapsed, self.waited / elapsed

    def say(self, text: str) -> None:
        """A line beside the bar, on the main process."""
        if self.main:
            self.bar.write(text, file=sys.stdout) if not self.bar.disable else print(text, flush=True)
