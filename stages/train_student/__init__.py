"""`kd train-student`: a student from a view, methods and stored teacher signals. Importing this is light."""

from .stage import TrainStudent

__all__ = ["TrainStudent"]
