"""What is learned: the sections of a recipe. See `schema.py` for its whole tree."""

from megakd.recipe.schema import (
    Checkpoint,
    Data,
    Evaluation,
    Feature,
    Interactive,
    Kernels,
    Log,
    Model,
    Objectives,
    Optim,
    Recipe,
    Similarity,
    Student,
    Teacher,
    Views,
    Watchdog,
)
from megakd.recipe.section import Section, TeacherMode
from megakd.recipe.vqa import (
    Answers,
    Decoder,
    LearningRates,
    Lora,
    QuestionSource,
)

__all__ = [
    "Answers",
    "Checkpoint",
    "Data",
    "Decoder",
    "Evaluation",
    "Feature",
    "Interactive",
    "Kernels",
    "LearningRates",
    "Log",
    "Lora",
    "Model",
    "Objectives",
    "Optim",
    "QuestionSource",
    "Recipe",
    "Section",
    "Similarity",
    "Student",
    "Teacher",
    "TeacherMode",
    "Views",
    "Watchdog",
]
