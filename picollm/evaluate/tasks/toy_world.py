"""The toy world's questions as chat tasks: `sum_train`, `sum_held_out`, …"""

from __future__ import annotations

import random

from picollm.data import toy_world
from picollm.evaluate.chat import Task


def tasks(num_questions: int, seed: int) -> list[Task]:
    """Every task of the toy world, on trained and on held-out facts.

    Args:
        num_questions: distinct questions per task, drawn without replacement; all of them where there are fewer.
        seed: decides which.
    """
    found = []
    for name in toy_world.TASKS:
        for held_out in (False, True):
            full_name = f"{name}_{'held_out' if held_out else 'train'}"
            questions = toy_world.questions(name, held_out)
            chosen = random.Random(f"{seed}/{full_name}").sample(questions, min(num_questions, len(questions)))
            found.append(Task(full_name, tuple(chosen), toy_world.is_right))
    return found
