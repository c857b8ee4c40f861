"""The arithmetic that networks and supernets are made of."""
