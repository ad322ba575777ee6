"""Broken defences, each refused by the attack of that name. A package: file names repeat."""
