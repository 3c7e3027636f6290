"""Write a loadout as one ordinary model or adapter."""
