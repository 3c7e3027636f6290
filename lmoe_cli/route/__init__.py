"""Seeing what a router does: which expert had how much say in which token, and what would be without one of them."""
