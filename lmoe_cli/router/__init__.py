"""What produces gates: one router per file, its maths and paper in the docstring."""
