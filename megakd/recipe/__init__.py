"""What is learned: the sections of a recipe. See `schema.py` for its whole tree."""

from megakd.recipe.evaluation import Evaluation
from megakd.recipe.models import Model, Preprocess, Student, Teacher
from megakd.recipe.objectives import Feature, Interactive, Objectives, Similarity
from megakd.recipe.optim import Ema, Optim
from megakd.recipe.schedules import Schedule
from megakd.recipe.schema import (
    Checkpoint,
    Data,
    Export,
    Kernels,
    Log,
    Recipe,
    Watchdog,
)
from megakd.recipe.section import Section
from megakd.recipe.views import Views
from megakd.recipe.vqa import Answers, AnswerTeacher, Decoder, LearningRates, Lora, QuestionSource

__all__ = [
    "AnswerTeacher",
    "Answers",
    "Checkpoint",
    "Data",
    "Decoder",
    "Ema",
    "Evaluation",
    "Export",
    "Feature",
    "Interactive",
    "Kernels",
    "LearningRates",
    "Log",
    "Lora",
    "Model",
    "Objectives",
    "Optim",
    "Preprocess",
    "QuestionSource",
    "Recipe",
    "Schedule",
    "Section",
    "Similarity",
    "Student",
    "Teacher",
    "Views",
    "Watchdog",
]
