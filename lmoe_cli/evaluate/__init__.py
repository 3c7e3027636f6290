"""How good a loadout is on text that nobody trained on, beside what else could be done with the same parts."""
