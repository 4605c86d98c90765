"""What is trained in which order: lessons of one length each, and their learning rates."""

from collections.abc import Mapping
from dataclasses import dataclass, field

WARM_UP = 10
DECAY = 0.2
FLOOR = 0.1


@dataclass(frozen=True)
class Lesson:
    """`steps` batches of `batch` texts of `tokens` tokens.

    `mix`, `density` and `likeness` are make_document's, and `prose_weight` is what a token outside
    answers counts beside one within; texts from files use none of them.
    """

    tokens: int
    batch: int
    steps: int
    learning_rate: float
    mix: Mapping[str, float] = field(default_factory=dict)
    density: float = 1.0
    likeness: float = 1.0
    prose_weight: float = 0.05
    warm_up: int = WARM_UP

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ... of the lesson: up, level, down to a tenth."""
        up = (step + 1) / self.warm_up
        down = (self.steps - step) / max(1.0, DECAY * self.steps)
        return self.learning_rate * min(1.0, up, max(FLOOR, down))


def lesson_at(lessons: tuple[Lesson, ...], step: int) -> tuple[Lesson, int]:
    """The lesson that holds step `step` of a stage, and the step's number in it."""
    for lesson in lessons:
        if step < lesson.steps:
            return lesson, step
        step -= lesson.steps
    raise ValueError(f"the stage ends {step + 1} steps before the one asked for")


def total_steps(lessons: tuple[Lesson, ...]) -> int:
    """Steps of a stage."""
    return sum(lesson.steps for lesson in lessons)
