"""Talking to a loadout: the conversation, its commands, and two terminals that show them."""
