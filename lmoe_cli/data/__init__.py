"""Text to learn from and to be judged by: records of a file, and what of them a model has to predict."""
